"""From a configuration to a finished run: model, text, students, training, saved layers."""

import importlib.metadata
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from mxd.atomic import JSON
from mxd.bundled import held_out_modules
from mxd.checkpoint import Provenance, load_checkpoint, save_layer
from mxd.data.activations import ActivationStream
from mxd.data.text import TextSource, open_text
from mxd.data.tokens import TokenStream, open_tokens, special_tokens
from mxd.layers import SparseLayer
from mxd.metrics import ErrorSums, error_sums
from mxd.models import LanguageModel, MlpPair, MlpSite, find_mlp, fingerprint, load_language_model, mlp_pairs
from mxd.runs.run import create_run, is_finished, is_run, locked, mark_finished, reopen_run
from mxd.runs.snapshots import SnapshotError
from mxd.training.config import TrainConfig
from mxd.training.grid import StudentPlan, plan_students
from mxd.training.normalization import (
    InputNormalization,
    fold_input_normalization_,
    input_normalization,
    require_foldable,
)
from mxd.training.optimizer import Schedule
from mxd.training.resources import Resources, resolve_resources
from mxd.training.student import Student, StudentConfig
from mxd.training.train import SinkOpener, TrainingFault, train

KEPT_ON_RESUME = ("precision", "threads")
"""What a resumed run computes with as it began, whatever this machine would choose now."""
FORWARD_TOKENS = 4096
"""Tokens of one run of the language model."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a run needs, checked, with nothing written yet."""

    config: TrainConfig
    """What was asked for."""
    resources: Resources
    """What it computes with."""
    language_model: LanguageModel
    """The model whose MLPs are decomposed."""
    sites: Mapping[int, MlpSite]
    """Those MLPs, by block."""
    text: TextSource
    """Where the documents come from."""
    tokens: TokenStream
    """Contexts of training text."""
    students: Sequence[StudentPlan]
    """What is trained."""

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return -(-self.config.tokens // self.config.batch_tokens)

    @property
    def schedule(self) -> Schedule:
        """Learning rate over the steps."""
        warmup = self.config.warmup_tokens
        if isinstance(warmup, str):
            warmup = min(self.config.tokens // 25, 5000 * 4096)
        steps = -(-warmup // self.config.batch_tokens)
        return Schedule(steps=self.steps, warmup_steps=steps, shape=self.config.schedule)

    @property
    def buffer_bytes(self) -> int:
        """Memory of the shuffle buffer, in bytes."""
        item = next(cast(torch.nn.Module, self.language_model.model).parameters()).element_size()
        rows = max(self.config.batch_tokens, min(self.config.buffer_tokens, self.config.tokens))
        return sum(rows * (site.d_in + site.d_out) * item for site in self.sites.values())

    def description(self) -> dict[str, JSON]:
        """Return what run.json says: configuration, what was resolved, versions and identities."""
        versions = {name: importlib.metadata.version(name) for name in ("mxd", "torch", "transformers")}
        model = self.language_model
        return {
            "config": cast(JSON, asdict(self.config)),
            "resources": cast(JSON, asdict(self.resources)),
            "model": {
                "id": model.id,
                "revision": model.revision,
                "fingerprint": fingerprint(cast(torch.nn.Module, model.model)),
            },
            "text": cast(JSON, self.text.identity._asdict()),
            "modules": {str(layer): site.path for layer, site in self.sites.items()},
            "students": [cast(JSON, asdict(plan)) for plan in self.students],
            "steps": self.steps,
            "versions": {"python": sys.version.split()[0], **versions},
        }


def make_plan(config: TrainConfig, stored: Mapping[str, JSON] | None = None) -> Plan:
    """Load the model, read and check the text, and size the students; nothing is written but the token cache.

    Args:
        config: What is asked for.
        stored: The run.json of the run that is to be continued, whose commits of hub repositories are used again.

    Raises:
        ValueError: If anything asked for does not fit together.
        FileNotFoundError: If the model or a text file is not there.
    """
    dtype = "auto" if config.model_dtype == "auto" else cast(torch.dtype, getattr(torch, config.model_dtype))
    resources = resolve_resources(config, widest=0)
    torch.set_num_threads(resources.threads)
    model_commit, text_commit = (config.revision, None) if stored is None else _stored_commits(stored)
    language_model = load_language_model(config.model, revision=model_commit, dtype=dtype, device=resources.device)
    model = language_model.model
    sites = {layer: find_mlp(cast(torch.nn.Module, model), layer, config.module) for layer in config.layer}
    resources = resolve_resources(config, widest=max(site.d_in for site in sites.values()))
    students = plan_students(config, sites)
    _check_beginnings(config, students)
    require_context(model, config.context)
    text = open_text(
        config.text,
        text_field=config.text_field,
        split=config.split,
        revision=text_commit,
        held_out_modules=held_out_modules(),
    )
    tokens = open_tokens(
        text,
        language_model.tokenizer,
        context=config.context,
        batch_tokens=config.batch_tokens,
        vocab_size=vocabulary_size(model),
        seed=config.seed,
    )
    return Plan(
        config=config,
        resources=resources,
        language_model=language_model,
        sites=sites,
        text=text,
        tokens=tokens,
        students=students,
    )


def decompose(
    plan: Plan, out: Path, *, resume: bool = False, snapshot_every: float = 600.0, sinks: Sequence[SinkOpener] = ()
) -> None:
    """Train a plan's students and write them to `out/layers/<layer>/<id>`.

    Args:
        plan: What to train.
        out: The run's folder; it must not exist, unless resuming.
        resume: Whether to continue the run in `out`; without a snapshot there it begins anew.
        snapshot_every: Seconds between snapshots.
        sinks: Where metrics go besides `metrics.jsonl`; opened when training begins.

    Raises:
        ValueError: If `out` exists and `resume` is not set, or holds a run of another configuration.
        TrainingFault: If a number is not finite, or the run's files cannot be written.
        SnapshotError: If a snapshot cannot be written.
        TrainingInterrupted: If a signal stopped the run; a snapshot was written.
    """
    description = plan.description()
    if resume and is_run(out):
        stored = reopen_run(out, description, ignore=[f"resources.{name}" for name in KEPT_ON_RESUME])
        if is_finished(out):
            return
        plan = replace(plan, resources=_stored_resources(plan.resources, stored))
    else:
        create_run(out, description)
    try:
        with locked(out):
            _train_and_save(plan, out, snapshot_every, sinks)
    except SnapshotError:
        raise
    except OSError as error:
        raise TrainingFault(
            f"{error}; what {out} holds is intact: remove the cause, then continue with --resume."
        ) from error


def _train_and_save(plan: Plan, out: Path, snapshot_every: float, sinks: Sequence[SinkOpener]) -> None:
    torch.set_num_threads(plan.resources.threads)
    stream = activation_stream(plan)
    students = [_student(plan, student) for student in plan.students]
    if plan.config.normalize_input or plan.config.output_bias == "mean":
        _start_from_activations(plan, students)
    train(
        students,
        stream,
        out,
        batch_tokens=plan.config.batch_tokens,
        schedule=plan.schedule,
        autocast=plan.resources.autocast,
        snapshot_every=snapshot_every,
        sinks=sinks,
    )
    for student, student_plan in zip(students, plan.students, strict=True):
        if student.normalization is not None:
            fold_input_normalization_(student.network, student.normalization)
        folder = out / "layers" / str(student.layer) / student.id
        save_layer(student.network, folder, _provenance(plan, student_plan))
    mark_finished(out, plan.steps)


def activation_stream(plan: Plan) -> ActivationStream:
    """Return the batches of a plan: shuffled activations of every wanted layer."""
    config, model = plan.config, cast(torch.nn.Module, plan.language_model.model)

    def pairs(contexts: Int[Tensor, "n context"]) -> dict[int, MlpPair]:
        return mlp_pairs(model, contexts.to(plan.resources.device), list(plan.sites), module_path=config.module)

    return ActivationStream(
        pairs,
        plan.tokens,
        widths={layer: (site.d_in, site.d_out) for layer, site in plan.sites.items()},
        batch_tokens=config.batch_tokens,
        buffer_tokens=config.buffer_tokens,
        total_tokens=config.tokens,
        forward_contexts=max(1, FORWARD_TOKENS // config.context),
        special_ids=special_tokens(plan.language_model.tokenizer),
        seed=config.seed,
        dtype=next(cast(torch.nn.Module, plan.language_model.model).parameters()).dtype,
        device=plan.resources.device,
    )


def vocabulary_size(model: Any) -> int:
    """Return the number of token ids that a language model can read."""
    return int(model.get_input_embeddings().weight.shape[0])


def require_context(model: Any, context: int) -> None:
    """Check that a context fits the model's positions.

    Raises:
        ValueError: If it does not.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and context > longest:
        raise ValueError(f"context must be at most {longest}, the model's number of positions; got {context}.")


def _stored_commits(stored: Mapping[str, JSON]) -> tuple[str | None, str | None]:
    model, text = (cast(Mapping[str, Any], stored[name]) for name in ("model", "text"))
    return model["revision"], text["revision"]


def _stored_resources(resources: Resources, stored: Mapping[str, JSON]) -> Resources:
    known = cast(Mapping[str, Any], stored["resources"])
    return replace(resources, **{name: known[name] for name in KEPT_ON_RESUME if name in known})


def _check_beginnings(config: TrainConfig, students: Sequence[StudentPlan]) -> None:
    """Check, before anything is written, that every student can begin as the configuration says."""
    for student in students:
        if config.normalize_input:
            require_foldable([student.skeleton()])
        if config.init_from is not None:
            _initial_layer(Path(config.init_from), student)


def _student(plan: Plan, student: StudentPlan) -> Student:
    config = plan.config
    network = student.build()
    if config.init_from is not None:
        network = _initial_layer(Path(config.init_from), student)
    return Student(
        student.id,
        student.layer,
        network.to(plan.resources.device).train(),
        StudentConfig(
            lr=student.lr,
            weight_decay=config.weight_decay,
            clip=config.clip,
            aux_coefficient=config.aux_coefficient,
            aux_k=config.aux_k,
            dead_tokens=config.dead_tokens,
        ),
    )


def _initial_layer(run: Path, student: StudentPlan) -> SparseLayer:
    folder = run / "layers" / str(student.layer) / student.id
    layer = load_checkpoint(folder).layer
    if layer.config != student.network:
        differing = [
            field.name
            for field in fields(cast(Any, student.network))
            if getattr(layer.config, field.name, None) != getattr(student.network, field.name)
        ]
        raise ValueError(
            f"{folder} must have the configuration of {student.id} to begin from; {', '.join(differing) or 'its kind'} "
            "differ. Ask for the same sizes, or begin without --init-from."
        )
    return layer.float()


def _start_from_activations(plan: Plan, students: Sequence[Student]) -> None:
    """Set input normalisations and output biases from the first block, which training sees again from its start."""
    beginning = plan.tokens.state()
    contexts = min(plan.config.buffer_tokens, plan.config.tokens) // plan.config.context
    model = cast(torch.nn.Module, plan.language_model.model)
    sums: dict[int, list[ErrorSums]] = {}
    for chunk in plan.tokens.take(max(1, contexts)).split(max(1, FORWARD_TOKENS // plan.config.context)):
        pairs = mlp_pairs(model, chunk.to(plan.resources.device), list(plan.sites), module_path=plan.config.module)
        for layer, pair in pairs.items():
            here = [error_sums(rows, rows) for rows in (tensor.float().flatten(0, 1) for tensor in pair)]
            sums[layer] = [old + new for old, new in zip(sums[layer], here, strict=True)] if layer in sums else here
    plan.tokens.restore(beginning)
    for layer, both in sums.items():
        if not all(math.isfinite(of_one.square) for of_one in both):
            raise TrainingFault(
                f"activations must be finite; one of layer {layer} is NaN or infinite before step 1. "
                "Run the model in a wider type (--model-dtype float32)."
            )
    for student in students:
        inputs, targets = sums[student.layer]
        bias = student.network.get_parameter("b_dec")
        if plan.config.normalize_input:
            mean, scale = input_normalization(inputs)
            student.normalization = InputNormalization(mean.to(bias.device), scale.to(bias.device))
            if plan.config.init_from is not None:
                fold_input_normalization_(student.network, student.normalization.inverse())
        if plan.config.output_bias == "mean":
            with torch.no_grad():
                bias.copy_(targets.target / targets.tokens)


def _provenance(plan: Plan, student: StudentPlan) -> Provenance:
    return Provenance(
        model=plan.language_model.id,
        revision=plan.language_model.revision,
        layer=student.layer,
        module_path=plan.sites[student.layer].path,
        text=plan.text.name,
        tokens_trained=plan.steps * plan.config.batch_tokens,
        seed=student.seed,
        init=plan.config.init,
        special_positions=plan.config.special_positions,
        mxd_version=importlib.metadata.version("mxd"),
    )
