"""A student: one sparse layer that learns one MLP."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mxd.kernels import dots
from mxd.layers import SparseCode, SparseLayer, SparseLayerOutput
from mxd.losses import (
    SharedMoments,
    dead_latent_loss,
    distillation_loss,
    l1_penalty,
    shared_energy,
    shared_energy_of_part,
)
from mxd.training.normalization import InputNormalization
from mxd.training.optimizer import (
    adamw,
    optimizer_tensors,
    project_gradients_,
    renormalize_,
    restore_optimizer_,
)

SUMS = ("loss", "steps", "tokens", "l0", "error", "square", "target")
"""What a student adds up between two readings of its metrics; the last is a vector."""
Loss = Callable[[SparseLayerOutput, Tensor], Tensor]
"""A student's loss: a mean over tokens of what its layer returned and of the target."""


def distillation(output: SparseLayerOutput, target: Float[Tensor, "tokens d_out"]) -> Float[Tensor, ""]:
    """Return the paper's loss of an output (`losses.distillation_loss`)."""
    return distillation_loss(output.prediction.float(), target.float())


def random_ks(k: int) -> range:
    """Return the numbers of active latents that random K draws: k − k/2 to k + k/2 (Oldfield et al., 2025).

    Example:
        >>> list(random_ks(5))
        [3, 4, 5, 6, 7]
    """
    return range(k - k // 2, k + k // 2 + 1)


def drawn_k(k: int, seed: int, step: int) -> int:
    """Return the number that one step draws; it depends on these three alone, so that a resumed run draws the same."""
    return random.Random(f"{seed} {step}").choice(random_ks(k))


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    """How one student learns."""

    lr: float
    """Learning rate after warm-up."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    clip: float | None = None
    """Largest norm of the gradient; None leaves it as it is."""
    aux_coefficient: float = 0.0
    """Weight of the auxiliary loss on dead latents."""
    aux_k: int = 512
    """Dead latents that the auxiliary loss activates for each token, at most."""
    dead_tokens: int = 1_000_000
    """Tokens without firing after which a latent counts as dead."""
    l1_coefficient: float = 0.0
    """Weight of the L1 penalty on the code; 0 leaves it out."""
    inherits: bool = False
    """Whether the layer begins with weights of the model's MLP."""
    shared_penalty: float = 0.0
    """What is charged for the variance that no latent carries, about the batch's mean; 0 charges nothing. Where a batch
    is learnt in parts, the shared expert runs once more, for that mean."""
    random_k_seed: int | None = None
    """Seed of the number of active latents that is drawn each step; None keeps the layer's own."""
    micro_batch_tokens: int | None = None
    """Tokens of one forward and backward pass, at most; a batch of more adds up the gradients of several. Not with the
    auxiliary loss, which is a ratio of sums over the whole batch."""

    def __post_init__(self) -> None:
        if self.micro_batch_tokens is not None and self.aux_coefficient:
            raise ValueError("micro_batch_tokens must be None with an auxiliary loss, which is one of the whole batch.")


class Student:
    """One sparse layer, its optimiser, and what it has shown of itself so far.

    Args:
        id: Name within its layer, such as `mxd-k32`.
        layer: Index of the block whose MLP it learns.
        network: The sparse layer; trained in place.
        config: How it learns.
        normalization: Shift and scale of its inputs, if it trains on normalised ones.
        loss: What it makes small.
    """

    def __init__(
        self,
        id: str,
        layer: int,
        network: SparseLayer,
        config: StudentConfig,
        normalization: InputNormalization | None = None,
        loss: Loss = distillation,
    ) -> None:
        self.id = id
        self.layer = layer
        self.network = network
        self.config = config
        self.normalization = normalization
        self.loss = loss
        self.optimizer = adamw(network.parameters(), config.lr, config.weight_decay)
        device = next(network.parameters()).device
        self._last_fired: Int[Tensor, " num_latents"]
        self._last_fired = torch.zeros(network.config.num_latents, dtype=torch.long, device=device)
        self._sums = {name: torch.zeros((), device=device) for name in SUMS}
        self._sums["target"] = torch.zeros(network.config.d_out, device=device)
        self.first_bad_step: Int[Tensor, ""] = torch.full((), -1, dtype=torch.long, device=device)
        """The first step, counted from 0, whose loss was not finite, or -1."""
        self.first_bad_input: Bool[Tensor, ""] = torch.zeros((), dtype=torch.bool, device=device)
        """Whether that step's input or target already was not finite."""

    @property
    def name(self) -> str:
        """The student's name within its run: `<layer>/<id>`."""
        return f"{self.layer}/{self.id}"

    def step(
        self,
        step: int,
        x: Float[Tensor, "tokens d_in"],
        target: Float[Tensor, "tokens d_out"],
        is_content: Tensor,
        *,
        lr_factor: float,
        autocast: torch.dtype | None,
    ) -> None:
        """Learn from one batch.

        A step waits for the device where a size depends on what was computed there: codes that vary in width
        (batch-topk and l1), how many tokens name each transform of a molt, and which latents are dead. Otherwise
        nothing is read back.
        """
        x = self.network.given(x, target)
        if self.normalization is not None:
            x = self.normalization(x)
        tokens_after, at_once = (step + 1) * len(x), self.config.micro_batch_tokens or len(x)
        dead = self._dead_latents(step * len(x)) if self.config.aux_coefficient else None
        seed, k = self.config.random_k_seed, self.network.config.k
        k = k if seed is None else drawn_k(k, seed, step)
        in_parts = bool(self.config.shared_penalty) and at_once < len(x)
        whole = self._shared_moments(x.split(at_once), target, autocast) if in_parts else None
        loss = target.new_zeros(())
        for rows in zip(x.split(at_once), target.split(at_once), is_content.split(at_once), strict=True):
            output, part = self._add_gradients(rows[0], rows[1], k, len(x), dead, autocast, whole)
            self._observe(tokens_after, output, *rows[1:])
            loss += part
        project_gradients_(self.network.unit_length_tables())
        if self.config.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * lr_factor
        self.optimizer.step()
        self.network.zero_grad(set_to_none=True)
        renormalize_(self.network.unit_length_tables())
        self._note_first_bad_step(step, loss, ~torch.isfinite(x.sum() + target.sum()))
        self._sums["loss"] += loss
        self._sums["steps"] += 1

    @torch.no_grad()
    def _shared_moments(self, parts: Sequence[Tensor], target: Tensor, autocast: torch.dtype | None) -> SharedMoments:
        with _autocast(target, autocast):
            shared = torch.cat([self.network.base(x).float() for x in parts])
        return SharedMoments.of(shared, target.float())

    def _add_gradients(
        self,
        x: Tensor,
        target: Tensor,
        k: int,
        batch_tokens: int,
        dead: Tensor | None,
        autocast: torch.dtype | None,
        whole: SharedMoments | None = None,
    ) -> tuple[SparseLayerOutput, Float[Tensor, ""]]:
        """Add these rows' gradients to those of the batch's other rows; return output and share of the batch's loss."""
        with _autocast(x, autocast):
            output, base = self._output(x, k)
            loss = self.loss(output, target)
            if self.config.l1_coefficient:
                loss = loss + self.config.l1_coefficient * l1_penalty(output.code.values, self._lengths_of(output.code))
            if base is not None:
                shared, aims = base.float(), target.float()
                energy = shared_energy(shared, aims) if whole is None else shared_energy_of_part(shared, aims, whole)
                loss = loss + self.config.shared_penalty * energy
        loss = loss * (len(x) / batch_tokens)
        loss.backward()
        if dead is not None and len(dead) > 0:
            with _autocast(x, autocast):
                revival = self.config.aux_coefficient * self._dead_latent_loss(dead, x, target, output)
            # What all latents share would otherwise be bent towards the dead ones by as much.
            revival.backward(inputs=self.network.latent_parameters())
            loss = loss + revival
        return output, loss.detach()

    def _output(self, x: Tensor, k: int) -> tuple[SparseLayerOutput, Tensor | None]:
        """Return the output, and what it has without any latent where that is charged for."""
        if not self.config.shared_penalty and k == self.network.config.k:
            return self.network(x), None
        code = self.network.encode_at(x, k)
        if not self.config.shared_penalty:
            return SparseLayerOutput(self.network.decode(x, code), code), None
        base = self.network.base(x)
        return SparseLayerOutput(self.network.carried(x, code) + base, code), base

    def _lengths_of(self, code: SparseCode) -> Float[Tensor, "tokens k"]:
        lengths = self.network.latent_lengths()
        # Plain indexing adds up its gradient in whatever order threads run.
        return dots(lengths.new_ones(len(code.indices), 1), code.indices, lengths[:, None])

    def _dead_latents(self, tokens: int) -> Int[Tensor, " dead"]:
        return (tokens - self._last_fired >= self.config.dead_tokens).nonzero().squeeze(1)

    def _dead_latent_loss(
        self, dead: Tensor, x: Tensor, target: Tensor, output: SparseLayerOutput
    ) -> Float[Tensor, ""]:
        chosen = self.network.encode_among(x, dead, min(self.config.aux_k, len(dead))).indices
        scores = self.network.scores_of(x, chosen)
        # Rectified, but with the identity's gradient: relu's would never reach a latent whose scores are all negative.
        code = SparseCode(torch.where(scores > 0, scores, scores - scores.detach()), chosen)
        prediction = self.network.carried(x, code)
        return dead_latent_loss(target.float() - output.prediction.float(), prediction.float())

    @torch.no_grad()
    def _observe(self, tokens_after: int, output: SparseLayerOutput, target: Tensor, is_content: Tensor) -> None:
        values, indices = output.code
        fired_at = torch.where(values > 0, tokens_after, 0).flatten()
        self._last_fired.scatter_reduce_(0, indices.flatten(), fired_at, "amax")
        kept = target.float() * is_content[:, None]
        error = (output.prediction.float() - target.float()) * is_content[:, None]
        additions = {
            "tokens": is_content.sum(),
            "l0": ((values > 0).sum(-1) * is_content).sum(),
            "error": error.square().sum(),
            "square": kept.square().sum(),
            "target": kept.sum(0),
        }
        for name, addition in additions.items():
            self._sums[name] += addition

    def _note_first_bad_step(self, step: int, loss: Tensor, bad_input: Tensor) -> None:
        is_first = (self.first_bad_step < 0) & ~torch.isfinite(loss)
        self.first_bad_step = torch.where(is_first, step, self.first_bad_step)
        self.first_bad_input = torch.where(is_first, bad_input, self.first_bad_input)

    def is_finite(self) -> bool:
        """Whether all weights and all of the optimiser's state are finite: a finite loss can have another gradient."""
        state = (tensor for name, tensor in self.tensors().items() if name.startswith(("layer.", "optimizer.")))
        # Read from the device once.
        return bool(torch.stack([torch.isfinite(tensor).all().to(self._last_fired.device) for tensor in state]).all())

    def read_metrics(self, tokens: int) -> dict[str, float]:
        """Return loss, fvu and l0 since the last reading, over content tokens, and the share of dead latents now.

        Args:
            tokens: Tokens trained on by now.
        """
        return read_metrics([self], tokens)[self.name]

    def _take_sums(self, tokens: int) -> Float[Tensor, " sums"]:
        """Return all sums, that of the targets last, and the number of dead latents; start the sums anew."""
        dead = (tokens - self._last_fired >= self.config.dead_tokens).sum()
        numbers = torch.cat([dead.to(self._sums["loss"])[None], *(self._sums[name].view(-1) for name in SUMS)])
        for value in self._sums.values():
            value.zero_()
        return numbers

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that a resumed student needs, by name."""
        state = {f"layer.{name}": tensor for name, tensor in self.network.state_dict().items()}
        state |= {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(self.optimizer).items()}
        state |= {f"sums.{name}": tensor for name, tensor in self._sums.items()}
        if self.normalization is not None:
            state |= {f"normalization.{name}": tensor for name, tensor in self.normalization._asdict().items()}
        return state | {"last_fired": self._last_fired}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        device = self._last_fired.device

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self.network.load_state_dict(part("layer."))
        restore_optimizer_(self.optimizer, part("optimizer."))
        self._sums = {name: value.to(device) for name, value in part("sums.").items()}
        self._last_fired = tensors["last_fired"].to(device)
        normalization = part("normalization.")
        if normalization:
            moved = {name: value.to(device) for name, value in normalization.items()}
            self.normalization = InputNormalization(**moved)


def read_metrics(students: Sequence[Student], tokens: int) -> dict[str, dict[str, float]]:
    """Return the metrics of each student by its name (`Student.read_metrics`), read from the device all at once.

    Args:
        students: Students on one device.
        tokens: Tokens trained on by now.
    """
    taken = [student._take_sums(tokens) for student in students]
    # Doubles are the host's: not every device has them.
    read = torch.cat(taken).cpu().double().split([len(numbers) for numbers in taken])
    return {student.name: _metrics(student, numbers) for student, numbers in zip(students, read, strict=True)}


def _metrics(student: Student, numbers: Float[Tensor, " sums"]) -> dict[str, float]:
    dead, loss, steps, tokens, l0, error, square = numbers[: len(SUMS)]
    target, content = numbers[len(SUMS) :], tokens.clamp_min(1)
    variance = square - target.square().sum() / content
    return {
        "loss": float(loss / steps.clamp_min(1)),
        "fvu": float(error / variance),
        "l0": float(l0 / content),
        "dead_fraction": float(dead / student.network.config.num_latents),
    }


def _autocast(x: Tensor, dtype: torch.dtype | None) -> torch.autocast:
    """Return autocast without its cache of cast weights.

    Threads share the cache, and whichever leaves autocast empties it, such as the one that prefetches batches: whether
    a weight that is used twice is cast twice, so that its gradients are added up in another type, would be chance.
    """
    return torch.autocast(x.device.type, dtype, enabled=dtype is not None, cache_enabled=False)
