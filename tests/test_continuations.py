from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mxd.evaluation import continuations, faithfulness
from mxd.evaluation.continuations import LONGEST, agreement, greedy_continuations, ngram_agreements
from mxd.evaluation.faithfulness import EvaluationText, Variant
from mxd.models import ablate_mlp, find_mlp, load_language_model, replace_mlp
from tests import tiny_model

CONTEXT = 20


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    folder: Path = tmp_path_factory.mktemp("model")
    tiny_model.write_model(folder, request.param)
    # In float64 no two tokens are equally likely, whichever way the logits are computed.
    return cast("nn.Module", load_language_model(str(folder), dtype=torch.float64).model)


@pytest.fixture(scope="module")
def text() -> EvaluationText:
    generator = torch.Generator().manual_seed(0)
    contexts = torch.randint(0, 256, (24, CONTEXT), generator=generator)
    return EvaluationText(contexts=contexts, documents=torch.zeros_like(contexts), special_ids=[])


def variants(model: nn.Module) -> dict[str, Variant]:
    own = {layer: find_mlp(model, layer) for layer in range(2)}
    # Not the same everywhere, which GPT-2's norms would take off.
    shift = torch.linspace(-0.2, 0.2, tiny_model.D_MODEL, dtype=torch.float64)

    def shifted(x: Tensor) -> Tensor:
        return own[0](x) + shift

    return {
        "same": lambda: replace_mlp(model, own),
        "shifted": lambda: replace_mlp(model, {0: shifted}),
        "zero": lambda: ablate_mlp(model, {0: None, 1: None}),
    }


@torch.no_grad()
def naive_continuation(model: nn.Module, prompt: Tensor) -> list[int]:
    """Restate greedy decoding without a cache, one prompt at a time."""
    tokens: list[int] = prompt.tolist()
    for _ in range(LONGEST):
        logits = model(torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def naive_agreements(model: nn.Module, variant: Variant, text: EvaluationText) -> list[float]:
    same = [0] * LONGEST
    prompts = text.contexts[:, : CONTEXT - LONGEST]
    for prompt in prompts:
        original = naive_continuation(model, prompt)
        with variant():
            replaced = naive_continuation(model, prompt)
        for n in range(LONGEST):
            same[n] += original[: n + 1] == replaced[: n + 1]
    return [count / len(prompts) for count in same]


def test_a_continuation_is_that_of_a_model_without_a_cache(model: nn.Module, text: EvaluationText) -> None:
    prompts = text.contexts[:6, :9]
    expected = [naive_continuation(model, prompt) for prompt in prompts]
    assert greedy_continuations(model, prompts).tolist() == expected


def test_agreement_is_that_of_every_prompt_by_itself(model: nn.Module, text: EvaluationText) -> None:
    found = ngram_agreements(model, variants(model), text)
    assert found["same"] == (1.0,) * LONGEST
    for name in ("shifted", "zero"):
        assert found[name] == pytest.approx(naive_agreements(model, variants(model)[name], text))
    # The test tells variants apart.
    assert found["zero"][-1] < found["shifted"][0]
    assert 0 < found["shifted"][-1] < 1


def test_it_does_not_matter_how_prompts_are_batched(
    model: nn.Module, text: EvaluationText, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ngram_agreements(model, variants(model), text)
    monkeypatch.setattr(continuations, "_TOKENS_AT_ONCE", 7 * CONTEXT)
    assert ngram_agreements(model, variants(model), text) == expected

    def keeps_none(model: nn.Module) -> bool:
        return False

    # Some models compute the logits of all positions, whatever they are asked for.
    monkeypatch.setattr(continuations, "_keeps_logits", keeps_none)
    monkeypatch.setattr(faithfulness, "LOGITS_AT_ONCE", 259 * 3 * CONTEXT)
    assert ngram_agreements(model, variants(model), text) == expected


def test_prompts_are_evenly_spaced_and_bounded(
    model: nn.Module, text: EvaluationText, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Tensor] = []

    def remember(model: nn.Module, prompts: Tensor) -> Tensor:
        given.append(prompts)
        return prompts[:, :LONGEST]

    monkeypatch.setattr(continuations, "greedy_continuations", remember)
    monkeypatch.setattr(continuations, "NUM_PROMPTS", 4)
    only: Mapping[str, Variant] = {"": nullcontext}
    assert ngram_agreements(model, only, text) == {"": (1.0,) * LONGEST}
    assert torch.equal(given[0], text.contexts[[0, 8, 15, 23], : CONTEXT - LONGEST])
    monkeypatch.setattr(continuations, "PROMPT_TOKENS", 10)
    ngram_agreements(model, only, text)
    assert given[-1].shape == (4, 10)


def rows() -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(st.integers(0, 1), min_size=5, max_size=5), min_size=4, max_size=4)


@given(rows(), rows())
def test_agreement_counts_equal_beginnings(original: list[list[int]], replaced: list[list[int]]) -> None:
    def shares() -> Iterator[float]:
        for n in range(1, 6):
            yield sum(one[:n] == other[:n] for one, other in zip(original, replaced, strict=True)) / 4

    assert agreement(torch.tensor(original), torch.tensor(replaced)).tolist() == list(shares())
