"""The step ``prune``: unstructured pruning by magnitude here, whole parts in ``structured`` and ``vocabulary``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from specs.schema.base import Task
from specs.schema.steps.prune import PruneSpec
from tasks.compress import structured, vocabulary
from tasks.compress.masks import magnitude_masks, quantiles, threshold_masks
from tasks.context import Artifact, StepContext, StepError, StepResult
from tasks.registry import step

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tasks.models.applications import Family

NO_GAIN = (
    "zeros alone make neither the file smaller nor the model faster on ordinary hardware: they are stored and "
    "multiplied like any other number; measure the later steps before relying on them"
)


VARIANTS = {
    "prune (width)": PruneSpec(uses="prune", id="width", method="width", keep="50%"),
    "prune (depth)": PruneSpec(uses="prune", id="depth", method="depth", keep="50%"),
    "prune (vocabulary)": PruneSpec(uses="prune", id="vocabulary", method="vocabulary"),
}


def check(spec: PruneSpec, config: Mapping[str, Any], task: Task, max_length: int) -> tuple[list[str], list[str]]:
    """What the plan says of pruning before it is done."""
    if spec.method in ("width", "depth"):
        return structured.preflight(spec, config, task), []
    return [], [] if spec.method == "vocabulary" else [NO_GAIN]


def refuses(spec: PruneSpec | None, family: Family, task: Task) -> str | None:
    """Why a model of ``family`` cannot be pruned so for ``task``; None where it can."""
    if spec is None:
        return None
    return vocabulary.refuses(task) if spec.method == "vocabulary" else structured.refuses(spec, family)


@step(
    PruneSpec,
    libraries=("numpy", "tokenizers", "torch", "transformers"),
    preflight=check,
    refuses=refuses,
    variants=VARIANTS,
)
def prune(model: Artifact, *, spec: PruneSpec, ctx: StepContext) -> StepResult:
    """Remove what the model needs least; see the spec for the methods.

    The methods that make zeros work on the linear layers. The output head and weights shared with an embedding are left
    alone: they are the most sensitive ones. So are convolutions, which hold few weights and make what everything behind
    them sees.

    Args:
        model: a Hugging Face folder.
        spec: which weights, and how to train afterwards.
        ctx: where; with ``recover`` the device and the data too.

    Raises:
        StepError: nothing or everything would go, the model cannot be cut so, or the training fails.
    """
    if spec.method in ("width", "depth"):
        return structured.prune_structure(model, spec, ctx)
    if spec.method == "vocabulary":
        return vocabulary.prune_vocabulary(model, spec, ctx)
    from tasks.models import load, save

    network = load(model.path)
    weights, left = prunable(network)
    if not weights:
        raise StepError(f"prune found no linear layer that it may touch: {_few(left)}")
    masks = plan(weights, spec)
    before = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    apply(network, masks)
    zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    share = sum(zeros.values()) / total
    summary = f"zeroed {share:.1%} of {total} weights in {len(weights)} linear layers ({spec.method}, {_setting(spec)})"
    properties: dict[str, Any] = {
        "sparsity": share,
        "zeros": sum(zeros.values()),
        "zeros_before": sum(before.values()),
        "prunable_weights": total,
        "layer_sparsity": {name: zeros[name] / weights[name].numel() for name in weights},
    }
    warnings = [NO_GAIN]
    empty = [name for name, weight in weights.items() if zeros[name] == weight.numel()]
    if empty:
        warnings.append(f"{len(empty)} layers have no weight left, first {empty[0]}; prune less, or use scope: layer")
    if spec.recover is not None:
        from tasks.finetune import finetune
        from tasks.finetune.loop import train

        trained = train(network, finetune.training_data(network, model, ctx), spec.recover, ctx, masks=masks)
        network.to("cpu")
        lost = [name for name, parameter in network.named_parameters() if _regrown(parameter, masks.get(name))]
        if lost:
            raise RuntimeError(f"training changed pruned weights of {', '.join(lost)}")
        summary += f"; {finetune.summary(trained)}"
        properties |= finetune.properties(trained)
        warnings += finetune.warnings(trained)
    save(network, ctx.out, tokenizer_from=model.path)
    return StepResult(
        kind="model",
        touched=tuple(name for name in weights if zeros[name] > before[name]),
        left=left,
        summary=summary,
        properties=properties,
        warnings=tuple(warnings),
    )


def prunable(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights that may be pruned by parameter name, and the other layers with the reason."""
    from tasks.models.layout import convolutions, embeddings, linear_layers, output_head

    shared = {name: table.name for table in embeddings(network) for name in table.tied}
    head = output_head(network)
    weights: dict[str, Tensor] = {}
    left = dict.fromkeys(convolutions(network), "convolution")
    for layer in linear_layers(network):
        if layer.tied or layer.name in shared:
            left[layer.name] = f"tied to {layer.tied or shared[layer.name]}"
        elif layer.name in head:
            left[layer.name] = "output head"
        else:
            weights[layer.weight_name] = layer.weight.detach()
    return weights, left


def plan(weights: Mapping[str, Tensor], spec: PruneSpec) -> dict[str, Tensor]:
    """The masks that ``spec`` asks for, by parameter name; True where a weight is kept.

    Raises:
        StepError: they would change nothing, or leave nothing.
    """
    if spec.method == "threshold":
        assert spec.threshold is not None
        masks = threshold_masks(weights, spec.threshold)
    else:
        assert spec.sparsity is not None
        masks = magnitude_masks(weights, spec.sparsity, spec.scope)
    total = sum(weight.numel() for weight in weights.values())
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    kept = sum(int(mask.sum()) for mask in masks.values())
    if 0 < kept < total - zeros:
        return masks
    effect = "no weight" if kept else "every weight"
    found = quantiles(weights)
    table = ", ".join(f"{share:.0%}: {value:.3g}" for share, value in found.items())
    better = (
        f"threshold: {found[0.5]:.3g}" if spec.method == "threshold" else f"sparsity: {(1 + zeros / total) / 2:.0%}"
    )
    raise StepError(
        f"{_setting(spec)} sets {effect} to zero ({zeros} of {total} are zero already); magnitudes by share of the "
        f"weights: {table}; write for example {better}"
    )


def apply(network: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set to zero what ``masks`` (by parameter name) do not keep."""
    import torch

    with torch.no_grad():
        for name, mask in masks.items():
            network.get_parameter(name).masked_fill_(~mask, 0)


def _regrown(parameter: Tensor, mask: Tensor | None) -> bool:
    return mask is not None and bool((parameter.detach()[~mask] != 0).any())


def _setting(spec: PruneSpec) -> str:
    if spec.method == "threshold":
        return f"threshold: {spec.threshold:g}"
    return f"sparsity: {spec.sparsity:.4g}, scope: {spec.scope}"


def _few(left: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:5]) or "the model has none"
