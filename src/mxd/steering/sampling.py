"""How texts are sampled from a steered model: Hugging Face's `generate`, and what it lacks of the paper's protocol."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from mxd.data.tokenization import Tokenizer, begun_context
from mxd.models import most_positions

NEUTRAL: Mapping[str, object] = MappingProxyType(
    {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": None,
        "top_h": None,
        "typical_p": 1.0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
        "repetition_penalty": 1.0,
        "encoder_repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "encoder_no_repeat_ngram_size": 0,
        "min_length": 0,
        "min_new_tokens": None,
        "max_time": None,
        "stop_strings": None,
        "num_beams": 1,
        "num_beam_groups": 1,
        "diversity_penalty": 0.0,
        "length_penalty": 1.0,
        "early_stopping": False,
        "constraints": None,
        "force_words_ids": None,
        "bad_words_ids": None,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
        "sequence_bias": None,
        "exponential_decay_length_penalty": None,
        "renormalize_logits": False,
        "remove_invalid_values": False,
        "guidance_scale": None,
        "penalty_alpha": None,
        "dola_layers": None,
        "watermarking_config": None,
        "token_healing": False,
        "prompt_lookup_num_tokens": None,
        "assistant_early_exit": None,
        "return_dict_in_generate": False,
    }
)
"""Everything that a model's own generation_config can ask `generate` for and that shapes what is written, at the value
that does nothing: so the probabilities are the model's, and what is wanted otherwise is named beside it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How texts are sampled; the defaults are those of Oldfield et al. (2025)."""

    prompt: str = "Let's talk about "
    """The text that is continued."""
    samples: int = 10
    """Texts a latent."""
    new_tokens: int = 32
    """Tokens of each text; an end-of-text token does not end it."""
    temperature: float = 1.0
    """What logits are divided by."""
    top_p: float = 0.1
    """Only the likeliest tokens are sampled, whose probabilities sum to this."""
    frequency_penalty: float = 1.0
    """What a token's logit loses for each time that it was sampled."""
    seed: int = 42
    """Seed of the samples of each latent: they are the same whatever else is steered."""

    def __post_init__(self) -> None:
        for name in ("samples", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be a number above 0; got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p must lie above 0 and at most at 1; got {self.top_p}.")
        if not math.isfinite(self.frequency_penalty):
            raise ValueError(f"frequency-penalty must be a finite number; got {self.frequency_penalty}.")


class FrequencyPenalty(LogitsProcessor):
    r"""Takes `penalty` off a token's logit for each time that it was sampled, as OpenAI's API does.

    $$\ell_j \leftarrow \ell_j - \alpha \, c_j$$

    with $c_j$ the number of times that token $j$ stands in the text so far, without the prompt. (`generate`'s
    `repetition_penalty` is another thing: it divides, once, and counts the prompt.) It comes before temperature and
    top-p.

    Args:
        penalty: α; negative values reward repetition.
        prompt_length: Tokens of the prompt with its padding, which do not count.
    """

    def __init__(self, penalty: float, prompt_length: int) -> None:
        self.penalty = penalty
        self.prompt_length = prompt_length

    def __call__(
        self, input_ids: Int[Tensor, "batch seq"], scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        """Return the scores with the penalties taken off."""
        sampled = input_ids[:, self.prompt_length :]
        return scores.scatter_add(1, sampled, scores.new_full((), -self.penalty).expand(sampled.shape))


def prompt_tokens(tokenizer: Tokenizer, prompt: str, device: torch.device) -> Int[Tensor, "one seq"]:
    """Return a prompt as a context begins: behind the tokenizer's first token, where it has one.

    Raises:
        ValueError: If that is no token at all.
    """
    ids = begun_context(tokenizer, prompt)
    if not ids:
        raise ValueError("A prompt must be at least one token; got an empty text. Give one.")
    return torch.tensor([ids], device=device)


@torch.no_grad()
def sample_texts(
    model: nn.Module, prompt: Int[Tensor, "one seq"], sampling: Sampling
) -> Int[Tensor, "samples new_tokens"]:
    """Return the tokens of texts that the model continues this prompt with, as it stands (see `steer`).

    The global random state stays as it is.

    Raises:
        ValueError: If prompt and texts together are longer than the model's context.
    """
    require_room(model, prompt.shape[1], sampling.new_tokens)
    devices = [prompt.device] if prompt.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(sampling.seed)
        try:
            written = _generate(model, prompt, sampling)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise ValueError(
                "The model's probabilities must be finite to be sampled; with what is steered they are not. "
                "Lower the strength."
            ) from error
    return written[:, prompt.shape[1] :]


def _generate(model: nn.Module, prompt: Tensor, sampling: Sampling) -> Tensor:
    return cast("Callable[..., Tensor]", model.generate)(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        num_return_sequences=sampling.samples,
        max_new_tokens=sampling.new_tokens,
        logits_processor=LogitsProcessorList([FrequencyPenalty(sampling.frequency_penalty, prompt.shape[1])]),
        use_cache=True,
        **{**NEUTRAL, "temperature": sampling.temperature, "top_p": sampling.top_p, "eos_token_id": None},
    )


def require_room(model: nn.Module, prompt: int, new_tokens: int) -> None:
    """Check that a model has positions for so many tokens.

    Raises:
        ValueError: If it has not.
    """
    longest = most_positions(model)
    if longest is not None and prompt + new_tokens > longest:
        raise ValueError(
            f"Prompt and new tokens must fit into the model's context of {longest} tokens; {prompt} and {new_tokens} "
            "are more. Shorten the prompt, or ask for fewer new tokens."
        )
