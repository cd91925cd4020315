"""Reading and changing LiteRT files: operators, constants, and the few rewrites that the export needs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

LOOKUPS = ("EMBEDDING_LOOKUP", "GATHER")


@dataclass(frozen=True)
class Tensor:
    """An operand. ``bytes`` is 0 unless it is a constant; constants with one ``buffer`` are stored once."""

    index: int
    buffer: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith("float")

    @property
    def is_quantized(self) -> bool:
        return self.dtype in ("int2", "int4", "int8", "int16", "uint8")


@dataclass(frozen=True)
class Operator:
    """A node of the graph. ``kind`` is LiteRT's name of the operation, or the custom code (``ethos-u``)."""

    kind: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The constants with more than one dimension: what quantization of weights applies to."""
        return tuple(tensor for tensor in self.inputs if tensor.bytes and len(tensor.shape) > 1)

    @property
    def scope(self) -> str:
        """The names of the outputs, each followed by a semicolon: what a recipe's pattern is matched on."""
        return "".join(f"{tensor.name};" for tensor in self.outputs)

    @property
    def where(self) -> str:
        """The module of the torch model that the operator comes from, dotted; empty where the file does not say."""
        return module_of(self.outputs[0].name) if self.outputs else ""


def module_of(name: str) -> str:
    """``…GPT2Model_transformer/…GPT2Block_0/…Conv1D_c_proj;3`` to ``transformer.0.c_proj``.

    The name of a fused operator holds the paths of all it was fused from; the deepest says most. A name that
    ``shorten_names`` gave is its module's already.
    """
    if "/" not in name:
        return name.partition(";")[0]
    path = max((part.split("/")[1:] for part in name.split(";")), key=len)
    found = [re.match(r"[A-Za-z0-9]+_(.+)$", part.rsplit(".", 1)[-1]) for part in path]
    return ".".join(match[1] for match in found if match).removeprefix("model.")


def read(path: Path) -> Any:
    """The file as the schema's object tree, which may be changed and written."""
    from ai_edge_litert.tools import flatbuffer_utils

    return flatbuffer_utils.read_model(str(path))


def write(model: Any, path: Path) -> None:
    """Write the object tree."""
    from ai_edge_litert.tools import flatbuffer_utils

    flatbuffer_utils.write_model(model, str(path))


def shorten_names(path: Path) -> None:
    """Name every tensor by its module and its number alone. The converter names it after the whole path of classes, and
    a fused one after all it was fused from: some hundred bytes a tensor, once a signature."""
    model = read(path)
    for subgraph in model.subgraphs:
        for index, tensor in enumerate(subgraph.tensors):
            tensor.name = f"{module_of(tensor.name.decode())};{index}".encode()
    write(model, path)


def signatures(model: Any) -> dict[str, int]:
    """The names of the file's signatures, each with the number of its graph; an NPU's file may name none."""
    return {entry.signatureKey.decode(): entry.subgraphIndex for entry in model.signatureDefs or ()}


def operators(model: Any, subgraph: int = 0) -> Iterator[tuple[Operator, Any]]:
    """Every operator of a graph in order of execution, with the schema's object that it was read from."""
    from ai_edge_litert import schema_py_generated as schema

    dtypes = {value: name.lower() for name, value in vars(schema.TensorType).items() if not name.startswith("_")}
    kinds = {value: name for name, value in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    graph = model.subgraphs[subgraph]

    def tensor(index: int) -> Tensor:
        stored = graph.tensors[index]
        data = model.buffers[stored.buffer].data
        shape = () if stored.shape is None else tuple(int(size) for size in stored.shape)
        size = 0 if data is None else len(data)
        return Tensor(index, stored.buffer, stored.name.decode(), shape, dtypes[stored.type], size)

    def kind(code: Any) -> str:
        builtin = kinds[max(code.builtinCode, code.deprecatedBuiltinCode)]
        return code.customCode.decode() if builtin == "CUSTOM" else builtin

    for operator in graph.operators:
        yield (
            Operator(
                kind(model.operatorCodes[operator.opcodeIndex]),
                tuple(tensor(int(index)) for index in operator.inputs if index >= 0),
                tuple(tensor(int(index)) for index in operator.outputs),
            ),
            operator,
        )


def list_operators(path: Path) -> list[Operator]:
    """Every operator of the file's main graph in order of execution."""
    return [operator for operator, _ in operators(read(path))]


def list_by_signature(path: Path) -> dict[str, list[Operator]]:
    """Every operator of each signature in order of execution."""
    model = read(path)
    return {name: [operator for operator, _ in operators(model, at)] for name, at in signatures(model).items()}


def constant(model: Any, tensor: Tensor) -> np.ndarray:
    """The values of a float32 constant; a copy."""
    import numpy as np

    return np.frombuffer(bytes(model.buffers[tensor.buffer].data), "<f4").reshape(tensor.shape)


def set_constant(model: Any, tensor: Tensor, values: np.ndarray) -> None:
    """Replace the values of a float32 constant, in every graph that uses it."""
    import numpy as np

    model.buffers[tensor.buffer].data = np.frombuffer(np.ascontiguousarray(values, "<f4").tobytes(), np.uint8)


def lookups_to_gathers(model: Any) -> int:
    """Turn EMBEDDING_LOOKUP(ids, table) into GATHER(table, ids), which static quantization and the Ethos-U85 know.

    Returns:
        How many were turned.
    """
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    every = [pair for subgraph in range(len(model.subgraphs)) for pair in operators(model, subgraph)]
    found = [(operator, stored) for operator, stored in every if operator.kind == "EMBEDDING_LOOKUP"]
    for _, stored in found:
        ids, table = stored.inputs
        stored.inputs = np.array([table, ids], np.int32)
        stored.builtinOptionsType = schema.BuiltinOptions.GatherOptions
        stored.builtinOptions = schema.GatherOptionsT()
        stored.builtinOptions.axis = 0
        stored.builtinOptions.batchDims = 0
    for index in {stored.opcodeIndex for _, stored in found}:
        code = model.operatorCodes[index]
        code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.GATHER
        code.version = 2  # the first that takes int8
    return len(found)
