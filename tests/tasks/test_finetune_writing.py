"""Translation and speech recognition are trained: losses against naive ones, masked audio, what survives saving."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from tasks.context import StepError
from tasks.finetune.batches import Batches
from tasks.finetune.loop import train
from tasks.finetune.objective import task_loss
from tests.tasks import tiny
from tests.tasks.test_finetune import SPEC, _bits, _curve

pytestmark = pytest.mark.usefixtures("one_thread")


def writer_batch(kind, rows=4, **fields):
    model = tiny.writer(kind, **fields)
    data = tiny.recordings(kind, rows) if kind in ("whisper", "wav2vec2") else tiny.pairs(rows)
    return model, data, Batches(data, 0.0, rows, 0, "cpu").tensors(np.arange(rows))


@pytest.mark.parametrize("kind", ["marian", "t5", "whisper"])
def test_the_loss_of_a_decoder_is_that_of_a_naive_loop(kind):
    model, data, batch = writer_batch(kind)
    smoothing, expected, count = 0.1, 0.0, 0
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        for row in range(4):
            given = [model.config.decoder_start_token_id]
            for token in data.target_ids[row, : data.target_mask[row].sum()].tolist():
                one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
                log = torch.log_softmax(model(**one, decoder_input_ids=torch.tensor([given])).logits[0, -1], -1)
                expected -= float((1 - smoothing) * log[token] + smoothing * log.mean())
                given.append(token)
                count += 1
        task = "speech-recognition" if kind == "whisper" else "translation"
        total, weight = task_loss(task, "encoder-decoder", label_smoothing=smoothing)(model, batch)
    assert float(total) == pytest.approx(expected, rel=1e-4)
    assert int(weight) == count == int(data.target_mask.sum())


def alignments(labels, frames):
    """Every way of CTC to write ``labels`` in so many frames, 0 being the blank."""
    for path in itertools.product(sorted({0, *labels}), repeat=frames):
        if [token for token, _ in itertools.groupby(path) if token] == labels:
            yield path


def test_the_ctc_loss_is_that_of_allalignments_summed():
    model, _, batch = writer_batch("wav2vec2", 3)
    labels = [[5, 5], [7, 9], [4]]
    batch["labels"] = torch.tensor([[5, 5], [7, 9], [4, -100]])
    frames = 5
    samples = next(n for n in range(400) if model._get_feat_extract_output_lengths(n) == frames)
    batch["input_values"] = batch["input_values"][:, :samples]
    batch["attention_mask"] = torch.ones_like(batch["input_values"], dtype=torch.long)
    with torch.no_grad():
        log = torch.log_softmax(model(batch["input_values"], attention_mask=batch["attention_mask"]).logits, -1)
        total, weight = task_loss("speech-recognition", "ctc")(model, batch)
    expected = 0.0
    for row, wanted in enumerate(labels):
        paths = [
            sum(log[row, at, token].item() for at, token in enumerate(path)) for path in alignments(wanted, frames)
        ]
        expected -= np.logaddexp.reduce(paths) / len(wanted)
    assert float(total) == pytest.approx(expected, rel=1e-4)
    assert int(weight) == 3


def test_a_recording_too_short_for_its_transcript_counts_nothing(tmp_path):
    model, data, batch = writer_batch("wav2vec2", 3)
    whole, weight = task_loss("speech-recognition", "ctc")(model, batch)
    batch["labels"][1] = torch.tensor([5] * batch["labels"].shape[1])
    batch["attention_mask"][1, 60:] = 0
    batch["input_values"][1, 60:] = 0
    total, left = task_loss("speech-recognition", "ctc")(model, batch)
    assert (int(weight), int(left)) == (3, 2)
    assert torch.isfinite(total)
    assert float(total.detach()) < float(whole.detach())
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    long = dataclasses.replace(data, target_ids=np.full((3, 400), 5, np.int32), target_mask=np.ones((3, 400), np.uint8))
    with pytest.raises(StepError, match="fewer frames than its transcript"):
        train(model, long, SPEC, tiny.context(tmp_path, "speech-recognition"))


WRITERS = {"marian": "translation", "t5": "translation", "whisper": "speech-recognition"} | {
    "wav2vec2": "speech-recognition"
}


def train_writer(folder, kind, spec=SPEC, seed=0, **fields):
    events = []
    model = tiny.writer(kind, **fields)
    data = tiny.pairs() if WRITERS[kind] == "translation" else tiny.recordings(kind)
    trained = train(model, data, spec, tiny.context(folder, WRITERS[kind], emit=events.append, seed=seed))
    return model, data, trained, events


@pytest.mark.parametrize("kind", WRITERS)
def test_writers_learn_reproducibly_and_survive_saving(tmp_path, kind):
    from tasks.models import load, save

    spec = SPEC.model_copy(update={"max_steps": 20, "learning_rate": 1e-2, "lr_scheduler": "constant"})
    model, data, trained, events = train_writer(tmp_path / "a", kind, spec)
    assert trained.progress.best_loss < trained.progress.first_loss
    assert _curve(events, "tokens_per_second")
    torch.rand(3)
    np.random.rand(3)  # another state of the global generators changes nothing
    again, _, _, _ = train_writer(tmp_path / "b", kind, spec)
    assert _bits(model) == _bits(again)
    other, _, _, _ = train_writer(tmp_path / "c", kind, spec, seed=1)
    assert _bits(model) != _bits(other)
    save(model, tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    batch = Batches(data, 0.0, 4, 0, "cpu").tensors(np.arange(4))
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)


def test_masked_speech_resumes_to_the_same_weights(tmp_path):
    """SpecAugment draws from numpy's generator and layer drop from torch's: both follow from seed and step."""
    spec = SPEC.model_copy(update={"save_every": 0.0, "validation": 0.0})
    whole, _, _, _ = train_writer(tmp_path / "whole", "wav2vec2", spec)

    class Stopped(Exception):
        pass

    def emit(event):
        if event.get("name") == "train_loss" and event["step"] == 5:
            raise Stopped

    data = tiny.recordings("wav2vec2")
    with pytest.raises(Stopped):
        train(tiny.writer("wav2vec2"), data, spec, tiny.context(tmp_path / "cut", "speech-recognition", emit=emit))
    np.random.seed(7)
    before = np.random.get_state()[1].copy()
    resumed, _, _, events = train_writer(tmp_path / "cut", "wav2vec2", spec)
    assert [step for step, _ in _curve(events, "train_loss")] == [5, 6, 7, 8]
    assert _bits(resumed) == _bits(whole)
    assert np.array_equal(np.random.get_state()[1], before)


def test_audio_shorter_than_a_masked_span_trains(tmp_path):
    model = tiny.writer("wav2vec2", mask_time_length=50)
    trained = train(model, tiny.recordings("wav2vec2", 8), SPEC, tiny.context(tmp_path, "speech-recognition"))
    assert trained.progress.step == SPEC.max_steps
    assert model.config.mask_time_length == 50


def test_the_speed_of_writers_counts_what_they_write(tmp_path, monkeypatch):
    from tasks.finetune import loop

    clock = itertools.count()
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    spec = SPEC.model_copy(update={"max_steps": 2, "batch_size": 48, "validation": 0.0, "save_every": 1e9})
    _, data, _, events = train_writer(tmp_path, "marian", spec)
    assert _curve(events, "tokens_per_second")[0][1] == int(data.target_mask.sum())
