"""The constants of a LiteRT file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tasks.export import graph
from tasks.export.constants import Constant


def constants(path: Path) -> Iterator[Constant]:
    """The constants of the file ``path``."""
    from ai_edge_litert import schema_py_generated as schema

    model = graph.read(path)
    names = {value: name.lower() for name, value in vars(schema.TensorType).items() if not name.startswith("_")}
    seen: set[int] = set()
    for tensor in (tensor for part in model.subgraphs for tensor in part.tensors):
        data = model.buffers[tensor.buffer].data
        if data is None or not len(data) or tensor.buffer in seen:
            continue
        seen.add(tensor.buffer)
        dtype = names[tensor.type]
        quantized, zero = _quantized(tensor.quantization)
        shape = () if tensor.shape is None else tuple(int(size) for size in tensor.shape)
        values = _elements(np.frombuffer(bytes(data), np.uint8), dtype, math.prod(shape))
        yield Constant(dtype, values, zero, len(data), "float" in dtype or quantized)


def _quantized(quantization: Any) -> tuple[bool, int]:
    """Whether a tensor holds quantized numbers, and the one that stands for zero."""
    if quantization is None:
        return False, 0
    if quantization.scale is None or not len(quantization.scale):
        return bool(quantization.detailsType), 0  # scales by block are kept as details
    points = quantization.zeroPoint
    return True, int(points[0]) if points is not None and len(points) == 1 else 0


def _elements(data: np.ndarray, dtype: str, count: int) -> np.ndarray:
    if dtype in ("int4", "uint4"):
        halves = np.stack((data & 15, data >> 4), axis=1).reshape(-1)[:count].astype(np.int8)
        return np.where(halves > 7, halves - 16, halves) if dtype == "int4" else halves
    if dtype == "int2":
        parts = np.stack([(data >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1).reshape(-1)[:count].astype(np.int8)
        return np.where(parts > 1, parts - 4, parts)
    known = {"float32", "float16", "float64", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "bool"}
    return data.view(dtype) if dtype in known else data
