"""The step ``distill``: a small student learns from what a teacher says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from specs.schema.base import Task
from specs.schema.steps.distill import DistillSpec, StudentSpec
from tasks.compress import heard, teach
from tasks.compress.fit import alike, label_order, match, student_config
from tasks.compress.kept import Kept, identity
from tasks.compress.lessons import Lessons, lessons
from tasks.compress.teach import Comparison, Inside, Teaching, add_projections, plan_inside, remove_projections
from tasks.compress.vocabularies import Aligned, align
from tasks.compress.written import own_batches
from tasks.context import Artifact, StepContext, StepError, StepResult
from tasks.models.applications import family_of
from tasks.registry import step

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from tasks.data.encoded import Encoded
    from tasks.finetune.loop import Trained

_WEIGHTS, _PROJECTIONS, _SAMPLE = 0x73747564, 0x70726F6A, 0x736D706C
"""Salts of the streams for random weights, for projections and for the examples that show what matters."""


def look(spec: DistillSpec, config: Mapping[str, Any], task: Task, max_length: int) -> tuple[list[str], list[str]]:
    """What can be known before a run: whether the student's configuration fits the model that comes in."""
    problems: list[str] = []
    if spec.config is not None:
        try:
            student_config(spec.config, config, task)
        except StepError as error:
            problems.append(str(error))
    if spec.student is not None:
        problems += _unfit(spec.student, config)
    problems += _cannot_write(spec, config)
    return problems, []


def _cannot_write(spec: DistillSpec, config: Any) -> list[str]:
    """What is asked of a model that writes, where none does."""
    asked = [name for name, is_so in (("data", spec.data != "training"), ("on_policy", spec.on_policy)) if is_so]
    if family_of(config) != "ctc":
        return []
    return [
        f"{name}: a model of CTC names each frame by itself and writes nothing that it could learn from; leave {name} "
        "out"
        for name in asked
    ]


def _unfit(student: StudentSpec, config: Mapping[str, Any]) -> list[str]:
    """Sizes above those of the model that comes in, which no teacher made from it has, and those that go together in
    none."""
    from tasks.compress.student import no_decoder
    from tasks.models.patterns import PATTERNS

    kind, hidden, heads = config["model_type"], student.hidden, student.heads
    pattern = PATTERNS.get(kind)
    problems: list[str] = []
    if pattern is not None and student.decoder_layers and all(stack.role != "decoder" for stack in pattern.stacks):
        problems.append(no_decoder(kind))
    if pattern is not None and heads and hidden and hidden % heads and "head_size" not in pattern.stacks[0].fields:
        problems.append(f"student.heads: {heads} heads do not divide the width {hidden}; write a divisor of it")
    for stack in pattern.stacks if pattern is not None else ():
        own = stack.role == "decoder" and student.decoder_layers is not None
        asked = {"depth": "decoder_layers" if own else "layers", "width": "hidden", "heads": "heads", "ffn": "ffn"}
        for what, name in asked.items():
            value, limit = getattr(student, name), config.get(stack.fields[what])
            if value is not None and isinstance(limit, int) and value > limit:
                problems.append(f"student.{name} {value} is more than the model's {limit}; write at most {limit}")
    return list(dict.fromkeys(problems))


@step(DistillSpec, libraries=("numpy", "tokenizers", "torch", "transformers"), preflight=look)
def distill(*models: Artifact, spec: DistillSpec, ctx: StepContext) -> StepResult:
    """Train a student on the loss ``alpha · CE + (1 − alpha) · T² · KL`` (Hinton et al., 1503.02531) and keep the
    weights with the lowest validation loss on held-out training data.

    Args:
        models: the student's folder where the spec takes one, and the teacher's.
        spec: the student, what is compared, the data and the training.
        ctx: where and on what.

    Raises:
        StepError: the two do not go together, the student cannot be made, or the training fails.
    """
    from tasks.finetune import finetune
    from tasks.models import load, save

    folder = models[-1].path
    teacher = load(folder, ctx.device)
    for problem in _cannot_write(spec, teacher.config):
        raise StepError(problem)
    student = _student(models, teacher, spec, ctx)
    data = finetune.training_data(student.network, student.artifact, ctx)
    alike(student.network, teacher)
    aligned = align(student.artifact.path, folder, data, spec, ctx)
    match(student.network, teacher, aligned, data, ctx)
    about = identity(folder)
    taught = lessons(data, teacher, about, student.artifact.path, spec, ctx)
    inside = plan_inside(
        student.network,
        teacher,
        spec.hidden.weight if spec.hidden else None,
        spec.relations.weight if spec.relations else None,
        spec.relations.heads if spec.relations else None,
        spec.relations.layer if spec.relations else None,
    )
    add_projections(student.network, teacher, inside, ctx.generator(_PROJECTIONS))
    how = _comparison(student.network, teacher, data, aligned, spec, ctx)
    asked = aligned.data or taught.data
    said = heard.listen(teacher, about, asked, how, spec.batch_size, ctx) if spec.cached else None
    trained = _train(student.network, teacher, taught, how, inside, said, spec, ctx)
    remove_projections(student.network)
    taught_on = f"on {_counted(taught.parts)}"
    network = student.network.to("cpu")
    save(network, ctx.out, tokenizer_from=student.artifact.path)
    return StepResult(
        kind="model",
        touched=tuple(name for name, parameter in network.named_parameters() if parameter.requires_grad),
        left={name: "frozen" for name, parameter in network.named_parameters() if not parameter.requires_grad},
        summary="; ".join(filter(None, (student.about, aligned.about, finetune.summary(trained), taught_on))),
        properties=_properties(network, teacher, taught, spec) | finetune.properties(trained),
        warnings=finetune.warnings(trained),
    )


