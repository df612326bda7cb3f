"""Edits that stay: saved beside a layer, undone, and folded into its weights."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mxd.checkpoint import EDITS_FILE, edits_digest, load_layer, save_edits, save_layer, saved_edits
from mxd.edits import Ablate, Add, Clamp, Edit, Scale, Set, Span, edits_of, fold_edits, with_edits
from mxd.layers import SparseLayer
from tests.test_conformance import EXAMPLES, build

LARGE = [name for name in EXAMPLES if build(name).config.num_latents > 6]
MULTIPLIED = (
    Edit(latents=(0, 3, 4), operation=Scale(factor=-2.5)),
    Edit(latents=(4,), operation=Scale(factor=3.0)),
    Edit(latents=(5, 6), operation=Ablate()),
)
MOVED = (
    Edit(latents=(1, 2), operation=Add(amount=1.5)),
    Edit(latents=(1,), operation=Scale(factor=2.0)),
    Edit(latents=(3,), operation=Set(amount=-0.75)),
    Edit(latents=(3,), operation=Add(amount=0.5)),
)


def random(name: str) -> SparseLayer:
    layer = build(name)
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return layer.double().eval().requires_grad_(False)


def inputs(layer: SparseLayer, rows: int = 40) -> Tensor:
    return torch.randn(rows, layer.config.d_in, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", LARGE)
def test_weights_hold_scaled_and_ablated_latents_of_every_kind(name: str) -> None:
    layer = random(name)
    x, edited = inputs(layer), with_edits(layer, MULTIPLIED)
    folded = fold_edits(edited)
    assert edits_of(folded) == ()
    torch.testing.assert_close(folded(x).prediction, edited(x).prediction, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(folded(x).prediction, layer(x).prediction)
    assert torch.equal(folded.pre_activations(x), layer.pre_activations(x))
    assert folded.unit_length_tables() == ()


@pytest.mark.parametrize("name", LARGE)
def test_weights_hold_set_and_added_to_latents_where_atoms_are_fixed(name: str) -> None:
    layer = random(name)
    x, edited = inputs(layer), with_edits(layer, MOVED)
    everything = torch.arange(layer.config.num_latents).expand(len(x), -1)
    atoms = layer.atoms(x, everything)
    assert layer.fixed_atoms == bool((atoms == atoms[:1]).all())
    if not layer.fixed_atoms:
        with pytest.raises(ValueError, match="depends on the input"):
            fold_edits(edited)
        return
    folded = fold_edits(edited)
    torch.testing.assert_close(folded(x).prediction, edited(x).prediction, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(folded.pre_activations(x), layer.pre_activations(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LARGE)
def test_the_rows_of_a_latent_are_all_that_its_atoms_come_from(name: str) -> None:
    layer = random(name)
    x = inputs(layer)
    everything = torch.arange(layer.config.num_latents).expand(len(x), -1)
    before, base = layer.atoms(x, everything), layer.base(x)
    rows = layer.atom_rows(4)
    assert rows is not None
    rows.table[rows.start : rows.stop] *= 3.0
    before[:, 4] *= 3
    torch.testing.assert_close(layer.atoms(x, everything), before, rtol=1e-10, atol=1e-10)
    assert torch.equal(layer.base(x), base)


def test_a_clamp_is_not_held_by_weights() -> None:
    with pytest.raises(ValueError, match=r"clamp bends it \(latents 1, 2\)"):
        fold_edits(with_edits(random("transcoder"), [Edit(latents=(1, 2), operation=Clamp(high=1.0))]))


@pytest.mark.parametrize("name", ["mxd", "topk-sae"])
def test_edits_reload_with_their_layer_and_can_be_undone(name: str, tmp_path: Path) -> None:
    layer = random(name)
    save_layer(layer, tmp_path)
    original = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save_edits(tmp_path, MULTIPLIED)
    x, reloaded = inputs(layer), load_layer(tmp_path)
    assert edits_of(reloaded) == MULTIPLIED
    assert torch.equal(reloaded(x).prediction, with_edits(layer, MULTIPLIED)(x).prediction)
    save_layer(reloaded, tmp_path / "copy")
    assert edits_of(load_layer(tmp_path / "copy")) == MULTIPLIED
    save_edits(tmp_path, MULTIPLIED[:1])
    assert edits_of(load_layer(tmp_path)) == MULTIPLIED[:1]
    save_edits(tmp_path, ())
    assert torch.equal(load_layer(tmp_path)(x).prediction, layer(x).prediction)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == original


def test_edits_are_kept_in_the_groups_in_which_they_came(tmp_path: Path) -> None:
    save_layer(with_edits(random("mxd"), MULTIPLIED), tmp_path)
    assert saved_edits(tmp_path) == [(edit,) for edit in MULTIPLIED]
    save_edits(tmp_path, MULTIPLIED[:1], (), MULTIPLIED[1:])
    assert saved_edits(tmp_path) == [MULTIPLIED[:1], MULTIPLIED[1:]]
    assert edits_of(load_layer(tmp_path)) == MULTIPLIED
    save_edits(tmp_path)
    assert saved_edits(tmp_path) == []


def test_a_layer_written_over_an_edited_one_is_not_edited(tmp_path: Path) -> None:
    save_layer(with_edits(random("mxd"), MULTIPLIED), tmp_path)
    save_layer(random("transcoder"), tmp_path)
    assert edits_of(load_layer(tmp_path)) == ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "must be JSON"),
        ("[]", "must have every key"),
        ({"format": "other"}, "must be edits of version 1"),
        ({"weights_sha256": "0" * 64}, "must be meant for the weights beside it"),
        ({"edits": [{"latents": [1]}]}, "must list edits; An edit must be an object"),
        ({"edits": 3}, "must list edits"),
        ({"edits": [{"latents": [99], "operation": {"name": "ablate"}, "positions": None}]}, "must lie in"),
        ({"edits": [{"latents": [1], "operation": {"name": "ablate"}, "positions": [2]}]}, "for all positions"),
        ({"more": 1}, "unknown keys"),
        ({"groups": [1, 1]}, "groups as numbers of edits that sum to 3"),
        ({"groups": [4, -1]}, "groups as numbers of edits that sum to 3"),
        ({"groups": "3"}, "groups as numbers of edits that sum to 3"),
    ],
)
def test_damaged_edits_are_refused(content: str | dict[str, object], words: str, tmp_path: Path) -> None:
    save_layer(with_edits(random("mxd"), MULTIPLIED), tmp_path)
    path = tmp_path / EDITS_FILE
    text = content if isinstance(content, str) else json.dumps(json.loads(path.read_text()) | content)
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        load_layer(tmp_path)


def test_edits_that_do_not_fit_leave_what_was_there(tmp_path: Path) -> None:
    save_layer(random("mxd"), tmp_path)
    for edits in (
        [Edit(latents=(20,), operation=Ablate())],
        [Edit(latents=(1,), operation=Ablate(), positions=Span(start=2))],
    ):
        with pytest.raises(ValueError, match=r"must lie in|for all positions"):
            save_edits(tmp_path, edits)
    assert not (tmp_path / EDITS_FILE).exists()


def test_a_digest_of_a_runs_edits_is_of_which_they_are_of_which_layers_in_which_order(tmp_path: Path) -> None:
    folders = [tmp_path / "layers" / place for place in ("0/mxd", "0/other", "1/mxd")]
    for folder in folders:
        save_layer(random("mxd"), folder)
    assert edits_digest(tmp_path) is None
    digests: set[str | None] = set()
    for folder, edits in ((folders[0], MULTIPLIED), (folders[0], MULTIPLIED[::-1]), (folders[2], MULTIPLIED)):
        save_edits(folder, edits)
        digests.add(edits_digest(tmp_path))
        save_edits(folder, ())
    assert len(digests) == 3
    assert None not in digests
    assert edits_digest(tmp_path) is None
    save_edits(folders[2], MULTIPLIED)
    assert edits_digest(tmp_path) in digests
    (folders[2] / EDITS_FILE).write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        edits_digest(tmp_path)
