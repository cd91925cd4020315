"""Examples put together into batches: what the models take, cut to the longest, padding never counted."""

from __future__ import annotations

import dataclasses
from itertools import chain

import numpy as np
import pytest

from tasks.context import StepError
from tasks.data.collate import IGNORED, collate
from tasks.data.encoded import Encoded, FeatureFile, open_encoded, save_encoded
from tasks.data.labels import class_weights
from tasks.finetune.batches import Batches, balanced


def ragged(rows: list[list[int]], pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, rows)) + 2
    ids = np.array([row + [pad] * (width - len(row)) for row in rows], np.int32)
    mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows], np.uint8)
    return ids, mask


def texts(rows: list[list[int]], pad: int = 9, **fields: object) -> Encoded:
    ids, mask = ragged(rows, pad)
    numbers = np.arange(len(rows), dtype=np.int32)
    return dataclasses.replace(Encoded(ids, mask, None, numbers, np.zeros_like(numbers), pad=pad), **fields)


def sounds(parts: list[np.ndarray], **fields: object) -> Encoded:
    numbers = np.arange(len(parts), dtype=np.int32)
    targets = ragged([[number + 1] * (number + 1) for number in range(len(parts))])
    encoded = Encoded(
        None,
        None,
        None,
        numbers,
        np.zeros_like(numbers),
        target_ids=targets[0],
        target_mask=targets[1],
        references=tuple("ab"[number % 2] * number for number in range(len(parts))),
        features=np.concatenate(parts).astype(np.float32),
        feature_ends=np.cumsum([len(part) for part in parts]),
        seconds=np.array([len(part) for part in parts], np.float32),
    )
    return dataclasses.replace(encoded, **fields)


SAMPLES = [np.arange(5) + 1.0, np.arange(3) + 10.0, np.arange(8) + 20.0]
FRAMES = [np.arange(6).reshape(3, 2) + 1.0, np.arange(4).reshape(2, 2) + 50.0]


