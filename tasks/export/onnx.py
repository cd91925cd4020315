"""The step that writes a model as ONNX for ONNX Runtime, quantised where the spec asks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from specs.schema.steps.export import ExportOnnxSpec
from tasks.context import Artifact, StepContext, StepError, StepResult
from tasks.export.attention import PLAIN, use_export_attention
from tasks.export.faithful import check_faithful, kept_config, relative_error
from tasks.export.forms import Wanted, open_form
from tasks.export.names import ONNX_ENCODER, ONNX_FILE, ONNX_WEIGHTS
from tasks.export.onnx_convert import save, to_onnx
from tasks.export.onnx_file import OnnxFile
from tasks.export.onnx_graphs import graphs
from tasks.export.onnx_preflight import check_export, limits
from tasks.export.onnx_quantize import apply, plan
from tasks.export.onnx_written import check_written, read_back
from tasks.export.preflight import target_length
from tasks.export.runtime import open_export
from tasks.registry import step

_FAITHFUL = 1e-3
"""The largest difference between the float file and torch, relative to the largest logit, that passes as rounding."""

_EXAMPLES = 2
"""Training examples that the file is compared with torch on."""


@step(
    ExportOnnxSpec,
    libraries=("torch", "transformers", "onnx", "onnxscript", "onnxruntime"),
    preflight=check_export,
)
def export_onnx(model: Artifact, *, spec: ExportOnnxSpec, ctx: StepContext) -> StepResult:
    """Write ``model`` as ONNX of free batch and length.

    The float file is compared with torch before anything is quantised: on training examples as they are, with half of
    them masked and, where it writes, token by token with its cache.

    Raises:
        StepError: the model cannot be converted or quantised, the file does not compute what the model computes, or it
            did not shrink.
    """
    from tasks.data import encode
    from tasks.models import family_of, load
    from tasks.models.layout import tied_weights
    from tasks.models.load import copy_tokenizer, read_config

    config = read_config(model.path)
    torch_model: Any = load(model.path)
    torch_model.set_attn_implementation("eager")
    family = family_of(config)
    limit = limits(config, ctx.task)
    encoded = encode(ctx.data, "train", ctx.task, model.path, ctx.store)
    length = min(ctx.data.max_length, limit.get("positions", ctx.data.max_length))
    target = target_length(None, ctx.task, ctx.data)
    wanted = Wanted(
        batch=_EXAMPLES,
        length=length,
        cache=length,
        target_length=min(target, limit.get("target_positions", target)),
        duration=None,
        samples=_EXAMPLES,
    )
    form, described, warnings = open_form(model.path, torch_model, encoded, family, wanted, ctx)
    kept = kept_config(config) | limit | described
    floats = ctx.work / "float"
    floats.mkdir()
    for folder in (floats, ctx.out):
        (folder / "config.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")

    ctx.note("converting to ONNX")
    expected = form.reference(torch_model)
    use_export_attention(torch_model, PLAIN)
    converted = {graph.file: to_onnx(graph) for graph in graphs(torch_model, family, ctx.task)}
    tied = bool(tied_weights(torch_model))
    del torch_model
    final = spec.precision == "float32"
    made = ctx.out if final else floats
    save(converted, made)
    first = ONNX_FILE if ONNX_FILE in converted else ONNX_ENCODER
    check_faithful(form.given(open_export(made / first, ctx.threads)), expected, _FAITHFUL, config["model_type"])
    float_size = _size(made)
    left: dict[str, str] = {}
    properties: dict[str, Any] = {}
    if not final:
        ctx.note("quantising")
        for name, graph in converted.items():
            planned = plan(graph, spec.reduces)
            apply(graph, planned)
            before = f"{name.removesuffix('.onnx')}: " if len(converted) > 1 else ""
            left |= {before + node: reason for node, reason in planned.left.items()}
        save(converted, ctx.out)
        given = form.given(open_export(ctx.out / first, ctx.threads))
        if not all(np.isfinite(logits).all() for logits in given):
            raise StepError("the quantised file gives values that are not finite; use precision: float32")
        properties = {"reduce_range": spec.reduces, "error": relative_error(given, expected)}
    written = read_back(ctx.out, left)
    size = _size(ctx.out)
    if not final:
        check_written(written, size, float_size)

    copy_tokenizer(model.path, ctx.out)
    files = _files(ctx.out)
    labels = kept.get("id2label", {}) if ctx.task == "text-classification" else {}
    properties |= {
        "file": first,
        "files": files,
        "precision": spec.precision,
        "task": ctx.task,
        "family": family,
        "inputs": {name: _inputs(ctx.out / name) for name in converted},
        "vocab": config.get("vocab_size"),
        "labels": list(labels.values()),  # type: ignore
        "operators": dict(sorted(written.kinds.items())),
        "quantized_operators": written.quantized,
        "float_operators": written.floating,
        "float_size": float_size,
        "tied": tied,
        **limit,
    }
    total = written.quantized + written.floating
    summary = f"{spec.precision}, any batch and length: "
    if final:
        summary += f"{sum(written.kinds.values())} operators, {size / 1e6:.2f} MB"
    else:
        summary += (
            f"{written.quantized} of {total} products and lookups quantised, {float_size / 1e6:.2f} MB -> "
            f"{size / 1e6:.2f} MB; {properties['error']:.2%} from the float logits on {_EXAMPLES} training examples"
        )
    touched = tuple(files) if final else written.touched
    return StepResult("export", touched, summary, {} if final else written.left, properties, {}, tuple(warnings))


def _size(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in _files(folder))


def _files(folder: Path) -> list[str]:
    """The graphs of an export, and the file of weights that several have."""
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".onnx" or path.name == ONNX_WEIGHTS)


def _inputs(path: Path) -> dict[str, list[int | None]]:
    """The shapes of a graph's inputs; None where any size will do."""
    return {name: list(port.shape) for name, port in OnnxFile(path).inputs.items()}
