"""What a person asks of a training run."""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple, TypeVar

from mxd.layers import L1, BatchTopK, SelectionName, TopK, require_kind
from mxd.layers.activations import activation_function
from mxd.layers.sizing import EXPANSION
from mxd.settings import kinds_that_read
from mxd.training.values import settling

Value = TypeVar("Value")
EncoderChoice = Literal["auto", "mlp", "glu"]
InitChoice = Literal["auto", "paper", "model"]
PenaltyChoice = float | Literal["auto"]
WidthChoice = int | Literal["auto"]
LayerChoice = tuple[int, ...] | Literal["all"]

PAPER_WARMUP = 5000 * 4096
"""Tokens of the paper's warm-up: 5,000 steps, which are 4.27 % of its 480M tokens (Oldfield et al., 2025)."""
WARMUP_SHARE = 0.1
"""Share of a shorter run's tokens: at 4 % some seeds end a quarter worse than others (`benchmarks/precision.py`)."""


class Settings(NamedTuple):
    """One value of each setting that may have several: the axes of the grid beside layer, kind, k and seed."""

    num_latents: int | None
    hidden: WidthChoice
    activation: str
    encoder: EncoderChoice
    rank: WidthChoice
    normalize_experts: bool
    shared_expert: bool
    selection: SelectionName
    l1_coefficient: float | None
    random_k: bool
    init: InitChoice
    shared_penalty: PenaltyChoice


def values_of(setting: Value | tuple[Value, ...]) -> tuple[Value, ...]:
    """Return the values of a setting that may have one or several."""
    return setting if isinstance(setting, tuple) else (setting,)


