"""Encoder-decoders that write: translation and Whisper. Needs numpy and ai_edge_litert only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.export.errors import InputError
from tasks.export.greedy import Greedy
from tasks.export.inputs import Inputs, check_ids, check_mask
from tasks.export.lite_file import LiteFile
from tasks.export.lite_inputs import checked_inputs, filled, scalar
from tasks.export.names import DECODE, DECODER_IDS, ENCODE, FEATURES, IDS, LOGITS, MASK, POSITION

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class LiteRTSeq2Seq:
    """An encoder-decoder that writes: a translation model, or Whisper.

    ``batch`` inputs of at most ``length`` tokens (or frames) are read at once, and at most ``target_length`` tokens
    written for each.

    Raises:
        InputError: ``config.json`` beside the file is missing or does not say how the decoder begins and ends.
    """

    at_once = False

    def __init__(self, file: LiteFile) -> None:
        self._file = file
        self._encode, self._decode = file.call(ENCODE), file.call(DECODE)
        self._greedy = Greedy(file.path)
        self.source = IDS if IDS in self._encode.entry.inputs else FEATURES
        shape = self._encode.entry.inputs[self.source].shape
        self.batch, self.length = shape[0], shape[-1]
        self.positions = self.length
        self.target_length = self._decode.entry.inputs["key_0"].shape[2]
        self.vocab = file.rows

    def write(self, inputs: Inputs, limit: int) -> list[list[int]]:
        """What the model writes for each example, greedily; without start, end and padding.

        Args:
            inputs: ``input_ids`` and ``attention_mask`` [examples, tokens], or ``input_features`` [examples, mels,
                frames]; any number of examples.
            limit: tokens at most, the end mark among them; ``target_length`` where that is less.

        Raises:
            InputError: inputs longer than the file's, of another shape, or with unknown ids.
        """
        written: list[list[int]] = []
        for count in self._encoded(inputs):
            room = self.target_length
            written += self._greedy.write(self._step, self.batch, min(limit, room), room)[:count]
        return written

    def logits(self, inputs: Inputs, decoder_ids: ArrayLike) -> NDArray[np.float32]:
        """Logits behind each of ``decoder_ids`` [examples, tokens], [examples, tokens, vocabulary].

        Raises:
            InputError: as ``write``, or more tokens than ``target_length``.
        """
        given = np.asarray(decoder_ids)
        if given.ndim != 2 or given.shape[1] > self.target_length:
            raise InputError(
                f"{DECODER_IDS} has the shape {list(given.shape)}; this file takes [examples, tokens] of at most "
                f"{self.target_length} tokens"
            )
        check_ids(given, self._decode.entry.outputs[LOGITS].shape[-1])
        parts: list[NDArray[np.float32]] = []
        done = 0
        for count in self._encoded(inputs):
            ids = np.full((self.batch, given.shape[1]), self._greedy.pad, np.int32)
            ids[:count] = given[done : done + count]
            steps = [self._step(ids[:, place], place) for place in range(given.shape[1])]
            parts.append(np.stack(steps, axis=1)[:count])
            done += count
        return np.concatenate(parts)

    def _encoded(self, inputs: Inputs) -> Iterator[int]:
        """Encode the examples batch by batch; yields the examples of each."""
        arrays = checked_inputs(inputs, self._encode, self.source)
        if self.source == IDS:
            check_ids(arrays[IDS], self.vocab)
            check_mask(arrays[MASK])
        for start in range(0, len(arrays[self.source]), self.batch):
            part = {name: values[start : start + self.batch] for name, values in arrays.items()}
            whole = {
                name: filled(values, self._encode.entry.inputs[name], self._greedy.pad) for name, values in part.items()
            }
            self._encode.run(**whole)
            if MASK in self._decode.entry.inputs:
                self._decode.set(**{MASK: whole[MASK]})
            yield len(part[self.source])

    def _step(self, tokens: NDArray[Any], position: int) -> NDArray[np.float32]:
        self._decode.run(**{DECODER_IDS: tokens[:, None].astype(np.int32), POSITION: scalar(position)})
        return self._decode.floats(LOGITS)
