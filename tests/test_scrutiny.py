import json
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from mxd.evaluation.comparison import compare_runs
from mxd.evaluation.evaluate import Evaluation, evaluate_run, write_evaluation
from mxd.evaluation.expert_use import ALWAYS_ON_RATE
from mxd.evaluation.faithfulness import Candidate, EvaluationText, reconstructions
from mxd.evaluation.record import write_record
from mxd.evaluation.rows import EvaluationRow
from mxd.layers import (
    MixtureOfDecoders,
    MixtureOfDecodersConfig,
    SharedTranscoder,
    SharedTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    SparseLayer,
    Transcoder,
    TranscoderConfig,
)
from mxd.models import load_language_model
from tests.test_evaluation import STUDENTS, Naive, is_content, naive, named, pairs, standing_in, student
from tests.test_jacobians import exact_cosines
from tests.tiny_run import CONTEXT, Settings, TinyRun, change_json, copied

NEW = (
    *("ngram_agreement", "jacobian_cosine", "stable_rank", "numerical_rank", "gini", "top_share"),
    *("always_on", "always_on_share", "fvu_permuted"),
)


@pytest.fixture(scope="module")
def evaluation(tiny: TinyRun) -> Evaluation:
    return evaluate_run(tiny.run, together=False)


# The tiny run is evaluated on fewer tokens than any sample takes, so that a sample is all of them.


def content_pairs(model: Naive, block: int) -> tuple[Tensor, Tensor]:
    kept = torch.cat([is_content(model, context) for context in model.contexts])
    x, target = (torch.cat(parts)[kept] for parts in zip(*pairs(model, block), strict=True))
    return x, target


def variation(y: Tensor) -> float:
    return float((y - y.mean(0)).square().sum())


def decoded(layer: SparseLayer, x: Tensor, dense: Tensor) -> Tensor:
    """Restate decoding: the base, and of every latent its value times its atom."""
    everyone = torch.arange(layer.config.num_latents).expand(len(x), -1)
    return layer.base(x) + torch.einsum("tn,tno->to", dense, layer.atoms(x, everyone))


@pytest.mark.parametrize("name", STUDENTS)
@torch.no_grad()
def test_use_of_latents_and_its_control_are_their_definitions(tiny: TinyRun, evaluation: Evaluation, name: str) -> None:
    model, row, layer = naive(tiny), named(evaluation)[name], student(tiny.run, name)
    x, target = content_pairs(model, int(name[0]))
    given = target if layer.reads == "output" else x
    latents = layer.config.num_latents
    dense = layer.encode(given).dense(latents)
    firings = (dense > 0).sum(0)
    rates = firings / len(given)
    assert row.top_share == pytest.approx(float(rates.max()), abs=1e-3)
    assert row.gini == pytest.approx(
        float((firings[:, None] - firings).abs().sum() / (2 * latents * firings.sum())), abs=1e-3
    )
    always = rates > ALWAYS_ON_RATE
    assert row.always_on == int(always.sum())
    rest = decoded(layer, given, torch.where(always, 0, dense)) - layer.base(given)
    share = 1 - variation(rest) / variation(decoded(layer, given, dense) - layer.base(given))
    assert row.always_on_share == pytest.approx(share, abs=1e-3)
    moved = torch.zeros_like(dense)
    moved[:, torch.randperm(latents, generator=torch.Generator().manual_seed(0))] = dense
    error = (decoded(layer, given, moved) - target).square().sum()
    assert row.fvu_permuted == pytest.approx(float(error) / variation(target), rel=1e-3)
    histogram = evaluation.use[name]
    assert sum(histogram.counts) + histogram.dead == latents
    assert histogram.dead / latents == row.dead_fraction


def shared_transcoder() -> SparseLayer:
    return SharedTranscoder(SharedTranscoderConfig(d_in=16, d_out=16, num_latents=20, k=3, d_hidden=12))


def mxd_with_a_shared_expert() -> SparseLayer:
    config = MixtureOfDecodersConfig(d_in=16, d_out=16, num_experts=20, k=3, d_hidden=12, shared_expert=True)
    return MixtureOfDecoders(config)


def skip_transcoder() -> SparseLayer:
    return SkipTranscoder(SkipTranscoderConfig(d_in=16, d_out=16, num_latents=20, k=3))


def restated_base(layer: SparseLayer, x: Tensor) -> Tensor:
    """Restate what needs no latent, without the bias."""
    weights = dict(layer.named_parameters())
    if layer.kind == "skip-transcoder":
        return x @ weights["W_skip"]
    z = torch.nn.functional.gelu(x @ weights["encoder.W_enc"] + weights["encoder.b_enc"])
    return z @ weights["W_shared"] if layer.kind == "shared-transcoder" else z @ weights["W_dec"] * weights["w_shared"]


@pytest.mark.parametrize("make", [shared_transcoder, mxd_with_a_shared_expert, skip_transcoder])
@torch.no_grad()
def test_what_needs_no_latent_has_its_share_of_the_predictions_variance(
    tiny: TinyRun, make: Callable[[], SparseLayer]
) -> None:
    layer, generator = make(), torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    measured = base_share(tiny, layer)
    exact = deepcopy(layer).double()
    x, _ = content_pairs(naive(tiny), 0)
    everyone = torch.arange(20).expand(len(x), -1)
    base = restated_base(exact, x)
    prediction = base + torch.einsum("tn,tno->to", exact.encode(x).dense(20), exact.atoms(x, everyone))
    assert measured == pytest.approx(variation(base) / variation(prediction), rel=1e-4)


