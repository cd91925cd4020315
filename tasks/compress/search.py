"""Which shape of a smaller model meets a target: a share, a number of parameters, or a measured time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

from specs.schema.units import Keep
from tasks.context import StepContext, StepError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tasks.data.encoded import Encoded

GRID = 400
"""So many shares are tried at most; neighbours often give the same shape."""

FILE = "chosen-shape.json"

WARMUP, REPEATS = 3, 21
"""Forward passes of a candidate before and during the measurement."""


class Shapes(Protocol):
    """What a way to make a model smaller says about its shapes; see ``structured.Way``."""

    @property
    def shape(self) -> Callable[[float], dict[str, int]]: ...

    @property
    def config(self) -> Callable[[Mapping[str, int]], Any]: ...

    @property
    def cut(self) -> Callable[[Mapping[str, Any], Mapping[str, int]], tuple[nn.Module, dict[str, list[int]]]]: ...


def shapes(way: Shapes) -> list[dict[str, int]]:
    """Every shape from the whole model to the smallest, each once."""
    found: list[dict[str, int]] = []
    for number in range(GRID, 0, -1):
        shape = way.shape(number / GRID)
        if not found or shape != found[-1]:
            found.append(shape)
    return found


def by_size(way: Shapes, model: nn.Module, keep: Keep) -> dict[str, int]:
    """The shape of a share, or the largest of at most so many parameters.

    Args:
        model: may be without weights.

    Raises:
        StepError: it would be the whole model, or no shape is small enough.
    """
    from tasks.compress.cut import shell
    from tasks.models.check import stored_parameters

    candidates = shapes(way)
    if len(candidates) == 1:
        raise StepError(f"keep: {keep}: nothing of this model can go: {_said(candidates[0])} is the least there can be")
    if keep.unit == "share":
        shape = way.shape(keep.number)
        if shape == candidates[0]:
            most = next(number for number in range(GRID, 0, -1) if way.shape(number / GRID) != shape)
            raise StepError(
                f"keep: {keep} rounds to the whole model ({_said(shape)}); write keep: {100 * most / GRID:g}% or less"
            )
        return shape

    def parameters(shape: Mapping[str, int]) -> int:
        return stored_parameters(shell(model, way.config(shape)))

    whole, least = parameters(candidates[0]), parameters(candidates[-1])
    if whole <= keep.number:
        raise StepError(f"keep: {keep}: the model has {whole} parameters, which is no more; write less, or a share")
    if least > keep.number:
        raise StepError(
            f"keep: {keep}: the smallest shape ({_said(candidates[-1])}) has {least} parameters; write more, or let "
            "more parts go"
        )
    return candidates[_first(candidates, lambda shape: parameters(shape) <= keep.number)]


def by_time(
    way: Shapes, scores: Mapping[str, Any], data: Encoded, keep: Keep, ctx: StepContext
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """The largest shape whose forward pass takes at most the time ``keep``, found by bisection, and what was measured.

    A forward pass reads one example: of a text ``data.max_length`` tokens, else the longest of ``data`` with what is to
    be written. The time is the median of ``REPEATS`` passes after ``WARMUP``, on the threads of the step. A step that
    was killed finds what it chose in ``ctx.checkpoints``, so that the training of that shape can go on.

    Raises:
        StepError: the whole model is fast enough, or the smallest shape is not.
    """
    candidates = shapes(way)
    file = ctx.checkpoints / FILE
    if file.is_file():
        record = json.loads(file.read_text(encoding="utf-8"))
        return record["shape"], record["candidates"]
    given = _example(data, ctx)
    times: dict[int, float] = {}

    def seconds(index: int) -> float:
        if index not in times:
            times[index] = _seconds(way.cut(scores, candidates[index])[0], given, ctx)
            ctx.progress(len(times), 2 + (len(candidates) - 1).bit_length(), "candidates")
        return times[index]

    if seconds(0) <= keep.number:
        raise StepError(f"keep: {keep}: the whole model takes {1000 * times[0]:.3g} ms; write less, or a share")
    last = len(candidates) - 1
    if seconds(last) > keep.number:
        raise StepError(
            f"keep: {keep}: the smallest shape ({_said(candidates[last])}) takes {1000 * times[last]:.3g} ms; write "
            "more, or let more parts go"
        )
    slow, fast = 0, last
    while fast - slow > 1:
        middle = (slow + fast) // 2
        if seconds(middle) <= keep.number:
            fast = middle
        else:
            slow = middle
    measured = [{"shape": candidates[index], "seconds": times[index]} for index in sorted(times)]
    ctx.checkpoints.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".tmp")
    draft.write_text(json.dumps({"shape": candidates[fast], "candidates": measured}), encoding="utf-8")
    draft.replace(file)
    return candidates[fast], measured


def _first(candidates: list[dict[str, int]], fits: Callable[[Mapping[str, int]], bool]) -> int:
    """The first candidate that fits, where those behind it do too and the last does."""
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(candidates[middle]) else (middle + 1, high)
    return low


def _example(data: Encoded, ctx: StepContext) -> dict[str, Tensor]:
    import numpy as np
    import torch

    from tasks.compress.calibrate import inputs
    from tasks.evaluate.workload import tokens

    if data.input_ids is None or data.target_ids is not None:
        return inputs(data, np.array([int(data.lengths().argmax())]), ctx.device)
    ids = torch.from_numpy(tokens(data, 1, ctx.data.max_length)).long().to(ctx.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _seconds(network: nn.Module, given: Mapping[str, Tensor], ctx: StepContext) -> float:
    import torch

    from tasks.compress.calibrate import forward
    from tasks.evaluate.speed import time_calls

    network.to(ctx.device)

    def call() -> None:
        with torch.inference_mode():
            forward(network, dict(given))
        if ctx.device == "cuda":
            torch.cuda.synchronize()

    with ctx.exclusive():
        return median(time_calls([call], warmup=WARMUP, repeats=REPEATS).tolist())


def _said(shape: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in shape.items())
