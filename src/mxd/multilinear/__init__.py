"""Multilinear mixtures of experts: CP and tensor-ring factorised, dense in the experts.

`CPMixture` and `TRMixture` stand for a linear layer, `MultilinearMLP` for a whole MLP. `docs/multilinear.md` explains
them.
"""

from mxd.multilinear.block import MultilinearMLP, MultilinearMLPConfig
from mxd.multilinear.entmax import entmax15
from mxd.multilinear.experts import (
    Coefficients,
    CPExperts,
    CPExpertsConfig,
    ExpertsConfig,
    ExpertsKind,
    FactorisedExperts,
    TRExperts,
    TRExpertsConfig,
)
from mxd.multilinear.gate import ExpertGate, GateName, Normalization
from mxd.multilinear.mixture import CPMixture, CPMixtureConfig, Mixture, TRMixture, TRMixtureConfig
from mxd.multilinear.sizing import Match, fractional_block_rank, matched_block_rank, matched_rank, ranks_of

__all__ = [
    "CPExperts",
    "CPExpertsConfig",
    "CPMixture",
    "CPMixtureConfig",
    "Coefficients",
    "ExpertGate",
    "ExpertsConfig",
    "ExpertsKind",
    "FactorisedExperts",
    "GateName",
    "Match",
    "Mixture",
    "MultilinearMLP",
    "MultilinearMLPConfig",
    "Normalization",
    "TRExperts",
    "TRExpertsConfig",
    "TRMixture",
    "TRMixtureConfig",
    "entmax15",
    "fractional_block_rank",
    "matched_block_rank",
    "matched_rank",
    "ranks_of",
]
