"""Labelled examples of any kind, what a model says of them, and what is wrong with a request."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

LabelsOf: TypeAlias = Literal["example", "token", "next-token"]
"""What a label belongs to.

- `example`: one class for each example (images, tables, sequences).
- `token`: one class for each position; positions labelled `IGNORED` do not count.
- `next-token`: the token ids themselves; a label at position t is what the model says at t − 1, so that a causal
  language model is a classifier over its vocabulary. Positions labelled `IGNORED` (a prompt, padding) do not count.
"""
IGNORED = -100
"""Label of a position that does not count, as in transformers."""
LOGITS_AT_ONCE = 2**26
"""Logits of one pass of a model, at most, that positions are measured with: 256 MiB in float32."""
Inputs: TypeAlias = Tensor | Mapping[str, Tensor]
"""A tensor, which a model takes as its one argument, or the named tensors that a transformers model takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Labelled examples, in memory."""

    inputs: Inputs
    """One row an example. Images hold pixels from 0 to 1; the model itself normalises them (`PixelNormalization`)."""
    labels: Int[Tensor, " n"] | Int[Tensor, "n seq"]
    """Each example's class, or the classes of its positions."""
    labels_of: LabelsOf = "example"
    """What a label belongs to."""

    def __post_init__(self) -> None:
        for name, tensor in self.tensors().items():
            if len(tensor) != len(self.labels):
                raise ValueError(
                    f"examples must have one label each; got {len(tensor)} rows of {name} and "
                    f"{len(self.labels)} labels."
                )
        if (self.labels.dim() == 2) != (self.labels_of != "example"):
            raise ValueError(
                f"labels of {self.labels_of}s must have {'one' if self.labels_of == 'example' else 'two'} "
                f"dimensions; got {self.labels.dim()}."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def tensors(self) -> Mapping[str, Tensor]:
        """The inputs by name."""
        return {"inputs": self.inputs} if isinstance(self.inputs, Tensor) else self.inputs

    def take(self, rows: Int[Tensor, " m"] | slice) -> "Examples":
        """The examples of these rows, in their order."""
        if isinstance(self.inputs, Tensor):
            inputs: Inputs = self.inputs[rows]
        else:
            inputs = {name: tensor[rows] for name, tensor in self.inputs.items()}
        return Examples(inputs=inputs, labels=self.labels[rows], labels_of=self.labels_of)

    def to(self, device: torch.device) -> "Examples":
        """The examples on a device."""
        if isinstance(self.inputs, Tensor):
            inputs: Inputs = self.inputs.to(device)
        else:
            inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Examples(inputs=inputs, labels=self.labels.to(device), labels_of=self.labels_of)

    def with_inputs(self, inputs: Inputs) -> "Examples":
        """The same labels on other inputs."""
        return Examples(inputs=inputs, labels=self.labels, labels_of=self.labels_of)

    def with_labels(self, labels: Int[Tensor, " n"]) -> "Examples":
        """The same inputs under other labels, one an example."""
        return Examples(inputs=self.inputs, labels=labels, labels_of=self.labels_of)

    def batches(self, size: int) -> Iterator["Examples"]:
        """The examples in order, at most `size` at a time."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    @property
    def num_counted(self) -> int:
        """Number of labels that count: of examples, or of positions."""
        if self.labels_of == "example":
            return len(self)
        labels = self.labels[:, 1:] if self.labels_of == "next-token" else self.labels
        return int((labels != IGNORED).sum())

    @property
    def num_uncounted_rows(self) -> int:
        """Number of examples none of whose labels counts."""
        if self.labels_of == "example":
            return 0
        labels = self.labels[:, 1:] if self.labels_of == "next-token" else self.labels
        return int((labels == IGNORED).all(1).sum())

    def digests(self) -> list[bytes]:
        """A digest of each example's input, without its label and without padding: equal for equal examples."""
        tensors = {name: tensor.detach().cpu() for name, tensor in sorted(self.tensors().items())}
        mask = tensors.pop("attention_mask", None)
        found: list[bytes] = []
        for row in range(len(self)):
            digest = hashlib.sha256()
            for name, tensor in tensors.items():
                value = tensor[row] if mask is None or tensor.dim() < 2 else tensor[row][mask[row].bool()]
                digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            found.append(digest.digest())
        return found

    def digest(self) -> str:
        """A digest of all inputs and labels in their order."""
        digest = hashlib.sha256(self.labels_of.encode())
        for one in self.digests():
            digest.update(one)
        digest.update(self.labels.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def join(first: Examples, second: Examples) -> Examples:
    """The examples of both, the first's first.

    Raises:
        ValueError: If they are not of one kind.
    """
    if isinstance(first.inputs, Tensor) and isinstance(second.inputs, Tensor):
        inputs: Inputs = torch.cat([first.inputs, second.inputs])
    elif isinstance(first.inputs, Mapping) and isinstance(second.inputs, Mapping):
        inputs = {name: torch.cat([tensor, second.inputs[name]]) for name, tensor in first.inputs.items()}
    else:
        raise ValueError("both sets of examples must be tensors or both be named tensors.")
    return Examples(inputs=inputs, labels=torch.cat([first.labels, second.labels]), labels_of=first.labels_of)


class Prediction(NamedTuple):
    """What a model says at every label that counts."""

    logits: Float[Tensor, "counted classes"]
    """One row for each label that counts."""
    labels: Int[Tensor, " counted"]
    """The labels, row by row."""
    rows: Int[Tensor, " counted"]
    """Which example of the batch each is of."""


def predict(model: nn.Module, batch: Examples) -> Prediction:
    """Run a model on a batch, with gradients where they are enabled.

    Args:
        model: Takes a tensor, or named tensors; returns logits, or an object with `logits` as transformers' models do.
        batch: On the model's device.

    Raises:
        ValueError: If what it returns has not the shape that the labels ask for.
    """
    inputs = batch.inputs
    output: Any = model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
    logits: Any = getattr(output, "logits", output)
    wanted = 2 if batch.labels_of == "example" else 3
    if not isinstance(logits, Tensor) or logits.dim() != wanted or logits.shape[: wanted - 1] != batch.labels.shape:
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"the model must return logits of shape {(*batch.labels.shape, 'classes')} for labels of "
            f"{batch.labels_of}s; got {found}."
        )
    labels = batch.labels
    if batch.labels_of == "example":
        return Prediction(logits, labels, torch.arange(len(labels), device=labels.device))
    if batch.labels_of == "next-token":
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    return Prediction(logits[counted], labels[counted], counted.nonzero()[:, 0])


def predictions(model: nn.Module, examples: Examples, batch_size: int) -> Iterator[Prediction]:
    """What a model says of each batch, as it is used (in evaluation mode), on its device in float32.

    One batch is in memory at a time: with a vocabulary for classes, all of them would not fit.

    Args:
        model: Returns logits.
        examples: The examples.
        batch_size: Examples in memory at a time, at most; see `fitting_batch`.
    """
    device, was_training, done = device_of(model), model.training, 0
    size = fitting_batch(model, examples, batch_size)
    try:
        for batch in examples.batches(size):
            with torch.no_grad():
                part = predict(model.eval(), batch.to(device))
            yield Prediction(part.logits.float(), part.labels, part.rows + done)
            done += len(batch)
    finally:
        model.train(was_training)


@torch.no_grad()
def fitting_batch(model: nn.Module, examples: Examples, batch_size: int) -> int:
    """Return how many examples a model may read at a time: fewer than `batch_size` where their logits are too many.

    With a vocabulary of 128,000 for classes the logits of one text of 512 tokens take 256 MiB. How many classes there
    are is learnt from a pass over one example; where labels are of whole examples their logits are few.
    """
    if examples.labels_of == "example" or len(examples) == 0:
        return batch_size
    was_training = model.training
    try:
        one = predict(model.eval(), examples.take(slice(0, 1)).to(device_of(model)))
    finally:
        model.train(was_training)
    return max(1, min(batch_size, LOGITS_AT_ONCE // (examples.labels.shape[1] * one.logits.shape[-1])))


def predict_all(model: nn.Module, examples: Examples, batch_size: int = 256) -> Prediction:
    """What a model says of all examples, together, on the CPU: for sets and numbers of classes that fit in memory."""
    parts = [[tensor.cpu() for tensor in part] for part in predictions(model, examples, batch_size)]
    return Prediction(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's weights; the CPU for a model without any."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def require_sets(first: Examples, second: Examples, names: tuple[str, str] = ("protected", "retained")) -> None:
    """Check that two sets can be told apart and are of one kind.

    Args:
        first: One set.
        second: The other.
        names: What they are called.

    Raises:
        ValueError: If one is empty, they differ in kind or shape, hold NaN or infinity, or have rows in common.
    """
    both = " and ".join(names)
    require_usable(names[0], first)
    require_usable(names[1], second)
    if first.labels_of != second.labels_of:
        raise ValueError(f"{both} labels must be of one kind; got {first.labels_of} and {second.labels_of}.")
    inputs = first.tensors(), second.tensors()
    if set(inputs[0]) != set(inputs[1]):
        found = f"{', '.join(inputs[0])} and {', '.join(inputs[1])}"
        raise ValueError(f"{both} examples must have the same inputs; got {found}.")
    if isinstance(first.inputs, Tensor) and isinstance(second.inputs, Tensor):
        shapes = tuple(first.inputs.shape[1:]), tuple(second.inputs.shape[1:])
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{both} examples must have one shape; got {shapes[0]} and {shapes[1]}; resize or crop one set."
            )
    seen = set(first.digests())
    common = sum(digest in seen for digest in second.digests())
    if common:
        raise ValueError(
            f"{both} sets must have no row in common; {common} {names[1]} row{' is' if common == 1 else 's are'} also "
            f"{names[0]}; remove {'it' if common == 1 else 'them'} from one."
        )


def require_usable(name: str, examples: Examples) -> None:
    """Check that a set is not empty and its numbers are finite.

    Raises:
        ValueError: If not; the sentence begins with the set's name.
    """
    if len(examples) == 0 or examples.num_counted == 0:
        raise ValueError(f"the {name} set must hold at least one labelled example; it is empty.")
    mute = examples.num_uncounted_rows
    if name == "protected" and mute:
        raise ValueError(
            f"every protected example must have a label that counts; {mute} of {len(examples)} have none (only a "
            "prompt, or a single token); remove or lengthen them."
        )
    for tensor in examples.tensors().values():
        if tensor.is_floating_point():
            bad = int((~torch.isfinite(tensor)).flatten(1).any(1).sum())
            if bad:
                raise ValueError(
                    f"the {name} set must hold finite numbers; {bad} of its {len(examples)} examples hold NaN or "
                    "infinity; repair or remove them."
                )


def require_logits(model: nn.Module, examples: Examples, name: str) -> int:
    """Check on a few examples that a model returns finite logits for all the labels, and return the number of classes.

    Raises:
        ValueError: If it returns probabilities or no finite numbers, or a label is not one of its classes.
    """
    few = examples.take(slice(0, 32 if examples.labels_of == "example" else 4))
    num_classes, probabilities = 0, True
    for logits, _, _ in predictions(model, few, 8 if examples.labels_of == "example" else 1):
        num_classes = logits.shape[-1]
        if num_classes < 2:
            raise ValueError(
                f"the model must have at least two classes; got {num_classes}; a model with one output for two classes "
                "must be given as one with two logits (0 and z)."
            )
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(f"the model must return finite logits; those of the {name} set hold NaN or infinity.")
        sums = logits.sum(-1)
        probabilities &= bool((logits >= 0).all()) and bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-3))
    if probabilities:
        raise ValueError(
            "the model must return logits; it returns probabilities (they are not negative and sum to 1); leave out "
            "its last softmax."
        )
    labels = examples.labels[examples.labels != IGNORED] if examples.labels_of != "example" else examples.labels
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels of the {name} set must lie in [0, {num_classes - 1}], the model's classes; got {low} to {high}."
        )
    return num_classes
