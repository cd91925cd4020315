"""The choice between branches."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from specs.schema.base import FieldError, Kind, Needs, StepSpec
from specs.schema.metrics import METRICS
from specs.schema.suggest import nearest


class SelectSpec(StepSpec):
    """Take the best of several artifacts: the one with the smallest or largest metric among those that pass the gates
    on this step. Fails when none passes. From branches that quantize and export for several runtimes it chooses the one
    that is fastest on this machine among the correct ones: minimise: latency_p50, with a gate on parity_error. What
    each measured is kept in the artifact's properties and shown in the report."""

    takes: ClassVar[tuple[Kind, ...]] = ("model", "swapped", "packed", "export")
    makes: ClassVar[tuple[Kind, ...]] = ("model", "swapped", "packed", "export")
    heavy: ClassVar[bool] = False
    judges: ClassVar[bool] = True
    names_steps: ClassVar[tuple[str, ...]] = ("from",)

    uses: Literal["select"]
    from_: Needs = Field(alias="from", min_length=1, description="the steps to choose from", examples=["[cpu, npu]"])
    minimise: str | None = Field(
        default=None,
        examples=["latency_p50"],
        description="the metric to make small, for example latency_p50",
        json_schema_extra={"enum": [*METRICS, None]},
    )
    maximise: str | None = Field(
        default=None,
        examples=["accuracy"],
        description="the metric to make large, for example accuracy",
        json_schema_extra={"enum": [*METRICS, None]},
    )

    def estimate(self, model: int) -> tuple[int, int]:
        return 0, 0

    def inputs(self) -> tuple[tuple[str, str], ...]:
        return tuple(("from", name) for name in self.from_)

    def gives(self, taken: tuple[Kind, ...]) -> Kind:
        kinds = set(taken)
        # What can be done with any of them can be done with the one that least can be done with.
        return next(kind for kind in ("export", "packed", "swapped", "model") if kind in kinds)

    def measurable(self, kind: Kind, taken: tuple[frozenset[str], ...]) -> frozenset[str]:
        return frozenset.intersection(*taken) if taken else frozenset()

    @property
    def metric(self) -> str:
        """The metric that decides."""
        return self.minimise or self.maximise or ""

    @model_validator(mode="after")
    def _one_known_metric(self) -> SelectSpec:
        if (self.minimise is None) == (self.maximise is None):
            raise ValueError(
                "select takes exactly one of `minimise` and `maximise`; write for example minimise: latency_p50"
            )
        field, other = ("minimise", "maximise") if self.minimise is not None else ("maximise", "minimise")
        if self.metric not in METRICS:
            raise FieldError(field, f"metric {self.metric!r} is unknown; {nearest(self.metric, METRICS)}")
        better = METRICS[self.metric].better
        if (better == "lower") != (field == "minimise"):
            text = f"this would choose the worst, as {better} is better for {self.metric}"
            raise FieldError(field, f"{text}; write {other}: {self.metric}")
        if self.needs is not None:
            raise FieldError("needs", "select takes its inputs from `from`; leave out `needs`")
        return self
