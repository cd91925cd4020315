"""The live view of a run: one line per step with state, rate and time left; plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tasks import events
from tasks.evaluate.format import duration

MARKS = {
    "waiting": ("·", "dim"),
    "running": ("▸", "cyan"),
    "done": ("✓", "green"),
    "cached": ("✓", "blue"),
    "failed": ("✗", "red"),
    "cancelled": ("■", "yellow"),
    "skipped": ("–", "dim"),
}
PLAIN_EVERY = 10.0
"""Seconds between two progress lines of one step where there is no terminal."""


@dataclass
class _Row:
    uses: str
    state: str = "waiting"
    began: float = 0.0
    ended: float = 0.0
    note: str = ""
    done: float = 0.0
    total: float = 0.0
    unit: str = ""
    since: float = 0.0
    first: float = 0.0
    told: float = 0.0

    def progress(self, event: Mapping[str, Any], now: float) -> None:
        if self.total != event["total"] or self.unit != event["unit"] or event["done"] < self.done:
            self.since, self.first = now, event["done"]
        self.done, self.total, self.unit = event["done"], event["total"], event["unit"]

    def rate(self, now: float) -> float:
        elapsed = now - self.since
        return (self.done - self.first) / elapsed if elapsed > 0 else 0.0

    def figures(self, now: float) -> str:
        """Count, rate and time left, as far as they are known."""
        if not self.total:
            return self.note
        text = f"{self.done:,.0f}/{self.total:,.0f} {self.unit}"
        rate = self.rate(now)
        if rate > 0:
            left = duration((self.total - self.done) / rate)
            text += f", {rate:,.1f}/s, {left} left"
        return text


class RunView:
    """Follows the events of a run. Thread-safe: events come from the threads of the steps."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.rows: dict[str, _Row] = {}
        self.run_id = ""
        self.notice = "planning and starting Prefect"
        self.started = time.monotonic()
        self._guard = threading.RLock()  # a signal's handler may publish while this thread holds it

    def __rich__(self) -> Table:
        with self._guard:
            return self._table()

    def handle(self, event: Mapping[str, Any]) -> None:
        """Take in one event."""
        with self._guard:
            self._handle(event, time.monotonic())

    def _handle(self, event: Mapping[str, Any], now: float) -> None:
        kind = event["event"]
        if kind == "run_start":
            self.run_id, self.notice = event["run_id"], ""
            self.rows = {step["id"]: _Row(step["uses"]) for step in event["steps"]}
            self._say(f"run {self.run_id}: {len(self.rows)} steps")
        elif kind == "cancelling":
            self.notice = "cancelling; once more Ctrl-C interrupts at once"
            self._say(self.notice)
        elif kind == "status":
            self.notice = event["text"]
            self._say(self.notice)
        elif event.get("step") in self.rows:
            self._step(event["step"], self.rows[event["step"]], event, now)

    def _step(self, name: str, row: _Row, event: Mapping[str, Any], now: float) -> None:
        kind = event["event"]
        if kind == "step_start":
            row.state, row.began, row.total = "running", now, 0.0
            self._say(f"{name}: started")
        elif kind == "note":
            row.note, row.total = event["text"], 0.0
            self._say(f"{name}: {row.note}")
        elif kind == "progress":
            row.progress(event, now)
            if now - row.told >= PLAIN_EVERY:
                row.told = now
                self._say(f"{name}: {row.note + ', ' if row.note else ''}{row.figures(now)}")
        elif kind == "step_end":
            row.state, row.ended, row.total = event["state"], now, 0.0
            row.note = event["error"].splitlines()[0] if event["error"] else event["result"].get("summary", "")
            took = f" in {duration(now - row.began)}" if row.began else ""
            self._say(f"{name}: {row.state}{took}{': ' + row.note if row.note else ''}")

    def _say(self, line: str) -> None:
        if not self.console.is_terminal:
            self.console.print(Text(line), soft_wrap=True)

    def _table(self) -> Table:
        now = time.monotonic()
        table = Table.grid(padding=(0, 1), expand=True)
        for options in ({"width": 1}, {"no_wrap": True}, {"no_wrap": True, "style": "dim"}, {"width": 14}):
            table.add_column(**options)  # type: ignore[arg-type]
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        table.add_column(justify="right", no_wrap=True)
        for name, row in self.rows.items():
            mark, style = MARKS[row.state]
            bar = ProgressBar(row.total, row.done, width=14) if row.state == "running" and row.total else ""
            end = row.ended or now
            took = duration(end - row.began) if row.began else ""
            told = row.figures(now) if row.state == "running" else row.note
            table.add_row(Text(mark, style), Text(name, style), row.uses, bar, Text(told), took)
        title = f"{self.run_id}  {self.notice}".strip()
        frame = Table.grid(expand=True)
        frame.add_row(Text(f"{title}  {duration(now - self.started)}", style="bold"))
        frame.add_row(table)
        return frame


@contextlib.contextmanager
def live_view(console: Console) -> Iterator[RunView]:
    """Within the block, the run's events are shown on ``console``."""
    view = RunView(console)
    with events.listening(view.handle):
        if not console.is_terminal:
            yield view
            return
        with Live(view, console=console, refresh_per_second=5, transient=True):
            yield view
