"""What is known of a layer before its kind is: what every kind makes its configuration of."""

from dataclasses import dataclass
from typing import Protocol

from mxd.layers.activations import Activation
from mxd.layers.dense_encoder import Encoder
from mxd.layers.selection import SelectionName
from mxd.layers.sparse_layer import SparseLayerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRequest:
    """An MLP's sizes, and what a person chose beside them; a kind reads what it has a use for."""

    d_in: int
    """Width of the MLP's input."""
    d_out: int
    """Width of the MLP's output."""
    num_latents: int = 1
    """Size of the code."""
    k: int = 1
    """Number of latents active for each token, at most."""
    d_hidden: int = 0
    """Number of dense hidden units."""
    activation: Activation | None = None
    """Activation of the dense encoder; None where nobody chose one and the MLP's own is none that there is."""
    encoder: Encoder = "mlp"
    """Dense encoder."""
    rank: int | None = None
    """Largest rank of a latent's own linear map; None leaves it to `chosen_rank`."""
    selection: SelectionName = "topk"
    """How active latents are chosen."""
    normalize: bool = True
    """Whether rows that belong to latents are kept at unit length, by kinds that can."""
    shared_expert: bool = False
    """Whether one more expert is active on every token, in kinds that can have one."""
    site: str = "the MLP"
    """How messages name the MLP."""

    @property
    def chosen_rank(self) -> int:
        """The rank that was asked for, or a quarter of the output's width.

        A quarter is well below full rank (docs/layers.md). Training asks for another where a kind says so
        (`SparseLayer.rank_by_budget`).
        """
        return max(1, self.d_out // 4) if self.rank is None else self.rank

    def require_activation(self) -> Activation:
        """Return the activation.

        Raises:
            ValueError: If there is none.
        """
        if self.activation is None:
            raise ValueError(
                f"activation must be given for {self.site}, whose own is none that a dense encoder offers; "
                "choose one with --activation."
            )
        return self.activation


class RequestedConfig(SparseLayerConfig, Protocol):
    """What the configuration of a registered kind offers beside its fields."""

    @classmethod
    def from_request(cls, request: LayerRequest) -> SparseLayerConfig:
        """Return the configuration of this kind that was asked for.

        Raises:
            ValueError: If a size does not fit, or something that the kind needs is missing.
        """
        ...
