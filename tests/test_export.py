"""Layers in the formats of other tools: what these compute is what the layer does, and all else is refused."""

import json
import re
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mxd.checkpoint import load_layer, save_edits
from mxd.edits import Ablate, Add, Clamp, Edit, Scale, Set, with_edits
from mxd.hub import CARD_FILE
from mxd.interop import FORMATS, DoesNotFit, Format, export_layers, export_run, load_sparsify
from mxd.interop.card import LOADING
from mxd.interop.circuit_tracer import require_circuit_tracer
from mxd.interop.places import place_of
from mxd.interop.plain import plain_layer
from mxd.interop.saelens import require_saelens, write_saelens
from mxd.interop.sparsify import require_sparsify
from mxd.layers import LAYERS, Provenance, SelectionName, SparseCode, Transcoder, TranscoderConfig
from mxd.models import MLP_SITES
from tests.exported_layers import (
    CASES,
    D_MODEL,
    FITTING,
    NUM_BLOCKS,
    NUM_LATENTS,
    Case,
    K,
    a_layer,
    inputs,
    outline,
    restated,
    whole_set,
)
from tests.tensors import assert_near
from tests.tiny_run import Command, TinyRun, assert_refused, change_json, copied, tree

PAGE = Path(__file__).parent.parent / "docs/export.md"
GPT2 = outline()
REQUIRED = {"sparsify": require_sparsify, "saelens": require_saelens, "circuit-tracer": require_circuit_tracer}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_what_the_tool_computes_is_what_the_layer_does(case: Case, tmp_path: Path) -> None:
    layers, x = whole_set(case.kind, case.selection), inputs()
    export_layers(layers, tmp_path / "out", case.form, model=GPT2)
    for block, layer in enumerate(layers):
        few = (layer.pre_activations(x) > 0).sum(1) < K
        assert 10 < few.sum() < 50, "tokens with fewer than k positive scores, where rectifying matters, and others"
        assert_near(restated(case.form, tmp_path / "out", block, x), layer(x).prediction)


@pytest.mark.parametrize(
    ("form", "kind", "selection"),
    [
        (form, kind, selection)
        for form in FORMATS
        for kind in LAYERS
        for selection in get_args(SelectionName)
        if Case(form, kind, selection) not in CASES
    ],
)
def test_all_else_is_refused_by_name(form: Format, kind: str, selection: SelectionName, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match=r"What fits: ") as refused:
        export_layers(whole_set(kind, selection), tmp_path / "out", form, model=GPT2)
    assert kind in str(refused.value) or selection in str(refused.value) or "skip transcoder" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_the_table_in_the_documents_is_true() -> None:
    rows = re.findall(
        r"^\| (`[\w, `-]+) \| ([\w-]+) \| (.+) \| (.+) \| (.+) \|$", PAGE.read_text("utf-8"), re.MULTILINE
    )
    claimed = {
        (form, kind.strip("` "), selection)
        for kinds, selection, *cells in rows
        for kind in kinds.split(",")
        for form, cell in zip(FORMATS, cells, strict=True)
        if cell.startswith("exact")
    }
    assert claimed == {tuple(case) for case in CASES}
    named = {(kind.strip("` "), selection) for kinds, selection, *_ in rows for kind in kinds.split(",")}
    assert named == {
        (kind, selection)
        for kind in LAYERS
        for selection in (get_args(SelectionName) if kind in FITTING["saelens"] else ["any"])
    }


def test_the_documents_load_an_export_as_its_own_page_does(tmp_path: Path) -> None:
    text = PAGE.read_text("utf-8")
    for form in FORMATS:
        assert LOADING[form] in text
        export_layers(whole_set("transcoder"), tmp_path / form, form, model=GPT2)
        assert LOADING[form] in (tmp_path / form / CARD_FILE).read_text("utf-8")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_keep_their_type(form: Format, dtype: torch.dtype, tmp_path: Path) -> None:
    files = export_layers(whole_set("transcoder", dtype=dtype), tmp_path / "out", form, model=GPT2)
    weights = [load_file(path) for path in files if path.suffix == ".safetensors"]
    assert len(weights) == NUM_BLOCKS
    assert {tensor.dtype for tensors in weights for tensor in tensors.values()} == {dtype}
    if form == "saelens":
        settings = json.loads((tmp_path / "out/blocks.0.mlp/cfg.json").read_text())
        assert getattr(torch, settings["dtype"]) == dtype


