"""Exports that the tests share: each is made once, of models whose attention and outputs depend on their input."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from specs.schema.base import Task
from specs.schema.steps.export import ExportOnnxSpec, ExportTfliteSpec
from tasks.context import StepContext, StepResult
from tests import support

LENGTH = 16

CACHE = 40
"""Tokens of a decoder's cache: more than a chunk of the prompt."""

TASKS: dict[str, Task] = {"gpt2": "text-generation", "llama": "text-generation"} | support.TASKS_OF

WIDE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "initializer_range": 0.1},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1},
    "bert": {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1},
    "marian": {"d_model": 64},
    "t5": {},
    "bart": {},
    "whisper": {},
    "wav2vec2": {"hidden_size": 64, "conv_dim": [32, 32, 32], "initializer_range": 0.1},
}
"""Weights several times as large as usual, so that attention and logits are far from uniform, and widths of which
quantisation makes smaller files."""


FIELDS: dict[tuple[str, str], dict[str, Any]] = {
    ("gpt2", "float32"): {"cache": CACHE},
    ("gpt2", "int8-dynamic"): {"cache": CACHE},
    ("gpt2", "int8"): {"generation": False},
    ("llama", "float32"): {"cache": CACHE},
    ("llama", "int8"): {"cache": CACHE},
    ("marian", "float32"): {"batch": 3},
}
"""What the shared exports have in their specs, unless a test asks for something else."""


@cache
def root() -> Path:
    """A folder that lasts as long as the tests."""
    return Path(tempfile.mkdtemp(prefix="exports-"))


@cache
def model(family: Any) -> Path:
    """A tiny model of the family."""
    return support.tiny_model(root() / family, family, TASKS[family], seed=1, **WIDE[family])


@cache
def context(family: str, name: str) -> StepContext:
    """The context of the export ``name`` of a family; its data and store are shared by all of them."""
    data = support.tiny_data(root() / f"data-{TASKS[family]}", TASKS[family], max_length=LENGTH)
    return support.context(root() / f"{family}-{name}", TASKS[family], data, store=root() / "store", threads=2, seed=3)


def spec(precision: str = "float32", **fields: Any) -> ExportTfliteSpec:
    return ExportTfliteSpec.model_validate(
        {"uses": "export_tflite", "id": "export", "precision": precision, "calibration_samples": 32, **fields}
    )


@cache
def export(family: str, precision: str = "float32", name: str = "", **fields: Any) -> tuple[Path, StepResult]:
    """The folder and the result of an export; ``fields`` go into its spec, in the place of those in ``FIELDS``."""
    from tasks.export.tflite import export_tflite

    fields = fields or FIELDS.get((family, precision), {})
    told = "-".join([precision, name, *(f"{key}={value}" for key, value in fields.items())])
    ctx = context(family, told)
    result = export_tflite(support.as_artifact(model(family)), spec=spec(precision, **fields), ctx=ctx)
    return ctx.out, result


def onnx_export(family: str, precision: str = "float32", name: str = "") -> tuple[Path, StepResult]:
    """The folder and the result of an ONNX export."""
    return _onnx_export(family, precision, name)


@cache
def _onnx_export(family: str, precision: str, name: str) -> tuple[Path, StepResult]:
    from tasks.export.onnx import export_onnx

    ctx = context(family, f"onnx-{precision}{name}")
    wanted = ExportOnnxSpec.model_validate({"uses": "export_onnx", "id": "export", "precision": precision})
    return ctx.out, export_onnx(support.as_artifact(model(family)), spec=wanted, ctx=ctx)


def copied(family: str, to: Path, **config: Any) -> Path:
    """The float export of a family in the folder ``to``, with other fields in its ``config.json``."""
    folder = shutil.copytree(export(family)[0], to)
    kept = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**kept, **config}))
    return folder


@cache
def encoded(family: str) -> Any:
    """The evaluation data of a family."""
    from tasks.data import encode

    ctx = context(family, "examples")
    return encode(ctx.data, "eval", ctx.task, model(family), ctx.store)


@cache
def examples(family: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, int32 [24, LENGTH], of the evaluation data; every other example is padded."""
    rows = encoded(family).take(slice(0, 24))
    mask = np.array(rows.attention_mask, np.int32)
    mask[::2, LENGTH // 2 :] = 0
    return np.array(rows.input_ids, np.int32), mask


@cache
def torch_model(family: str) -> Any:
    """The model in torch; use it as it is."""
    from tasks.models import load

    return load(model(family))


def torch_logits(family: str, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What the torch model gives, with its own handling of the mask."""
    import torch

    with torch.inference_mode():
        on = [torch.from_numpy(values.astype(np.int64)) for values in (ids, mask)]
        return torch_model(family)(input_ids=on[0], attention_mask=on[1]).logits.numpy()


def lite_logits(folder: Path, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What the exported file gives, example by example."""
    from tasks.export.runtime import LiteRTModel

    lite = LiteRTModel(folder / "model.tflite", threads=2)
    return np.concatenate([lite.run(ids[at : at + 1], mask[at : at + 1]) for at in range(len(ids))])
