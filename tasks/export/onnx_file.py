"""An ONNX graph in ONNX Runtime. Needs numpy and onnxruntime only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.export.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class OnnxPort:
    """An input or output: its type, and its shape with None where any size will do."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]

    def empty(self, batch: int) -> NDArray[Any]:
        """Nothing for so many examples: every size behind the first that is free is 0."""
        return np.zeros((batch, *(size or 0 for size in self.shape[1:])), self.dtype)


_TYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32}


class OnnxFile:
    """A graph, loaded.

    Args:
        path: the ``.onnx`` file.
        threads: CPU threads.

    Raises:
        InputError: no such file, or ONNX Runtime cannot load it.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        import onnxruntime

        if threads < 1:
            raise InputError(f"threads is {threads}; it is 1 or more")
        if not path.is_file():
            raise InputError(f"{path} is not a file; give the folder of an ONNX export")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no class in common below this one
            raise InputError(f"ONNX Runtime cannot load {path.name}: {str(error).splitlines()[0][:300]}") from error
        self.path = path
        self.inputs = {port.name: _port(port, path.name) for port in self._session.get_inputs()}
        self.outputs = tuple(port.name for port in self._session.get_outputs())

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name.

        Raises:
            InputError: an input is missing or of another rank or fixed size than the graph's.
        """
        given = {name: self._fitting(name, inputs.get(name)) for name in self.inputs}
        return dict(zip(self.outputs, self._session.run(self.outputs, given), strict=True))  # type: ignore

    def _fitting(self, name: str, values: NDArray[Any] | None) -> NDArray[Any]:
        port = self.inputs[name]
        if values is None:
            raise InputError(f"{name} is missing; {self.path.name} takes {', '.join(self.inputs)}")
        fits = values.ndim == len(port.shape) and all(
            want in (None, size) for size, want in zip(values.shape, port.shape, strict=True)
        )
        if not fits:
            shape = ["any" if size is None else size for size in port.shape]
            raise InputError(f"{name} has the shape {list(values.shape)}; {self.path.name} takes {shape}")
        return np.ascontiguousarray(values, port.dtype)


def _port(found: Any, file: str) -> OnnxPort:
    if found.type not in _TYPES:
        raise InputError(f"{file} takes {found.name} as {found.type}; an export takes int64 and float32")
    shape = tuple(size if isinstance(size, int) else None for size in found.shape)
    return OnnxPort(found.name, shape, np.dtype(_TYPES[found.type]))
