"""``builtin:reviews``: synthetic film reviews from a small grammar, labelled negative or positive.

The verdict depends on how words combine: negation turns an adjective round (``not good``), the clause after ``but``
outweighs the one before it, other people's opinions do not count, and friendly or sad words stand in sentences that
judge nothing. A bag of words therefore does not suffice. Nobody wrote these reviews about any film.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

LABELS = ("negative", "positive")
TRAIN, EVAL = 4000, 1000

_GOOD = (
    "good",
    "moving",
    "clever",
    "funny",
    "warm",
    "brilliant",
    "gripping",
    "honest",
    "tender",
    "sharp",
    "lovely",
    "fresh",
    "rich",
    "bold",
    "graceful",
    "vivid",
)
_BAD = (
    "bad",
    "dull",
    "clumsy",
    "tedious",
    "cold",
    "hollow",
    "stale",
    "shallow",
    "noisy",
    "lazy",
    "bland",
    "crude",
    "messy",
    "flat",
    "silly",
    "lifeless",
)
_ASPECTS = (
    "the film",
    "the plot",
    "the acting",
    "the script",
    "the story",
    "the music",
    "the camera work",
    "the dialogue",
    "the ending",
    "the second half",
    "the leading actress",
    "the villain",
    "the humour",
    "the pace",
    "the editing",
    "the cast",
)
_HOW = ("", "", "", "really ", "quite ", "truly ", "rather ", "utterly ", "surprisingly ", "very ")
_OTHERS = ("critics", "my sister", "most reviewers", "the man beside me", "my friends", "the posters", "the programme")
_ASIDES = (
    "we saw it on a rainy tuesday .",
    "the cinema was warm and the staff were lovely .",
    "i had a bad cold and a flat tyre that day .",
    "it runs for about two hours .",
    "the director is known for a bold debut .",
    "it was filmed in a cold and noisy harbour town .",
    "a rich uncle dies in the first scene .",
    "the hero is a lazy clerk with a sharp tongue .",
    "it is based on a silly song .",
    "a good friend lent me the disc .",
    "the seats were hard , the popcorn was stale .",
    "it opens next week .",
    "the heroine bakes fresh bread in a messy kitchen .",
    "there are songs in it .",
)

Draw = Callable[[Sequence[str]], str]


def read(split: Literal["train", "eval"]) -> list[tuple[str, str | None]]:
    """The reviews of a split, always the same; no review is in both, and both labels are equally frequent."""
    reviews = _all()
    return list(reviews[:TRAIN] if split == "train" else reviews[TRAIN:])


@cache
def _all() -> tuple[tuple[str, str], ...]:
    source = random.Random(20240229)

    def draw(options: Sequence[str]) -> str:
        # random() alone is promised to give the same numbers in every Python version.
        return options[int(source.random() * len(options))]

    reviews: dict[str, str] = {}
    while len(reviews) < TRAIN + EVAL:
        label = LABELS[len(reviews) % 2]
        reviews.setdefault(_review(label == "positive", draw), label)
    return tuple(reviews.items())


def _review(positive: bool, draw: Draw) -> str:
    sentence = _FORMS[draw(_FREQUENCY)](positive, draw)
    aside = draw(("", "", "before", "after"))
    if aside == "before":
        return f"{draw(_ASIDES)} {sentence}"
    return f"{sentence} {draw(_ASIDES)}" if aside else sentence


def _adjective(positive: bool, draw: Draw) -> str:
    return draw(_HOW) + draw(_GOOD if positive else _BAD)


def _clause(positive: bool, draw: Draw) -> str:
    aspect = draw(_ASPECTS)
    form = draw((*("plain",) * 8, "not", "not", "never", "but"))
    if form == "plain":
        return f"{aspect} is {_adjective(positive, draw)}"
    turned = draw(_BAD if positive else _GOOD)
    return {
        "not": f"{aspect} is not {draw(('', '', 'really ', 'very '))}{turned}",
        "never": f"{aspect} is never {turned}",
        "but": f"{aspect} is anything but {turned}",
    }[form]


def _single(positive: bool, draw: Draw) -> str:
    return f"{_clause(positive, draw)} ."


def _but(positive: bool, draw: Draw) -> str:
    return f"{_clause(not positive, draw)} , {draw(('but', 'yet'))} in the end {_clause(positive, draw)} ."


def _although(positive: bool, draw: Draw) -> str:
    return f"although {_clause(not positive, draw)} , {_clause(positive, draw)} ."


def _even_if(positive: bool, draw: Draw) -> str:
    return f"{_clause(positive, draw)} , even if {_clause(not positive, draw)} ."


def _hearsay(positive: bool, draw: Draw) -> str:
    return f"{draw(_OTHERS)} called it {_adjective(not positive, draw)} , i disagree : {_clause(positive, draw)} ."


def _agreement(positive: bool, draw: Draw) -> str:
    return f"{draw(_OTHERS)} called it {_adjective(positive, draw)} , and {_clause(positive, draw)} ."


def _expectation(positive: bool, draw: Draw) -> str:
    return f"i had expected something {_adjective(not positive, draw)} . {_clause(positive, draw)} ."


_FORMS: dict[str, Callable[[bool, Draw], str]] = {
    "single": _single,
    "but": _but,
    "although": _although,
    "even_if": _even_if,
    "hearsay": _hearsay,
    "agreement": _agreement,
    "expectation": _expectation,
}
_FREQUENCY = (*("single", "agreement") * 4, *_FORMS)
