"""What an error in a token's vector does to the outputs of the model: the second moments that weigh directions.

To second order, the Kullback-Leibler divergence that an error ``d`` in a looked-up vector causes is ``d F d / 2``, with
the Fisher information ``F``: the second moment of the gradients of the log-likelihood of outputs that are drawn from
the model itself (Amari, 1998). In an output layer an error ``d`` in the row of a token of probability ``p`` costs
``p (1 - p) (d x)² / 2``, so that the second moment of what comes in counts, for each occurrence of the token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from tasks.adaptive_input.places import Place
    from tasks.data.encoded import Encoded

OBSERVED = 128
"""Training examples that are looked at."""

_LOOKED_UP = 2.0
"""What looked-up vectors count beside the rows of an output layer. The errors of a text's vectors add up to more than
each does alone, which the second order does not see; 1 to 4 differ little."""


def moments(
    network: Any,
    found: Sequence[Place],
    data: Encoded,
    generator: Generator,
    progress: Callable[[float, float, str], None] | None = None,
) -> list[Tensor]:
    """The second moment for each table, float64 [D, D], summed over the examples.

    Args:
        network: the model, in eval mode.
        found: its tables.
        data: examples.
        generator: draws outputs.
        progress: is told examples done and in all.
    """
    import torch

    from tasks.compress.calibrate import examples, forward

    total = [torch.zeros(place.weight.shape[1], place.weight.shape[1], dtype=torch.float64) for place in found]
    with _watched(network, found) as (looked_up, came_in):
        for done, batch in enumerate(examples(data), start=1):
            for seen in (*looked_up, *came_in):
                seen.clear()
            with torch.enable_grad():
                value = _likelihood(network, batch, forward(network, batch), generator)
                vectors = [one for seen in looked_up for one in seen]
                gradients = iter(torch.autograd.grad(value, vectors, allow_unused=True) if vectors else ())
            for at in range(len(found)):
                for _ in looked_up[at]:
                    gradient = next(gradients)
                    if gradient is not None:
                        total[at] += _LOOKED_UP * _moment(gradient)
                for given in came_in[at]:
                    total[at] += _moment(given)
            if progress is not None:
                progress(done, len(data), "examples")
    return total


def _moment(vectors: Tensor) -> Tensor:
    flat = vectors.detach().reshape(-1, vectors.shape[-1]).double()
    return flat.T @ flat


def _likelihood(network: Any, batch: dict[str, Tensor], logits: Tensor, generator: Generator) -> Tensor:
    """The log-likelihood of outputs that are drawn from the model, summed."""
    import torch
    from torch.nn import functional

    from tasks.data.collate import IGNORED

    if logits.ndim == 2:
        kind = getattr(network.config, "problem_type", None)
        if kind == "multi_label_classification":
            drawn = torch.bernoulli(logits.detach().sigmoid(), generator=generator)
            return -functional.binary_cross_entropy_with_logits(logits, drawn, reduction="sum")
        if logits.shape[1] == 1:  # a regression: the normal distribution around it
            return (logits * torch.randn(logits.shape, generator=generator)).sum()
    elif "labels" in batch:
        logits = logits[batch["labels"] != IGNORED]
    else:
        logits = logits[batch["attention_mask"].bool()]
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
    return logits.log_softmax(-1).gather(-1, drawn).sum()


@contextmanager
def _watched(network: Any, found: Sequence[Place]) -> Iterator[tuple[list[list[Tensor]], list[list[Tensor]]]]:
    """What each table's embeddings put out, as the leaves of a graph, and what comes into its heads, by table."""
    looked_up: list[list[Tensor]] = [[] for _ in found]
    came_in: list[list[Tensor]] = [[] for _ in found]

    def leaf(at: int, factor: float) -> Any:
        def hook(module: Any, given: Any, out: Tensor) -> Tensor:
            # The gradient by the row itself, before it is multiplied.
            rows = (out.detach() / factor).requires_grad_()
            looked_up[at].append(rows)
            return rows * factor

        return hook

    def kept(at: int) -> Any:
        return lambda module, given: came_in[at].append(given[0].detach())

    handles = []
    for at, place in enumerate(found):
        for name, factor in place.embeddings.items():
            handles.append(network.get_submodule(name).register_forward_hook(leaf(at, factor)))
        handles += [network.get_submodule(name).register_forward_pre_hook(kept(at)) for name in place.heads]
    try:
        yield looked_up, came_in
    finally:
        for handle in handles:
            handle.remove()
