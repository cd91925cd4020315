"""Gates fail closed, and their intervals cover what they say; metrics against scikit-learn and plain loops."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specs.schema.gates import GateSpec
from specs.schema.pipeline import EvaluateSpec
from specs.schema.steps.select import SelectSpec
from tasks.context import Artifact, Evaluation, StepError
from tasks.evaluate import bootstrap, quality, scores, speed
from tasks.evaluate.format import human
from tasks.evaluate.gates import judge, overall
from tasks.evaluate.select import select
from tests import support

SPEC = EvaluateSpec(bootstrap=400)
_number = itertools.count()


def evaluation(tmp_path: Path, kind: str = "model", kept: scores.Scores | None = None, **metrics: Any) -> Evaluation:
    """An evaluation with these metrics, each a value or ``(value, low, high)``; quality comes from ``kept``."""
    folder = tmp_path / f"evaluation{next(_number)}"
    folder.mkdir()
    entries = {}
    for name, given in metrics.items():
        value, low, high = given if isinstance(given, tuple) else (given, None, None)
        entries[name] = {"value": value, "low": low, "high": high, "n": None}
    if kept is not None:
        scores.write(folder, kept)
        entries |= quality.sample(kept).metrics(resamples=400, confidence=0.95, seed=0)
    return Evaluation(folder, {"version": 1, "kind": kind, "metrics": entries})


def classified(correct: np.ndarray, classes: int = 2) -> scores.Scores:
    label = np.arange(len(correct), dtype=np.int32) % classes
    predicted = np.where(correct, label, (label + 1) % classes).astype(np.int32)
    return {
        "correct": correct.astype(np.uint8),
        "predicted": predicted,
        "label": label,
        "probability": np.ones(len(correct), np.float32),
    }


def written(nll: np.ndarray, document: np.ndarray) -> scores.Scores:
    tokens = np.full(len(nll), 10, np.int64)
    return {"nll": nll, "tokens": tokens, "bytes": tokens * 4, "document": document.astype(np.int32)}


def gate(**fields: Any) -> GateSpec:
    return GateSpec.model_validate({"step": "small", **fields})


def one(given: GateSpec, **evaluations: Evaluation) -> Any:
    (verdict,) = judge([given], evaluations, (), SPEC, 0)
    return verdict


def test_macro_f1_and_accuracy_are_scikit_learns() -> None:
    from sklearn.metrics import accuracy_score, f1_score

    random = np.random.default_rng(0)
    predicted, label = random.integers(0, 5, 60), random.integers(0, 4, 60)
    kept = {"correct": predicted == label, "predicted": predicted, "label": label, "probability": np.ones(60)}
    sample = quality.sample(kept)
    for draw in next(iter(bootstrap.draws(60, 25, 1))):
        for name, expected in (
            ("accuracy", accuracy_score(label[draw], predicted[draw])),
            ("f1", f1_score(label[draw], predicted[draw], average="macro", zero_division=0)),
        ):
            assert sample.statistics[name](draw[None])[0] == pytest.approx(expected), name
    assert sample.value("accuracy") == pytest.approx(accuracy_score(label, predicted))


def test_perplexity_resamples_whole_documents() -> None:
    nll = np.array([10.0, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    document = np.array([0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    sample = quality.sample(written(nll, document))
    assert (sample.unit, sample.size) == ("documents", 11)
    draw = np.array([[0, 0, 5, 6, 7, 1, 2, 3, 4, 10, 9]])
    windows = [index for unit in draw[0] for index in np.flatnonzero(document == unit)]
    assert sample.statistics["perplexity"](draw)[0] == pytest.approx(np.exp(nll[windows].sum() / (10 * len(windows))))
    assert quality.sample(written(nll, document // 4)).unit == "windows"


def test_the_bootstrap_is_seeded_and_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    mean = bootstrap.quantile(np.random.default_rng(0).normal(size=50), 0.5)
    first = bootstrap.replicates(mean, 50, 300, 7)
    np.testing.assert_array_equal(first, bootstrap.replicates(mean, 50, 300, 7))
    assert not np.array_equal(first, bootstrap.replicates(mean, 50, 300, 8))
    monkeypatch.setattr(bootstrap, "_CHUNK", 1000)
    np.testing.assert_array_equal(first, bootstrap.replicates(mean, 50, 300, 7))


@pytest.mark.parametrize("kind", ["accuracy", "documents", "median"])
def test_intervals_cover_the_truth_as_often_as_they_say(kind: str) -> None:
    random = np.random.default_rng(5)
    inside, trials = 0, 300
    for trial in range(trials):
        if kind == "accuracy":
            truth = 0.85
            statistic = bootstrap.ratio_of_sums((random.random(300) < truth).astype(float), np.ones(300))
            units = 300
        elif kind == "documents":  # windows of a document share its difficulty: what resampled windows would not see
            truth = 3.0
            level = np.repeat(random.normal(3.0, 0.4, 60), 8)
            kept = written(10 * (level + random.normal(0, 0.1, 480)), np.repeat(np.arange(60), 8))
            sample = quality.sample(kept)
            found = sample.statistics["perplexity"]
            statistic, units = (lambda draw, found=found: np.log(found(draw))), sample.size
        else:
            truth = 1.0
            statistic, units = bootstrap.quantile(np.exp(random.normal(0, 0.3, 50)), 0.5), 50
        bounds = bootstrap.interval(bootstrap.replicates(statistic, units, 300, trial), 0.95)
        assert bounds is not None
        inside += bounds[0] <= truth <= bounds[1]
    assert 0.90 <= inside / trials <= 0.985


def test_a_paired_drop_is_sharper_than_an_unpaired_one(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    before = random.random(800) < 0.88
    after = before.copy()
    after[np.flatnonzero(before)[:4]] = False
    large, small = (evaluation(tmp_path, kept=classified(values)) for values in (before, after))
    limit = gate(metric="accuracy", drop={"at_most": "1.5 points"})
    paired = one(limit, baseline=large, small=small)
    assert (paired.status, paired.paired) == ("passed", True)
    assert paired.value == pytest.approx(0.5)
    assert paired.margin == pytest.approx(1.0)
    other = evaluation(tmp_path, kept=classified(np.append(after, True)))
    unpaired = one(limit, baseline=large, small=other)
    assert (unpaired.status, unpaired.paired) == ("inconclusive", False)
    assert unpaired.high - unpaired.low > 3 * (paired.high - paired.low)
    assert "more examples" in unpaired.message


def test_perplexity_may_worsen_by_a_share(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    nll, document = 30 + random.normal(0, 3, 200), np.repeat(np.arange(40), 5)
    large = evaluation(tmp_path, kept=written(nll, document))
    small = evaluation(tmp_path, kept=written(nll + 0.2, document))
    verdict = one(gate(metric="perplexity", drop={"at_most": "5%"}), baseline=large, small=small)
    assert (verdict.status, verdict.unit, verdict.paired) == ("passed", "%", True)
    assert verdict.value == pytest.approx(100 * (np.exp(0.02) - 1))
    assert one(gate(metric="perplexity", drop={"at_most": "1%"}), baseline=large, small=small).status == "failed"
    better = one(gate(metric="perplexity", drop={"at_most": "0%"}), baseline=small, small=large)
    assert better.status == "passed"
    assert better.value < 0


@pytest.mark.parametrize(
    ("fields", "value", "status"),
    [
        ({"metric": "size", "at_most": "14 MB"}, 14e6, "passed"),
        ({"metric": "size", "at_most": "14 MB"}, 14e6 + 1, "failed"),
        ({"metric": "npu_operator_share", "at_least": "99%"}, 0.99, "passed"),
        ({"metric": "npu_operator_share", "at_least": "99%"}, 0.9899, "failed"),
        ({"metric": "accuracy", "at_least": "85%"}, (0.87, 0.85, 0.89), "passed"),
        ({"metric": "accuracy", "at_least": "85%"}, (0.87, 0.8499, 0.89), "inconclusive"),
        ({"metric": "accuracy", "at_least": "85%"}, (0.83, 0.82, 0.85), "inconclusive"),
        ({"metric": "accuracy", "at_least": "85%"}, (0.83, 0.82, 0.8499), "failed"),
        ({"metric": "latency_p50", "at_most": "10 ms"}, (0.0095, 0.009, 0.0101), "inconclusive"),
        ({"metric": "latency_p50", "at_most": "10 ms"}, (0.0095, 0.009, 0.01), "passed"),
    ],
)
def test_a_limit_belongs_to_the_right_side(tmp_path: Path, fields: Any, value: Any, status: str) -> None:
    assert one(gate(**fields), small=evaluation(tmp_path, **{fields["metric"]: value})).status == status


def test_rounding_does_not_break_a_drop_at_the_limit(tmp_path: Path) -> None:
    large, small = (evaluation(tmp_path, f1=(value,) * 3) for value in (0.5, 0.485))
    assert (0.5 - 0.485) * 100 > 1.5
    assert one(gate(metric="f1", drop={"at_most": "1.5 points"}), baseline=large, small=small).status == "passed"


def test_a_gain_is_how_many_times_better(tmp_path: Path) -> None:
    large, small = evaluation(tmp_path, size=100.0, throughput=10.0), evaluation(tmp_path, size=25.0, throughput=30.0)
    verdict = one(gate(metric="size", gain={"at_least": "4x"}), baseline=large, small=small)
    assert (verdict.status, verdict.value, verdict.low) == ("passed", 4.0, None)
    assert one(gate(metric="throughput", gain={"at_least": "4x"}), baseline=large, small=small).value == 3.0
    assert one(gate(metric="size", gain={"at_least": "4x"}, relative_to="small"), small=small).status == "failed"


def test_a_gain_in_latency_resamples_both_sides(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    sides = {}
    for name, level in (("baseline", 0.02), ("small", 0.005)):
        seconds = level * np.exp(random.normal(0, 0.1, 50))
        found = speed.metrics(seconds, 1, resamples=300, confidence=0.95, seed=0)
        record = {"kind": "model", "metrics": found, "latency_samples": seconds.tolist()}
        sides[name] = Evaluation(tmp_path / name, record)
    verdict = one(gate(metric="latency_p50", gain={"at_least": "3x"}), **sides)
    assert verdict.status == "passed"
    assert verdict.low < verdict.value < verdict.high
    assert verdict.value == pytest.approx(4, rel=0.1)
    assert one(gate(metric="latency_p50", gain={"at_least": "4x"}), **sides).status == "inconclusive"
    bounds = sides["small"].metrics["latency_p99"]
    assert bounds["low"] is None, "50 samples cannot bound a p99"


def test_what_cannot_be_computed_fails(tmp_path: Path) -> None:
    there = evaluation(tmp_path, accuracy=None, f1=0.99, size=0.0, latency_p50=0.01)
    cases = [
        (gate(metric="f1", at_least=0.1), {"small": there}, "too few examples"),
        (gate(metric="accuracy", at_least=0.1), {"small": there}, "not a finite number"),
        (gate(metric="perplexity", at_most=10), {"small": there}, "small has no perplexity"),
        (gate(metric="size", at_most="1 MB"), {}, "small was not evaluated"),
        (gate(metric="size", gain={"at_least": "2x"}), {"small": there}, "baseline was not evaluated"),
        (gate(metric="size", gain={"at_least": "2x"}), {"small": there, "baseline": there}, "undefined"),
    ]
    for given, evaluations, reason in cases:
        verdict = one(given, **evaluations)
        assert (verdict.status, verdict.value) == ("missing", None)
        assert reason in verdict.message
        assert overall([verdict]) == "failed"


def test_a_gate_without_a_step_is_on_every_final_step_that_has_the_metric(tmp_path: Path) -> None:
    cpu = evaluation(tmp_path, kind="export", size=5.0)
    npu = Evaluation(cpu.path, {**cpu.record, "npu": "ethos-u85-256", "metrics": {"npu_cycles": {"value": 7.0}}})
    cycles = GateSpec(metric="npu_cycles", at_most=10)
    assert [verdict.step for verdict in judge([cycles], {"cpu": cpu, "npu": npu}, ("cpu", "npu"), SPEC, 0)] == ["npu"]
    (nowhere,) = judge([cycles], {"cpu": cpu}, ("cpu",), SPEC, 0)
    assert nowhere.status == "missing"
    small = GateSpec(metric="size", at_most="1 kB")
    statuses = {verdict.step: verdict.status for verdict in judge([small], {"cpu": cpu}, ("cpu", "lost"), SPEC, 0)}
    assert statuses == {"cpu": "passed", "lost": "missing"}


def test_the_worst_verdict_decides(tmp_path: Path) -> None:
    given = {
        "small": evaluation(tmp_path, accuracy=(0.9, 0.88, 0.92), size=10.0),
    }
    holds, unsure, fails = (
        gate(metric="size", at_most=10),
        gate(metric="accuracy", at_least=0.9),
        gate(metric="size", at_most=9),
    )
    assert overall(judge([], given, (), SPEC, 0)) == "passed"
    assert overall(judge([holds], given, (), SPEC, 0)) == "passed"
    assert overall(judge([holds, unsure], given, (), SPEC, 0)) == "inconclusive"
    assert overall(judge([fails, unsure, holds], given, (), SPEC, 0)) == "failed"


def test_verdicts_do_not_depend_on_the_order_of_gates(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    given = {name: evaluation(tmp_path, kept=classified(random.random(200) < 0.8)) for name in ("baseline", "small")}
    gates = [gate(metric=name, drop={"at_most": "1 points"}) for name in ("accuracy", "f1")]
    forward, backward = judge(gates, given, (), SPEC, 4), judge(gates[::-1], given, (), SPEC, 4)
    assert forward == backward[::-1]
    assert judge(gates, given, (), SPEC, 4) == forward


@pytest.fixture
def branches(tmp_path: Path) -> dict[str, Artifact]:
    made = {}
    for name in ("a", "b", "c"):
        folder = tmp_path / name
        (folder / "sub").mkdir(parents=True)
        (folder / "model.tflite").write_text(name)
        (folder / "sub" / "config.json").write_text("{}")
        (folder / "manifest.json").write_text("{}")
        made[name] = support.as_artifact(folder, "export", key=name * 64, file="model.tflite", which=name)
    return made


def _select(branches: dict[str, Artifact], tmp_path: Path, evaluations: Any, gates: Any = (), **fields: Any) -> Any:
    spec = SelectSpec.model_validate({"id": "best", "uses": "select", "from": list(branches), **fields})
    data = support.tiny_data(tmp_path / "data", "text-classification", train=4, eval=4)
    ctx = support.context(
        tmp_path / "ctx", "text-classification", data, step_id="best", evaluations=evaluations, gates=tuple(gates)
    )
    return select(*branches.values(), spec=spec, ctx=ctx), ctx


def test_select_takes_the_best_that_passes(branches: dict[str, Artifact], tmp_path: Path) -> None:
    found = {
        "a": evaluation(tmp_path, accuracy=(0.8, 0.79, 0.81), latency_p50=0.002),
        "b": evaluation(tmp_path, accuracy=(0.9, 0.89, 0.91), latency_p50=0.007),
        "c": evaluation(tmp_path, accuracy=(0.9, 0.84, 0.92), latency_p50=0.003),
    }
    limit = GateSpec.model_validate({"step": "best", "metric": "accuracy", "at_least": "85%"})
    result, ctx = _select(branches, tmp_path, found, [limit], minimise="latency_p50")
    assert result.kind == "export"
    assert result.properties["which"] == "b"
    assert result.properties["chosen"] == "b"
    assert result.summary == "chose b of a, b, c: latency_p50 7.00 ms"
    assert set(result.left) == {"a", "c"}
    assert "inconclusive" in result.left["c"]
    assert sorted(path.relative_to(ctx.out).as_posix() for path in ctx.out.rglob("*") if path.is_file()) == [
        "model.tflite",
        "sub/config.json",
    ]
    assert (ctx.out / "model.tflite").read_text() == "b"
    assert os.stat(ctx.out / "model.tflite").st_nlink == 2


def test_select_keeps_what_every_candidate_measured(branches: dict[str, Artifact], tmp_path: Path) -> None:
    branches["a"] = support.as_artifact(branches["a"].path, "packed", key="a" * 64)
    found = {
        "a": evaluation(tmp_path, kind="packed", parity_error=0.01, latency_p50=0.004),
        "b": evaluation(tmp_path, kind="export", parity_error=0.2, latency_p50=0.001),
    }
    limit = GateSpec.model_validate({"step": "best", "metric": "parity_error", "at_most": "5%"})
    result, _ = _select(branches, tmp_path, found, [limit], minimise="latency_p50")
    assert (result.kind, result.properties["chosen"]) == ("packed", "a")
    kept = result.properties["candidates"]
    assert kept["a"]["metrics"] == {"parity_error": 0.01, "latency_p50": 0.004}
    assert kept["a"]["reasons"] == []
    assert kept["b"]["reasons"] == ["parity_error ≤ 5% failed at 0.200"]
    assert kept["c"] == {"reasons": ["was not evaluated; write evaluate: true"]}


def test_select_without_gates_names_the_others(branches: dict[str, Artifact], tmp_path: Path) -> None:
    found = {name: evaluation(tmp_path, accuracy=value) for name, value in (("a", 0.8), ("b", 0.9), ("c", 0.9))}
    result, _ = _select(branches, tmp_path, found, maximise="accuracy")
    assert result.summary == "chose b of a, b, c: accuracy 0.900 (a 0.800, c 0.900)"


def test_select_fails_with_every_reason(branches: dict[str, Artifact], tmp_path: Path) -> None:
    found = {"a": evaluation(tmp_path, accuracy=(0.8, 0.79, 0.81), size=5.0), "b": evaluation(tmp_path, accuracy=0.9)}
    limit = GateSpec.model_validate({"step": "best", "metric": "accuracy", "at_least": "85%"})
    with pytest.raises(StepError, match=r"none of a, b, c .*a: accuracy ≥ 85% failed.*b: has no size.*c: was not eval"):
        _select(branches, tmp_path, found, [limit], minimise="size")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (12_512_000, "bytes", "12.5 MB"),
        (999_999, "bytes", "1.00 MB"),
        (0.00681, "seconds", "6.81 ms"),
        (0.0000123, "seconds", "12.3 µs"),
        (402.0, "seconds", "6 min 42 s"),
        (22_700_000, "count", "22.7 M"),
        (0.8724, "share", "0.872"),
        (4.123, "x", "4.1x"),
        (1.5, "points", "1.50 points"),
        (None, "share", "–"),
        (float("nan"), "bytes", "–"),
        (308.597, "number", "308.6"),
    ],
)
def test_figures_for_people(value: float | None, unit: str, text: str) -> None:
    assert human(value, unit) == text
