"""Judgements of texts and latents by a language model behind any OpenAI-compatible endpoint."""

from mxd.judge.answers import read_explanation, read_scores, read_verdicts
from mxd.judge.endpoint import Endpoint, Estimate, Failure, Judge, JudgeConfig, Question

__all__ = [
    "Endpoint",
    "Estimate",
    "Failure",
    "Judge",
    "JudgeConfig",
    "Question",
    "read_explanation",
    "read_scores",
    "read_verdicts",
]
