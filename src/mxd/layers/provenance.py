"""Where a layer belongs and how it came about: what a layer remembers, and what is saved beside it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where a layer belongs and how it came about; every field is None where it is not known."""

    model: str | None = None
    """Hub id or folder of the language model whose MLP was decomposed."""
    revision: str | None = None
    """The model's revision on the hub."""
    layer: int | None = None
    """Index of the block whose MLP the layer stands for."""
    module_path: str | None = None
    """Dotted path of that MLP in the Hugging Face model; x is its input and the target its output, unfolded."""
    text: str | None = None
    """What the layer was trained on."""
    tokens_trained: int | None = None
    """Number of tokens it was trained on."""
    seed: int | None = None
    """Seed of its initialisation."""
    init: str | None = None
    """Name of its initialisation."""
    special_positions: str | None = None
    """`replace`, or `passthrough` where the original MLP stays at special tokens."""
    mxd_version: str | None = None
    """Version of mxd that trained it."""

    @property
    def place(self) -> "Provenance":
        """The same without how the weights came about: where the layer belongs, whatever becomes of its weights."""
        return Provenance(
            model=self.model,
            revision=self.revision,
            layer=self.layer,
            module_path=self.module_path,
            special_positions=self.special_positions,
        )
