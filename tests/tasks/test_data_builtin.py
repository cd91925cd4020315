"""The built-in corpora: the same on every machine, splits apart, and not solved by counting words."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from pydoc_data.topics import topics
from typing import Literal

import numpy as np
import pytest

from specs.schema.pipeline import DataSpec
from tasks.context import StepError
from tasks.data import builtin, reviews, tone_digits, toy_language
from tasks.data.fingerprint import fingerprint
from tasks.data.readers import records


def test_python_docs_are_the_topics_of_the_standard_library_split_by_name():
    train = [text for text, _ in builtin.python_docs("train")]
    held_out = [text for text, _ in builtin.python_docs("eval")]
    assert sorted(train + held_out) == sorted(set(topics.values()))
    assert 0.05 < len(held_out) / len(topics) < 0.2
    assert 0.05 < sum(map(len, held_out)) / sum(map(len, topics.values())) < 0.2


def test_the_field_decides_which_split_a_corpus_gives():
    data = DataSpec(train="builtin:python-docs", eval="builtin:python-docs")
    texts = {split: {record.text for record in records(data, split, "text-generation")} for split in ("train", "eval")}
    assert texts["train"].isdisjoint(texts["eval"])
    assert len(texts["train"]) + len(texts["eval"]) == len(set(topics.values()))


def test_reviews_are_balanced_disjoint_and_always_the_same():
    train, held_out = reviews.read("train"), reviews.read("eval")
    assert Counter(label for _, label in train) == {"negative": 2000, "positive": 2000}
    assert Counter(label for _, label in held_out) == {"negative": 500, "positive": 500}
    assert len({text for text, _ in train + held_out}) == 5000
    digest = hashlib.sha256(json.dumps(train + held_out).encode()).hexdigest()
    assert digest == "6b3e508e74d027c3680e666ed7bf3849f5e0e9de07af4b4e2cc6327a185d8c2d"


def test_counting_words_does_not_solve_the_reviews_but_word_pairs_do_better():
    single, pairs = (_linear_accuracy(size) for size in (1, 2))
    assert 0.55 < single < 0.75
    assert single + 0.1 < pairs < 0.95


def _linear_accuracy(longest: int) -> float:
    """Accuracy on the evaluation split of ridge regression on the presence of n-grams."""

    def grams(text: str) -> set[str]:
        words = text.split()
        return {
            " ".join(words[start : start + size])
            for size in range(1, longest + 1)
            for start in range(len(words) - size + 1)
        }

    train, held_out = reviews.read("train"), reviews.read("eval")
    columns = {gram: number for number, gram in enumerate(sorted({gram for text, _ in train for gram in grams(text)}))}

    def matrix(rows: list) -> tuple[np.ndarray, np.ndarray]:
        values = np.zeros((len(rows), len(columns) + 1), dtype=np.float32)
        values[:, -1] = 1
        for number, (text, _) in enumerate(rows):
            values[number, [columns[gram] for gram in grams(text) if gram in columns]] = 1
        return values, np.array([label == "positive" for _, label in rows], dtype=np.float32)

    inputs, targets = matrix(train)
    normal = inputs.T @ inputs + 5 * np.eye(inputs.shape[1], dtype=np.float32)
    weights = np.linalg.solve(normal, inputs.T @ (2 * targets - 1))
    inputs, targets = matrix(held_out)
    return float(((inputs @ weights > 0) == (targets > 0)).mean())


def test_an_unknown_corpus_is_told_with_the_nearest_name():
    with pytest.raises(StepError, match="no built-in corpus 'review'; did you mean reviews"):
        builtin.find("builtin:review")


@pytest.mark.parametrize(
    ("source", "task", "message"),
    [
        ("python-docs", "text-classification", "has no labels; for text-classification use builtin:reviews"),
        ("reviews", "translation", "has no sources and no translations; for translation use builtin:toy-language"),
        ("toy-language", "text-generation", "has no text; for text-generation use builtin:python-docs"),
        ("toy-language", "speech-recognition", "has no audio and no text; for .* use builtin:tone-digits"),
    ],
)
def test_a_corpus_for_another_task_is_told_with_the_right_one(source, task, message):
    data = DataSpec(train=f"builtin:{source}", eval=f"builtin:{source}")
    with pytest.raises(StepError, match=message):
        next(records(data, "train", task))


def test_the_toy_language_is_disjoint_and_always_the_same():
    train, held_out = toy_language.read("train"), toy_language.read("eval")
    assert (len(train), len(held_out)) == (4000, 500)
    assert len({source for source, _ in train + held_out}) == 4500
    assert max(len(source.split()) for source, _ in train) == 28
    digest = hashlib.sha256(json.dumps(train + held_out).encode()).hexdigest()
    assert digest == "1ecc4c36897ccced57e996da0bb273b588bce8af0505906ca8d4d5c7845643f2"


def test_the_words_of_the_evaluation_were_seen_in_training():
    def words(split: Literal["train", "eval"], side: int) -> Counter[str]:
        return Counter(word for pair in toy_language.read(split) for word in re.findall(r"\w+", pair[side]))

    assert not words("eval", 0).keys() - words("train", 0).keys()
    unseen = words("eval", 1).keys() - words("train", 1).keys()
    assert len(unseen) / words("eval", 1).total() < 0.01


def test_looking_up_words_translates_the_toy_language_badly():
    """Copying, and word by word with a dictionary that is learned by expectation maximisation."""
    from sacrebleu.metrics import BLEU

    train, held_out = toy_language.read("train"), toy_language.read("eval")
    references = [target for _, target in held_out]
    best = _dictionary(train[:1500])
    looked_up = [" ".join(best.get(word, word) for word in source.split()) for source, _ in held_out]
    copied = [source for source, _ in held_out]
    assert BLEU().corpus_score(copied, [references]).score < 5
    assert 1 < BLEU().corpus_score(looked_up, [references]).score < 15


def _dictionary(pairs: list[tuple[str, str]]) -> dict[str, str]:
    """The best translation of every word by IBM model 1."""
    shares: dict[str, dict[str, float]] = {}
    split = [(source.split(), target.split()) for source, target in pairs]
    for _ in range(3):
        counts: dict[str, Counter[str]] = {}
        for source, target in split:
            for word in target:
                weights = [shares[other].get(word, 1e-6) if shares else 1.0 for other in source]
                total = sum(weights)
                for other, weight in zip(source, weights, strict=True):
                    counts.setdefault(other, Counter())[word] += weight / total  # type: ignore[assignment]
        totals = {word: sum(found.values()) for word, found in counts.items()}
        shares = {word: {other: n / totals[word] for other, n in found.items()} for word, found in counts.items()}
    return {word: max(found, key=lambda other: found[other]) for word, found in shares.items()}


@pytest.mark.parametrize(
    ("english", "stems"),
    [
        ("bat", ("nokt", "klab")),
        ("bank", ("monet", "rip")),
        ("letter", ("kart", "glif")),
        ("spring", ("elast", "font")),
    ],
)
def test_a_word_with_two_translations_has_both(english, stems):
    found = [target for source, target in toy_language.read("train") if english in source.replace(".", "").split()]
    shares = [sum(stem in target for target in found) / len(found) for stem in stems]
    assert min(shares) > 0.15


def test_the_tone_digits_are_always_the_same_and_quickly_made():
    started = time.process_time()
    train, held_out = tone_digits.read("train"), tone_digits.read("eval")
    assert time.process_time() - started < 5
    assert (len(train), len(held_out)) == (1500, 200)
    assert all(recording.rate == 8000 and recording.samples.dtype == np.float32 for recording, _ in train)
    loudest = [float(np.abs(recording.samples).max()) for recording, _ in train]
    assert 0.03 < min(loudest) < max(loudest) < 1
    digest = hashlib.sha256(b"".join(recording.samples.tobytes() for recording, _ in held_out))
    digest.update(json.dumps([text for _, text in train + held_out]).encode())
    assert digest.hexdigest() == "ca25e7f00f1f84872cde066dc31864a0baf78c8e243ce295601bc43cfa9a5c47"


def test_the_tone_digits_say_one_to_four_digits_evenly():
    words = Counter(word for _, text in tone_digits.read("train") for word in text.split())
    assert set(words) == set(tone_digits.WORDS)
    assert max(words.values()) < 1.3 * min(words.values())
    assert set(Counter(len(text.split()) for _, text in tone_digits.read("train"))) == {1, 2, 3, 4}
    assert len(set(tone_digits.WORDS.values())) == 10
    sounds = Counter(sound for word in tone_digits.WORDS.values() for sound in word)
    assert min(sounds.values()) >= 2


def test_no_recording_is_in_both_splits():
    splits: tuple[Literal["train", "eval"], ...] = ("train", "eval")
    train, held_out = ({one.samples.tobytes() for one, _ in tone_digits.read(split)} for split in splits)
    assert len(train) == 1500
    assert train.isdisjoint(held_out)


@pytest.mark.parametrize(("corpus", "task"), [("toy-language", "translation"), ("tone-digits", "speech-recognition")])
def test_new_corpora_have_records_and_fingerprints(corpus, task):
    data = DataSpec(train=f"builtin:{corpus}", eval=f"builtin:{corpus}", train_limit=3)
    found = list(records(data, "train", task))
    assert len(found) == 3
    assert all(record.text and (record.target or record.audio) for record in found)
    assert fingerprint(data, "train", task) != fingerprint(data, "eval", task)