@settling
@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Which sparse layers to train, for which MLPs, on which text, and how.

    A setting that takes one or several values is an axis of the grid: each kind that reads it is trained with each.
    Where several values stand in a tuple, Python code may give a list, a range or a single value; counts are whole
    numbers.
    """

    model: str
    """Language model: a hub id, a local folder, or `bundled`."""
    text: tuple[str, ...]
    """Text: a hub dataset id (streamed), local .txt/.jsonl/.json/.parquet files (or .txt.gz, .jsonl.zst and so on),
    folders or globs, or `stdlib`."""
    layer: LayerChoice
    """Blocks whose MLPs are decomposed, counted from 0: numbers and spans, as in 0 2-4, or all."""
    tokens: int
    """Tokens to train on, rounded up to whole steps; short text is repeated. Counts take K, M and B, as in 480M."""
    kind: tuple[str, ...] = ("shared-transcoder",)
    """Kinds of layer: shared-transcoder (docs/method.md), mxd (the paper's), transcoder, skip-transcoder, topk-sae,
    low-rank, molt."""
    k: tuple[int, ...] = (32,)
    """Latents active for each token; each kind is trained at each."""
    expansion: int = EXPANSION
    """Parameters are matched to a transcoder with this many latents per unit of input width."""
    num_latents: int | tuple[int, ...] | None = None
    """Number of latents (experts) of every layer, one or several, instead of matched parameters."""
    hidden: WidthChoice | tuple[WidthChoice, ...] = "auto"
    """Dense hidden units of an mxd, low-rank or shared-transcoder, one or several; auto takes the model's own, and
    for a shared-transcoder of a given expansion what half of its parameters pay for, where that is more."""
    activation: str | tuple[str, ...] = "auto"
    """Activations of a dense encoder: relu, gelu, gelu_tanh, silu, sigmoid; auto takes the model's own."""
    encoder: EncoderChoice | tuple[EncoderChoice, ...] = "auto"
    """Dense encoders of an mxd, low-rank or shared-transcoder; auto takes glu where the model's MLP is gated."""
    rank: WidthChoice | tuple[WidthChoice, ...] = "auto"
    """Ranks of low-rank's experts and of molt's widest transforms; auto is a quarter of the output's width
    for low-rank, and for molt the whole, or a half, a quarter of it and so on where only so there are 128 transforms
    and more."""
    normalize_experts: bool | tuple[bool, ...] = True
    """Whether rows that belong to latents are kept at unit length; name both to compare."""
    shared_expert: bool | tuple[bool, ...] = False
    """Whether an mxd has one more expert, active on every token; name both to compare."""
    selection: SelectionName | tuple[SelectionName, ...] = "topk"
    """How latents are selected: topk, batch-topk (k a token on average) or l1 (all that are positive)."""
    l1_coefficient: float | tuple[float, ...] | None = None
    """Weights of the L1 penalty with which selection l1 is trained."""
    random_k: bool | tuple[bool, ...] = False
    """Whether training draws K anew each step, uniformly from half to one and a half times k (topk only)."""
    init: InitChoice | tuple[InitChoice, ...] = "auto"
    """Where weights begin: paper (as released), model (a dense branch as the MLP's own), or auto, by kind."""
    shared_penalty: PenaltyChoice | tuple[PenaltyChoice, ...] = "auto"
    """What a shared-transcoder is charged for the variance that its shared expert carries: docs/method.md."""
    init_from: str | None = None
    """Folder of a run whose students of the same names these begin from."""
    seeds: int = 1
    """Number of seeds; each layer, kind and k is trained with each."""
    seed: int = 0
    """First seed."""
    batch_tokens: int = 4096
    """Tokens of one step."""
    micro_batch_tokens: int | None = None
    """Tokens of one forward and backward pass, where a step's do not fit in memory at once; gradients add up."""
    context: int = 128
    """Tokens of one context of the model."""
    buffer_tokens: int = 131_072
    """Tokens whose activations are shuffled together; memory is this times the widths of x and target, per layer."""
    cache: str | None = None
    """Folder that keeps the activations: computed once, then read by this and later runs; may grow large."""
    cache_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which --cache keeps them; auto loses nothing, bfloat16 takes half of float32's room and rounds."""
    lr: float | Literal["auto"] | dict[str, float] = "auto"
    """Learning rate: auto (by kind and width: docs/training.md), a number, or pairs of kind and number."""
    schedule: Literal["constant", "linear"] = "constant"
    """What the learning rate does after warm-up: stay, or fall linearly to nothing."""
    warmup_tokens: int | Literal["auto"] = "auto"
    """Tokens of linear warm-up; auto is a tenth of all tokens, at most the paper's 5,000 steps of 4,096."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    clip: float | None = None
    """Largest norm of a student's gradient; none by default."""
    aux_coefficient: float = 0.0
    """Weight of the auxiliary loss that revives dead latents; 1/32 is usual, 0 leaves it out."""
    aux_k: int = 512
    """Dead latents that the auxiliary loss activates for each token, at most."""
    dead_tokens: int = 1_000_000
    """A latent that has not fired for this many tokens counts as dead."""
    output_bias: Literal["zeros", "mean"] = "zeros"
    """Where the output bias begins: at zero, or at the mean target of the first block of activations."""
    normalize_input: bool = False
    """Train on inputs shifted to mean 0 and scaled to mean square 1; folded into the weights when saved."""
    special_positions: Literal["replace", "passthrough"] = "replace"
    """What evaluation does at BOS and padding: replace the MLP there too, or keep it."""
    eval_tokens: int = 131_072
    """Tokens of held-out text that evaluation uses, at most."""
    device: str = "auto"
    """Where to train: cpu, cuda, mps; auto takes the first accelerator there is."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products; weights stay float32. auto takes bfloat16 where the processor has it."""
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type in which the language model runs; auto is that of its files; products of float32 as --precision."""
    module: str | None = None
    """Path of the MLPs in a family that is not listed, as in model.layers.{layer}.mlp."""
    revision: str | None = None
    """Revision of the model on the hub."""
    split: str = "train"
    """Split of a hub dataset."""
    text_field: str = "text"
    """Field that holds the text in .jsonl, .json, .parquet and hub rows."""
    threads: int | None = None
    """Threads of the CPU; by default what OMP_NUM_THREADS says, or all cores."""
    recipe: str | None = None
    """Recipe whose values hold wherever none is given here; `--recipe list` shows them all."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks whose MLPs are decomposed.

        Raises:
            ValueError: If all are asked for and nobody has said yet how many the model has; see `of_blocks`.
        """
        if isinstance(self.layer, str):
            raise ValueError("layer must be numbers here; got all, and no model to count its blocks.")
        return self.layer

    def of_blocks(self, count: int) -> "TrainConfig":
        """Return this with the numbers of the layers in the place of `all`, for a model of so many blocks."""
        return self if self.layer != "all" else replace(self, layer=tuple(range(count)))

    @property
    def steps(self) -> int:
        """Number of optimiser steps, each of `batch_tokens`: as many as hold all tokens."""
        return -(-self.tokens // self.batch_tokens)

    @property
    def warmup(self) -> int:
        """Tokens of linear warm-up, `auto` resolved."""
        if isinstance(self.warmup_tokens, int):
            return self.warmup_tokens
        return min(PAPER_WARMUP, round(WARMUP_SHARE * self.tokens))

    def __post_init__(self) -> None:
        for name in ("layer", "kind", "k", "text", *Settings._fields):
            values = values_of(getattr(self, name))
            name = name.replace("_", "-")
            if not values:
                raise ValueError(f"{name} must name at least one; got none.")
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must name each only once; got {' '.join(map(str, values))}.")
        for kind in self.kind:
            require_kind(kind)
        for activation in values_of(self.activation):
            if activation != "auto":
                activation_function(activation)
        if self.init_from is not None and self.output_bias != "zeros":
            raise ValueError(
                f"output-bias must be zeros with init-from, whose layers bring their own; got {self.output_bias}."
            )
        if self.cache is None and self.cache_dtype != "auto":
            raise ValueError(f"cache-dtype must be auto without --cache; got {self.cache_dtype}; give --cache DIR.")
        self._check_numbers()
        self._check_selection()
        self._check_learning_rates()

    def _check_numbers(self) -> None:
        counts = {"k": min(self.k), "tokens": self.tokens, "expansion": self.expansion, "seeds": self.seeds}
        counts |= {"batch-tokens": self.batch_tokens, "buffer-tokens": self.buffer_tokens, "aux-k": self.aux_k}
        counts |= {"dead-tokens": self.dead_tokens, "eval-tokens": self.eval_tokens}
        optional = {"num-latents": self.num_latents, "hidden": self.hidden, "rank": self.rank}
        optional |= {"threads": self.threads, "micro-batch-tokens": self.micro_batch_tokens}
        for name, setting in optional.items():
            given = [value for value in values_of(setting) if isinstance(value, int)]
            counts |= {name: min(given)} if given else {}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
        fewest = min((value for value in values_of(self.num_latents) if value is not None), default=None)
        if fewest is not None and max(self.k) > fewest:
            raise ValueError(f"k must be at most num-latents, {fewest}; got {max(self.k)}.")
        if self.context < 2:
            raise ValueError(f"context must be at least 2 tokens; got {self.context}.")
        for name, value in {"seed": self.seed, "warmup-tokens": self.warmup_tokens}.items():
            if isinstance(value, int) and value < 0:
                raise ValueError(f"{name} must be at least 0; got {value}.")
        if self.seed + self.seeds > 2**63:
            raise ValueError(
                f"seed and the seeds that follow it must lie below 2**63; got {self.seed} and {self.seeds} of them. "
                "Choose a smaller --seed."
            )
        if isinstance(self.warmup_tokens, int) and self.warmup_tokens > self.tokens:
            raise ValueError(f"warmup-tokens must be at most tokens, {self.tokens}; got {self.warmup_tokens}.")
        for name, value in {"weight-decay": self.weight_decay, "aux-coefficient": self.aux_coefficient}.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number of at least 0; got {value}.")
        if self.micro_batch_tokens is not None and self.aux_coefficient:
            raise ValueError(
                f"micro-batch-tokens must be left out with aux-coefficient; got {self.micro_batch_tokens}. Its "
                "loss is a ratio of sums over the whole batch: leave out one of them, or lower --batch-tokens."
            )
        penalties = [value for value in values_of(self.shared_penalty) if not isinstance(value, str)]
        if not all(math.isfinite(value) and value >= 0 for value in penalties):
            raise ValueError(
                f"shared-penalty must be finite numbers of at least 0; got {' '.join(map(str, penalties))}."
            )
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip must be a finite positive number; got {self.clip}.")

    def _check_selection(self) -> None:
        selections = values_of(self.selection)
        coefficients = [value for value in values_of(self.l1_coefficient) if value is not None]
        if bool(coefficients) != (L1.name in selections):
            raise ValueError(
                f"l1-coefficient must be given with selection l1 and only with it; got "
                f"{' '.join(map(str, coefficients)) or 'none'} with selection {' '.join(selections)}."
            )
        if not all(math.isfinite(value) and value > 0 for value in coefficients):
            raise ValueError(f"l1-coefficient must be finite positive numbers; got {' '.join(map(str, coefficients))}.")
        if any(values_of(self.random_k)) and TopK.name not in selections:
            raise ValueError(f"random-k needs selection topk, where k is what varies; got {' '.join(selections)}.")
        if self.micro_batch_tokens is not None and BatchTopK.name in selections:
            raise ValueError(
                f"micro-batch-tokens must be left out with selection batch-topk; got {self.micro_batch_tokens}. It "
                "selects among all tokens of a batch: leave out one of them, or lower --batch-tokens."
            )

    def _check_learning_rates(self) -> None:
        if isinstance(self.lr, dict):
            for kind in self.lr:
                require_kind(kind)
            missing = [kind for kind in self.kind if kind not in self.lr]
            if missing:
                raise ValueError(f"lr must give a number for every kind; {', '.join(missing)} have none.")
        rates = self.lr.values() if isinstance(self.lr, dict) else [self.lr]
        for rate in rates:
            if not isinstance(rate, str) and not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"lr must be a positive number or auto; got {rate}.")


def require_read(config: TrainConfig, own: TrainConfig | None = None) -> None:
    """Check that every value of a setting that was given is read by a kind that was asked for.

    Args:
        config: What is asked for.
        own: A recipe's configuration, of which any part may be left unread: asking for fewer kinds of it is no mistake.

    Raises:
        ValueError: If a value is not read by any.
    """
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    for name in Settings._fields:
        known = {defaults[name], *(() if own is None else values_of(getattr(own, name)))}
        for value in values_of(getattr(config, name)):
            reading = kinds_that_read(name, value)
            if value in known or set(reading) & set(config.kind):
                continue
            raise ValueError(
                f"{name.replace('_', '-')} {value} is read by {', '.join(reading)} only; got it with kind "
                f"{' '.join(config.kind)}; leave it out, or ask for a kind that reads it with --kind."
            )


def require_evaluable(config: TrainConfig) -> None:
    """Check that the tokens that evaluation may use fill a context: what it is told after training, it is told before.

    Raises:
        ValueError: If they do not.
    """
    if config.eval_tokens < config.context:
        raise ValueError(
            f"eval-tokens must fill one context, {config.context} tokens, for the layers to be evaluated; got "
            f"{config.eval_tokens}."
        )
