"""Pruning of single weights of the linear layers, which become zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from specs.schema.base import Task
from specs.schema.steps.prune import PruneSpec, kept_of
from tasks.compress.masks import magnitude_masks, pattern_mask, quantiles, threshold_masks
from tasks.context import Artifact, StepContext, StepError, StepResult

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tasks.finetune.masks import Kept
    from tasks.models.layout import LinearLayer

NO_GAIN = (
    "zeros alone make neither the file smaller nor the model faster on ordinary hardware: they are stored and "
    "multiplied like any other number; measure the later steps before relying on them"
)

PATTERN_GAIN = (
    "the zeros of {pattern} make the file no smaller, and nothing faster on a CPU, in LiteRT or on an NPU; a GPU of "
    "compute capability 8.0 or newer computes them faster in half precision "
    "(tasks.compress.semi_structured.accelerate)"
)

PATTERN_NO_GAIN = "of the patterns only 2:4 is computed faster, by some GPUs, and {pattern} does not hold it: "


def preflight(spec: PruneSpec, config: Mapping[str, Any], task: Task) -> tuple[list[str], list[str]]:
    """What stops pruning, and what it will not bring, before anything is done."""
    import torch
    from transformers import CONFIG_MAPPING

    from tasks.models.anatomy import anatomy
    from tasks.models.configuration import build_model

    try:
        with torch.device("meta"):
            network = build_model(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)), task)
        check(prunable_layers(network), spec)
        if spec.method in ("wanda", "sparsegpt"):
            anatomy(network)
    except StepError as error:
        return [str(error)], []
    return [], [no_gain(spec.pattern)]


@dataclass
class _Notes:
    """What the parts of the step have to say."""

    summary: list[str] = field(default_factory=list)
    properties: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def prune_weights(model: Artifact, spec: PruneSpec, ctx: StepContext) -> StepResult:
    """Set weights of the linear layers to zero, and with ``recover`` train the others afterwards or meanwhile.

    The output head and weights shared with an embedding are left alone: they are the most sensitive ones. So are
    convolutions, which hold few weights and make what everything behind them sees.

    Args:
        model: a Hugging Face folder.
        spec: which weights, and how to train.
        ctx: where; the device and the data where the method or ``recover`` needs them.

    Raises:
        StepError: nothing or everything would become zero, the model's weights are not finite or do not fit the
            pattern, there is nothing to calibrate with, or the training fails.
    """
    from tasks.models import load, save
    from tasks.models.check import grown, weights_in

    network = load(model.path)
    layers, left = prunable_layers(network)
    check((layers, left), spec)
    zeros_before = {layer.weight_name: int((layer.weight == 0).sum()) for layer in layers}
    kept = plan(layers, spec)
    notes = _Notes()
    if spec.method in ("wanda", "sparsegpt"):
        kept = _calibrated(network, layers, model, spec, ctx, notes)
    if not spec.gradual:
        apply(network, kept)
    if spec.recover is not None:
        kept = _trained(network, kept, model, spec, ctx, notes)
    lost = [name for name, mask in kept.items() if bool((network.get_parameter(name).detach()[~mask] != 0).any())]
    if lost:
        raise RuntimeError(f"pruned weights of {', '.join(lost)} are not 0")
    zeros = {name: int((~mask).sum()) for name, mask in kept.items()}
    total = sum(mask.numel() for mask in kept.values())
    _check_effect(layers, total - sum(zeros.values()), sum(zeros_before.values()), spec)
    share = sum(zeros.values()) / total
    summary = f"zeroed {share:.1%} of {total} weights in {len(kept)} linear layers ({spec.method}, {_setting(spec)})"
    gains, measured = _gain(network, layers, spec, ctx)
    empty = [name for name, mask in kept.items() if not bool(mask.any())]
    if empty:
        notes.warnings.append(
            f"{len(empty)} layers have no weight left, first {empty[0]}; prune less, or use scope: layer"
        )
    save(network, ctx.out, tokenizer_from=model.path)
    return StepResult(
        kind="model",
        touched=tuple(name for name in kept if zeros[name] > zeros_before[name]),
        left=left,
        summary="; ".join((summary, *notes.summary)),
        properties={
            "sparsity": share,
            "zeros": sum(zeros.values()),
            "zeros_before": sum(zeros_before.values()),
            "prunable_weights": total,
            "layer_sparsity": {name: zeros[name] / mask.numel() for name, mask in kept.items()},
            **({"pattern": spec.pattern} if spec.pattern else {}),
            **notes.properties,
            **measured,
        },
        warnings=(*gains, *notes.warnings, *grown(weights_in(model.path), weights_in(ctx.out))),
    )


def prunable_layers(network: nn.Module) -> tuple[list[LinearLayer], dict[str, str]]:
    """The layers whose weights may be pruned, and the others with the reason."""
    from tasks.models.layout import convolutions, embeddings, linear_layers, output_head

    shared = {name: table.name for table in embeddings(network) for name in table.tied}
    head = output_head(network)
    found = []
    left = dict.fromkeys(convolutions(network), "convolution")
    for layer in linear_layers(network):
        if layer.tied or layer.name in shared:
            left[layer.name] = f"tied to {layer.tied or shared[layer.name]}"
        elif layer.name in head:
            left[layer.name] = "output head"
        else:
            found.append(layer)
    return found, left


def prunable(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights that may be pruned by parameter name, and the other layers with the reason."""
    layers, left = prunable_layers(network)
    return _weights(layers), left


