"""Test-time privacy: certified uncertainty on protected instances."""

from mxd.privacy.examples import Examples
from mxd.privacy.inducing import induce_uncertainty
from mxd.privacy.objective import ObjectiveConfig
from mxd.privacy.tuning import InduceConfig, Induced

__all__ = ["Examples", "InduceConfig", "Induced", "ObjectiveConfig", "induce_uncertainty"]
