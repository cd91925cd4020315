"""A float ONNX graph to one with int8 weights, whose activations are quantized as they come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tasks.context import StepError

LEAST = 1024
"""Elements below which a weight stays float: its bytes are few, and its error would count for much."""

Kind = Literal["product", "lookup"]


@dataclass(frozen=True)
class Change:
    """A node that takes an int8 weight.

    Args:
        node: its name.
        kind: a product of activations with a weight, or a lookup in a table.
        weight: the name of the constant.
        rows: whether the constant's rows have the scales: it is a table, or is stored as [outputs, inputs].
        table: the transposed table that a product reads, by the name that the product has for it; else empty.
    """

    node: str
    kind: Kind
    weight: str
    rows: bool
    table: str = ""


@dataclass(frozen=True)
class Plan:
    """What becomes int8, the largest magnitude of each int8 weight, and what stays, each with the reason."""

    changes: tuple[Change, ...]
    limits: Mapping[str, int]
    left: Mapping[str, str]


def plan(model: Any, reduce_range: bool) -> Plan:
    """What of a float graph becomes int8: products with a constant matrix, and lookups in a table.

    Args:
        model: an ``onnx.ModelProto`` whose nodes have names.
        reduce_range: give the weights of products 7 bits, -64 to 64. Without VNNI an x86 CPU adds two products of 8
            bits in 16, which overflow; with 7 they cannot: 2 * 255 * 64 < 2**15.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    turned = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Transpose"}
    tables = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    changes: list[Change] = []
    left: dict[str, str] = {}
    for node in model.graph.node:
        place = 0 if node.op_type == "Gather" else 1
        if node.op_type not in ("MatMul", "Gemm", "Gather", "Conv") or len(node.input) <= place:
            continue
        given = node.input[place]
        weight = turned.get(given, given)
        tensor = constants.get(weight)
        if tensor is None or tensor.data_type != 1:  # float32
            continue
        size = int(np.prod(tensor.dims))
        reason = _unfit(node, tensor, size)
        if reason:
            left[node.name] = f"{4 * size} bytes stay float32: {reason}"
        elif node.op_type == "Gather":
            changes.append(Change(node.name, "lookup", weight, True))
        else:
            flipped = weight != given or any(one.name == "transB" and one.i for one in node.attribute)
            if weight in tables and not flipped:
                left[node.name] = f"{4 * size} bytes stay float32: the table's rows are not this product's outputs"
                continue
            changes.append(Change(node.name, "product", weight, flipped, given if weight != given else ""))
    products = {change.weight for change in changes if change.kind == "product"}
    limits = {change.weight: 64 if reduce_range and change.weight in products else 127 for change in changes}
    return Plan(tuple(changes), limits, left)


def _unfit(node: Any, tensor: Any, size: int) -> str:
    if node.op_type == "Conv":
        return "ONNX Runtime has no fast convolution with ranges that are found as it runs"
    if len(tensor.dims) != 2:
        return "it is no matrix"
    if size < LEAST:
        return f"fewer than {LEAST} weights gain nothing"
    attributes = {one.name: one for one in node.attribute}
    if node.op_type == "Gather" and "axis" in attributes and attributes["axis"].i != 0:
        return "it is not looked up by rows"
    scaled = any(attributes[name].f != 1 for name in ("alpha", "beta") if name in attributes)
    if node.op_type == "Gemm" and (scaled or ("transA" in attributes and attributes["transA"].i)):
        return "the product is scaled or transposed"
    return ""


