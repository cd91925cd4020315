"""Which examples a training takes when: all of it follows from the seed and the optimiser step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from tasks.context import StepError
from tasks.data.collate import collate
from tasks.data.encoded import Encoded

if TYPE_CHECKING:
    import torch

BUCKET_STEPS = 16
"""Optimiser steps whose examples are sorted by length together, so that the examples of a batch are about as long."""

_HOLDOUT_SALT = 1
_EPOCH_SALT = 1_000_000


def hold_out(document: np.ndarray, share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Split the examples into training and validation, keeping the windows of a document on one side.

    Where no document is small enough to be held out whole (a corpus that is one text), windows are held out instead.

    Args:
        document: the document of each example, [N].
        share: the share of the examples to hold out, at least one where it is above 0.
        rng: decides which.

    Returns:
        Indices of the training and of the validation examples, both ascending.
    """
    count = len(document)
    wanted = min(max(1, round(share * count)), count - 1) if share > 0 else 0
    if wanted <= 0:
        return np.arange(count), np.arange(0)
    _, owner, sizes = np.unique(document, return_inverse=True, return_counts=True)
    order = rng.permutation(len(sizes))
    fits = order[np.cumsum(sizes[order]) <= wanted]
    held = np.isin(owner, fits) if len(fits) else np.zeros(count, bool)
    if not held.any():
        held[rng.permutation(count)[:wanted]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _divided(
    document: np.ndarray, share: float, rng: np.random.Generator, roles: Roles | None
) -> tuple[np.ndarray, np.ndarray]:
    """The examples to train on and those to measure by, ascending."""
    if roles is None:
        return hold_out(document, share, rng)
    known = np.flatnonzero(roles.measures)
    held = known[hold_out(document[known], share, rng)[1]]
    return np.flatnonzero(roles.trains & ~np.isin(roles.origin, held)), held


def epoch_order(lengths: np.ndarray, batch: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The batches of one epoch: a random permutation, in which neighbours of about one length share a batch.

    Padding a batch to its longest example wastes most of the work where lengths differ much. So the permutation is cut
    into stretches of ``BUCKET_STEPS`` batches, each stretch is sorted by length and cut into batches, and the batches
    of the epoch are shuffled again.

    Args:
        lengths: tokens of each example, [N].
        batch: examples of an optimiser step.
        rng: decides the order.

    Returns:
        Positions into ``lengths``, one array a batch; together a permutation. The last may be smaller.
    """
    order = rng.permutation(len(lengths))
    stretch = batch * BUCKET_STEPS
    batches = []
    for start in range(0, len(order), stretch):
        part = order[start : start + stretch]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[at : at + batch] for at in range(0, len(part), batch)]
    return [batches[at] for at in rng.permutation(len(batches))]


def balanced(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many draws as there are labels, of every class equally often.

    Of a frequent class it takes some of the examples, of a rare one all of them again and again. Where the draws do not
    divide by the classes, some classes are drawn once more.

    Args:
        labels: the class of each example, [N].
        rng: decides which examples, in which order.

    Returns:
        Positions into ``labels``, [N].
    """
    classes = rng.permutation(np.unique(labels))
    drawn = []
    for number, label in enumerate(classes):
        quota = (len(labels) + number) // len(classes)
        members = np.flatnonzero(labels == label)
        rounds = [rng.permutation(members) for _ in range(-(-quota // len(members)))]
        drawn.append(np.concatenate([np.arange(0), *rounds])[:quota])
    return rng.permutation(np.concatenate(drawn))


@dataclass(frozen=True)
class Roles:
    """What each example is there for.

    Args:
        trains: whether it is learned from, bool [N].
        measures: whether it may be held out to measure by, bool [N].
        origin: the example that it is made from, else itself, int64 [N]. What is made from an example that is held out
            is left out of the training.
    """

    trains: np.ndarray
    measures: np.ndarray
    origin: np.ndarray


class Batches:
    """The training and validation examples of a data set, as tensors on a device.

    Args:
        data: the encoded training split.
        share: the share that is held out for validation.
        examples: examples of an optimiser step.
        seed: decides the split and the order.
        device: where the tensors are.
        sampling: whether an epoch sees every training example once, or every class equally often.
        roles: what each example is there for; default: for both.

    Raises:
        StepError: classes cannot be balanced in this data.
    """

    def __init__(
        self,
        data: Encoded,
        share: float,
        examples: int,
        seed: int,
        device: str,
        sampling: Literal["natural", "balanced"] = "natural",
        roles: Roles | None = None,
    ) -> None:
        self.data, self.examples, self.seed, self.device = data, examples, seed, device
        self.sampling = sampling
        if sampling == "balanced" and (data.labels is None or data.labels.ndim > 1):
            raise StepError("sampling: balanced needs one label an example; write sampling: natural")
        self.lengths = data.lengths()
        rng = np.random.default_rng([seed, _HOLDOUT_SALT])
        self.train, self.validation = _divided(np.asarray(data.document), share, rng, roles)
        self.steps_per_epoch = -(-len(self.train) // examples)
        self._epoch = -1
        self._order: list[np.ndarray] = []

    def of_step(self, step: int) -> np.ndarray:
        """The examples of optimiser step ``step``, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, _EPOCH_SALT + epoch])
            drawn = self.train
            if self.sampling == "balanced" and self.data.labels is not None:
                drawn = drawn[balanced(np.asarray(self.data.labels)[drawn], rng)]
            self._order = [drawn[batch] for batch in epoch_order(self.lengths[drawn], self.examples, rng)]
            self._epoch = epoch
        return self._order[position]

    def validation_batches(self, size: int) -> list[np.ndarray]:
        """The validation examples by length, in batches of ``size``."""
        order = self.validation[np.argsort(self.lengths[self.validation], kind="stable")]
        return [order[at : at + size] for at in range(0, len(order), size)]

    def tensors(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """The examples ``rows`` as ``tasks.data.collate`` puts them together, cut to the longest of them; whole numbers
        are int64."""
        import torch

        batch = {name: torch.from_numpy(array).to(self.device) for name, array in collate(self.data, rows).items()}
        return {name: tensor if tensor.is_floating_point() else tensor.long() for name, tensor in batch.items()}
