"""Settings under which CUDA repeats itself: set, restored, and left alone elsewhere."""

import os
from typing import Any

import pytest
import torch
import torch.utils.deterministic

from mxd.runs.determinism import WORKSPACE, deterministic

# Its settings are properties of the module's own class, which a type checker does not see.
memory: Any = torch.utils.deterministic


def settings() -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    return (
        torch.get_deterministic_debug_mode(),
        memory.fill_uninitialized_memory,
        cudnn.deterministic,
        cudnn.benchmark,
        cudnn.allow_tf32,
    )


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, "")
    monkeypatch.delenv(WORKSPACE)


def test_cuda_is_told_and_what_was_set_comes_back() -> None:
    before = settings()
    assert before == (0, True, False, False, True)
    with deterministic("cuda"):
        assert settings() == (2, False, True, False, False)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ[WORKSPACE] == ":4096:8"
    assert settings() == before
    with deterministic(torch.device("cuda:1"), "bfloat16"):
        assert settings() == (2, False, True, False, True)
    assert settings() == before
    with pytest.raises(KeyError), deterministic("cuda"):
        raise KeyError
    assert settings() == before


def test_what_was_chosen_before_is_not_weakened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with deterministic("cuda", "bfloat16"):
        assert not torch.backends.cudnn.allow_tf32
        assert os.environ[WORKSPACE] == ":16:8"


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_elsewhere_nothing_is_set(device: str) -> None:
    before = settings()
    with deterministic(device):
        assert settings() == before
    assert WORKSPACE not in os.environ


def test_an_operation_that_cannot_be_repeated_is_refused_in_a_sentence() -> None:
    before = settings()
    x = torch.zeros(3, dtype=torch.long)
    refused = r"on cuda every operation must have .*; put_ has none; choose --device cpu"
    with pytest.raises(ValueError, match=refused), deterministic("cuda"):
        # One that has none on a CPU either.
        x.put_(torch.tensor([0]), torch.tensor([1]))
    assert settings() == before
    with pytest.raises(RuntimeError, match="shapes cannot"), deterministic("cuda"):
        torch.mm(torch.zeros(2, 3), torch.zeros(2, 3))
