"""What is in an exported file, counted from the file itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tasks.context import StepError
from tasks.export import graph
from tasks.export.names import FILE


@dataclass(frozen=True)
class Written:
    """What was quantised and what was left, operator by operator. Operators that handle only ids and indices count as
    neither.

    Args:
        kinds: the operators of all signatures.
        quantized, floating: how many of them are quantised, and how many compute with floats.
        touched: names of those whose weights were quantised; an operator of several signatures is named once.
        left: what was left, each with the reason.
        doubled: bytes of tables that are stored for the lookup and once more for a matrix product of the same shape.
    """

    kinds: Counter[str]
    quantized: int
    floating: int
    touched: tuple[str, ...]
    left: dict[str, str]
    doubled: int


def read_back(path: Path, precision: str, unfit: Mapping[str, str], vocabulary: int) -> Written:
    """Count what is in the file ``path``.

    Args:
        path: the file.
        precision: of the spec.
        unfit: what could not be quantised as wanted, with the reasons.
        vocabulary: rows of the tables of embeddings.
    """
    operators = [operator for part in graph.list_by_signature(path).values() for operator in part]
    static = precision == "int8"
    touched: dict[str, None] = {}
    bare: Counter[str] = Counter()
    left = dict(unfit)
    quantized = floating = 0
    for operator in operators:
        tensors = (*operator.inputs, *operator.outputs)
        weights = operator.weights
        name = f"{operator.kind} {operator.where}".strip()
        is_float = any(tensor.is_float for tensor in tensors)
        done = not is_float if static else any(weight.is_quantized for weight in weights)
        if not is_float and not any(tensor.is_quantized for tensor in tensors):
            continue
        quantized += done
        floating += not done
        if done and weights:
            touched[name] = None
        elif not done and weights and any(weight.is_float for weight in weights):
            kept = sum(weight.bytes for weight in weights if weight.is_float)
            left[name] = f"{kept} bytes stay float32: no rule quantises the constants of {operator.kind}"
        elif not done:
            bare[operator.kind] += 1
    kinds = Counter(operator.kind for operator in operators)
    if precision == "float32":
        return Written(kinds, 0, floating, (FILE,), {}, 0)
    if bare:
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(bare.items()))
        reason = "no int8 rule for them" if static else "activations stay float in the file"
        left[f"{bare.total()} operators without weights"] = f"{reason}: {listed}"
    return Written(kinds, quantized, floating, tuple(touched), left, _doubled(operators, vocabulary))


def _doubled(operators: list[graph.Operator], vocabulary: int) -> int:
    tables = {op.weights[0] for op in operators if op.kind in graph.LOOKUPS and op.weights}
    tables = {table for table in tables if table.shape[0] == vocabulary}
    products = {op.weights[0] for op in operators if op.kind == "FULLY_CONNECTED" and op.weights}
    shared = {product.buffer for product in products}
    twins = {
        table.buffer: table.bytes
        for table in tables
        if table.buffer not in shared and any(product.shape == table.shape for product in products)
    }
    return sum(twins.values())


def check_written(path: Path, written: Written, precision: str, float_size: int, tied: bool) -> list[str]:
    """The warnings that the file gives cause for.

    Raises:
        StepError: nothing was quantised, or the file is no smaller than the float one.
    """
    if precision == "float32":
        return []
    size = path.stat().st_size
    if not written.quantized:
        raise StepError(f"{precision} quantised none of {written.floating} operators; use precision: float32")
    if size >= float_size:
        raise StepError(
            f"the {precision} file has {size} bytes and the float32 file {float_size}: this model is too small to "
            "gain from it; use precision: float32"
        )
    if tied and written.doubled:
        return [
            f"the embedding is tied to the output layer and stored twice ({written.doubled} bytes more): the lookup "
            "has one scale for the table, the output layer one a row"
        ]
    return []
