"""What an export is not made of, where it is not written, and what of this machine and of strangers is not in it."""

import json
import math
import os
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file

from mxd.atomic import filled_folder, partial_path, require_new_folder
from mxd.checkpoint import load_checkpoint, load_layer, save_layer
from mxd.edits import Edit, Scale, with_edits
from mxd.hub import CARD_FILE, is_of_the_hub
from mxd.interop import FORMATS, DoesNotFit, Format, export_layers, export_run, load_sparsify
from mxd.interop.files import write_text, yaml_text
from mxd.layers import BatchTopK, Provenance
from tests.exported_layers import THRESHOLD, a_layer, inputs, outline, restated, whole_set
from tests.tensors import assert_near
from tests.tiny_run import Command, TinyRun, assert_refused, change_json, copied, tree

GPT2 = outline()


@pytest.mark.parametrize(
    "id", ["..", ".", "", "README.md", "readme.md", "a/b", "../a", "a\\b", "/a", "a\0", "a\nb", "\ud800"]
)
def test_an_id_that_names_no_folder_of_its_own_is_refused(id: str, tiny: TinyRun, tmp_path: Path) -> None:
    run = copied(tiny.run, tmp_path / "run")
    change_json(run / "run.json", lambda described: cast(Any, described["students"])[0].update(id=id))
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="id must be the name of a folder"):
        export_run(run, tmp_path / "out/there", "sparsify")
    assert tree(tmp_path) == before


def test_a_layer_of_another_block_than_its_folders_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    run = copied(tiny.run, tmp_path / "run")
    stored = load_checkpoint(run / "layers/1/transcoder-k4")
    save_layer(stored.layer, run / "layers/0/transcoder-k4", stored.provenance)
    with pytest.raises(ValueError, match=r"must hold a layer of block 0, as run\.json says; it holds one of block 1\."):
        export_run(run, tmp_path / "out", "sparsify")
    save_layer(stored.layer, run / "layers/0/transcoder-k4", Provenance())
    with pytest.raises(ValueError, match="it holds one of an unknown block"):
        export_run(run, tmp_path / "out", "sparsify")
    assert not (tmp_path / "out").exists()


def test_kinds_that_fit_no_format_are_not_loaded(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load(folder: Path) -> Any:
        loaded.append(folder.name)
        return load_layer(folder)

    monkeypatch.setattr("mxd.interop.export.load_layer", load)
    exported = export_run(tiny.run, tmp_path / "out", "sparsify")
    assert [one.student for one in exported.left_out] == ["0/mxd-k4", "1/mxd-k4"]
    assert set(loaded) == {"transcoder-k4", "skip-transcoder-k4", "topk-sae-k4"}
    assert len(loaded) == 6


PLACES = [
    "/home/someone/secret/my-model",
    "./secret/my-model",
    "../secret/my-model/",
    "~/secret/my-model",
    "secret/deep/my-model",
    "C:\\Users\\secret\\my-model",
]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("revision", [None, "main"])
@pytest.mark.parametrize("place", PLACES)
def test_no_place_of_a_machine_is_written(form: Format, revision: str | None, place: str, tmp_path: Path) -> None:
    layers, text = whole_set("transcoder"), f"{place}/a.jsonl, {place}/b.txt and 3 more"
    for block, layer in enumerate(layers):
        layer.provenance = Provenance(model=place, revision=revision, layer=block, text=text)
        assert not is_of_the_hub(layer.provenance)
    files = export_layers(layers, tmp_path / "out", form, model=GPT2)
    content = b"".join(path.read_bytes() for path in files)
    assert b"secret" not in content
    for name in (b"my-model", b"a.jsonl, b.txt and 3 more"):
        assert name in content


@pytest.mark.parametrize(("model", "revision"), [("owner/name", None), ("owner/name", "abc"), ("gpt2", "abc")])
@pytest.mark.parametrize("text", ["owner/texts", "owner/texts:english", "stdlib", "words.txt"])
def test_names_on_the_hub_are_written_whole(model: str, revision: str | None, text: str, tmp_path: Path) -> None:
    layer = a_layer("transcoder")
    layer.provenance = Provenance(model=model, revision=revision, layer=0, text=text)
    assert is_of_the_hub(layer.provenance)
    export_layers([layer], tmp_path / "out", "sparsify", model=GPT2)
    about = json.loads((tmp_path / "out/h.0.mlp/mxd.json").read_text())
    assert (about["model"], about["revision"], about["text"]) == (model, revision, text)


STRANGE = [
    "plain",
    "two: one",
    '"x" # y',
    "ü\x1b[31m\x85",
    "line\nbreak",
    "yes",
    "1e3",
    "1e-05",
    "~",
    "🦊 \u2028\ufeff",
    "\x00\x07\x7f\x9f\ue000\uffff",
    "\U000e0001",
    "\ud83d alone",
    "back\\slash \\u0041",
    "tab\t/ \u202e",
]
NUMBERS = [1e-5, 1e20, -2e-7, 1.5e300, 5e-324, 0.1, 3.0, -0.0, 7, -12, True, None]


@pytest.mark.parametrize("value", STRANGE)
def test_settings_are_the_same_in_yaml(value: str, tmp_path: Path) -> None:
    values = {
        "name": value,
        "numbers": NUMBERS,
        "nested": {"none": None, value: [True, 1e-5, value]},
        "empty": [{}, []],
    }
    write_text(tmp_path / "config.yaml", yaml_text(values))
    found = yaml.safe_load((tmp_path / "config.yaml").read_text("utf-8"))
    assert found == values
    assert list(map(type, found["numbers"])) == list(map(type, NUMBERS))


@given(text=st.text(), number=st.floats(allow_nan=False, allow_infinity=False))
def test_any_text_and_number_are_the_same_in_yaml(text: str, number: float) -> None:
    assert yaml.safe_load(yaml_text({"text": text, "number": number})) == {"text": text, "number": number}


def test_what_json_cannot_hold_is_no_yaml() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        yaml_text({"number": math.nan})
    with pytest.raises(TypeError, match="not JSON serializable"):
        yaml_text({"number": [cast(Any, b"x")]})


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(form: Format, value: float, tmp_path: Path) -> None:
    layers = whole_set("skip-transcoder", "batch-topk" if form == "saelens" else "topk")
    layers[1].get_parameter("W_skip").detach()[2, 3] = value
    with pytest.raises(ValueError, match=r"must have finite weights; W_skip has") as refused:
        export_layers(layers, tmp_path / "out", form, model=GPT2)
    assert not isinstance(refused.value, DoesNotFit)


def test_edits_that_make_weights_infinite_are_refused(tmp_path: Path) -> None:
    edited = with_edits(a_layer("transcoder"), [Edit(latents=(1,), operation=Scale(factor=1e308))] * 2)
    with pytest.raises(DoesNotFit, match=r"has no place for edits beside weights\. An edited .* finite weights; W_dec"):
        export_layers([edited], tmp_path / "out", "sparsify", model=GPT2)


@pytest.mark.parametrize("form", FORMATS)
def test_weights_of_several_or_unusual_types_are_refused(form: Format, tmp_path: Path) -> None:
    mixed = whole_set("transcoder")
    mixed[1].W_dec.data = cast(torch.Tensor, mixed[1].W_dec.data).bfloat16()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"one floating-point type; got torch\.bfloat16, torch\.float64"):
        export_layers(mixed, tmp_path / "out", form, model=GPT2)
    with pytest.raises(ValueError, match=r"of 16, 32 or 64 bits; got torch\.float8_e4m3fn\. Convert"):
        export_layers([a_layer("transcoder", dtype=torch.float8_e4m3fn)], tmp_path / "out", form, model=GPT2)
    assert list(tmp_path.iterdir()) == []


