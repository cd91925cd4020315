"""A look at the data: before a run at the first records, for ``lathe data`` at all of them. Nothing is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from specs.schema.base import Task
from specs.schema.pipeline import DataSpec
from tasks.context import StepError
from tasks.data import builtin, hub
from tasks.data.audio import decoded, seconds_of
from tasks.data.bad_rows import BadRow, BadRows
from tasks.data.duplicates import Inputs, Leak, keys_of
from tasks.data.encode.job import left_out
from tasks.data.labels import ordered, unseen
from tasks.data.readers import Record, Split, columns_of, files_of, records, source_of
from tasks.data.tokens import TextTokenizer

LOOK_AT = 100_000
"""Records of a split that preflight reads at most; the run itself reads and checks all of them."""

LOOK_AT_BYTES = 64 * 2**20
"""Bytes of text after which it stops too."""

LOOK_AT_TOKENS = 10_000
"""Records among which one with tokens is looked for."""

EXAMPLES = 3
_LONGEST_EXAMPLE = 200


@dataclass(frozen=True)
class Lengths:
    """How long something is: the least, three percentiles and the greatest, in a unit."""

    what: str
    unit: str
    min: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True)
class DataSummary:
    """What was seen of a split.

    Args:
        records: records that were read and found good, limits applied and before the filter.
        complete: whether these are all; else there are more than preflight looks at.
        columns: the columns that are used.
        bytes: the size of the files, for ``builtin:`` and ``hub:`` that of the texts read.
        seconds: of audio; 0 where there is none.
        skipped: bad rows by reason.
        first_skipped: what was wrong with the first of them, and where.
        filtered: what the filter leaves out by reason; None where that follows from tokens and there is no tokenizer
            yet.
        lengths: of texts in tokens, or in words where there is no tokenizer yet, and in characters; of audio in
            seconds.
        labels: how often each label stands there; empty where there are none.
        repeated: records whose input stands earlier in the split.
        repeated_alike: the same, and those that differ from an earlier one in case and space alone.
        in_train: records of the evaluation split whose input stands in the training split.
        in_train_alike: the same, and those that differ in case and space alone.
        examples: the first records by role, texts cut.
        warnings: what the user should know, for the plan and the report: skipped rows, and records of the evaluation
            split that stand in the training split.
    """

    records: int
    complete: bool
    columns: tuple[str, ...]
    bytes: int
    seconds: float
    skipped: Mapping[str, int]
    first_skipped: str
    filtered: Mapping[str, int] | None
    lengths: tuple[Lengths, ...]
    labels: Mapping[str, int]
    repeated: int
    repeated_alike: int
    in_train: int
    in_train_alike: int
    examples: tuple[Mapping[str, str], ...]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON says it."""
        return asdict(self)


def preflight(data: DataSpec, task: Task) -> dict[Split, DataSummary]:
    """Look at the first records of both splits, and at the headers of audio.

    Raises:
        StepError: a file, column or value is unfit, the evaluation data has a label that the training data lacks, or a
            field of the data block means nothing to the task.
    """
    return _look(data, task, None, thorough=False)


def check_tokens(data: DataSpec, task: Task, tokenizer: TextTokenizer) -> None:
    """Look for a training example that has tokens, not unknown ones alone, and that the filter keeps; most data shows
    one at once.

    Args:
        data: where it is; a mistake in it is ``preflight``'s to tell.
        task: what the model does.
        tokenizer: the model's.

    Raises:
        StepError: none of the records has one.
    """
    first, count, reason = "", 0, None
    try:
        for record in records(data, "train", task, BadRows(data.on_bad_row)):
            ids = tokenizer.core.encode(record.text, add_special_tokens=False).ids
            other = record.target
            target = None if other is None else len(tokenizer.writes.encode(other, add_special_tokens=False).ids)
            if set(ids) - {tokenizer.unknown}:
                reason = left_out(data.filter, len(ids), target)
                if reason is None:
                    return
            first, count = first or record.text, count + 1
            if count == LOOK_AT_TOKENS:
                return
    except StepError:
        return
    if reason is not None:
        raise StepError(f"data.filter: it leaves nothing of the {count} records of data.train ({reason}); loosen it")
    raise StepError(
        f"data.train: the model's tokenizer makes no token, or unknown ones alone, of all its {count} texts, the first "
        f"of which is {first[:40]!r}; name data that holds text, or the tokenizer that belongs to it in model.tokenizer"
    )


def overview(data: DataSpec, task: Task, tokenizer: TextTokenizer | None = None) -> dict[Split, DataSummary]:
    """Look at every record of both splits; audio is decoded.

    Args:
        data: where they are.
        task: what the model does.
        tokenizer: counts tokens, where there is one.

    Raises:
        StepError: as ``preflight``.
    """
    return _look(data, task, tokenizer, thorough=True)


def _look(data: DataSpec, task: Task, tokenizer: TextTokenizer | None, *, thorough: bool) -> dict[Split, DataSummary]:
    train = _Survey(data, "train", task, tokenizer, thorough)
    train.read()
    evaluation = _Survey(data, "eval", task, tokenizer, thorough, train)
    evaluation.read()
    return {"train": train.summary(), "eval": evaluation.summary()}


