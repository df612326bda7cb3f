from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from mxd.evaluation.collect import LatentStatistics
from mxd.explorer.directions import INPUTS_KEPT, LogitMap, TopInputs, logit_map, nearest
from mxd.explorer.rows import directions_of
from mxd.layers import LAYERS, SparseLayer
from mxd.layers.request import LayerRequest
from mxd.models import load_language_model

KINDS = ("mxd", "transcoder", "skip-transcoder", "topk-sae", "molt")


def layer_of(kind: str, num_latents: int = 12) -> SparseLayer:
    request = LayerRequest(d_in=5, d_out=5, d_hidden=7, num_latents=num_latents, k=3, activation="gelu")
    layer = cast("Any", LAYERS[kind].layer)(LAYERS[kind].configure(request))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


@pytest.mark.parametrize("kind", KINDS)
def test_mean_atoms_are_those_at_the_strongest_activations(kind: str, tmp_path: Path) -> None:
    layer = layer_of(kind)
    contexts, length, batch = 24, 6, 5
    x = torch.randn(contexts, length, 5, generator=torch.Generator().manual_seed(1))
    statistics, inputs = LatentStatistics(12, contexts_kept=6), TopInputs(tmp_path / "inputs", 12, 5)
    for first in range(0, contexts, batch):
        part = x[first : first + batch]
        numbers = torch.arange(len(part) * length)
        statistics.update(layer.encode(part.flatten(0, 1)), numbers // length + first, numbers % length)
        inputs.follow(statistics.top, part, first)
    found = inputs.mean_atoms(layer)
    for latent in range(12):
        top = statistics.top_contexts(latent)[:INPUTS_KEPT]
        atoms = [layer.atoms(x[c, p][None], torch.tensor([[latent]]))[0, 0] for _, c, p in top]
        expected = torch.stack(atoms).mean(0) if atoms else torch.zeros(5)
        torch.testing.assert_close(found[latent], expected, rtol=1e-4, atol=1e-5)


def test_the_nearest_latents_have_the_largest_cosines() -> None:
    directions = torch.randn(9, 4, generator=torch.Generator().manual_seed(2))
    directions[3] = 0
    found = nearest(directions, 3)
    for latent in range(9):
        cosines = torch.nn.functional.cosine_similarity(directions[latent][None], directions, dim=1)
        cosines[latent] = -2
        best = cosines.sort(descending=True, stable=True)
        torch.testing.assert_close(found.cosines[latent], best.values[:3])
        if latent != 3:
            assert found.latents[latent].tolist() == best.indices[:3].tolist()
    assert nearest(directions[:2], 3).latents.tolist() == [[1], [0]]
    assert nearest(directions[:1], 3).latents.shape == (1, 0)
    assert nearest(directions[:0], 3).latents.shape == (0, 0)


@pytest.mark.parametrize("silent", [(), (0, 3, 8), tuple(range(1, 9)), tuple(range(9))])
def test_only_latents_that_fire_are_compared_and_each_has_what_it_writes(silent: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    atoms = torch.randn(9, 4, generator=generator)
    atoms[list(silent)] = 0
    logits = LogitMap(torch.randn(4, 4, generator=generator), torch.randn(30, 4, generator=generator))
    found = directions_of(atoms, logits)
    written = [*found.of(0, 4), *found.of(4, 9), *found.of(9, 9)]
    effects = atoms @ logits.jacobian.T @ logits.unembedding.T
    for latent in range(9):
        if latent in silent:
            assert written[latent] == ([], [], [])
            continue
        cosines = torch.nn.functional.cosine_similarity(atoms[latent][None], atoms, dim=1)
        others = [n for n in range(9) if n not in (latent, *silent)]
        expected = sorted(((n, cosines[n].item()) for n in others), key=lambda pair: -pair[1])
        assert [n for n, _ in written[latent].nearest] == [n for n, _ in expected]
        assert [c for _, c in written[latent].nearest] == pytest.approx([c for _, c in expected], rel=1e-3)
        order = effects[latent].argsort(descending=True).tolist()
        assert [token for token, _ in written[latent].promoted] == order[:10]
        assert [token for token, _ in written[latent].suppressed] == order[::-1][:10]
        assert written[latent].promoted[0][1] == pytest.approx(effects[latent].max().item(), rel=1e-3)


def norm_jacobian(h: Tensor, weight: Tensor, eps: float, *, centred: bool) -> Tensor:
    """The Jacobian of a LayerNorm or an RMSNorm at one state, by its derivative on paper."""
    width = len(h)
    centre = torch.eye(width, dtype=h.dtype) - (1 / width if centred else 0)
    moved = centre @ h
    size = (moved.square().mean() + eps).sqrt()
    unit = moved / size
    return torch.diag(weight) @ (torch.eye(width, dtype=h.dtype) - torch.outer(unit, unit) / width) @ centre / size


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_logit_map_is_the_mean_jacobian_of_the_final_norm_and_the_unembedding(
    family: str, request: pytest.FixtureRequest
) -> None:
    model = load_language_model(str(request.getfixturevalue(family)), dtype=torch.float64).model
    assert isinstance(model, nn.Module)
    norm = model.get_submodule("model.norm" if family == "llama" else "transformer.ln_f")
    with torch.no_grad():
        norm.get_parameter("weight").uniform_(0.5, 2, generator=torch.Generator().manual_seed(3))
    contexts = torch.randint(256, (2, 7), generator=torch.Generator().manual_seed(4))
    states: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    model(contexts)
    handle.remove()
    eps = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0)))
    weight = norm.get_parameter("weight")
    each = [norm_jacobian(h, weight, eps, centred=family == "gpt2") for h in states[0].flatten(0, 1)]
    found = logit_map(model, contexts)
    torch.testing.assert_close(found.jacobian, torch.stack(each).mean(0).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.unembedding, cast("Any", model).get_output_embeddings().weight.float())


def test_promoted_tokens_are_those_whose_logits_rise_most() -> None:
    torch.manual_seed(5)
    logits = LogitMap(torch.randn(4, 4), torch.randn(11, 4))
    directions = torch.randn(3, 4)
    ((raised, lowered),) = logits.extremes(directions, 5)
    for latent in range(3):
        effects = logits.unembedding @ (logits.jacobian @ directions[latent])
        torch.testing.assert_close(raised.effects[latent], effects.sort(descending=True).values[:5])
        torch.testing.assert_close(lowered.effects[latent], effects.sort().values[:5])
        torch.testing.assert_close(effects[raised.tokens[latent]], raised.effects[latent])
    ((none, _),) = logits.extremes(torch.randn(3, 5), 5)
    assert none.tokens.shape == (3, 0)


def test_a_small_change_of_the_residual_stream_changes_the_logits_as_the_map_says(llama: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64)
    contexts = torch.randint(256, (1, 6), generator=torch.Generator().manual_seed(6))
    delta = 1e-4 * torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(7))

    def add(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output + delta

    with torch.no_grad():
        before = model(contexts).logits.mean((0, 1))
        handle = model.model.layers[-1].register_forward_hook(add)
        after = model(contexts).logits.mean((0, 1))
        handle.remove()
    found = logit_map(model, contexts)
    expected = found.unembedding.double() @ found.jacobian.double() @ delta
    torch.testing.assert_close(after - before, expected, rtol=1e-2, atol=1e-6)