def check(found: tuple[list[LinearLayer], dict[str, str]], spec: PruneSpec) -> None:
    """Refuse a model by the shapes of its layers alone.

    Raises:
        StepError: there is no layer to prune, or one that the pattern does not fit.
    """
    layers, left = found
    if not layers:
        few = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:5]) or "the model has none"
        raise StepError(f"prune found no linear layer that it may touch: {few}")
    if spec.pattern is None:
        return
    of = kept_of(spec.pattern)[1]
    odd = [layer for layer in layers if layer.shape[1] % of]
    if odd:
        raise StepError(
            f"pattern {spec.pattern} needs a multiple of {of} inputs, and {len(odd)} of {len(layers)} linear layers "
            f"have none, first {odd[0].name} with {odd[0].shape[1]}; write sparsity instead, or another pattern"
        )


def plan(layers: Iterable[LinearLayer], spec: PruneSpec) -> dict[str, Tensor]:
    """The masks that ``spec`` asks for, by parameter name and in its shape; True where a weight is kept. Where data or
    training decides, the masks by magnitude: as many weights, if not the same.

    Raises:
        StepError: they would change nothing, or leave nothing.
    """
    layers = list(layers)
    weights = _weights(layers)
    if spec.threshold is not None:
        masks = threshold_masks(weights, spec.threshold)
    elif spec.pattern is not None:
        masks = {}
        for layer in layers:
            matrix = layer.matrix.detach()
            mask = pattern_mask(matrix.abs(), matrix, *kept_of(spec.pattern))
            masks[layer.weight_name] = mask if layer.kind == "linear" else mask.T
    else:
        masks = magnitude_masks(weights, spec.sparsity or 0.0, spec.scope)
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    _check_effect(layers, sum(int(mask.sum()) for mask in masks.values()), zeros, spec)
    return masks


def apply(network: nn.Module, masks: Kept) -> None:
    """Set to zero what ``masks`` (by parameter name) do not keep."""
    from tasks.finetune.masks import zero

    zero({name: network.get_parameter(name) for name in masks}, masks)


def no_gain(pattern: str | None) -> str:
    """Which zeros bring speed on which target: all but 2:4 on some GPUs bring none."""
    if pattern is None:
        return NO_GAIN
    kept, of = kept_of(pattern)
    holds = (of == 4 and kept <= 2) or of == 2
    return (PATTERN_GAIN if holds else PATTERN_NO_GAIN + NO_GAIN).format(pattern=pattern)


def _calibrated(
    network: nn.Module, layers: list[LinearLayer], model: Artifact, spec: PruneSpec, ctx: StepContext, notes: _Notes
) -> dict[str, Tensor]:
    """Prune by data, in place; the masks."""
    from tasks.compress.calibrate import sample
    from tasks.compress.prune_by_data import by_sparsegpt, by_wanda, prune_by_data

    pattern = kept_of(spec.pattern) if spec.pattern else None
    if spec.method == "wanda":
        rule = by_wanda(spec.sparsity, pattern)
    else:
        rule = by_sparsegpt(spec.sparsity, pattern, spec.block_size, spec.damping)
    ctx.note("encoding the training data")
    data = sample(model, spec.calibration_examples, ctx)
    ctx.note("pruning block by block")
    network.to(ctx.device)
    named = {layer.name: layer for layer in layers}
    masks, vectors = prune_by_data(network, named, data, rule, device=ctx.device, progress=ctx.progress)
    network.to("cpu")
    notes.properties |= {"calibration_examples": len(data), "calibration_vectors": max(vectors.values())}
    few = [layer for layer in layers if vectors[layer.name] < layer.shape[1]]
    if few and spec.method == "sparsegpt":
        first = f"{few[0].name}: {vectors[few[0].name]} vectors for {few[0].shape[1]} inputs"
        notes.warnings.append(
            f"too few calibration examples for {len(few)} layers ({first}); raise calibration_examples"
        )
    return {name: mask.cpu() for name, mask in masks.items()}


