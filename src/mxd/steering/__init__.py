"""Steering: what a model does when latents of its replaced MLPs are set, moved or taken away."""

from mxd.edits import Ablate, Add, Clamp, Edit, Operation, Scale, Set, Span
from mxd.steering.steer import steer

__all__ = ["Ablate", "Add", "Clamp", "Edit", "Operation", "Scale", "Set", "Span", "steer"]
