"""How much each token tells: its self-information under the data, or its surprisal under the model itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.context import StepError

if TYPE_CHECKING:
    import numpy as np

    from tasks.data.encoded import Encoded

RARE = 0.1
"""Share of the weight that all tokens have alike, so that those which the data hardly shows are not given up."""

SURPRISED = 256
"""Training examples on which the surprisal of tokens is measured."""

_SCORES = 2**26
"""Scores of tokens that are computed at a time, about."""

_PRIOR = 8.0
"""Occurrences at which a token's own mean surprisal counts as much as its self-information."""


@dataclass(frozen=True)
class Information:
    """What is known of every token; all of them [V].

    Args:
        counts: occurrences in the training data, int64.
        bits: the information of a token, float64.
        weights: what an error in its vector counts; they add up to 1.
        order: the tokens by falling weight, of equal ones the lower id first, int64.
    """

    counts: np.ndarray
    bits: np.ndarray
    weights: np.ndarray
    order: np.ndarray


def unigram(counts: np.ndarray) -> Information:
    """Information from occurrences alone: ``-log2`` of the smoothed frequency (add one).

    A token's error counts by its frequency, of which a share is spread over all tokens alike.
    """
    import numpy as np

    shares = (counts + 1) / (counts.sum() + len(counts))
    return _weighed(counts, -np.log2(shares), shares)


def contextual(counts: np.ndarray, surprisal: np.ndarray, seen: np.ndarray) -> Information:
    """Information from what the model itself does not foresee.

    The mean surprisal of a token is drawn towards its self-information where it was seldom seen. Its error counts by
    frequency times surprisal, which is how much of all the information it carries: a token that follows from those
    before it is missed less.

    Args:
        counts: occurrences in the training data, [V].
        surprisal: sum of ``-log2 p`` over the occurrences on which it was measured, [V].
        seen: how many those are, [V].
    """
    plain = unigram(counts)
    bits = (surprisal + _PRIOR * plain.bits) / (seen + _PRIOR)
    shares = (counts + 1) * bits
    return _weighed(counts, bits, shares / shares.sum())


def _weighed(counts: np.ndarray, bits: np.ndarray, shares: np.ndarray) -> Information:
    import numpy as np

    weights = (1 - RARE) * shares + RARE / len(shares)
    return Information(counts, bits, weights, np.lexsort((np.arange(len(weights)), -weights)))


def count(data: Encoded, rows: int) -> np.ndarray:
    """Occurrences of every token in what is read and what is written, int64 [rows].

    Raises:
        StepError: the data has none.
    """
    import numpy as np

    found = np.zeros(rows, np.int64)
    for ids, mask in ((data.input_ids, data.attention_mask), (data.target_ids, data.target_mask)):
        if ids is not None and mask is not None:
            found += np.bincount(np.asarray(ids)[np.asarray(mask) > 0], minlength=rows)[:rows]
    if not found.sum():
        raise StepError("the training data has no tokens to count; check data.train, its fields and train_limit")
    return found


def surprise(
    network: Any, data: Encoded, rows: int, progress: Callable[[float, float, str], None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The sum of ``-log2 p`` of each token under a decoder, and how often it was foretold; both [rows].

    Args:
        network: a causal language model.
        data: examples.
        rows: of the vocabulary.
        progress: is told examples done and in all.
    """
    import numpy as np
    import torch

    total, seen = np.zeros(rows), np.zeros(rows)
    with torch.inference_mode():
        together = min(max(_SCORES // (data.length * rows), 1), 8)
        for at in range(0, len(data), together):
            part = data.take(slice(at, at + together))
            ids, mask = (torch.from_numpy(np.array(one, np.int64)) for one in (part.input_ids, part.attention_mask))
            logs = network(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
            bits = -logs.gather(-1, ids[:, 1:, None])[..., 0] / np.log(2)
            real = mask[:, 1:].bool()
            tokens, values = ids[:, 1:][real].numpy(), bits[real].double().numpy()
            np.add.at(total, tokens, values)
            np.add.at(seen, tokens, 1)
            if progress is not None:
                progress(at + len(part), len(data), "examples")
    return total, seen