def test_layers_with_two_widths_fit_where_the_format_has_two(tmp_path: Path) -> None:
    place, x, about = place_of(a_layer("transcoder"), GPT2), inputs(), {"model": None}
    for selection in ("l1", "batch-topk"):
        layer = a_layer("skip-transcoder", selection, d_out=7)
        plain = plain_layer(layer, "saelens")
        require_saelens(plain, place)
        (tmp_path / selection).mkdir()
        write_saelens(plain, place, about, tmp_path / selection)
        assert_near(restated("saelens", tmp_path / selection, 0, x), layer(x).prediction)
    for form in FORMATS:
        with pytest.raises(DoesNotFit, match="reads 16 and writes 7"):
            REQUIRED[form](plain_layer(a_layer("transcoder", d_out=7), form), place)


def test_a_layer_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must have \(d_in, d_out\) = \(16, 16\); got \(16, 7\)"):
        export_layers([a_layer("transcoder", d_out=7)], tmp_path / "out", "sparsify", model=GPT2)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), shift=st.floats(-3, 3), k=st.integers(1, 6))
def test_latents_without_weights_are_what_rectifies_in_circuit_tracer(seed: int, shift: float, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(4, 6, generator=generator, dtype=torch.float64) + shift
    padded = torch.cat([scores, scores.new_zeros(4, k)], 1)
    kept = padded * torch.zeros_like(padded).scatter(1, padded.topk(k).indices, 1.0)
    largest = scores.topk(k)
    rectified = SparseCode(largest.values.relu(), largest.indices).dense(6)
    assert torch.equal(kept[:, :6], rectified)
    assert not kept[:, 6:].any()


MOVED = (
    Edit(latents=(1, 2), operation=Scale(factor=-2.0)),
    Edit(latents=(2,), operation=Add(amount=0.7)),
    Edit(latents=(3,), operation=Set(amount=1.5)),
    Edit(latents=(4,), operation=Ablate()),
)


@pytest.mark.parametrize("kind", ["transcoder", "skip-transcoder", "topk-sae"])
def test_edits_go_into_the_weights(kind: str, tmp_path: Path) -> None:
    x, plain = inputs(), a_layer(kind)
    edited = with_edits(plain, MOVED)
    export_layers([edited], tmp_path / "out", "sparsify", model=GPT2)
    found = restated("sparsify", tmp_path / "out", 0, x)
    assert_near(found, edited(x).prediction)
    assert (found - plain(x).prediction).abs().max() > 0.1
    about = json.loads((tmp_path / "out/h.0.mlp/mxd.json").read_text())
    assert [edit["operation"]["name"] for edit in about["edits"]] == ["scale", "add", "set", "ablate"]
    assert "Edits of latents were written into the weights." in (tmp_path / "out" / CARD_FILE).read_text()


def test_edits_that_weights_do_not_hold_are_refused(tmp_path: Path) -> None:
    edited = with_edits(a_layer("transcoder"), [Edit(latents=(1,), operation=Clamp(high=0.1))])
    with pytest.raises(DoesNotFit, match=r"has no place for edits beside weights\. .* clamp bends it"):
        export_layers([edited], tmp_path / "out", "sparsify", model=GPT2)


def test_a_kind_that_builds_on_ours_is_refused(tmp_path: Path) -> None:
    class Doubled(Transcoder):
        pass

    layer = Doubled(TranscoderConfig(d_in=D_MODEL, d_out=D_MODEL, num_latents=NUM_LATENTS, k=K))
    layer.provenance = Provenance(layer=0)
    with pytest.raises(DoesNotFit, match="Doubled changes one of them"):
        export_layers([layer], tmp_path / "out", "saelens", model=GPT2)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([a_layer("transcoder", block=1)], r"every block of the model, 0 to 2; 0, 2 are missing"),
        (whole_set("transcoder", blocks=[0, 2]), "0 to 2; 1 is missing"),
        (
            [*whole_set("transcoder", blocks=[0, 1]), a_layer("transcoder", block=2, num_latents=25)],
            "one num_latents; got 24, 25",
        ),
        ([*whole_set("transcoder", blocks=[0, 1]), a_layer("transcoder", block=2, k=3)], "one k; got 3, 5"),
        ([*whole_set("transcoder", blocks=[0, 1]), a_layer("transcoder", "l1", 2)], "one rule; got l1, topk"),
        ([*whole_set("transcoder", blocks=[0, 1]), a_layer("skip-transcoder", block=2)], "at every block or at none"),
    ],
)
def test_circuit_tracer_needs_alike_layers_for_every_block(
    layers: list[Transcoder], words: str, tmp_path: Path
) -> None:
    with pytest.raises(DoesNotFit, match=words):
        export_layers(layers, tmp_path / "out", "circuit-tracer", model=GPT2)
    assert list(tmp_path.iterdir()) == []


