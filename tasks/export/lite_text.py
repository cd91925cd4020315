"""Text files: classifiers, and decoders that score and write. Needs numpy and ai_edge_litert only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tasks.export.errors import InputError
from tasks.export.inputs import check_ids, check_mask, ends_of
from tasks.export.lite_file import LiteFile
from tasks.export.lite_inputs import checked, scalar
from tasks.export.names import COUNT, DECODE, IDS, LOGITS, MASK, POSITION, PREFILL

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class LiteRTModel:
    """A classifier, or a decoder that scores and writes text.

    ``batch`` and ``length`` are the shape that ``run`` takes, ``vocab`` the number of ids that it knows, ``cache`` how
    many tokens the KV cache holds (None in a file without one, which writes by scoring the whole text again).

    Raises:
        InputError: other inputs and outputs than those of an export.
    """

    def __init__(self, file: LiteFile | Path | str, threads: int = 1) -> None:
        self._file = file if isinstance(file, LiteFile) else LiteFile(Path(file), threads)
        self._score = self._file.call(next(iter(self._file.entries)))
        inputs, outputs = self._score.entry.inputs, self._score.entry.outputs
        if set(inputs) != {IDS, MASK} or inputs[IDS].shape != inputs[MASK].shape or len(inputs[IDS].shape) != 2:
            listed = ", ".join(f"{port.name} {list(port.shape)}" for port in inputs.values())
            raise InputError(
                f"{self._file.path.name} takes {listed}; an export takes {IDS} and {MASK}, both [batch, length]"
            )
        if len(outputs) != 1:
            raise InputError(f"{self._file.path.name} has {len(outputs)} outputs; an export has one, the logits")
        self._output = next(iter(outputs))
        self.batch, self.length = inputs[IDS].shape
        self.vocab = self._file.rows
        writes = {PREFILL, DECODE} <= self._file.entries.keys()
        self._prefill = self._file.call(PREFILL) if writes else None
        self._decode = self._file.call(DECODE) if writes else None
        self.cache: int | None = None if self._decode is None else self._decode.entry.inputs["key_0"].shape[2]

    @property
    def positions(self) -> int:
        """Tokens of a text at most."""
        return self.cache or self.length

    @property
    def rescores(self) -> bool:
        """Whether it writes by a pass over the whole text for every token."""
        return self.cache is None

    def run(self, input_ids: ArrayLike, attention_mask: ArrayLike) -> NDArray[np.float32]:
        """Logits of one batch, dequantised where the file's output is quantised.

        Args:
            input_ids: token ids, integers ``[batch, length]``.
            attention_mask: 1 where there is a token, 0 where there is padding, ``[batch, length]``.

        Returns:
            float32 ``[batch, classes]`` (text-classification) or ``[batch, length, vocabulary]`` (text-generation).

        Raises:
            InputError: wrong shape or type, an id outside the vocabulary, or a mask of other values than 0 and 1.
        """
        ids = checked(input_ids, IDS, (self.batch, self.length))
        mask = checked(attention_mask, MASK, (self.batch, self.length))
        check_ids(ids, self.vocab)
        check_mask(mask)
        self._score.run(**{IDS: ids, MASK: mask})
        return self._score.floats(self._output)

    def prefill(self, prompt_ids: Sequence[int]) -> NDArray[np.float32]:
        """Start a text: the logits behind the prompt, [vocabulary]. The cache then holds the prompt.

        Raises:
            InputError: the file has no cache, or the prompt is empty, longer than it, or has unknown ids.
        """
        if self._prefill is None or self.cache is None:
            raise InputError(f"{self._file.path.name} has no KV cache; export with generation: true")
        prompt = self._prompt(prompt_ids, self.cache)
        chunk = self._prefill.entry.inputs[IDS].shape[1]
        for start in range(0, len(prompt), chunk):
            # The last chunk begins earlier where it would not fit; what it takes again is the same again.
            start = min(start, self.cache - chunk)
            part = prompt[start : start + chunk]
            ids = np.zeros((1, chunk), np.int32)
            ids[0, : len(part)] = part
            self._prefill.run(**{IDS: ids, POSITION: scalar(start), COUNT: scalar(len(part))})
        return self._prefill.floats(LOGITS)[0]

    def decode(self, token: int, position: int) -> NDArray[np.float32]:
        """The logits behind ``token``, which stands at ``position`` behind what the cache holds, [vocabulary]."""
        if self._decode is None:
            raise InputError(f"{self._file.path.name} has no KV cache; export with generation: true")
        self._decode.run(**{IDS: np.full((1, 1), token, np.int32), POSITION: scalar(position)})
        return self._decode.floats(LOGITS)[0]

    def generate(self, prompt_ids: Sequence[int], limit: int, eos: int | Sequence[int] | None = None) -> list[int]:
        """What the model writes behind the prompt, greedily.

        It ends behind ``limit`` tokens, at the first token of ``eos``, which is left out, or where the cache (without
        one the file's length) is full.

        Args:
            prompt_ids: the prompt, one token or more.
            limit: new tokens at most.
            eos: the id or ids that end a text; None for none.

        Raises:
            InputError: the prompt is empty, too long, or has unknown ids.
        """
        ends = ends_of(eos)
        written: list[int] = []
        if limit < 1:
            return written
        if self.cache is None:
            return self._rescored(self._prompt(prompt_ids, self.length), limit, ends)
        logits = self.prefill(prompt_ids)
        while (token := int(logits.argmax())) not in ends:
            position = len(prompt_ids) + len(written)
            written.append(token)
            if len(written) >= limit or position >= self.cache:
                break
            logits = self.decode(token, position)
        return written

    def _rescored(self, prompt: NDArray[np.int32], limit: int, ends: frozenset[int]) -> list[int]:
        ids = np.zeros((self.batch, self.length), np.int32)
        mask = np.zeros((self.batch, self.length), np.int32)
        ids[0, : len(prompt)], mask[:, : len(prompt)] = prompt, 1
        written: list[int] = []
        for place in range(len(prompt), self.length + 1):
            token = int(self.run(ids, mask)[0, place - 1].argmax())
            if token in ends:
                break
            written.append(token)
            if len(written) >= limit or place == self.length:
                break
            ids[0, place], mask[:, place] = token, 1
        return written

    def _prompt(self, prompt_ids: Sequence[int], room: int) -> NDArray[np.int32]:
        prompt = np.asarray(prompt_ids)
        if prompt.ndim != 1 or not 1 <= len(prompt) <= room or not np.issubdtype(prompt.dtype, np.integer):
            raise InputError(f"the prompt has the shape {list(prompt.shape)}; this file takes 1 to {room} token ids")
        check_ids(prompt, self.vocab)
        return prompt.astype(np.int32)
