import json
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from mxd.edits import Add, Edit
from mxd.evaluation.opening import read_finished_run
from mxd.evaluation.students import load_students
from mxd.explorer import live
from mxd.explorer.live import shares
from mxd.explorer.pages import PAGE_FILES
from mxd.explorer.server import listen
from mxd.layers import LAYERS
from mxd.layers.request import LayerRequest
from mxd.models import load_language_model, mlp_pairs
from mxd.steering import steer
from tests.exploring import STUDENTS, Answer, Served, explored, served

STUDENT = STUDENTS[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return explored(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Served]:
    with served(run) as serving:
        yield serving


def test_every_page_and_answer_comes_with_a_policy_that_allows_nothing_from_elsewhere(server: Served) -> None:
    paths = ["/", *(f"/page/{name}" for name in PAGE_FILES), "/api/run", f"/api/map?student={STUDENT}"]
    paths += [f"/api/latent?student={STUDENT}&latent=0", f"/api/labels?student={STUDENT}"]
    paths += [f"/api/search?student={STUDENT}&query=a"]
    for path in paths:
        answer = server.ask("GET", path)
        assert answer.status == 200, path
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert b"//" not in answer.body.replace(b"http://www.w3.org/2000/svg", b"") or not path.endswith(".html")


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": ""},
        {"Host": "127.0.0.1"},
        {"Host": "127.0.0.1.evil.example:18321"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_forged_host_or_a_page_elsewhere_gets_nothing(server: Served, headers: dict[str, str]) -> None:
    for path in ("/", "/api/run", "/page/explorer.js"):
        answer = server.ask("GET", path, **headers)
        # uvicorn itself refuses a request without a host.
        refused = (400, b"Invalid HTTP request received.") if headers == {"Host": ""} else (403, b"")
        assert (answer.status, answer.body) == refused


def test_what_changes_or_computes_must_come_from_a_page_of_this_server(server: Served) -> None:
    body = {"student": STUDENT, "latent": 1, "label": "x", "note": ""}
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": ""},
        {"Origin": "null"},
        {"Content-Type": "text/plain"},
        {"Content-Type": ""},
        {"Host": "evil.example"},
    ):
        answer = server.ask("PUT", "/api/label", body, **headers)
        assert (answer.status, answer.body) == (403, b"")
        assert server.ask("POST", "/api/text", {"student": STUDENT, "text": "a"}, **headers).body == b""
    assert server.ask("GET", f"/api/labels?student={STUDENT}").json["labels"] == {}
    # A link to the page is no reach into it.
    visit = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}
    assert server.ask("GET", "/", **visit).status == 200
    assert server.ask("GET", "/api/run", **visit).status == 403


def test_a_forged_path_gets_nothing(server: Served) -> None:
    for path in (
        *("/page/../database.py", "/page/..%2fdatabase.py", "/page/%2e%2e/%2e%2e/atomic.py", "/explorer.sqlite"),
        *("/page/index.html.jinja", "/etc/passwd", "//etc/passwd", "/page/", "/docs", "/openapi.json", "/api"),
    ):
        answer = server.ask("GET", path)
        assert (answer.status, answer.body) == (404, b""), path
    assert server.ask("DELETE", "/api/label", {}).body == b""


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("GET", "/api/latent?student=9/none&latent=0", None, 404, "no student 9/none"),
        ("GET", f"/api/latent?student={STUDENT}&latent=100000", None, 404, "no latent 100000"),
        ("GET", f"/api/latent?student={STUDENT}&latent=x", None, 422, "latent does not fit"),
        ("GET", f"/api/latent?student={STUDENT}&latent=99999999999999999999", None, 422, "latent does not fit"),
        ("PUT", "/api/label", {"student": STUDENT, "latent": 10**6, "label": "", "note": ""}, 404, "no latent"),
        ("PUT", "/api/label", {"student": STUDENT, "latent": 1, "label": "a" * 201, "note": ""}, 422, "label does not"),
        ("PUT", "/api/label", {"student": STUDENT, "latent": 10**30, "label": "", "note": ""}, 422, "latent does not"),
        ("PUT", "/api/label", {"student": STUDENT, "latent": 1, "label": "\ud800", "note": ""}, 422, "label does not"),
        ("POST", "/api/text", {"student": STUDENT, "text": ""}, 400, "at least one token"),
        ("POST", "/api/text", {"student": STUDENT, "text": "a " * 99}, 400, "context of 64 tokens; it has 199"),
        ("POST", "/api/text", {"student": "0/none", "text": "a"}, 400, "no student 0/none"),
        ("POST", "/api/text", "{", 422, "does not fit"),
        ("POST", "/api/steer", {"student": STUDENT, "prompt": "a " * 20, "edits": []}, 400, "and 48 to be written"),
        ("POST", "/api/steer", {"student": STUDENT, "prompt": "a", "edits": [{}]}, 400, "An edit must be an object"),
        (
            *("POST", "/api/steer"),
            {
                "student": STUDENT,
                "prompt": "a",
                "new_tokens": 2,
                "edits": [Edit(latents=(9999,), operation=Add(amount=1.0)).to_json()],
            },
            *(400, "must lie in"),
        ),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(
    server: Served, method: str, path: str, body: object, status: int, words: str
) -> None:
    answer = server.ask(method, path, body)
    assert answer.status == status
    assert words in answer.json["error"]
    assert "\n" not in answer.json["error"]


