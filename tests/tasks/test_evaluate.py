"""An artifact is measured on its own files, in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specs.schema.pipeline import DataSpec, EvaluateSpec
from specs.schema.steps.export import ExportTfliteSpec
from tasks.context import Artifact, StepError
from tasks.evaluate import outputs, scores
from tasks.evaluate.quality import batches, language
from tests import support

QUICK: dict[str, Any] = {"bootstrap": 200, "latency": {"warmup": 1, "repeats": 12}, "parity_examples": 6}

_JOB = """
import contextlib, json, sys
from pathlib import Path
from specs.schema.pipeline import DataSpec, EvaluateSpec
from tasks.context import Artifact
from tasks.evaluate.measure import evaluate
job = json.loads(sys.stdin.read())
path = Path(job["path"])
artifact = Artifact("k" * 64, job["kind"], "d" * 64, path, job["manifest"])
held = []
events = []
@contextlib.contextmanager
def exclusive():
    held.append(len(events))
    yield
evaluate(artifact, task=job["task"], data=DataSpec.model_validate(job["data"]),
    spec=EvaluateSpec.model_validate(job["spec"]), store=Path(job["store"]), out=Path(job["out"]), threads=1,
    device="cpu", seed=3, tokenizer=Path(job["tokenizer"]), reference=job["reference"] and Path(job["reference"]),
    exclusive=exclusive, emit=events.append)
