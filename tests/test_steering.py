"""What `mxd steer` measures, against restatements, and its files on a tiny run."""

import json
import math
import shutil
import threading
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from mxd.checkpoint import load_layer
from mxd.edits import Ablate, Add, Edit, edits_of, with_edits
from mxd.evaluation.faithfulness import Candidate, EvaluationText
from mxd.evaluation.firings import Firings, collect_firings
from mxd.explorer.live import LiveModel, SteeringRequest
from mxd.models import load_language_model, mlp_pairs, replace_mlp
from mxd.steering.edit_run import find_layer
from mxd.steering.ellipse import Panel, covariance_ellipse, draw_ellipses
from mxd.steering.experiment import Experiment, Intervention, SteeredRow
from mxd.steering.sampling import FrequencyPenalty, Sampling, prompt_tokens, sample_texts
from mxd.steering.scores import likeness, moved, read_texts, reference_logits
from mxd.steering.side_effects import side_effects
from mxd.steering.steer import steer
from tests.judge_server import Reply, judge_server
from tests.test_generation import mxd
from tests.test_models import build
from tests.tiny_model import BOS
from tests.tiny_run import TinyRun, assert_refused, change_json, command, copied, tiny_run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return tiny_run(tmp_path_factory.getbasetemp())


def test_the_frequency_penalty_is_what_openai_defines() -> None:
    ids = torch.tensor([[5, 5, 5, 1, 2, 1, 1], [5, 5, 5, 0, 3, 3, 4]])
    scores = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    expected = scores.clone()
    for row in range(2):
        for token in range(7):
            expected[row, token] -= 0.5 * ids[row, 3:].tolist().count(token)
    torch.testing.assert_close(FrequencyPenalty(0.5, prompt_length=3)(cast("Any", ids), scores), expected)
    assert torch.equal(FrequencyPenalty(0.5, prompt_length=7)(cast("Any", ids), scores), scores)


def test_the_penalty_acts_before_top_p() -> None:
    """After it, the one token that is left could not be avoided."""
    model, prompt = build("llama"), torch.arange(3, 8)[None]
    once = sample_texts(model, prompt, Sampling(samples=3, new_tokens=12, top_p=1e-6, frequency_penalty=1e6))
    for text in once.tolist():
        assert len(set(text)) == len(text)


def test_samples_are_those_of_their_seed_and_no_text_ends_early() -> None:
    model, prompt = build("llama"), torch.arange(3, 8)[None]
    # A model's own preferences, as Qwen's and others' generation_config.json has them, must not shape the samples.
    preferences = cast("Any", model).generation_config
    preferences.top_k, preferences.repetition_penalty = 1, 9.0
    sampling = Sampling(samples=4, new_tokens=30, top_p=1.0, temperature=2.0, frequency_penalty=0.0)
    state = torch.random.get_rng_state()
    one, again = sample_texts(model, prompt, sampling), sample_texts(model, prompt, sampling)
    assert torch.equal(one, again)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.shape == (4, 30)
    assert len({tuple(text) for text in one.tolist()}) == 4
    # With an untrained model the end-of-text token comes up, and the text goes on behind it.
    many = sample_texts(model, prompt, Sampling(samples=40, new_tokens=30, top_p=1.0, frequency_penalty=0.0))
    assert (many[:, :-1] == 1).any()
    assert not (many == 2).all(1).any()


PREFERENCES: dict[str, object] = {
    "temperature": 0.3,
    "top_k": 2,
    "top_p": 0.3,
    "min_p": 0.5,
    "typical_p": 0.3,
    "epsilon_cutoff": 0.02,
    "eta_cutoff": 0.02,
    "repetition_penalty": 9.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 30,
    "num_beams": 3,
    "bad_words_ids": [[5], [6]],
    "suppress_tokens": list(range(3, 60)),
    "begin_suppress_tokens": list(range(3, 60)),
    "forced_eos_token_id": 2,
    "sequence_bias": {(7,): 50.0},
    "exponential_decay_length_penalty": (1, 9.0),
    "guidance_scale": 3.0,
    "stop_strings": ["a"],
    "max_time": 0.0,
    "return_dict_in_generate": True,
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_what_a_models_own_generation_config_asks_for_does_not_shape_the_samples(name: str) -> None:
    model, prompt = build("llama"), torch.arange(3, 8)[None]
    sampling = Sampling(samples=4, new_tokens=12, top_p=1.0, frequency_penalty=0.0)
    expected = sample_texts(model, prompt, sampling)
    setattr(cast("Any", model).generation_config, name, PREFERENCES[name])
    assert torch.equal(sample_texts(model, prompt, sampling), expected)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_what_a_models_own_generation_config_asks_for_does_not_shape_what_the_explorer_writes(
    tiny: TinyRun, tmp_path: Path, temperature: float
) -> None:
    model = Path(shutil.copytree(tiny.model, tmp_path / "model"))
    run = copied(tiny.run, tmp_path / "run")
    request = SteeringRequest("1/mxd-k4", "cat", [], "original", 12, temperature, 3)

    def written() -> list[dict[str, Any]]:
        return list(LiveModel(run, ["1/mxd-k4"]).continuations(request, threading.Event()))

    expected = written()
    preferences = {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "suppress_tokens": list(range(90, 250))}
    GenerationConfig(**preferences, eos_token_id=257).save_pretrained(model)
    change_json(run / "run.json", lambda described: cast("Any", described["config"]).update(model=str(model)))
    assert written() == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 0.0}, "top-p"),
        ({"frequency_penalty": math.nan}, "frequency-penalty"),
    ],
)
def test_bad_sampling_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sampling(**settings)


