"""A finished run on the tiny model, trained once for all tests that need one, and how to call the commands."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple, cast

import pytest
import transformers as hf

from mxd.cli.main import main
from mxd.training.config import TrainConfig
from mxd.training.decompose import decompose, make_plan
from tests import tiny_model

Settings = dict[str, object]

CONTEXT = 32
KINDS = ("mxd", "transcoder", "skip-transcoder", "topk-sae")


class TinyRun(NamedTuple):
    """Where a model, its text, and a run that has finished are."""

    model: Path
    """The language model, as `save_pretrained` writes it."""
    text: Path
    """Many short documents, as .jsonl."""
    run: Path
    """The run; tests that change it take a copy."""


@cache
def tiny_run(folder: Path) -> TinyRun:
    """Return the run of this session, trained below this folder on the first call: two layers, every kind."""
    model = tiny_model.write_model(folder / "tiny-model")
    text = tiny_model.write_text(folder / "tiny.jsonl", documents=300, words=12)
    config = TrainConfig(
        model=str(model),
        text=(str(text),),
        layer=(0, 1),
        kind=KINDS,
        k=(4,),
        expansion=8,
        tokens=12_288,
        batch_tokens=512,
        context=CONTEXT,
        buffer_tokens=4096,
        eval_tokens=1024,
        lr=1e-2,
        device="cpu",
        precision="float32",
        threads=1,
    )
    decompose(make_plan(config), folder / "tiny-run")
    return TinyRun(model, text, folder / "tiny-run")


TINY: Settings = {
    "layer": (0, 1),
    "kind": KINDS,
    "expansion": 8,
    "num-latents": None,
    "tokens": 12_288,
    "lr": 0.01,
    "buffer-tokens": 4096,
    "eval-tokens": 1024,
    "precision": "float32",
}
"""What to ask of `training` to get the configuration of `tiny_run`."""


def training(tiny: TinyRun, out: Path, /, *more: str, **changes: object) -> list[str]:
    """Return the words of an `mxd train` that takes a moment, with some settings changed, or left out where None."""
    settings: Settings = {"model": tiny.model, "text": tiny.text, "out": out, "layer": 0, "kind": "transcoder", "k": 4}
    settings |= {"num-latents": 16, "tokens": 1024, "batch-tokens": 512, "context": CONTEXT, "device": "cpu"}
    settings |= {"threads": 1} | {name.replace("_", "-"): value for name, value in changes.items()}
    words = ["train", *more]
    for name, value in settings.items():
        values = cast("tuple[object, ...]", value) if isinstance(value, tuple) else (value,)
        words += [] if value is None else [f"--{name}", *map(str, values)]
    return words


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


Command = Callable[..., Ended]


def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Return `mxd`, run in this process."""

    def run(*arguments: object) -> Ended:
        # The variable that main sets for this is read when transformers is first imported, which was long ago.
        hf.utils.logging.disable_progress_bar()
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as end:
                main([str(argument) for argument in arguments])
        finally:
            hf.utils.logging.enable_progress_bar()
        printed = capsys.readouterr()
        return Ended(cast("int", end.value.code), str(printed.out), str(printed.err))

    return run


def assert_refused(ended: Ended, name: str, *expected: str) -> None:
    """Assert that a command ended with status 2 and one line on stderr that has these words."""
    assert ended.status == 2
    assert ended.out == ""
    assert len(ended.err.splitlines()) == 1
    assert ended.err.startswith(f"mxd {name}: ")
    for words in expected:
        assert words in ended.err


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return everything below a folder, byte for byte."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def copied(source: Path, target: Path) -> Path:
    """Return a copy of a folder."""
    return Path(shutil.copytree(source, target))


def change_json(path: Path, change: Callable[[Settings], object]) -> None:
    """Change a JSON object on disk."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def other_model(tiny: TinyRun, folder: Path, model_type: str, **sizes: int) -> Path:
    """Write a model of another family or size, with the tiny model's tokenizer."""
    copied(tiny.model, folder)
    hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(model_type, **sizes)).save_pretrained(folder)
    return folder
