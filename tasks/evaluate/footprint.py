"""Sizes, data types and weights, read from the files that were written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.context import StepError
from tasks.export.runtime import runtime_of

_SAFETENSORS = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
_AUXILIARY = re.compile(r"(^|[._])(scales?|zero_points?|input_range|index)$")
_PAIRS = "weight_int4"
"""How a tensor's name ends that holds two codes of 4 bits a byte, each 8 more than its number."""
_CODES = re.compile(r"(?:rows|projection)\d+_codes(\d+)$")
"""How a tensor's name ends whose codes lie bit by bit, and how many they are."""

_CHUNK = 1 << 24


@dataclass(frozen=True)
class Footprint:
    """What an artifact weighs.

    Args:
        size: bytes of the files that hold the weights and are deployed (`*.safetensors`, or those of the export);
            the tokenizer is not counted, it is the same before and after.
        parameters: number of weights; scales and zero points of packed weights are not counted.
        nonzero: how many of them are not zero.
        dtypes: bytes of tensor data by data type.
        files: bytes of every file of the folder.
    """

    size: int
    parameters: int
    nonzero: int
    dtypes: dict[str, int]
    files: dict[str, int]


def files(folder: Path) -> dict[str, int]:
    """Bytes of every file under ``folder`` but the store's own manifest."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}


def of_model(folder: Path) -> Footprint:
    """The footprint of a torch model or a packed one.

    Raises:
        StepError: the folder has no ``*.safetensors``.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise StepError(f"{folder} holds no .safetensors file; save the model as safetensors")
    dtypes: dict[str, int] = {}
    parameters = nonzero = 0
    for path in weights:
        for name, dtype, raw in _tensors(path):
            dtypes[dtype] = dtypes.get(dtype, 0) + raw.nbytes
            counted = dtype.startswith(("float", "bfloat")) or dtype in ("int8", "uint8")
            if counted and not _AUXILIARY.search(name):
                packed = _CODES.search(name)
                if packed is not None:  # none of these codes stands for zero
                    parameters += int(packed[1])
                    nonzero += int(packed[1])
                    continue
                raw = _halves(raw) if name.endswith(_PAIRS) else raw
                parameters += raw.size
                nonzero += _nonzero(raw, floating="float" in dtype)
    size = sum(path.stat().st_size for path in weights)
    return Footprint(size, parameters, nonzero, dtypes, files(folder))


def of_export(folder: Path, deployed: Sequence[str], computed: str) -> Footprint:
    """The footprint of an export.

    Args:
        folder: of the artifact.
        deployed: the files that the device is given; their bytes are the size.
        computed: the file whose constants are read; one of them, but for an NPU build, whose compiled file hides the
            weights in one opaque buffer.
    """
    dtypes: dict[str, int] = {}
    parameters = nonzero = 0
    for found in runtime_of(folder / computed).constants(folder / computed):
        dtypes[found.dtype] = dtypes.get(found.dtype, 0) + found.bytes
        if found.is_weight:
            parameters += found.values.size
            nonzero += int(np.count_nonzero(found.values != found.zero))
    size = sum((folder / name).stat().st_size for name in deployed)
    return Footprint(size, parameters, nonzero, dtypes, files(folder))


def _tensors(path: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """``(name, dtype, elements as unsigned integers)`` of each tensor; numpy knows no bfloat16, bits serve for all."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, "r", offset=8 + length) if path.stat().st_size > 8 + length else np.empty(0, "u1")
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        dtype, width = _SAFETENSORS.get(entry["dtype"], (entry["dtype"].lower(), 1))
        yield name, dtype, np.asarray(data[start:end]).view(f"u{width}")


def _halves(packed: np.ndarray) -> np.ndarray:
    """Both codes of every byte, 0 for 0."""
    return np.concatenate([packed & 15, packed >> 4]) ^ 8


def _nonzero(bits: np.ndarray, *, floating: bool) -> int:
    count = 0
    for start in range(0, bits.size, _CHUNK):
        part = bits[start : start + _CHUNK]
        count += int(np.count_nonzero(part << 1 if floating else part))  # the shift drops the sign: -0.0 is zero
    return count
