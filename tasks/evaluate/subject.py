"""What is measured: an artifact that runs, on the examples of the evaluation split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from specs.schema.base import Task
from specs.schema.pipeline import DataSpec, EvaluateSpec
from tasks.data.encoded import Encoded
from tasks.data.tokens import TextTokenizer
from tasks.evaluate.runners import Runner, Writer
from tasks.evaluate.scores import Scores

Progress = Callable[[int, int], None]

NEW_TOKENS = 32
"""Tokens that are written for text-generation where the spec says nothing."""


UNLIMITED = 1 << 30
"""Tokens that are written where all come at once and the spec says nothing: as many as there are."""


@dataclass(frozen=True)
class Subject:
    """An artifact that runs, with all that its measurement needs.

    Args:
        task: what the language model does.
        runner: how it runs.
        rows: the evaluation examples.
        text: the tokenizer of the model.
        data: the spec's data block.
        spec: how it is measured.
        progress: told how many examples are done, and of how many.
    """

    task: Task
    runner: Runner | Writer
    rows: Encoded
    text: TextTokenizer
    data: DataSpec
    spec: EvaluateSpec
    progress: Progress

    @property
    def limit(self) -> int:
        """Tokens that are written at most: what the spec says, and no more than the artifact can."""
        asked = self.spec.generation.new_tokens
        if isinstance(self.runner, Runner):
            return asked or NEW_TOKENS
        if self.runner.at_once:
            return asked or UNLIMITED
        wanted = asked or self.data.max_target_length or self.data.max_length
        return wanted if self.runner.target_length is None else min(wanted, self.runner.target_length)

    def read(self, ids: list[int]) -> str:
        """Text of ids that the model was given, special tokens left out."""
        return self.text.core.decode(ids)

    def read_written(self, ids: list[int]) -> str:
        """Text of ids that the model wrote, special tokens left out."""
        return self.text.writes.decode(ids)


@dataclass(frozen=True)
class Scored:
    """What came out of an artifact for every evaluation example.

    Args:
        scores: columns with one row an example; they are kept.
        outputs: ``input``, ``expected`` and ``output`` of the first examples, as text.
        facts: how it was scored, for the record's scenario.
    """

    scores: Scores
    outputs: list[dict[str, Any]]
    facts: Mapping[str, Any] = field(default_factory=dict)
