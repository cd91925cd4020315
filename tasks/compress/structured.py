"""Structured pruning: the same kind of model with fewer heads, channels, hidden numbers or blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specs.schema.base import Task
from specs.schema.steps.prune import PruneSpec
from specs.schema.units import Keep
from tasks.compress import cut, depth, importance, principal, search, width
from tasks.context import Artifact, StepContext, StepError, StepResult

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tasks.data.encoded import Encoded
    from tasks.models.applications import Family

SAME = 1e-3
"""The largest difference between the logits of the written model and of the one in memory, relative to the largest."""

CHECKED_EXAMPLES = 4


@dataclass(frozen=True)
class Way:
    """One way to make a model smaller.

    Args:
        left: what it leaves alone, with the reason.
        shape: from a share to the fields of the configuration that it changes.
        config: the configuration of a model of a shape.
        scores: the importance of what may go, from training examples.
        cut: the model of a shape and what was kept of what, given the scores.
        said: what there is to record of a shape, given the scores, and to warn of.
    """

    left: Mapping[str, str]
    shape: Callable[[float], dict[str, int]]
    config: Callable[[Mapping[str, int]], Any]
    scores: Callable[[Encoded, StepContext], Mapping[str, Any]]
    cut: Callable[[Mapping[str, Any], Mapping[str, int]], tuple[nn.Module, dict[str, list[int]]]]
    said: Callable[[Mapping[str, Any], Mapping[str, int]], tuple[dict[str, Any], list[str]]] = lambda *_: ({}, [])


def preflight(spec: PruneSpec, config: Mapping[str, Any], task: Task) -> tuple[list[str], list[str]]:
    """What stops the step, and what does not but matters, known from the configuration of the model alone."""
    import torch
    from transformers import AutoConfig

    from tasks.models.applications import auto_for

    fields = {name: value for name, value in config.items() if name != "model_type"}
    try:
        with torch.device("meta"):
            model = auto_for(task, config["model_type"]).from_config(
                AutoConfig.for_model(config["model_type"], **fields)
            )
        way = _WAYS[spec.method](model, spec)
        assert isinstance(spec.keep, Keep)
        if spec.keep.unit != "seconds":
            search.by_size(way, model, spec.keep)
    except StepError as error:
        return [str(error)], []
    return [], [f"hidden_by: pca: {name}, which is tied, becomes a table of its own" for name in _untied(model, spec)]


def refuses(spec: PruneSpec, family: Family) -> str | None:
    """Why no model of ``family`` can be made smaller so; None where one can."""
    has = ("encoder", "decoder") if family == "encoder-decoder" else ("encoder",) if family == "ctc" else (family,)
    for role in spec.stacks:
        if role not in has:
            return f"stacks: a model that is {family} has no {role}; write stacks: [{', '.join(has)}], or leave it out"
    return None


def prune_structure(model: Artifact, spec: PruneSpec, ctx: StepContext) -> StepResult:
    """Make a model smaller by whole heads, channels, hidden numbers or blocks, and with ``recover`` train it.

    What stays is copied as it was; the result is an ordinary model of the same type, which plain transformers loads.
    It is written, loaded again, and compared with the one in memory.

    Raises:
        StepError: the configuration cannot say the smaller model, ``keep`` asks for the whole model or for less than
            can stay, a weight is not a number, or the training fails.
    """
    from tasks.compress.calibrate import sample
    from tasks.models import load, save
    from tasks.models.check import grown, weights_in
    from tasks.models.load import check_plain

    network = load(model.path, ctx.device)
    check_plain(network)
    way = _WAYS[spec.method](network, spec)
    keep = spec.keep
    assert isinstance(keep, Keep)
    fields = None if keep.unit == "seconds" else search.by_size(way, network, keep)
    data = sample(model, spec.calibration_examples, ctx)
    ctx.note("measuring what is important")
    scores = way.scores(data, ctx)
    network.to("cpu")
    properties: dict[str, Any] = {}
    warnings: list[str] = []
    if fields is None:
        ctx.note("measuring candidates")
        fields, times = search.by_time(way, scores, data, keep, ctx)
        properties["candidates"] = times
        warnings.append("the shape was chosen by measured times: another machine, or a busy one, may choose another")
    whole = way.shape(1.0)
    smaller, kept = way.cut(scores, fields)
    recorded, told = way.said(scores, fields)
    properties, warnings = properties | recorded, [*warnings, *told]
    del network
    summary = "; ".join(f"{name} {whole[name]} -> {value}" for name, value in fields.items() if value != whole[name])
    summary = f"{spec.method} by {spec.importance}: {summary}"
    if "variance_kept" in properties:
        summary += f", {properties['variance_kept']:.1%} of the variance between the blocks kept"
    if spec.recover is not None:
        trained_summary, trained, more = recover(smaller, model, spec, ctx)
        summary, properties, warnings = f"{summary}; {trained_summary}", properties | trained, [*warnings, *more]
    save(smaller, ctx.out, tokenizer_from=model.path)
    prove_written(smaller, data, ctx)
    sizes = weights_in(model.path), weights_in(ctx.out)
    if sizes[1].parameters >= sizes[0].parameters:
        raise StepError(f"the model has {sizes[1].parameters} parameters and had {sizes[0].parameters}; keep less")
    return StepResult(
        kind="model",
        touched=tuple(sorted(kept)),
        left=way.left,
        summary=f"{summary}; parameters {sizes[0].parameters} -> {sizes[1].parameters}",
        properties=properties
        | {
            "shape": {name: [whole[name], value] for name, value in fields.items()},
            "kept": kept,
            "parameters": sizes[1].parameters,
            "parameters_before": sizes[0].parameters,
            "weight_bytes": sizes[1].bytes,
            "weight_bytes_before": sizes[0].bytes,
        },
        warnings=(*warnings, *grown(*sizes)),
    )


def recover(
    network: nn.Module, model: Artifact, spec: PruneSpec, ctx: StepContext
) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """Train ``network`` in place on the data as ``model``'s tokenizer encodes it: summary, properties and warnings."""
    from tasks.finetune import finetune
    from tasks.finetune.loop import train

    assert spec.recover is not None
    trained = train(network, finetune.training_data(network, model, ctx), spec.recover, ctx)
    network.to("cpu")
    return finetune.summary(trained), finetune.properties(trained), finetune.warnings(trained)


