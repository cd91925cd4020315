"""What can be known of an adaptive input before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from specs.schema.base import Task
from specs.schema.steps.adaptive_input import AdaptiveInputSpec
from tasks.adaptive_input.layout import least_bytes
from tasks.evaluate.format import size

if TYPE_CHECKING:
    from tasks.models.applications import Family

_WIDTHS = ("hidden_size", "n_embd", "dim", "d_model")


def refuses(spec: AdaptiveInputSpec | None, family: Family, task: Task) -> str | None:
    """Why the tokens of a model of ``family`` cannot be put into bands; None where they can."""
    if family == "ctc":
        return (
            "the input of a model for CTC is audio, and there is no table of tokens to make smaller; use quantize, "
            "prune, or a model that reads or writes text"
        )
    if spec is not None and spec.information == "contextual" and task != "text-generation":
        return (
            f"information: contextual asks the model how well it foresees each token, which one for {task} cannot say; "
            "write information: unigram"
        )
    return None


def look(
    spec: AdaptiveInputSpec, config: Mapping[str, Any], task: Task, max_length: int
) -> tuple[list[str], list[str]]:
    """What stops the step, and what the plan says of it. ``config`` is that of the model that comes in; steps before
    this one may make its table smaller."""
    rows = config.get("vocab_size")
    width = next((config[name] for name in _WIDTHS if config.get(name)), None)
    if not isinstance(rows, int) or not isinstance(width, int):
        return [], []
    untied = task != "text-classification" and config.get("tie_word_embeddings") is False and spec.head != "leave"
    tables = 2 if untied else 1
    problem = size_problem(spec, [(rows, width)] * tables)
    return [problem] if problem else [], []


def budget_of(spec: AdaptiveInputSpec, dense: int) -> int:
    """The bytes that the tables may take, which take ``dense`` in float32."""
    return spec.budget if spec.budget is not None else int(dense / (spec.ratio or 1.0))


def size_problem(spec: AdaptiveInputSpec, shapes: list[tuple[int, int]]) -> str | None:
    """Why tables of ``shapes`` (rows, width) cannot be brought to the size that is asked for; None where they can."""
    dense = sum(4 * rows * width for rows, width in shapes)
    least = sum(least_bytes(rows, width, spec.widths) for rows, width in shapes)
    budget, field = budget_of(spec, dense), "budget" if spec.budget is not None else "ratio"
    if budget < least:
        value = size(budget) if field == "budget" else f"{spec.ratio:g}x, {size(budget)},"
        right = f"{-(-least // 1024)} KiB or more" if field == "budget" else f"{dense / least:.3g}x or less"
        fewest = min(spec.widths)
        return (
            f"{field} {value} is smaller than the table of {shapes[0][0]} tokens can be: the smallest takes "
            f"{least} bytes (a rank of 8 in {fewest} bit{'s' if fewest > 1 else ''}); write {field}: {right}"
        )
    if budget >= dense and not spec.allow_noop:
        return (
            f"budget {size(budget)} is no less than the {size(dense)} that the table takes, so that nothing "
            "is to be done; write a smaller budget, leave the step out, or write allow_noop: true"
        )
    return None
