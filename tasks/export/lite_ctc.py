"""Models for CTC: samples in, logits for every frame out. Needs numpy and ai_edge_litert only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tasks.export.lite_file import InputError, LiteFile
from tasks.export.lite_inputs import Inputs, checked_inputs, filled, read_config
from tasks.export.names import MASK, SAMPLES

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class LiteRTCtc:
    """A model for CTC: samples in, logits for every frame out.

    ``length`` is in samples. ``write`` reads the most likely path: of equal neighbours one stays, blanks go.

    Raises:
        InputError: ``config.json`` beside the file is missing or does not name the convolutions.
    """

    def __init__(self, file: LiteFile) -> None:
        self._call = file.call(next(iter(file.entries)))
        self.batch, self.length = self._call.entry.inputs[SAMPLES].shape
        self._output = next(iter(self._call.entry.outputs))
        config = read_config(file.path)
        try:
            self.blank = int(config["pad_token_id"])
            self._convolutions = tuple(zip(config["conv_kernel"], config["conv_stride"], strict=True))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{file.path.parent / 'config.json'} does not name the convolutions") from error

    def logits(self, inputs: Inputs) -> NDArray[np.float32]:
        """Logits of the examples, [examples, frames, vocabulary]; those of frames that hold padding mean nothing.

        Args:
            inputs: ``input_values`` [examples, samples] and ``attention_mask`` of the same shape (without one all
                samples count); any number of examples.

        Raises:
            InputError: longer inputs than the file's, or of another shape.
        """
        arrays = checked_inputs(self._whole(inputs), self._call, SAMPLES)
        parts = []
        for start in range(0, len(arrays[SAMPLES]), self.batch):
            part = {name: values[start : start + self.batch] for name, values in arrays.items()}
            self._call.run(**{name: filled(values, self._call.entry.inputs[name], 0) for name, values in part.items()})
            parts.append(self._call.floats(self._output)[: len(part[SAMPLES])])
        return np.concatenate(parts)

    def write(self, inputs: Inputs, limit: int) -> list[list[int]]:
        """The ids that the model hears in each example, at most ``limit``.

        Raises:
            InputError: as ``logits``.
        """
        best = self.logits(inputs).argmax(-1)
        frames = self.frames(self._whole(inputs)[MASK].sum(1))
        written = []
        for path, count in zip(best, frames, strict=True):
            path = path[:count]
            kept = path[np.append(True, path[1:] != path[:-1])[: len(path)]]
            written.append(kept[kept != self.blank].tolist()[:limit])
        return written

    def frames(self, samples: ArrayLike) -> NDArray[np.int64]:
        """Frames of recordings of so many samples."""
        counts = np.asarray(samples, np.int64)
        for kernel, stride in self._convolutions:
            counts = np.maximum((counts - kernel) // stride + 1, 0)
        return counts

    def _whole(self, inputs: Inputs) -> Inputs:
        return (
            inputs
            if MASK in inputs or SAMPLES not in inputs
            else {**inputs, MASK: np.ones(np.shape(inputs[SAMPLES]), np.int32)}
        )
