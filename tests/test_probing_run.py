import json
import tracemalloc
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from mxd.evaluation.faithfulness import Candidate
from mxd.evaluation.students import load_students
from mxd.layers import Transcoder, TranscoderConfig
from mxd.models import LanguageModel, block_activations, find_mlp, hidden_units, load_language_model, mlp_weights
from mxd.probing import text_probes, token_codes
from mxd.probing.collecting import Probed
from mxd.probing.examples import Example, Span, TextSet, Unlabelled, labelled_by
from mxd.probing.features import collect_text_features
from mxd.probing.token_codes import collect_tokens
from mxd.probing.token_probes import probe_tokens
from mxd.runs.run import read_configuration
from tests import tiny_model
from tests.tiny_run import Command, TinyRun, assert_refused, change_json, copied

WORDS = tiny_model.WORDS


@pytest.fixture(scope="module")
def language_model(tiny: TinyRun) -> LanguageModel:
    return load_language_model(str(tiny.model), dtype=torch.float32)


@pytest.fixture(scope="module")
def probed(tiny: TinyRun, language_model: LanguageModel) -> Probed:
    students = load_students(tiny.run, cast("Any", read_configuration(tiny.run)["students"]))
    candidates = [student.candidate for student in students]
    return Probed(cast("nn.Module", language_model.model), language_model.tokenizer, candidates, 32)


def sentences(count: int, words: list[str], seed: int = 0, length: int = 8) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(words, length)) for _ in range(count)]


def cats(text: str) -> list[Span]:
    return [Span(place, place + 3, "cat") for place in range(len(text)) if text.startswith("cat", place)] + [
        Span(0, 1, "rare") for _ in range(text.startswith("bird red"))
    ]


def naive_f1(positive: np.ndarray, said: np.ndarray) -> float:
    return float(2 * (positive & said).sum() / max(positive.sum() + said.sum(), 1))


@torch.no_grad()
def naive_codes(probed: Probed, ids: list[int]) -> dict[str, torch.Tensor]:
    """Return each student's dense code at the tokens of one context."""
    context = torch.tensor([[cast("int", probed.bos), *ids]])
    seen = block_activations(probed.model, context, probed.layers)
    return {
        student.name: student.network.encode(
            (seen[student.layer].target if student.network.reads == "output" else seen[student.layer].x)[0, 1:]
        ).dense(student.network.config.num_latents)
        for student in probed.students
    }


