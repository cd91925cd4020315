"""Gates: limits on metrics."""

from __future__ import annotations

from math import isfinite
from typing import Literal

from pydantic import Field, model_validator

from specs.schema.base import BASELINE, FieldError, SpecModel
from specs.schema.metrics import METRICS, Metric
from specs.schema.suggest import nearest
from specs.schema.units import Limit, LimitField

FORMS: tuple[Literal["at_least", "at_most", "drop", "gain"], ...] = ("at_least", "at_most", "drop", "gain")
"""The forms of a gate, of which each has one."""

UNITS_OF: dict[str, tuple[str, ...]] = {
    "share": ("", "%"),
    "seconds": ("seconds",),
    "bytes": ("", "bytes"),
    "count": ("",),
    "rate": ("",),
    "number": ("",),
}
"""Units that an absolute limit may have, by the metric's unit."""

POINTS = {"bleu": 1.0, "chrf": 1.0}
"""Metrics whose unit is a point itself, as they run from 0 to 100."""

_EXAMPLE = {"share": "99%", "seconds": "10 ms", "bytes": "14 MB", "count": "1000000", "rate": "100", "number": "12.5"}


def points(metric: Metric) -> float | None:
    """How many points one of the metric's unit is; None where it is not measured in points."""
    return 100.0 if metric.unit == "share" else POINTS.get(metric.name)


class DropSpec(SpecModel):
    """How much worse than the reference the metric may be, in its own direction."""

    at_most: LimitField = Field(
        description="`1.5 points` for shares, BLEU and chrF, a bare number for other metrics without a unit, or a "
        "relative `5%`",
        examples=["1.5 points"],
    )


class GainSpec(SpecModel):
    """How many times better than the reference the metric must be."""

    at_least: LimitField = Field(description="a factor", examples=["4x"])


class GateSpec(SpecModel):
    """One limit on one metric. Exactly one of `at_least`, `at_most`, `drop` and `gain` is given."""

    step: str | None = Field(
        default=None,
        examples=["student"],
        description="the step whose artifact is judged; default: every final step that has the metric",
    )
    metric: str = Field(
        description="the metric that is limited", examples=["accuracy"], json_schema_extra={"enum": list(METRICS)}
    )
    at_least: LimitField | None = Field(
        default=None, examples=["85%"], description="the smallest value allowed, in the metric's unit"
    )
    at_most: LimitField | None = Field(
        default=None, examples=["10 ms"], description="the largest value allowed, in the metric's unit"
    )
    drop: DropSpec | None = Field(
        default=None,
        examples=["{at_most: 1.5 points}"],
        description="how much worse than `relative_to` it may be, for example {at_most: 1.5 points}",
    )
    gain: GainSpec | None = Field(
        default=None,
        examples=["{at_least: 4x}"],
        description="how many times better than `relative_to` it must be, for example {at_least: 4x}",
    )
    relative_to: str = Field(default=BASELINE, description="the step that drop and gain refer to")

    @property
    def form(self) -> Literal["at_least", "at_most", "drop", "gain"]:
        """Which of the four forms the gate has."""
        return next(form for form in FORMS if getattr(self, form) is not None)

    @property
    def limit(self) -> Limit:
        """The limit, whichever form it has; shares as 0 to 1 for `at_least` and `at_most`."""
        if self.drop is not None:
            return self.drop.at_most
        if self.gain is not None:
            return self.gain.at_least
        limit = self.at_least if self.at_least is not None else self.at_most
        assert limit is not None
        return Limit((limit.number / 100, "")) if limit.unit == "%" else limit

    def __str__(self) -> str:
        sign = {"at_least": "≥", "at_most": "≤", "drop": "drop ≤", "gain": "gain ≥"}[self.form]
        raw = self.at_least if self.at_least is not None else self.at_most if self.at_most is not None else self.limit
        against = f" against {self.relative_to}" if self.form in ("drop", "gain") else ""
        return f"{self.metric} {sign} {raw}{against}"

    @model_validator(mode="after")
    def _makes_sense(self) -> GateSpec:
        metric = METRICS.get(self.metric)
        if metric is None:
            raise FieldError("metric", f"metric {self.metric!r} is unknown; {nearest(self.metric, METRICS)}")
        given = [form for form in FORMS if getattr(self, form) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a gate takes exactly one of at_least, at_most, drop, gain; got {', '.join(given) or 'none'}"
            )
        _check_limit(self, metric)
        if self.relative_to != BASELINE and self.form not in ("drop", "gain"):
            text = f"{self.form} compares with no step; leave `relative_to` out, or write drop or gain"
            raise FieldError("relative_to", text)
        return self


def _check_limit(gate: GateSpec, metric: Metric) -> None:
    """Refuse a limit in another unit than the metric's, and one that no value can meet, or that every value meets.

    Raises:
        FieldError: the limit is not one for the metric.
    """
    raw = gate.at_least if gate.at_least is not None else gate.at_most if gate.at_most is not None else gate.limit
    if gate.form == "gain":
        allowed, example = ("x", ""), "4x"
    elif gate.form == "drop":
        allowed, example = _drop_units(metric)
    else:
        allowed, example = UNITS_OF[metric.unit], _example(metric, raw)
    if raw.unit not in allowed:
        wrong = f"has unit {raw.unit!r}" if raw.unit else "has no unit"
    elif gate.form == "gain":
        wrong = "is not more than 0" if raw.number <= 0 else ""
    elif gate.form == "drop":
        wrong = "is negative" if raw.number < 0 else "always holds" if _holds_always(raw, metric) else ""
    else:
        wrong = _out_of_range(gate.limit.number, metric, gate.form)
    if wrong:
        field = {"drop": "drop.at_most", "gain": "gain.at_least"}.get(gate.form, gate.form)
        raise FieldError(field, f"{gate.form} of {gate.metric} {wrong}; write for example {example}")


def _example(metric: Metric, written: Limit) -> str:
    """A limit for the metric; the number as it is written where only its sign for per cent is missing."""
    if metric.unit == "share" and written.unit == "" and 1 < written.number <= 100:
        return f"{written.number:g}%"
    if metric.unit == "share" and metric.better == "lower":
        return "5%"
    high = metric.range[1]
    return f"{high / 2:g}" if metric.unit == "number" and isfinite(high) else _EXAMPLE[metric.unit]


def _out_of_range(number: float, metric: Metric, form: str) -> str:
    low, high = metric.range
    if not low <= number <= high:
        if metric.unit == "share":
            return "is outside 0% to 100%"
        if isfinite(high):
            return f"is outside {low:g} to {high:g}"
        return f"is less than {low:g}" if low else "is negative"
    never_zero = metric.unit in ("seconds", "bytes", "count", "rate") and metric.of != "npu"
    return "is 0, which no model reaches" if never_zero and form == "at_most" and number == 0 else ""


def _holds_always(drop: Limit, metric: Metric) -> bool:
    """Whether no value of the metric is so much worse than another."""
    low, high = metric.range
    if drop.unit == "%":
        return drop.number >= 100 and metric.better == "higher" and low >= 0
    return drop.number / (points(metric) or 1) >= high - low


def _drop_units(metric: Metric) -> tuple[tuple[str, ...], str]:
    """Units that a drop may have, and an example."""
    if metric.unit == "share":
        return ("%", "points"), "1.5 points"
    if points(metric):
        return ("", "%", "points"), "1 point"
    return (("", "%"), "0.02 or 5%") if metric.unit == "number" else (("%",), "5%")
