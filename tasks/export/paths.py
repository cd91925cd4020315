"""What the frames of a CTC model spell, by the words of ``config.json``. Needs numpy only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tasks.export.errors import InputError
from tasks.export.inputs import read_config

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class Paths:
    """The convolutions that make frames of samples, and the blank.

    Args:
        file: an exported file with ``config.json`` beside it.

    Raises:
        InputError: ``config.json`` is missing or does not name the convolutions.
    """

    def __init__(self, file: Path) -> None:
        config = read_config(file)
        try:
            self.blank = int(config["pad_token_id"])
            self._convolutions = tuple(zip(config["conv_kernel"], config["conv_stride"], strict=True))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{file.parent / 'config.json'} does not name the convolutions") from error

    def frames(self, samples: ArrayLike) -> NDArray[np.int64]:
        """Frames of recordings of so many samples."""
        counts = np.asarray(samples, np.int64)
        for kernel, stride in self._convolutions:
            counts = np.maximum((counts - kernel) // stride + 1, 0)
        return counts

    def spelled(self, logits: NDArray[np.float32], frames: Iterable[int], limit: int) -> list[list[int]]:
        """The ids of the most likely path of each example: of equal neighbours one stays, blanks go.

        Args:
            logits: [examples, frames, vocabulary].
            frames: how many of the frames count, for each example.
            limit: ids at most.
        """
        written = []
        for path, count in zip(logits.argmax(-1), frames, strict=True):
            path = path[:count]
            kept = path[np.append(True, path[1:] != path[:-1])[: len(path)]]
            written.append(kept[kept != self.blank].tolist()[:limit])
        return written
