"""Healing: a short distillation in which the vectors of the tokens learn to be rounded."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from specs.schema.steps.adaptive_input import HealSpec
from tasks.adaptive_input import layout as plan
from tasks.adaptive_input import rounding, table
from tasks.adaptive_input.bands import Fitted
from tasks.adaptive_input.places import Place
from tasks.compress.teach import Comparison, Teaching
from tasks.context import Artifact, StepContext

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tasks.finetune.loop import Trained


def soften(fitted: Fitted) -> Any:
    """A table that is rounded in every pass and learns through it; see ``rounding.through``."""
    return _soft()(fitted)


def harden(soft: Any) -> Any:
    """The table as it is stored."""
    import torch

    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        for number, band in enumerate(soft.layout.bands):
            tensors |= _hardened(soft, f"rows{number}", band.bits)
            if band.rank < soft.layout.width:
                tensors |= _hardened(soft, f"projection{number}", plan.projection_bits(band.bits))
            tensors |= _hardened(soft, f"mean{number}", 16)
    return table.stored(soft.layout, soft.band_of.cpu(), tensors)


def _hardened(soft: Any, name: str, bits: int) -> dict[str, Tensor]:
    values = getattr(soft, name).detach().cpu().float()
    if bits == 16:
        return {f"{name}_half": values.half()}
    scale = soft.scale(name).detach().cpu().half()
    return table.coded(name, rounding.to_codes(values, scale, bits), scale, bits)


@dataclass(frozen=True)
class Healing:
    """A loss for ``tasks.finetune.loop.train``: that of ``Teaching``, and the squared error of the vectors of the
    batch's tokens over the energy of those before the step.

    Args:
        teaching: compares the outputs.
        pairs: tables that learn, each with the dense one before the step.
        vectors: what the error of the vectors counts.
    """

    teaching: Teaching
    pairs: Sequence[tuple[Any, Tensor]]
    vectors: float

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        total, weight = self.teaching(model, batch)
        if not self.vectors:
            return total, weight
        ids = [batch[name] for name in ("input_ids", "labels") if name in batch and batch[name].ndim == 2]
        for soft, dense in self.pairs:
            for one in ids:
                tokens = one[(one >= 0) & (one < len(dense))].unique()
                wanted = dense[tokens]
                error = (soft.lookup(tokens) - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)
                total = total + self.vectors * weight * error / (len(self.pairs) * len(ids))
        return total, weight


def heal(
    network: Any, found: Sequence[tuple[Place, Fitted]], model: Artifact, spec: HealSpec, ctx: StepContext
) -> tuple[list[nn.Module], Trained]:
    """Train the tables of a model, or the whole of it, to do what it did with the dense ones.

    Args:
        network: the dense model; it gets the trained tables, and where the whole learns its other weights.
        found: its tables with their bands.
        model: where it came from.
        spec: how to train.
        ctx: where and on what.

    Returns:
        The tables as they are stored, and what the training did.

    Raises:
        StepError: the training failed.
    """
    from tasks.finetune.finetune import training_data
    from tasks.finetune.loop import train
    from tasks.models.applications import family_of

    teacher = copy.deepcopy(network).eval().requires_grad_(False).to(ctx.device)
    if spec.trains == "input":
        network.requires_grad_(False)
    softened = []
    for place, fitted in found:
        soft = soften(fitted)
        table.place(network, soft, place.embeddings, place.heads)
        softened.append(soft)
    data = training_data(network, model, ctx)
    several = data.labels is not None and data.labels.ndim == 2
    how = Comparison(
        ctx.task, family_of(network.config), alpha=spec.alpha, temperature=spec.temperature, several=several
    )
    dense = [place.weight.float().to(ctx.device) for place, _ in found]
    loss = Healing(Teaching(how, teacher), list(zip(softened, dense, strict=True)), spec.vectors)
    ctx.note("healing")
    trained = train(network, data, spec, ctx, loss=loss)
    network.to("cpu")
    hard = [harden(soft) for soft in softened]
    for (place, _), one in zip(found, hard, strict=True):
        table.place(network, one, place.embeddings, place.heads)
    network.requires_grad_(True)
    return hard, trained


@cache
def _soft() -> Any:
    import torch
    from torch import nn

    class Soft(table.classes().Table):
        """Floats that are rounded as they are read. Scales are learned as their logarithms, whose steps do not depend
        on how large they are."""

        def __init__(self, fitted: Fitted) -> None:
            super().__init__(fitted.layout, plan.pack_index(fitted.band_of), {})
            for number, band in enumerate(fitted.layout.bands):
                self._learn(f"rows{number}", fitted.rows[number], band.bits)
                if band.rank < fitted.layout.width:
                    bits = plan.projection_bits(band.bits)
                    self._learn(f"projection{number}", fitted.projections[number], bits)
                self._learn(f"mean{number}", fitted.means[number], 16)

        def _learn(self, name: str, values: Tensor, bits: int) -> None:
            self.register_parameter(name, nn.Parameter(values.clone()))
            if bits < 16:
                scale = rounding.scales_of(values, bits).float()
                self.register_buffer(f"{name}_start", scale)
                self.register_parameter(f"{name}_log", nn.Parameter(torch.zeros_like(scale)))

        def scale(self, name: str) -> Tensor:
            return getattr(self, f"{name}_start") * getattr(self, f"{name}_log").exp()

        def mean(self, number: int) -> Tensor:
            return self._read(f"mean{number}", 0, 16)

        def _read(self, name: str, columns: int, bits: int) -> Tensor:
            values = getattr(self, name)
            if bits == 16:
                return values + (values.half().float() - values).detach()
            return rounding.through(values, self.scale(name), bits)

    return Soft
