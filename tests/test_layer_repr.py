"""What a layer says of itself: sizes as attributes, and as printed."""

import pytest

import mxd
from mxd.edits import Ablate, Edit, with_edits
from tests.test_conformance import EXAMPLES, build


@pytest.mark.parametrize("name", EXAMPLES)
def test_sizes_are_the_configurations(name: str) -> None:
    layer = build(name)
    config = layer.config
    sizes = (layer.d_in, layer.d_out, layer.num_latents, layer.k)
    assert sizes == (config.d_in, config.d_out, config.num_latents, config.k)
    printed = repr(layer)
    assert f"d_in={sizes[0]}, d_out={sizes[1]}, num_latents={sizes[2]}, k={sizes[3]}" in printed
    assert printed.startswith(f"{type(layer).__name__}(")


def test_a_layer_shows_what_was_chosen_and_where_it_belongs() -> None:
    config = mxd.MixtureOfDecodersConfig(
        d_in=6, d_hidden=7, d_out=5, num_experts=20, k=3, encoder="glu", normalize_experts=False
    )
    layer = mxd.MixtureOfDecoders(config)
    expected = (
        "d_in=6, d_out=5, num_latents=20, k=3, d_hidden=7, num_experts=20, encoder='glu', normalize_experts=False"
    )
    assert layer.extra_repr() == expected
    layer.provenance = mxd.Provenance(model="openai-community/gpt2", layer=8)
    assert layer.extra_repr() == f"{expected}, model='openai-community/gpt2', block=8"
    edited = with_edits(layer, [Edit(latents=(2,), operation=Ablate())])
    assert edited.extra_repr().endswith("block=8, edited")
