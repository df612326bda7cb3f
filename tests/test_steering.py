"""What `mxd steer` measures, against restatements, and its files on a tiny run."""

import json
import math
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mxd.checkpoint import load_layer
from mxd.edits import Ablate, Add, Edit, with_edits
from mxd.evaluation.faithfulness import Candidate, EvaluationText
from mxd.evaluation.firings import Firings, collect_firings
from mxd.models import load_language_model, mlp_pairs, replace_mlp
from mxd.steering.ellipse import Panel, covariance_ellipse, draw_ellipses
from mxd.steering.experiment import Experiment, Intervention, SteeredRow
from mxd.steering.sampling import Sampling
from mxd.steering.scores import likeness, moved, read_texts, reference_logits
from mxd.steering.steer import steer
from tests.judge_server import Reply, judge_server
from tests.test_generation import mxd
from tests.test_models import build
from tests.tiny_model import BOS
from tests.tiny_run import TinyRun, assert_refused, command, copied


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
        student_of(tiny),
        text_of(tiny),
        Sampling(samples=3, new_tokens=6, top_p=0.9),
        Intervention(unit="p99", strength=2.0, generated_only=True),
        range(20),
    )


def student_of(tiny: TinyRun) -> Candidate:
    return Candidate(name="1/mxd-k4", layer=1, network=load_layer(tiny.run / "layers/1/mxd-k4"))


def text_of(tiny: TinyRun) -> EvaluationText:
    tokens = torch.randint(0, 250, (6, 24), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 256
    return EvaluationText(contexts=tokens, documents=torch.zeros_like(tokens), special_ids=[256, 258])


def test_units_are_quantiles_of_a_latents_values_and_latents_that_never_fire_have_none(
    experiment: Experiment, tiny: TinyRun
) -> None:
    model, student, text = load_language_model(str(tiny.model), dtype=torch.float32), student_of(tiny), text_of(tiny)
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
    student = student_of(tiny)
    edits = [Edit(latents=tuple(able), operation=Ablate())]
    edited = Candidate(name=student.name, layer=1, network=with_edits(student.network, edits))
    model = load_language_model(str(tiny.model), dtype=torch.float32)
    sampling, done = Sampling(samples=3, new_tokens=6, top_p=0.9), Intervention(unit="p99", strength=2.0)
    again = Experiment(model, edited, text_of(tiny), sampling, done, able)
    assert [row.unit for row in again.rows(able)] == [row.unit for row in experiment.rows(able)]


def test_an_intervention_that_changes_nothing_scores_nothing(tiny: TinyRun) -> None:
    model = load_language_model(str(tiny.model), dtype=torch.float32)
    nothing = Intervention(operation="scale", strength=1.0)
    sampling = Sampling(samples=3, new_tokens=6, top_p=0.9)
    one = Experiment(model, student_of(tiny), text_of(tiny), sampling, nothing, [0])
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
    model, student, text = load_language_model(str(tiny.model), dtype=torch.float32), student_of(tiny), text_of(tiny)
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
