"""What a run came to, as data: the input of every report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from specs.schema.base import BASELINE, Task
from specs.schema.metrics import HEADLINE
from tasks.context import Evaluation
from tasks.evaluate import outputs
from tasks.evaluate.format import duration, factor, figure, human, significant, size
from tasks.evaluate.gates import Verdict
from tasks.evaluate.outputs import Changes

State = Literal["done", "cached", "failed", "cancelled", "skipped", "running", "waiting"]
RunStatus = Literal["passed", "failed", "inconclusive", "error", "cancelled", "running"]


@dataclass(frozen=True)
class StepRow:
    """One step of a run; the baseline is the first.

    Args:
        id: the step's id.
        uses: the kind of the step; for the baseline ``model``.
        state: what became of it.
        seconds: how long it took, evaluation included.
        summary: the step's own line.
        touched: how many things it changed or made.
        left: what it left alone, each with the reason.
        warnings: what the user should know.
        error: why it failed.
        evaluation: None where it was not evaluated.
        folder: of its artifact, whose plots are shown; None where it has none.
    """

    id: str
    uses: str
    state: State
    seconds: float | None = None
    summary: str = ""
    touched: int = 0
    left: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    error: str | None = None
    evaluation: Evaluation | None = None
    folder: Path | None = None

    def entry(self, metric: str) -> Mapping[str, Any]:
        """``value``, ``low`` and ``high`` of a metric, each None where there is none."""
        found = self.evaluation.metrics.get(metric) if self.evaluation is not None else None
        return found if found is not None else {"value": None, "low": None, "high": None, "n": None}

    def value(self, metric: str) -> float | None:
        return self.entry(metric)["value"]


@dataclass(frozen=True)
class RunSummary:
    """Everything a report says about a run.

    Args:
        name: of the pipeline.
        run_id: of the run.
        started: when, ISO 8601 with the zone.
        seconds: how long it took.
        task: what the model does.
        steps: the baseline and every step, in the order of the graph.
        verdicts: on the gates.
        status: of the run as a whole.
        environment: names and versions, as text.
        mlflow: the address of the run in MLflow, or how to see it.
        edges: ``(from, to)`` pairs of step ids.
        next: the command to run next.
        warnings: what the user should know about the run as a whole, for example about its data.
    """

    name: str
    run_id: str
    started: str
    seconds: float
    task: Task
    steps: tuple[StepRow, ...]
    verdicts: tuple[Verdict, ...] = ()
    status: RunStatus = "passed"
    environment: Mapping[str, str] = field(default_factory=dict)
    mlflow: str = ""
    edges: tuple[tuple[str, str], ...] = ()
    next: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """The quality metric that tables and plots show."""
        return HEADLINE[self.task]

    @property
    def baseline(self) -> StepRow | None:
        return next((step for step in self.steps if step.id == BASELINE), None)


COLUMNS: dict[str, str] = {
    "step": "step",
    "state": "state",
    "size": "size",
    "ratio": "smaller",
    "latency": "p50 / p90 / p99",
    "speedup": "faster",
    "memory": "peak memory",
    "quality": "quality",
    "beside": "also",
    "changed": "what changed",
    "time": "time",
}
"""Keys of ``rows`` in their order, each with its heading; ``quality`` is to be headed by the metric's name."""

BESIDE: dict[Task, tuple[str, ...]] = {
    "text-generation": ("bits_per_byte", "tokens_per_second"),
    "text-classification": ("f1", "mcc"),
    "translation": ("chrf", "tokens_per_second"),
    "speech-recognition": ("cer", "real_time_factor"),
}
"""What tables show beside the headline."""


def rows(run: RunSummary) -> list[dict[str, str]]:
    """One row of text per step, by the keys of ``COLUMNS``; what is not known is an en dash."""
    return [_row(run, step) for step in run.steps]


def _row(run: RunSummary, step: StepRow) -> dict[str, str]:
    return {
        "step": step.id,
        "state": step.state,
        "size": human(step.value("size"), "bytes"),
        "ratio": times_better(run, step, "size"),
        "latency": latency(step),
        "speedup": times_better(run, step, "latency_p50"),
        "memory": human(step.value("peak_memory"), "bytes"),
        "quality": with_interval(step, run.headline),
        "beside": beside(run, step),
        "changed": step.error or step.summary or "–",
        "time": "–" if step.seconds is None else duration(step.seconds),
    }


def latency(step: StepRow) -> str:
    """``6.81 / 7.20 / 8.05 ms``: three percentiles in the unit of the first."""
    values = [step.value(f"latency_p{percent}") for percent in (50, 90, 99)]
    if values[0] is None:
        return "–"
    scale, unit = (1.0, "s") if values[0] >= 1 else (1e-3, "ms") if values[0] >= 1e-3 else (1e-6, "µs")
    return " / ".join("–" if value is None else significant(value / scale) for value in values) + f" {unit}"


def with_interval(step: StepRow, metric: str) -> str:
    """``0.872 [0.850, 0.894]`` in the metric's unit."""
    entry = step.entry(metric)
    shown = figure(metric, entry["value"])
    if entry["value"] is None or entry["low"] is None:
        return shown
    return f"{shown} [{figure(metric, entry['low'])}, {figure(metric, entry['high'])}]"