@torch.no_grad()
def base_share(tiny: TinyRun, layer: SparseLayer) -> float | None:
    model = naive(tiny)
    contexts = torch.stack(model.contexts)
    text = EvaluationText(contexts=contexts, documents=torch.zeros_like(contexts), special_ids=model.special)
    loaded = load_language_model(str(tiny.model), dtype=torch.float32)
    return reconstructions(loaded.module, [Candidate(name="0", layer=0, network=layer)], text)["0"].base_share


def test_a_base_that_does_not_vary_has_no_share(tiny: TinyRun, evaluation: Evaluation) -> None:
    layer = Transcoder(TranscoderConfig(d_in=16, d_out=16, num_latents=20, k=3), torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.b_dec.copy_(torch.linspace(-3, 1000, 16))
    assert base_share(tiny, layer) is None
    shares = {row.kind: row.base_share for row in evaluation.rows}
    assert [kind for kind, share in shares.items() if share is not None] == ["skip-transcoder"]


def test_an_evaluation_that_was_made_before_has_none_and_is_used(
    tiny: TinyRun, evaluation: Evaluation, tmp_path: Path
) -> None:
    run = copied(tiny.run, tmp_path / "run")
    write_record(run / "evaluation.json", evaluation.record)

    def older(stored: Settings) -> None:
        for row in cast("list[Settings]", stored["rows"]):
            del row["base_share"]

    change_json(run / "evaluation.json", older)
    said: list[str] = []
    rows = compare_runs([run], say=said.append).all_rows
    assert (said, {row.base_share for row in rows}) == ([], {None})


def test_permuting_raises_the_error_of_every_student(evaluation: Evaluation) -> None:
    for row in evaluation.rows:
        assert cast("float", row.fvu_permuted) > 1.2 * cast("float", row.fvu)


@pytest.mark.parametrize("name", ["0/mxd-k4", "1/transcoder-k4", "1/topk-sae-k4"])
def test_the_jacobian_is_that_of_what_stands_in_for_the_mlp(tiny: TinyRun, evaluation: Evaluation, name: str) -> None:
    model, layer = naive(tiny), student(tiny.run, name)
    mlp = model.mlp(int(name[0]))
    x, _ = content_pairs(model, int(name[0]))
    replaced = standing_in(layer)
    exact = exact_cosines(lambda x: replaced(x, mlp(x)), mlp, x)
    assert named(evaluation)[name].jacobian_cosine == pytest.approx(float(exact.mean()), abs=0.02)


def test_ranks_are_those_of_a_trained_decoder(tiny: TinyRun, evaluation: Evaluation) -> None:
    for name, row in named(evaluation).items():
        layer = student(tiny.run, name)
        if not isinstance(layer, MixtureOfDecoders):
            assert (row.stable_rank, row.numerical_rank) == (1, 1)
            continue
        stable: list[float] = []
        for n in range(layer.config.num_experts):
            values = torch.linalg.svdvals(layer.expert_weight(n).detach())
            stable.append(float((values / values[0]).square().sum()))
        # Lemma 1: every expert has the rank of D, which training leaves full.
        assert row.numerical_rank == layer.config.d_out
        assert min(stable) < cast("float", row.stable_rank) < max(stable)


@torch.no_grad()
def continuation(model: Naive, prompt: Tensor) -> list[int]:
    tokens: list[int] = prompt.tolist()
    for _ in range(8):
        tokens.append(int(model.model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_continuations_are_compared_from_the_beginning_of_each_context(tiny: TinyRun, evaluation: Evaluation) -> None:
    model, row, layer = naive(tiny), named(evaluation)["0/mxd-k4"], student(tiny.run, "0/mxd-k4").requires_grad_(False)
    mlp, replaced, same = model.mlp(0), standing_in(layer), [0] * 8

    def hook(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return replaced(args[0], output)

    for context in model.contexts:
        prompt = context[: CONTEXT - 8]
        original = continuation(model, prompt)
        handle = mlp.register_forward_hook(hook)
        written = continuation(model, prompt)
        handle.remove()
        for n in range(8):
            same[n] += original[: n + 1] == written[: n + 1]
    assert row.ngram_agreement == pytest.approx([count / len(model.contexts) for count in same])


def test_all_layers_together_have_continuations_alone(tiny: TinyRun, evaluation: Evaluation) -> None:
    names = ["0/mxd-k4", "1/transcoder-k4"]
    together = named(evaluate_run(tiny.run, students=names, together=True))["together"]
    assert len(together.ngram_agreement) == 8
    best = min(named(evaluation)[name].ngram_agreement[0] for name in names)
    assert together.ngram_agreement[0] <= best + 0.25
    assert {getattr(together, field) for field in NEW if field != "ngram_agreement"} == {None}


def test_what_was_found_is_written_down(tiny: TinyRun, evaluation: Evaluation, tmp_path: Path) -> None:
    run = copied(tiny.run, tmp_path / "run")
    write_evaluation(run, evaluation, title="A title", footer="")
    stored = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    for values, row in zip(stored, evaluation.rows, strict=True):
        assert set(NEW) <= set(values)
        assert values["ngram_agreement"] == list(row.ngram_agreement)
        assert EvaluationRow.from_json(values) == row
        assert all(math.isfinite(values[name]) for name in NEW if name != "ngram_agreement")
    report = (run / "report.html").read_text(encoding="utf-8")
    for words in ("Jacobian cosine", "FVU permuted", "Use of latents", "Layer 1: MxD, share of latents"):
        assert words in report
