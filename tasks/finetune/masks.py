"""Which weights a training keeps: the others are 0 after every optimiser step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

Kept = Mapping[str, "Tensor"]
"""Parameter name to a bool tensor of its shape, True where the weight is kept."""


class Masks(Protocol):
    """The masks of a training, which may change as it goes on.

    The training asks at every optimiser step, when the gradients are known and the weights are still those that gave
    them; so what holds at a step follows from the tensors of the checkpoint before it.
    """

    def start(self, weights: Mapping[str, nn.Parameter], total: int, warmup: int) -> Kept:
        """The masks that hold before the first optimiser step.

        Args:
            weights: the trained parameters by name.
            total: optimiser steps of the training.
            warmup: those of them in which the learning rate rises.
        """
        ...

    def at(self, step: int, weights: Mapping[str, nn.Parameter]) -> Kept:
        """The masks that hold from optimiser step ``step`` (from 0) on; each parameter's ``grad`` is the mean gradient.

        What becomes 0 need not be set to 0 here; what comes back is given its value here.
        """
        ...

    def settled(self, done: int) -> bool:
        """Whether the masks after ``done`` optimiser steps are the last ones: only then a validation counts."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """What a checkpoint must hold beside the weights."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> Kept:
        """Go on from what ``tensors`` gave, after ``start``; the masks that hold."""
        ...


class Fixed:
    """The same masks throughout.

    Args:
        kept: the masks.

    Raises:
        ValueError: (``start``) a mask fits no trained parameter.
    """

    def __init__(self, kept: Kept) -> None:
        self.kept = kept

    def start(self, weights: Mapping[str, nn.Parameter], total: int, warmup: int) -> Kept:
        for name, mask in self.kept.items():
            if name not in weights or weights[name].shape != mask.shape:
                raise ValueError(f"mask {name!r} of shape {tuple(mask.shape)} fits no trained parameter")
        self.kept = {name: mask.to(weights[name].device) for name, mask in self.kept.items()}
        return self.kept

    def at(self, step: int, weights: Mapping[str, nn.Parameter]) -> Kept:
        return self.kept

    def settled(self, done: int) -> bool:
        return True

    def tensors(self) -> Mapping[str, Tensor]:
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> Kept:
        return self.kept


def zero(weights: Mapping[str, nn.Parameter], kept: Kept) -> None:
    """Set the weights that are not kept to 0."""
    import torch

    with torch.no_grad():
        for name, mask in kept.items():
            weights[name].masked_fill_(~mask, 0)


def zero_gradients(weights: Mapping[str, nn.Parameter], kept: Kept) -> None:
    """Set the gradients of the weights that are not kept to 0, so that neither the norm nor the optimiser sees them."""
    for name, mask in kept.items():
        gradient = weights[name].grad
        if gradient is not None:
            gradient.masked_fill_(~mask, 0)


def zeros_of(model: nn.Module) -> dict[str, Tensor]:
    """Masks that keep the zeros of a pruned model, of the linear layers that have any; empty where none has.

    Trained weights are practically never 0 by chance. Embeddings are left out, whose rows for padding are 0 by nature,
    and so is a layer that is 0 throughout: it was made to start from 0.
    """
    from tasks.models.layout import linear_layers

    masks = {}
    for layer in linear_layers(model):
        kept = layer.weight.detach() != 0
        if layer.tied is None and layer.weight.requires_grad and bool(kept.any()) and not bool(kept.all()):
            masks[layer.weight_name] = kept
    return masks
