"""The step ``prune``: single weights in ``unstructured``, whole parts in ``structured``, tokens in ``vocabulary``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from specs.schema.base import Task
from specs.schema.steps.prune import STRUCTURED, PruneSpec
from tasks.compress import structured, unstructured, vocabulary
from tasks.context import Artifact, StepContext, StepResult
from tasks.registry import step

if TYPE_CHECKING:
    from tasks.models.applications import Family

VARIANTS = {
    "prune (width)": PruneSpec(uses="prune", id="width", method="width", keep="50%"),
    "prune (depth)": PruneSpec(uses="prune", id="depth", method="depth", keep="50%"),
    "prune (vocabulary)": PruneSpec(uses="prune", id="vocabulary", method="vocabulary"),
}


def look(spec: PruneSpec, config: Mapping[str, Any], task: Task, max_length: int) -> tuple[list[str], list[str]]:
    """What stops pruning, and what it will not bring, before anything is done."""
    if spec.method in STRUCTURED:
        return structured.preflight(spec, config, task)
    if spec.method == "vocabulary":
        return [], []
    return unstructured.preflight(spec, config, task)


def refuses(spec: PruneSpec | None, family: Family, task: Task) -> str | None:
    """Why a model of ``family`` cannot be pruned so for ``task``; None where it can."""
    if spec is None:
        return None
    return vocabulary.refuses(task) if spec.method == "vocabulary" else structured.refuses(spec, family)


@step(
    PruneSpec,
    libraries=("numpy", "tokenizers", "torch", "transformers"),
    preflight=look,
    refuses=refuses,
    variants=VARIANTS,
)
def prune(model: Artifact, *, spec: PruneSpec, ctx: StepContext) -> StepResult:
    """Remove what the model needs least; see the spec for the methods.

    Args:
        model: a Hugging Face folder.
        spec: what goes, and how to train.
        ctx: where; the device and the data where the method or ``recover`` needs them.

    Raises:
        StepError: nothing or everything would go, the model cannot be pruned so, its weights are not finite, there is
            nothing to calibrate with, or the training fails.
    """
    if spec.method in STRUCTURED:
        return structured.prune_structure(model, spec, ctx)
    if spec.method == "vocabulary":
        return vocabulary.prune_vocabulary(model, spec, ctx)
    return unstructured.prune_weights(model, spec, ctx)