def _trained(
    network: nn.Module, kept: Kept, model: Artifact, spec: PruneSpec, ctx: StepContext, notes: _Notes
) -> dict[str, Tensor]:
    """Train with what is not kept as zeros, or with zeros that come meanwhile; the masks at the end."""
    from tasks.compress.gradual import Gradual
    from tasks.finetune import finetune
    from tasks.finetune.loop import train
    from tasks.finetune.masks import Fixed, Masks

    assert spec.recover is not None
    masks: Masks = Fixed(kept)
    if spec.gradual:
        by = "movement" if spec.method == "movement" else "magnitude"
        masks = Gradual(tuple(kept), by, spec.sparsity or 0.0, spec.scope, spec.ramp, spec.mask_steps)
    trained = train(network, finetune.training_data(network, model, ctx), spec.recover, ctx, masks=masks)
    network.to("cpu")
    notes.summary.append(finetune.summary(trained))
    notes.properties |= finetune.properties(trained)
    notes.warnings += finetune.warnings(trained)
    return {name: mask.cpu() for name, mask in trained.kept.items()}


def _gain(
    network: nn.Module, layers: list[LinearLayer], spec: PruneSpec, ctx: StepContext
) -> tuple[list[str], dict[str, Any]]:
    """What the zeros bring: measured where this machine's GPU computes them, and else what is known."""
    import torch

    from tasks.compress import semi_structured

    text = no_gain(spec.pattern)
    if text == NO_GAIN or semi_structured.why_not(ctx.device) is not None:
        return [text], {}
    network.to(ctx.device)
    gain = semi_structured.measure(network, frozenset(layer.name for layer in layers), torch.float16)
    network.to("cpu")
    if not gain.layers or not gain.error <= semi_structured.LARGEST_ERROR:
        wrong = f"the error is {gain.error:.2%}" if gain.layers else next(iter(gain.left.values()), "no layer holds it")
        return [f"{text}; here it does not: {wrong}"], {}
    dense, sparse = gain.seconds
    figures = {"layers": gain.layers, "left": gain.left, "speedup": dense / sparse, "error": gain.error}
    card = torch.cuda.get_device_name()
    text += f"; measured on {card}, float16, {gain.tokens} tokens: {gain.layers} of {len(layers)} layers run as 2:4, "
    return [f"{text}{dense / sparse:.2f} times as fast as dense"], {"semi_structured": {"gpu": card, **figures}}


def _check_effect(layers: Iterable[LinearLayer], kept: int, zeros: int, spec: PruneSpec) -> None:
    weights = _weights(layers)
    total = sum(weight.numel() for weight in weights.values())
    if 0 < kept < total - zeros:
        return
    effect = "no weight" if kept else "every weight"
    found = quantiles(weights)
    table = ", ".join(f"{share:.0%}: {value:.3g}" for share, value in found.items())
    if spec.pattern is not None:
        better = "sparsity, above the share of zeros that the model has"
    elif spec.threshold is not None:
        better = f"for example threshold: {found[0.5]:.3g}"
    else:
        better = f"for example sparsity: {(1 + zeros / total) / 2:.0%}"
    raise StepError(
        f"{_setting(spec)} sets {effect} to zero ({zeros} of {total} are zero already); magnitudes by share of the "
        f"weights: {table}; write {better}"
    )


def _weights(layers: Iterable[LinearLayer]) -> dict[str, Tensor]:
    return {layer.weight_name: layer.weight.detach() for layer in layers}


def _setting(spec: PruneSpec) -> str:
    if spec.threshold is not None:
        return f"threshold: {spec.threshold:g}"
    if spec.pattern is not None:
        return f"pattern: {spec.pattern}"
    if spec.method in ("wanda", "sparsegpt"):
        return f"sparsity: {spec.sparsity:.4g}"
    rising = ", cubic" if spec.gradual else ""
    return f"sparsity: {spec.sparsity:.4g}, scope: {spec.scope}{rising}"
