"""Gates on the metrics of models that write: points of BLEU, error rates, the speed of writing."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.context import Evaluation
from tasks.evaluate import scores, speed
from tasks.evaluate.quality import translation
from tests.tasks.test_gates import evaluation, gate, one


def translated(count: int, seed: int, right: float) -> scores.Scores:
    """Sentences of which the share ``right`` of the words is that of the reference; same seed, same references."""
    random = np.random.default_rng(seed)
    references = [" ".join(random.choice(list("abcdefghij"), 12)) for _ in range(count)]
    hits = np.random.default_rng(seed + 1).random((count, 12)) < right
    hypotheses = [
        " ".join(word if hit else "x" for word, hit in zip(text.split(), row, strict=True))
        for text, row in zip(references, hits, strict=True)
    ]
    kept = translation.statistics(hypotheses, references)
    return kept | {"reference": np.arange(count, dtype=np.uint32)}


def test_a_drop_of_bleu_is_in_points_and_paired(tmp_path: Path) -> None:
    large, small = (evaluation(tmp_path, kept=translated(300, 3, right)) for right in (0.9, 0.897))
    values = [side.metrics["bleu"]["value"] for side in (large, small)]
    assert 0.2 < values[0] - values[1] < 1
    found = {"baseline": large, "small": small}
    for limit in ("2 points", 2, "2 point"):
        verdict = one(gate(metric="bleu", drop={"at_most": limit}), **found)
        assert (verdict.status, verdict.paired) == ("passed", True)
        assert verdict.value == pytest.approx(values[0] - values[1])
    assert one(gate(metric="bleu", drop={"at_most": "0.1 points"}), **found).status == "failed"
    share = one(gate(metric="bleu", drop={"at_most": "1%"}), **found)
    assert share.value == pytest.approx(100 * (values[0] - values[1]) / values[0])
    other = evaluation(tmp_path, kept=translated(299, 3, 0.9))
    assert not one(gate(metric="bleu", drop={"at_most": 1}), baseline=other, small=small).paired


def test_a_drop_of_an_error_rate_is_in_points(tmp_path: Path) -> None:
    words = np.stack([np.arange(200) % 20 == 0, np.full(200, 4)], axis=1).astype(np.int64)
    worse = words.copy()
    worse[3, 0] = 1
    found = {
        name: evaluation(
            tmp_path, kept={"words": kept, "characters": kept, "reference": np.arange(200, dtype=np.uint32)}
        )
        for name, kept in (("baseline", words), ("small", worse))
    }
    verdict = one(gate(metric="wer", drop={"at_most": "1 points"}), **found)
    assert (verdict.status, verdict.paired) == ("passed", True)
    assert verdict.value == pytest.approx(100 / 800)
    assert verdict.message.startswith("small: wer drop ≤ 1 points against baseline holds: drop of wer is 0.12 points")
    limit = one(gate(metric="wer", at_most="5%"), **found)
    assert (limit.status, limit.value) == ("passed", pytest.approx(11 / 800))
    assert "wer is 1.4% [" in limit.message


@pytest.mark.parametrize(
    ("metric", "limit", "message"),
    [
        ("mcc", "1.5 points", "drop of mcc has unit 'points'; write for example 0.02"),
        ("perplexity", "1 points", "drop of perplexity has unit 'points'; write for example 0.02 or 5%"),
        ("accuracy", 0.015, "drop of accuracy has no unit; write for example 1.5 points"),
        ("bleu", "2x", "drop of bleu has unit 'x'; write for example 1 point"),
        ("size", 5, "drop of size has no unit; write for example 5%"),
        ("chrf", -1, "drop of chrf is negative"),
    ],
)
def test_a_drop_in_an_unfit_unit_is_refused(metric: str, limit: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gate(metric=metric, drop={"at_most": limit})


def test_a_gain_in_the_speed_of_writing_is_paired_by_input(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    seconds = np.exp(random.normal(0, 0.5, 20))
    sides = {}
    for name, factor in (("baseline", 1.0), ("small", 0.25)):
        noise = np.exp(random.normal(0, 0.02, 20))
        kept = speed.Written(
            (factor * seconds * noise / 9).tolist(),
            (factor * seconds * noise).tolist(),
            [30] * 20,
            [2.0] * 20,
            [*range(20)],
        )
        record = {"kind": "model", "metrics": kept.metrics(resamples=300, confidence=0.95, seed=0)}
        sides[name] = Evaluation(tmp_path / name, record | {"writing_samples": asdict(kept)})
    for metric in ("tokens_per_second", "real_time_factor", "time_to_first_token"):
        verdict = one(gate(metric=metric, gain={"at_least": "3.5x"}), **sides)
        assert (verdict.status, verdict.paired) == ("passed", True), metric
        assert verdict.value == pytest.approx(4, rel=0.1)
        assert verdict.high - verdict.low < 1
    rate = sides["small"].metrics["tokens_per_second"]["value"]
    assert rate == pytest.approx(600 / sum(sides["small"].record["writing_samples"]["whole"]))
    few = speed.Written([1.0] * 9, [2.0] * 9, [3] * 9, [], [*range(9)]).metrics(resamples=100, confidence=0.9, seed=0)
    assert few["tokens_per_second"] == {"value": 1.5, "low": None, "high": None, "n": 9}
    assert "real_time_factor" not in few
