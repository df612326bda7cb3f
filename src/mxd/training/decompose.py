"""From a configuration to a finished run: model, text, students, training, saved layers."""

import importlib.metadata
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import torch

from mxd.atomic import JSON
from mxd.bundled import held_out_modules
from mxd.checkpoint import Checkpoint, Provenance, layer_folder, load_checkpoint, save_layer
from mxd.data.prefetch import Prefetch
from mxd.data.text import TextSource, open_text
from mxd.data.tokens import open_tokens
from mxd.edits import edits_of, with_edits
from mxd.kernels.backends import using_backend
from mxd.models import (
    MlpSite,
    find_mlp,
    load_language_model,
    mlp_pairs,
    mlp_weights,
    most_positions,
    num_layers,
    resolve_device,
    vocabulary_size,
)
from mxd.runs.faults import TrainingFault
from mxd.runs.places import finding_model, finding_text
from mxd.runs.run import (
    SNAPSHOTS,
    create_run,
    is_finished,
    is_run,
    locked,
    mark_finished,
    read_configuration,
    reopen_run,
    require_command,
    require_place,
)
from mxd.runs.snapshots import SnapshotError, has_snapshot
from mxd.training.config import TrainConfig, require_evaluable, require_read
from mxd.training.continuing import MAY_DIFFER, Commits, stored_commits, stored_resources, with_places
from mxd.training.grid import StudentPlan, plan_students
from mxd.training.normalization import fold_input_normalization_, require_foldable
from mxd.training.plan import Plan, parameter_dtype
from mxd.training.resources import resolve_resources, resolve_threads, usable_cores
from mxd.training.streams import activation_stream, open_cache, start_from_activations
from mxd.training.student import Student, StudentConfig
from mxd.training.train import SinkOpener, train

logger = logging.getLogger(__name__)


def make_plan(config: TrainConfig, stored: Mapping[str, JSON] | None = None) -> Plan:
    """Load the model, read and check the text, and size the students; nothing is written but the token cache.

    Args:
        config: What is asked for.
        stored: The run.json of the run that is to be continued. What `config` names as it does is looked for where that
            run found it, and read at the same commit of the hub.

    Raises:
        ValueError: If anything asked for does not fit together.
        FileNotFoundError: If the model or a text file is not there.
    """
    config, commits = _asked(config, stored)
    dtype = "auto" if config.model_dtype == "auto" else cast(torch.dtype, getattr(torch, config.model_dtype))
    device = resolve_device(config.device)
    torch.set_num_threads(resolve_threads(config.threads))
    with finding_model("The run", config.model, is_given=stored is None):
        language_model = load_language_model(config.model, revision=commits.model, dtype=dtype, device=device)
    if stored is not None:
        # Its layers say what their model is called, and not where it happens to be.
        language_model = language_model._replace(id=cast("dict[str, str]", stored["model"])["id"])
    model = language_model.module
    config = config.of_blocks(num_layers(model)) if config.layer == "all" else config
    sites = {layer: find_mlp(model, layer, config.module) for layer in config.layers}
    _require_runnable(model, config, device)
    students = plan_students(config, sites)
    _check_beginnings(config, students, sites)
    # A run goes on from its snapshots: what it began from need not be there any more.
    sources = _sources(config, students) if stored is None else cast(Mapping[str, str], stored.get("sources", {}))
    require_context(model, config.context)
    text = _open_text(config, commits, is_given=stored is None)
    tokens = open_tokens(
        text,
        language_model.tokenizer,
        context=config.context,
        batch_tokens=config.batch_tokens,
        vocab_size=vocabulary_size(model),
        seed=config.seed,
    )
    widest = max(site.d_in for site in sites.values())
    resources = resolve_resources(config, device, widest, parameter_dtype(language_model))
    if stored is not None:
        resources = stored_resources(resources, stored)
    cache = open_cache(config, language_model, sites, text, tokens, resources)
    if cache is not None and cache.coverage().bytes_missing == 0:
        # Then the model does not run, and prefetching pays where a core is left over: a second thread on a core that a
        # student's products use makes all their threads wait for it.
        resources = replace(resources, prefetch=resources.prefetch or resources.threads < usable_cores())
    return Plan(
        config=config,
        resources=resources,
        language_model=language_model,
        sites=sites,
        text=text,
        tokens=tokens,
        students=students,
        cache=cache,
        sources=sources,
    )


