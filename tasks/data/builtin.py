"""Corpora that are on every machine, for first runs and tests.

``builtin:python-docs`` is real text: the language reference inside the standard library, one document a topic. The
others are generated, good for seeing a model learn and a step cost quality, and no evidence of its quality on anything
real: ``builtin:reviews``, film reviews from a grammar (``tasks.data.reviews``); ``builtin:toy-language``, sentences in
an invented language (``tasks.data.toy_language``); ``builtin:tone-digits``, numbers spoken in tones
(``tasks.data.tone_digits``). The same name gives the training split in ``data.train`` and the evaluation split in
``data.eval``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from specs.schema.base import Task
from specs.schema.suggest import nearest
from tasks.context import StepError
from tasks.data import reviews, tone_digits, toy_language

PREFIX = "builtin:"

Text = tuple[str, str | None]
"""A text and its label, None where the corpus has none."""

Split = Literal["train", "eval"]

_MANY = {"label": "labels", "source": "sources", "target": "translations"}


@dataclass(frozen=True)
class Corpus:
    """A built-in corpus.

    Args:
        name: what stands behind ``builtin:``.
        task: what it is made for.
        roles: the fields of ``FieldsSpec`` that its records have.
        rows: a split's records, always the same: a value for each of the roles.
        generated: whether they follow from the source of ``rows`` alone, which then identifies them.
    """

    name: str
    task: Task
    roles: tuple[str, ...]
    rows: Callable[[Split], Iterable[Sequence[Any]]]
    generated: bool = True

    def read(self, split: Split) -> Iterable[Mapping[str, Any]]:
        """The records of a split, by role."""
        return (dict(zip(self.roles, row, strict=True)) for row in self.rows(split))


def find(source: str) -> Corpus:
    """The corpus that ``builtin:name`` names.

    Raises:
        StepError: there is none of this name.
    """
    name = source.removeprefix(PREFIX)
    if name not in CORPORA:
        near = nearest(name, CORPORA)
        raise StepError(f"{source}: no built-in corpus {name!r}; {near}")
    return CORPORA[name]


def check_task(corpus: Corpus, task: Task, roles: Sequence[str]) -> None:
    """Refuse a corpus that lacks a role of the task.

    Raises:
        StepError: it does; with the corpus that has all of them.
    """
    missing = [role for role in roles if role not in corpus.roles]
    if missing:
        lacks = " and no ".join(_MANY.get(role, role) for role in missing)
        fitting = next(other.name for other in CORPORA.values() if other.task == task)
        raise StepError(f"{PREFIX}{corpus.name} has no {lacks}; for {task} use {PREFIX}{fitting} or your own file")


def python_docs(split: Split) -> list[Text]:
    """One document a topic, in the order of their names; the hash of its name holds out about 1 in 10.

    A text that stands under two names counts once, so that none is in both splits.
    """
    from pydoc_data.topics import topics

    name_of: dict[str, str] = {}
    for name in sorted(topics):
        name_of.setdefault(topics[name], name)
    return [(text, None) for text, name in name_of.items() if _held_out(name) == (split == "eval")]


def _held_out(name: str) -> bool:
    return hashlib.sha256(f"python-docs/{name}".encode()).digest()[0] < 26


CORPORA: dict[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            "python-docs",
            "text-generation",
            ("text",),
            lambda split: [(text,) for text, _ in python_docs(split)],
            generated=False,
        ),
        Corpus("reviews", "text-classification", ("text", "label"), reviews.read),
        Corpus("toy-language", "translation", ("source", "target"), toy_language.read),
        Corpus("tone-digits", "speech-recognition", ("audio", "text"), tone_digits.read),
    )
}