def beside(run: RunSummary, step: StepRow) -> str:
    """``chrf 52.1, tokens per second 45.2``: the other figures that the task is judged by."""
    known = [(name, value) for name in BESIDE[run.task] if (value := step.value(name)) is not None]
    return ", ".join(f"{name.replace('_', ' ')} {figure(name, value)}" for name, value in known) or "–"


def times_better(run: RunSummary, step: StepRow, metric: str) -> str:
    """How many times smaller or faster than the baseline: ``4.1x``."""
    mine = step.value(metric)
    reference = run.baseline.value(metric) if run.baseline is not None else None
    return "–" if not mine or not reference else factor(reference / mine)


def compared(run: RunSummary, step: StepRow, metric: str, words: tuple[str, str]) -> str:
    """``4.1x smaller``, ``1.3x larger`` or ``as before``: a lower-is-better metric against the baseline.

    Args:
        run: holds the baseline.
        step: what is compared; empty text for the baseline itself.
        metric: for example ``size``.
        words: for better and for worse.
    """
    mine = step.value(metric)
    reference = run.baseline.value(metric) if run.baseline is not None else None
    if not mine or not reference or step is run.baseline:
        return ""
    if abs(reference / mine - 1) < 0.02:
        return "as before"
    return f"{factor(reference / mine)} {words[0]}" if mine < reference else f"{factor(mine / reference)} {words[1]}"


def warnings(run: RunSummary) -> list[tuple[str, str]]:
    """``(step ids, text)`` of everything a reader should know; a text that concerns several steps is there once."""
    found: dict[str, list[str]] = {text: ["data"] for text in run.warnings}
    for step in run.steps:
        notes = step.evaluation.record.get("notes", ()) if step.evaluation is not None else ()
        for text in dict.fromkeys((*step.warnings, *notes)):
            found.setdefault(text, []).append(step.id)
        for text in does_not_pay(run, step):
            found.setdefault(text, []).append(step.id)
    return [(", ".join(ids), text) for text, ids in found.items()]


SLOWER, LARGER = 1.2, 1.02
"""A latency or a size that is larger by this factor is worse; less is the noise of a machine, or a header."""


def does_not_pay(run: RunSummary, step: StepRow) -> list[str]:
    """In what the step's artifact is worse than the one it was made from.

    A latency counts where the file was stored another way and the intervals of the two medians do not overlap: training
    and zeros leave the same computation, so a difference there is noise of the machine.
    """
    texts = []
    for name in [before for before, after in run.edges if after == step.id]:
        source = next(row for row in run.steps if row.id == name)
        size_now, size_before = step.value("size"), source.value("size")
        mine, theirs = step.entry("latency_p50"), source.entry("latency_p50")
        if size_now != size_before and mine["low"] and theirs["high"] and mine["low"] > SLOWER * theirs["high"]:
            shown = f"{human(mine['value'], 'seconds')} against {human(theirs['value'], 'seconds')}"
            texts.append(f"does not pay in speed on this machine: p50 {shown} of {name}")
        if size_now and size_before and size_now > LARGER * size_before:
            shown = f"{human(size_now, 'bytes')} against {human(size_before, 'bytes')}"
            texts.append(f"does not pay in size: {shown} of {name}")
    return texts


def changes(run: RunSummary) -> dict[str, Changes]:
    """Examples of every step that kept some, by step id: against the first of its inputs that did, or with nothing
    before."""
    kept = {step.id: outputs.read(step.evaluation.path) for step in run.steps if step.evaluation is not None}
    found = {}
    for name, after in kept.items():
        sources = [before for before, step in run.edges if step == name and kept.get(before)]
        if after:
            found[name] = outputs.compare(after, kept[sources[0]] if sources else (), sources[0] if sources else "")
    return found


def scenarios(run: RunSummary) -> dict[str, list[str]]:
    """How latency was measured, each way with the ids of the steps that were measured so."""
    found: dict[str, list[str]] = {}
    for step in run.steps:
        if step.evaluation is not None:
            how = step.evaluation.record.get("scenario", {})
            length = f", length {how['length']}" if how.get("length") else ""
            text = (
                f"{how.get('call')}, batch {how.get('batch')}{length}, {how.get('threads')} threads, "
                f"{how.get('warmup')} warm-up and {how.get('repeats')} timed calls, {how.get('runtime')} on "
                f"{how.get('gpu') or how.get('cpu')}"
            )
            writing = (step.evaluation.record.get("writing_samples") or {}).get("what")
            found.setdefault(text + (f". Writing: {writing}" if writing else ""), []).append(step.id)
    return found


def files_of(step: StepRow) -> str:
    """The deployed files with their sizes, largest first."""
    files = step.evaluation.record.get("files", {}) if step.evaluation is not None else {}
    largest = sorted(files.items(), key=lambda item: -item[1])[:4]
    return ", ".join(f"{name} {size(weight)}" for name, weight in largest)
