"""How texts are sampled from a steered model, whatever the model's own generation_config asks for."""

import math
import shutil
import threading
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import GenerationConfig

from mxd.data.tokenization import begun_context
from mxd.explorer.live import LiveModel, SteeringRequest
from mxd.models import load_language_model
from mxd.steering.sampling import FrequencyPenalty, Sampling, prompt_tokens, sample_texts
from tests.test_models import build
from tests.tiny_run import TinyRun, change_json, copied


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


def test_a_prompt_begins_as_a_context_does(tiny: TinyRun) -> None:
    tokenizer = load_language_model(str(tiny.model)).tokenizer
    assert prompt_tokens(tokenizer, "ab", torch.device("cpu"))[0, 0] == 256
    assert prompt_tokens(tokenizer, "", torch.device("cpu")).tolist() == [[256]]
    named = prompt_tokens(tokenizer, "a<eos>b", torch.device("cpu"))[0].tolist()
    assert named == begun_context(tokenizer, "a<eos>b")
    assert len(named) == 8, "what is written in a text is text"
    assert 257 not in named
