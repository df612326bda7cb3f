import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import NamedTuple, cast

import pytest
import torch
from torch import Tensor, nn

from mxd.checkpoint import load_layer, save_layer
from mxd.data.holdout import is_held_out
from mxd.evaluation import faithfulness
from mxd.evaluation.evaluate import Evaluation, evaluate_run, write_evaluation
from mxd.evaluation.rows import EvaluationRow
from mxd.layers import MixtureOfDecoders, MixtureOfDecodersConfig, SparseLayer
from mxd.models import load_language_model
from tests.tiny_run import CONTEXT, KINDS, Settings, TinyRun, change_json, copied

STUDENTS = [f"{layer}/{kind}-k4" for layer in (0, 1) for kind in KINDS]


@pytest.fixture(scope="module")
def evaluation(tiny: TinyRun) -> Evaluation:
    return evaluate_run(tiny.run)


def named(evaluation: Evaluation) -> dict[str, EvaluationRow]:
    return {f"{row.layer}/{row.id}" if row.layer is not None else row.id: row for row in evaluation.rows}


# What follows restates the definitions in float64, one context at a time, with PyTorch's own hooks.


class Naive(NamedTuple):
    """The tiny model in float64 and the held-out contexts."""

    model: nn.Module
    contexts: list[Tensor]
    special: list[int]

    def mlp(self, layer: int) -> nn.Module:
        return self.model.get_submodule(f"model.layers.{layer}.mlp")


Replaced = Callable[[Tensor, Tensor], Tensor]
"""The new output of an MLP, from its input and its own output."""


