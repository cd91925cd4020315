"""What every encoder is given: the records of a split, the tokenizer, and what became of those that were left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from specs.schema.base import Task
from specs.schema.pipeline import DataSpec, FilterSpec
from tasks.context import StepError
from tasks.data.bad_rows import BadRows, told
from tasks.data.readers import Record, Split, records, source_of
from tasks.data.tokens import TextTokenizer

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Encoding, Tokenizer

BATCH = 512


@dataclass
class Job:
    """The encoding of one split.

    Args:
        data: where the records are, and how they are cut.
        split: which of its splits.
        task: what the model does.
        tokenizer: of the model folder.
        names: the labels in use (text-classification).
        folder: an empty folder that becomes the artifact; features are written into it.
        bad: what became of bad rows.
        filtered: how many records the filter left out, by reason.
        cut: how many texts were longer than the data allows, by what was cut.
    """

    data: DataSpec
    split: Split
    task: Task
    tokenizer: TextTokenizer
    names: tuple[str, ...]
    folder: Path
    bad: BadRows = field(init=False)
    filtered: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.bad = BadRows(self.data.on_bad_row)

    def batches(self) -> Iterator[list[Record]]:
        """The records, some hundred at a time."""
        stream = records(self.data, self.split, self.task, self.bad)
        while batch := list(islice(stream, BATCH)):
            yield batch

    def keeps(self, tokens: int, other: int | None = None, seconds: float | None = None) -> bool:
        """Whether the filter keeps a record; what it leaves out is counted. Evaluation data is never filtered.

        Args:
            tokens: of the input, special ones not counted.
            other: of the translation.
            seconds: of audio.
        """
        reason = left_out(self.data.filter, tokens, other, seconds) if self.split == "train" else None
        if reason is not None:
            self.filtered[reason] += 1
        return reason is None

    def check_some_left(self, used: int, otherwise: str) -> None:
        """Refuse a split of which nothing is left.

        Raises:
            StepError: ``used`` is 0; it says why, or ``otherwise``.
        """
        source = f"data.{self.split}: {source_of(self.data, self.split)}"
        self.bad.check_some_left(used, source)
        if used == 0 and self.filtered:
            raise StepError(f"{source}: data.filter leaves nothing, {told(self.filtered)}")
        if used == 0:
            raise StepError(f"{source} {otherwise}")

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know: what was skipped, left out and cut."""
        found = [self.bad.warning] if self.bad.counts else []
        if self.filtered:
            found.append(f"data.filter left out {self.filtered.total()}, {told(self.filtered)}")
        found += [f"{count} {what}" for what, count in self.cut.items() if count]
        return tuple(f"data.{self.split}: {text}" for text in found)


def left_out(spec: FilterSpec, tokens: int, other: int | None = None, seconds: float | None = None) -> str | None:
    """Why the filter leaves a record out, None where it keeps it; arguments as ``Job.keeps`` has them."""
    if spec.min_tokens is not None and tokens < spec.min_tokens:
        return f"fewer than {spec.min_tokens} tokens"
    if spec.max_tokens is not None and tokens > spec.max_tokens:
        return f"more than {spec.max_tokens} tokens"
    if spec.max_ratio is not None and other is not None:
        short, long = sorted((tokens, other))
        if long > spec.max_ratio * short:
            return f"one side more than {spec.max_ratio:g} times the other"
    if spec.max_duration is not None and seconds is not None and seconds > spec.max_duration:
        return f"longer than {spec.max_duration:g} s"
    return None


def counted(encoding: Encoding, special: int, overlap: int = 0) -> int:
    """Tokens of a text that was cut, without the ``special`` ones of each part and what parts share."""
    parts = [encoding, *encoding.overflowing]
    return sum(len(part.ids) - special for part in parts) - overlap * (len(parts) - 1)


def room(core: Tokenizer, length: int, name: str) -> int:
    """Special tokens that stand around a text.

    Raises:
        StepError: they leave no room for text.
    """
    special = core.num_special_tokens_to_add(False)
    if length <= special:
        raise StepError(f"data.{name} {length} leaves no room for text beside {special} special tokens; raise it")
    return special


def padded(rows: list[np.ndarray], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 [N, length] and mask uint8 of rows that are no longer."""
    import numpy as np

    ids = np.full((len(rows), length), pad, dtype=np.int32)
    mask = np.zeros((len(rows), length), dtype=np.uint8)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return ids, mask