@dataclass
class _Survey:
    """One pass over a split; that of the evaluation split comes after that of the training split."""

    data: DataSpec
    split: Split
    task: Task
    tokenizer: TextTokenizer | None
    thorough: bool
    train: _Survey | None = None
    inputs: Inputs = field(default_factory=Inputs)
    labels: Counter[str] = field(default_factory=Counter)
    filtered: Counter[str] = field(default_factory=Counter)
    measured: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    examples: list[Mapping[str, str]] = field(default_factory=list)
    count: int = 0
    size: int = 0
    complete: bool = True

    def __post_init__(self) -> None:
        self.bad = BadRows(self.data.on_bad_row)
        self.leak = Leak(self.train.inputs if self.train else Inputs())
        self.known = self.train.labels if self.train and self.train.complete else None

    def read(self) -> None:
        for record in records(self.data, self.split, self.task, self.bad):
            if not self.thorough and (self.count >= LOOK_AT or self.size >= LOOK_AT_BYTES):
                self.complete = False
                return
            try:
                self.take(record)
            except BadRow as error:
                self.bad.add(error)
        self.bad.check_some_left(self.count, f"data.{self.split}: {source_of(self.data, self.split)}")

    def take(self, record: Record) -> None:
        if isinstance(record.label, str) and self.known and record.label not in self.known:
            raise unseen(record.label, record.place, self.known)
        seconds = self.heard(record)
        tokens = [self.read_text("text", record.text)]
        if record.target is not None:
            tokens.append(self.read_text("translation", record.target))
        if record.label is not None:
            self.labels.update([record.label] if isinstance(record.label, str) else record.label)
        if self.split == "train":
            reason = left_out(self.data.filter, tokens[0], tokens[1] if record.target is not None else None, seconds)
            self.filtered.update([reason] if reason else [])
        self.count += 1
        keys = keys_of(record)
        self.inputs.add(keys)
        self.leak.add(keys, record.place)
        if len(self.examples) < EXAMPLES:
            self.examples.append(_example(record, seconds))

    def heard(self, record: Record) -> float | None:
        if record.audio is None:
            return None
        if self.thorough:
            recording = decoded(record.audio, self.data.max_duration, record.place)
            seconds = len(recording.samples) / recording.rate
        else:
            seconds = seconds_of(record.audio, self.data.max_duration, record.place)
        self.measure("audio", "seconds", seconds)
        return seconds

    def read_text(self, what: str, text: str) -> int:
        """Measure a text; its tokens, or its words where there is no tokenizer."""
        if self.tokenizer is None:
            unit, count = "words", len(text.split())
        else:
            unit, count = "tokens", len(self.tokenizer.core.encode(text, add_special_tokens=False).ids)
        self.measure(what, unit, count)
        self.measure(what, "characters", len(text))
        self.size += len(text.encode())
        return count

    def measure(self, what: str, unit: str, value: float) -> None:
        self.measured.setdefault((what, unit), []).append(value)

    def summary(self) -> DataSummary:
        source, spec = source_of(self.data, self.split), self.data.filter
        size = self.size
        if not source.startswith((builtin.PREFIX, hub.PREFIX)):
            size = sum(file.stat().st_size for file in files_of(source))
        by_tokens = (spec.min_tokens, spec.max_tokens, spec.max_ratio) != (None, None, None)
        unknown = by_tokens and self.tokenizer is None and self.split == "train"
        looked = "" if self.thorough or (self.complete and self.task != "speech-recognition") else ", at a first look"
        skipped = f"data.{self.split}{looked}: {self.bad.warning}" if self.bad.counts else ""
        return DataSummary(
            records=self.count,
            complete=self.complete,
            columns=columns_of(self.data.fields, self.task),
            bytes=size,
            seconds=sum(self.measured.get(("audio", "seconds"), ())),
            skipped=dict(self.bad.counts),
            first_skipped=self.bad.first,
            filtered=None if unknown else dict(self.filtered),
            lengths=tuple(_lengths(what, unit, values) for (what, unit), values in self.measured.items()),
            labels={name: self.labels[name] for name in ordered(self.labels)},
            repeated=self.inputs.repeated,
            repeated_alike=self.inputs.repeated_alike,
            in_train=self.leak.exact,
            in_train_alike=self.leak.alike,
            examples=tuple(self.examples),
            warnings=tuple(text for text in (skipped, self.leak.warning(self.count)) if text),
        )


def _lengths(what: str, unit: str, values: list[float]) -> Lengths:
    import numpy as np

    figures = np.percentile(values, [0, 50, 90, 99, 100], method="inverted_cdf").tolist()
    return Lengths(what, unit, *figures)


def _example(record: Record, seconds: float | None) -> dict[str, str]:
    heard = None if seconds is None else f"{seconds:.2f} s"
    label = ", ".join(record.label) if isinstance(record.label, tuple) else record.label
    roles = {"text": record.text, "translation": record.target, "label": label, "audio": heard}
    return {role: " ".join(value[:400].split())[:_LONGEST_EXAMPLE] for role, value in roles.items() if value}