PLACES = {"gpt2": "h.1.mlp", "llama": "layers.1.mlp", "gpt_neox": "layers.1.mlp"}


@pytest.mark.parametrize("model_type", PLACES)
def test_places_are_named_as_each_tool_does(model_type: str, tmp_path: Path) -> None:
    model, layer, sae = outline(model_type), a_layer("transcoder", block=1), a_layer("topk-sae", block=1)
    export_layers([layer], tmp_path / "a", "sparsify", model=model)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {PLACES[model_type], CARD_FILE}
    assert PLACES[model_type] in dict(cast(Any, model).base_model.named_modules())
    for name, one, hooks in (
        ("b", layer, ("blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out")),
        ("c", sae, ("blocks.1.mlp.hook_out", None)),
    ):
        export_layers([one], tmp_path / name, "saelens", model=model)
        metadata = json.loads((tmp_path / name / "blocks.1.mlp/cfg.json").read_text())["metadata"]
        assert (metadata["hook_name"], metadata.get("hook_name_out")) == hooks
    export_layers(whole_set("transcoder"), tmp_path / "d", "circuit-tracer", model=model)
    config = yaml.safe_load((tmp_path / "d/config.yaml").read_text())
    assert (config["feature_input_hook"], config["feature_output_hook"]) == ("mlp.hook_in", "mlp.hook_out")


@pytest.mark.parametrize(("model_type", "words"), [("opt", "hooks one module"), ("bloom", "adds the residual stream")])
@pytest.mark.parametrize("form", ["sparsify", "saelens"])
def test_mlps_that_are_no_module_of_their_own_fit_circuit_tracer_alone(
    model_type: str, words: str, form: Format, tmp_path: Path
) -> None:
    model = outline(model_type)
    with pytest.raises(DoesNotFit, match=words):
        export_layers([a_layer("transcoder", block=1)], tmp_path / "a", form, model=model)
    export_layers(whole_set("transcoder"), tmp_path / "b", "circuit-tracer", model=model)


def test_a_module_that_is_not_the_blocks_mlp_fits_where_modules_are_named(tmp_path: Path) -> None:
    layer = a_layer("transcoder", block=1)
    layer.provenance = Provenance(layer=1, module_path="transformer.h.1.attn.c_proj")
    export_layers([layer], tmp_path / "a", "sparsify", model=GPT2)
    assert (tmp_path / "a/h.1.attn.c_proj/cfg.json").is_file()
    with pytest.raises(DoesNotFit, match=r"this layer is of transformer\.h\.1\.attn\.c_proj"):
        export_layers([layer], tmp_path / "b", "saelens", model=GPT2)
    layer.provenance = Provenance(layer=1, module_path="transformer.h.1.mlp.c_fc")
    with pytest.raises(ValueError, match=r"'transformer\.h\.1\.mlp\.c_fc' must have \(d_in, d_out\) = \(16, 64\)"):
        export_layers([layer], tmp_path / "b", "sparsify", model=GPT2)
    layer.provenance = Provenance(layer=1, module_path="model.layers.1.mlp")
    with pytest.raises(ValueError, match="with the model that it was trained on"):
        export_layers([layer], tmp_path / "b", "sparsify", model=GPT2)


