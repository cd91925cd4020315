"""Encoded data as it lies in the store: arrays in safetensors files, mapped into memory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.context import StepError

if TYPE_CHECKING:
    import numpy as np

FILE = "encoded.safetensors"
FEATURES = "features.safetensors"

_DTYPES = {"F32": "<f4", "I32": "<i4", "I64": "<i8", "U8": "|u1"}

_ARRAYS = (
    "input_ids",
    "attention_mask",
    "labels",
    "document",
    "text_bytes",
    "target_ids",
    "target_mask",
    "feature_ends",
    "seconds",
)
"""The fields of ``Encoded`` that are arrays of ``FILE``."""

_HEADER = 256
"""Bytes of the header of ``FEATURES``, whose shape is known only when all is written."""


@dataclass(frozen=True)
class Encoded:
    """Examples as models take them; N of them. What a task has not is None.

    Args:
        input_ids: int32 [N, L] of the text that is read, padded on the right; None for speech-recognition.
        attention_mask: uint8 [N, L]; 1 where there is a token.
        labels: for text-classification int32 [N], or uint8 [N, C] where an example may have several labels.
        document: int32 [N], the number of the record that the example comes from.
        text_bytes: int32 [N], UTF-8 bytes of the text that the scored tokens cover: for text-generation every token of
            the window but its first; else 0.
        label_names: the names of the labels in the order of their numbers (text-classification).
        target_ids: int32 [N, T] of the text that is to be written, padded on the right: with its end mark and without
            the token that a decoder starts with; for CTC its characters alone.
        target_mask: uint8 [N, T].
        references: the text that is to be written, as the data has it.
        features: float32 [S] samples, or [F, M] frames of M bands, of all examples one after the other
            (speech-recognition).
        feature_ends: int64 [N], where those of each example end.
        seconds: float32 [N] of audio.
        feature_input: what the model calls its input, ``input_features`` or ``input_values``.
        feature_frames: the number of frames that the model demands; None where any will do.
        pad: the id that fills up the rows of ``input_ids``.
        warnings: what the user should know of the data, for the report.
    """

    input_ids: Any
    attention_mask: Any
    labels: np.ndarray | None
    document: np.ndarray
    text_bytes: np.ndarray
    label_names: tuple[str, ...] = ()
    target_ids: np.ndarray | None = None
    target_mask: np.ndarray | None = None
    references: tuple[str, ...] = ()
    features: np.ndarray | None = None
    feature_ends: np.ndarray | None = None
    seconds: np.ndarray | None = None
    feature_input: str = ""
    feature_frames: int | None = None
    pad: int = 0
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.document)

    @property
    def length(self) -> int:
        """Tokens of an example, padding included; frames or samples of the longest."""
        if self.input_ids is not None:
            return self.input_ids.shape[1]
        return self.feature_frames or int(self.lengths().max(initial=0))

    def lengths(self) -> np.ndarray:
        """Tokens of each example without the padding, or its frames or samples; int64 [N]."""
        import numpy as np

        if self.feature_ends is not None:
            return np.diff(np.asarray(self.feature_ends), prepend=0)
        return self.attention_mask.sum(axis=1, dtype="int64")

    def features_of(self, row: int) -> np.ndarray:
        """The samples or frames of the example ``row``."""
        assert self.features is not None
        assert self.feature_ends is not None
        return self.features[self.feature_ends[row - 1] if row else 0 : self.feature_ends[row]]

    def take(self, rows: Any) -> Encoded:
        """The examples at ``rows`` (indices, a mask or a slice)."""
        import numpy as np

        chosen = np.arange(len(self))[rows]
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        taken: dict[str, Any] = {name: None if array is None else array[chosen] for name, array in arrays.items()}
        if self.features is not None:
            empty = self.features[:0]
            taken["features"] = np.concatenate([empty, *(self.features_of(row) for row in chosen.tolist())])
            taken["feature_ends"] = np.cumsum(self.lengths()[chosen])
        return Encoded(
            **taken,
            label_names=self.label_names,
            references=tuple(self.references[row] for row in chosen) if self.references else (),
            feature_input=self.feature_input,
            feature_frames=self.feature_frames,
            pad=self.pad,
            warnings=self.warnings,
        )


class FeatureFile:
    """Writes the features of any number of examples, one after the other, without holding them in memory.

    Args:
        path: the folder; the file is ``FEATURES``.
    """

    def __init__(self, path: Path) -> None:
        self.file = path / FEATURES
        self.ends: list[int] = []
        self._shape: tuple[int, ...] = ()

    def __enter__(self) -> FeatureFile:
        self._stream = self.file.open("wb")
        self._stream.write(bytes(_HEADER))
        return self

    def append(self, features: np.ndarray) -> None:
        """Add the features of the next example: [S], or [F, M] with the same M for all."""
        self._shape = features.shape[1:]
        self.ends.append(len(features) + (self.ends[-1] if self.ends else 0))
        self._stream.write(features.astype("<f4").tobytes())

    def __exit__(self, *_: object) -> None:
        shape = [self.ends[-1] if self.ends else 0, *self._shape]
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * math.prod(shape)]}
        header = json.dumps({"features": entry}).encode().ljust(_HEADER - 8)
        self._stream.seek(0)
        self._stream.write((_HEADER - 8).to_bytes(8, "little") + header)
        self._stream.close()

    def open(self) -> np.ndarray:
        """What was written, mapped."""
        return open_arrays(self.file)[0]["features"]


def save_encoded(encoded: Encoded, path: Path) -> None:
    """Write ``encoded`` into the folder ``path``, where a ``FeatureFile`` has written its features."""
    import numpy as np
    from safetensors.numpy import save_file

    arrays = {name: getattr(encoded, name) for name in _ARRAYS}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}
    if encoded.references:
        arrays["reference_bytes"], arrays["reference_ends"] = _packed(encoded.references)
    about = {
        "label_names": list(encoded.label_names),
        "feature_input": encoded.feature_input,
        "feature_frames": encoded.feature_frames,
        "pad": encoded.pad,
        "warnings": list(encoded.warnings),
    }
    save_file(arrays, path / FILE, metadata={"about": json.dumps(about)})  # several entries come in a random order


def open_encoded(path: Path) -> Encoded:
    """The encoded data in the folder ``path``, mapped into memory and read-only; needs numpy alone.

    Raises:
        StepError: a file is missing or damaged.
    """
    file = path / FILE
    try:
        arrays, about = open_arrays(file)
        references = (
            _unpacked(arrays["reference_bytes"], arrays["reference_ends"]) if "reference_ends" in arrays else ()
        )
        file = path / FEATURES
        return Encoded(
            **{name: arrays.get(name) for name in _ARRAYS},  # type: ignore[arg-type]
            label_names=tuple(about["label_names"]),
            references=references,
            features=open_arrays(file)[0]["features"] if "feature_ends" in arrays else None,
            feature_input=about["feature_input"],
            feature_frames=about["feature_frames"],
            pad=about["pad"],
            warnings=tuple(about["warnings"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StepError(
            f"{file} is missing or damaged ({error}); run the spec again to encode the data anew"
        ) from error


def _packed(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """UTF-8 of all texts, uint8, and where each ends, int64 [N]."""
    import numpy as np

    parts = [text.encode() for text in texts]
    return np.frombuffer(b"".join(parts), np.uint8), np.cumsum([len(part) for part in parts], dtype=np.int64)


def _unpacked(whole: np.ndarray, ends: np.ndarray) -> tuple[str, ...]:
    text, starts = whole.tobytes(), [0, *ends.tolist()]
    return tuple(text[start:end].decode() for start, end in pairwise(starts))


def open_arrays(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a safetensors file, mapped, and its metadata; safetensors itself would copy every array."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > 1_000_000:
            raise ValueError(f"header of {size} bytes")
        header = json.loads(stream.read(size))
    about = header.pop("__metadata__", {}).get("about", "{}")
    return {name: _map(file, entry, 8 + size) for name, entry in header.items()}, json.loads(about)


def _map(file: Path, entry: Mapping[str, Any], start: int) -> np.ndarray:
    import numpy as np

    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"shape {shape} does not fit {end - begin} bytes")
    return np.memmap(file, dtype, "r", start + begin, shape)
