"""What can be known about an ONNX export before anything is trained."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specs.schema.base import Task
from specs.schema.steps.export import ExportOnnxSpec
from tasks.export.preflight import UNCACHED, UNFAITHFUL, positions_of, window_of

_VNNI = ("avx512_vnni", "avx_vnni")


def limits(config: Mapping[str, Any], task: Task) -> dict[str, int]:
    """What the model can read (``positions``) and write (``target_positions``), where that is limited."""
    found = {"positions": positions_of(config), "target_positions": None}
    if task in ("translation", "speech-recognition"):
        found["target_positions"] = config.get("max_target_positions") or found["positions"]
    if task == "speech-recognition":
        found["positions"] = None
    window = window_of(config)
    if window is not None:
        found["positions"] = min(window, found["positions"] or window)
    return {name: limit for name, limit in found.items() if limit is not None}


def check_export(
    spec: ExportOnnxSpec, config: Mapping[str, Any], task: Task, max_length: int
) -> tuple[list[str], list[str]]:
    """What stands against an export (``problems``) and what its user should know (``warnings``), before any training.

    Args:
        spec: the export.
        config: the configuration of the model that comes in; steps before the export may make it smaller.
        task: what the model does.
        max_length: tokens of an example of the data.
    """
    problems: list[str] = []
    warnings: list[str] = []
    kind = config.get("model_type", "")
    if kind in UNFAITHFUL:
        problems.append(
            f"{kind} models cannot be exported: {UNFAITHFUL[kind]}; use another architecture, or quantize without an "
            "export"
        )
    elif task == "text-generation" and kind in UNCACHED:
        problems.append(
            f"{kind} keeps no keys and values of every layer in a cache, which the file takes and gives; use another "
            "architecture, or export_tflite with generation: false"
        )
    limit = limits(config, task).get("positions")
    if limit is not None and max_length > limit:
        what = "attends within" if window_of(config) == limit else "has positions for"
        problems.append(f"data.max_length is {max_length} and the model {what} {limit} tokens; write {limit} or less")
    if spec.precision == "int8-dynamic":
        warnings += _of_range(spec)
    return problems, warnings


def _of_range(spec: ExportOnnxSpec) -> list[str]:
    if spec.reduces and spec.reduce_range is None and has_vnni():
        return ["this CPU has VNNI: with reduce_range: false the file is more exact here, but wrong on one without"]
    if not spec.reduces and platform.machine() in ("x86_64", "AMD64") and not has_vnni():
        return ["this CPU has no VNNI: with reduce_range: false sums overflow, and its outputs here are wrong"]
    return []


def has_vnni() -> bool:
    """Whether this machine's CPU multiplies int8 without an overflow, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return any(flag in flags for flag in _VNNI)
