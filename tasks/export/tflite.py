"""The step that writes a model as a LiteRT file, quantised and compiled for an NPU where the spec asks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from specs.schema.steps.export import ExportTfliteSpec
from tasks.context import Artifact, StepContext, StepError, StepResult
from tasks.export.attention import use_export_attention
from tasks.export.convert import to_litert
from tasks.export.faithful import check_faithful, kept_config
from tasks.export.forms import Form, Wanted, open_form
from tasks.export.graph import shorten_names
from tasks.export.lite_file import LiteFile
from tasks.export.names import FILE
from tasks.export.npu import choose, compile_npu
from tasks.export.precision import full_int8, weights_only
from tasks.export.preflight import VARIANTS, check_export, check_shape, refuses, target_length
from tasks.export.runtime import open_export
from tasks.export.written import check_written, read_back
from tasks.registry import step

COMPILED = "model_vela.tflite"
REPORT = "vela.json"

_FAITHFUL = 1e-2
"""The largest difference between the float file and torch, relative to the largest logit, that passes as rounding."""


@step(
    ExportTfliteSpec,
    libraries=("torch", "transformers", "litert-torch", "ai-edge-litert", "ai-edge-quantizer", "ethos-u-vela"),
    preflight=check_export,
    refuses=refuses,
    variants=VARIANTS,
)
def export_tflite(model: Artifact, *, spec: ExportTfliteSpec, ctx: StepContext) -> StepResult:
    """Write ``model`` as a LiteRT file of fixed shape.

    Every signature of the float file is compared with torch before anything is quantised. ``int8`` is calibrated on a
    seeded sample of the training data. For an NPU, vela compiles the int8 file.

    Raises:
        StepError: the model cannot be converted or quantised, the file does not compute what the model computes, did
            not shrink, or vela failed.
    """
    from tasks.data import encode
    from tasks.models import family_of, load
    from tasks.models.layout import tied_weights
    from tasks.models.load import copy_tokenizer, read_config

    if spec.npu is not None:
        choose(spec.npu, spec.npu_system_config, spec.npu_memory_mode)  # a wrong name is found before the work
    config = read_config(model.path)
    check_shape(spec, config, ctx.task, ctx.data)
    torch_model: Any = load(model.path)
    torch_model.set_attn_implementation("eager")
    family = family_of(config)
    encoded = encode(ctx.data, "train", ctx.task, model.path, ctx.store)
    form, described, warnings = open_form(model.path, torch_model, encoded, family, _wanted(spec, ctx), ctx)
    kept = kept_config(config) | described
    for folder in (ctx.work, ctx.out):
        (folder / "config.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")

    ctx.note("converting to LiteRT")
    floats = ctx.work / "float.tflite"
    expected = form.reference(torch_model)
    use_export_attention(torch_model)
    to_litert(form.signatures(torch_model, lookup=spec.precision == "int8"), floats)
    check_faithful(form.given(open_export(floats, ctx.threads)), expected, _FAITHFUL, config["model_type"])
    float_size = floats.stat().st_size
    tied = tied_weights(torch_model)
    del torch_model

    out = ctx.out / FILE
    properties: dict[str, Any] = dict(form.properties)
    unfit: dict[str, str] = {}
    if spec.precision == "float32":
        out.write_bytes(floats.read_bytes())
    elif spec.precision == "int8":
        ctx.note("calibrating on training examples")
        calibration = form.calibration(floats, ctx.threads)
        properties["mask_value"] = full_int8(
            floats, out, calibration, lambda done, total: ctx.progress(done, total, "batches")
        )
    else:
        block = spec.precision.removeprefix("int4-block") if spec.precision.startswith("int4") else None
        unfit = weights_only(floats, out, int(block) if block else None)
    written = read_back(out, spec.precision, unfit, config.get("vocab_size") or 0)
    shorten_names(out)
    warnings += check_written(out, written, spec.precision, float_size, bool(tied))
    _check_runs(form, out, ctx)

    metrics: dict[str, float] = {}
    if spec.npu is not None:
        ctx.note(f"compiling for {spec.npu}")
        build = compile_npu(out, ctx.out / COMPILED, ctx.work, spec.npu, spec.npu_system_config, spec.npu_memory_mode)
        (ctx.out / REPORT).write_text(json.dumps(build.record(), indent=2) + "\n", encoding="utf-8")
        metrics = build.metrics()
        properties["npu"] = {"file": COMPILED, **{k: v for k, v in build.record().items() if k != "summary"}}
        if build.cpu_operators:
            warnings.append(f"{spec.npu} leaves {build.cpu_operators} operators to the CPU: {', '.join(build.cpu)}")

    copy_tokenizer(model.path, ctx.out)
    labels = kept.get("id2label", {}) if ctx.task == "text-classification" else {}
    properties |= {
        "file": FILE,
        "precision": spec.precision,
        "task": ctx.task,
        "family": family,
        "signatures": _ports(out),
        "vocab": config.get("vocab_size"),
        "labels": list(labels.values()),
        "operators": dict(sorted(written.kinds.items())),
        "quantized_operators": written.quantized,
        "float_operators": written.floating,
        "float_size": float_size,
        "tied": tied,
    }
    size = out.stat().st_size
    shape = ", ".join(f"{name} {value}" for name, value in form.properties.items() if value is not None)
    summary = (
        f"{spec.precision}, {shape}: {written.quantized} of {written.quantized + written.floating} operators "
        f"quantised, {float_size / 1e6:.2f} MB -> {size / 1e6:.2f} MB"
    )
    if spec.npu is not None:
        summary += f"; {metrics['npu_operator_share']:.1%} of the operators on {spec.npu}"
    return StepResult("export", written.touched, summary, written.left, properties, metrics, tuple(warnings))


def _wanted(spec: ExportTfliteSpec, ctx: StepContext) -> Wanted:
    length = spec.length or ctx.data.max_length
    return Wanted(
        batch=spec.batch,
        length=length,
        cache=(spec.cache or length) if spec.generates else None,
        target_length=target_length(spec.cache, ctx.task, ctx.data),
        duration=spec.duration,
        samples=spec.calibration_samples if spec.precision == "int8" else max(spec.batch, 2),
    )


def _check_runs(form: Form, path: Path, ctx: StepContext) -> None:
    if not all(np.isfinite(logits).all() for logits in form.given(open_export(path, ctx.threads))):
        raise StepError("the quantised file gives values that are not finite; use another precision")


def _ports(path: Path) -> dict[str, dict[str, dict[str, list[int]]]]:
    """The shapes of every signature's inputs and outputs."""
    entries = LiteFile(path).entries.items()
    return {
        name: {
            "inputs": {port.name: list(port.shape) for port in entry.inputs.values()},
            "outputs": {port.name: list(port.shape) for port in entry.outputs.values()},
        }
        for name, entry in entries
    }
