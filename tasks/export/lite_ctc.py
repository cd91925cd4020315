"""Models for CTC: samples in, logits for every frame out. Needs numpy and ai_edge_litert only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tasks.export.inputs import Inputs
from tasks.export.lite_file import LiteFile
from tasks.export.lite_inputs import checked_inputs, filled
from tasks.export.names import MASK, SAMPLES
from tasks.export.paths import Paths

if TYPE_CHECKING:
    from numpy.typing import NDArray


class LiteRTCtc:
    """A model for CTC: samples in, logits for every frame out.

    ``length`` is in samples. ``write`` reads the most likely path: of equal neighbours one stays, blanks go.

    Raises:
        InputError: ``config.json`` beside the file is missing or does not name the convolutions.
    """

    at_once = True
    target_length = None

    def __init__(self, file: LiteFile) -> None:
        self._call = file.call(next(iter(file.entries)))
        self.batch, self.length = self._call.entry.inputs[SAMPLES].shape
        self.positions = self.length
        self._output = next(iter(self._call.entry.outputs))
        self._paths = Paths(file.path)
        self.frames = self._paths.frames

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
        frames = self.frames(self._whole(inputs)[MASK].sum(1))
        return self._paths.spelled(self.logits(inputs), frames, limit)

    def _whole(self, inputs: Inputs) -> Inputs:
        return (
            inputs
            if MASK in inputs or SAMPLES not in inputs
            else {**inputs, MASK: np.ones(np.shape(inputs[SAMPLES]), np.int32)}
        )
