"""What a step function is given, and what it gives back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.schema.base import Kind, Task
from specs.schema.gates import GateSpec
from specs.schema.pipeline import DataSpec, ModelSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Artifact:
    """An immutable folder in the store. ``key`` names the recipe, ``digest`` the content."""

    key: str
    kind: Kind
    digest: str
    path: Path
    manifest: Mapping[str, Any] = field(repr=False)

    @property
    def properties(self) -> Mapping[str, Any]:
        """What the step recorded about the artifact."""
        return self.manifest["properties"]


@dataclass(frozen=True)
class Evaluation:
    """The measurements of one artifact, as ``tasks.evaluate`` wrote them into ``evaluation.json`` under ``path``."""

    path: Path
    record: Mapping[str, Any] = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """The evaluation that stands in ``path``."""
        return cls(path, json.loads((path / "evaluation.json").read_bytes()))

    @property
    def metrics(self) -> Mapping[str, Mapping[str, Any]]:
        """Metric name to ``{"value", "low", "high"}``; the interval is None where nothing was sampled."""
        return self.record["metrics"]


@dataclass(frozen=True)
class StepResult:
    """What a step did. The artifact itself is what the step wrote into ``ctx.out``.

    Args:
        kind: the kind of the artifact.
        touched: names of what was changed or made; a step that touched nothing fails.
        left: what was left alone, each with the reason.
        summary: one line for the report, for example ``converted 37 of 38 Linear; lm_head: tied``.
        properties: recorded in the manifest as JSON.
        metrics: figures that the step itself measured, by the names of ``specs.schema.metrics``.
        warnings: what the user should know, for example that a method does not pay on the target.
    """

    kind: Kind
    touched: tuple[str, ...]
    summary: str
    left: Mapping[str, str] = field(default_factory=dict)
    properties: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class StepError(Exception):
    """A step cannot be done, for a reason that the writer of the spec can act on: what is wrong and the remedy."""


def _ignore(event: Mapping[str, Any]) -> None:
    return None


@dataclass(frozen=True)
class StepContext:
    """Everything a step may know besides its inputs and its spec.

    Args:
        step_id: the step's id in the spec.
        task: what the language model does.
        model: the spec's model block (paths already absolute).
        data: the spec's data block (paths already absolute).
        out: an empty folder; what the step writes here becomes the artifact.
        work: scratch space, removed afterwards.
        checkpoints: survives a killed run; the same step finds it again.
        store: the root of the artifact store, for cached encoded data.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads that the step may use.
        seed: every random choice follows from it.
        evaluations: the measurements of the inputs, by step id (``select`` alone is given them).
        gates: the gates on this step (``select`` alone is given them).
        emit: receives every event; the default drops them, so that a step runs in one line in a test.
        exclusive: while it is held nothing else of the run computes: a step that measures a time does so inside.
    """

    step_id: str
    task: Task
    model: ModelSpec
    data: DataSpec
    out: Path
    work: Path
    checkpoints: Path
    store: Path
    device: str = "cpu"
    threads: int = 1
    seed: int = 0
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)
    gates: tuple[GateSpec, ...] = ()
    emit: Callable[[Mapping[str, Any]], None] = _ignore
    exclusive: Callable[[], AbstractContextManager[object]] = nullcontext

    def metric(self, name: str, value: float, step: int | None = None) -> None:
        """Record a figure over time, for example the training loss at an optimiser step."""
        self.emit({"event": "metric", "name": name, "value": float(value), "step": step})

    def progress(self, done: float, total: float, unit: str = "steps") -> None:
        """Say how far the step is; the display derives rate and ETA."""
        self.emit({"event": "progress", "done": done, "total": total, "unit": unit})

    def note(self, text: str) -> None:
        """Say what is being done at the moment, in a few words."""
        self.emit({"event": "note", "text": text})

    def generator(self, salt: int = 0) -> torch.Generator:
        """A CPU generator seeded from the spec; different salts give independent streams."""
        import torch

        return torch.Generator().manual_seed((self.seed * 1_000_003 + salt) % 2**63)
