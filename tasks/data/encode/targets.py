"""Texts that a model is to write, as its tokenizer makes them for labels."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.data.encode.job import counted, padded, room

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from tasks.data.tokens import TextTokenizer


@dataclass(frozen=True)
class Written:
    """``ids`` of a text, the ``tokens`` that it has without special ones and uncut, and whether it was cut."""

    ids: list[int]
    tokens: int
    cut: bool


def config_of(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder; empty where there is none."""
    file = folder / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def write_ids(texts: Sequence[str], tokenizer: TextTokenizer, limit: int | None, name: str = "") -> list[Written]:
    """Ids of what a decoder writes, with the end mark behind.

    The token that the decoder starts with is left out where the tokenizer writes it, as Whisper's does: the model puts
    it before what it is given.

    Args:
        texts: what is to be written.
        tokenizer: of the model folder.
        limit: ids of a text at most, a longer one is cut before its end mark; None for any number.
        name: the field of the spec that says so.

    Raises:
        StepError: the limit has no room for text.
    """
    start = config_of(tokenizer.folder).get("decoder_start_token_id")
    core, end = tokenizer.writes, tokenizer.eos
    special = core.num_special_tokens_to_add(False)
    if limit is not None:
        special = room(core, limit, name)
        core.enable_truncation(limit)
    found = []
    for encoding in core.encode_batch(list(texts)):
        ids, cut = list(encoding.ids), bool(encoding.overflowing)
        if ids and ids[0] == start:
            ids = ids[1:]
        if end is not None and ids[-1:] != [end]:
            if limit is not None and len(ids) >= limit:
                ids, cut = ids[: limit - 1], True
            ids.append(end)
        found.append(Written(ids, counted(encoding, special), cut))
    core.no_truncation()
    return found


def character_ids(texts: Sequence[str], tokenizer: TextTokenizer) -> list[Written]:
    """Ids of what CTC names: the characters, without any special token."""
    encodings = tokenizer.writes.encode_batch(list(texts), add_special_tokens=False)
    return [Written(list(encoding.ids), len(encoding.ids), False) for encoding in encodings]


def fitted(rows: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 [N, T] and mask uint8, as wide as the longest row."""
    import numpy as np

    return padded([np.array(row, np.int32) for row in rows], max(map(len, rows)), pad)