def test_the_residual_stream_and_the_hidden_layer_are_the_models_own(language_model: LanguageModel) -> None:
    model = cast("Any", language_model.model)
    ids = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    seen = block_activations(model, ids, [0, 1])
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        heard: list[torch.Tensor] = []

        def hear(module: nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            heard.append(given[0])

        hook = model.model.layers[0].mlp.down_proj.register_forward_hook(hear)
        model(ids)
        hook.remove()
    assert torch.equal(seen[0].residual, states[1])
    site = find_mlp(model, 0)
    torch.testing.assert_close(hidden_units(mlp_weights(site), seen[0].x, site.activation), heard[0])
    # The pass stops early and leaves nothing behind.
    assert list(block_activations(model, ids, [0])) == [0]
    assert not any("_record" in repr(hook) for hook in model.model.layers[0]._forward_hooks.values())


@pytest.mark.parametrize("keep", ["first", "last"])
def test_mean_codes_are_those_of_each_text_by_itself(probed: Probed, keep: Any) -> None:
    texts = [*sentences(12, WORDS), *sentences(3, WORDS, seed=1, length=30), "a b", "cat"]
    examples = [Example(text, "ab"[place % 2]) for place, text in enumerate(texts)]
    found = collect_text_features(probed, TextSet(name="made", examples=examples, keep=keep))
    assert found.too_short == 2
    assert found.labels == [example.label for example in examples[:-2]]
    assert {features.name.partition("/")[2] for features in found.features if not features.is_code} == {
        "dense hidden",
        "residual stream",
    }
    for row, text in enumerate(texts[:-2]):
        ids = cast("list[int]", probed.tokenizer(text, add_special_tokens=False).input_ids)
        ids = ids[:31] if keep == "first" else ids[-31:]
        expected = naive_codes(probed, ids)
        for features in found.features:
            if features.is_code:
                got = features.columns(range(features.width))[row]
                assert got == pytest.approx(expected[features.name].mean(0).numpy(), abs=1e-5)
    residual = next(features for features in found.features if features.name == "0/residual stream")
    context = torch.tensor([[cast("int", probed.bos), *probed.tokenizer(texts[0]).input_ids[:31]]])
    expected = block_activations(probed.model, context, [0])[0].residual[0, 1:].mean(0)
    if keep == "first":
        assert np.asarray(residual.values)[0] == pytest.approx(expected.numpy(), abs=1e-5)


def test_codes_of_a_span_are_averaged_over_its_tokens_in_the_context_that_ends_with_it(probed: Probed) -> None:
    text = "one two " * 6 + "Ann Lee"
    examples = [Example(text + " and more", "x", (len(text) - 3, len(text))), Example("a Lee", "y", (2, 5))]
    found = collect_text_features(probed, TextSet(name="names", examples=examples))
    ids = cast("list[int]", probed.tokenizer(text, add_special_tokens=False).input_ids)[-31:]
    expected = naive_codes(probed, ids)
    for features in found.features:
        if features.is_code:
            got = features.columns(range(features.width))[0]
            assert got == pytest.approx(expected[features.name][-3:].mean(0).numpy(), abs=1e-5)


def test_codes_of_tokens_are_those_of_their_own_context(probed: Probed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_codes, "DENSE_ELEMENTS", 16 * 100)
    texts = sentences(14, ["cat", "cat", *WORDS[:8]], seed=3, length=12)
    found = collect_tokens(probed, labelled_by("made", texts, cats), 400)
    assert len(found.labels) == 400
    assert found.concepts == ["cat"]
    together = np.concatenate(found.parts)
    assert sorted(together.tolist()) == list(range(400))
    assert not any(
        set(found.documents[one].tolist()) & set(found.documents[other].tolist())
        for place, one in enumerate(found.parts)
        for other in found.parts[place + 1 :]
    )
    ids = found.codes[-1].values.indices
    first = np.flatnonzero(found.documents == 2)
    for begin in range(0, len(first), 31):
        places = first[begin : begin + 31]
        expected = naive_codes(probed, ids[places].tolist())
        for codes in found.codes[:-1]:
            assert codes.values[places].toarray() == pytest.approx(expected[codes.name].numpy(), abs=1e-5)
    residual = next(dense for dense in found.dense if dense.name == "0/residual stream")
    assert residual.tokens.tolist() == list(range(0, 400, 4))
    text = "".join(str(probed.tokenizer.decode([int(token)])) for token in ids[found.documents == 2])
    assert any(text == other[: len(text)] for other in texts)
    assert found.labels[found.documents == 2, 0].sum() == 3 * text.count("cat") + max(
        (len(text) - text.rfind(part) for part in ("ca", "c") if text.endswith(part)), default=0
    )


def test_documents_that_cannot_be_labelled_are_counted_and_some_are_kept_for_the_test(probed: Probed) -> None:
    def fails(text: str) -> list[Span]:
        if text.startswith("a "):
            raise Unlabelled("no")
        return cats(text)

    texts = [*sentences(10, ["cat", "dog"]), "a cat", "a dog", "a cat", *sentences(4, ["cat", "tree"], seed=1)]
    found = collect_tokens(probed, labelled_by("made", texts, fails, for_test=range(13, 17)), 100_000)
    assert (found.unlabelled, found.duplicates) == (2, 1)
    text = "".join(
        str(probed.tokenizer.decode([int(token)])) for token in found.codes[-1].values.indices[found.parts.test]
    )
    assert "tree" in text
    assert "dog" not in text
    with pytest.raises(ValueError, match="must be three or more"):
        collect_tokens(probed, labelled_by("made", ["a b", "a c", "x y", "y"], fails), 1000)


def test_a_latent_is_named_on_training_and_validation_and_judged_on_the_test_part(probed: Probed) -> None:
    data = labelled_by("made", sentences(60, WORDS, seed=5, length=20), cats)
    found = probe_tokens(probed, data, 3000)
    tokens = collect_tokens(probed, data, 3000)
    assert [skip.label for skip in found.result.skipped] in ([], ["rare"])
    for codes in tokens.codes[:2]:
        values = codes.values.toarray()
        train, validation, test = tokens.parts
        labels = tokens.labels[:, tokens.concepts.index("cat")]
        best: tuple[float, int, float] = (-1, 0, 0)
        for latent in range(values.shape[1]):
            column = values[:, latent]
            cuts = np.unique(column[train][column[train] > 0])[::-1]
            if (column[train] > 0).sum() < 10:
                continue
            cut = cuts[np.argmax([naive_f1(labels[train], column[train] >= cut) for cut in cuts])]
            worth = naive_f1(labels[validation], column[validation] >= cut)
            best = max(best, (worth, -latent, float(cut)))
        row = next(row for row in found.result.rows if (row.features, row.k) == (codes.name, 1))
        worth, latent, cut = best[0], -best[1], best[2]
        assert list(row.latents) == [latent]
        assert row.quality.f1 == pytest.approx(naive_f1(labels[test], values[test, latent] >= cut))
        named = {named.latent: named for named in found.named[codes.name]}
        share = labels[validation].mean()
        skill = (worth - 2 * share / (1 + share)) / (1 - 2 * share / (1 + share))
        assert (latent in named) == (skill >= 0.05)
        if latent in named:
            assert named[latent].f1_validation == pytest.approx(worth, abs=1e-5)
            assert named[latent].skill_validation == pytest.approx(skill, abs=1e-5)
    names = {row.features for row in found.result.rows}
    assert {"token identity", "chance", "1/dense hidden", "0/residual stream"} <= names


def test_memory_stays_bounded_at_a_hundred_thousand_latents(probed: Probed) -> None:
    config = TranscoderConfig(d_in=tiny_model.D_MODEL, d_out=tiny_model.D_MODEL, num_latents=100_000, k=4)
    torch.manual_seed(0)
    wide = Candidate(name="0/transcoder-k4", layer=0, network=Transcoder(config).eval())
    with torch.no_grad():
        wide.network.get_parameter("W_enc").normal_()
    many = Probed(probed.model, probed.tokenizer, [wide], 32)
    texts = sentences(150, WORDS, seed=7)
    tracemalloc.start()
    try:
        examples = [Example(text, "ab"[place % 2]) for place, text in enumerate(texts)]
        collected = collect_text_features(many, TextSet(name="made", examples=examples))
        result = probe_tokens(many, labelled_by("made", texts, cats), 3000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(collected.labels) == 150
    assert result.result.total == 3000
    # Dense codes of the texts alone would take 60 MB, those of the tokens 1.2 GB.
    assert peak < 40e6


def write_data(folder: Path) -> list[Path]:
    texts = folder / "words" / "data.jsonl"
    texts.parent.mkdir()
    rows = [
        {"text": text, "label": label}
        for label, words in (("pets", ["cat", "dog", "a"]), ("woods", ["tree", "river", "a"]), ("few", ["red", "one"]))
        for text in sentences(60 if label != "few" else 4, words)
    ]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    spans = folder / "spans.jsonl"
    lines = [{"text": text, "spans": [list(span) for span in cats(text)]} for text in sentences(40, WORDS, 5, 20)]
    lines[0] |= {"spans": [[0, 1, "one-off <b>"]]}
    spans.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return [texts, spans]


def test_the_command_writes_results_pictures_and_tables(
    tiny: TinyRun, tmp_path: Path, mxd: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_probes, "CANDIDATES", 8)
    run = copied(tiny.run, tmp_path / "run")
    ended = mxd("probe", run, "--tokens", 9000, "--data", *write_data(tmp_path))
    assert ended.status == 0, ended.err
    assert {"probing.json", "probing-texts.png", "probing-spans.png"} <= {path.name for path in run.iterdir()}
    written = json.loads((run / "probing.json").read_text())
    assert list(written) == ["version", "identity", "facts", "sample_level", "token_level"]
    names = {f"{layer}/{kind}-k4" for layer in (0, 1) for kind in ("mxd", "transcoder", "skip-transcoder", "topk-sae")}
    assert set(written["identity"]["weights_sha256"]) == set(written["token_level"]["students"]) == names
    assert written["identity"]["edits"] is None
    [texts] = written["sample_level"]
    assert texts["data"] == "words"
    assert [skip["label"] for skip in texts["skipped"]] == ["few"]
    single = [row for row in texts["rows"] if row["k"] == 1]
    assert {(row["concept"], row["features"]) for row in single} >= {
        (label, name) for label in ("pets", "woods") for name in names
    }
    # Where nothing is told wrong, no resample differs, and there is no interval.
    assert all((row["f1_interval"] is None) == (row["f1"] == 1) for row in single)
    assert all(row["f1_interval"][0] <= row["f1"] <= row["f1_interval"][1] for row in single if row["f1"] < 1)
    # Words tell these classes apart, and the model's own units see words.
    best = max(row["f1"] for row in texts["rows"] if row["features"] == "0/dense hidden")
    assert best > 0.9
    [tokens] = written["token_level"]["sets"]
    assert list(tokens["examples"]) == ["cat"]
    assert [skip["label"] for skip in tokens["skipped"]] == ["one-off <b>"]
    for name, student in written["token_level"]["students"].items():
        for latent in student["latents"]:
            assert latent["concept"] == "cat"
            assert 0 <= latent["f1"] <= 1
            assert name in names
    assert "words: mean F1 of 2 classes" in ended.out
    assert "few (4)" in ended.err
    assert "one-off <b>" in ended.err

    before = (run / "probing.json").read_bytes()
    again = mxd("probe", run, "--tokens", 2000, "--data", tmp_path / "spans.jsonl", "--student", "0/mxd-k4", "--json")
    assert set(json.loads(again.out)["token_level"]["students"]) == {"0/mxd-k4"}
    assert (run / "probing.json").read_bytes() == before


def test_what_cannot_be_probed_is_refused_before_anything_is_written(
    tiny: TinyRun, tmp_path: Path, mxd: Command
) -> None:
    [texts, spans] = write_data(tmp_path)
    assert_refused(mxd("probe", tmp_path / "none", "--data", texts), "probe", "must be the folder of a run")
    assert_refused(mxd("probe", tiny.run), "probe", "must be told what to probe with", "ag-news")
    assert_refused(mxd("probe", tiny.run, "--data", "nonsense"), "probe", "must be a file or one of")
    assert_refused(mxd("probe", tiny.run, "--data", texts, "--student", "sae"), "probe", "has no student sae")
    spans.write_text(json.dumps({"text": "abc", "spans": [[2, 9, "x"]]}) + "\n")
    assert_refused(mxd("probe", tiny.run, "--data", spans), "probe", "A span must fit its text", "spans.jsonl, line 1")
    bare = copied(tiny.run, tmp_path / "bare")
    change_json(bare / "run.json", lambda value: value.update(students=[]))
    assert_refused(mxd("probe", bare, "--data", texts), "probe", "students missing")
    (copied(tiny.run, tmp_path / "unfinished") / "finished.json").unlink()
    assert_refused(mxd("probe", tmp_path / "unfinished", "--data", texts), "probe", "must be a finished run")
    assert not list(tmp_path.rglob("probing*"))


@pytest.mark.parametrize("family", ["gpt_neox", "opt", "gpt2"])
def test_the_residual_stream_is_found_in_other_families(family: str) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    if family == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2}
    if family == "opt":
        sizes |= {"ffn_dim": 24, "word_embed_proj_dim": 16}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(family, vocab_size=20, **sizes, **ids)).eval()
    tokens = torch.tensor([[2, 3, 4, 5]])
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
    seen = block_activations(model, tokens, [0, 1])
    for layer in (0, 1):
        torch.testing.assert_close(seen[layer].residual, states[layer + 1])
