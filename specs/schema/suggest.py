"""The nearest valid name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches
from os.path import splitext

_MOST = 30
_LONGEST = 100
_NEAR = 0.7
"""How alike two names must be, and two files without what is behind the dot."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``did you mean …?`` where a known name is near, else the list of the known ones, cut where it is long."""
    names = list(known)
    written = name[:_LONGEST]
    stem = splitext(written)[0]
    for close in get_close_matches(written, names, cutoff=_NEAR):
        if SequenceMatcher(None, stem, splitext(close)[0]).ratio() >= _NEAR:
            return f"did you mean {close}?"
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return f"known: {', '.join(names[:_MOST]) or 'none'}{more}"
