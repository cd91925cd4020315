"""What stops a run before it starts, and how one ends that does not pass."""

from __future__ import annotations

from typing import Any

from tasks.context import StepError


class PlanError(StepError):
    """The run cannot start: what the spec names is not there, or what the command line names does not exist."""


class RunEnded(Exception):
    """A run came to its end and did not pass. Prefect takes no other data for such a state than an exception.

    Args:
        message: how it ended.
        outcome: what ``lathe run --json`` prints.
    """

    def __init__(self, message: str, outcome: dict[str, Any]) -> None:
        super().__init__(message)
        self.outcome = outcome
