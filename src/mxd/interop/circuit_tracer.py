"""circuit-tracer: `config.yaml` and `layer_<i>.safetensors` of every block of a model.

What it computes, as read in circuit-tracer 0.5.0 and its main branch of 2026: `act(x @ W_enc.T + b_enc) @ W_dec +
b_dec`, plus `x @ W_skip.T`. `act` is JumpReLU where the file has `activation_function.threshold`, and ReLU otherwise;
the main branch reads `activation: topk` and `k` from `config.yaml`, and then keeps the k largest scores **without
rectifying them**, so that a token with fewer than k positive scores would get negative activations. Here k latents
without any weight are appended for that: their score is 0 at every token, so no negative score is among the k largest.
They add nothing and are no nodes of any graph, which have none for values of 0.

`mlp.hook_in` and `mlp.hook_out` are what the block's MLP reads, behind its norm and the norm's weights, and what it
returns, before a norm that may follow: what our layers read and predict. `ln2.hook_normalized` stands before the norm's
weights, and `hook_mlp_out` behind the norm that follows in Gemma; neither would do.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mxd.atomic import JSON
from mxd.interop.files import write_tensors, write_text, yaml_text
from mxd.interop.places import Place, Prepared, require_the_blocks_mlp
from mxd.interop.plain import DoesNotFit, PlainLayer, require_one_width

CONFIG_FILE = "config.yaml"


def require_circuit_tracer(layer: PlainLayer, place: Place) -> None:
    """Check that circuit-tracer can hold a layer, whatever stands at the other blocks.

    Raises:
        DoesNotFit: If it cannot.
    """
    if layer.is_autoencoder:
        raise DoesNotFit(
            f"circuit-tracer takes layers that predict an MLP's output from its input; {layer.kind} reads the output. "
            "What fits: transcoder, skip-transcoder."
        )
    require_one_width(layer, "circuit-tracer")
    require_the_blocks_mlp(place, "circuit-tracer")


def require_whole_set(members: Sequence[Prepared]) -> None:
    """Check that layers make up a set: one for every block of the model, alike in all that the set says once.

    Raises:
        DoesNotFit: If they do not.
    """
    blocks = [place.block for _, place, _ in members]
    num_blocks = members[0].place.num_blocks
    assert num_blocks is not None, "each is a block's MLP"
    missing = [block for block in range(num_blocks) if block not in blocks]
    if missing:
        raise DoesNotFit(
            f"circuit-tracer needs a layer for every block of the model, 0 to {num_blocks - 1}; "
            f"{', '.join(map(str, missing))} {'is' if len(missing) == 1 else 'are'} missing. Train the missing ones "
            "too, with equal settings."
        )
    models = sorted({_model_of(about) for _, _, about in members})
    if len(models) > 1:
        raise DoesNotFit(f"circuit-tracer needs layers of one model; got {', '.join(models)}.")
    for name in ("num_latents", "rule", "d_in", "dtype_name"):
        found = {str(getattr(layer, name)) for layer, _, _ in members}
        if len(found) > 1:
            raise DoesNotFit(f"circuit-tracer needs layers of one {name}; got {', '.join(sorted(found))}.")
    if len({layer.W_skip is None for layer, _, _ in members}) > 1:
        raise DoesNotFit("circuit-tracer needs layers with a skip map at every block or at none; got both.")
    ks = {layer.k for layer, _, _ in members}
    if members[0].layer.rule == "topk" and len(ks) > 1:
        raise DoesNotFit(f"circuit-tracer needs layers of one k; got {', '.join(map(str, sorted(ks)))}.")


def write_circuit_tracer(members: Sequence[Prepared], about: Mapping[str, JSON], folder: Path) -> None:
    """Write a set's files."""
    for layer, place, _ in members:
        write_tensors(folder / f"layer_{place.block}.safetensors", _tensors(layer))
    first = members[0].layer
    config: dict[str, JSON] = {
        "model_name": about["model"],
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
    }
    if first.rule == "topk":
        config |= {"activation": "topk", "k": first.k}
    elif first.rule == "l1":
        config["activation"] = "relu"
    write_text(folder / CONFIG_FILE, yaml_text({**config, "mxd": {**about, "padding_latents": num_padding(first)}}))


def num_padding(layer: PlainLayer) -> int:
    """Return how many latents without weights stand behind a layer's own."""
    return layer.k if layer.rule == "topk" else 0


def _model_of(about: Mapping[str, JSON]) -> str:
    revision = about["revision"]
    return f"{about['model'] or 'an unknown one'}{f' at revision {revision}' if revision else ''}"


def _tensors(layer: PlainLayer) -> dict[str, torch.Tensor]:
    padding = num_padding(layer)
    tensors = {
        "W_enc": torch.cat([layer.W_enc.t(), layer.W_enc.new_zeros(padding, layer.d_in)]),
        "b_enc": torch.cat([layer.b_enc, layer.b_enc.new_zeros(padding)]),
        "W_dec": torch.cat([layer.W_dec, layer.W_dec.new_zeros(padding, layer.d_out)]),
        "b_dec": layer.b_dec,
    }
    if layer.rule == "batch-topk":
        tensors["activation_function.threshold"] = torch.full_like(layer.b_enc, layer.threshold)
    if layer.W_skip is not None:
        tensors["W_skip"] = layer.W_skip.t()
    return tensors