@pytest.mark.parametrize("kind", ["mxd", "skip-transcoder", "topk-sae", "low-rank"])
def test_shares_of_base_and_experts_sum_to_one_and_are_what_each_adds(kind: str) -> None:
    request = LayerRequest(d_in=6, d_out=6, d_hidden=8, num_latents=20, k=4, activation="gelu", rank=2)
    layer = cast("Any", LAYERS[kind].layer)(LAYERS[kind].configure(request)).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    x = torch.randn(70, 6, dtype=torch.float64)
    with torch.no_grad():
        parts, bases = shares(layer, x)
        y = layer(x).prediction
    for row, base, out, one in zip(parts, bases, y, x, strict=True):
        assert base + sum(part.share for part in row) == pytest.approx(1)
        assert row == sorted(row, key=lambda part: -part.share)
        for part in row:
            added = part.value * layer.atoms(one[None], torch.tensor([[part.latent]]))[0, 0]
            assert part.share == pytest.approx((added @ out / (out @ out)).item())


@pytest.mark.parametrize("numbers", [1, 20, 40, 150, 2**23])
def test_few_atoms_are_in_memory_however_wide_the_code_is(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    request = LayerRequest(d_in=6, d_out=6, d_hidden=8, num_latents=20, k=4, activation="gelu", rank=2)
    layer = cast("Any", LAYERS["skip-transcoder"].layer)(LAYERS["skip-transcoder"].configure(request)).double().eval()
    x = torch.randn(70, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = shares(layer, x)
    asked: list[int] = []
    atoms = layer.atoms

    def counted(rows: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        asked.append(indices.numel())
        return atoms(rows, indices)

    monkeypatch.setattr(live, "_NUMBERS_AT_ONCE", numbers)
    monkeypatch.setattr(layer, "atoms", counted)
    parts, bases = shares(layer, x)
    assert max(asked) <= max(numbers // 6, 1)
    assert sum(asked) == 70 * 4
    assert bases == pytest.approx(expected[1])
    for row, other in zip(parts, expected[0], strict=True):
        assert [part.latent for part in row] == [part.latent for part in other]
        assert [part.share for part in row] == pytest.approx([part.share for part in other])
    monkeypatch.setattr(live, "MOST_PARTS", sum(map(len, parts)) - 1)
    with pytest.raises(ValueError, match="Shorten the text"):
        shares(layer, x)


def test_a_model_without_a_limit_of_its_own_has_the_pages(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MOST_TOKENS", 10)
    model = live.LiveModel(run, STUDENTS)
    with pytest.raises(ValueError, match=r"must fit in 10 tokens; it has 13\."):
        model.attribute(STUDENT, "the cat sees")
    assert len(cast("Any", model.attribute(STUDENT, "the cat")["tokens"])) == 8


@pytest.mark.parametrize("error", [TypeError("a beam\nsearch"), KeyError(), AssertionError()])
def test_a_continuation_that_breaks_off_says_so(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(live, "_generate", broken)
    request = live.SteeringRequest(STUDENT, "the cat", (), "replaced", 4, 0.0, 0)
    pieces = list(live.LiveModel(run, STUDENTS).continuations(request, threading.Event()))
    assert pieces[0] == {"side": "beside", "begins": True}
    [said] = [piece["error"] for piece in pieces if "error" in piece]
    assert said == ("a beam search" if error.args else f"The writing broke off ({type(error).__name__}).")
    assert not any("ends" in piece for piece in pieces)
    assert caplog.records[-1].exc_info


def test_the_experts_of_a_text_are_those_of_the_model(run: Path, server: Served) -> None:
    answer = server.ask("POST", "/api/text", {"student": STUDENT, "text": "the cat sees"}).json
    tokens = answer["tokens"]
    assert "".join(token["text"] for token in tokens[1:]) == "the cat sees"
    assert [token["special"] for token in tokens] == [True] + [False] * 12
    description = read_finished_run(run)
    loaded = load_language_model(description["config"]["model"])
    (student,) = load_students(run, description["students"], [STUDENT])
    ids = torch.tensor([[256, *loaded.tokenizer.encode("the cat sees")]])
    x = mlp_pairs(loaded.model, ids, [0])[0].x[0]  # pyright: ignore[reportArgumentType]
    code = student.candidate.network.encode(x)
    for token, values, indices in zip(tokens, code.values.tolist(), code.indices.tolist(), strict=True):
        expected = {index: value for index, value in zip(indices, values, strict=True) if value > 0}
        assert {latent: value for latent, value, _ in token["experts"]} == pytest.approx(expected, abs=1e-3)
        assert token["base"] + sum(share for *_, share in token["experts"]) == pytest.approx(1, abs=1e-2)


def written(answer: Answer) -> dict[str, str]:
    pieces: list[dict[str, Any]] = [json.loads(line) for line in answer.body.splitlines()]
    assert [piece["side"] for piece in pieces if "begins" in piece] == ["beside", "steered"]
    assert [piece["side"] for piece in pieces if "ends" in piece] == ["beside", "steered"]
    return {side: "".join(p.get("text", "") for p in pieces if p["side"] == side) for side in ("beside", "steered")}


def test_the_bench_writes_what_generate_writes_with_and_without_the_edits(run: Path, server: Served) -> None:
    edit = Edit(latents=(3, 5), operation=Add(amount=40.0))
    request: dict[str, object] = {"student": STUDENT, "prompt": "the cat", "edits": [edit.to_json()], "new_tokens": 9}
    answer = server.ask("POST", "/api/steer", request)
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    both = written(answer)
    description = read_finished_run(run)
    loaded = load_language_model(description["config"]["model"])
    (student,) = load_students(run, description["students"], [STUDENT])
    ids = torch.tensor([[256, *loaded.tokenizer.encode("the cat")]])
    model: Any = loaded.model

    def continued() -> str:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, pad_token_id=257
        )
        return str(loaded.tokenizer.decode(out[0, ids.shape[1] :]))

    assert both["beside"] == continued()
    with steer(model, {0: student.candidate.network}, {0: [edit]}):
        assert both["steered"] == continued()
    assert both["beside"] != both["steered"]
    unsteered = written(server.ask("POST", "/api/steer", request | {"edits": [], "beside": "replaced"}))
    assert unsteered["beside"] == unsteered["steered"]
    sampled = request | {"edits": [], "beside": "replaced", "temperature": 1.5, "seed": 3}
    first = written(server.ask("POST", "/api/steer", sampled))
    assert first["beside"] == first["steered"]
    assert written(server.ask("POST", "/api/steer", sampled)) == first
    assert written(server.ask("POST", "/api/steer", sampled | {"seed": 4})) != first


def test_labels_are_kept_in_the_database(run: Path, server: Served) -> None:
    label = {"student": STUDENT, "latent": 2, "label": " rivers ", "note": "<script>"}
    assert server.ask("PUT", "/api/label", label).status == 200
    assert server.ask("GET", f"/api/labels?student={STUDENT}").json["labels"] == {
        "2": {"label": "rivers", "note": "<script>"}
    }
    with closing(sqlite3.connect(run / "explorer.sqlite")) as connection:
        assert connection.execute("SELECT label FROM labels").fetchall() == [("rivers",)]
    assert server.ask("PUT", "/api/label", label | {"label": " ", "note": ""}).status == 200
    assert server.ask("GET", f"/api/labels?student={STUDENT}").json["labels"] == {}


def test_a_port_in_use_is_passed_over(server: Served) -> None:
    with closing(listen(server.port)) as other:
        assert server.port < other.getsockname()[1] < server.port + 20
        assert other.getsockname()[0] == "127.0.0.1"


def test_the_command_says_which_port_it_takes_and_ends_with_ctrl_c(run: Path) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        process = subprocess.Popen(
            [sys.executable, "-m", "mxd", "explore", str(run), "--port", str(port)], stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        with process.stderr:
            assert process.stderr.readline().startswith(f"Port {port} is in use; taking ")
            url = process.stderr.readline().split()[1]
            with urllib.request.urlopen(url) as answer:
                assert b"mxd explorer" in answer.read()
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0
            assert process.stderr.read().strip() == "Stopped."
