"""A whole model at several lengths, exact and with replaced attention."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tasks.attention import swap

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tasks.data.encoded import Encoded

NEVER = 1 << 30
"""A ``min_length`` that no sequence has."""

_SHARES = (4, 2, 1)
_EXAMPLES = 2


@contextmanager
def at_every_length(network: nn.Module, min_length: int = 0) -> Iterator[None]:
    """The model with its attentions replaced from ``min_length`` on, whatever they say themselves."""
    layers = swap.swapped(network).values()
    before = [(layer.settings["min_length"], layer.counts.copy()) for layer in layers]
    try:
        for layer in layers:
            layer.settings["min_length"] = min_length
        yield
    finally:
        for layer, (length, counts) in zip(layers, before, strict=True):
            layer.settings["min_length"], layer.counts = length, counts


def by_length(network: nn.Module, data: Encoded) -> list[dict[str, float]]:
    """For a quarter, a half and all of the length of the longest examples: seconds of one pass over one example, the
    relative error of the outputs, and for a model that predicts the next token its loss in nats. Nothing for a model
    that does not read tokens alone.

    Args:
        network: with replaced attentions, in eval mode.
        data: training examples; the two longest are taken.
    """
    import torch

    from tasks.compress.calibrate import examples, forward
    from tasks.models.applications import family_of

    family = family_of(network.config)  # type: ignore[arg-type]
    if data.input_ids is None or family not in ("decoder", "encoder"):
        return []
    order = data.lengths().argsort(kind="stable")[::-1][:_EXAMPLES]
    batches = list(examples(data.take(order)))
    longest = min(batch["input_ids"].shape[1] for batch in batches)
    found = []
    with torch.no_grad():
        for share in _SHARES:
            length = longest // share
            if length < 2:  # nothing to read, or no token to foretell
                continue
            cut = [
                {name: tensor[:, :length] for name, tensor in batch.items() if tensor.ndim == 2} for batch in batches
            ]
            row: dict[str, float] = {"length": length}
            outs: dict[str, Tensor] = {}
            for name, start in (("exact", NEVER), ("replaced", 0)):
                with at_every_length(network, start):
                    passes = [_timed(lambda batch=batch: forward(network, batch)) for batch in (cut[0], *cut)][1:]
                row[f"seconds_{name}"] = min(seconds for seconds, _ in passes)
                outs[name] = torch.cat([out.flatten(0, -2) for _, out in passes])
                losses = [_loss(out, batch["input_ids"]) for (_, out), batch in zip(passes, cut, strict=True)]
                if family == "decoder" and losses[0] is not None:
                    row[f"loss_{name}"] = sum(loss for loss in losses if loss is not None) / len(losses)
            row["output_error"] = float((outs["replaced"] - outs["exact"]).norm() / outs["exact"].norm())
            found.append(row)
    return found


def _loss(logits: Tensor, ids: Tensor) -> float | None:
    import torch

    if logits.ndim != 3 or logits.shape[1] < 2:
        return None
    return float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = call()
    return time.perf_counter() - started, found