def test_a_threshold_below_zero_lets_no_negative_score_pass(tmp_path: Path) -> None:
    x = inputs()
    for form in ("saelens", "circuit-tracer"):
        layers = whole_set("transcoder", "batch-topk")
        for layer in layers:
            assert isinstance(layer.selection, BatchTopK)
            layer.selection.threshold.fill_(-THRESHOLD)
        export_layers(layers, tmp_path / form, form, model=GPT2)
        for block, layer in enumerate(layers):
            assert_near(restated(form, tmp_path / form, block, x), layer(x).prediction)


def test_circuit_tracer_needs_layers_of_one_model(tmp_path: Path) -> None:
    layers = whole_set("transcoder")
    layers[2].provenance = Provenance(model="someone/tiny", revision="abd", layer=2)
    with pytest.raises(
        DoesNotFit, match="of one model; got someone/tiny at revision abc, someone/tiny at revision abd"
    ):
        export_layers(layers, tmp_path / "out", "circuit-tracer", model=GPT2)
    layers[2].provenance = Provenance(layer=2)
    with pytest.raises(DoesNotFit, match="got an unknown one, someone/tiny at revision abc"):
        export_layers(layers, tmp_path / "out", "circuit-tracer", model=GPT2)


def test_places_that_cannot_become_a_folder_are_refused_before_any_work(
    mxd: Command, tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    partial_path(tmp_path / "first").symlink_to(tmp_path / "empty")
    partial_path(tmp_path / "second").write_text("mine")
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path / "empty")
    asked = ("export", tiny.run, "--format", "sparsify", "--model", tmp_path / "gone", "--out")
    for out, words in (
        (tmp_path / "link", "is a link. Name where it leads"),
        (tmp_path / "dangling", "is a link. Name where it leads"),
        (tmp_path / "dangling/out", "is a file"),
        (".", "is where this runs or a volume is mounted"),
        ("", "is where this runs or a volume is mounted"),
        ("..", "holds something"),
        ("new/..", "holds something"),
        (tmp_path / "first", "is a link or a file. Remove that"),
        (tmp_path / "second", "is a link or a file. Remove that"),
    ):
        assert_refused(mxd(*asked, out), "export", "An export needs a new or empty folder; ", words)
    assert tree(tmp_path) == before
    for out in ("new/deep", "../empty/other", tmp_path / "link/third"):
        export_layers([a_layer("transcoder")], out, "sparsify", model=GPT2)
        assert (Path(out) / "h.0.mlp/cfg.json").is_file()


