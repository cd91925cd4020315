"""Every quality metric is that of its library, on the whole set and on resamples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tasks.evaluate import bootstrap, quality
from tasks.evaluate.quality import speech, translation
from tasks.evaluate.scores import Sample

SENTENCES = (
    ("A dog runs across the wet grass.", "A dog is running across the wet grass."),
    ("Two men, in red shirts, play football!", "Two men in red shirts are playing soccer."),
    ("The the the the", "A woman reads a book on a bench ."),
    ("", "Nobody is here."),
    ('Ein 3,5-Zoll "Laufwerk" (alt) kostet 10.000 €', "Ein 3,5-Zoll-Laufwerk kostet 10.000 €"),
    ("雨 が 降る", "雨 が 降っ て いる"),
    ("yes", "yes"),
    (
        "a man with a hat rides a bicycle through the narrow street",
        "a man with a hat rides a bike through a narrow street",
    ),
)


def corpus(count: int, seed: int) -> tuple[list[str], list[str]]:
    """Sentences from a small vocabulary, the translations near the references."""
    random = np.random.default_rng(seed)
    words = [f"w{number}" for number in range(30)] + ["don't", "e.g.", "x-y", "…", "Größe"]
    references = [" ".join(random.choice(words, random.integers(1, 14))) for _ in range(count)]
    hypotheses = []
    for reference in references:
        kept = [word for word in reference.split() if random.random() > 0.15]
        hypotheses.append(" ".join(kept + list(random.choice(words, random.integers(0, 3)))))
    return hypotheses, references


def of_translations(hypotheses: list[str], references: list[str]) -> Sample:
    kept = translation.statistics(hypotheses, references)
    return quality.sample(kept | {"reference": np.arange(len(references), dtype=np.uint32)})


def sacrebleu(hypotheses: list[str], references: list[str]) -> dict[str, float]:
    from sacrebleu.metrics import BLEU, CHRF

    bleu = BLEU(tokenize="13a", lowercase=False).corpus_score(hypotheses, [references])
    chrf = CHRF(word_order=2).corpus_score(hypotheses, [references])
    return {"bleu": bleu.score, "chrf": chrf.score, "length_ratio": bleu.sys_len / bleu.ref_len}


@pytest.mark.parametrize("name", ["cases", "random", "nothing", "short"])
def test_translation_scores_are_sacrebleus(name: str) -> None:
    sets = {
        "cases": tuple(map(list, zip(*SENTENCES, strict=True))),
        "random": corpus(60, 0),
        "nothing": (["", "x y", "z"], ["a b c d e", "f g h", "i"]),
        "short": (["a b", "c"], ["a b", "c d"]),  # no n-gram of the higher orders anywhere
    }
    hypotheses, references = sets[name]
    sample = of_translations(hypotheses, references)
    for metric, expected in sacrebleu(hypotheses, references).items():
        assert sample.value(metric) == pytest.approx(expected, abs=1e-9), metric


def test_resampled_translations_score_as_a_corpus_of_those_sentences() -> None:
    hypotheses, references = corpus(25, 1)
    sample = of_translations(hypotheses, references)
    for draw in next(iter(bootstrap.draws(25, 30, 3))):
        expected = sacrebleu([hypotheses[row] for row in draw], [references[row] for row in draw])
        for metric, statistic in sample.statistics.items():
            assert statistic(draw[None])[0] == pytest.approx(expected[metric], abs=1e-9), metric


def test_smoothing_is_that_of_sacrebleu_where_an_order_has_no_match() -> None:
    hypotheses, references = ["a b x c d y", "e z f z g"], ["a b q c d q", "e q f q g"]
    assert (translation.statistics(hypotheses, references)["bleu"].sum(0)[2:6] == 0).sum() >= 2
    expected = sacrebleu(hypotheses, references)["bleu"]
    assert expected > 0
    assert of_translations(hypotheses, references).value("bleu") == pytest.approx(expected, abs=1e-9)


UTTERANCES = (
    ("one two three", "one two three"),
    ("one three", "one two three"),
    ("one too too three", "one two three"),
    ("", "one two"),
    ("nobody spoke", ""),
    ("", ""),
    ("ONE, two!", "One two."),
    ("naïve  café", "naive café"),
)


@pytest.mark.parametrize("how", ["none", "basic"])
def test_error_rates_are_jiwers(how: str) -> None:
    import jiwer

    hypotheses, references = map(list, zip(*UTTERANCES, strict=True))
    normalise = speech.NORMALISE[how][1]
    kept = speech.statistics(hypotheses, references, normalise)
    sample = quality.sample(kept | {"reference": np.arange(len(references), dtype=np.uint32)})

    def expected(rows: Any) -> dict[str, float]:
        said = [normalise(references[row]) for row in rows]
        heard = [normalise(hypotheses[row]) for row in rows]
        return {"wer": jiwer.wer(said, heard), "cer": jiwer.cer(said, heard)}

    for metric, value in expected(range(len(references))).items():
        assert sample.value(metric) == pytest.approx(value, abs=1e-12), metric
    for draw in next(iter(bootstrap.draws(len(references), 30, 0))):
        if kept["words"][draw, 1].sum():
            for metric, value in expected(draw).items():
                assert sample.statistics[metric](draw[None])[0] == pytest.approx(value, abs=1e-12), metric
    assert kept["words"][4].tolist() == [2, 0]
    assert sample.value("wer") < (0.9 if how == "basic" else 1.1)


def test_an_error_rate_without_any_reference_is_no_number() -> None:
    kept = speech.statistics(["a", ""], ["", ""], speech.basic)
    found = quality.sample(kept | {"reference": np.zeros(2, np.uint32)}).metrics(resamples=100, confidence=0.9, seed=0)
    assert found["wer"]["value"] is None
    assert found["wer"]["low"] is None


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Don't STOP—now!", "dont stop now"),
        ("  it’s\t 3.5 % ", "its 3 5"),
        ("«Où?» ﬁn", "où fin"),
        ("…", ""),
    ],
)
def test_basic_normalisation(text: str, plain: str) -> None:
    assert speech.basic(text) == plain


def classified(classes: int, count: int = 80, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    label = random.integers(0, classes, count)
    predicted = np.where(random.random(count) < 0.7, label, random.integers(0, classes + 1, count))
    return {
        "correct": predicted == label,
        "predicted": predicted,
        "label": label,
        "probability": random.random(count).astype(np.float32),
    }


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_the_matthews_coefficient_is_scikit_learns(classes: int) -> None:
    from sklearn.metrics import matthews_corrcoef

    kept = classified(classes)
    statistic = quality.sample(kept).statistics["mcc"]
    for draw in next(iter(bootstrap.draws(80, 25, 1))):
        expected = matthews_corrcoef(kept["label"][draw], kept["predicted"][draw])
        assert statistic(draw[None])[0] == pytest.approx(expected, abs=1e-12)


def naive_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    total = 0.0
    for number in range(bins):
        inside = (confidence > number / bins) & (confidence <= (number + 1) / bins)
        if number == 0:
            inside |= confidence == 0
        if inside.any():
            total += abs(correct[inside].mean() - confidence[inside].mean()) * inside.sum()
    return total / len(confidence)


def test_the_calibration_error_is_that_of_a_loop_over_bins() -> None:
    kept = classified(3, 400)
    kept["probability"][:4] = (0.0, 1.0, 0.2, 0.4)
    statistic = quality.sample(kept).statistics["calibration_error"]
    for draw in (np.arange(400), *next(iter(bootstrap.draws(400, 20, 2)))):
        expected = naive_calibration_error(kept["probability"][draw].astype(np.float64), kept["correct"][draw])
        assert statistic(draw[None])[0] == pytest.approx(expected, abs=1e-12)
    assert naive_calibration_error(np.full(10, 0.8), np.arange(10) < 8) == pytest.approx(0)


def test_several_labels_are_scored_as_scikit_learn_scores_them() -> None:
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    random = np.random.default_rng(4)
    label = (random.random((60, 3)) < 0.4).astype(np.int32)
    probability = np.clip(0.7 * label + random.random((60, 3)) * 0.45, 0, 1).astype(np.float32)
    predicted = (probability > 0.5).astype(np.int32)
    correct = (predicted == label).all(1)
    sample = quality.sample({"correct": correct, "predicted": predicted, "label": label, "probability": probability})
    sure = np.maximum(probability, 1 - probability).astype(np.float64)
    for draw in (np.arange(60), *next(iter(bootstrap.draws(60, 20, 5)))):
        found = {name: statistic(draw[None])[0] for name, statistic in sample.statistics.items()}
        truth, guess = label[draw], predicted[draw]
        assert found["accuracy"] == pytest.approx(accuracy_score(truth, guess))
        assert found["f1"] == pytest.approx(f1_score(truth, guess, average="macro", zero_division=0))
        assert found["mcc"] == pytest.approx(matthews_corrcoef(truth.ravel(), guess.ravel()))
        right = (truth == guess).ravel()
        assert found["calibration_error"] == pytest.approx(naive_calibration_error(sure[draw].ravel(), right))


def test_samples_are_paired_only_on_the_same_examples() -> None:
    hypotheses, references = corpus(10, 0)
    kept = translation.statistics(hypotheses, references)
    one = quality.sample(kept | {"reference": np.arange(10, dtype=np.uint32)})
    assert one.same_units(quality.sample(kept | {"reference": np.arange(10, dtype=np.uint32)}))
    assert not one.same_units(quality.sample(kept | {"reference": np.arange(1, 11, dtype=np.uint32)}))
    assert not one.same_units(of_translations(hypotheses[:9], references[:9]))
    nothing = Sample("calls", 10, {})
    assert not nothing.same_units(nothing)


def test_intervals_of_bleu_cover_the_truth_as_often_as_they_say() -> None:
    hypotheses, references = corpus(4000, 9)
    whole = of_translations(hypotheses, references)
    truth = whole.value("bleu")
    columns = translation.statistics(hypotheses, references)["bleu"]
    random, inside, trials = np.random.default_rng(0), 0, 200
    for trial in range(trials):
        rows = random.integers(0, 4000, 120)
        statistic = bootstrap.of_sums(columns[rows], translation.corpus_bleu)
        bounds = bootstrap.interval(bootstrap.replicates(statistic, 120, 250, trial), 0.95)
        assert bounds is not None
        inside += bounds[0] <= truth <= bounds[1]
    assert 0.88 <= inside / trials <= 0.99