def test_texts_are_cut_to_the_longest_of_the_batch():
    batch = collate(texts([[1, 2, 3, 4], [5], [6, 7]]), np.array([2, 1]))
    assert batch["input_ids"].tolist() == [[6, 7], [5, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert set(batch) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("length", [1, 3, 12])
def test_texts_are_cut_or_padded_to_a_fixed_length_with_the_id_of_padding(length):
    batch = collate(texts([[1, 2], [5, 6, 7, 8]]), np.array([0, 1]), pad_to=length)
    expected = [([1, 2] + [9] * 12)[:length], ([5, 6, 7, 8] + [9] * 12)[:length]]
    assert batch["input_ids"].tolist() == expected
    assert batch["attention_mask"].tolist() == [[int(token != 9) for token in row] for row in expected]


def test_targets_are_labels_with_their_padding_ignored():
    ids, mask = ragged([[4, 2], [5, 6, 2]])
    batch = collate(texts([[1], [2]], target_ids=ids, target_mask=mask), np.array([0, 1]))
    assert batch["labels"].tolist() == [[4, 2, IGNORED], [5, 6, 2]]


def test_classes_and_several_labels_an_example():
    rows = np.array([1, 0])
    one = collate(texts([[1], [2]], labels=np.array([3, 4], np.int32)), rows)
    assert one["labels"].tolist() == [4, 3]
    several = collate(texts([[1], [2]], labels=np.array([[0, 1, 1], [1, 0, 0]], np.uint8)), rows)
    assert several["labels"].tolist() == [[1, 0, 0], [0, 1, 1]]


def test_samples_are_padded_with_silence_and_masked():
    batch = collate(sounds(SAMPLES, feature_input="input_values"), np.array([1, 0]))
    assert batch["input_values"].tolist() == [[10, 11, 12, 0, 0], [1, 2, 3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[2, 2], [1, IGNORED]]
    short = collate(sounds(SAMPLES, feature_input="input_values"), np.array([1, 0]), pad_to=4)
    assert short["input_values"].tolist() == [[10, 11, 12, 0], [1, 2, 3, 4]]


def test_frames_are_filled_up_with_the_last_one_and_turned():
    encoded = sounds(FRAMES, feature_input="input_features", feature_frames=4)
    batch = collate(encoded, np.array([0, 1]))
    assert set(batch) == {"input_features", "labels"}
    assert batch["input_features"].tolist() == [[[1, 3, 5, 5], [2, 4, 6, 6]], [[50, 52, 52, 52], [51, 53, 53, 53]]]


@pytest.mark.parametrize("rows", [[2, 0], slice(1, None), np.array([True, False, True])])
def test_examples_can_be_taken(rows):
    whole = sounds(SAMPLES, feature_input="input_values", warnings=("w",))
    taken = whole.take(rows)
    chosen = np.arange(3)[rows]
    assert taken.lengths().tolist() == whole.lengths()[chosen].tolist()
    assert taken.references == tuple(whole.references[row] for row in chosen)
    assert taken.warnings == ("w",)
    for at, row in enumerate(chosen):
        assert taken.features_of(at).tolist() == whole.features_of(row).tolist()
        ours, theirs = collate(taken, np.array([at])), collate(whole, np.array([row]))
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "encoded",
    [
        texts([[1, 2], [3]], labels=np.array([0, 1], np.int32), label_names=("a", "b"), warnings=("cut",)),
        texts([[1, 2], [3]], labels=np.array([[0, 1], [1, 1]], np.uint8), label_names=("a", "b")),
        texts([[1], [3]], target_ids=ragged([[1], [2]])[0], target_mask=ragged([[1], [2]])[1], references=("é", "")),
        sounds(SAMPLES, feature_input="input_values"),
        sounds(FRAMES, feature_input="input_features", feature_frames=4),
    ],
    ids=["classes", "labels", "pairs", "samples", "frames"],
)
def test_what_is_written_is_read(tmp_path, encoded):
    if encoded.features is not None:
        with FeatureFile(tmp_path) as file:
            for row in range(len(encoded)):
                file.append(encoded.features_of(row))
        assert isinstance(file.open(), np.memmap)
        assert file.ends == encoded.feature_ends.tolist()
    save_encoded(encoded, tmp_path)
    again = open_encoded(tmp_path)
    for field in dataclasses.fields(Encoded):
        ours, theirs = getattr(encoded, field.name), getattr(again, field.name)
        if isinstance(ours, np.ndarray):
            assert (ours.dtype, ours.tolist()) == (theirs.dtype, theirs.tolist()), field.name
        else:
            assert ours == theirs, field.name


def test_feature_files_are_safetensors(tmp_path):
    from safetensors.numpy import load_file

    with FeatureFile(tmp_path) as file:
        for part in FRAMES:
            file.append(part)
    assert load_file(tmp_path / "features.safetensors")["features"].tolist() == np.concatenate(FRAMES).tolist()


def test_damaged_features_are_told(tmp_path):
    encoded = sounds(SAMPLES)
    save_encoded(encoded, tmp_path)
    with pytest.raises(StepError, match=r"features\.safetensors is missing or damaged"):
        open_encoded(tmp_path)


def test_batches_are_tensors_of_the_types_that_torch_asks_for():
    import torch

    tensors = Batches(sounds(SAMPLES, feature_input="input_values"), 0.0, 2, 0, "cpu").tensors(np.array([0, 1]))
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "input_values": torch.float32,
        "attention_mask": torch.int64,
        "labels": torch.int64,
    }


def test_recordings_of_like_length_share_a_batch():
    parts = [np.ones(length) for length in np.random.default_rng(0).integers(10, 1000, 200)]
    batches = Batches(sounds(parts, feature_input="input_values"), 0.0, 10, 0, "cpu")
    lengths = batches.lengths
    rows = [batches.of_step(step) for step in range(batches.steps_per_epoch)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(200))
    padded = sum(lengths[row].max() * len(row) for row in rows)
    assert padded < 1.2 * lengths.sum()


def test_classes_are_drawn_equally_often():
    labels = np.repeat([0, 1, 2], [70, 25, 5])
    drawn = balanced(labels, np.random.default_rng(0))
    assert len(drawn) == 100
    assert sorted(np.bincount(labels[drawn]).tolist()) == [33, 33, 34]
    frequent, times = np.unique(drawn[labels[drawn] == 0], return_counts=True)
    assert times.max() == 1
    assert len(frequent) >= 33
    rare = np.bincount(drawn, minlength=100)[labels == 2]
    assert rare.min() >= 6
    assert rare.max() <= 7
    again = balanced(labels, np.random.default_rng(0))
    assert np.array_equal(drawn, again)
    assert not np.array_equal(drawn, balanced(labels, np.random.default_rng(1)))


def test_balanced_epochs_differ_and_follow_from_the_seed():
    data = texts([[1]] * 40, labels=np.repeat([0, 1], [36, 4]).astype(np.int32), label_names=("a", "b"))

    def epochs(seed: int) -> list[list[int]]:
        batches = Batches(data, 0.1, 8, seed, "cpu", sampling="balanced")
        steps = batches.steps_per_epoch
        rows = [batches.of_step(step).tolist() for step in range(3 * steps)]
        return [list(chain(*rows[at : at + steps])) for at in range(0, 3 * steps, steps)]

    first = epochs(0)
    labels = np.asarray(data.labels)
    held_out = set(Batches(data, 0.1, 8, 0, "cpu").validation.tolist())
    for epoch in first:
        assert abs(labels[epoch].mean() - 0.5) < 0.02
        assert held_out.isdisjoint(epoch)
    assert sorted(first[0]) != sorted(first[1])
    assert first == epochs(0)
    assert first != epochs(1)


def test_only_single_labels_can_be_balanced():
    several = texts([[1], [2]], labels=np.array([[0, 1], [1, 1]], np.uint8))
    for data in (texts([[1], [2]]), several):
        with pytest.raises(StepError, match="sampling: balanced needs one label an example"):
            Batches(data, 0.0, 2, 0, "cpu", sampling="balanced")


def test_class_weights_make_every_class_count_as_much():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.repeat([0, 1, 2], [70, 25, 5]).astype(np.int32)
    weights = class_weights(texts([[1]] * 100, labels=labels, label_names=("a", "b", "c")))
    assert weights.dtype == np.float32
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert np.allclose(weights, expected)
    assert np.allclose(weights * [70, 25, 5], 100 / 3)
    unseen = class_weights(texts([[1]] * 100, labels=labels, label_names=("a", "b", "c", "d")))
    assert unseen[:3].tolist() == weights.tolist()
    assert unseen[3] == 0


def test_weights_of_several_labels_are_those_without_over_those_with():
    labels = np.array([[1, 0], [0, 0], [0, 1], [0, 1]], np.uint8)
    assert class_weights(texts([[1]] * 4, labels=labels)).tolist() == [3, 1]
