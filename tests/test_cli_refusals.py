import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from mxd.runs.run import locked
from tests.tiny_run import (
    TINY,
    Command,
    Settings,
    TinyRun,
    assert_refused,
    change_json,
    copied,
    other_model,
    training,
    tree,
)

REFUSED_FLAGS: dict[str, tuple[Settings, tuple[str, ...]]] = {
    "unknown model": ({"model": "nobody/nothing"}, ("A model must be", "found no 'nobody/nothing'", "Check")),
    "model path that is not there": ({"model": "./nothing"}, ("found no folder './nothing'", "Check the path")),
    "layer above the last": ({"layer": 2}, ("layer must lie in [0, 1]", "got 2")),
    "layer below 0": ({"layer": -1}, ("layer must be numbers, spans such as 0-3, or all alone", "got '-1'")),
    "k above num-latents": ({"k": 17}, ("k must be at most num-latents, 16", "got 17")),
    "k above the matched number": ({"k": 400, "num_latents": None, "expansion": 2}, ("k must lie in", "got 400")),
    "k of 0": ({"k": 0}, ("k must be at least 1", "got 0")),
    "negative k": ({"k": -3}, ("k must be at least 1", "got -3")),
    "k given twice": ({"k": (4, 4)}, ("k must name each only once", "got 4 4")),
    "unknown kind": ({"kind": "crosscoder"}, ("kind must be one of mxd, transcoder", "got 'crosscoder'")),
    "unknown activation": ({"kind": "mxd", "activation": "mish"}, ("activation must be one of relu", "got 'mish'")),
    "missing text": ({"text": "nothing.jsonl"}, ("There is no file nothing.jsonl", "Check the path")),
    "unknown dataset": ({"text": "nobody/nothing"}, ("nobody/nothing is neither a local file", "Check the name")),
    "pattern without a match": ({"text": "nothing-*.txt"}, ("No file matches the pattern nothing-*.txt",)),
    "context longer than the model's": ({"context": 65}, ("context must be at most 64", "got 65")),
    "context of 1": ({"context": 1}, ("context must be at least 2", "got 1")),
    "learning rate of 0": ({"lr": 0}, ("lr must be a positive number or auto", "got 0.0")),
    "learning rate that is no number": ({"lr": "nan"}, ("lr must be a positive number or auto", "got nan")),
    "unknown device": ({"device": "abacus"}, ("device must be one that", "'abacus' is not", "Choose cpu")),
    "device that is not there": ({"device": "cuda:99"}, ("device must be one that", "'cuda:99' is not", "Choose cpu")),
    "no tokens": ({"tokens": 0}, ("tokens must be at least 1", "got 0")),
    "snapshots at no time": ({"snapshot_every": "nan"}, ("snapshot-every must be a number of seconds", "got nan")),
    "evaluation of less than a context": ({"eval_tokens": 10}, ("eval-tokens must fill one context, 32", "got 10")),
    "init that no kind reads": ({"init": "model"}, ("init model is read by mxd, shared-transcoder only", "transcoder")),
    "rank that no kind reads": (
        {"kind": ("mxd", "transcoder"), "rank": ("auto", 8)},
        ("rank 8 is read by low-rank, molt only", "kind mxd transcoder", "ask for a kind that reads it with --kind"),
    ),
    "charge that no kind reads": (
        {"shared_penalty": (0.3, 0.5)},
        ("shared-penalty 0.3 is read by shared-transcoder only", "kind transcoder;"),
    ),
    "shared expert without an mxd": (
        {"kind": None, "shared_expert": True},
        ("shared-expert True is read by mxd only", "kind shared-transcoder;"),
    ),
    "module that is not there": ({"module": "model.layers.{layer}.ffn"}, ("has no 'ffn'", "Give a path that exists")),
    "module of hidden width": ({"module": "model.layers.{layer}.mlp.act_fn"}, ("is given vectors 40 wide", "say 16")),
}


@pytest.mark.parametrize("case", REFUSED_FLAGS)
def test_a_request_that_cannot_be_met_is_refused_in_one_sentence(
    mxd: Command, tiny: TinyRun, tmp_path: Path, case: str
) -> None:
    changes, expected = REFUSED_FLAGS[case]
    assert_refused(mxd(*training(tiny, tmp_path / "run", **changes)), "train", *expected)
    assert not (tmp_path / "run").exists()


def without_weights(tiny: TinyRun, folder: Path) -> Settings:
    model = copied(tiny.model, folder / "model")
    (model / "model.safetensors").unlink()
    return {"model": model}


def pickled_weights(tiny: TinyRun, folder: Path) -> Settings:
    changes = without_weights(tiny, folder)
    # Were it unpickled, it would raise something else.
    (folder / "model" / "pytorch_model.bin").write_bytes(b"cos\nabort\n(tR.")
    return changes


def truncated_weights(tiny: TinyRun, folder: Path) -> Settings:
    weights = copied(tiny.model, folder / "model") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    return {"model": weights.parent}


