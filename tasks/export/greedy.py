"""How an encoder-decoder writes greedily, by the words of ``config.json``. Needs numpy only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.export.errors import InputError
from tasks.export.inputs import ends_of, read_config

if TYPE_CHECKING:
    from numpy.typing import NDArray

Step = Callable[["NDArray[Any]", int], "NDArray[np.float32]"]
"""One token for each example [rows] and its place to the logits behind it, [rows, vocabulary]."""


class Greedy:
    """The decoder's first tokens, its end, and the tokens that it must and must not write.

    Args:
        file: an exported file with ``config.json`` beside it.

    Raises:
        InputError: ``config.json`` is missing or does not say how the decoder begins and ends.
    """

    def __init__(self, file: Path) -> None:
        config = read_config(file)
        try:
            self.start, self.pad = int(config["decoder_start_token_id"]), int(config["pad_token_id"])
            self._ends = sorted(ends_of(config["eos_token_id"]))
        except (KeyError, TypeError) as error:
            raise InputError(f"{file.parent / 'config.json'} does not say how the decoder begins and ends") from error
        self._marks = [self.start, self.pad, config.get("bos_token_id", self.pad)]
        self._prompt = [int(token) for _, token in config.get("forced_decoder_ids") or ()]
        self._forced = config.get("forced_bos_token_id")
        self._must_end = config.get("forced_eos_token_id") is not None
        self._never, self._never_first = (
            np.asarray(config.get(key) or (), np.int64) for key in ("suppress_tokens", "begin_suppress_tokens")
        )

    def write(self, step: Step, rows: int, limit: int, room: int) -> list[list[int]]:
        """What is written for each of ``rows`` examples, without start, end and padding.

        Args:
            step: gives the logits; it is told every token once, from place 0 on.
            rows: examples.
            limit: tokens at most, the end mark among them.
            room: tokens that the decoder can take, the start among them.
        """
        written: list[list[int]] = [[] for _ in range(rows)]
        going = np.ones(rows, bool)
        tokens = np.full(rows, self.start)
        first = len(self._prompt)
        for place in range(min(limit + first - self._must_end, room)):
            logits = step(tokens, place)
            if place < first:
                tokens = np.full(rows, self._prompt[place])
                continue
            logits[:, self._never] = -np.inf
            if place == first:
                logits[:, self._never_first] = -np.inf
            chosen = logits.argmax(-1) if place > first or self._forced is None else self._forced
            tokens = np.where(going, chosen, self.pad)
            going &= ~np.isin(tokens, self._ends)
            for row in np.flatnonzero(going & ~np.isin(tokens, self._marks)):
                written[row].append(int(tokens[row]))
            if not going.any():
                break
        return written
