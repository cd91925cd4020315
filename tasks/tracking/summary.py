"""What a run came to: the headline metrics, and the Markdown that stands on its page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specs.schema.base import BASELINE, Task
from specs.schema.gates import points
from specs.schema.metrics import HEADLINE, METRICS
from tasks.evaluate.format import figure
from tasks.journal import Event

Values = Mapping[str, Mapping[str, Any]]


@dataclass
class Row:
    """One step, as far as it is known."""

    step: str
    state: str = "running"
    uses: str = ""
    summary: str = ""
    error: str = ""
    warnings: tuple[str, ...] = ()
    metrics: Values = field(default_factory=dict)

    def value(self, metric: str) -> float | None:
        """The value of a metric of the step's artifact; None where it was not measured."""
        found = self.metrics.get(metric)
        return None if found is None else found["value"]


@dataclass
class Summary:
    """The whole run, as far as its journal tells."""

    task: Task
    rows: dict[str, Row]
    gates: list[Event]
    status: str | None
    seconds: float | None
    result: str | None

    @property
    def quality(self) -> str:
        """The metric that the task is judged by."""
        return HEADLINE[self.task]


def summarise(events: Iterable[Event]) -> Summary:
    """Read a run's journal into a summary. Its result is that of ``result_step``, whether it was measured or not."""
    start: Event = {}
    end: Event | None = None
    rows: dict[str, Row] = {}
    gates: dict[tuple[Any, Any], Event] = {}
    for event in events:
        kind = event["event"]
        if kind == "run_start":
            start = event
        elif kind == "run_end":
            end = event
        elif kind == "gate":
            gates[event.get("step"), event.get("gate")] = event
        elif kind in ("step_start", "step_end"):
            row = rows.setdefault(event["step"], Row(event["step"]))
            row.uses = event.get("uses") or row.uses
            row.state = event.get("state") or "running"
            if kind == "step_end":
                _finish(row, event)
    order = [step["id"] for step in start.get("steps", ())]
    rank = {name: place for place, name in enumerate(order)}
    rows = dict(sorted(rows.items(), key=lambda item: rank.get(item[0], len(rank))))
    seconds = end["time"] - start["time"] if start and end else None
    registered = ((start.get("spec") or {}).get("tracking") or {}).get("register_step")
    return Summary(
        task=start.get("task", "text-generation"),
        rows=rows,
        gates=list(gates.values()),
        status=None if end is None else end["status"],
        seconds=seconds,
        result=result_step(start.get("steps", ()), registered),
    )


def _finish(row: Row, event: Event) -> None:
    result = event.get("result") or {}
    row.summary = result.get("summary") or ""
    row.warnings = tuple(result.get("warnings") or ())
    row.error = event.get("error") or ""
    row.metrics = (event.get("evaluation") or {}).get("metrics") or {}


def result_step(steps: Sequence[Mapping[str, Any]], registered: str | None) -> str | None:
    """The step whose artifact is the run's result: the one that the spec registers, else the last final step.

    Args:
        steps: those of the run, in order, each with its ``id`` and what it ``needs``.
        registered: the spec's ``tracking.register_step``, which need not be one of them.
    """
    needed = {need for step in steps for need in step["needs"]}
    final = [step["id"] for step in steps if step["id"] not in needed]
    return next((step["id"] for step in steps if step["id"] == registered), final[-1] if final else None)


def headline(summary: Summary) -> dict[str, float]:
    """The stable metrics of the pipeline's own run, for sorting, filters and charts.

    ``best_<quality>``, ``best_size_mb``, ``best_latency_p50_ms`` and ``best_peak_memory_mb`` of the result;
    ``baseline_<quality>``, ``baseline_size_mb`` and ``baseline_latency_p50_ms`` of the model as it came in;
    ``quality_loss`` (positive is worse: points where the quality is a share or runs from 0 to 100, else percent),
    ``size_ratio`` and ``speedup`` (how many times smaller and faster than the baseline), ``gates_passed``,
    ``gates_failed`` (inconclusive ones included) and ``run_seconds``. What was not measured is left out.
    """
    figures: dict[str, float | None] = {}
    best = summary.rows.get(summary.result or "")
    base = summary.rows.get(BASELINE)
    shared = (summary.quality, "size", "latency_p50")
    for prefix, row, names in (("best", best, (*shared, "peak_memory")), ("baseline", base, shared)):
        for metric in names if row else ():
            name, scale = headline_name(prefix, metric)
            value = row.value(metric) if row else None
            figures[name] = None if value is None else value * scale
    if best is not None and base is not None:
        figures["quality_loss"] = _loss(summary.quality, base.value(summary.quality), best.value(summary.quality))
        figures["size_ratio"] = _ratio(base.value("size"), best.value("size"))
        figures["speedup"] = _ratio(base.value("latency_p50"), best.value("latency_p50"))
    if summary.status is not None:
        passed = sum(verdict(gate) == "passed" for gate in summary.gates)
        figures |= {"gates_passed": passed, "gates_failed": len(summary.gates) - passed}
    figures["run_seconds"] = summary.seconds
    return {name: float(value) for name, value in figures.items() if value is not None}


