"""What the report says of methods that do not pay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.context import Evaluation
from tasks.evaluate.summary import RunSummary, StepRow, does_not_pay, warnings


def row(name: str, p50: float, size: int, spread: float = 0.05) -> StepRow:
    metrics: dict[str, dict[str, Any]] = {
        "latency_p50": {"value": p50, "low": p50 * (1 - spread), "high": p50 * (1 + spread), "n": 50},
        "size": {"value": size, "low": None, "high": None, "n": None},
    }
    return StepRow(name, "quantize", "done", evaluation=Evaluation(Path(), {"metrics": metrics}))


def run(*rows: StepRow) -> RunSummary:
    edges = tuple((rows[0].id, other.id) for other in rows[1:])
    return RunSummary("n", "r", "2026-01-01T00:00:00+00:00", 1.0, "text-generation", rows, edges=edges)


def test_a_slower_and_larger_artifact_is_named_with_its_figures():
    slow = row("packed", 0.008, 3_000_000)
    summary = run(row("trained", 0.004, 1_000_000), slow)
    assert does_not_pay(summary, slow) == [
        "does not pay in speed on this machine: p50 8.00 ms against 4.00 ms of trained",
        "does not pay in size: 3.00 MB against 1.00 MB of trained",
    ]
    assert [ids for ids, _ in warnings(summary)] == ["packed", "packed"]


def test_noise_and_gains_are_not():
    trained, same = row("trained", 0.004, 1_000_000), row("same", 0.0042, 1_000_000)
    summary = run(trained, same, row("fast", 0.001, 200_000), row("busy", 0.008, 1_000_000))
    assert [does_not_pay(summary, step) for step in summary.steps] == [[], [], [], []]


def test_an_unmeasured_step_says_nothing():
    unmeasured = StepRow("half", "quantize", "done")
    assert does_not_pay(run(row("trained", 0.004, 1_000_000), unmeasured), unmeasured) == []
