"""The constants of the files of an ONNX export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tasks.export.constants import Constant

SUFFIX = ".onnx"


def constants(path: Path) -> Iterator[Constant]:
    """The constants of the ONNX files in the folder of ``path``; one that several graphs read counts once."""
    from onnx import TensorProto, numpy_helper

    seen: set[tuple[str, str]] = set()
    for file in sorted(path.parent.glob(f"*{SUFFIX}")):
        for tensor in read_graph(file).graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                place = {entry.key: entry.value for entry in tensor.external_data}
                if (place["location"], place["offset"]) in seen:
                    continue
                seen.add((place["location"], place["offset"]))
            values = numpy_helper.to_array(tensor, base_dir=str(file.parent))
            is_scale = tensor.name.endswith("_scale")
            is_weight = (values.dtype.kind == "f" or values.dtype in (np.int8, np.uint8)) and not is_scale
            yield Constant(values.dtype.name, values.reshape(-1), 0, values.nbytes, is_weight)


def read_graph(file: Path) -> Any:
    """The graph, without weights that lie in a file of their own."""
    import onnx

    return onnx.load(str(file), load_external_data=False)