def altered_weights(tiny: TinyRun, folder: Path) -> Settings:
    weights = copied(tiny.model, folder / "model") / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"data_offsets", b"date_offsets", 1))
    return {"model": weights.parent}


def unlisted_family(tiny: TinyRun, folder: Path) -> Settings:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 259}
    return {"model": other_model(tiny, folder / "model", "gpt_neox_japanese", **sizes)}


def bidirectional(tiny: TinyRun, folder: Path) -> Settings:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 259}
    return {"model": other_model(tiny, folder / "model", "bert", **sizes)}


def text_of(name: str, content: bytes) -> Callable[[TinyRun, Path], Settings]:
    def write(tiny: TinyRun, folder: Path) -> Settings:
        (folder / name).write_bytes(content)
        return {"text": folder / name}

    return write


def ids_beyond_the_vocabulary(tiny: TinyRun, folder: Path) -> Settings:
    rows = [json.dumps({"input_ids": [1, 2, number + 200] * 20}) + "\n" for number in range(100)]
    return text_of("ids.jsonl", "".join(rows).encode())(tiny, folder)


def a_file(tiny: TinyRun, folder: Path) -> Settings:
    (folder / "taken").write_text("mine")
    return {"out": folder / "taken"}


def below_a_file(tiny: TinyRun, folder: Path) -> Settings:
    a_file(tiny, folder)
    return {"out": folder / "taken" / "run"}


def hidden_file(tiny: TinyRun, folder: Path) -> Settings:
    (folder / "kept").mkdir()
    (folder / "kept" / ".gitkeep").touch()
    return {"out": folder / "kept", "model": folder / "no-model"}


REFUSED_FILES: dict[str, tuple[Callable[[TinyRun, Path], Settings], tuple[str, ...]]] = {
    "model without weights": (without_weights, ("must have safetensors weights", "then give FOLDER")),
    "model with pickled weights": (pickled_weights, ("must have safetensors weights", "pickles", "are refused")),
    "truncated model": (truncated_weights, ("must be complete safetensors", "model.safetensors' truncated", "again")),
    "altered model": (altered_weights, ("must be complete safetensors", "damaged", "again")),
    "family without a known MLP": (
        unlisted_family,
        ("must be of a family", "got model_type 'gpt_neox_japanese'", "--module", "'gpt_neox_japanese.layers.{layer}"),
    ),
    "model that reads both ways": (bidirectional, ("must be causal", "reads in both directions (model_type bert)")),
    "empty text": (text_of("a.txt", b""), ("must hold at least one document", "a.txt holds none", "Give other")),
    "text of blanks": (text_of("a.txt", b" \n\n "), ("must hold at least one document", "a.txt holds none")),
    "short text": (text_of("a.txt", b"too few\n\nwords"), ("one batch of 512", "a.txt", "too few", "--batch-tokens")),
    "text that is not UTF-8": (text_of("a.txt", b"caf\xe9"), ("must be UTF-8", "a.txt has byte 0xe9 at offset 3")),
    "broken row": (text_of("a.jsonl", b'{"text": "a"}\n{"text":\n'), ("a.jsonl, line 2 is not", "Repair or remove")),
    "row without text": (text_of("a.jsonl", b'{"body": "a"}'), ("a.jsonl, line 1 has the fields: 'body'", "--text-f")),
    "unknown ending": (text_of("a.docx", b"a"), ("must end in .txt, .jsonl", "a.docx", "Convert")),
    "ids beyond the vocabulary": (ids_beyond_the_vocabulary, ("Token ids must lie below 259", "the text has 259")),
    "out that is a file": (a_file, ("taken must be a folder or not exist; got a file", "name another --out")),
    "out with a hidden file": (hidden_file, ("kept exists, is not empty and holds no run.json", "name another --out")),
    "out below a file": (below_a_file, ("must be where a folder can be made", "name another --out")),
}


@pytest.mark.parametrize("case", REFUSED_FILES)
def test_files_that_cannot_be_used_are_named_in_one_sentence(
    mxd: Command, tiny: TinyRun, tmp_path: Path, case: str
) -> None:
    make, expected = REFUSED_FILES[case]
    (tmp_path / "given").mkdir()
    changes = make(tiny, tmp_path / "given")
    before = tree(tmp_path)
    assert_refused(mxd(*training(tiny, tmp_path / "run", **changes)), "train", *expected)
    assert tree(tmp_path) == before


def as_it_is(tiny: TinyRun, run: Path) -> None:
    pass


def unfinished(tiny: TinyRun, run: Path) -> None:
    (run / "finished.json").unlink()


def no_run(tiny: TinyRun, run: Path) -> None:
    (run / "run.json").unlink()


def other_format(tiny: TinyRun, run: Path) -> None:
    change_json(run / "run.json", lambda described: described.pop("resources"))