def test_a_model_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    layer = a_layer("transcoder")
    with pytest.raises(ValueError, match="must be of a family that"):
        export_layers([layer], tmp_path / "out", "sparsify", model=torch.nn.Linear(2, 2))
    layer.provenance = Provenance(layer=0, module_path="h.0.mlp")
    with pytest.raises(ValueError, match="Linear has no such module"):
        export_layers([layer], tmp_path / "out", "sparsify", model=torch.nn.Linear(2, 2))


def test_a_volume_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_mount(path: Path) -> bool:
        return path == tmp_path

    monkeypatch.setattr(Path, "is_mount", is_mount)
    with pytest.raises(ValueError, match=r"a volume is mounted, and cannot be replaced\. Name a new folder in it"):
        require_new_folder(tmp_path, "It")
    require_new_folder(tmp_path / "in it", "It")


def test_a_folder_is_filled_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def fill(content: str) -> None:
        with filled_folder(Path("a/b")) as partial:
            (partial / "file").write_text(content)
            (partial / content).mkdir()

    with pytest.raises(OSError, match="File exists"):
        fill("file")
    assert os.listdir("a") == []
    fill("whole")
    whole = {"a/b": None, "a/b/file": b"whole", "a/b/whole": None}
    assert tree(Path("a")) == whole
    with pytest.raises(OSError, match="not empty"):
        fill("over another")
    assert tree(Path("a")) == whole


def test_text_of_strangers_is_neither_link_nor_image_nor_html_in_the_page(tmp_path: Path) -> None:
    hostile = "![x](http://evil/a) [y](http://evil) <b>&lt;http://evil> www.evil.org `|` \\[z](http://evil) \x1b&#91;"
    layer = a_layer("transcoder")
    layer.provenance = Provenance(
        model=hostile, revision=hostile, layer=0, text=hostile, special_positions=hostile, mxd_version=hostile
    )
    export_layers([layer], tmp_path / "out", "sparsify", model=GPT2)
    page = MarkdownIt("commonmark").enable("table").parse((tmp_path / "out" / CARD_FILE).read_text("utf-8"))
    parts = [part for token in page for part in token.children or ()]
    assert {part.type for part in parts} <= {"text", "code_inline", "softbreak"}
    assert not [token for token in page if token.type.startswith("html")]
    assert not [part for part in parts if part.type == "text" and "evil" in part.content]
    assert sum("www.evil.org" in part.content for part in parts if part.type == "code_inline") >= 3


def test_the_page_says_whose_folder_is_meant(tiny: TinyRun, tmp_path: Path) -> None:
    export_run(tiny.run, tmp_path / "out", "saelens")
    page = (tmp_path / "out" / CARD_FILE).read_text("utf-8")
    assert "FOLDER stands for the path of a student's folder, such as `transcoder-k4` beside this page." in page
    export_layers([a_layer("transcoder")], tmp_path / "one", "saelens", model=GPT2)
    assert "the path of the folder of this page." in (tmp_path / "one" / CARD_FILE).read_text("utf-8")


@pytest.mark.parametrize(
    ("dtypes", "words"),
    [
        ({"W_dec": torch.int32}, r"one floating-point type; got torch\.float64, torch\.int32"),
        (dict.fromkeys(("W_dec", "b_dec", "encoder.weight", "encoder.bias"), torch.int32), r"got torch\.int32"),
        (dict.fromkeys(("W_dec", "b_dec", "encoder.weight", "encoder.bias"), torch.float8_e4m3fn), "16, 32 or 64 bits"),
        ({"encoder.weight": torch.float16}, r"one floating-point type; got torch\.float16, torch\.float64"),
    ],
)
def test_coders_of_several_or_unusual_types_are_refused(
    dtypes: dict[str, torch.dtype], words: str, tmp_path: Path
) -> None:
    export_layers([a_layer("transcoder")], tmp_path / "out", "sparsify", model=GPT2)
    path = tmp_path / "out/h.0.mlp/sae.safetensors"
    tensors = load_file(path)
    save_file({name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in tensors.items()}, path)
    with pytest.raises(ValueError, match=rf"^[^\n]*sae\.safetensors must have[^\n]*{words}[^\n]*$"):
        load_sparsify(path.parent)


def test_a_coder_of_nested_settings_or_infinite_weights_is_refused(tmp_path: Path) -> None:
    export_layers([a_layer("transcoder")], tmp_path / "out", "sparsify", model=GPT2)
    folder = tmp_path / "out/h.0.mlp"
    tensors = load_file(folder / "sae.safetensors")
    save_file({**tensors, "b_dec": tensors["b_dec"] / 0}, folder / "sae.safetensors")
    with pytest.raises(ValueError, match="must have finite weights; b_dec has"):
        load_sparsify(folder)
    (folder / "cfg.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"cfg\.json must be JSON; it does not parse"):
        load_sparsify(folder)
