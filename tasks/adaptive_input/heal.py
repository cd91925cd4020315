"""Healing: a short distillation in which the vectors of the tokens learn to be rounded."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from specs.schema.steps.adaptive_input import HealSpec
from tasks.adaptive_input import layout as plan
from tasks.adaptive_input import noise, rounding, table
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
            learned = {name: soft.learned(f"{name}{number}") for name in ("rows", "projection", "mean")}
            scale = behind = None
            if band.most < 16:
                scale = soft.scale(f"rows{number}").cpu().half()
                behind = soft.scale(f"projection{number}").cpu() if band.projected else None
            tensors |= table.tensors_of(number, band, **learned, scale=scale, behind=behind)
    return table.stored(soft.layout, soft.band_of.cpu(), tensors)


@dataclass(frozen=True)
class Healing:
    """A loss for ``tasks.finetune.loop.train``: that of ``Teaching``, and the squared error of the vectors of the
    batch's tokens over the energy of those before the step.

    Args:
        teaching: compares the outputs.
        pairs: tables that learn, each with the dense one before the step.
        vectors: what the error of the vectors counts.
        names: of what holds tokens in a batch.
        tokens: those that disturb a batch; see ``tasks.adaptive_input.noise``.
        noise: how much.
    """

    teaching: Teaching
    pairs: Sequence[tuple[Any, Tensor]]
    vectors: float
    names: Sequence[str]
    tokens: Tensor
    noise: float

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        if self.noise and len(self.tokens):
            batch = noise.disturbed(batch, self.names, self.tokens, self.noise)
        total, weight = self.teaching(model, batch)
        if not self.vectors:
            return total, weight
        ids = [batch[name] for name in self.names]
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
    names = [name for name, held in (("input_ids", data.input_ids), ("labels", data.target_ids)) if held is not None]
    tokens = noise.ordinary(model.path, len(dense[0]))
    pairs = list(zip(softened, dense, strict=True))
    loss = Healing(Teaching(how, teacher), pairs, spec.vectors, names, tokens, spec.noise)
    ctx.note("healing")
    trained = train(network, data, spec, ctx, loss=loss)
    network.to("cpu")
    hard = [harden(soft) for soft in softened]
    for (place, _), one in zip(found, hard, strict=True):
        table.place(network, one, place.embeddings, place.heads)
    network.requires_grad_(True)
    return hard, trained


def _halved(values: Tensor) -> Tensor:
    """As float16 says them; backwards nothing happened."""
    return values + (values.half().float() - values).detach()


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
                rows, projection = fitted.rows[number], fitted.projections[number]
                scaled = band.most < 16
                across = rows if projection is None else rows.T
                self._learn(f"rows{number}", rows, rounding.scales_of(across, band.bits) if scaled else None)
                if projection is not None:
                    scale = rounding.scales_of(projection, band.projection_bits) if scaled else None
                    self._learn(f"projection{number}", projection, scale)
                self._learn(f"mean{number}", fitted.means[number], None)

        def _learn(self, name: str, values: Tensor, scale: Tensor | None) -> None:
            self.register_parameter(name, nn.Parameter(values.clone()))
            if scale is not None:
                self.register_buffer(f"{name}_start", scale.float())
                self.register_parameter(f"{name}_log", nn.Parameter(torch.zeros(len(scale))))

        def learned(self, name: str) -> Tensor | None:
            """The floats behind the codes, on the CPU; None where the band has none."""
            found = getattr(self, name, None)
            return None if found is None else found.detach().cpu().float()

        def scale(self, name: str) -> Tensor:
            return getattr(self, f"{name}_start") * getattr(self, f"{name}_log").exp()

        def rows(self, number: int) -> Tensor:
            band, rows = self.layout.bands[number], getattr(self, f"rows{number}")
            if band.most >= 16:
                return _halved(rows)
            scale = self.scale(f"rows{number}")
            if not band.projected:
                return rounding.through(rows, scale, band.bits)
            return rounding.through(rows.T, scale, band.bits).T

        def projection(self, number: int) -> Tensor | None:
            band, name = self.layout.bands[number], f"projection{number}"
            if not band.projected:
                return None
            if band.most >= 16:
                return _halved(getattr(self, name))
            return rounding.through(getattr(self, name), self.scale(name), band.projection_bits)

        def mean(self, number: int) -> Tensor:
            return _halved(getattr(self, f"mean{number}"))

    return Soft
