"""The live view of a run, on a terminal and without one."""

from __future__ import annotations

import io
import time

from rich.console import Console

from flows.progress import RunView, live_view
from tasks import events

STEPS = [
    {"id": "teacher", "uses": "finetune", "state": "run"},
    {"id": "slim", "uses": "prune", "state": "run"},
]


def test_rate_and_time_left_follow_from_the_progress(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    view = RunView(Console(file=io.StringIO(), force_terminal=True, width=100))
    view.handle({"event": "run_start", "run_id": "r", "steps": STEPS})
    view.handle({"event": "step_start", "step": "teacher"})
    view.handle({"event": "progress", "step": "teacher", "done": 0, "total": 100, "unit": "steps"})
    view.handle({"event": "progress", "step": "teacher", "done": 20, "total": 100, "unit": "steps"})
    row = view.rows["teacher"]
    assert row.figures(row.since + 10) == "20/100 steps, 2.0/s, 40.0 s left"


def test_a_new_phase_starts_its_own_rate():
    view = RunView(Console(file=io.StringIO(), force_terminal=True, width=100))
    view.handle({"event": "run_start", "run_id": "r", "steps": STEPS})
    view.handle({"event": "progress", "step": "slim", "done": 90, "total": 100, "unit": "steps"})
    view.handle({"event": "progress", "step": "slim", "done": 5, "total": 50, "unit": "examples"})
    row = view.rows["slim"]
    assert (row.first, row.unit) == (5, "examples")


def test_without_a_terminal_it_is_lines():
    out = io.StringIO()
    with live_view(Console(file=out, width=80)):
        events.publish({"event": "run_start", "run_id": "tiny-1", "steps": STEPS})
        events.publish({"event": "step_start", "step": "teacher"})
        events.publish(
            {"event": "step_end", "step": "teacher", "state": "done", "error": None, "result": {"summary": "trained"}}
        )
        events.publish(
            {"event": "step_end", "step": "slim", "state": "failed", "error": "too thin\nmore", "result": {}}
        )
    lines = out.getvalue().splitlines()
    assert lines[0] == "run tiny-1: 2 steps"
    assert lines[1] == "teacher: started"
    assert lines[2].startswith("teacher: done in ")
    assert lines[2].endswith(": trained")
    assert lines[3] == "slim: failed: too thin"
    assert "\x1b" not in out.getvalue()


def test_on_a_terminal_every_step_has_a_line():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    view = RunView(console)
    view.handle({"event": "run_start", "run_id": "tiny-1", "steps": STEPS})
    view.handle({"event": "step_start", "step": "teacher"})
    view.handle({"event": "progress", "step": "teacher", "done": 10, "total": 40, "unit": "steps"})
    console.print(view)
    text = out.getvalue()
    assert "tiny-1" in text
    assert "teacher" in text
    assert "10/40 steps" in text
    assert "slim" in text
