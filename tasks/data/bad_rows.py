"""Records that cannot be used: the first stops the work, or each is skipped and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tasks.context import StepError


class BadRow(StepError):
    """A record cannot be used.

    Args:
        message: file, row, what is wrong and the remedy.
        reason: the same in a few words without any value, under which it is counted.
    """

    def __init__(self, message: str, reason: str) -> None:
        self.reason = reason
        super().__init__(message)


@dataclass
class BadRows:
    """What became of the bad rows of a split.

    Args:
        policy: the spec's ``on_bad_row``.
        counts: how many were skipped, by reason.
        first: the message of the first.
    """

    policy: Literal["stop", "skip"]
    counts: Counter[str] = field(default_factory=Counter)
    first: str = ""

    def add(self, bad: BadRow) -> None:
        """Count a bad row.

        Raises:
            BadRow: the spec says that a bad row stops the work.
        """
        if self.policy == "stop":
            raise bad
        self.counts[bad.reason] += 1
        self.first = self.first or str(bad)

    def check_some_left(self, used: int, source: str) -> None:
        """Refuse a split of which nothing is left.

        Raises:
            StepError: records were skipped and none was used.
        """
        if used == 0 and self.counts:
            raise StepError(f"{source}: every record is bad, {told(self.counts)}; the first: {self.first}")

    @property
    def warning(self) -> str:
        """One sentence for the report; empty where nothing was skipped."""
        if not self.counts:
            return ""
        total = self.counts.total()
        return f"{total} bad {'row was' if total == 1 else 'rows were'} skipped, {told(self.counts)}; {self.first}"


def told(counts: Mapping[str, int]) -> str:
    """Reasons with their counts, the most frequent first."""
    return ", ".join(f"{reason}: {count}" for reason, count in sorted(counts.items(), key=lambda item: -item[1]))