def test_coherence_is_the_mean_over_pairs_within_less_that_across() -> None:
    generator = torch.Generator().manual_seed(0)
    states, others = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    centre = torch.randn(6, generator=generator, dtype=torch.float64)
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]

    def mean(one: Tensor, two: Tensor) -> float:
        cosines = [torch.cosine_similarity(one[i] - centre, two[j] - centre, dim=0) for i, j in pairs]
        return float(sum(cosines) / len(pairs))

    found = likeness(states, others, centre)
    assert found.within == pytest.approx(mean(states, states), rel=1e-12)
    assert found.across == pytest.approx(mean(states, others), rel=1e-12)
    assert likeness(states, states, centre).coherence == 0.0
    with pytest.raises(ValueError, match="at least two samples"):
        likeness(states[:1], others[:1], centre)


def test_texts_are_read_by_the_original_model_behind_their_prompt() -> None:
    model = build("gpt2").double()
    prompt, texts = torch.arange(3, 7)[None], torch.randint(3, 90, (3, 5), generator=torch.Generator().manual_seed(0))
    found = read_texts(model, prompt, texts)
    for row, text in enumerate(texts):
        output = model(torch.cat([prompt[0], text])[None], output_hidden_states=True)
        log_p = output.logits[0].log_softmax(-1)
        losses = [-log_p[3 + place, token] for place, token in enumerate(text.tolist())]
        assert float(found.losses[row]) == pytest.approx(float(sum(losses) / 5), rel=1e-6)
        torch.testing.assert_close(found.states[row], output.hidden_states[-1][0, 4:].mean(0), rtol=1e-9, atol=1e-9)


def test_the_distance_moved_is_the_mean_divergence_along_unsteered_texts() -> None:
    model, layer = build("llama").double(), mxd().double()
    prompt, texts = torch.arange(3, 7)[None], torch.randint(3, 90, (5, 6), generator=torch.Generator().manual_seed(0))
    edit = Edit(latents=(2,), operation=Add(amount=3.0))
    reference = reference_logits(model, lambda: replace_mlp(model, {1: layer}), prompt, texts)
    found = moved(model, lambda: steer(model, {1: layer}, {1: [edit]}), prompt, reference)
    whole = torch.cat([prompt.expand(5, -1), texts], 1)
    with replace_mlp(model, {1: layer}):
        p = model(whole).logits.log_softmax(-1)[:, 3:-1]
    with steer(model, {1: layer}, {1: [edit]}):
        q = model(whole).logits.log_softmax(-1)[:, 3:-1]
    assert found == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert moved(model, lambda: replace_mlp(model, {1: layer}), prompt, reference) == 0.0


def test_an_ellipse_is_one_standard_deviation_along_its_axes() -> None:
    generator = np.random.default_rng(0)
    turn = np.deg2rad(30)
    axes = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points = generator.standard_normal((200_000, 2)) * [3.0, 0.5] @ axes.T + [5.0, -2.0]
    found = covariance_ellipse(points)
    assert found.centre == pytest.approx((5.0, -2.0), abs=0.05)
    assert (found.width, found.height, found.degrees) == pytest.approx((6.0, 1.0, 30.0), rel=0.02)
    with pytest.raises(ValueError, match="two points"):
        covariance_ellipse(points[:1])


def test_a_picture_with_a_single_latent_and_many_panels_is_drawn(tmp_path: Path) -> None:
    panels = [Panel(str(n), "x", "y", {"3/mxd-k8": [(0.0, 1.0)], "3/other": [(math.nan, 1.0)]}) for n in range(5)]
    draw_ellipses(panels, tmp_path / "a.png", title="t", subtitle="s")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def experiment(tiny: TinyRun) -> Experiment:
    model = load_language_model(str(tiny.model), dtype=torch.float32)
    return Experiment(
        model,
        _student(tiny),
        _text(tiny),
        Sampling(samples=3, new_tokens=6, top_p=0.9),
        Intervention(unit="p99", strength=2.0, generated_only=True),
        range(20),
    )


