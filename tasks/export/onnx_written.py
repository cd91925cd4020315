"""What is in the files of an ONNX export, read from the files themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from tasks.context import StepError
from tasks.export.onnx_constants import SUFFIX, read_graph
from tasks.export.written import Written

_WEIGHTED = ("MatMul", "Gemm", "Conv", "Gather")


def read_back(folder: Path, unfit: Mapping[str, str]) -> Written:
    """Count what is in the files of ``folder``. Products, convolutions and lookups count, with or without weights.

    Args:
        folder: of the export.
        unfit: what could not be quantized, with the reasons.
    """
    kinds: Counter[str] = Counter()
    touched: list[str] = []
    floating = 0
    bare: Counter[str] = Counter()
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        graph = read_graph(file).graph
        types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        prefix = f"{file.stem}: " if len(list(folder.glob(f"*{SUFFIX}"))) > 1 else ""
        for node in graph.node:
            kinds[node.op_type] += 1
            packed = types.get(node.input[0]) == 3 if node.op_type == "Gather" else node.op_type == "MatMulInteger"
            if packed:
                touched.append(prefix + node.name)
            elif node.op_type in _WEIGHTED and any(types.get(name) == 1 for name in node.input[:2]):
                floating += not node.name.endswith(" scales")
            elif node.op_type == "MatMul":
                floating += 1
                bare[node.op_type] += 1
    left = dict(unfit)
    if touched and bare:
        left[f"{bare.total()} products of two activations"] = "they have no weights"
    return Written(kinds, len(touched), floating, tuple(touched), left, 0)


def check_written(written: Written, size: int, float_size: int) -> None:
    """Refuse a quantized export that is none.

    Raises:
        StepError: nothing was quantized, or the files are no smaller than the float ones.
    """
    if not written.quantized:
        raise StepError(f"int8-dynamic quantised none of {written.floating} operators; use precision: float32")
    if size >= float_size:
        raise StepError(
            f"the int8-dynamic files have {size} bytes and the float32 files {float_size}: this model is too small to "
            "gain from it; use precision: float32"
        )