def quantize_rows(weight: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Int8 [rows, columns] and float scales [rows, 1]: each row's largest magnitude is ``limit``.

    Raises:
        StepError: a weight is not finite.
    """
    if not np.isfinite(weight).all():
        raise StepError("a weight is NaN or infinite; train again with a smaller learning_rate")
    scale = np.maximum(np.abs(weight).max(1, keepdims=True) / np.float32(limit), np.finfo(np.float32).tiny)
    return np.clip(np.rint(weight / scale), -limit, limit).astype(np.int8), scale.astype(np.float32)


def apply(model: Any, planned: Plan) -> None:
    """Carry out the plan on ``model``.

    A product becomes what ONNX Runtime fuses into one kernel: ``DynamicQuantizeLinear``, ``MatMulInteger``, ``Cast``,
    ``Mul`` by both scales. A lookup takes the rows and their scales and multiplies. A table that is looked up and
    multiplied by is stored once.
    """
    from onnx import numpy_helper

    graph = model.graph
    changes = {change.node: change for change in planned.changes}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    made: dict[str, Any] = {}
    tables = {change.weight for change in planned.changes if change.kind == "lookup" or change.table}
    shared = {change.weight for change in planned.changes if change.kind == "product"} & tables
    for change in planned.changes:
        if _packed(change.weight) in made:
            continue
        values = numpy_helper.to_array(constants[change.weight])
        by_rows = values if change.rows or change.weight in tables else values.T
        packed, scale = quantize_rows(by_rows, planned.limits[change.weight])
        if change.weight not in tables:  # a product takes [inputs, outputs]
            packed, scale = np.ascontiguousarray(packed.T), scale[:, 0]
        for name, array in ((_packed(change.weight), packed), (_scale(change.weight), scale)):
            made[name] = numpy_helper.from_array(array, name)
    nodes: list[Any] = []
    for weight in sorted(shared):
        nodes += _turned(weight, made)
    ranges: dict[str, str] = {}
    turned = {change.table for change in planned.changes if change.table}
    for node in graph.node:
        if node.op_type == "Transpose" and node.output[0] in turned:
            continue
        change = changes.get(node.name)
        if change is None:
            nodes.append(node)
        elif change.kind == "lookup":
            nodes += _lookup(node, change)
        else:
            nodes += _product(node, change.weight, "_turned" if change.weight in shared else "", ranges)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for name, tensor in constants.items() if name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(sorted([*kept, *made.values()], key=lambda tensor: tensor.name))


def _packed(weight: str) -> str:
    return f"{weight}_int8"


def _scale(weight: str) -> str:
    return f"{weight}_scale"


def _turned(weight: str, made: dict[str, Any]) -> Sequence[Any]:
    """What a product takes of a table: ONNX Runtime computes it once, when it loads the file."""
    from onnx import helper, numpy_helper

    packed, scale = _packed(weight), _scale(weight)
    made["one_row"] = numpy_helper.from_array(np.array([-1], np.int64), "one_row")
    return (
        helper.make_node("Transpose", [packed], [f"{packed}_turned"], name=f"Transpose {packed}", perm=[1, 0]),
        helper.make_node("Reshape", [scale, "one_row"], [f"{scale}_turned"], name=f"Reshape {scale}"),
    )


def _lookup(node: Any, change: Change) -> Sequence[Any]:
    from onnx import TensorProto, helper

    out, ids = node.output[0], node.input[1]
    rows, scales, floats = (f"{out}_{part}" for part in ("rows", "scales", "floats"))
    return (
        helper.make_node("Gather", [_packed(change.weight), ids], [rows], name=node.name),
        helper.make_node("Gather", [_scale(change.weight), ids], [scales], name=f"{node.name} scales"),
        helper.make_node("Cast", [rows], [floats], name=f"{node.name} cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [floats, scales], [out], name=f"{node.name} scaled"),
    )


def _product(node: Any, constant: str, behind: str, ranges: dict[str, str]) -> Sequence[Any]:
    from onnx import TensorProto, helper

    given, out = node.input[0], node.output[0]
    weight, scale = _packed(constant) + behind, _scale(constant) + behind
    nodes = []
    if given not in ranges:
        ranges[given] = f"{given}_uint8"
        parts = [f"{given}_{part}" for part in ("uint8", "range", "zero")]
        nodes.append(helper.make_node("DynamicQuantizeLinear", [given], parts, name=f"DynamicQuantizeLinear {given}"))
    whole, floats, factor = (f"{out}_{part}" for part in ("int32", "floats", "factor"))
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    product = f"{out}_product" if bias else out
    nodes += [
        helper.make_node("MatMulInteger", [f"{given}_uint8", weight, f"{given}_zero"], [whole], name=node.name),
        helper.make_node("Cast", [whole], [floats], name=f"{node.name} cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{given}_range", scale], [factor], name=f"{node.name} factor"),
        helper.make_node("Mul", [floats, factor], [product], name=f"{node.name} scaled"),
    ]
    if bias:
        nodes.append(helper.make_node("Add", [product, bias], [out], name=f"{node.name} bias"))
    return nodes
