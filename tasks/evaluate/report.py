"""The report of a run: Markdown, one self-contained HTML page, CSV, JSON, and the plots."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specs.schema.metrics import METRICS
from tasks.evaluate.format import duration, figure, human, size
from tasks.evaluate.gates import Verdict
from tasks.evaluate.graph_svg import graph_svg
from tasks.evaluate.outputs import Changes, Example
from tasks.evaluate.plots import inline, of_steps, plots
from tasks.evaluate.summary import (
    COLUMNS,
    RunSummary,
    StepRow,
    beside,
    changes,
    compared,
    files_of,
    rows,
    scenarios,
    warnings,
    with_interval,
)

VERSION = 1

MARKS = {
    "passed": "✓",
    "failed": "✗",
    "missing": "✗",
    "error": "✗",
    "inconclusive": "?",
    "cancelled": "–",
    "running": "▸",
}

_TITLES = {"quality_size": "against size", "quality_latency": "against latency"}


def build_report(run: RunSummary, out: Path) -> dict[str, Path]:
    """Write ``report.md``, ``report.html``, ``report.csv``, ``report.json`` and the plots into ``out``.

    Returns:
        the files by name.
    """
    drawn = {name: (f"{run.headline} {_TITLES[Path(name).stem]}", content) for name, content in plots(run).items()}
    drawn |= of_steps(run)
    files: dict[str, bytes] = {
        "report.md": markdown(run, {name: drawn[name][0] for name in drawn if name.endswith(".png")}).encode(),
        "report.html": html(run, drawn).encode(),
        "report.csv": table_csv(run).encode(),
        "report.json": (json.dumps(as_json(run), indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode(),
        **{name: content for name, (_, content) in drawn.items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (out / name).write_bytes(content)
    return {name: out / name for name in files}


def as_json(run: RunSummary) -> dict[str, Any]:
    """The report as data; ``version`` changes when the meaning of a field does."""
    steps, examples = [], changes(run)
    for step in run.steps:
        record = dict(step.evaluation.record) if step.evaluation is not None else None
        steps.append(
            {
                "id": step.id,
                "uses": step.uses,
                "state": step.state,
                "seconds": step.seconds,
                "summary": step.summary,
                "touched": step.touched,
                "left": dict(step.left),
                "warnings": list(step.warnings),
                "error": step.error,
                "evaluation": record,
                "examples": asdict(examples[step.id]) if step.id in examples else None,
            }
        )
    return {
        "version": VERSION,
        "name": run.name,
        "run_id": run.run_id,
        "started": run.started,
        "seconds": run.seconds,
        "task": run.task,
        "status": run.status,
        "verdicts": [asdict(verdict) for verdict in run.verdicts],
        "steps": steps,
        "edges": [list(edge) for edge in run.edges],
        "environment": dict(run.environment),
        "mlflow": run.mlflow,
        "next": run.next,
        "warnings": list(run.warnings),
    }


def table_csv(run: RunSummary) -> str:
    """One line per step; figures bare, in the unit that the heading names."""
    suffix = {"bytes": "_bytes", "seconds": "_seconds"}
    heads = [f"{name}{suffix.get(metric.unit, '')}" for name, metric in METRICS.items()]
    quality = [name for name, metric in METRICS.items() if metric.quality and run.task in metric.tasks]
    bounds = [f"{name}_{end}" for name in quality for end in ("low", "high")]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["step", "uses", "state", "duration_seconds", *heads, *bounds, "summary"])
    for step in run.steps:
        values = [step.value(name) for name in METRICS]
        ends = [step.entry(name)[end] for name in quality for end in ("low", "high")]
        cells = ["" if value is None else value for value in (step.seconds, *values, *ends)]
        writer.writerow([step.id, step.uses, step.state, *cells, step.error or step.summary])
    return buffer.getvalue()


def markdown(run: RunSummary, pictures: Mapping[str, str] | None = None) -> str:
    """The report for a reader of plain text or a pull request; ``pictures`` are titles by file name."""
    lines = [f"# {_md(run.name)}: {run.status}", ""]
    lines += [f"{run.task} · run `{run.run_id}` · {run.started} · {duration(run.seconds)}", ""]
    if run.verdicts:
        lines += ["## Gates", ""]
        lines += [f"- {MARKS[verdict.status]} **{verdict.status}** {_md(verdict.message)}" for verdict in run.verdicts]
        lines.append("")
    heads = {**COLUMNS, "quality": run.headline}
    lines += ["## Steps", "", "| " + " | ".join(heads.values()) + " |", "|" + " --- |" * len(heads)]
    lines += ["| " + " | ".join(_md(row[key]) for key in heads) + " |" for row in rows(run)]
    lines += ["", "`smaller` and `faster` are against the baseline.", ""]
    lines += [f"Latency of {', '.join(ids)}: {_md(how)}." for how, ids in scenarios(run).items()]
    stated = dict.fromkeys(fact for step in run.steps for fact in _scoring(step) if fact[1])
    lines += [f"\n{_md(name)}: {_md(text)}." for name, text in stated]
    if found := warnings(run):
        lines += ["", "## Worth knowing", ""]
        lines += [f"- **{ids}**: {_md(text)}" for ids, text in found]
    lines += _examples(run)
    for name, title in (pictures or {}).items():
        lines += ["", f"![{_md(title)}]({name})"]
    lines += ["", "## Where and how", ""]
    lines += [f"- MLflow: {run.mlflow}"] if run.mlflow else []
    lines += [f"- {name}: {_md(value)}" for name, value in run.environment.items()]
    lines += [f"- next: `{run.next}`"] if run.next else []
    return "\n".join(lines) + "\n"


def _examples(run: RunSummary) -> list[str]:
    """A table for each step: what the first examples that changed were before and after it."""
    lines = ["", "## Examples"]
    for name, found in changes(run).items():
        lines += ["", f"### {_md(name)}", "", f"{_md(_changed(found))}."]
        if found.against and not found.changed:
            continue
        heads, texts = _table(found)
        lines += ["", "| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
        lines += ["| " + " | ".join(_md(text[head]) for head in heads) + " |" for text in texts]
    return lines if len(lines) > 2 else []


_HEADS = ("input", "expected", "before", "after", "output")
_LONGEST = 200


def _changed(found: Changes) -> str:
    if not found.against:
        return f"The first of {found.total} outputs"
    return f"{found.changed} of {found.total} outputs are not those of {found.against}"


def _table(found: Changes) -> tuple[list[str], list[dict[str, str]]]:
    """The headings that have something below them, and the rows by heading."""
    texts = [_texts(example) for example in found.examples]
    return [head for head in _HEADS if any(text.get(head) for text in texts)], texts


def _texts(example: Example) -> dict[str, str]:
    """One example by the headings of its table, empty where it has none."""
    sure = "" if example.probability is None else f" ({example.probability:.1%})"
    after = example.after + sure
    came = {"output": after} if example.before is None else {"before": example.before, "after": after}
    texts = {"input": example.input, "expected": example.expected or "", **came}
    return {name: text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…" for name, text in texts.items()}


def html(run: RunSummary, drawn: Mapping[str, tuple[str, bytes]]) -> str:
    """The report as one page that needs nothing else.

    Args:
        run: what is reported.
        drawn: title and content of the plots by file name; the SVGs are put into the page.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    from tasks.evaluate.template import PAGE, STYLE

    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    examples = changes(run)
    pictures = [
        (title, Markup(inline(content, Path(name).stem)))
        for name, (title, content) in drawn.items()
        if name.endswith(".svg")
    ]
    return page.from_string(PAGE).render(
        style=Markup(STYLE),
        run=run,
        marks=MARKS,
        took=duration(run.seconds),
        verdicts=[_verdict(verdict) for verdict in run.verdicts],
        steps=[_step(run, step, examples.get(step.id)) for step in run.steps],
        scenarios=[(how, ", ".join(ids)) for how, ids in scenarios(run).items()],
        confidence=_confidence(run),
        plots=pictures,
        warnings=warnings(run),
        graph=Markup(graph_svg([step.id for step in run.steps], run.edges)),
    )


