"""What can be known of an adaptive input before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from specs.schema.base import Task
from specs.schema.steps.adaptive_input import AdaptiveInputSpec
from tasks.adaptive_input.curves import SMALLEST
from tasks.adaptive_input.layout import least_bytes, softmax_bytes
from tasks.evaluate.format import size

if TYPE_CHECKING:
    from tasks.models.applications import Family

_WIDTHS = (
    *("word_embed_proj_dim", "input_embedding_size", "embedding_size"),
    *("hidden_size", "n_embd", "emb_dim", "dim", "d_model"),
)
"""Where configurations have the width of a token's vector, those of the table itself before those of the model."""

_SLOW_SOFTMAX = (
    "method: adaptive with a softmax over all tokens was worse than a dense table after as long a training (perplexity "
    "1356 against 1062 in the README); write softmax: adaptive (471), or leave the step out"
)


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
    tied = True if task == "text-classification" or spec.head == "leave" else config.get("tie_word_embeddings")
    remarks = []
    if task == "text-generation" and spec.method == "adaptive" and spec.softmax == "full" and spec.head != "leave":
        remarks.append(_SLOW_SOFTMAX)
    rows = config.get("vocab_size")
    width = next((config[name] for name in _WIDTHS if config.get(name)), None)
    if not isinstance(rows, int) or not isinstance(width, int):
        return [], remarks
    # Where the configuration does not say whether the output layer has weights of its own, neither is refused.
    both = [(rows, width), (rows, config.get("output_embedding_size") or width)]
    problem = too_small(spec, both[: 2 if tied is False else 1]) or too_large(spec, both[: 1 if tied is True else 2])
    return [problem] if problem else [], remarks


def budget_of(spec: AdaptiveInputSpec, dense: int) -> int:
    """The bytes that the tables may take, which take ``dense`` in float32."""
    return spec.budget if spec.budget is not None else int(dense / (spec.ratio or 1.0))


def too_small(spec: AdaptiveInputSpec, shapes: list[tuple[int, int]]) -> str | None:
    """Why tables of ``shapes`` (rows, width), that of the output layer last, cannot be as small as is asked for; None
    where they can."""
    dense = sum(4 * rows * width for rows, width in shapes)
    least = sum(least_bytes(rows, width, spec.widths) for rows, width in shapes)
    if spec.softmax == "adaptive":
        rows, width = shapes[-1]
        if rows < 2 * SMALLEST:
            return (
                f"softmax: adaptive is over two bands of {SMALLEST} tokens at least, and the vocabulary has {rows}; "
                "leave softmax out"
            )
        least += least_bytes(rows, width, spec.widths, 2) - least_bytes(rows, width, spec.widths)
        least += softmax_bytes(spec.bands, width)
    budget = budget_of(spec, dense)
    if budget >= least:
        return None
    if spec.budget is not None:
        value, right = f"budget {size(budget)}", f"budget: {-(-least // 1024)} KiB or more"
    else:
        value, right = f"ratio {spec.ratio:g}x, {size(budget)},", f"ratio: {int(100 * dense / least) / 100:g}x or less"
    fewest = min(spec.widths)
    return (
        f"{value} is smaller than the table of {shapes[0][0]} tokens can be: the smallest takes {least} bytes (a rank "
        f"of 8 in {fewest} bit{'s' if fewest > 1 else ''}); write {right}"
    )


def too_large(spec: AdaptiveInputSpec, shapes: list[tuple[int, int]]) -> str | None:
    """Why nothing is to be done about tables of ``shapes`` (rows, width); None where there is."""
    dense = sum(4 * rows * width for rows, width in shapes)
    if spec.allow_noop or budget_of(spec, dense) < dense:
        return None
    return (
        f"budget {size(budget_of(spec, dense))} is no less than the {size(dense)} that the table takes, so that "
        "nothing is to be done; write a smaller budget, leave the step out, or write allow_noop: true"
    )