def test_a_layer_of_a_family_that_is_not_listed_fits_where_modules_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(MLP_SITES, "gpt2")
    layer = a_layer("transcoder", block=1)
    with pytest.raises(ValueError, match="of a family that"):
        export_layers([layer], tmp_path / "a", "sparsify", model=GPT2)
    layer.provenance = Provenance(layer=1, module_path="transformer.h.1.mlp")
    export_layers([layer], tmp_path / "a", "sparsify", model=GPT2)
    assert_near(restated("sparsify", tmp_path / "a", 1, inputs()), layer(inputs()).prediction)
    for form in ("saelens", "circuit-tracer"):
        with pytest.raises(DoesNotFit, match="of a listed family alone"):
            export_layers([layer], tmp_path / "b", form, model=GPT2)


def test_a_layer_must_know_its_block_and_the_model_have_it(tmp_path: Path) -> None:
    layer = a_layer("transcoder")
    for provenance, words in ((Provenance(), "say of which block"), (Provenance(layer=3), r"must lie in \[0, 2\]")):
        layer.provenance = provenance
        with pytest.raises(ValueError, match=words):
            export_layers([layer], tmp_path / "a", "sparsify", model=GPT2)
    with pytest.raises(ValueError, match="several of block 0"):
        export_layers([a_layer("transcoder"), a_layer("topk-sae")], tmp_path / "a", "sparsify", model=GPT2)
    with pytest.raises(ValueError, match="at least one layer"):
        export_layers([], tmp_path / "a", "sparsify", model=GPT2)


def test_what_stands_there_is_not_touched_and_nothing_half_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = tree(tmp_path)
    for name in ("full", "file"):
        with pytest.raises(ValueError, match="new or empty folder"):
            export_layers([a_layer("transcoder")], tmp_path / name, "sparsify", model=GPT2)
    with pytest.raises(ValueError, match="is a file"):
        export_layers([a_layer("transcoder")], tmp_path / "file/out", "sparsify", model=GPT2)

    def fail(*_: object) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mxd.interop.export.card", fail)
        with pytest.raises(OSError, match="No space"):
            export_layers([a_layer("transcoder")], tmp_path / "out", "sparsify", model=GPT2)
    assert tree(tmp_path) == before
    (tmp_path / "empty").mkdir()
    files = export_layers([a_layer("transcoder")], tmp_path / "empty", "sparsify", model=GPT2)
    assert sorted(files) == sorted(path for path in (tmp_path / "empty").rglob("*") if path.is_file())


def test_equal_layers_give_equal_files(tmp_path: Path) -> None:
    for form in FORMATS:
        for name in ("a", "b"):
            export_layers(whole_set("transcoder"), tmp_path / form / name, form, model=GPT2)
        one, other = (list(tree(tmp_path / form / name).values()) for name in ("a", "b"))
        assert one == other


def test_a_run_is_exported_by_id_and_what_does_not_fit_is_named(mxd: Command, tiny: TinyRun, tmp_path: Path) -> None:
    ended = mxd("export", tiny.run, "--format", "circuit-tracer", "--out", tmp_path / "out", "--json")
    assert ended.status == 0, ended.err
    told = json.loads(ended.out)
    assert set(told) == {"format", "out", "files", "left_out"}
    kinds = ("skip-transcoder-k4", "transcoder-k4")
    names = ("config.yaml", "layer_0.safetensors", "layer_1.safetensors")
    assert told["files"] == sorted([CARD_FILE, *(f"{kind}/{name}" for kind in kinds for name in names)])
    assert [one["student"] for one in told["left_out"]] == ["0/mxd-k4", "0/topk-sae-k4", "1/mxd-k4", "1/topk-sae-k4"]
    for block in (0, 1):
        layer = load_layer(tiny.run / f"layers/{block}/skip-transcoder-k4")
        x = inputs(torch.float32)
        found = restated("circuit-tracer", tmp_path / "out/skip-transcoder-k4", block, x)
        torch.testing.assert_close(found, layer(x).prediction, rtol=1e-5, atol=1e-5)


