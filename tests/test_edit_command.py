"""`mxd edit` on a tiny run, and what it says an edit does."""

import json
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

from mxd.checkpoint import load_layer
from mxd.edits import Add, Edit, edits_of, with_edits
from mxd.evaluation.firings import collect_firings
from mxd.models import load_language_model
from mxd.steering.edit_run import find_layer
from mxd.steering.side_effects import side_effects
from mxd.steering.steer import steer
from tests.test_steering import student_of, text_of
from tests.tiny_run import TinyRun, assert_refused, command, copied


def test_mxd_edit_edits_measures_undoes_and_exports(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, copy = command(capsys), copied(tiny.run, tmp_path / "run")
    folder = copy / "layers/1/mxd-k4"
    weights = (folder / "model.safetensors").read_bytes()
    concept = tmp_path / "concept.txt"
    concept.write_text("cat dog cat dog cat")
    edited = run(
        "edit",
        copy,
        "--student",
        "1/mxd-k4",
        "--latents",
        "0-15",
        "--operation",
        "ablate",
        "--concept",
        concept,
        "--json",
    )
    assert edited.status == 0, edited.err
    effects = {effect["group"]: effect for effect in json.loads(edited.out)["effects"]}
    assert "the concept's text" in effects
    assert effects["tokens on which an edited latent fires"]["kl"] > 0
    # What a token's prediction does not read cannot change it: no latent fired in its context at all.
    if "contexts in which none fires" in effects:
        assert effects["contexts in which none fires"]["kl"] == 0
    assert (folder / "edits.json").is_file()
    assert (folder / "model.safetensors").read_bytes() == weights
    twice = run(
        "edit",
        copy,
        "--student",
        "1/mxd-k4",
        "--latents",
        "0",
        "--operation",
        "scale",
        "--strength",
        "2",
        "--export",
        tmp_path / "plain",
    )
    assert twice.status == 0, twice.err
    assert not (tmp_path / "plain/edits.json").exists()
    assert run("edit", copy, "--student", "1/mxd-k4", "--undo").status == 0
    assert len(json.loads((folder / "edits.json").read_text())["edits"]) == 1
    assert run("edit", copy, "--student", "1/mxd-k4", "--undo-all").status == 0
    assert not (folder / "edits.json").exists()
    refused = run("edit", copy, "--student", "mxd-k4", "--undo")
    assert_refused(refused, "edit", "student must name one layer")
    shown = run("edit", copy, "--student", "1/mxd-k4")
    assert "1/mxd-k4 has no edits." in shown.err
    unheld = run(
        *("edit", copy, "--student", "1/mxd-k4", "--latents", "1", "--operation", "add", "--strength", "1"),
        *("--export", tmp_path / "other"),
    )
    assert_refused(unheld, "edit", "depends on")
    assert not (folder / "edits.json").exists()
    moved_one = ("edit", copy, "--student", "1/mxd-k4", "--latents", "1", "--operation", "add", "--strength", "1")
    assert run(*moved_one).status == 0
    assert_refused(run("edit", copy, "--student", "1/mxd-k4", "--export", tmp_path / "other"), "edit", "depends on")
    assert not (tmp_path / "other").exists()


def test_an_undo_takes_back_a_whole_command_and_an_export_that_fails_leaves_the_edits(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, copy = command(capsys), copied(tiny.run, tmp_path / "run")
    file = copy / "layers/1/mxd-k4/edits.json"
    chosen = ("edit", copy, "--student", "1/mxd-k4", "--tokens", 96)
    assert run(*chosen, "--latents", "3", "--operation", "ablate").status == 0
    first = file.read_bytes()
    units = find_layer(copy, "1/mxd-k4")
    firings = collect_firings(
        cast("nn.Module", load_language_model(str(tiny.model)).model),
        1,
        with_edits(units.candidate.network, ()),
        units.open((), 96, None).text,
    )
    able = sorted(set(firings.latents.tolist()))[:3]
    moved_some = (*chosen, "--latents", *able, "--operation", "clamp", "--strength", "1", "--unit", "p99")
    assert run(*moved_some).status == 0
    content = json.loads(file.read_text())
    assert (len(content["edits"]), content["groups"]) == (4, [1, 3])
    assert len(edits_of(load_layer(file.parent))) == 4
    assert run(*chosen, "--undo").status == 0
    assert file.read_bytes() == first
    (tmp_path / "file").write_text("")
    failed = run(*chosen, "--latents", "2", "--operation", "ablate", "--export", tmp_path / "file" / "plain")
    assert failed.status == 2
    assert file.read_bytes() == first
    assert run(*chosen, "--undo").status == 0
    assert not file.exists()
    assert "1/mxd-k4 has no edits." in run(*chosen, "--undo").err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--strength", 2), "strength must stand beside an --operation that has one; got none"),
        (("--undo", "--unit", "p99"), "unit must stand beside an --operation whose strength has one; got none"),
        (("--latents", 3, "--operation", "ablate", "--strength", 2), "that has one; got ablate"),
        (("--latents", 3, "--operation", "ablate", "--unit", "value"), "whose strength has one; got ablate"),
        (("--latents", 3, "--operation", "scale", "--strength", 2, "--unit", "p99"), "has one; got scale"),
    ],
)
def test_what_would_do_nothing_is_refused(
    words: tuple[object, ...], expected: str, tiny: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(command(capsys)("edit", tiny.run, "--student", "1/mxd-k4", *words), "edit", expected)
    assert not (tiny.run / "layers/1/mxd-k4/edits.json").exists()


def test_side_effects_are_differences_of_losses(tiny: TinyRun) -> None:
    language_model, student, text = (
        load_language_model(str(tiny.model), dtype=torch.float32),
        student_of(tiny),
        text_of(tiny),
    )
    model = cast("nn.Module", language_model.model)
    edit = Edit(latents=(3, 4, 5), operation=Add(amount=2.0))
    found = side_effects(model, student, (), (edit,), text)
    assert sum(effect.tokens for effect in found) == text.contexts[:, 1:].numel()
    with torch.no_grad(), steer(model, {1: student.network}, {1: [edit]}):
        logits = model(text.contexts).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text.contexts[:, 1:].flatten())
    mean = sum(effect.after * effect.tokens for effect in found) / text.contexts[:, 1:].numel()
    assert mean == pytest.approx(float(expected), rel=1e-5)
