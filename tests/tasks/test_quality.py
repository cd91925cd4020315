"""What runs on every example: windows averaged, several labels, greedy writing, parity of every kind of model."""

from __future__ import annotations

import dataclasses
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specs.schema.base import Task
from specs.schema.pipeline import DataSpec, EvaluateSpec
from specs.schema.steps.finetune import TrainingSpec
from tasks.data.encode import encode
from tasks.data.encoded import Encoded
from tasks.data.tokens import TextTokenizer, open_tokenizer
from tasks.evaluate import parity, quality, speed
from tasks.evaluate.quality.batches import source
from tasks.evaluate.quality.language import room
from tasks.evaluate.subject import Subject
from tasks.evaluate.torch_runners import TorchCtc, TorchRunner, TorchSeq2Seq, collapse
from tasks.evaluate.workload import AT_ONCE, FEATURES, WORK, WRITING, Shape
from tasks.finetune.loop import train
from tasks.models import load
from tests import support
from tests.tasks import tiny

WRITERS: dict[str, Task] = {
    "marian": "translation",
    "t5": "translation",
    "whisper": "speech-recognition",
    "wav2vec2": "speech-recognition",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return open_tokenizer(support.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), "marian"))


def subject(runner: Any, rows: Encoded, text: TextTokenizer, task: Task, **spec: Any) -> Subject:
    data = DataSpec(train="builtin:none", eval="builtin:none", max_length=9)
    given = EvaluateSpec.model_validate({"batch_size": 5, **spec})
    return Subject(task, runner, rows, text, data, given, lambda done, total: None)


@cache
def learned(kind: str) -> dict[str, torch.Tensor]:
    """The weights of a model that has learned a little, so that what it writes depends on its input."""
    model, spec = tiny.writer(kind), TrainingSpec(max_steps=60, batch_size=12, learning_rate=1e-2, validation=0.0)
    with tempfile.TemporaryDirectory() as folder:
        train(model, examples(kind), spec, tiny.context(Path(folder), WRITERS[kind]))
    return model.state_dict()


def examples(kind: str) -> Encoded:
    return tiny.pairs(24) if WRITERS[kind] == "translation" else tiny.recordings(kind, 24)


def writer(kind: str) -> tuple[Any, Encoded]:
    """A runner for a model whose output depends on its input, and its examples."""
    model = tiny.writer(kind)
    if kind == "wav2vec2":
        return TorchCtc(model, "cpu"), examples(kind)
    model.load_state_dict(learned(kind))
    return TorchSeq2Seq(model, "cpu"), examples(kind)


def naive(runner: Any, rows: Encoded, row: int, limit: int) -> list[int]:
    """Greedy writing for one example alone, the whole decoder run again for every token."""
    given = {name: torch.from_numpy(array) for name, array in source(rows, np.array([row]), None).items()}
    config = runner.model.config
    with torch.no_grad():
        if isinstance(runner, TorchCtc):
            best = runner.model(**given).logits[0].argmax(-1).tolist()
            kept = [token for place, token in enumerate(best) if not place or token != best[place - 1]]
            return [token for token in kept if token != config.pad_token_id][:limit]
        ids = [config.decoder_start_token_id]
        for _ in range(limit):
            logits = runner.model(**given, decoder_input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits.argmax()))
            if ids[-1] == config.eos_token_id:
                return ids[1:-1]
    return ids[1:]


