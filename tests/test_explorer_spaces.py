"""The explorer on a run whose model has SentencePiece's spaces."""

import json
import sqlite3
from contextlib import closing
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
from mxd.layers import SparseCode
from mxd.models import mlp_pairs
from mxd.steering import steer
from mxd.training.config import TrainConfig
from mxd.training.decompose import decompose, make_plan
from tests import tiny_model
from tests.exploring import library_of, served

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
