"""The documents against the code: examples, commands, links and names of files."""

import ast
import functools
import importlib
import json
import re
import shlex
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import mxd
from mxd.cli import main
from mxd.models import MLP_SITES
from mxd.recipes import find_recipe

ROOT = Path(__file__).parent.parent
PAGES = {
    str(page.relative_to(ROOT)): page
    for page in [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
        *sorted((ROOT / "docs").glob("*.md")),
    ]
}
COMMANDS = {
    "mxd.cli.train": ["train"],
    "mxd.cli.pretrain": ["pretrain_language", "pretrain_images"],
    "mxd.cli.privacy": ["induce", "sweep", "certify", "evaluate", "attack_model", "demo"],
} | {
    f"mxd.cli.{name}": [name]
    for name in ("evaluate", "frontier", "probe", "steer", "edit", "explore", "explain", "export", "demo")
}
PEERS = {"sparsify", "sae_lens", "circuit_tracer"}
"""Other tools, which the pages may import from and which need not be installed."""
PLACEHOLDERS = {"...", "…", "N", "D"}
"""Words that stand for something left out, so that a command cannot be parsed whole."""


class Example(NamedTuple):
    """A block of code on a page."""

    page: str
    language: str
    lines: str


class Command(NamedTuple):
    """A command on a page."""

    page: str
    words: tuple[str, ...]

    @property
    def options(self) -> set[str]:
        """What stands behind two dashes."""
        return {word.partition("=")[0] for word in self.words if re.match(r"--[a-z]", word)}


def examples() -> list[Example]:
    found: list[Example] = []
    for name, page in PAGES.items():
        text = page.read_text(encoding="utf-8")
        for indent, language, lines in re.findall(r"^( *)```(\w*)\n(.*?)^\1```", text, flags=re.DOTALL | re.MULTILINE):
            assert isinstance(indent, str)
            found.append(Example(name, language, textwrap.dedent(lines)))
    return found


def commands(program: str) -> list[Command]:
    """Return the commands of a program: in blocks, indented by four, and within lines where they have an option."""
    found: list[Command] = []
    for name, page in PAGES.items():
        text = page.read_text(encoding="utf-8")
        fenced = [example.lines for example in examples() if example.page == name and example.language in ("", "sh")]
        indented = re.findall(r"(?:^ {4,}\S.*\n)+", text, flags=re.MULTILINE)
        inline = re.findall(rf"`({program} [^`]*--[^`]*)`", text)
        for block in [*fenced, *(textwrap.dedent(block) for block in indented), *inline]:
            for line in block.replace("\\\n", " ").splitlines():
                for part in line.split("&&"):
                    if part.strip().startswith(f"{program} ") and " → " not in part:
                        words = shlex.split(part.replace("[", " ").replace("]", " "), comments=True)
                        found.append(Command(name, tuple(words[1:])))
    return found


def plain(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def assert_imports_resolve(lines: str) -> None:
    for node in ast.walk(ast.parse(lines)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            if node.module.partition(".")[0] in PEERS:
                continue
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


PYTHON = [example for example in examples() if example.language == "python"]


def test_the_pages_are_found() -> None:
    assert len(PYTHON) >= 12
    assert len(commands("mxd")) >= 40


@pytest.mark.parametrize("example", PYTHON, ids=lambda example: plain(example.page))
def test_python_compiles_and_imports_what_is_there(example: Example) -> None:
    compile(example.lines, example.page, "exec")
    assert_imports_resolve(example.lines)


def test_what_a_page_calls_of_mxd_is_there() -> None:
    for example in PYTHON:
        for name in re.findall(r"\bmxd\.(\w+)\(", example.lines):
            assert hasattr(mxd, name), (example.page, name)


def saved(folder: Path, provenance: mxd.Provenance | None = None) -> None:
    config = mxd.MixtureOfDecodersConfig(d_in=256, d_hidden=1024, d_out=256, num_experts=64, k=32)
    mxd.save(mxd.MixtureOfDecoders(config, torch.Generator().manual_seed(0)), folder, provenance)


@pytest.mark.parametrize("page", ["docs/models.md", "docs/runs.md", "docs/steering.md", "docs/multilinear.md"])
def test_the_first_example_of_these_pages_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "demo-run/layers/3/mxd-k32")
    saved(tmp_path / "RUN/layers/8/mxd-k32")
    monkeypatch.chdir(tmp_path)
    first = next(example for example in PYTHON if example.page == page)
    names: dict[str, object] = {"x": torch.randn(10, 1024)}
    exec(compile(first.lines, page, "exec"), names)
    assert len(names) > 2


def test_the_example_of_texts_and_codes_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "RUN/layers/3/mxd-k32", mxd.Provenance(layer=3))
    monkeypatch.chdir(tmp_path)
    example = next(example for example in PYTHON if "mxd.codes(" in example.lines)
    exec(compile(example.lines, example.page, "exec"), {})
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "['import', ' os'] [(0, 6), (6, 9)] torch.Size([2, 32])"