@dataclass(frozen=True)
class _Student:
    """A student on the device, a folder with its configuration and tokenizer, and what it is."""

    network: nn.Module
    artifact: Artifact
    about: str


def _student(models: tuple[Artifact, ...], teacher: nn.Module, spec: DistillSpec, ctx: StepContext) -> _Student:
    from tasks.models import load, save
    from tasks.models.load import copy_tokenizer

    if len(models) == 2:
        network = load(models[0].path, ctx.device)
        return _Student(network, models[0], f"the student has {_count(network)} parameters")
    folder = ctx.work / "student"
    network = _fresh(models[0], teacher, spec, ctx) if spec.config is not None else _cut(models[0], teacher, spec, ctx)
    save(network, folder)
    copy_tokenizer(models[0].path, folder)
    origin = "random weights" if spec.config is not None else "cut out of the teacher"
    about = f"the student has {_count(network)} parameters, {origin}"
    return _Student(network.to(ctx.device), replace(models[0], path=folder), about)


def _fresh(teacher: Artifact, network: nn.Module, spec: DistillSpec, ctx: StepContext) -> nn.Module:
    """A student from the spec's configuration, with random weights."""
    import copy

    import torch

    from tasks.models.configuration import build_model, check_length
    from tasks.models.load import read_config

    assert spec.config is not None
    config = student_config(spec.config, read_config(teacher.path), ctx.task)
    check_length(config, ctx.data, from_config=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ctx.generator(_WEIGHTS).initial_seed())
        student = build_model(config, ctx.task)
    if hasattr(network, "generation_config") and hasattr(student, "generation_config"):
        student.generation_config = copy.deepcopy(network.generation_config)
    return student


def _cut(teacher: Artifact, network: nn.Module, spec: DistillSpec, ctx: StepContext) -> nn.Module:
    """A student that is cut out of the teacher."""
    from tasks.compress.calibrate import sample
    from tasks.compress.student import build, cuts_widths
    from tasks.models.load import check_plain

    check_plain(network)
    assert spec.student is not None
    data = None
    if cuts_widths(spec.student):
        ctx.note("looking at what matters in the teacher")
        data = sample(teacher, spec.student.calibration_samples, ctx)
    network.to("cpu")
    student = build(network, spec.student, data)
    network.to(ctx.device)
    return student


def _comparison(
    student: nn.Module, teacher: nn.Module, data: Encoded, aligned: Aligned, spec: DistillSpec, ctx: StepContext
) -> Comparison:
    import torch

    from tasks.finetune.objective import weights_of_classes

    order: Any = label_order(student, teacher) if ctx.task == "text-classification" else aligned.writes
    return Comparison(
        task=ctx.task,
        family=family_of(student.config),  # type: ignore[arg-type]
        alpha=spec.alpha,
        temperature=spec.temperature,
        kind=spec.divergence,
        skew=spec.skew,
        top_k=spec.top_k,
        smoothing=spec.label_smoothing,
        class_weights=weights_of_classes(data, spec),
        several=data.labels is not None and data.labels.ndim == 2,
        order=None if order is None else torch.as_tensor(order, device=ctx.device),
        reads=None if aligned.reads is None else torch.as_tensor(aligned.reads, device=ctx.device),
    )


def _train(
    student: nn.Module,
    teacher: nn.Module,
    taught: Lessons,
    how: Comparison,
    inside: Inside,
    said: Kept | None,
    spec: DistillSpec,
    ctx: StepContext,
) -> Trained:
    import torch

    from tasks.finetune.loop import train

    needed = said is None or spec.on_policy is not None
    write = own_batches(ctx.task, spec.on_policy.temperature) if spec.on_policy else None
    loss = Teaching(how, teacher if needed else None, inside, write, spec.on_policy.share if spec.on_policy else 0.0)

    def beside(rows: np.ndarray) -> dict[str, torch.Tensor]:
        found = {teach.LABELLED: torch.from_numpy(taught.labelled[rows]).to(ctx.device)}
        return found | (heard.beside(said, rows, ctx.device) if said is not None else {})

    ctx.note("training the student")
    return train(student, taught.data, spec, ctx, loss=loss, roles=taught.roles, beside=beside)


def _properties(student: nn.Module, teacher: nn.Module, taught: Lessons, spec: DistillSpec) -> dict[str, Any]:
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (student, teacher)]
    about = {"student_parameters": counts[0], "teacher_parameters": counts[1], "cached": spec.cached}
    return {"distillation": about | {"examples": dict(taught.parts)}}


def _counted(parts: Mapping[str, int]) -> str:
    return " and ".join(f"{count} {name}" for name, count in parts.items()) + " examples"


def _count(model: nn.Module) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{count / 1e6:.3g} M" if count >= 1e6 else f"{count / 1e3:.3g} k"
