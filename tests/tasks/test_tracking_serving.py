"""A registered model answers the same whether it is a torch folder or a LiteRT file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specs.schema.base import Task
from tasks.export.runtime import LiteRTModel
from tasks.tracking import harden_environment
from tasks.tracking.models import needs_lathe, save_model
from tests.tasks import exported

TEXTS = ["a small model learns a small text", "the quick brown fox"]


def answers(folder: Path, out: Path, task: Task, params: dict[str, Any] | None = None) -> Any:
    harden_environment()
    import mlflow.pyfunc
    import pandas

    save_model(out, {"model": folder}, task)
    return mlflow.pyfunc.load_model(str(out)).predict(pandas.DataFrame({"text": TEXTS}), params=params)


def test_labels(tmp_path: Path) -> None:
    torch = answers(exported.model("bert"), tmp_path / "torch", "text-classification")
    lite = answers(exported.export("bert", "float32")[0], tmp_path / "lite", "text-classification")
    assert list(lite["label"]) == list(torch["label"])
    assert set(lite["label"]) <= {"negative", "positive"}
    np.testing.assert_allclose(lite["score"], torch["score"], atol=1e-4)


@pytest.mark.parametrize(("family", "task"), [("bert", "text-classification"), ("llama", "text-generation")])
def test_an_onnx_file_answers_as_torch_does(tmp_path: Path, family: str, task: Task) -> None:
    count = {"max_new_tokens": 4} if task == "text-generation" else None
    torch = answers(exported.model(family), tmp_path / "torch", task, count)
    folder = exported.onnx_export(family)[0]
    found = answers(folder, tmp_path / "onnx", task, count)
    told = "label" if task == "text-classification" else "text"
    assert list(found[told]) == list(torch[told])
    assert "onnxruntime==" in (tmp_path / "onnx" / "requirements.txt").read_text()
    assert not needs_lathe(folder, task)


def test_quantised_outputs_are_scaled_as_evaluation_scales_them(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = exported.export("bert", "int8")[0]
    runtime = LiteRTModel(folder / "model.tflite")
    encoded = AutoTokenizer.from_pretrained(exported.model("bert"))(
        TEXTS, padding="max_length", truncation=True, max_length=runtime.length, return_tensors="np"
    )
    logits = np.concatenate(
        [
            runtime.run(encoded["input_ids"][place : place + 1], encoded["attention_mask"][place : place + 1])
            for place in range(len(TEXTS))
        ]
    )
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    served = answers(folder, tmp_path / "lite", "text-classification")
    np.testing.assert_allclose(served["score"], shares.max(axis=1), rtol=1e-5)


def test_text_that_follows(tmp_path: Path) -> None:
    count = {"max_new_tokens": 4}
    torch = answers(exported.model("llama"), tmp_path / "torch", "text-generation", count)
    lite = answers(exported.export("llama", "float32")[0], tmp_path / "lite", "text-generation", count)
    assert list(lite["text"]) == list(torch["text"])
    assert all(torch["text"])


def test_a_packed_model_asks_for_lathe_and_no_index_is_asked_for_it(tmp_path: Path, monkeypatch) -> None:
    """An index may give Lathe's name to anybody, so it must not stand among the requirements."""
    import mlflow.pyfunc
    import torch

    from tasks.compress.packing import pack_int8
    from tasks.compress.selection import select
    from tasks.models import load, load_tokenizer, save

    plain, packed, out = exported.model("bert"), tmp_path / "packed", tmp_path / "out"
    network = load(plain)
    network, entry = pack_int8(network, select(network))
    save(network, packed, tokenizer_from=plain, transforms=[entry])
    assert needs_lathe(packed, "text-classification")
    assert not needs_lathe(plain, "text-classification")

    served = answers(packed, out, "text-classification")
    with torch.inference_mode():
        logits = load(packed)(**load_tokenizer(packed)(TEXTS[:1], return_tensors="pt")).logits
    np.testing.assert_allclose(served["score"][0], logits.softmax(-1).max(), rtol=1e-4)
    assert "torch==" in (out / "requirements.txt").read_text()
    assert [path.name for path in out.iterdir() if path.is_file() and "lathe==" in path.read_text()] == []

    monkeypatch.setitem(sys.modules, "tasks.models", None)  # as where Lathe is not installed
    with pytest.raises(RuntimeError, match="install Lathe from its source"):
        mlflow.pyfunc.load_model(str(out))