def headline_name(prefix: str, metric: str) -> tuple[str, float]:
    """The name of a headline metric, and what the metric's value is multiplied by.

    MLflow's charts show two decimals, so bytes become MB and seconds ms.
    """
    suffix, scale = {"bytes": ("_mb", 1e-6), "seconds": ("_ms", 1e3)}.get(METRICS[metric].unit, ("", 1.0))
    return f"{prefix}_{metric}{suffix}", scale


def verdict(gate: Event) -> str:
    """``passed``, ``failed`` or ``inconclusive``; a gate that could not be computed counts as failed."""
    found = gate.get("status")
    return found if found in ("passed", "inconclusive") else "failed"


def _ratio(base: float | None, value: float | None) -> float | None:
    return base / value if base is not None and value else None


def _loss(metric: str, base: float | None, value: float | None) -> float | None:
    if base is None or value is None:
        return None
    worse = base - value if METRICS[metric].better == "higher" else value - base
    scale = points(METRICS[metric])
    if scale is not None:
        return scale * worse
    return 100 * worse / base if base else None


def note(summary: Summary) -> str:
    """Markdown for the page of the pipeline's run: the verdict in a line, the steps, the gates."""
    blocks = [_verdict_line(summary), _steps(summary)]
    if summary.gates:
        blocks.append(_gates(summary))
    remarks = [
        f"- `{row.step}`: {text}" for row in summary.rows.values() for text in (row.error, *row.warnings) if text
    ]
    if remarks:
        blocks.append("\n".join(remarks))
    return "\n\n".join(blocks)


def _verdict_line(summary: Summary) -> str:
    return " · ".join(part for part in (f"**{summary.status or 'running'}**", outcome(summary)) if part)


def outcome(summary: Summary) -> str:
    """The result's quality, size and speed in a line without markup; empty where nothing was measured."""
    best, base = summary.rows.get(summary.result or ""), summary.rows.get(BASELINE)
    if best is None or not best.metrics:
        return ""
    parts = [f"{summary.quality} {amount(summary.quality, best.value(summary.quality))}"]
    for metric, word in (("size", "smaller"), ("latency_p50", "faster")):
        factor = _ratio(base.value(metric), best.value(metric)) if base else None
        compared = f" ({factor:.1f}× {word})" if factor else ""
        parts.append(f"{amount(metric, best.value(metric))}{compared}")
    return f"{summary.result}: {', '.join(parts)}"


def short_id(start: Event) -> str:
    """The last part of the run's id, which tells the runs of a spec apart."""
    return start["run_id"].rpartition("-")[2][-8:]


def _steps(summary: Summary) -> str:
    columns = (summary.quality, "size", "latency_p50", "peak_memory")
    lines = [
        f"| step | uses | state | {summary.quality} | size | p50 | memory | what changed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in summary.rows.values():
        cells = [_with_interval(row, columns[0]), *(amount(name, row.value(name)) for name in columns[1:])]
        name = f"**{row.step}**" if row.step == summary.result else row.step
        lines.append(f"| {name} | {row.uses} | {row.state} | {' | '.join(cells)} | {_cell(row.summary)} |")
    return "\n".join(lines)


def _gates(summary: Summary) -> str:
    lines = ["| gate | step | verdict | why |", "| --- | --- | --- | --- |"]
    for gate in summary.gates:
        why = _cell(str(gate.get("message") or ""))
        lines.append(f"| {_cell(str(gate.get('gate', '')))} | {gate.get('step') or ''} | {verdict(gate)} | {why} |")
    return "\n".join(lines)


def step_note(row: Row, left: Mapping[str, str]) -> str:
    """Markdown for the page of a step's run."""
    blocks = [f"**{row.state}** · {row.summary or row.uses}"]
    if row.error:
        blocks.append(f"```\n{row.error[:2000]}\n```")
    if row.metrics:
        lines = ["| metric | value |", "| --- | --- |"]
        lines += [f"| {name} | {_with_interval(row, name)} |" for name in row.metrics]
        blocks.append("\n".join(lines))
    if left:
        shown = [f"- `{name}`: {reason}" for name, reason in list(left.items())[:50]]
        blocks.append("left alone:\n\n" + "\n".join(shown))
    if row.warnings:
        blocks.append("\n".join(f"- {text}" for text in row.warnings))
    return "\n\n".join(blocks)


def _with_interval(row: Row, metric: str) -> str:
    found = row.metrics.get(metric) or {}
    text = amount(metric, found.get("value"))
    low, high = found.get("low"), found.get("high")
    return text if low is None or high is None else f"{text} ({amount(metric, low)} to {amount(metric, high)})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def amount(metric: str, value: float | None) -> str:
    """A metric's value with its unit, for people; empty where it was not measured."""
    return "" if value is None else figure(metric, value)