def _verdict(verdict: Verdict) -> dict[str, str]:
    bounds = ""
    if verdict.low is not None and verdict.high is not None:
        bounds = f"{verdict.shown(verdict.low)} to {verdict.shown(verdict.high)}"
    why = ""
    if verdict.status == "missing":
        why = verdict.message.rpartition(f"{verdict.gate}: ")[2]
    elif verdict.status == "inconclusive":
        why = verdict.message.rpartition("; ")[2]
    return {
        "status": verdict.status,
        "step": verdict.step,
        "gate": verdict.gate,
        "why": why,
        "value": verdict.shown(verdict.value),
        "interval": bounds,
        "margin": verdict.shown(verdict.margin),
    }


def _step(run: RunSummary, step: StepRow, found: Changes | None) -> dict[str, Any]:
    entry = step.entry(run.headline)
    bounds = "" if entry["low"] is None else " to ".join(figure(run.headline, entry[end]) for end in ("low", "high"))
    heads, texts = _table(found) if found is not None else ([], [])
    return {
        "id": step.id,
        "uses": step.uses,
        "state": step.state,
        "size": human(step.value("size"), "bytes"),
        "p50": human(step.value("latency_p50"), "seconds"),
        "p90": human(step.value("latency_p90"), "seconds"),
        "p99": human(step.value("latency_p99"), "seconds") if step.value("latency_p99") else "",
        "smaller": compared(run, step, "size", ("smaller", "larger")),
        "faster": compared(run, step, "latency_p50", ("faster", "slower")),
        "memory": human(step.value("peak_memory"), "bytes"),
        "quality": figure(run.headline, entry["value"]),
        "interval": bounds,
        "beside": "" if step.evaluation is None else beside(run, step),
        "summary": step.summary,
        "error": step.error,
        "time": "–" if step.seconds is None else duration(step.seconds),
        "facts": _facts(step),
        "metrics": [(name, with_interval(step, name)) for name in METRICS if step.value(name) is not None],
        "changed": "" if found is None else _changed(found),
        "heads": heads,
        "examples": texts,
    }


