"""A LiteRT file and the calls that its signatures offer. Needs numpy and ai_edge_litert only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.export.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SHARED = ":memory"
"""XNNPACK's cache of packed weights in memory: without one every signature packs its own copy of them."""


@dataclass(frozen=True)
class Port:
    """An input or output of a signature: its shape and type, and scale and zero point where it holds quantized numbers.

    ``scale`` and ``zero`` are arrays that broadcast against the values.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    scale: NDArray[np.float32] | None
    zero: NDArray[np.float32] | None

    @property
    def meaning(self) -> tuple[Any, ...]:
        """What the bytes of a value mean."""
        return self.shape, self.dtype, *(None if one is None else one.tolist() for one in (self.scale, self.zero))

    def stored(self, values: NDArray[Any]) -> NDArray[Any]:
        """``values`` in the type of the port; quantized where it holds quantized numbers."""
        if self.scale is not None and self.zero is not None and values.dtype != self.dtype:
            limits = np.iinfo(self.dtype)
            values = np.clip(np.round(values / self.scale) + self.zero, limits.min, limits.max)
        return np.ascontiguousarray(values, self.dtype)

    def floats(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """What the stored ``values`` stand for."""
        if self.scale is None or self.zero is None:
            return values.astype(np.float32)
        return (values.astype(np.float32) - self.zero) * self.scale


@dataclass(frozen=True)
class Entry:
    """A signature: its inputs and outputs by name."""

    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]


Watch = Callable[[str, Mapping[str, "NDArray[Any]"]], None]
"""Is told the signature and its inputs before every call, for calibration."""


class LiteFile:
    """A ``.tflite`` file, loaded.

    Args:
        path: the file.
        threads: CPU threads.
        watch: is told of every call.

    Raises:
        InputError: no such file, not a LiteRT file, compiled for an NPU, or damaged.
    """

    def __init__(self, path: Path, threads: int = 1, watch: Watch | None = None) -> None:
        from ai_edge_litert.interpreter import Interpreter

        if threads < 1:
            raise InputError(f"threads is {threads}; it is 1 or more")
        if not path.is_file():
            raise InputError(f"{path} is not a file; give the model.tflite of an export")
        with path.open("rb") as stream:
            head = stream.read(8)
        if head[4:8] != b"TFL3":
            raise InputError(f"{path} is not a LiteRT file: the mark TFL3 is missing")
        self.path, self.watch = path, watch
        try:
            # The interpreter checks the file, which the compiled model does not, and it alone tells scales.
            found: Any = Interpreter(str(path), num_threads=1)
            operators = found._get_ops_details()
            self.entries = {name: _entry(found.get_signature_runner(name)) for name in found.get_signature_list()}
        except (ValueError, RuntimeError) as error:
            raise InputError(f"LiteRT cannot load {path.name}: {str(error).splitlines()[0]}") from error
        if any(operator["op_name"] == "ethos-u" for operator in operators):
            raise InputError(
                f"{path.name} is compiled for an Ethos-U and runs there only; run the model.tflite beside it"
            )
        if not self.entries:
            raise InputError(f"{path.name} names no signature; give the model.tflite of an export")
        self.rows = _rows(found, operators)
        del found
        self.flowing = _flowing(self.entries, path.name)
        self._model = _compiled(path, threads)
        self._buffers: dict[str, Any] = {}

    def call(self, name: str) -> Call:
        """The signature ``name``, ready to be run."""
        return Call(self, self._model, name, self._buffers)


class Call:
    """One signature with the memory of its inputs and outputs.

    What is an output of one signature and an input of another, or of the same (a KV cache), lies in one place, which
    all calls of the file share: it is never copied.
    """

    def __init__(self, file: LiteFile, model: Any, name: str, shared: dict[str, Any]) -> None:
        self.name, self.entry = name, file.entries[name]
        self._file, self._model = file, model
        self._index = model.get_signature_index(name)
        listed = model.get_signature_list()[name]

        def buffer(port: str, ports: Mapping[str, Port], create: Callable[[str, str], Any]) -> Any:
            if port not in file.flowing:
                return create(name, port)
            if port not in shared:
                shared[port] = create(name, port)
                shared[port].write(np.zeros(ports[port].shape, ports[port].dtype))
            return shared[port]

        inputs, outputs = self.entry.inputs, self.entry.outputs
        self._inputs = {port: buffer(port, inputs, model.create_input_buffer_by_name) for port in listed["inputs"]}
        self._outputs = {port: buffer(port, outputs, model.create_output_buffer_by_name) for port in listed["outputs"]}
        self._arguments = list(self._inputs.values()), list(self._outputs.values())

    def set(self, **inputs: NDArray[Any]) -> None:
        """Set inputs; each keeps its value until it is set again."""
        for name, values in inputs.items():
            self._inputs[name].write(self.entry.inputs[name].stored(values))

    def run(self, **inputs: NDArray[Any]) -> None:
        """Set inputs and run."""
        self.set(**inputs)
        if self._file.watch is not None:
            self._file.watch(self.name, {name: self.value(name) for name in self._inputs})
        self._model.run_by_index(self._index, *self._arguments)

    def value(self, name: str) -> NDArray[Any]:
        """An input as it is stored; a copy."""
        return _read(self._inputs[name], self.entry.inputs[name])

    def floats(self, name: str) -> NDArray[np.float32]:
        """An output, dequantized where it is quantized; a copy."""
        port = self.entry.outputs[name]
        return port.floats(_read(self._outputs[name], port))


def _flowing(entries: Mapping[str, Entry], name: str) -> frozenset[str]:
    """What one signature gives and one takes.

    Raises:
        InputError: they do not mean the same by it.
    """
    given = {port.name: port for entry in entries.values() for port in entry.outputs.values()}
    for port in (port for entry in entries.values() for port in entry.inputs.values() if port.name in given):
        if port.meaning != given[port.name].meaning:
            raise InputError(f"{name} gives {port.name} in another form than it takes it; export the model anew")
    return frozenset(given) & {port for entry in entries.values() for port in entry.inputs}


def _read(buffer: Any, port: Port) -> NDArray[Any]:
    return buffer.read(int(np.prod(port.shape)), port.dtype.type).reshape(port.shape)


def _compiled(path: Path, threads: int) -> Any:
    from ai_edge_litert.compiled_model import CompiledModel, CpuOptions, HardwareAccelerator, Options

    options = Options(
        hardware_accelerators=HardwareAccelerator.CPU,
        cpu_options=CpuOptions(num_threads=threads, xnnpack_weight_cache_path=_SHARED),
    )
    try:
        return CompiledModel.from_file(str(path), options=options)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"LiteRT cannot load {path.name}: {str(error).splitlines()[0]}") from error


def _entry(runner: Any) -> Entry:
    return Entry(
        {name: _port(name, detail) for name, detail in runner.get_input_details().items()},
        {name: _port(name, detail) for name, detail in runner.get_output_details().items()},
    )


def _port(name: str, detail: Mapping[str, Any]) -> Port:
    shape = tuple(int(size) for size in detail["shape"])
    parameters = detail["quantization_parameters"]
    scale, zero = (np.asarray(parameters[key], np.float32) for key in ("scales", "zero_points"))
    if not len(scale):
        return Port(name, shape, np.dtype(detail["dtype"]), None, None)
    if len(scale) > 1:
        spread = [1] * len(shape)
        spread[parameters["quantized_dimension"]] = len(scale)
        scale, zero = scale.reshape(spread), zero.reshape(spread)
    return Port(name, shape, np.dtype(detail["dtype"]), scale, zero)


def _rows(interpreter: Any, operators: list[dict[str, Any]]) -> int | None:
    """Rows of the table in which the ids of the main signature are looked up; None where the graph does not show it."""
    reached = {detail["index"] for detail in interpreter.get_input_details() if "input_ids" in detail["name"]}
    shapes = {detail["index"]: detail["shape"] for detail in interpreter.get_tensor_details()}
    for operator in operators:
        inputs = [int(index) for index in operator["inputs"]]
        if not reached & set(inputs):
            continue
        if operator["op_name"] in ("EMBEDDING_LOOKUP", "GATHER"):
            table = next(index for index in inputs if index not in reached)
            return int(shapes[table][0])
        if operator["op_name"] in ("RESHAPE", "CAST"):
            reached.update(int(index) for index in operator["outputs"])
    return None