def test_what_is_written_names_model_text_and_version_and_no_folder_of_this_machine(
    mxd: Command, tiny: TinyRun, tmp_path: Path
) -> None:
    for form in FORMATS:
        ended = mxd("export", tiny.run, "--format", form, "--out", tmp_path / form)
        assert ended.status == 0, ended.err
        assert f"Left out 0/mxd-k4: {form} holds one decoder row for each latent" in ended.err.replace("\n", " ")
    texts = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(texts) == 3 + 3 * 2 * 3 + 2 * 2 * 2 + 2 * 3
    for path, content in texts.items():
        assert str(tmp_path.parent).encode() not in content, path
        assert str(tiny.model.parent).encode() not in content, path
    about = json.loads((tmp_path / "sparsify/topk-sae-k4/layers.0.mlp/mxd.json").read_text())
    assert (about["model"], about["text"], about["layer"]) == ("tiny-model", "tiny.jsonl", 0)
    assert (about["k"], about["kind"], about["tokens_trained"]) == (4, "topk-sae", 12_288)
    assert about["mxd_version"]
    assert about["module_path"] == "model.layers.0.mlp"


def test_a_student_that_was_named_and_does_not_fit_ends_the_command(
    mxd: Command, tiny: TinyRun, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = ("export", tiny.run, "--out", out, "--format")
    assert_refused(mxd(*asked, "saelens", "--student", "mxd-k4"), "export", "0/mxd-k4 cannot be exported", "What fits")
    assert_refused(mxd(*asked, "sparsify", "--student", "none"), "export", "has no student none")
    assert_refused(
        mxd(*asked, "circuit-tracer", "--student", "1/transcoder-k4"), "export", "0 to 1; 0 is missing", "1/transcoder"
    )
    assert_refused(mxd(*asked, "pickle"), "export", "--format", "circuit-tracer", "pickle")
    assert_refused(mxd(*asked, "sparsify", "--model", tmp_path / "gone"), "export", "found no folder")
    run = copied(tiny.run, tmp_path / "run")
    few = json.loads((run / "run.json").read_text())["students"][:3]
    change_json(run / "run.json", lambda described: described.update(students=few))
    nothing = mxd("export", run, "--out", out, "--format", "circuit-tracer")
    assert_refused(nothing, "export", "Nothing of", "fits circuit-tracer. 0/skip-transcoder-k4", "0 to 1; 1 is missing")
    assert not out.exists()
    tiny_out = mxd(*asked, "sparsify", "--student", "1/transcoder-k4")
    assert (tiny_out.status, tiny_out.out) == (0, "")
    assert {path.name for path in (out / "transcoder-k4").iterdir()} == {"layers.1.mlp"}
    assert_refused(mxd(*asked, "sparsify", "--student", "1/transcoder-k4"), "export", "new or empty folder")


def test_a_run_whose_layers_are_edited_is_exported_as_edited(tiny: TinyRun, tmp_path: Path) -> None:
    run = copied(tiny.run, tmp_path / "run")
    save_edits(run / "layers/0/transcoder-k4", [Edit(latents=(0, 1, 2), operation=Scale(factor=3.0))])
    export_run(run, tmp_path / "out", "sparsify", students=["0/transcoder-k4"])
    x = inputs(torch.float32)
    edited = load_layer(run / "layers/0/transcoder-k4")(x).prediction
    found = load_sparsify(tmp_path / "out/transcoder-k4/layers.0.mlp")(x).prediction
    torch.testing.assert_close(found, edited, rtol=1e-5, atol=1e-5)
