import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mxd.layers import LAYERS, LayerKind
from tests import tiny_model
from tests.tiny_run import Command, TinyRun, command, tiny_run
from tests.train_command import Trainer


@pytest.fixture(scope="session", autouse=True)
def heeded_interrupts() -> None:
    """Let SIGINT interrupt, as at a terminal: a shell starts what it puts into the background with it ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of tokens for this session alone."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("MXD_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny model whose MLPs are gated."""
    return tiny_model.write_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny model whose MLPs are plain."""
    return tiny_model.write_model(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text, a tenth of whose documents are held out."""
    return tiny_model.write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The run of this session."""
    return tiny_run(tmp_path_factory.getbasetemp())


@pytest.fixture
def kinds() -> Iterator[dict[str, LayerKind]]:
    """The kinds of layer; those that a test registers are forgotten after it."""
    before = dict(LAYERS)
    yield LAYERS
    LAYERS.clear()
    LAYERS.update(before)


@pytest.fixture
def mxd(capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line, called in this process."""
    return command(capsys)


@pytest.fixture
def trainer(llama: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """`mxd train` on a tiny model, called in this process, where its steps can be told."""
    return Trainer(llama, text, capsys, monkeypatch)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits of a sort: the class is where the image is bright."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name, count in (("train", 200), ("test", 60)):
        labels = random.integers(0, 4, count)
        pixels = random.integers(0, 60, (count, 8, 8)).astype(np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            image[4 * (label // 2) :][:4, 4 * (label % 2) :][:, :4] += 150
        np.savez(folder / f"{name}.npz", images=pixels, labels=labels)
    return folder