def prove_written(network: nn.Module, data: Encoded, ctx: StepContext) -> None:
    """Load what was written into ``ctx.out`` and compare its logits with those of ``network``.

    Raises:
        RuntimeError: they differ.
    """
    from tasks.compress.calibrate import outputs
    from tasks.models import load

    few = data.take(slice(0, CHECKED_EXAMPLES))
    expected, found = outputs(network.eval(), few), outputs(load(ctx.out), few)
    if not float((expected - found).abs().max()) <= SAME * float(expected.abs().max()):
        raise RuntimeError("the written model computes something else than the one that was cut")


def _width(network: nn.Module, spec: PruneSpec) -> Way:
    from tasks.models.anatomy import anatomy

    parts = anatomy(network)
    space = width.room(network, parts, spec.parts, spec.multiple_of)
    turns = spec.hidden_by == "pca"
    if turns:
        principal.check(network, parts)
    untied = _untied(network, spec)
    hidden = parts.stacks[0].fields["width"]

    def scores(data: Encoded, ctx: StepContext) -> dict[str, Any]:
        axes = [axis for axis in width.axes(network, parts, space) if not (turns and axis.name == width.STREAM)]
        found: dict[str, Any] = {}
        if turns:
            found[width.STREAM] = principal.directions(network, parts, data, device=ctx.device, progress=ctx.progress)
        if not axes:
            return found
        if spec.importance == "activation":
            return found | importance.activation(network, axes, data, device=ctx.device, progress=ctx.progress)
        return found | importance.by_axis(_gradients(network, data, ctx), axes)

    def carry_out(scores: Mapping[str, Any], fields: Mapping[str, int]) -> tuple[nn.Module, dict[str, list[int]]]:
        axes = {axis.name: axis for axis in width.axes(network, parts, space)}
        counts = {name: width.count(axis, parts, fields) for name, axis in axes.items()}
        going = [axis for name, axis in axes.items() if counts[name] < axis.size]
        chosen = [axis for axis in going if not (turns and axis.name == width.STREAM)]
        kept = {axis.name: cut.choose(scores[axis.name], counts[axis.name], axis.groups) for axis in chosen}
        state = cut.state_of(network, [place.tensor for axis in going for place in axis.places])
        state = cut.cut(state, chosen, kept)
        if turns and fields[hidden] < axes[width.STREAM].size:
            kept[width.STREAM] = list(range(fields[hidden]))
            found = scores[width.STREAM]
            state = principal.project(network, parts, state, axes[width.STREAM], found, fields[hidden])
        return cut.rebuild(network, config(fields), state, untied), kept

    def config(fields: Mapping[str, int]) -> Any:
        found = width.config_of(network.config, parts, fields)
        return cut.configured(found, principal.UNTIED) if untied else found

    def said(scores: Mapping[str, Any], fields: Mapping[str, int]) -> tuple[dict[str, Any], list[str]]:
        if not turns:
            return {}, []
        return {"variance_kept": scores[width.STREAM].kept(fields[hidden])}, [
            f"{name} was tied to {parts.ties[name]} and is no more: the weights of a norm are in it now"
            for name in untied
        ]

    return Way(space.left, lambda share: width.shape(parts, space, share), config, scores, carry_out, said)