def truncated_layer(tiny: TinyRun, run: Path) -> None:
    weights = run / "layers" / "0" / "mxd-k4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def altered_layer(tiny: TinyRun, run: Path) -> None:
    weights = run / "layers" / "0" / "mxd-k4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")


def missing_layer(tiny: TinyRun, run: Path) -> None:
    shutil.rmtree(run / "layers" / "0" / "mxd-k4")


def wider_model(tiny: TinyRun, run: Path) -> None:
    sizes = {"hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = other_model(tiny, run.with_name("wider"), "llama", **sizes, intermediate_size=24, vocab_size=259)
    change_json(run / "run.json", lambda described: cast("Settings", described["config"]).update(model=str(model)))


REFUSED_RUNS: dict[str, tuple[Callable[[TinyRun, Path], None], str, tuple[str, ...]]] = {
    "unfinished run": (unfinished, "", ("must be a finished run", "mxd train --resume")),
    "folder that is no run": (no_run, "", ("must be the folder of a run", "check the path")),
    "run of another format": (other_format, "", ("run.json must describe a run", "resources.device missing")),
    "truncated layer": (truncated_layer, "", ("0/mxd-k4/model.safetensors must have the checksum", "Restore it")),
    "altered layer": (altered_layer, "", ("0/mxd-k4/model.safetensors must have the checksum", "Restore it")),
    "missing layer": (missing_layer, "", ("there is none at", "0/mxd-k4", "Check the path")),
    "model of other widths": (wider_model, "", ("must be evaluated with the model that it was trained on", "Restore")),
    "unknown student": (as_it_is, "--student mxd-k9", ("has no student mxd-k9", "1/topk-sae-k4")),
    "none on all layers": (
        as_it_is,
        "--together --student 0/mxd-k4 0/transcoder-k4 1/topk-sae-k4",
        ("the same name on all of the layers 0, 1", "one student a layer", "--student"),
    ),
    "one layer together": (as_it_is, "--together --student 0/mxd-k4", ("students of several layers", "layer 0")),
    "unknown device": (as_it_is, "--device abacus", ("device must be one", "'abacus' is not", "Choose cpu")),
    "device without data": (as_it_is, "--device meta", ("device must be one", "'meta' is not")),
    "no tokens": (as_it_is, "--tokens 0", ("must fill one context", "got 0 tokens")),
    "missing text": (as_it_is, "--text nothing.txt", ("There is no file nothing.txt", "Check the path")),
}


@pytest.mark.parametrize("case", REFUSED_RUNS)
def test_a_run_that_cannot_be_evaluated_is_refused_and_left_as_it_is(
    mxd: Command, tiny: TinyRun, tmp_path: Path, case: str
) -> None:
    damage, flags, expected = REFUSED_RUNS[case]
    run = copied(tiny.run, tmp_path / "run")
    damage(tiny, run)
    before = tree(run)
    assert_refused(mxd("evaluate", run, *flags.split()), "evaluate", *expected)
    assert tree(run) == before


BEGUN_BY = {
    "pretrain": {"command": "pretrain", "config": {}, "data": {}},
    "induce": {"command": "induce", "task": "induce uncertainty", "config": {}, "model": "0" * 64},
    "induce of an earlier version": {"task": "induce uncertainty", "config": {}, "model": "0" * 64},
}


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("case", BEGUN_BY)
def test_a_run_of_another_command_is_not_continued(
    mxd: Command, tiny: TinyRun, tmp_path: Path, case: str, finished: bool
) -> None:
    (tmp_path / "run.json").write_text(json.dumps(BEGUN_BY[case]))
    if finished:
        (tmp_path / "finished.json").write_text("{}")
    before = tree(tmp_path)
    ended = mxd(*training(tiny, tmp_path, "--resume", model=tmp_path / "no-model"))
    assert_refused(ended, "train", "must be one of mxd train", f"this one is of '{case.split()[0]}'", "another --out")
    assert tree(tmp_path) == before


def test_a_run_that_names_no_command_is_one_of_train(mxd: Command, tiny: TinyRun, tmp_path: Path) -> None:
    run = copied(tiny.run, tmp_path / "run")
    layers = tree(run / "layers")
    unfinished(tiny, run)
    change_json(run / "run.json", lambda described: described.pop("command"))
    ended = mxd(*training(tiny, run, "--resume", **TINY))
    assert (ended.status, (run / "finished.json").is_file()) == (0, True), ended.err
    assert tree(run / "layers") == layers
    assert_refused(mxd("pretrain", "--out", run, "--resume"), "pretrain", "must be one of mxd pretrain")


def test_of_two_that_begin_at_once_one_makes_the_run(mxd: Command, tiny: TinyRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with locked(run):
        ended = mxd(*training(tiny, run))
    assert ended.status == 2
    assert ended.err.splitlines()[-1].startswith("mxd train: another process is training in")
    assert [path.name for path in run.iterdir()] == [".lock"]