def test_the_page_on_models_lists_the_families() -> None:
    rows = re.findall(r"^\| (`[^|]*)\|", PAGES["docs/models.md"].read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([\w-]+)`", row)} == {*MLP_SITES, "model_type"}


def test_the_example_of_the_baselines_runs() -> None:
    example = next(example for example in PYTHON if "privacy.baselines" in example.lines)
    names: dict[str, Any] = {}
    exec(compile(example.lines, example.page, "exec"), names)
    assert list(names["measures"]) == ["retrained", "random labels", "noisy and clean", "label privacy"]
    assert all(0 <= found.protected.confidence_distance < 0.9 for found in names["measures"].values())


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`mxd`, whose commands understand their arguments and do nothing; what it printed is what comes back."""

    def idle(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(*arguments: object, **options: object) -> None: ...

        return run

    for module, names in COMMANDS.items():
        for name in names:
            loaded = importlib.import_module(module)
            monkeypatch.setattr(loaded, name, idle(getattr(loaded, name)))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(list(words))
        printed = capsys.readouterr()
        assert end.value.code == 0, (words, printed.out, printed.err)
        return printed.out

    return run


def test_the_commands_are_understood(
    parsed: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A run is resumed with what it records.
    monkeypatch.chdir(tmp_path)
    Path("RUN").mkdir()
    Path("RUN/run.json").write_text(json.dumps({"command": "train", "config": asdict(find_recipe("demo").config())}))
    wholes = {command.words for command in commands("mxd") if not PLACEHOLDERS & set(command.words)}
    given = [words for words in wholes if is_whole(words)]
    assert len(given) >= 30
    for words in given:
        parsed(*words)


def is_whole(words: tuple[str, ...]) -> bool:
    """Whether a command is there with all that it needs, and not named in passing with one of its options."""
    needs = {
        "train": "--out",
        "frontier": "RUN",
        "edit": "--student",
        "evaluate": "RUN",
        "probe": "RUN",
        "export": "--out",
    }
    return needs.get(words[0], words[0]) in words or "--help" in words or "list" in words


def test_the_options_of_commands_that_are_cut_short_exist(parsed: Callable[..., str]) -> None:
    known: dict[str, str] = {}
    for command in commands("mxd"):
        name = command.words[0]
        if name not in known:
            known[name] = parsed(name, "--help")
            if name == "pretrain":
                known[name] += parsed(name, "--recipe", "mnist-cp", "--help")
            if name == "privacy":
                for one in ("induce", "sweep", "certify", "evaluate", "attack", "demo"):
                    known[name] += parsed(name, one, "--help")
        missing = {option for option in command.options if not re.search(rf"{option}\b", known[name])}
        assert missing <= {"--help"}, (command.page, command.words)


def test_the_options_of_benchmarks_exist() -> None:
    given = [command for command in commands("python") if command.words[0].startswith("benchmarks/")]
    assert len(given) >= 30
    for command in given:
        source = (ROOT / command.words[0]).read_text(encoding="utf-8")
        missing = [
            option
            for option in command.options - {"--help"}
            if f'"{option}"' not in source
            and not re.search(rf"\b{option[2:].removeprefix('no-').replace('-', '_')}: ", source)
        ]
        assert missing == [], (command.page, command.words)


def anchors(page: Path) -> set[str]:
    """Return the anchors that a page's headings get on the web."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = PAGES[name]
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        place = page.parent / target if target else page
        assert place.exists(), link
        assert not anchor or anchor in anchors(place), link


def test_files_that_pages_name_exist() -> None:
    named: list[str] = []
    for page in PAGES.values():
        for path in re.findall(r"`((?:benchmarks|docs|results|tests|scripts)/[\w./*-]+)`", page.read_text("utf-8")):
            named.append(path)
            folder = ROOT / "benchmarks" if path.startswith("results/") else ROOT
            assert list(folder.glob(path.rstrip("/"))), (page, path)
    assert len(named) >= 30


def test_every_picture_is_on_a_page() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES.values())
    assert [picture.name for picture in (ROOT / "docs/images").iterdir() if picture.name not in text] == []
