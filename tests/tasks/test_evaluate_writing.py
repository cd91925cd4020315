"""Translation and speech recognition, measured on the model's own files and on the exported ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specs.schema.base import Task
from specs.schema.pipeline import DataSpec
from specs.schema.steps.export import ExportTfliteSpec
from tasks.context import Artifact
from tasks.evaluate import outputs, quality, scores
from tests import support
from tests.tasks.test_evaluate import measure

Measured = tuple[dict[str, Any], dict[str, Any], Path]

QUICK = {"generation": {"repeats": 10, "new_tokens": 12}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("writing")


@pytest.fixture(scope="module")
def translation_data(root: Path) -> DataSpec:
    return support.tiny_data(root / "pairs", "translation")


@pytest.fixture(scope="module")
def speech_data(root: Path) -> DataSpec:
    return support.tiny_data(root / "speech", "speech-recognition")


@pytest.fixture(scope="module")
def translated(root: Path, marian: Path, translation_data: DataSpec) -> Measured:
    return measure(support.as_artifact(marian), root / "marian", "translation", translation_data, marian, **QUICK)


@pytest.fixture(scope="module")
def heard(root: Path, wav2vec2: Path, speech_data: DataSpec) -> Measured:
    return measure(support.as_artifact(wav2vec2), root / "ctc", "speech-recognition", speech_data, wav2vec2, **QUICK)


def check_record(measured: Measured, quality_metrics: set[str], task: str) -> None:
    """What holds for every measurement of a model that writes."""
    record, said, out = measured
    metrics, scenario = record["metrics"], record["scenario"]
    assert quality_metrics | {"time_to_first_token", "tokens_per_second", "latency_p50", "peak_memory"} <= set(metrics)
    for name in quality_metrics:
        assert metrics[name]["low"] <= metrics[name]["value"] <= metrics[name]["high"], name
        assert metrics[name]["n"] == scenario["examples"] == 40
    kept = scores.read(out)
    assert kept is not None
    again = quality.sample(kept)
    assert {name: again.value(name) for name in quality_metrics} == {
        name: metrics[name]["value"] for name in quality_metrics
    }
    assert len(said["held"]) == 1
    assert said["held"][0] == 0, "speed is measured before quality"
    assert len(record["latency_samples"]) == len(record["latency_inputs"]) == 12
    writing = record["writing_samples"]
    assert len(writing["whole"]) == len(set(writing["inputs"])) == 10
    assert metrics["tokens_per_second"]["value"] == pytest.approx(sum(writing["tokens"]) / sum(writing["whole"]))
    assert metrics["tokens_per_second"]["low"] < metrics["tokens_per_second"]["high"]
    assert max(writing["tokens"]) <= 12
    assert writing["what"] == "10 inputs one after the other, at most 12 tokens from each"
    shown = outputs.read(out)
    assert len(shown) == 40
    assert all(one["input"] and one["expected"] for one in shown)
    assert record["task"] == task


def test_a_translator_is_measured(translated: Measured) -> None:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    check_record(translated, {"bleu", "chrf", "length_ratio"}, "translation")
    record, _, out = translated
    shown = outputs.read(out)
    pair = [one["output"] for one in shown], [[one["expected"] for one in shown]]
    assert record["metrics"]["bleu"]["value"] == pytest.approx(BLEU().corpus_score(*pair).score, abs=1e-9)
    assert record["metrics"]["chrf"]["value"] == pytest.approx(CHRF(word_order=2).corpus_score(*pair).score, abs=1e-9)
    assert record["scenario"]["signatures"]["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert record["scenario"]["call"] == "from the input to the whole output, greedily, up to the reference's length"
    assert "real_time_factor" not in record["metrics"]


def test_a_recogniser_is_measured(heard: Measured) -> None:
    import jiwer

    from tasks.evaluate.quality.speech import basic

    check_record(heard, {"wer", "cer"}, "speech-recognition")
    record, _, out = heard
    pair = [[basic(one[side]) for one in outputs.read(out)] for side in ("expected", "output")]
    assert record["metrics"]["wer"]["value"] == pytest.approx(jiwer.wer(*pair))
    writing = record["writing_samples"]
    assert record["metrics"]["real_time_factor"]["value"] == pytest.approx(
        sum(writing["whole"]) / sum(writing["audio"])
    )
    assert writing["first"] == writing["whole"], "CTC gives all at once"
    assert record["scenario"]["call"] == (
        "from the input to the whole output, all of it at once; features are made before"
    )
    assert record["scenario"]["normalise"].startswith("basic")


def export(root: Path, source: Path, task: Task, data: DataSpec, **fields: Any) -> Artifact:
    from tasks.export.tflite import export_tflite

    ctx = support.context(root, task, data)
    spec = ExportTfliteSpec(id="export", uses="export_tflite", **fields)
    result = export_tflite(support.as_artifact(source), spec=spec, ctx=ctx)
    return support.as_artifact(ctx.out, "export", **result.properties)


def check_export(measured: Measured, torch: Measured, task: str) -> None:
    """A float file writes what the torch model writes, in a process without torch."""
    record, said, out = measured
    assert said["heavy"] == []
    metrics = record["metrics"]
    assert metrics["parity_error"]["value"] < 1e-3
    assert metrics["parity_agreement"]["value"] > 0.99
    mine, theirs = (outputs.read(folder) for folder in (out, torch[2]))
    same = sum(one["output"] == other["output"] for one, other in zip(mine, theirs, strict=True))
    assert same >= 38, "of 40; a tie may fall the other way"
    kept = [scores.read(folder) for folder in (out, torch[2])]
    assert kept[0] is not None
    assert kept[1] is not None
    assert quality.sample(kept[0]).same_units(quality.sample(kept[1]))
    assert record["writing_samples"]["inputs"] == torch[0]["writing_samples"]["inputs"]
    assert metrics["tokens_per_second"]["value"] > 0
    assert record["task"] == task


def test_an_exported_translator_writes_what_torch_writes(
    root: Path, marian: Path, translation_data: DataSpec, translated: Measured
) -> None:
    artifact = export(root / "export-marian", marian, "translation", translation_data, batch=2)
    found = measure(artifact, root / "lite", "translation", translation_data, marian, translated[2], **QUICK)
    check_export(found, translated, "translation")
    assert found[0]["scenario"]["batch"] == 2
    assert found[0]["scenario"]["length"] == support.LENGTH
    assert "ai-edge-litert" in found[0]["scenario"]["runtime"]


def test_an_exported_recogniser_hears_what_torch_hears(
    root: Path, wav2vec2: Path, speech_data: DataSpec, heard: Measured
) -> None:
    artifact = export(root / "export-ctc", wav2vec2, "speech-recognition", speech_data)
    found = measure(artifact, root / "lite-ctc", "speech-recognition", speech_data, wav2vec2, heard[2], **QUICK)
    check_export(found, heard, "speech-recognition")
    assert found[0]["metrics"]["real_time_factor"]["value"] > 0
    assert found[0]["writing_samples"]["audio"] == pytest.approx(heard[0]["writing_samples"]["audio"])