def _untied(network: nn.Module, spec: PruneSpec) -> list[str]:
    """The tied weights of the head that the step gives a tensor of their own."""
    from tasks.models.anatomy import anatomy

    parts = anatomy(network)
    return [f"{name}.weight" for name in parts.head if spec.hidden_by == "pca" and f"{name}.weight" in parts.ties]


def _depth(network: nn.Module, spec: PruneSpec) -> Way:
    from tasks.models.anatomy import anatomy

    parts = anatomy(network)
    stacks = depth.chosen(network.config, parts, spec.stacks)
    names = [block.name for stack in stacks for block in stack.blocks]
    left = {stack.name: f"stacks does not name the {stack.role}" for stack in parts.stacks if stack not in stacks}

    def scores(data: Encoded, ctx: StepContext) -> dict[str, float]:
        if spec.importance == "activation":
            return importance.block_influence(network, names, data, device=ctx.device, progress=ctx.progress)
        return importance.by_block(_gradients(network, data, ctx), names)

    def carry_out(scores: Mapping[str, Any], fields: Mapping[str, int]) -> tuple[nn.Module, dict[str, list[int]]]:
        kept = depth.plan(stacks, scores, fields)
        state = depth.cut(cut.state_of(network), stacks, kept)
        built = cut.rebuild(network, depth.config_of(network.config, stacks, kept), state)
        return built, {name: blocks for name, blocks in kept.items() if len(blocks) < _depth_of(stacks, name)}

    def config(fields: Mapping[str, int]) -> Any:
        first = {stack.name: list(range(fields[stack.fields["depth"]])) for stack in stacks}
        return depth.config_of(network.config, stacks, first)

    return Way(left, lambda share: depth.shape(stacks, share), config, scores, carry_out)


def _depth_of(stacks: Sequence[Any], name: str) -> int:
    return next(len(stack.blocks) for stack in stacks if stack.name == name)


def _gradients(network: nn.Module, data: Encoded, ctx: StepContext) -> dict[str, Tensor]:
    from tasks.finetune.objective import task_loss
    from tasks.models import family_of

    loss = task_loss(ctx.task, family_of(network.config))  # type: ignore[arg-type]
    return importance.taylor(network, data, loss, device=ctx.device, progress=ctx.progress)


_WAYS: Mapping[str, Callable[[nn.Module, PruneSpec], Way]] = {"width": _width, "depth": _depth}
