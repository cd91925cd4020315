"""A torch module to an ONNX graph of free shape, by torch's own exporter."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tasks.context import StepError
from tasks.export.names import ONNX_WEIGHTS
from tasks.export.onnx_graphs import Graph

OPSET = 20

LARGEST = 1_900_000_000
"""Bytes of a graph with its weights: a protobuf message ends at 2 GB."""

_SCOPES = "pkg.torch.onnx.name_scopes"

_SMALL = 256
"""Elements below which a constant is not worth sharing."""


def to_onnx(graph: Graph) -> Any:
    """The graph as an ``onnx.ModelProto`` in float32.

    What the exporter says of the source (paths, stack traces) is left out, so that two exports give the same bytes. A
    weight is stored once: the output layer of a tied model reads the table of the embedding. The sum before a norm is
    written as ``Sum``: ONNX Runtime would fuse an ``Add`` with the norm, into a kernel that takes six times as long
    as the norm on one thread (measured, 1.32, AVX2).

    Raises:
        StepError: the exporter cannot convert the model.
    """
    import torch

    dynamic = torch.export.Dim.DYNAMIC
    sizes = {name: dict.fromkeys(graph.free.get(name, {}), dynamic) for name in graph.inputs}
    try:
        with torch.no_grad(), _quietly():
            program: Any = torch.onnx.export(
                graph.module.eval(),
                (),
                kwargs={"inputs": dict(graph.inputs)},
                dynamic_shapes={"inputs": sizes},
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except StepError:
        raise
    except Exception as error:  # the exporter raises whatever its many passes meet
        cause = error.__cause__ or error
        lines = [line for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
        raise StepError(
            f"torch cannot convert this model to ONNX: {lines[0][:300]}; use another architecture, or export_tflite"
        ) from error
    model: Any = program.model_proto
    _tidy(model, graph)
    _share(model)
    _keep_norms(model)
    return model


@contextlib.contextmanager
def _quietly() -> Any:
    """The exporter logs and warns about itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _tidy(model: Any, graph: Graph) -> None:
    """Name nodes by the modules that they come from and free sizes by ``graph``; leave out what the exporter tells."""
    seen: Counter[str] = Counter()
    for node in model.graph.node:
        told = {entry.key: entry.value for entry in node.metadata_props}
        scopes = json.loads(told.get(_SCOPES, "[]").replace("'", '"')) if _SCOPES in told else []
        place = scopes[-2] if len(scopes) > 1 else ""
        name = f"{node.op_type} {place.removeprefix('model.')}".strip()
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name} {seen[name]}"
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.value_info[:], model.graph.metadata_props[:], model.metadata_props[:]
    model.graph.name, model.graph.doc_string, model.doc_string = "lathe", "", ""
    for port in (*model.graph.input, *model.graph.output):
        del port.metadata_props[:]
        port.doc_string = ""
        for axis, name in graph.free.get(port.name, {}).items():
            port.type.tensor_type.shape.dim[axis].dim_param = name
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]
        tensor.doc_string = ""


def _share(model: Any) -> None:
    """Store equal weights once; a matrix that is a table of a lookup, transposed, is read from the table."""
    from onnx import helper, numpy_helper

    graph = model.graph
    tables = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    first: dict[tuple[Any, ...], str] = {}
    renamed: dict[str, str] = {}
    turned: list[Any] = []
    kept = []
    # Tables first, so that what equals one is found.
    for tensor in sorted(graph.initializer, key=lambda tensor: tensor.name not in tables):
        if np.prod(tensor.dims) < _SMALL:
            kept.append(tensor)
            continue
        values = numpy_helper.to_array(tensor)
        same = first.setdefault(_mark(values), tensor.name)
        if same != tensor.name:
            renamed[tensor.name] = same
            continue
        table = first.get(_mark(np.ascontiguousarray(values.T))) if values.ndim == 2 else None
        if table in tables and table != tensor.name:
            name = f"Transpose {table}"
            turned.append(helper.make_node("Transpose", [table], [tensor.name], name=name, perm=[1, 0]))  # type: ignore
            continue
        kept.append(tensor)
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
    nodes = [*turned, *graph.node]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(sorted(kept, key=lambda tensor: tensor.name))


def _mark(values: np.ndarray) -> tuple[Any, ...]:
    return values.shape, str(values.dtype), hashlib.sha256(values.tobytes()).digest()


def _keep_norms(model: Any) -> None:
    norms = {node.input[0] for node in model.graph.node if node.op_type == "LayerNormalization"}
    for node in model.graph.node:
        if node.op_type == "Add" and node.output[0] in norms:
            node.op_type = "Sum"


def save(models: Mapping[str, Any], folder: Path) -> None:
    """Write graphs by the names of their files; several have their weights in one file beside them, each once.

    Raises:
        StepError: a graph is larger than a file can be.
    """
    import onnx

    for model in models.values():
        if model.ByteSize() > LARGEST:
            raise StepError(
                f"the graph has {model.ByteSize() / 1e9:.1f} GB and an ONNX file holds 2; use a smaller model"
            )
        onnx.checker.check_model(model)
    written = models if len(models) == 1 else _with_shared_weights(models, folder / ONNX_WEIGHTS)
    for name, model in written.items():
        (folder / name).write_bytes(model.SerializeToString(deterministic=True))


def _with_shared_weights(models: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Copies of the graphs whose weights lie in the file ``path``, each once."""
    from onnx import ModelProto, TensorProto

    places: dict[bytes, tuple[int, int]] = {}
    copies: dict[str, Any] = {}
    with path.open("wb") as file:
        for name, model in models.items():
            copies[name] = ModelProto()
            copies[name].CopyFrom(model)
            for tensor in copies[name].graph.initializer:
                if len(tensor.raw_data) < 4 * _SMALL:
                    continue
                mark = hashlib.sha256(tensor.raw_data).digest()
                if mark not in places:
                    file.write(bytes(-file.tell() % 64))
                    places[mark] = (file.tell(), len(tensor.raw_data))
                    file.write(tensor.raw_data)
                tensor.ClearField("raw_data")
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in zip(("location", "offset", "length"), (path.name, *places[mark]), strict=True):
                    tensor.external_data.add(key=key, value=str(value))
    return copies
