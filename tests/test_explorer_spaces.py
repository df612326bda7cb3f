"""The explorer on a run whose model has SentencePiece's spaces."""

import json
import sqlite3
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console

from mxd.evaluation.collect import LatentStatistics
from mxd.evaluation.experts import expert_pages
from mxd.evaluation.opening import open_run, read_finished_run
from mxd.evaluation.students import load_students
from mxd.explorer.collect import CollectConfig, collect
from mxd.explorer.live import LiveModel, SteeringRequest
from mxd.layers import SparseCode
from mxd.models import mlp_pairs
from mxd.steering import steer
from mxd.training.config import TrainConfig
from mxd.training.decompose import decompose, make_plan
from tests import tiny_model
from tests.exploring import library_of, served
from tests.tiny_run import change_json, copied

STUDENT = "0/mxd-k4"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spaced")
    model = tiny_model.write_model(folder / "model")
    tiny_model.spaced_tokenizer().save_pretrained(model)
    text = tiny_model.write_text(folder / "text.jsonl", documents=100, words=12)
    config = TrainConfig(
        model=str(model),
        text=(str(text),),
        layer=(0,),
        kind=("mxd",),
        k=(4,),
        num_latents=(32,),
        tokens=1024,
        batch_tokens=256,
        context=16,
        buffer_tokens=512,
        eval_tokens=96,
        device="cpu",
        precision="float32",
        threads=1,
    )
    decompose(make_plan(config), folder / "run")
    collect(folder / "run", folder / "run" / "explorer.sqlite", CollectConfig(), Console(quiet=True))
    return folder / "run"


def test_tokens_and_contexts_of_the_database_have_their_spaces(run: Path) -> None:
    with closing(sqlite3.connect(run / "explorer.sqlite")) as connection:
        tokens = [row[0] for row in connection.execute("SELECT text FROM tokens ORDER BY id")]
        contexts = [row[0] for row in connection.execute("SELECT text FROM contexts")]
    assert {"the", " the", " cat", tiny_model.BOS} <= set(tokens)
    words = set(" ".join(text.replace(tiny_model.BOS, " ").replace(".", " ") for text in contexts).split())
    assert words <= set(tiny_model.WORDS)
    pair = next(text for text in contexts if " the " in text)
    query = pair[pair.index(" the ") + 1 :][:7]
    found = cast("list[dict[str, Any]]", library_of(run).search(STUDENT, query))
    assert {entry["why"] for entry in found} == {"context"}
    listed = cast("list[dict[str, Any]]", library_of(run).latent(STUDENT, found[0]["latent"])["examples"])
    assert all("".join(example["tokens"]) in "".join(contexts) for example in listed)


def test_a_character_of_several_tokens_is_whole_where_a_context_shows_it(run: Path, tmp_path: Path) -> None:
    text, database = tmp_path / "party.txt", tmp_path / "party.sqlite"
    text.write_text("the 🎉 cat sees 🎉🎉 in é\n\n" * 12, encoding="utf-8")
    collect(run, database, CollectConfig(text=(str(text),), tokens=112), Console(quiet=True))
    library = replace(library_of(run), database=database)
    with closing(sqlite3.connect(database)) as connection:
        contexts = dict(connection.execute("SELECT number, text FROM contexts").fetchall())
        latents = [row[0] for row in connection.execute("SELECT latent FROM latents WHERE firings > 0")]
    assert any("🎉 cat" in context for context in contexts.values())
    # A context may begin and end within a character.
    assert all("\ufffd" not in text.removeprefix(tiny_model.BOS).strip("\ufffd") for text in contexts.values())
    shown = 0
    for latent in latents:
        for example in cast("list[dict[str, Any]]", library.latent(STUDENT, latent)["examples"]):
            tokens = example["tokens"]
            assert "".join(tokens) in contexts[example["context"]]
            # Nothing, nothing, nothing, and all of it; none is cut in two by the end of what is shown.
            assert not example["after"] or tokens[-1]
            for place in [place for place, piece in enumerate(tokens) if piece == "🎉" and place >= 3]:
                assert tokens[place - 3 : place] == ["", "", ""]
                shown += 1
    assert shown > 10
    found = cast("list[dict[str, Any]]", library.search(STUDENT, "🎉 cat"))
    assert {entry["why"] for entry in found} == {"context"}
    assert all(any(entry["what"] in context for context in contexts.values()) for entry in found)