@cache
def naive(tiny: TinyRun) -> Naive:
    loaded = load_language_model(str(tiny.model), dtype=torch.float64)
    bos = cast("int", loaded.tokenizer.bos_token_id)
    stream: list[int] = []
    for line in tiny.text.read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        if is_held_out(text):
            stream += [*cast("list[int]", loaded.tokenizer(text, add_special_tokens=False)["input_ids"]), bos]
    bodies = [stream[start : start + CONTEXT - 1] for start in range(0, len(stream), CONTEXT - 1)]
    contexts = [torch.tensor([bos, *body]) for body in bodies if len(body) == CONTEXT - 1]
    special = [bos, cast("int", loaded.tokenizer.pad_token_id)]
    return Naive(cast("nn.Module", loaded.model), contexts[: 1024 // CONTEXT], special)


@contextmanager
def hooked(naive: Naive, replacements: Mapping[int, Replaced]) -> Generator[None, None, None]:
    with ExitStack() as stack:
        for layer, replaced in replacements.items():

            def hook(
                module: nn.Module, args: tuple[Tensor, ...], output: Tensor, replaced: Replaced = replaced
            ) -> Tensor:
                return replaced(args[0], output)

            stack.callback(naive.mlp(layer).register_forward_hook(hook).remove)
        yield


@torch.no_grad()
def log_probabilities(naive: Naive, replacements: Mapping[int, Replaced]) -> list[Tensor]:
    with hooked(naive, replacements):
        return [naive.model(context[None], use_cache=False).logits[0].log_softmax(-1) for context in naive.contexts]


def cross_entropy(naive: Naive, predictions: list[Tensor]) -> float:
    losses = [
        -float(log_p[position, context[position + 1]])
        for context, log_p in zip(naive.contexts, predictions, strict=True)
        for position in range(CONTEXT - 1)
    ]
    return sum(losses) / len(losses)


def divergence(original: list[Tensor], predictions: list[Tensor]) -> float:
    pairs = zip(original, predictions, strict=True)
    each = [(p.exp() * (p - q)).sum(-1)[:-1] for p, q in pairs]
    return float(torch.cat(each).mean())


@torch.no_grad()
def pairs(naive: Naive, layer: int) -> list[tuple[Tensor, Tensor]]:
    seen: list[tuple[Tensor, Tensor]] = []

    def record(x: Tensor, target: Tensor) -> Tensor:
        seen.append((x[0], target[0]))
        return target

    log_probabilities(naive, {layer: record})
    return seen


def student(run: Path, name: str) -> SparseLayer:
    return load_layer(run / "layers" / name).double()


def standing_in(layer: SparseLayer) -> Replaced:
    return lambda x, target: layer(target if layer.kind == "topk-sae" else x).prediction


def zero(x: Tensor, target: Tensor) -> Tensor:
    return torch.zeros_like(target)


def is_content(naive: Naive, context: Tensor) -> Tensor:
    return torch.tensor([int(token) not in naive.special for token in context])


def reconstruction(naive: Naive, layer: SparseLayer, block: int) -> dict[str, float]:
    """Restate nmse, fvu, l0 and dead_fraction at content positions."""
    targets: list[Tensor] = []
    errors: list[Tensor] = []
    active: list[int] = []
    fired: set[int] = set()
    for context, (x, target) in zip(naive.contexts, pairs(naive, block), strict=True):
        kept = is_content(naive, context)
        prediction, code = layer((target if layer.kind == "topk-sae" else x)[kept])
        targets.append(target[kept])
        errors.append(prediction - target[kept])
        for values, indices in zip(code.values, code.indices, strict=True):
            used = indices[values > 0].tolist()
            active.append(len(used))
            fired.update(used)
    target, error = torch.cat(targets), torch.cat(errors)
    return {
        "nmse": float(error.square().sum() / target.square().sum()),
        "fvu": float(error.square().sum() / (target - target.mean(0)).square().sum()),
        "l0": sum(active) / len(active),
        "dead_fraction": 1 - len(fired) / layer.config.num_latents,
    }


def losses(naive: Naive, replacements: Mapping[int, Replaced]) -> dict[str, float]:
    """Restate what a row says of the model with these replacements in place."""
    original, replaced = log_probabilities(naive, {}), log_probabilities(naive, replacements)
    zeros: dict[int, Replaced] = dict.fromkeys(replacements, zero)
    base, ce = cross_entropy(naive, original), cross_entropy(naive, replaced)
    ce_zero = cross_entropy(naive, log_probabilities(naive, zeros))
    # The tokenizer is byte-level without merges: every token that is not special is one byte.
    size = sum(int(is_content(naive, context)[1:].sum()) for context in naive.contexts)
    bits = len(naive.contexts) * (CONTEXT - 1) / size / math.log(2)
    return {
        "ce_base": base,
        "ce": ce,
        "ce_increase": ce - base,
        "ce_zero": ce_zero,
        "loss_recovered": (ce_zero - ce) / (ce_zero - base) if ce_zero > base else math.nan,
        "kl": divergence(original, replaced),
        "bits_per_byte_base": base * bits,
        "bits_per_byte": ce * bits,
    }


def assert_agrees(row: EvaluationRow, expected: Mapping[str, float]) -> None:
    for name, value in expected.items():
        assert getattr(row, name) == pytest.approx(
            value, rel=2e-3 if name == "loss_recovered" else 1e-4, abs=2e-6, nan_ok=True
        ), name


@pytest.mark.parametrize("name", STUDENTS)
@torch.no_grad()
def test_every_number_of_a_row_is_its_definition(tiny: TinyRun, evaluation: Evaluation, name: str) -> None:
    model, row, layer = naive(tiny), named(evaluation)[name], student(tiny.run, name)
    block = int(name[0])
    assert (row.layer, row.kind, row.k, row.tokens_evaluated) == (block, layer.kind, 4, 1024)
    assert row.parameters == sum(parameter.numel() for parameter in layer.parameters())
    assert_agrees(row, reconstruction(model, layer, block))
    assert_agrees(row, losses(model, {block: standing_in(layer)}))
    mean = torch.cat([target for _, target in pairs(model, block)]).mean(0)
    ablated = log_probabilities(model, {block: lambda x, target: mean.expand_as(target)})
    assert row.ce_mean == pytest.approx(cross_entropy(model, ablated), rel=1e-5)


def test_the_numbers_tell_replacements_apart(evaluation: Evaluation) -> None:
    # Were the tiny model's MLPs without weight, the test above would hold for any replacement.
    assert min(row.kl for row in evaluation.rows) > 1e-4
    assert min(abs(row.ce_zero - row.ce_base) for row in evaluation.rows) > 1e-3


def test_specialisation_is_of_mixtures_alone(evaluation: Evaluation) -> None:
    for row in evaluation.rows:
        assert (row.specialisation is not None) == (row.kind == "mxd")
        assert row.specialisation is None or 0 < row.specialisation <= cast("float", row.specialisation_constant_gain)


def with_config(run: Path, **settings: object) -> None:
    change_json(run / "run.json", lambda described: cast("Settings", described["config"]).update(settings))


@torch.no_grad()
def test_an_exact_layer_changes_nothing(tiny: TinyRun, tmp_path: Path) -> None:
    run = copied(tiny.run, tmp_path / "run")
    mlp = load_language_model(str(tiny.model)).model.get_submodule("model.layers.1.mlp")
    weights = {name: mlp.get_parameter(f"{name}_proj.weight").t() for name in ("gate", "up", "down")}
    d_in, d_hidden = weights["up"].shape
    layer = MixtureOfDecoders(
        MixtureOfDecodersConfig(
            d_in=d_in, d_hidden=d_hidden, d_out=d_in, num_experts=1, k=1, activation="silu", encoder="glu"
        )
    )
    # One expert that is always active, with weight 1: y = (1 ∘ D z) + 0, the MLP itself.
    values = {"W_expert": 1.0, "b_gate": 1.0, "W_gate": 0.0, "b_dec": 0.0, "encoder.b_enc": 0.0}
    for name, value in values.items():
        layer.get_parameter(name).fill_(value)
    layer.get_parameter("encoder.W_enc_gate").copy_(weights["gate"])
    layer.get_parameter("encoder.W_enc").copy_(weights["up"])
    layer.W_dec.copy_(weights["down"])
    save_layer(layer, run / "layers" / "1" / "mxd-k4")
    row = named(evaluate_run(run, students=["1/mxd-k4"]))["1/mxd-k4"]
    assert row.ce_increase == pytest.approx(0, abs=1e-6)
    assert row.kl == pytest.approx(0, abs=1e-6)
    assert row.nmse == pytest.approx(0, abs=1e-10)
    assert (row.l0, row.dead_fraction) == (1, 0)
    assert row.specialisation == pytest.approx(0, abs=1e-9)
    assert row.ngram_agreement == (1,) * 8
    assert row.jacobian_cosine == pytest.approx(1, abs=1e-6)
    assert (row.gini, row.top_share, row.always_on, row.always_on_share) == (0, 1, 1, 1)


@torch.no_grad()
def test_together_is_all_of_them_in_place_at_once(tiny: TinyRun) -> None:
    names = ["0/topk-sae-k4", "1/mxd-k4"]
    rows = named(evaluate_run(tiny.run, students=names, together=True))
    assert list(rows) == [*names, "together"]
    layers = {int(name[0]): standing_in(student(tiny.run, name)) for name in names}
    assert_agrees(rows["together"], losses(naive(tiny), layers))
    assert rows["together"].layer is rows["together"].nmse is rows["together"].ce_mean is None


@torch.no_grad()
def test_passthrough_leaves_special_positions_as_they_were(tiny: TinyRun, tmp_path: Path) -> None:
    run, model = copied(tiny.run, tmp_path / "run"), naive(tiny)
    with_config(run, special_positions="passthrough")
    row = named(evaluate_run(run, students=["1/transcoder-k4"]))["1/transcoder-k4"]
    assert row.special_positions == "passthrough"
    contexts = iter(model.contexts * 10)

    def kept(replaced: Replaced) -> Replaced:
        # Contexts run one after the other, so that the next one is the one that is running.
        return lambda x, target: torch.where(
            is_content(model, next(contexts))[None, :, None], replaced(x, target), target
        )

    layer = standing_in(student(run, "1/transcoder-k4"))
    for name, replaced in {"ce": layer, "ce_zero": zero}.items():
        ce = cross_entropy(model, log_probabilities(model, {1: kept(replaced)}))
        assert getattr(row, name) == pytest.approx(ce, rel=1e-6)
    assert row.ce != named(evaluate_run(tiny.run, students=["1/transcoder-k4"]))["1/transcoder-k4"].ce


def test_rows_do_not_depend_on_how_the_text_is_cut(
    tiny: TinyRun, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def few_contexts(text: faithfulness.EvaluationText, tokens: int) -> Iterator[tuple[int, Tensor]]:
        sizes.append(tokens)
        return iter([(first, text.contexts[first : first + 5]) for first in range(0, len(text.contexts), 5)])

    names = ["0/mxd-k4", "1/topk-sae-k4"]
    monkeypatch.setattr(faithfulness, "LOGITS_AT_ONCE", 1)
    by_context = evaluate_run(tiny.run, students=names)
    monkeypatch.setattr(faithfulness.EvaluationText, "chunks", few_contexts)
    by_five = evaluate_run(tiny.run, students=names)
    assert sizes == [4096, 1]
    for other in (by_context, by_five):
        for name, row in named(other).items():
            assert_same(row, named(evaluation)[name])
        assert shown(other) == shown(evaluation)


def shown(evaluation: Evaluation) -> list[tuple[int, list[tuple[list[str], int]]]]:
    return [(page.index, [(example.tokens, example.peak) for example in page.examples]) for page in evaluation.experts]


def assert_same(row: EvaluationRow, expected: EvaluationRow) -> None:
    for name, value in asdict(expected).items():
        # A difference of two losses holds their rounding.
        looser = name in ("ce_increase", "loss_recovered", "kl") or "specialisation" in name
        same = (
            pytest.approx(value, rel=1e-3 if looser else 1e-5, abs=1e-6, nan_ok=True)
            if isinstance(value, float)
            else value
        )
        assert getattr(row, name) == same, name


@torch.no_grad()
def test_expert_pages_show_what_the_layer_encodes(tiny: TinyRun, evaluation: Evaluation) -> None:
    assert evaluation.experts_of == "mxd-k4"
    model, layer = naive(tiny), student(tiny.run, "0/mxd-k4")
    tokenizer = load_language_model(str(tiny.model)).tokenizer
    dense: list[Tensor] = []
    for x, _ in pairs(model, 0):
        code = layer.encode(x)
        dense.append(torch.zeros(len(x), layer.config.num_latents, dtype=x.dtype).scatter(1, code.indices, code.values))
    content = [is_content(model, context) for context in model.contexts]
    texts = ["".join(str(tokenizer.decode([token])) for token in context.tolist()) for context in model.contexts]
    assert evaluation.experts
    for page in evaluation.experts:
        values = [rows[:, page.index] for rows in dense]
        counted = torch.cat([row[kept] for row, kept in zip(values, content, strict=True)])
        assert page.firing_rate == pytest.approx(float((counted > 0).double().mean()))
        assert page.max_value == pytest.approx(float(counted.max()), rel=1e-4)
        peaks = sorted((float(torch.where(k, v, 0).max()) for v, k in zip(values, content, strict=True)), reverse=True)
        assert len(page.examples) == 8
        for example, peak in zip(page.examples, peaks, strict=False):
            assert example.values[example.peak] == pytest.approx(peak, rel=1e-4)
            number = texts.index("".join(example.tokens))
            assert example.values == pytest.approx(values[number].tolist(), rel=1e-4, abs=1e-5)


def test_the_row_says_how_the_student_came_about(tiny: TinyRun, evaluation: Evaluation) -> None:
    row = named(evaluation)["1/mxd-k4"]
    assert (row.model, row.init, row.seed, row.tokens_trained) == (str(tiny.model), "paper", 0, 12_288)
    assert (row.d_hidden, row.activation) == (40, "silu")
    assert named(evaluation)["1/transcoder-k4"].d_hidden is None


def test_all_positions_are_reported_where_they_differ_by_more_than_a_tenth(evaluation: Evaluation) -> None:
    for row in evaluation.rows:
        for name in ("nmse", "fvu"):
            content, everywhere = getattr(row, name), getattr(row, f"{name}_all_positions")
            assert everywhere is None or abs(everywhere - content) > 0.1 * content


def test_other_text_and_fewer_tokens_are_taken_where_asked(tiny: TinyRun, tmp_path: Path) -> None:
    documents = [f"document {number} of another text, which is quite long" for number in range(400)]
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(documents))
    evaluation = evaluate_run(tiny.run, text=[str(other)], tokens=100, students=["0/mxd-k4"])
    assert evaluation.rows[0].tokens_evaluated == 3 * CONTEXT
    assert evaluation.facts["held-out text"] == "other.txt"


def test_results_are_written_beside_the_layers(tiny: TinyRun, evaluation: Evaluation, tmp_path: Path) -> None:
    run = copied(tiny.run, tmp_path / "run")
    write_evaluation(run, evaluation, title="A title", footer="mxd evaluate")
    stored = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert [EvaluationRow.from_json(row) for row in stored["rows"]] == list(evaluation.rows)
    assert stored["facts"]["tokens evaluated"] == "1,024"
    assert (run / "frontier.png").read_bytes().startswith(b"\x89PNG")
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "A title" in report
    assert "Ten experts of mxd-k4" in report


def test_a_run_without_its_log_is_evaluated_without_the_curves(
    tiny: TinyRun, evaluation: Evaluation, tmp_path: Path
) -> None:
    run = copied(tiny.run, tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    write_evaluation(run, evaluation, title="A title", footer="")
    assert (run / "report.html").is_file()


def test_the_logits_of_a_pass_are_bounded_by_what_the_device_has_free(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert faithfulness.logits_fit(cpu, 50_257) == 2**25 // 50_257
    assert faithfulness.logits_fit(cpu, 2**26) == 1

    def told(free: int | None) -> int:
        monkeypatch.setattr(faithfulness, "available_memory", lambda device: free)  # pyright: ignore
        return faithfulness.logits_fit(cuda, 262_144)

    assert told(70 * 2**30) == told(100 * 2**30) == 4096
    assert told(2 * 2**30) == 2**25 // 262_144
    assert told(2**20) == told(None) == 1
    assert faithfulness.logits_fit(cuda, 259) == 1
    told(70 * 2**30)
    assert faithfulness.logits_fit(cuda, 259) == faithfulness.CUDA_TOKENS
