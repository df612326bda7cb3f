"""What a language model looks like from outside, where it is not there to be asked."""

from collections.abc import Iterable
from dataclasses import dataclass

from mxd.models import MlpSite


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of a language model, enough to size its students and to estimate what a run takes."""

    d_model: int
    """Width of the residual stream, which its MLPs read and write."""
    d_hidden: int
    """Width between an MLP's linear layers."""
    num_layers: int
    """Number of blocks."""
    d_attention: int
    """Width of the query heads of a block together."""
    activation: str
    """Activation of its MLPs, by mxd's names."""
    gated: bool
    """Whether its MLPs are GLUs."""
    positions: int
    """Tokens of the longest context."""
    parameters: int
    """Number of parameters; a shared table counts once."""
    block_parameters: int
    """Number of parameters of one block."""

    def sites(self, layers: Iterable[int]) -> dict[int, MlpSite]:
        """Return what the MLPs of these blocks are; they have no modules and cannot be called.

        Raises:
            ValueError: If there is no such block.
        """
        for layer in layers:
            if not 0 <= layer < self.num_layers:
                raise ValueError(
                    f"A layer must lie in [0, {self.num_layers - 1}], the {self.num_layers} blocks of the recipe's "
                    f"model; got {layer}."
                )
        return {layer: self._site(layer) for layer in layers}

    def _site(self, layer: int) -> MlpSite:
        return MlpSite(
            layer=layer,
            path=f"block {layer}",
            d_in=self.d_model,
            d_hidden=self.d_hidden,
            d_out=self.d_model,
            activation=self.activation,
            gated=self.gated,
            modules=(),
        )
