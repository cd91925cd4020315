"""What stops a run before it starts."""

from __future__ import annotations

from tasks.context import StepError


class PlanError(StepError):
    """The run cannot start: what the spec names is not there, or what the command line names does not exist."""
