"""What layers remember of where they come from, and what is made of it."""

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mxd
from mxd import Provenance
from mxd.bundled import bundled_model_folder
from mxd.edits import Edit, Scale, fold_edits, with_edits
from mxd.models import find_mlp, replace_mlp
from mxd.steering.steer import steer
from tests.test_models import IDS, build, logits, model_of

KNOWN = Provenance(
    model="openai-community/gpt2",
    revision="607a30d783dfa663caf39e06633721c8d4cfcd7e",
    layer=1,
    module_path="transformer.h.1.mlp",
    text="stdlib",
    tokens_trained=1000,
    seed=3,
    init="paper",
    special_positions="replace",
    mxd_version="0.1.0",
)


def layer() -> mxd.Transcoder:
    config = mxd.TranscoderConfig(d_in=32, d_out=32, num_latents=16, k=4)
    return mxd.Transcoder(config, torch.Generator().manual_seed(0))


def saved(folder: Path) -> mxd.SparseLayer:
    """Return a layer that was saved with all that is known, and loaded."""
    mxd.save(layer(), folder, KNOWN)
    return mxd.load(folder)


def test_a_new_layer_knows_nothing_and_what_it_is_told(tmp_path: Path) -> None:
    new = layer()
    assert new.provenance == Provenance()
    new.provenance = KNOWN
    mxd.save(new, tmp_path)
    assert mxd.load_checkpoint(tmp_path).provenance == KNOWN


def test_a_layer_that_is_loaded_and_saved_stays_the_same_byte_for_byte(tmp_path: Path) -> None:
    loaded = saved(tmp_path / "one")
    assert loaded.provenance == KNOWN == mxd.load_checkpoint(tmp_path / "one").provenance
    mxd.save(loaded, tmp_path / "two")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert mxd.from_pretrained(str(tmp_path / "two")).provenance == KNOWN
    assert copy.deepcopy(loaded).to("cpu").train().provenance == KNOWN


def test_edits_leave_it_as_it_is(tmp_path: Path) -> None:
    edited = with_edits(saved(tmp_path / "one"), [Edit(latents=(2,), operation=Scale(factor=3.0))])
    mxd.save(edited, tmp_path / "edited")
    mxd.save(fold_edits(edited), tmp_path / "folded")
    assert {mxd.load(tmp_path / name).provenance for name in ("edited", "folded")} == {KNOWN}


def test_of_other_weights_it_says_where_they_belong_and_not_what_they_learnt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = saved(tmp_path / "one")
    with torch.no_grad():
        loaded.get_parameter("W_dec").mul_(2.0)
    with caplog.at_level(logging.WARNING):
        mxd.save(loaded, tmp_path / "two")
    [record] = caplog.records
    assert "have changed since they were loaded" in record.getMessage()
    place = Provenance(
        model=KNOWN.model,
        revision=KNOWN.revision,
        layer=1,
        module_path=KNOWN.module_path,
        special_positions="replace",
    )
    assert mxd.load(tmp_path / "two").provenance == place == KNOWN.place
    caplog.clear()
    mxd.save(loaded, tmp_path / "three", KNOWN)
    loaded.provenance = replace(KNOWN, tokens_trained=2000)
    mxd.save(loaded, tmp_path / "four")
    found = [mxd.load(tmp_path / name).provenance.tokens_trained for name in ("three", "four")]
    assert found == [1000, 2000]
    assert caplog.records == []


def misplaced(provenance: Provenance) -> mxd.Transcoder:
    result = layer()
    result.provenance = provenance
    return result


ELSEWHERE = {
    "another block": (
        Provenance(layer=2),
        r"in the block whose MLP it was trained on, 2; got block 1\. Pass allow_misplaced=True",
    ),
    "another module": (
        Provenance(layer=1, module_path="transformer.h.1.attn"),
        r"where the module was that it was trained on, 'transformer\.h\.1\.attn'; got 'transformer\.h\.1\.mlp'\.",
    ),
    "another model": (
        Provenance(model="EleutherAI/pythia-70m", revision="abc"),
        r"in the model that it was trained on, EleutherAI/pythia-70m; got openai-community/gpt2\.",
    ),
    "the bundled model": (Provenance(model="bundled"), r"trained on, bundled; got openai-community/gpt2\."),
}
AT_HOME = {
    "known": KNOWN,
    "unknown": Provenance(),
    "a copy of the model": replace(KNOWN, model="someone/GPT2"),
    "the model within another": replace(KNOWN, module_path="model.transformer.h.1.mlp"),
    "a folder": Provenance(model="models/other", layer=1),
}


@pytest.fixture(scope="module")
def named() -> nn.Module:
    """A model that says that it is of the hub."""
    model: Any = build("gpt2")
    model.config._name_or_path, model.config._commit_hash = "openai-community/gpt2", "607a"
    return model


@pytest.mark.parametrize("case", ELSEWHERE)
def test_a_layer_out_of_its_place_is_refused_unless_that_is_meant(named: nn.Module, case: str) -> None:
    provenance, message = ELSEWHERE[case]
    other, before = misplaced(provenance), logits(named)
    with pytest.raises(ValueError, match=message), replace_mlp(named, {1: other}):
        pass
    with pytest.raises(ValueError, match=message), steer(named, {1: other}, {}):
        pass
    assert torch.equal(logits(named), before)
    with replace_mlp(named, {1: other}, allow_misplaced=True):
        allowed = logits(named)
    with replace_mlp(named, {1: layer()}):
        assert torch.equal(logits(named), allowed)
    with steer(named, {1: other}, {}, allow_misplaced=True):
        assert torch.equal(logits(named), allowed)


@pytest.mark.parametrize("case", AT_HOME)
def test_a_layer_in_its_place_is_taken(named: nn.Module, case: str) -> None:
    with replace_mlp(named, {1: misplaced(AT_HOME[case])}), torch.no_grad():
        named(input_ids=IDS)


def test_a_model_that_names_no_place_on_the_hub_may_be_any() -> None:
    model: Any = model_of("gpt2")
    with replace_mlp(model, {1: misplaced(replace(KNOWN, model="EleutherAI/pythia-70m"))}):
        pass


def test_the_bundled_model_is_known_by_its_folder(named: nn.Module) -> None:
    model: Any = build("gpt2")
    model.config._name_or_path = str(bundled_model_folder())
    with replace_mlp(model, {1: misplaced(Provenance(model="bundled"))}):
        pass
    with (
        pytest.raises(ValueError, match="trained on, openai-community/gpt2; got bundled"),
        replace_mlp(model, {1: misplaced(KNOWN)}),
    ):
        pass


def test_an_mlp_without_a_module_of_its_own_is_known_by_its_block() -> None:
    model = model_of("opt")
    at_home = Provenance(layer=1, module_path=find_mlp(model, 1).path)
    with replace_mlp(model, {1: misplaced(at_home)}):
        pass
    with pytest.raises(ValueError, match="trained on, 1; got block 2"), replace_mlp(model, {2: misplaced(at_home)}):
        pass