def _asked(config: TrainConfig, stored: Mapping[str, JSON] | None) -> tuple[TrainConfig, Commits]:
    """Return what is asked for, checked, and at which commits; of a run that goes on, where and as it is."""
    if stored is not None:
        require_command(stored, "train")
        return with_places(config, stored), stored_commits(config, stored)
    require_evaluable(config)
    if config.recipe is None:
        # Whoever resolved a recipe knows which settings are its own.
        require_read(config)
    return config, Commits(config.revision, None)


def _require_runnable(model: torch.nn.Module, config: TrainConfig, device: str) -> None:
    """Run a module that a person named: whether it is called as an MLP is, and as wide as it seems, shows only then."""
    if config.module is not None:
        tokens = torch.zeros(1, 2, dtype=torch.long, device=device)
        mlp_pairs(model, tokens, config.layers, module_path=config.module)


def _open_text(config: TrainConfig, commits: Commits, *, is_given: bool) -> TextSource:
    with finding_text("The run", is_given=is_given):
        return open_text(
            config.text,
            text_field=config.text_field,
            split=config.split,
            revision=commits.text,
            held_out_modules=held_out_modules(),
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
        TrainingInterrupted: If a signal stopped the run; a snapshot was written, unless no step was made.
    """
    description = plan.description()
    require_place(out, resume)
    # Locked before it is made: of two processes that begin at once, one makes the run and the other is refused.
    with locked(out):
        if resume and is_run(out):
            require_command(read_configuration(out), "train")
            stored = reopen_run(out, description, ignore=MAY_DIFFER)
            if is_finished(out):
                return
            plan = _continued(plan, out, stored)
        else:
            create_run(out, description)
        try:
            _train_and_save(plan, out, snapshot_every, sinks)
        except SnapshotError:
            raise
        except OSError as error:
            raise TrainingFault(
                f"{error}; what {out} holds is intact: remove the cause, then continue with --resume."
            ) from error


def _continued(plan: Plan, out: Path, stored: Mapping[str, JSON]) -> Plan:
    """Return the plan with what the run computes with."""
    resources = stored_resources(plan.resources, stored)
    if plan.cache is not None and resources.model_precision != plan.resources.model_precision:
        raise ValueError(
            f"{out} began with a model that multiplies in {resources.model_precision}, and the plan's cache is of "
            f"one that does in {plan.resources.model_precision}; make the plan with stored, the run's run.json."
        )
    return replace(plan, resources=resources)


def _train_and_save(plan: Plan, out: Path, snapshot_every: float, sinks: Sequence[SinkOpener]) -> None:
    torch.set_num_threads(plan.resources.threads)
    stream = activation_stream(plan)
    # A snapshot holds all weights and normalisations: what they began from is neither read nor computed again.
    begins = not has_snapshot(out / SNAPSHOTS)
    students = [_student(plan, student, begins=begins) for student in plan.students]
    if begins and (plan.config.normalize_input or plan.config.output_bias == "mean"):
        start_from_activations(plan, students)
    with ExitStack() as stack:
        # So that the plan can be trained again: its text then begins where it began.
        stack.callback(plan.tokens.restore, plan.tokens.state())
        stack.enter_context(using_backend(plan.resources.kernels))
        train(
            students,
            stack.enter_context(Prefetch(stream)) if plan.resources.prefetch else stream,
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
        save_layer(student.network, layer_folder(out, student_plan.name), _provenance(plan, student_plan))
    mark_finished(out, plan.steps)


def require_context(model: torch.nn.Module, context: int) -> None:
    """Check that a context fits the model's positions.

    Raises:
        ValueError: If it does not.
    """
    longest = most_positions(model)
    if longest is not None and context > longest:
        raise ValueError(f"context must be at most {longest}, the model's number of positions; got {context}.")


def _check_beginnings(config: TrainConfig, students: Sequence[StudentPlan], sites: Mapping[int, MlpSite]) -> None:
    """Check, before anything is written, that every student can begin as the configuration says."""
    inheriting = [student for student in students if _takes_over(config, student)]
    weights = {layer: mlp_weights(sites[layer]) for layer in {student.layer for student in inheriting}}
    for student in inheriting:
        _check_taking_over(config, student, sites[student.layer])
        student.skeleton().begin_from(weights[student.layer])
    for student in students:
        if config.normalize_input:
            require_foldable([student.skeleton()])


def _sources(config: TrainConfig, students: Sequence[StudentPlan]) -> dict[str, str]:
    """Return the digests of the weights that students take from another run, checked."""
    if config.init_from is None:
        return {}
    found: dict[str, str] = {}
    for student in students:
        checkpoint = _initial_layer(Path(config.init_from), student)
        found[student.name] = checkpoint.weights_sha256
        if edits_of(checkpoint.layer):
            logger.warning(
                "%s/layers/%s is edited; training begins from its weights, without the edits.",
                config.init_from,
                student.name,
            )
    return found


def _takes_over(config: TrainConfig, student: StudentPlan) -> bool:
    return student.init == "model" and config.init_from is None


def _check_taking_over(config: TrainConfig, student: StudentPlan, site: MlpSite) -> None:
    asked = getattr(student.network, "activation", site.activation)
    if asked != site.activation:
        raise ValueError(
            f"activation must be the model's own, {site.activation}, for {student.kind} to begin as its MLP; "
            f"got {asked}. Leave --activation at auto, or begin with --init paper."
        )
    if config.output_bias == "mean" and student.shared_penalty is not None:
        raise ValueError(
            f"output-bias must be zeros where {student.kind} begins with init model, which brings the MLP's own; "
            "got mean. Leave it at zeros, or begin with --init paper."
        )


def _student(plan: Plan, student: StudentPlan, *, begins: bool = True) -> Student:
    config = plan.config
    network = student.build()
    if begins and _takes_over(config, student):
        network.begin_from(mlp_weights(plan.sites[student.layer]))
    if begins and config.init_from is not None:
        checkpoint = _initial_layer(Path(config.init_from), student)
        known = plan.sources.get(student.name, checkpoint.weights_sha256)
        if checkpoint.weights_sha256 != known:
            raise ValueError(
                f"{config.init_from}/layers/{student.name} must hold the weights that the run was started from, "
                f"SHA-256 {known}; got {checkpoint.weights_sha256}. Restore them, or name another --out."
            )
        network = with_edits(checkpoint.layer, ()).float()
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
            l1_coefficient=student.l1_coefficient or 0.0,
            inherits=student.init == "model",
            shared_penalty=student.shared_penalty or 0.0,
            random_k_seed=student.seed if student.random_k else None,
            micro_batch_tokens=config.micro_batch_tokens,
        ),
    )


def _initial_layer(run: Path, student: StudentPlan) -> Checkpoint:
    folder = layer_folder(run, student.name)
    checkpoint = load_checkpoint(folder)
    layer = checkpoint.layer
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
    return checkpoint


def _provenance(plan: Plan, student: StudentPlan) -> Provenance:
    return Provenance(
        model=plan.language_model.id,
        revision=plan.language_model.revision,
        layer=student.layer,
        module_path=plan.sites[student.layer].path,
        text=plan.text.name,
        tokens_trained=plan.steps * plan.config.batch_tokens,
        seed=student.seed,
        init=student.init,
        special_positions=plan.config.special_positions,
        mxd_version=importlib.metadata.version("mxd"),
    )
