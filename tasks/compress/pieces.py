"""The content of a ``tokenizer.json``: which of its pieces others need, and the same with fewer of them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from tasks.context import StepError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def needed(content: Mapping[str, Any], used: set[int]) -> set[int]:
    """The ids without which the pieces ``used`` could not be made, or some text not be encoded at all.

    Special and added tokens always stay. Of byte-pair encoding: the bytes, or where there are none every single
    character, and the pieces from which the used ones are merged. Of WordPiece every single character, alone and inside
    a word. Of Unigram the same, and the least likely piece, on which the score of what is unknown depends.

    Raises:
        StepError: the tokenizer is of another kind.
    """
    vocabulary = _vocabulary(content)
    names = {number: token for token, number in vocabulary.items()}
    kept = {token["id"] for token in content.get("added_tokens") or ()}
    kept |= {vocabulary[token] for token in _alphabet(content, vocabulary)}
    unknown = _unknown(content)
    kept |= {number for token, number in vocabulary.items() if token == unknown}
    model = content["model"]
    if model["type"] == "BPE":
        merges = {pair: rank for rank, pair in enumerate(_pairs(model))}
        for number in (*used, *kept):
            kept |= {vocabulary[piece] for piece in made_of(names.get(number, ""), merges) if piece in vocabulary}
    return kept


def made_of(token: str, merges: Mapping[tuple[str, str], int]) -> set[str]:
    """The pieces that byte-pair encoding makes on its way to ``token``, itself included.

    Within a token the merges happen as if it stood alone: one that crossed its edge would have made another token.
    """
    parts = list(token)
    found = set(parts)
    while len(parts) > 1:
        ranks = [(merges[pair], place) for place, pair in enumerate(pairwise(parts)) if pair in merges]
        if not ranks:
            break
        _, place = min(ranks)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
        found.add(parts[place])
    return found | {token} - {""}


def smaller(content: Mapping[str, Any], numbers: Mapping[int, int]) -> dict[str, Any]:
    """The content with the pieces whose id is in ``numbers`` alone, under their new ids."""
    changed = copy.deepcopy(dict(content))
    model = changed["model"]
    model["vocab"] = _VOCABULARIES[model["type"]](model["vocab"], numbers)
    if model["type"] == "BPE":
        left = model["vocab"]
        model["merges"] = [
            written
            for written, (one, other) in zip(model["merges"], _pairs(model), strict=True)
            if one in left and other in left and one + other in left
        ]
    if model.get("unk_id") is not None:
        model["unk_id"] = numbers[model["unk_id"]]
    changed["added_tokens"] = [token | {"id": numbers[token["id"]]} for token in changed.get("added_tokens") or ()]
    if changed.get("padding"):
        changed["padding"]["pad_id"] = numbers[changed["padding"]["pad_id"]]
    for step in _steps(changed.get("post_processor")):
        for special in (step.get("special_tokens") or {}).values():
            special["ids"] = [numbers[number] for number in special["ids"]]
        for name in ("sep", "cls"):
            if isinstance(step.get(name), list):
                step[name] = [step[name][0], numbers[step[name][1]]]
    return changed


def _vocabulary(content: Mapping[str, Any]) -> dict[str, int]:
    """Piece to id.

    Raises:
        StepError: the tokenizer is of a kind that is not known here.
    """
    model = content.get("model") or {}
    kind = model.get("type")
    if kind not in _VOCABULARIES:
        raise StepError(f"the tokenizer is of the kind {kind}, whose vocabulary cannot be cut; leave this step out")
    if kind == "BPE" and (model.get("end_of_word_suffix") or model.get("continuing_subword_prefix")):
        raise StepError(
            "the tokenizer marks the inside or the end of words in its merges, and cannot be cut; leave this step out"
        )
    if kind == "Unigram":
        return {piece: number for number, (piece, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


def _alphabet(content: Mapping[str, Any], vocabulary: Mapping[str, int]) -> Iterator[str]:
    """The pieces that every text can be spelt with."""
    model = content["model"]
    prefix = model.get("continuing_subword_prefix") or ""
    bytes_ = [token for token in vocabulary if _BYTE.fullmatch(token)]
    if model.get("byte_fallback") and len(bytes_) == 256:
        yield from bytes_
        return
    for token in vocabulary:
        if len(token) == 1 or (prefix and token.startswith(prefix) and len(token) == len(prefix) + 1):
            yield token
    if model["type"] == "Unigram":
        yield min(model["vocab"], key=lambda entry: entry[1])[0]


def _unknown(content: Mapping[str, Any]) -> str | None:
    model = content["model"]
    if model.get("unk_id") is not None:
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges, which older files write as one text each."""
    return [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]  # type: ignore[misc]


def _steps(processor: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if not processor:
        return []
    if processor.get("type") == "Sequence":
        return [step for part in processor["processors"] for step in _steps(part)]
    return [processor]  # type: ignore[list-item]


def _table(vocabulary: Mapping[str, int], numbers: Mapping[int, int]) -> dict[str, int]:
    return {token: numbers[old] for token, old in vocabulary.items() if old in numbers}


def _list(vocabulary: list[Any], numbers: Mapping[int, int]) -> list[Any]:
    return [entry for old, entry in enumerate(vocabulary) if old in numbers]


_VOCABULARIES: Mapping[str, Callable[[Any, Mapping[int, int]], Any]] = {
    "BPE": _table,
    "WordPiece": _table,
    "WordLevel": _table,
    "Unigram": _list,
}
