"""Adaptive softmax (Grave et al., 1609.04309) over the bands of a table: the first band and one score for each other
band make a distribution, and within each other band its tokens make one. A training scores the bands of the tokens that
are wanted and no others; all else gets the logarithm of every token's probability, which any sampler takes for scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from tasks.adaptive_input import table as bands
from tasks.context import StepError

if TYPE_CHECKING:
    from torch import Tensor


def head(table: Any) -> Any:
    """An output layer over a ``table`` of at least two bands, [..., width] to log-probabilities [..., rows]. It starts
    with the same score for every band."""
    return _classes()(table)


def asked(value: object, count: int) -> bool:
    """Whether ``softmax`` of an entry in ``lathe.json`` asks for one over ``count`` bands.

    Raises:
        ValueError: it asks for another, or there is one band.
    """
    if value not in (None, "adaptive") or (value and count == 1):
        raise ValueError(f"a table of {count} bands has the softmax {value!r}")
    return value == "adaptive"


def check(network: Any) -> None:
    """Prove that nothing stands behind the output layer, so that what comes into it is all that a loss needs.

    Raises:
        StepError: the model changes its scores, or has no such output layer.
    """
    import torch

    layer = network.get_output_embeddings()
    ids = torch.arange(min(8, network.config.vocab_size))[None]
    with torch.inference_mode():
        with layer.passing():
            hidden = network(input_ids=ids, use_cache=False).logits
        scores = network(input_ids=ids, use_cache=False).logits
        same = hidden.shape[-1] == layer.in_features and torch.allclose(layer(hidden), scores, atol=1e-4)
    if not same:
        raise StepError(
            f"this {network.config.model_type} model changes the scores behind its output layer, which does not go "
            "with softmax: adaptive; leave softmax out"
        )


@cache
def _classes() -> Any:
    import torch
    from torch import nn

    class AdaptiveHead(bands.classes().Head):
        def __init__(self, table: Any) -> None:
            super().__init__(table, None)
            self.others = nn.Parameter(torch.zeros(len(table.layout.bands) - 1, table.layout.width))
            self._passes = False

        @contextmanager
        def passing(self) -> Iterator[None]:
            """Meanwhile the layer gives what it is given, so that the model gives what ``surprisal`` takes."""
            self._passes = True
            try:
                yield
            finally:
                self._passes = False

        def forward(self, x: Tensor) -> Tensor:
            if self._passes:
                return x
            first = self._first(x)
            count = self.table.layout.bands[0].count
            parts = [first[..., :count]]
            for number in range(1, len(self.table.layout.bands)):
                within = self.table.band_scores(x, number).float().log_softmax(-1)
                parts.append(within + first[..., count + number - 1, None])
            return torch.cat(parts, -1).index_select(-1, self.table.positions)

        def surprisal(self, x: Tensor, wanted: Tensor) -> Tensor:
            """The negative logarithm of the probability of each token in ``wanted`` [N] behind ``x`` [N, width], [N].
            Only the bands that occur are scored, each for its tokens."""
            at = self.table.positions.index_select(0, wanted).long()
            layout = self.table.layout
            starts = torch.tensor(layout.starts, device=at.device)
            band = torch.bucketize(at, starts, right=True) - 1
            in_first = torch.where(band == 0, at, layout.bands[0].count + band - 1)
            logs = self._first(x).gather(-1, in_first[:, None])[:, 0]
            for number in range(1, len(layout.bands)):
                places = (band == number).nonzero()[:, 0]
                if len(places):
                    within = self.table.band_scores(x[places], number).float().log_softmax(-1)
                    found = within.gather(-1, (at[places] - layout.starts[number])[:, None])[:, 0]
                    logs = logs.index_add(0, places, found)
            return -logs

        def _first(self, x: Tensor) -> Tensor:
            """The logarithms of the first band's tokens and of the other bands, [..., count + bands - 1]."""
            others = nn.functional.linear(x, self.others.to(x.dtype))
            return torch.cat([self.table.band_scores(x, 0), others], -1).float().log_softmax(-1)

    return AdaptiveHead