heavy = [name for name in ("torch", "transformers", "tensorflow", "litert_torch") if name in sys.modules]
print(json.dumps({"heavy": heavy, "held": held, "events": events}))
"""


def measure(
    artifact: Artifact,
    folder: Path,
    task: str,
    data: DataSpec,
    tokenizer: Path,
    reference: Path | None = None,
    **spec: Any,
) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """Evaluate in a fresh process; the record, what the process said, and the folder."""
    out = folder / "evaluation"
    out.mkdir(parents=True)
    job = {
        "path": str(artifact.path),
        "kind": artifact.kind,
        "manifest": artifact.manifest,
        "task": task,
        "data": data.model_dump(mode="json"),
        "spec": {**QUICK, **spec},
        "store": str(folder.parent / "store"),
        "out": str(out),
        "tokenizer": str(tokenizer),
        "reference": reference and str(reference),
    }
    done = subprocess.run(
        [sys.executable, "-c", _JOB], input=json.dumps(job), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "evaluation.json").read_text()), json.loads(done.stdout.splitlines()[-1]), out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def generation(root: Path, llama: Path, text_data: DataSpec) -> tuple[dict[str, Any], dict[str, Any], Path]:
    return measure(support.as_artifact(llama), root / "llama", "text-generation", text_data, llama)


@pytest.fixture(scope="module")
def classification(root: Path, bert: Path, review_data: DataSpec) -> tuple[dict[str, Any], dict[str, Any], Path]:
    return measure(support.as_artifact(bert), root / "bert", "text-classification", review_data, bert)


def _naive_perplexity(folder: Path, data: DataSpec, store: Path) -> tuple[float, int]:
    """Token by token, one window at a time."""
    import torch

    from tasks.data.encode import encode
    from tasks.models.load import load

    rows = encode(data, "eval", "text-generation", folder, store)
    model: Any = load(folder)
    total, tokens = 0.0, 0
    for ids, mask in zip(rows.input_ids, rows.attention_mask, strict=True):
        kept = torch.tensor(ids[mask == 1].astype(np.int64))[None]
        with torch.inference_mode():
            shares = torch.log_softmax(model(input_ids=kept).logits[0].double(), -1)
        for place in range(1, kept.shape[1]):
            total -= shares[place - 1, kept[0, place]].item()
            tokens += 1
    return float(np.exp(total / tokens)), tokens


def test_perplexity_is_that_of_a_naive_loop(generation: Any, llama: Path, text_data: DataSpec, root: Path) -> None:
    record, _, out = generation
    expected, tokens = _naive_perplexity(llama, text_data, root / "store")
    metric = record["metrics"]["perplexity"]
    assert metric["value"] == pytest.approx(expected, rel=1e-5)
    assert metric["low"] < metric["value"] < metric["high"]
    assert record["scenario"]["scored_tokens"] == tokens
    kept = scores.read(out)
    assert kept is not None
    assert record["metrics"]["bits_per_byte"]["value"] == pytest.approx(
        kept["nll"].sum() / np.log(2) / kept["bytes"].sum()
    )


def test_accuracy_is_that_of_the_model_called_by_hand(
    classification: Any, bert: Path, review_data: DataSpec, root: Path
) -> None:
    import torch
    from sklearn.metrics import accuracy_score, f1_score

    from tasks.data.encode import encode
    from tasks.models.load import load

    record, _, out = classification
    rows = encode(review_data, "eval", "text-classification", bert, root / "store")
    model: Any = load(bert)
    with torch.inference_mode():
        logits = model(
            input_ids=torch.tensor(np.array(rows.input_ids, np.int64)),
            attention_mask=torch.tensor(np.array(rows.attention_mask, np.int64)),
        ).logits
    guess = logits.argmax(1).numpy()
    kept = scores.read(out)
    assert kept is not None
    np.testing.assert_array_equal(kept["predicted"], guess)
    np.testing.assert_allclose(kept["probability"], logits.softmax(1).max(1).values.numpy(), atol=1e-5)
    assert record["metrics"]["accuracy"]["value"] == pytest.approx(accuracy_score(rows.labels, guess))
    assert record["metrics"]["f1"]["value"] == pytest.approx(
        f1_score(np.array(rows.labels), guess, average="macro", zero_division=0)
    )


def test_the_record_says_how_and_on_what(classification: Any, generation: Any, bert: Path) -> None:
    for record, said, _ in (classification, generation):
        assert record["version"] == 1
        scenario = record["scenario"]
        assert (scenario["batch"], scenario["length"], scenario["repeats"]) == (1, support.LENGTH, 12)
        assert scenario["cpu"]
        assert "torch 2" in scenario["runtime"]
        assert len(record["latency_samples"]) == 12
        metrics = {name: entry["value"] for name, entry in record["metrics"].items()}
        assert 0 < metrics["latency_p50"] <= metrics["latency_p90"] <= metrics["latency_p99"]
        assert metrics["throughput"] == pytest.approx(1 / metrics["latency_p50"])
        assert metrics["peak_memory"] > scenario["memory_before_load"] > 5e6
        assert metrics["peak_memory"] < 3e9
        assert len(said["held"]) == 1
        assert said["held"][0] == 0, "latency is measured before quality"
        last = said["events"][-1]
        assert last["event"] == "progress"
        assert last["done"] == last["total"]
        assert scenario["call"] == "one forward pass"
    metrics = classification[0]["metrics"]
    assert metrics["size"]["value"] == (bert / "model.safetensors").stat().st_size
    assert set(classification[0]["dtypes"]) == {"float32"}
    shown = outputs.read(classification[2])
    assert len(shown) == classification[0]["scenario"]["examples"]
    assert {one["expected"] for one in shown} == {"negative", "positive"}
    assert all(one["input"] and one["output"] in ("negative", "positive") for one in shown)


def test_parameters_are_counted_from_the_file(classification: Any, bert: Path) -> None:
    from tasks.models.load import load

    weights = list(load(bert).parameters())
    metrics = classification[0]["metrics"]
    assert metrics["parameters"]["value"] == sum(weight.numel() for weight in weights)
    assert metrics["nonzero_parameters"]["value"] == sum(int((weight != 0).sum()) for weight in weights)


def test_a_long_latency_input_is_refused_with_the_field(root: Path, llama: Path, text_data: DataSpec) -> None:
    from tasks.evaluate.measure import evaluate

    spec = EvaluateSpec.model_validate({"latency": {"length": 65}})
    with pytest.raises(StepError, match=r"evaluate\.latency\.length is 65, .* at most 64"):
        evaluate(
            support.as_artifact(llama),
            task="text-generation",
            data=text_data,
            spec=spec,
            store=root / "store",
            out=root,
            threads=1,
            device="cpu",
            seed=0,
            tokenizer=llama,
            reference=None,
            exclusive=_free,
            emit=lambda event: None,
        )


@contextmanager
def _free() -> Any:
    yield


@pytest.fixture(scope="module")
def exports(root: Path, llama: Path, bert: Path, text_data: DataSpec, review_data: DataSpec) -> Mapping[str, Artifact]:
    from tasks.export.tflite import export_tflite

    made = {}
    wanted: dict[str, tuple[Path, str, DataSpec, dict[str, Any]]] = {
        "float": (bert, "text-classification", review_data, {"batch": 3}),
        "int8": (bert, "text-classification", review_data, {"precision": "int8-dynamic", "length": 8}),
        "text": (llama, "text-generation", text_data, {"length": 12, "generation": False}),
    }
    for name, (source, task, data, fields) in wanted.items():
        spec = ExportTfliteSpec(id=name, uses="export_tflite", **fields)
        folder = root / f"export-{name}"
        ctx = support.context(folder, task, data)  # type: ignore[arg-type]
        result = export_tflite(support.as_artifact(source), spec=spec, ctx=ctx)
        manifest = {"properties": dict(result.properties), "result": {"metrics": {"npu_cycles": 1234.0}}}
        made[name] = Artifact("e" * 64, "export", "d" * 64, ctx.out, manifest)
    return made


def test_an_export_is_measured_on_its_file_without_torch(
    exports: Mapping[str, Artifact], root: Path, bert: Path, review_data: DataSpec, classification: Any
) -> None:
    record, said, out = measure(
        exports["float"], root / "float", "text-classification", review_data, bert, classification[2]
    )
    assert said["heavy"] == []
    metrics = {name: entry["value"] for name, entry in record["metrics"].items()}
    mine, theirs = scores.read(out), scores.read(classification[2])
    assert mine is not None
    assert theirs is not None
    np.testing.assert_array_equal(mine["label"], theirs["label"])
    np.testing.assert_allclose(mine["probability"], theirs["probability"], atol=1e-4)
    assert metrics["accuracy"] == classification[0]["metrics"]["accuracy"]["value"]
    assert metrics["parity_error"] < 1e-4
    assert metrics["parity_agreement"] == 1.0
    assert metrics["size"] == (exports["float"].path / "model.tflite").stat().st_size
    assert metrics["throughput"] == pytest.approx(3 / metrics["latency_p50"])
    assert metrics["peak_memory"] < classification[0]["metrics"]["peak_memory"]["value"] / 2
    assert metrics["npu_cycles"] == 1234
    assert "ai-edge-litert" in record["scenario"]["runtime"]
    assert metrics["parameters"] >= classification[0]["metrics"]["parameters"]["value"] * 0.9


def test_a_shorter_export_says_what_it_cut(
    exports: Mapping[str, Artifact], root: Path, bert: Path, review_data: DataSpec, classification: Any
) -> None:
    record, _, _ = measure(exports["int8"], root / "int8", "text-classification", review_data, bert, classification[2])
    assert any("exceed the export's 8 tokens and are cut" in note for note in record["notes"])
    assert any("parity" in note for note in record["notes"])
    assert record["dtypes"]["int8"] > 0
    smaller = record["metrics"]["size"]["value"]
    assert smaller < (exports["float"].path / "model.tflite").stat().st_size


def test_a_shorter_text_export_scores_every_token(
    exports: Mapping[str, Artifact], root: Path, llama: Path, text_data: DataSpec, generation: Any
) -> None:
    record, said, out = measure(exports["text"], root / "text", "text-generation", text_data, llama, generation[2])
    assert said["heavy"] == []
    assert record["scenario"]["scored_tokens"] == generation[0]["scenario"]["scored_tokens"]
    assert record["metrics"]["parity_error"]["value"] < 1e-4
    assert any("split" in note for note in record["notes"])
    assert record["metrics"]["perplexity"]["value"] == pytest.approx(
        generation[0]["metrics"]["perplexity"]["value"], rel=0.05
    )
    assert outputs.read(out)[0]["output"] is not None


def test_parity_sees_a_wrong_reference(
    exports: Mapping[str, Artifact], root: Path, bert: Path, review_data: DataSpec, classification: Any
) -> None:
    from safetensors.numpy import load_file, save_file

    from tasks.evaluate import parity
    from tasks.evaluate.export_runners import open_file

    wrong = root / "wrong"
    wrong.mkdir()
    kept = load_file(classification[2] / parity.FILE)
    save_file({**kept, "logits": -2 * kept["logits"]}, wrong / parity.FILE)
    metrics, _ = parity.compare(wrong, open_file(exports["float"].path / "model.tflite", 1), 0)
    assert metrics["parity_error"]["value"] == pytest.approx(1.5, rel=1e-3)
    assert metrics["parity_agreement"]["value"] == 0.0


def test_a_packed_model_is_measured_like_any_other(
    root: Path, bert: Path, review_data: DataSpec, classification: Any
) -> None:
    from specs.schema.steps.quantize import QuantizeSpec
    from tasks.compress.quantize import quantize

    ctx = support.context(root / "packing", "text-classification", review_data)
    spec = QuantizeSpec(id="packed", uses="quantize")
    result = quantize(support.as_artifact(bert), spec=spec, ctx=ctx)
    packed = support.as_artifact(ctx.out, result.kind)
    record, _, _ = measure(packed, root / "packed", "text-classification", review_data, bert)
    assert record["kind"] == "packed"
    assert record["dtypes"]["int8"] > 4 * record["dtypes"]["float32"]
    for name in ("parameters", "accuracy"):
        assert record["metrics"][name]["value"] == pytest.approx(classification[0]["metrics"][name]["value"], abs=0.1)
    assert record["metrics"]["size"]["value"] < 0.5 * classification[0]["metrics"]["size"]["value"]


def test_windows_score_every_token_once() -> None:
    for limit in (2, 3, 7, None):
        for tokens in range(12):
            found = language.windows(np.array([tokens]), limit)
            scored = [place for part in found for place in range(part.start + 1, part.end)]
            assert scored == list(range(1, tokens))
            assert all(limit is None or part.end - part.start <= limit for part in found)


def test_cutting_keeps_the_end_mark(bert: Path, review_data: DataSpec, root: Path) -> None:
    from tasks.data.encode import encode

    long = encode(review_data, "eval", "text-classification", bert, root / "store")
    short = encode(
        review_data.model_copy(update={"max_length": 8}), "eval", "text-classification", bert, root / "store"
    )
    tokens_of = batches.cut(long, 8)
    for row in range(len(long)):
        np.testing.assert_array_equal(tokens_of(row), short.input_ids[row][short.attention_mask[row] == 1])


def test_packed_weights_are_counted_and_scales_are_not(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    from tasks.evaluate import footprint

    save_file(
        {
            "layer.weight_int8": np.array([[1, 0, -3], [0, 0, 2]], np.int8),
            "layer.weight_scale": np.ones(2, np.float32),
            "layer.bias": np.array([0.0, -0.0, 1.5], np.float16),
            "positions": np.arange(9),
        },
        tmp_path / "model.safetensors",
    )
    weighed = footprint.of_model(tmp_path)
    assert (weighed.parameters, weighed.nonzero) == (9, 4)
    assert weighed.dtypes == {"int8": 6, "float32": 8, "float16": 6, "int64": 72}
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(StepError, match=r"no \.safetensors file"):
        footprint.of_model(tmp_path)
