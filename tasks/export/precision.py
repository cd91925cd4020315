"""A float LiteRT file to a quantised one, by ai-edge-quantizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tasks.context import StepError
from tasks.export import graph

WITH_BLOCKS = ("FULLY_CONNECTED", "EMBEDDING_LOOKUP")
"""The operations whose weights ai-edge-quantizer stores as blocks of int4."""

_CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D")

_REACH = 16.0
"""What a norm multiplies by in int8: from the least that was seen to so many times that. A stretch of silence would
else take the whole range, and leave speech one or two steps of it."""

_AFTER_LOOKUP = ("RESHAPE", "TRANSPOSE", "BROADCAST_TO", "SLICE", "EXPAND_DIMS")
"""Operations that move the looked-up mask without changing its values."""

_CHUNK = 16
"""Calibration samples between two reports of progress."""

Batch = Mapping[str, np.ndarray]

Calibration = Mapping[str, Sequence[Batch]]
"""Signature to inputs of it."""


def weights_only(source: Path, out: Path, block: int | None) -> dict[str, str]:
    """Store the weights as int8 with one scale a row (``block`` None), or as int4 with one scale for every ``block``
    inputs of a row. Activations stay float in the file; the kernels quantize them as they come.

    Returns:
        The operators whose weights cannot be cut into blocks and are stored as int8, each with the reason.

    Raises:
        StepError: no weight can be cut into blocks of that size.
    """
    from ai_edge_quantizer import qtyping, recipe_manager

    recipe = recipe_manager.RecipeManager()
    everything = qtyping.TFLOperationName.ALL_SUPPORTED
    if block is None:
        recipe.add_dynamic_config(".*", everything, num_bits=8)
        _quantize(source, out, recipe.get_quantization_recipe(), None)
        return {}
    recipe.add_dynamic_config(".*", everything, num_bits=4, granularity=qtyping.QuantGranularity(f"BLOCKWISE_{block}"))
    operators = [operator for part in graph.list_by_signature(source).values() for operator in part]
    floats = [operator for operator in operators if any(weight.is_float for weight in operator.weights)]
    weighted = [operator for operator in floats if operator.kind in WITH_BLOCKS]
    unfit = [operator for operator in weighted if operator.weights[0].shape[-1] % block]
    if len(unfit) == len(weighted):
        sizes = sorted({operator.weights[0].shape[-1] for operator in weighted})
        raise StepError(
            f"no weight has inputs that divide into blocks of {block} (they have {', '.join(map(str, sizes))}); use "
            "precision: int8-dynamic or a smaller block"
        )
    for kind in _CONVOLUTIONS:
        recipe.add_dynamic_config(".*", qtyping.TFLOperationName(kind), num_bits=8)
    for operator in unfit:
        recipe.add_dynamic_config(f"^{re.escape(operator.scope)}", qtyping.TFLOperationName(operator.kind), num_bits=8)
    _quantize(source, out, recipe.get_quantization_recipe(), None)
    _mend_empty_blocks(out)
    left = {
        operator: "no kernel takes blocks of a convolution" for operator in floats if operator.kind in _CONVOLUTIONS
    }
    left |= {operator: f"{operator.weights[0].shape[-1]} inputs do not divide by {block}" for operator in unfit}
    return {f"{operator.kind} {operator.where}": f"int8: {reason}" for operator, reason in left.items()}


def _mend_empty_blocks(path: Path) -> None:
    """Give blocks of zeros, as pruning leaves them, a scale: the quantizer writes 0, which LiteRT refuses to load."""
    model = graph.read(path)
    mended = False
    for part in model.subgraphs:
        for tensor in part.tensors:
            details = tensor.quantization and tensor.quantization.details
            if not hasattr(details, "blockSize"):
                continue
            stored = model.buffers[part.tensors[details.scales].buffer]
            scales = np.frombuffer(bytes(stored.data), np.float16).copy()
            empty = scales == 0
            if empty.any():
                values = model.buffers[tensor.buffer]
                packed = np.frombuffer(bytes(values.data), np.uint8).reshape(len(scales), -1).copy()
                packed[empty], scales[empty] = 0, 1
                values.data, stored.data = packed.ravel(), scales.view(np.uint8)
                mended = True
    if mended:
        graph.write(model, path)


def full_int8(source: Path, out: Path, calibration: Calibration, progress: Callable[[int, int], None]) -> float | None:
    """Quantize weights and activations to int8 with ranges taken from ``calibration``.

    A mask of -10,000 would take the whole range of an int8 score, so that all real scores became equal. The mask is
    therefore set to the smallest value that still makes a masked probability round to zero (see ``_mask_value``), and
    the ranges of masked scores are derived from it rather than observed.

    What one signature gives and another takes (a cache) gets one range. A norm's factor gets a bounded one, see
    ``_REACH``.

    Args:
        source: the float file with the mask looked up; it is changed.
        out: the quantised file.
        calibration: inputs of every signature.
        progress: is told batches done and batches in all.

    Returns:
        The value that masked scores are lowered by; None where the model masks nothing.

    Raises:
        StepError: the float file shows no place where the mask is added to attention scores.
    """
    from ai_edge_quantizer import calibrator, quantizer, recipe

    model = graph.read(source)
    masks = {name: _find_mask(model, at) for name, at in graph.signatures(model).items()}
    tables = [mask.table for mask in masks.values() if mask.table is not None]
    value = None
    if tables:
        value = max(_mask_value(source, name, mask, calibration[name][:_CHUNK]) for name, mask in masks.items())
        for table in tables:
            graph.set_constant(model, table, np.array([[-value], [0.0]], np.float32))
    graph.lookups_to_gathers(model)
    _name_once(model)
    graph.write(model, source)

    static = recipe.static_wi8_ai8()
    # The other mode hands every tensor to Python and gives the same ranges five to nine times slower.
    in_cpp = calibrator.CalibrationMode.CALIBRATION_PROFILER_BASED
    total, done = sum(len(batches) for batches in calibration.values()), 0
    ranges: Any = None
    for name, batches in calibration.items():
        for start in range(0, len(batches), _CHUNK):
            chunk = [dict(batch) for batch in batches[start : start + _CHUNK]]
            ranges = quantizer.Quantizer(str(source), static).calibrate(
                {name: chunk}, previous_calibration_result=ranges, num_threads=1, mode=in_cpp
            )
            done += len(chunk)
            progress(done, total)
    for mask in (_find_mask(model, at) for at in graph.signatures(model).values()):
        for name in mask.biases:
            _set_range(ranges, name, -(value or 0.0), 0.0)
        for scores, sum_ in mask.additions:
            low, high = (float(np.min(ranges[scores]["min"])), float(np.max(ranges[scores]["max"])))
            _set_range(ranges, sum_, low - (value or 0.0), high)
    for name in _inverse_deviations(model):
        low, high = (float(reach(ranges[name][key])) for reach, key in _ENDS)
        _set_range(ranges, name, low, min(high, _REACH * low))
    for names in _flows(model):
        low, high = (float(reach([reach(ranges[name][key]) for name in names])) for reach, key in _ENDS)
        for name in names:
            _set_range(ranges, name, low, high)
    _quantize(source, out, static, ranges)
    return value


_ENDS = ((np.min, "min"), (np.max, "max"))


def _inverse_deviations(model: Any) -> list[str]:
    """What norms multiply by."""
    every = range(len(model.subgraphs))
    return [
        operator.outputs[0].name
        for subgraph in every
        for operator, _ in graph.operators(model, subgraph)
        if operator.kind == "RSQRT"
    ]


@dataclass(frozen=True)
class _Mask:
    """Where the mask is in a graph: its table, the tensors made from it, and wherever it is added the names of (scores,
    sum) and the indices of (scores, bias)."""

    table: graph.Tensor | None
    biases: tuple[str, ...]
    additions: tuple[tuple[str, str], ...]
    sums: tuple[tuple[int, int], ...]


def _find_mask(model: Any, subgraph: int) -> _Mask:
    table: graph.Tensor | None = None
    biases: dict[int, str] = {}
    additions: list[tuple[str, str]] = []
    sums: list[tuple[int, int]] = []
    for operator, _ in graph.operators(model, subgraph):
        indices = {tensor.index for tensor in operator.inputs}
        output = operator.outputs[0]
        if operator.kind in graph.LOOKUPS:
            constants = [tensor for tensor in operator.inputs if tensor.bytes and tensor.shape == (2, 1)]
            if constants and graph.constant(model, constants[0])[0, 0] < 0:
                table = constants[0]
                biases[output.index] = output.name
        elif operator.kind in _AFTER_LOOKUP and indices & biases.keys():
            biases[output.index] = output.name
        elif operator.kind == "ADD" and indices & biases.keys():
            added = next((tensor for tensor in operator.inputs if tensor.index not in biases), None)
            if added is not None:
                additions.append((added.name, output.name))
                sums.append((added.index, next(iter(indices & biases.keys()))))
    if table is not None and not additions:
        raise StepError(
            "the mask is added to no attention scores in the converted graph, so int8 cannot honour it; use "
            "precision: int8-dynamic"
        )
    return _Mask(table, tuple(biases.values()), tuple(additions), tuple(sums))


def _mask_value(source: Path, name: str, mask: _Mask, batches: Sequence[Batch]) -> float:
    """By how much a score has to be lowered so that its probability rounds to 0 in int8, at most 1/512 = e^-6.2.

    Seen on ``batches``: the largest gap between any score of a layer and the best allowed score of a row of it, plus 8.
    A row of padding, whose own score is masked, does not count.
    """
    from ai_edge_litert.interpreter import Interpreter

    interpreter: Any = Interpreter(str(source), num_threads=1, experimental_preserve_all_tensors=True)
    run = interpreter.get_signature_runner(name)
    gap = 0.0
    for batch in batches:
        run(**batch)
        for scores_at, bias_at in mask.sums:
            scores, bias = (np.asarray(interpreter.get_tensor(at, run._subgraph_index)) for at in (scores_at, bias_at))
            scores = scores.reshape(len(scores) // len(bias), *scores.shape[1:]) if scores.ndim == 3 else scores
            allowed = np.broadcast_to(bias.reshape(bias.shape[-4:]) >= 0, scores.shape)
            best = np.where(allowed, scores, -np.inf).max(-1)
            if scores.shape[-1] == scores.shape[-2]:
                best = np.where(np.diagonal(allowed, axis1=-2, axis2=-1), best, np.inf)
            gap = max(gap, float(scores.max() - best[best > -np.inf].min(initial=scores.max())))
    return float(np.ceil(min(gap, 100.0) + 8.0))


def _flows(model: Any) -> list[set[str]]:
    """The tensors of every signature that stand for one state: outputs and inputs of one name."""
    found: dict[str, set[str]] = {}
    for entry in model.signatureDefs:
        tensors = model.subgraphs[entry.subgraphIndex].tensors
        for port in (*entry.inputs, *entry.outputs):
            found.setdefault(port.name.decode(), set()).add(tensors[port.tensorIndex].name.decode())
    outputs = {port.name.decode() for entry in model.signatureDefs for port in entry.outputs}
    inputs = {port.name.decode() for entry in model.signatureDefs for port in entry.inputs}
    return [found[name] for name in sorted(outputs & inputs)]


def _name_once(model: Any) -> None:
    """Give every tensor a name of its own, as the quantizer wants it."""
    seen: set[bytes] = set()
    for number, part in enumerate(model.subgraphs):
        for index, tensor in enumerate(part.tensors):
            if tensor.name in seen:
                tensor.name = tensor.name + f";{number}.{index}".encode()
            seen.add(tensor.name)


def _set_range(ranges: dict[str, Any], name: str, low: float, high: float) -> None:
    ranges[name] = {key: np.full_like(ranges[name][key], value) for key, value in (("min", low), ("max", high))}


def _quantize(source: Path, out: Path, recipe: Any, ranges: Any) -> None:
    from ai_edge_quantizer import quantizer

    try:
        result = quantizer.Quantizer(str(source), recipe).quantize(
            ranges, enable_progress_bar=False, enable_progress_report=False
        )
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise StepError(
            f"ai-edge-quantizer cannot quantise this graph: {str(error).splitlines()[0][:300]}; "
            "another precision may do"
        ) from error
    if result.quantized_model is None:
        raise StepError("ai-edge-quantizer gave no model back; another precision may do")
    out.write_bytes(result.quantized_model)
