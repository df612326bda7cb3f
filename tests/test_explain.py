"""`mxd explain`: examples, explanations, tests of them, and delphi's cache."""

import importlib.util
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mxd.checkpoint import edits_digest, save_edits
from mxd.data.tokenization import Tokenizer
from mxd.edits import Ablate, Edit
from mxd.evaluation.delphi import export_latents
from mxd.evaluation.firings import Firings
from mxd.judge.examples import TESTED, WINDOW, Piece, choose_examples, marked, wrong_marks
from mxd.judge.interpretation import score
from mxd.models import load_tokenizer
from tests.judge_server import Reply, judge_server
from tests.test_judge import user_of
from tests.tiny_run import TinyRun, assert_refused, command, copied


@pytest.fixture(scope="module")
def tokenizer(tiny: TinyRun) -> Tokenizer:
    return load_tokenizer(str(tiny.model))


def firings_of(places: dict[int, dict[int, float]], latent: int = 5) -> Firings:
    entries = [(c, p, v) for c in sorted(places) for p, v in sorted(places[c].items())]
    return Firings(
        torch.full((len(entries),), latent, dtype=torch.int32),
        torch.tensor([v for _, _, v in entries]),
        torch.tensor([c for c, _, _ in entries], dtype=torch.int32),
        torch.tensor([p for _, p, _ in entries], dtype=torch.int32),
    )


def some_places(seed: int, contexts: int, rate: float, length: int = 100) -> dict[int, dict[int, float]]:
    chance = np.random.default_rng(seed)
    fires = chance.random((contexts, length)) < rate
    return {
        c: {int(p): float(chance.uniform(0.1, 9)) for p in fires[c].nonzero()[0]}
        for c in range(contexts)
        if fires[c].any()
    }


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), rate=st.sampled_from([0.0, 0.001, 0.01, 0.03, 0.3, 0.95]))
def test_examples_are_apart_and_truly_firing_or_silent(seed: int, rate: float) -> None:
    places = some_places(seed, 60, rate)
    contexts = torch.zeros(60, 100, dtype=torch.int64)
    examples = choose_examples(firings_of(places), contexts, seed=seed)
    if examples is None:
        assert len(places) < 10 or rate > 0.2
        return
    for piece in (*examples.shown, *examples.tested):
        inside = {p: v for p, v in places[piece.context].items() if piece.start <= p < piece.stop}
        assert piece.fired == set(inside)
        assert piece.value == pytest.approx(max(places[piece.context].values()))
        assert piece.stop - piece.start == WINDOW
    for piece in examples.silent:
        assert not [p for p in places.get(piece.context, {}) if piece.start <= p < piece.stop]
    shown, tested = ({piece.context for piece in some} for some in (examples.shown, examples.tested))
    assert not shown & tested
    assert not (shown | tested) & {piece.context for piece in examples.silent}
    assert len(examples.silent) <= len(examples.tested) <= TESTED
    assert examples == choose_examples(firings_of(places), contexts, seed=seed)


def test_tested_pieces_are_of_all_strengths() -> None:
    places = {c: {50: 1.0 + c} for c in range(100)}
    examples = choose_examples(firings_of(places), torch.zeros(200, 100, dtype=torch.int64), seed=0)
    assert examples is not None
    for pieces in (examples.shown, examples.tested):
        values = sorted(piece.value for piece in pieces)
        assert values[1] <= 25 <= 75 <= values[-2]


