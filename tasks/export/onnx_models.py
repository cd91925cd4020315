"""ONNX exports that read and write. Needs numpy and onnxruntime only.

They take any number of examples of any length that the model has positions for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.export.errors import InputError
from tasks.export.greedy import Greedy
from tasks.export.inputs import Inputs, check_ids, check_mask, ends_of, read_config
from tasks.export.names import DECODER_IDS, FEATURES, IDS, LOGITS, MASK, PAST, PRESENT, SAMPLES, cached
from tasks.export.onnx_file import OnnxFile
from tasks.export.paths import Paths

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_OF_PAST = f"{PAST}."


class OnnxText:
    """A classifier, or a decoder that scores and writes text.

    ``vocab`` is the number of ids that it knows, ``positions`` how many tokens it can tell apart, None without a limit.
    """

    batch = None
    length = None
    rescores = False

    def __init__(self, file: OnnxFile) -> None:
        self._file = file
        config = read_config(file.path)
        self.vocab: int | None = config.get("vocab_size")
        self.positions: int | None = config.get("positions")
        self._layers = sum(name.startswith(_OF_PAST) for name in file.inputs) // 2
        self._past: dict[str, NDArray[Any]] = {}
        self._count = 0

    def run(self, input_ids: ArrayLike, attention_mask: ArrayLike) -> NDArray[np.float32]:
        """Logits: float32 [batch, classes] (text-classification) or [batch, length, vocabulary] (text-generation).

        Args:
            input_ids: token ids, integers [batch, length].
            attention_mask: 1 where there is a token, 0 where there is padding, [batch, length].

        Raises:
            InputError: wrong shape or type, an id outside the vocabulary, or a mask of other values than 0 and 1.
        """
        ids = _integers(input_ids, IDS)
        mask = _integers(attention_mask, MASK)
        if mask.shape != ids.shape:
            raise InputError(f"{MASK} has the shape {list(mask.shape)} and {IDS} {list(ids.shape)}; they are the same")
        self._check_length(ids.shape[1])
        check_ids(ids, self.vocab)
        check_mask(mask)
        return self._file.run({IDS: ids, MASK: mask, **self._nothing(len(ids))})[LOGITS]

    def prefill(self, prompt_ids: Sequence[int]) -> NDArray[np.float32]:
        """Start a text: the logits behind the prompt, [vocabulary].

        Raises:
            InputError: the file does not write, or the prompt is empty, too long, or has unknown ids.
        """
        if not self._layers:
            raise InputError(f"{self._file.path.name} is a classifier and writes nothing")
        prompt = _integers(np.asarray(prompt_ids)[None], IDS)
        self._check_length(prompt.shape[1])
        check_ids(prompt, self.vocab)
        self._past, self._count = self._nothing(1), 0
        return self._continue(prompt)

    def decode(self, token: int, position: int) -> NDArray[np.float32]:
        """The logits behind ``token``, which stands at ``position`` behind what was given before, [vocabulary]."""
        if position != self._count:
            self._past = {name: values[:, :, :position] for name, values in self._past.items()}
            self._count = position
        return self._continue(np.full((1, 1), token, np.int64))

    def generate(self, prompt_ids: Sequence[int], limit: int, eos: int | Sequence[int] | None = None) -> list[int]:
        """What the model writes behind the prompt, greedily.

        It ends behind ``limit`` tokens, at the first token of ``eos``, which is left out, or where the positions end.

        Raises:
            InputError: as ``prefill``.
        """
        ends = ends_of(eos)
        written: list[int] = []
        if limit < 1:
            return written
        logits = self.prefill(prompt_ids)
        while (token := int(logits.argmax())) not in ends:
            position = len(prompt_ids) + len(written)
            written.append(token)
            if len(written) >= limit or (self.positions is not None and position >= self.positions):
                break
            logits = self.decode(token, position)
        return written

    def _continue(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self._count += ids.shape[1]
        out = self._file.run({IDS: ids, MASK: np.ones((1, self._count), np.int64), **self._past})
        self._past = {
            name: out[given]
            for name, given in zip(cached(PAST, self._layers), cached(PRESENT, self._layers), strict=True)
        }
        return out[LOGITS][0, -1]

    def _nothing(self, batch: int) -> dict[str, NDArray[Any]]:
        return {name: self._file.inputs[name].empty(batch) for name in cached(PAST, self._layers)}

    def _check_length(self, length: int) -> None:
        if self.positions is not None and length > self.positions:
            raise InputError(f"{IDS} has {length} tokens and the model {self.positions} positions; cut it")


class OnnxSeq2Seq:
    """An encoder-decoder that writes: a translation model, or Whisper.

    ``positions`` and ``target_length`` are the tokens that it can read and write, None without a limit.

    Raises:
        InputError: ``config.json`` beside the files is missing or does not say how the decoder begins and ends.
    """

    batch = None
    length = None
    at_once = False

    def __init__(self, encoder: OnnxFile, decoder: OnnxFile) -> None:
        self._encoder, self._decoder = encoder, decoder
        self._greedy = Greedy(encoder.path)
        config = read_config(encoder.path)
        self.vocab: int | None = config.get("vocab_size")
        self.source = IDS if IDS in encoder.inputs else FEATURES
        self.positions: int | None = config.get("positions") if self.source == IDS else None
        self.target_length: int | None = config.get("target_positions")
        self._layers = sum(name.startswith(_OF_PAST) for name in decoder.inputs) // 2
        self._seen: dict[str, NDArray[Any]] = {}
        self._past: dict[str, NDArray[Any]] = {}

    def write(self, inputs: Inputs, limit: int) -> list[list[int]]:
        """What the model writes for each example, greedily; without start, end and padding.

        Args:
            inputs: ``input_ids`` and ``attention_mask`` [examples, tokens], or ``input_features`` [examples, mels,
                frames].
            limit: tokens at most, the end mark among them; ``target_length`` where that is less.

        Raises:
            InputError: inputs that are too long, of another shape, or with unknown ids.
        """
        rows = self._encode(inputs)
        room = limit + 8 if self.target_length is None else self.target_length
        return self._greedy.write(
            lambda tokens, _: self._decode(np.asarray(tokens, np.int64)[:, None])[:, -1], rows, min(limit, room), room
        )

    def logits(self, inputs: Inputs, decoder_ids: ArrayLike) -> NDArray[np.float32]:
        """Logits behind each of ``decoder_ids`` [examples, tokens], [examples, tokens, vocabulary].

        Raises:
            InputError: as ``write``.
        """
        ids = _integers(decoder_ids, DECODER_IDS)
        if self.target_length is not None and ids.shape[1] > self.target_length:
            raise InputError(f"{DECODER_IDS} has {ids.shape[1]} tokens; this model writes {self.target_length} at most")
        check_ids(ids, self.vocab)
        rows = self._encode(inputs)
        if len(ids) != rows:
            raise InputError(f"{self.source} has {rows} examples and {DECODER_IDS} {len(ids)}")
        return self._decode(ids)

    def _encode(self, inputs: Inputs) -> int:
        """Read the examples; how many they are."""
        given = {name: np.asarray(values) for name, values in inputs.items()}
        if self.source == IDS and self.source in given:
            ids = _integers(given[IDS], IDS)
            if self.positions is not None and ids.shape[1] > self.positions:
                raise InputError(f"{IDS} has {ids.shape[1]} tokens and the model {self.positions} positions; cut it")
            check_ids(ids, self.vocab)
            if MASK in given:
                check_mask(given[MASK])
        self._seen = self._encoder.run(given)
        rows = len(next(iter(self._seen.values())))
        if MASK in self._decoder.inputs:
            self._seen[MASK] = given[MASK]
        self._past = {name: self._decoder.inputs[name].empty(rows) for name in cached(PAST, self._layers)}
        return rows

    def _decode(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits behind further tokens [rows, tokens]."""
        out = self._decoder.run({DECODER_IDS: ids, **self._seen, **self._past})
        names = zip(cached(PAST, self._layers), cached(PRESENT, self._layers), strict=True)
        self._past = {name: out[given] for name, given in names}
        return out[LOGITS]


