"""The teacher's outputs for a whole data set, kept on the disk, so that it runs once and not at every epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.compress import kept
from tasks.compress.reading import reader
from tasks.compress.teach import CLASSES, LOGS, Comparison
from tasks.context import StepContext
from tasks.data.collate import collate
from tasks.data.encoded import Encoded

if TYPE_CHECKING:
    from torch import Tensor, nn


def listen(
    teacher: nn.Module, about: Mapping[str, Any], data: Encoded, how: Comparison, size: int, ctx: StepContext
) -> kept.Kept:
    """The teacher's log-probabilities of every unit of ``data``, of its ``how.top_k`` largest classes and the mass of
    the others as one; float32 and int32, ``8 k + 4`` bytes a unit.

    Args:
        teacher: in eval mode on ``ctx.device``.
        about: what identifies it, as JSON.
        data: what it is asked.
        how: the temperature, and how many classes are kept.
        size: examples of a forward pass.
        ctx: store and progress.
    """
    import torch

    read = reader(how.task, how.family)

    def make(rows: np.ndarray) -> dict[str, np.ndarray]:
        found: dict[int, dict[str, np.ndarray]] = {}
        order = rows[np.argsort(data.lengths()[rows], kind="stable")]
        for part in (order[at : at + size] for at in range(0, len(order), size)):
            batch = {name: torch.from_numpy(array).to(ctx.device) for name, array in collate(data, part).items()}
            batch = {name: value if value.is_floating_point() else value.long() for name, value in batch.items()}
            with torch.inference_mode():
                reading = read(teacher, how.asked(batch))
                logs, classes = how.said(reading, how.top_k)
            owner = reading.owner.cpu().numpy()
            arrays = {"logs": logs.cpu().numpy()}
            if classes is not None:
                arrays["classes"] = classes.to(torch.int32).cpu().numpy()
            for at, row in enumerate(part.tolist()):
                first, last = np.searchsorted(owner, [at, at + 1])
                found[row] = {name: array[first:last] for name, array in arrays.items()}
        ordered = [found[row] for row in rows.tolist()]
        joined = {name: np.concatenate([one[name] for one in ordered]) for name in ordered[0]}
        return joined | {"ends": np.cumsum([len(one["logs"]) for one in ordered], dtype=np.int64)}

    recipe = {
        "about": about,
        "data": kept.digest(data),
        "temperature": how.temperature,
        "top_k": how.top_k,
        "several": how.several,
        "order": None if how.order is None else how.order.tolist(),
        "reads": None if how.reads is None else how.reads.tolist(),
        "batch": size,
    }
    return kept.keep("the teacher's outputs", recipe, make, len(data), ctx, listen)


def beside(heard: kept.Kept, rows: np.ndarray, device: str) -> dict[str, Tensor]:
    """What the teacher said of the examples ``rows``, as ``tasks.compress.teach.Teaching`` takes it from a batch."""
    import torch

    found = {name: torch.from_numpy(array).to(device) for name, array in heard.rows(rows).items()}
    said = {LOGS: found["logs"]}
    return said | ({CLASSES: found["classes"].long()} if "classes" in found else {})