def _student(tiny: TinyRun) -> Candidate:
    return Candidate(name="1/mxd-k4", layer=1, network=load_layer(tiny.run / "layers/1/mxd-k4"))


def _text(tiny: TinyRun) -> EvaluationText:
    tokens = torch.randint(0, 250, (6, 24), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 256
    return EvaluationText(contexts=tokens, documents=torch.zeros_like(tokens), special_ids=[256, 258])


def test_units_are_quantiles_of_a_latents_values_and_latents_that_never_fire_have_none(
    experiment: Experiment, tiny: TinyRun
) -> None:
    model, student, text = load_language_model(str(tiny.model), dtype=torch.float32), _student(tiny), _text(tiny)
    network, values = student.network, dict[int, list[float]]()
    for context in text.contexts:
        x = mlp_pairs(cast("nn.Module", model.model), context[None], [1])[1].x[0, 1:]
        code = network.encode(x)
        for latent, value in zip(code.indices.flatten().tolist(), code.values.flatten().tolist(), strict=True):
            if value > 0:
                values.setdefault(latent, []).append(value)
    silent = [latent for latent in range(20) if latent not in values]
    assert experiment.without_unit(range(20)) == silent
    latent = next(latent for latent in range(20) if latent in values)
    (row,) = experiment.rows([latent])
    assert row.unit == pytest.approx(float(np.quantile(values[latent], 0.99)), rel=1e-4)
    assert (
        row.edit
        == Edit.from_json(
            {
                "latents": [latent],
                "operation": {"name": "add", "amount": 2 * cast("float", row.unit)},
                "positions": {"start": len(BOS) // 5 + 17, "stop": None},
            }
        ).to_json()
    )
    assert SteeredRow.from_json(json.loads(json.dumps(row.to_json()))).texts == row.texts


def test_units_of_an_edited_layer_are_those_of_the_layer_as_it_was_trained(
    experiment: Experiment, tiny: TinyRun
) -> None:
    able = [latent for latent in range(20) if latent not in experiment.without_unit(range(20))][:2]
    student = _student(tiny)
    edits = [Edit(latents=tuple(able), operation=Ablate())]
    edited = Candidate(name=student.name, layer=1, network=with_edits(student.network, edits))
    model = load_language_model(str(tiny.model), dtype=torch.float32)
    sampling, done = Sampling(samples=3, new_tokens=6, top_p=0.9), Intervention(unit="p99", strength=2.0)
    again = Experiment(model, edited, _text(tiny), sampling, done, able)
    assert [row.unit for row in again.rows(able)] == [row.unit for row in experiment.rows(able)]


def test_an_intervention_that_changes_nothing_scores_nothing(tiny: TinyRun) -> None:
    model = load_language_model(str(tiny.model), dtype=torch.float32)
    nothing = Intervention(operation="scale", strength=1.0)
    sampling = Sampling(samples=3, new_tokens=6, top_p=0.9)
    one = Experiment(model, _student(tiny), _text(tiny), sampling, nothing, [0])
    (row,) = one.rows([0])
    assert (row.coherence, row.kl) == (0.0, 0.0)
    assert (row.texts, row.loss, row.within) == (tuple(one.unsteered.texts), one.unsteered.loss, one.unsteered.within)


def test_firings_are_sorted_and_their_quantiles_are_numpys() -> None:
    firings = Firings(
        torch.tensor([2, 2, 2, 5], dtype=torch.int32),
        torch.tensor([1.0, 4.0, 2.0, 3.0]),
        torch.zeros(4, dtype=torch.int32),
        torch.arange(4, dtype=torch.int32),
    )
    assert firings.of(2).values.tolist() == [1.0, 4.0, 2.0]
    assert firings.quantile(2, 0.9) == pytest.approx(np.quantile([1.0, 4.0, 2.0], 0.9))
    assert firings.quantile(3, 0.9) is None


def test_firings_of_all_latents_are_every_positive_value(tiny: TinyRun) -> None:
    model, student, text = load_language_model(str(tiny.model), dtype=torch.float32), _student(tiny), _text(tiny)
    every = collect_firings(cast("nn.Module", model.model), 1, student.network, text)
    some = collect_firings(cast("nn.Module", model.model), 1, student.network, text, [3, 4])
    assert [column.tolist() for column in every.of(3)] == [column.tolist() for column in some.of(3)]
    assert not len(some.of(5).values)
    keys = list(zip(every.latents.tolist(), every.contexts.tolist(), every.positions.tolist(), strict=True))
    assert keys == sorted(set(keys))
    assert not (every.positions == 0).any()


STEER = ("--latents", "0-2", "--samples", 2, "--new-tokens", 4, "--student", "0/mxd-k4", "0/transcoder-k4", "--json")


def test_mxd_steer_writes_its_files_and_goes_on_where_it_was(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = command(capsys)
    first = run("steer", tiny.run, *STEER, "--out", tmp_path)
    assert first.status == 0
    found = json.loads(first.out)
    assert json.loads((tmp_path / "steering.json").read_text()) == found
    assert [(row["student"], row["latent"]) for row in found["rows"]] == [
        (student, latent) for student in ("0/mxd-k4", "0/transcoder-k4") for latent in range(3)
    ]
    assert all(row["edit"]["operation"] == {"name": "add", "amount": 100.0} for row in found["rows"])
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "steering.json", "steering.md", "steering.png"}
    rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    assert len(rows) == 6
    (tmp_path / "rows.jsonl").write_text("".join(rows[:4]) + rows[4][:50])
    again = run("steer", tiny.run, *STEER, "--out", tmp_path)
    assert json.loads(again.out) == found
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 4 + 1 + 2
    before = (tmp_path / "rows.jsonl").read_bytes()
    assert run("steer", tiny.run, *STEER, "--out", tmp_path).status == 0
    assert (tmp_path / "rows.jsonl").read_bytes() == before


def test_mxd_steer_lists_what_a_judge_did_not_score_and_asks_for_that_again(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MXD_JUDGE_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    run, copy = command(capsys), copied(tiny.run, tmp_path / "run")
    good = Reply('{"coherence": 0.5, "fluency": 1}')
    with judge_server(lambda request: good if len(server.asked) != 2 else Reply("?")) as server:
        words = (
            "steer",
            copy,
            "--latents",
            "0-2",
            "--samples",
            2,
            "--new-tokens",
            3,
            "--student",
            "0/mxd-k4",
            "--json",
        )
        words = (*words, "--judge", server.url, "m", "--judge-retries", 0, "--judge-at-once", 1)
        first = run(*words)
        assert first.status == 0, first.err
        assert [one["fluency"] for one in json.loads(first.out)["judged"]] == [1, None, 1]
        assert "m: 3 calls, about " in first.err
        assert "m has no scores for latent 1 of 0/mxd-k4: answered what is no answer: '?'." in first.err
        second = run(*words)
        assert [one["fluency"] for one in json.loads(second.out)["judged"]] == [1, 1, 1]
        assert len(server.asked) == 4
    assert (
        json.loads((copy / "steering/steering.json").read_text())["students"][0]["scores"]["coherence, m"]["mean"]
        == 0.5
    )


def test_several_latents_are_steered_at_once_each_in_its_own_units(experiment: Experiment) -> None:
    able = tuple(latent for latent in range(20) if latent not in experiment.without_unit(range(20)))[:2]
    (row,) = experiment.rows([able])
    alone = list(experiment.rows(able))
    assert (row.latent, row.edit) == (able, [one.edit for one in alone])
    assert row.kl != alone[0].kl
    assert SteeredRow.from_json(json.loads(json.dumps(row.to_json()))).latent == able


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--latents", "0-99999"), "latents must lie in [0, "),
        (("--latents", "x"), "latents must be numbers or spans"),
        (("--latents", "5-2"), "latents must be numbers or spans"),
        (("--student", "nobody"), "has no student nobody"),
        (("--prompt", "a long text " * 20), "must fit into the model's context of 64 tokens"),
        (("--positions", "2", "--generated-only"), "must not both be given"),
        (("--judge", "ftp://x", "m"), "A judge's URL must be the base of an API"),
        (("--operation", "clamp", "--strength", "nan"), "must be a finite number"),
    ],
)
def test_mxd_steer_refuses_what_cannot_be_met(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], expected: str
) -> None:
    ended = command(capsys)("steer", tiny.run, "--out", tmp_path, "--latents", "0", *words)
    assert expected in ended.err
    assert_refused(ended, "steer", expected)


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


def test_side_effects_are_differences_of_losses(tiny: TinyRun) -> None:
    language_model, student, text = (
        load_language_model(str(tiny.model), dtype=torch.float32),
        _student(tiny),
        _text(tiny),
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


def test_a_prompt_begins_as_a_context_does(tiny: TinyRun) -> None:
    tokenizer = load_language_model(str(tiny.model)).tokenizer
    assert prompt_tokens(tokenizer, "ab", torch.device("cpu"))[0, 0] == 256
    assert prompt_tokens(tokenizer, "", torch.device("cpu")).tolist() == [[256]]
