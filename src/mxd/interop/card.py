"""The page beside exported layers: what they are, where they read and write, and how they are loaded."""

from collections.abc import Mapping, Sequence

from mxd.atomic import JSON
from mxd.interop.plain import Format
from mxd.printable import printable

LOADING: Mapping[Format, str] = {
    "sparsify": """\
from sparsify import SparseCoder

coders = SparseCoder.load_many("FOLDER", local=True)  # by hookpoint, such as h.8.mlp
""",
    "saelens": """\
from sae_lens import SAE

sae = SAE.load_from_disk("FOLDER/blocks.8.mlp")
""",
    "circuit-tracer": """\
import yaml
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

with open("FOLDER/config.yaml") as file:
    config = yaml.safe_load(file)
activation = {name: config[name] for name in ("activation", "k") if name in config}
paths = {block: f"FOLDER/layer_{block}.safetensors" for block in range(12)}  # as many as the model has blocks
hooks = config["feature_input_hook"], config["feature_output_hook"]
transcoders = load_transcoder_set(paths, "mxd", *hooks, **activation)
""",
}
"""How each tool loads an export; docs/export.md has the same lines."""

NOTES: Mapping[Format, str] = {
    "sparsify": (
        "A transcoder reads the input of the module that its folder is named after, a topk-sae its output. The path "
        "is below the model's base (`model.base_model`)."
    ),
    "saelens": (
        "`metadata.hook_name` and `hook_name_out` are TransformerBridge's (`SAETransformerBridge`): what the block's "
        "MLP reads, behind the norm and its weights, and what it returns. A transcoder with top-k has the architecture "
        "`topk`, with `apply_b_dec_to_input` off."
    ),
    "circuit-tracer": (
        "`mlp.hook_in` and `mlp.hook_out` are what the block's MLP reads, behind the norm and its weights, and what it "
        "returns. Where config.yaml has `activation: topk`, circuit-tracer must be one that reads it (its main branch "
        "since April 2026): release 0.5.0 does not, and would keep every positive latent; the call below fails there. "
        "The last k latents of each layer then have no weights and never fire."
    ),
}
"""What must be known beside that."""

_COLUMNS = ("layer", "kind", "selection", "k", "num_latents", "text", "tokens_trained", "seed", "special_positions")


def card(form: Format, groups: Mapping[str, Sequence[Mapping[str, JSON]]]) -> str:
    """Return the page, in Markdown.

    Args:
        form: Whose format it is.
        groups: What is known of the layers in each folder.
    """
    abouts = [about for members in groups.values() for about in members]
    of = " and ".join(sorted({_model(about) for about in abouts}))
    versions = ", ".join(sorted({_shown(about.get("mxd_version")) for about in abouts}))
    rows = [
        f"| {_shown(id or '.')} | " + " | ".join(_shown(about.get(column)) for column in _COLUMNS) + " |"
        for id, members in groups.items()
        for about in members
    ]
    head = " | ".join(("folder", *_COLUMNS)).replace("_", " ")
    edited = (
        "\n\nEdits of latents were written into the weights." if any(about.get("edits") for about in abouts) else ""
    )
    first = next(iter(groups))
    folder = f"a student's folder, such as {_shown(first)} beside this page" if first else "the folder of this page"
    return (
        f"# Layers for MLPs of {of}\n\nTrained with mxd {versions}, written in the format of {form}.\n\n"
        f"| {head} |\n|{'---|' * (len(_COLUMNS) + 1)}\n" + "\n".join(rows) + f"{edited}\n\n{NOTES[form]}\n\n"
        f"FOLDER stands for the path of {folder}.\n\n```python\n{LOADING[form]}```\n"
    )


def _model(about: Mapping[str, JSON]) -> str:
    revision = about.get("revision")
    return _shown(about.get("model")) + (f", revision {_shown(revision)}" if revision else "")


def _shown(value: JSON) -> str:
    """Return a value for a cell of a table; text as code, of which Markdown makes no links, images or HTML."""
    if value is None or value == "":
        return "–"
    if not isinstance(value, str):
        return str(value)
    return "`" + printable(value).replace("|", "\\|").replace("`", "'") + "`"