class OnnxCtc:
    """A model for CTC: samples in, logits for every frame out.

    Raises:
        InputError: ``config.json`` beside the file is missing or does not name the convolutions.
    """

    batch = None
    length = None
    positions = None
    target_length = None
    at_once = True

    def __init__(self, file: OnnxFile) -> None:
        self._file = file
        self._paths = Paths(file.path)
        self.frames = self._paths.frames

    def logits(self, inputs: Inputs) -> NDArray[np.float32]:
        """Logits of the examples, [examples, frames, vocabulary]; those of frames that hold padding mean nothing.

        Args:
            inputs: ``input_values`` [examples, samples] and ``attention_mask`` of the same shape (without one all
                samples count).

        Raises:
            InputError: another shape, or a recording shorter than a frame.
        """
        given = self._whole(inputs)
        if SAMPLES in given and not self.frames(given[SAMPLES].shape[-1]) > 0:
            raise InputError(f"{SAMPLES} has the shape {list(given[SAMPLES].shape)}: shorter than a frame; pad it")
        return self._file.run(given)[LOGITS]

    def write(self, inputs: Inputs, limit: int) -> list[list[int]]:
        """The ids that the model hears in each example, at most ``limit``.

        Raises:
            InputError: as ``logits``.
        """
        logits = self.logits(inputs)
        return self._paths.spelled(logits, self.frames(self._whole(inputs)[MASK].sum(1)), limit)

    def _whole(self, inputs: Inputs) -> dict[str, NDArray[Any]]:
        given = {name: np.asarray(values) for name, values in inputs.items()}
        if MASK not in given and SAMPLES in given:
            given[MASK] = np.ones(given[SAMPLES].shape, np.int64)
        return given


def _integers(values: ArrayLike, name: str) -> NDArray[np.int64]:
    """``values`` as ids [examples, tokens], at least one of each."""
    array = np.asarray(values)
    if array.ndim != 2 or not array.size:
        raise InputError(f"{name} has the shape {list(array.shape)}; it takes [examples, tokens], one or more of each")
    if not (np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_):
        raise InputError(f"{name} is {array.dtype}; it takes integers")
    return array.astype(np.int64)