def test_typed_text_and_the_first_piece_written_keep_their_spaces(run: Path) -> None:
    with served(run, (STUDENT,)) as server:
        typed = server.ask("POST", "/api/text", {"student": STUDENT, "text": "the red cat"}).json
        request = {"student": STUDENT, "prompt": "the red cat", "edits": [], "beside": "replaced", "new_tokens": 6}
        answer = server.ask("POST", "/api/steer", request)
    assert [token["text"] for token in typed["tokens"]] == [tiny_model.BOS, " the", " red", " cat"]
    pieces = [json.loads(line) for line in answer.body.splitlines()]
    text = "".join(piece.get("text", "") for piece in pieces if piece["side"] == "beside")
    opened = open_run(run, read_finished_run(run), (), None, None)
    tokenizer, model = opened.language_model.tokenizer, cast("Any", opened.language_model.model)
    assert tokenizer is not None
    (student,) = load_students(run, read_finished_run(run)["students"], [STUDENT])
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode("the red cat", add_special_tokens=False)]])
    with steer(model, {0: student.candidate.network}, {0: []}):
        out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    whole, prompt = (str(tokenizer.decode(tokens)) for tokens in (out[0], ids[0]))
    assert prompt + text == whole
    assert pieces


def test_what_is_written_is_apart_from_a_prompt_whose_tokens_end_words(run: Path, tmp_path: Path) -> None:
    copied(run, tmp_path / "run")
    model = copied(run.parent / "model", tmp_path / "model")
    tokenizer = tiny_model.suffixed_tokenizer()
    tokenizer.save_pretrained(model)
    change_json(tmp_path / "run" / "run.json", lambda value: cast("Any", value["config"]).update(model=str(model)))
    live = LiveModel(tmp_path / "run", [STUDENT])
    tokens = cast("list[dict[str, Any]]", live.attribute(STUDENT, "the cats")["tokens"])
    assert [token["text"] for token in tokens] == [tiny_model.BOS, "the ", "ca", "t", "s "]
    written: list[str] = []
    for prompt in ("the cat", "the cat "):
        request = SteeringRequest(STUDENT, prompt, (), "replaced", 4, 0.0, 0)
        pieces = list(live.continuations(request, threading.Event()))
        sides = ["".join(str(p.get("text", "")) for p in pieces if p["side"] == side) for side in ("beside", "steered")]
        assert sides[0] == sides[1]
        written.append(prompt + sides[0])
    assert written[0] == written[1]
    assert len(written[0]) > len("the cat ")


@torch.no_grad()
def test_the_pages_of_single_experts_have_their_spaces(run: Path) -> None:
    description = read_finished_run(run)
    opened = open_run(run, description, (), None, None)
    (student,) = load_students(run, description["students"], [STUDENT])
    contexts, network = opened.text.contexts, student.candidate.network
    model, tokenizer = cast("Any", opened.language_model.model), opened.language_model.tokenizer
    assert tokenizer is not None
    code = network.encode(mlp_pairs(model, contexts, [0])[0].x.flatten(0, 1).float())
    statistics = LatentStatistics(network.config.num_latents, contexts_kept=1)
    places = torch.arange(contexts.numel())
    statistics.update(SparseCode(*code), places // contexts.shape[1], places % contexts.shape[1])
    pages = expert_pages(model, student.candidate, statistics, contexts, tokenizer, count=2)
    texts = ["".join(example.tokens) for page in pages for example in page.examples]
    assert texts
    words = {word for text in texts for word in text.replace(tiny_model.BOS, " ").replace(".", " ").split()}
    assert words <= set(tiny_model.WORDS)
    assert all(len(example.tokens) == contexts.shape[1] for page in pages for example in page.examples)