def _facts(step: StepRow) -> list[tuple[str, str]]:
    facts = [("changed", str(step.touched))] if step.touched else []
    facts += [("left alone", f"{name}: {reason}") for name, reason in list(step.left.items())[:12]]
    if len(step.left) > 12:
        facts.append(("left alone", f"and {len(step.left) - 12} more, all in report.json"))
    if step.evaluation is not None:
        dtypes = step.evaluation.record.get("dtypes", {})
        facts += _scoring(step)
        facts.append(("files", files_of(step)))
        facts.append(("data types", ", ".join(f"{name} {size(weight)}" for name, weight in dtypes.items())))
    return [(name, value) for name, value in facts if value]


def _scoring(step: StepRow) -> list[tuple[str, str]]:
    """What a reader must know of the scores to compare them with those of others."""
    scenario = step.evaluation.record.get("scenario", {}) if step.evaluation is not None else {}
    facts = [(f"{name}, as sacrebleu states it", text) for name, text in scenario.get("signatures", {}).items()]
    return [*facts, ("WER and CER compare texts after", scenario.get("normalise", ""))]


def _confidence(run: RunSummary) -> str:
    used = {
        step.evaluation.record.get("intervals", {}).get("confidence", 0.95)
        for step in run.steps
        if step.evaluation is not None
    }
    return " and ".join(f"{value:.0%}" for value in sorted(used)) or "95%"


def _md(text: str) -> str:
    escaped = re.sub(r"([\\|*`\[~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text.replace("&", "&amp;"))
    return re.sub(r"[\r\n]+", " ", escaped.replace("<", "&lt;"))