@pytest.mark.parametrize("kind", WRITERS)
def test_batches_are_written_as_one_by_one(kind: str, text: TextTokenizer) -> None:
    runner, rows = writer(kind)
    scored = quality.score(subject(runner, rows, text, WRITERS[kind]))
    limit = 10_000 if kind == "wav2vec2" else 9  # CTC writes what it hears, however short the data keeps its texts
    expected = [text.core.decode(naive(runner, rows, row, limit)) for row in range(len(rows))]
    assert [one["output"] for one in scored.outputs] == expected
    assert len(set(expected)) > 3, "the model is meant to write different texts"
    assert [one["expected"] for one in scored.outputs] == list(rows.references)
    found = quality.sample(scored.scores).metrics(resamples=100, confidence=0.95, seed=0)
    references = list(rows.references)
    if kind in ("marian", "t5"):
        from sacrebleu.metrics import CHRF

        assert found["chrf"]["value"] == pytest.approx(CHRF(word_order=2).corpus_score(expected, [references]).score)
        assert scored.facts["signatures"]["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.")
        assert scored.facts["signatures"]["chrf"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no|version:2.")
    else:
        import jiwer

        from tasks.evaluate.quality.speech import basic

        pair = [[basic(text) for text in texts] for texts in (references, expected)]
        assert found["cer"]["value"] == pytest.approx(jiwer.cer(*pair))
        assert scored.facts["normalise"].startswith("basic: ")
        assert scored.facts["jiwer"] == version("jiwer")
        assert scored.facts["audio_seconds"] == pytest.approx(rows.seconds.sum())


@pytest.mark.parametrize(
    ("best", "text_of"),
    [([], []), ([0, 0], []), ([1, 1, 0, 1], [1, 1]), ([2, 2, 3, 3, 0, 0, 3], [2, 3, 3]), ([0, 5], [5])],
)
def test_frames_collapse_to_what_they_spell(best: list[int], text_of: list[int]) -> None:
    assert collapse(np.array(best, int), 0) == text_of


def test_the_end_of_padded_audio_is_not_heard(text: TextTokenizer) -> None:
    runner, rows = writer("wav2vec2")
    inputs = source(rows, np.arange(3), None)
    longer = {name: np.pad(array, ((0, 0), (0, 4000))) for name, array in inputs.items()}
    assert runner.write(longer, 99) == runner.write(inputs, 99)


def test_what_exceeds_an_export_is_cut_before_its_end_mark() -> None:
    rows = tiny.pairs(6)
    short = source(rows, np.arange(6), 5)
    assert short["input_ids"].shape == (6, 5)
    for row, count in enumerate(rows.lengths().tolist()):
        kept = short["input_ids"][row][short["attention_mask"][row] == 1]
        whole = rows.input_ids[row, :count]
        expected = whole if count <= 5 else np.append(whole[:4], 2)
        np.testing.assert_array_equal(kept, expected)
    heard = source(tiny.recordings("wav2vec2", 6), np.arange(6), 100)
    assert heard["input_values"].shape == heard["attention_mask"].shape == (6, 100)


@pytest.mark.parametrize("kind", WRITERS)
def test_parity_with_itself_is_exact_and_with_another_is_not(kind: str, text: TextTokenizer, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    runner, rows = writer(kind)
    parity.write(tmp_path, subject(runner, rows, text, WRITERS[kind], parity_examples=6))
    kept = load_file(tmp_path / parity.FILE)
    count = kept["positions"].sum()
    if kind != "wav2vec2":
        assert count == rows.target_mask[:6].sum()
        assert kept["decoder_ids"][:, 0].tolist() == [runner.model.config.decoder_start_token_id] * 6
    same, note = parity.compare(tmp_path, runner, 0)
    assert note is None
    assert same["parity_error"]["value"] < 1e-5
    assert same["parity_agreement"] == {"value": 1.0, "low": None, "high": None, "n": count}
    other, _ = parity.compare(tmp_path, type(runner)(tiny.writer(kind, seed=5), "cpu"), 0)
    assert other["parity_error"]["value"] > 0.1
    assert other["parity_agreement"]["value"] < 0.9


def test_parity_leaves_out_what_an_export_would_cut(text: TextTokenizer, tmp_path: Path) -> None:
    runner, rows = writer("marian")
    parity.write(tmp_path, subject(runner, rows, text, "translation", parity_examples=12))
    fixed = TorchSeq2Seq(runner.model, "cpu")
    fixed.batch, fixed.length, fixed.target_length = 2, 7, 4  # type: ignore[assignment]
    found, note = parity.compare(tmp_path, fixed, 0)
    fitting = rows.lengths()[:12] <= 7
    assert note == f"parity leaves out {(~fitting).sum()} of 12 examples longer than 7"
    assert found["parity_error"]["value"] < 1e-5
    assert found["parity_agreement"]["n"] == np.minimum(rows.target_mask[:12].sum(1), 4)[fitting].sum()
    fixed.length = 2  # type: ignore[assignment]
    assert parity.compare(tmp_path, fixed, 0) == (
        {},
        "no parity: every reference example is longer than the export's 2",
    )


@pytest.mark.parametrize("kind", WRITERS)
def test_whole_outputs_are_timed_on_the_examples_in_turn(kind: str, text: TextTokenizer) -> None:
    runner, rows = writer(kind)
    written: list[tuple[int, int]] = []
    work = WORK[WRITERS[kind]]
    given = subject(runner, rows, text, WRITERS[kind], generation={"repeats": 3, "new_tokens": 4})
    whole, write = type(runner).write, runner.write

    def watched(inputs: Any, limit: int) -> list[list[int]]:
        found = whole(runner, inputs, limit)
        written.append((len(found), limit))
        return found

    runner.write = watched
    timed = work.latency(given, Shape(5, 9), 7)
    said = (AT_ONCE if kind == "wav2vec2" else WRITING) + (FEATURES if rows.features is not None else "")
    assert (timed.what, len(timed.inputs)) == (said, 7)
    assert timed.inputs[:2] == timed.inputs[5:], "24 examples are 5 calls, the last of which begins again"
    speed.time_calls(timed.calls, warmup=1, repeats=7)
    longest = [rows.target_mask[np.arange(at, at + 5) % 24].sum(1).max() for at in range(0, 24, 5)]
    assert written == [(5, 4 if kind == "wav2vec2" else min(4, longest[at])) for at in (0, 0, 1, 2, 3, 4, 0, 1)]

    written.clear()
    assert work.writing is not None
    found = work.writing(given)
    limits = [4, *[4] * 3] if kind == "wav2vec2" else [4, *[1, 4] * 3]
    assert written == [(1, limit) for limit in limits]
    assert list(found.tokens) == [len(write({**source(rows, np.array([row]), None)}, 4)[0]) for row in range(3)]
    speech = WRITERS[kind] == "speech-recognition"
    assert list(found.audio) == (pytest.approx(rows.seconds[:3].tolist()) if speech else [])
    assert found.what == "3 inputs one after the other, at most 4 tokens from each"
    metrics = found.metrics(resamples=100, confidence=0.9, seed=0)
    assert set(metrics) == {"time_to_first_token", "tokens_per_second"} | ({"real_time_factor"} if speech else set())
    assert metrics["tokens_per_second"]["value"] == pytest.approx(sum(found.tokens) / sum(found.whole))
    assert all(first <= whole for first, whole in zip(found.first, found.whole, strict=True)) or kind != "wav2vec2"


def test_an_export_is_not_credited_with_audio_that_it_cuts(text: TextTokenizer) -> None:
    runner, rows = writer("wav2vec2")
    runner.length = 480
    given = subject(runner, rows, text, "speech-recognition", generation={"repeats": 4})
    writing = WORK["speech-recognition"].writing
    assert writing is not None
    heard = np.minimum(rows.lengths()[:4], 480) / 1000
    assert list(writing(given).audio) == pytest.approx(heard.tolist())


def test_prompts_are_continued_without_an_end(text: TextTokenizer) -> None:
    model = tiny.network("llama")
    with torch.no_grad():
        model.lm_head.weight[2] = 0.0
        model.lm_head.weight[2] += 10 * model.model.norm.weight.mean()  # the end of text is often the likeliest
    runner = TorchRunner(model, "cpu")
    prompt = np.array([5, 6, 7])

    def continued(limit: int) -> list[int]:
        ids = prompt.tolist()
        for _ in range(limit):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[3:]

    expected = continued(12)
    assert runner.generate(prompt, 12, None) == expected
    end = expected[4]
    assert runner.generate(prompt, 12, end) == expected[: expected.index(end)]
    given = subject(
        runner, tiny.language(), text, "text-generation", generation={"prompt": 6, "new_tokens": 5, "repeats": 3}
    )
    writing = WORK["text-generation"].writing
    assert writing is not None
    assert list(writing(given).tokens) == [5, 5, 5]


def test_prompts_leave_room_in_the_positions(text: TextTokenizer) -> None:
    runner = TorchRunner(tiny.network("gpt2"), "cpu")
    given = subject(runner, tiny.language(), text, "text-generation", generation={"prompt": 32, "new_tokens": 32})
    assert runner.positions == 40
    assert room(given) == (20, 20)
    scored = quality.score(given)
    assert len(scored.outputs) == 10
    roomy = TorchRunner(tiny.network("llama"), "cpu")
    assert room(dataclasses.replace(given, runner=roomy)) == (32, 32)


def test_windows_of_a_document_are_averaged(bert: Path, review_data: DataSpec, tmp_path: Path) -> None:
    whole = encode(review_data, "eval", "text-classification", bert, tmp_path)
    document = np.sort(np.random.default_rng(0).integers(0, 12, len(whole))).astype(np.int32)
    labels = (document % 2).astype(np.int32)
    rows = dataclasses.replace(whole, document=document, labels=labels)
    runner, model = TorchRunner(load(bert), "cpu"), load(bert)
    scored = quality.score(subject(runner, rows, open_tokenizer(bert), "text-classification"))
    with torch.no_grad():
        ids, mask = (torch.tensor(np.asarray(part, np.int64)) for part in (rows.input_ids, rows.attention_mask))
        shares = model(ids, attention_mask=mask).logits.double().softmax(1).numpy()
    averaged = np.stack([shares[document == number].mean(0) for number in np.unique(document)])
    np.testing.assert_array_equal(scored.scores["predicted"], averaged.argmax(1))
    np.testing.assert_allclose(scored.scores["probability"], averaged.max(1), atol=1e-6)
    np.testing.assert_array_equal(scored.scores["label"], np.unique(document) % 2)
    assert scored.facts == {"documents": len(averaged)}
    assert scored.outputs[0]["input"].endswith(" …") == ((document == document[0]).sum() > 1)
    assert quality.sample(scored.scores).size == len(averaged)


def test_several_labels_are_decided_one_by_one(tmp_path: Path) -> None:
    folder = support.tiny_model(tmp_path / "model", "bert", "text-classification", labels=3)
    data = support.tiny_data(tmp_path / "data", "text-classification")
    whole = encode(
        data,
        "eval",
        "text-classification",
        support.tiny_model(tmp_path / "two", "bert", "text-classification"),
        tmp_path,
    )
    labels = (np.random.default_rng(1).random((len(whole), 3)) < 0.5).astype(np.uint8)
    rows = dataclasses.replace(whole, labels=labels, label_names=("a", "b", "c"))
    model = load(folder)
    with torch.no_grad():
        model.classifier.bias += torch.tensor([3.0, -3.0, 0.0])
        ids, mask = (torch.tensor(np.asarray(part, np.int64)) for part in (rows.input_ids, rows.attention_mask))
        shares = torch.sigmoid(model(ids, attention_mask=mask).logits).numpy()
    scored = quality.score(subject(TorchRunner(model, "cpu"), rows, open_tokenizer(folder), "text-classification"))
    np.testing.assert_allclose(scored.scores["probability"], shares, atol=1e-5)
    np.testing.assert_array_equal(scored.scores["predicted"], shares > 0.5)
    np.testing.assert_array_equal(scored.scores["correct"], ((shares > 0.5) == labels).all(1))
    assert scored.outputs[0]["output"] in ("a", "a, c")
    assert scored.outputs[0]["expected"] == (", ".join(np.array(["a", "b", "c"])[labels[0] > 0]) or "none")
    metrics = quality.sample(scored.scores).metrics(resamples=100, confidence=0.9, seed=0)
    assert set(metrics) == {"accuracy", "f1", "mcc", "calibration_error"}
    assert all(entry["value"] is not None for entry in metrics.values())