def test_marks_stand_around_runs_of_tokens_and_the_texts_own_are_replaced(tokenizer: Tokenizer) -> None:
    ids: list[int] = tokenizer("cat «sees» dog", add_special_tokens=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
    piece = Piece(0, 0, len(ids), frozenset({0, 1, 3}), 1.0)
    contexts = torch.tensor([ids])
    assert marked(piece, piece.fired, contexts, tokenizer) == "«ca»t« »‹sees› dog"
    assert marked(piece, (), contexts, tokenizer) == "cat ‹sees› dog"
    wrong = wrong_marks(piece, 3)
    assert len(wrong) == 3
    assert not wrong & piece.fired


@pytest.mark.parametrize(
    ("truths", "said", "accuracy", "f1"),
    [
        ([1, 1, 0, 0], [1, 1, 0, 0], 1.0, 1.0),
        ([1, 1, 0, 0], [0, 0, 1, 1], 0.0, 0.0),
        ([1, 1, 1, 0], [1, 1, 1, 1], 0.5, 6 / 7),
        ([1, 0, 0, 0], [0, 0, 0, 0], 0.5, 0.0),
        ([1, 1], [1, 0], 0.5, 2 / 3),
    ],
)
def test_scores_are_balanced_accuracy_and_f1(truths: list[int], said: list[int], accuracy: float, f1: float) -> None:
    found = score([bool(one) for one in truths], [bool(one) for one in said])
    assert (found.balanced_accuracy, found.f1, found.asked) == (pytest.approx(accuracy), pytest.approx(f1), len(truths))


def oracle(request: dict[str, Any]) -> Reply:
    """Explain everything alike, say yes to every piece, and leave questions about marks without a proper answer."""
    system = request["messages"][0]["content"]
    if "You study a unit" in system:
        return Reply("[EXPLANATION]: \x1b[31mcats")
    if "its marks are right" in system:
        return Reply("no idea")
    return Reply(json.dumps([1] * len(json.loads(user_of(request)))))


def test_mxd_explain_lists_what_failed_and_asks_again_for_that_only(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MXD_JUDGE_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    run, copy = command(capsys), copied(tiny.run, tmp_path / "run")
    save_edits(copy / "layers/1/transcoder-k4", [Edit(latents=(1,), operation=Ablate())])
    with judge_server(oracle) as server:
        words = (
            "explain",
            copy,
            "--student",
            "0/mxd-k4",
            "--count",
            "2",
            "--judge",
            server.url,
            "m",
            "--judge-retries",
            0,
        )
        dry = run(*words, "--dry-run")
        assert (dry.status, dry.out, server.asked) == (0, "", [])
        assert "m: " in dry.err
        ended = run(*words, "--json")
        assert ended.status == 0, ended.err
        rows = json.loads(ended.out)
        assert [row["explanation"] for row in rows] == ["[31mcats"] * 2
        assert {row["detection"]["balanced_accuracy"] for row in rows} == {0.5}
        assert all(row["fuzzing"] is None and "no idea" in row["failure"] for row in rows)
        assert "The same command asks for what is missing again." in ended.err
        stored = json.loads((copy / "explanations.json").read_text())
        assert stored["edits"] == edits_digest(copy) is not None
        assert [row["latent"] for row in stored["explanations"]] == [row["latent"] for row in rows]
        asked = len(server.asked)
        shown = run(*words)
        assert "\x1b[31m" not in shown.out
        again = [request["messages"][0]["content"] for request in server.asked[asked:]]
        assert len(again) == 2
        assert all("its marks are right" in system for system in again)
    assert_refused(run("explain", copy), "explain", "needs --judge URL MODEL to explain, or --delphi")


def test_mxd_explain_exports_what_delphi_reads(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = command(capsys)("explain", tiny.run, "--student", "1/mxd-k4", "--delphi", tmp_path)
    assert ended.status == 0, ended.err
    folder = tmp_path / "1-mxd-k4" / "layers.1.mlp"
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_name"], config["cache_ctx_len"]) == (str(tiny.model), 32)
    files = sorted(folder.glob("*.safetensors"), key=lambda path: int(path.stem.split("_")[0]))
    assert len(files) == config["n_splits"] == 5
    ends = [[int(end) for end in path.stem.split("_")] for path in files]
    assert ends[0][0] == 0
    assert all(after[0] == before[1] + 1 for before, after in pairwise(ends))
    assert sum(len(load_file(path)["activations"]) for path in files) > 100


def test_delphis_files_hold_every_activation(tmp_path: Path) -> None:
    """Read as its documented layout says: locations are rows (context, position, latent − first)."""
    chance = np.random.default_rng(0)
    entries = sorted({(int(n), int(c), int(p)) for n, c, p in chance.integers(0, [23, 6, 16], (200, 3))})
    values = torch.tensor(chance.uniform(0.01, 5, len(entries)), dtype=torch.float32)
    values[3] = 1e-6
    columns = (torch.tensor(column, dtype=torch.int32) for column in zip(*entries, strict=True))
    latents, contexts, positions = columns
    tokens = torch.arange(96).reshape(6, 16)
    firings = Firings(latents, values, contexts, positions)
    export_latents(firings, tokens, 23, tmp_path, hookpoint="h.3.mlp", model="m", text="t", splits=4)
    found: dict[tuple[int, int, int], float] = {}
    for path in (tmp_path / "h.3.mlp").glob("*.safetensors"):
        first, last = map(int, path.stem.split("_"))
        content = load_file(path)
        assert content["locations"].dtype == np.uint16
        assert content["activations"].dtype == np.float16
        assert np.array_equal(content["tokens"], tokens.numpy())
        for (context, position, latent), value in zip(
            content["locations"].tolist(), content["activations"].tolist(), strict=True
        ):
            assert first <= latent + first <= last
            found[latent + first, context, position] = value
    expected = {entry: value for entry, value in zip(entries, values.tolist(), strict=True) if value > 1e-5}
    assert found.keys() == expected.keys()
    assert all(found[entry] == pytest.approx(value, rel=1e-3) for entry, value in expected.items())


@pytest.mark.skipif(importlib.util.find_spec("delphi") is None, reason="delphi is not installed (EleutherAI/delphi)")
def test_delphis_own_buffer_reads_the_files(tmp_path: Path) -> None:
    from delphi.latents.loader import TensorBuffer  # pyright: ignore

    firings = firings_of({0: {3: 1.0}, 2: {5: 2.0}}, latent=7)
    tokens = torch.zeros(3, 16, dtype=torch.int64)
    files = export_latents(firings, tokens, 10, tmp_path, hookpoint="h.3.mlp", model="m", text="t", splits=2)
    latents, locations, activations = TensorBuffer(str(files[1]), "h.3.mlp").load_data_per_latent()  # pyright: ignore
    assert latents.tolist() == [7]  # pyright: ignore
    assert locations[0].tolist() == [[0, 3, 7], [2, 5, 7]]  # pyright: ignore
    assert activations[0].tolist() == [1.0, 2.0]  # pyright: ignore
