"""Encoding for translation, speech recognition and long texts to classify, against what transformers makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from specs.schema.base import Task
from specs.schema.pipeline import DataSpec
from tasks.artifacts import Store
from tasks.context import StepError
from tasks.data import encode
from tasks.data.audio import Recording, decoded, resampled
from tasks.data.collate import collate
from tasks.data.encode import Job, label_names, tokenise
from tasks.data.encode.features import open_features
from tasks.data.encode.targets import config_of
from tasks.data.encoded import Encoded
from tasks.data.preflight import preflight
from tasks.data.readers import Split
from tasks.data.tokens import open_tokenizer
from tests.support import tiny_data, write_jsonl


def job_of(data: DataSpec, split: Split, task: Task, model: Path, folder: Path, names: tuple[str, ...] = ()) -> Job:
    return Job(data, split, task, open_tokenizer(model), names, folder)


def rows_of(source: str) -> list[dict]:
    return [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines()]


def of_texts(folder: Path, task: Task, texts: list[str], **fields: object) -> DataSpec:
    """Data whose source and target, or whose text, are ``texts``; every other one has the label 1."""
    rows = [{"text": text, "source": text, "target": text, "label": at % 2} for at, text in enumerate(texts)]
    file = str(write_jsonl(folder / f"{task}.jsonl", rows))
    return DataSpec.model_validate({"train": file, "eval": file, "max_length": 24, **fields})


@pytest.mark.parametrize("family", ["marian", "t5", "bart"])
def test_pairs_are_what_transformers_makes_of_them(tmp_path, request, pair_data, family):
    from tasks.models import load_tokenizer

    model = request.getfixturevalue(family)
    encoded = encode(pair_data, "eval", "translation", model, tmp_path)
    rows = rows_of(pair_data.eval)
    expected = load_tokenizer(model)(
        [row["source"] for row in rows],
        text_target=[row["target"] for row in rows],
        truncation=True,
        max_length=pair_data.max_length,
        padding="max_length",
        return_tensors="np",
    )
    assert np.array_equal(encoded.input_ids, expected["input_ids"])
    assert np.array_equal(encoded.attention_mask, expected["attention_mask"])
    assert encoded.target_ids is not None
    assert encoded.target_mask is not None
    width = encoded.target_ids.shape[1]
    assert np.array_equal(encoded.target_ids, expected["labels"][:, :width])
    assert (expected["labels"][:, width:] == encoded.pad).all()
    last = encoded.target_mask.sum(axis=1) - 1
    assert (encoded.target_ids[np.arange(len(encoded)), last] == config_of(model)["eos_token_id"]).all()
    assert encoded.references == tuple(row["target"] for row in rows)


def test_long_sides_are_cut_with_their_end_mark_and_counted(tmp_path, marian):
    data = of_texts(tmp_path, "translation", ["short", "long " * 40], max_target_length=10)
    encoded = encode(data, "train", "translation", marian, tmp_path / "store")
    assert encoded.target_ids is not None
    assert encoded.input_ids.shape == (2, 24)
    assert encoded.target_ids.shape == (2, 10)
    assert (encoded.input_ids[1, -1], encoded.target_ids[1, -1]) == (2, 2)
    assert encoded.references[1] == "long " * 40
    assert encoded.warnings == (
        "data.train: 1 sources cut at data.max_length",
        "data.train: 1 translations cut at data.max_target_length",
    )
    (entry,) = Store(tmp_path / "store").ls()
    properties = Store(tmp_path / "store").open(entry.key).manifest["properties"]
    assert properties["cut"] == {"sources cut at data.max_length": 1, "translations cut at data.max_target_length": 1}


def test_a_tokenizer_without_an_end_mark_gets_one(tmp_path, llama):
    data = of_texts(tmp_path, "translation", ["a dog", "long " * 40])
    encoded = tokenise(job_of(data, "eval", "translation", llama, tmp_path))
    core = open_tokenizer(llama).core
    assert encoded.target_ids is not None
    assert encoded.target_mask is not None
    assert encoded.target_ids[0][encoded.target_mask[0] == 1].tolist() == [*core.encode("a dog").ids, 2]
    assert encoded.target_ids[1, -1] == 2
    assert encoded.target_mask[1].sum() == 24


def test_a_translator_may_have_another_tokenizer_for_what_it_writes(tmp_path, marian):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    model = tmp_path / "model"
    shutil.copytree(marian, model)
    core = Tokenizer(models.WordLevel({"</s>": 2, "a": 7, "dog": 8, "<unk>": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    core.save(str(model / "target_tokenizer.json"))
    data = of_texts(tmp_path, "translation", ["a dog"])
    here, there = (encode(data, "eval", "translation", folder, tmp_path / "store") for folder in (model, marian))
    assert here.target_ids is not None
    assert here.target_ids.tolist() == [[7, 8, 2]]
    assert np.array_equal(here.input_ids, there.input_ids)
    assert here.target_ids.shape != there.target_ids.shape  # type: ignore[union-attr]


def heard(source: str, rate: int) -> list[np.ndarray]:
    folder = Path(source).parent
    return [resampled(decoded(folder / row["audio"], 30, "x"), rate) for row in rows_of(source)]


def test_log_mel_frames_are_those_of_transformers(tmp_path, whisper, speech_data):
    from transformers import AutoFeatureExtractor

    encoded = encode(speech_data, "eval", "speech-recognition", whisper, tmp_path)
    extractor = AutoFeatureExtractor.from_pretrained(whisper)
    expected = extractor(heard(speech_data.eval, 16_000), sampling_rate=16_000, return_tensors="np")["input_features"]
    batch = collate(encoded, np.arange(len(encoded)))
    assert batch["input_features"].shape == expected.shape == (40, 16, 100)
    assert np.abs(batch["input_features"] - expected).max() < 2e-4
    assert encoded.lengths().max() < 100
    assert isinstance(encoded.features, np.memmap)
    rows = rows_of(speech_data.eval)
    assert encoded.references == tuple(row["text"] for row in rows)
    seconds = [soundfile.info(Path(speech_data.eval).parent / row["audio"]).duration for row in rows]
    assert np.allclose(encoded.seconds, seconds, atol=1e-3)  # type: ignore[arg-type]


def test_audio_that_fills_the_window_ends_like_that_of_transformers(whisper):
    from transformers import AutoFeatureExtractor

    features = open_features(whisper, config_of(whisper))
    extractor = AutoFeatureExtractor.from_pretrained(whisper)
    random = np.random.default_rng(0)
    for count in (1, 100, 15_700, 15_990, 16_000):
        samples = random.normal(size=count).astype(np.float32) * 0.1
        made = features.make(samples)
        expected = extractor(samples, sampling_rate=16_000, return_tensors="np")["input_features"][0].T
        assert len(made) <= 100
        assert np.abs(made - expected[: len(made)]).max() < 2e-4
        assert np.abs(expected[len(made) :] - made[-1]).max(initial=0) < 2e-4


def test_normalised_samples_are_those_of_transformers(tmp_path, wav2vec2, speech_data):
    from transformers import AutoFeatureExtractor

    encoded = encode(speech_data, "eval", "speech-recognition", wav2vec2, tmp_path)
    extractor = AutoFeatureExtractor.from_pretrained(wav2vec2)
    expected = extractor(heard(speech_data.eval, 16_000), sampling_rate=16_000, padding=True, return_tensors="np")
    batch = collate(encoded, np.arange(len(encoded)))
    assert np.allclose(batch["input_values"], expected["input_values"], atol=1e-6)
    assert np.array_equal(batch["attention_mask"], expected["attention_mask"])


def test_random_dither_is_left_out(tmp_path, whisper):
    model = tmp_path / "model"
    shutil.copytree(whisper, model)
    config = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").write_text(json.dumps({**config, "dither": 0.1}))
    samples = np.random.default_rng(0).normal(size=8000).astype(np.float32)
    one, other = (open_features(folder, config_of(whisper)).make(samples) for folder in (model, whisper))
    assert np.array_equal(one, other)


def test_ctc_writes_characters_and_no_end_mark(tmp_path, wav2vec2):
    data = spoken(tmp_path, ["one  two", "naïve"])
    encoded = encode(data, "eval", "speech-recognition", wav2vec2, tmp_path / "store")
    core = open_tokenizer(wav2vec2).core
    assert encoded.target_ids is not None
    assert encoded.target_mask is not None
    written = [ids[mask == 1].tolist() for ids, mask in zip(encoded.target_ids, encoded.target_mask, strict=True)]
    assert [[core.id_to_token(token) for token in ids] for ids in written] == [list("one|two"), list("naïve")]
    assert core.decode(written[0]) == "one two"
    assert encoded.references == ("one  two", "naïve")


def test_whisper_writes_its_prefix_without_the_token_that_it_starts_with(tmp_path, whisper):
    """A tokenizer in the shape of Whisper's own: start, language, task and time marks before the text."""
    from tokenizers import AddedToken, processors

    model = tmp_path / "model"
    shutil.copytree(whisper, model)
    core = open_tokenizer(model).core
    marks = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    core.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    ids = [core.token_to_id(mark) for mark in marks]
    core.post_processor = processors.TemplateProcessing(
        single=f"{' '.join(marks)} $A </s>", special_tokens=[*zip(marks, ids, strict=True), ("</s>", 2)]
    )
    core.save(str(model / "tokenizer.json"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "decoder_start_token_id": ids[0]}))
    encoded = encode(spoken(tmp_path, ["one"]), "eval", "speech-recognition", model, tmp_path / "store")
    text = core.encode("one", add_special_tokens=False).ids
    assert encoded.target_ids is not None
    assert encoded.target_ids.tolist() == [[*ids[1:], *text, 2]]


def spoken(folder: Path, texts: list[str], seconds: float = 0.4, **fields: object) -> DataSpec:
    """Data of beeps that say ``texts``."""
    rate = 16_000
    for number in range(len(texts)):
        wave = 0.5 * np.sin(2 * np.pi * (300 + 40 * number) * np.arange(int(rate * seconds)) / rate)
        soundfile.write(folder / f"{number}.wav", wave, rate)
    rows = [{"audio": f"{number}.wav", "text": text} for number, text in enumerate(texts)]
    file = str(write_jsonl(folder / "spoken.jsonl", rows))
    return DataSpec.model_validate({"train": file, "eval": file, "max_length": 24, "max_duration": 1.0, **fields})


def test_a_transcript_is_never_cut(tmp_path, whisper):
    data = spoken(tmp_path, ["one", "two " * 30])
    with pytest.raises(StepError, match=r"spoken\.jsonl:2: the transcript has \d+ tokens, data\.max_length allows 24"):
        encode(data, "train", "speech-recognition", whisper, tmp_path / "store")
    skipping = data.model_copy(update={"on_bad_row": "skip"})
    encoded = encode(skipping, "train", "speech-recognition", whisper, tmp_path / "store")
    assert len(encoded) == 1
    assert "transcript too long: 1" in encoded.warnings[0]


def test_audio_beyond_the_window_of_the_model_is_told(tmp_path, whisper):
    data = spoken(tmp_path, ["one"], seconds=1.5, max_duration=2.0)
    with pytest.raises(StepError, match=r"spoken\.jsonl:1: 1\.5 s of audio, the model hears 1 s at once"):
        encode(data, "eval", "speech-recognition", whisper, tmp_path / "store")


def test_letters_of_another_alphabet_are_told(tmp_path, wav2vec2):
    with pytest.raises(StepError, match=r"spoken\.jsonl:2: the tokenizer does not know most characters of 'ОДИН'"):
        encode(spoken(tmp_path, ["one", "ОДИН"]), "eval", "speech-recognition", wav2vec2, tmp_path / "store")


def test_a_folder_that_does_not_say_how_it_hears_is_told(tmp_path, whisper, speech_data, marian):
    with pytest.raises(StepError, match=r"has no readable preprocessor_config\.json"):
        encode(speech_data, "eval", "speech-recognition", marian, tmp_path)
    model = tmp_path / "model"
    shutil.copytree(whisper, model)
    (model / "preprocessor_config.json").write_text('{"feature_extractor_type": "WisperFeatureExtractor"}')
    with pytest.raises(StepError, match=r"'WisperFeatureExtractor' are not known; did you mean WhisperFeature"):
        encode(speech_data, "eval", "speech-recognition", model, tmp_path / "store")


def test_encoding_speech_twice_gives_the_same_bytes(tmp_path, whisper, speech_data):
    parts = []
    for name in ("a", "b"):
        encode(speech_data, "eval", "speech-recognition", whisper, tmp_path / name)
        (entry,) = Store(tmp_path / name).ls()
        parts.append(Store(tmp_path / name).open(entry.key).digest)
    assert parts[0] == parts[1]


def test_built_in_recordings_come_at_the_rate_of_the_model(tmp_path, wav2vec2):
    data = DataSpec(train="builtin:tone-digits", eval="builtin:tone-digits", train_limit=4, max_duration=4)
    encoded = encode(data, "train", "speech-recognition", wav2vec2, tmp_path)
    assert encoded.seconds is not None
    assert np.allclose(encoded.lengths() / 16_000, encoded.seconds)
    assert len(encoded) == 4


@pytest.mark.parametrize("overlap", [0, 3, 9])
def test_long_texts_are_split_into_windows_that_share_tokens(tmp_path, bert, overlap):
    """Against the same tokens cut by hand, special tokens around every window."""
    texts = [" ".join(f"word{at}" for at in range(count)) for count in (1, 5, 30)]
    data = of_texts(tmp_path, "text-classification", texts, max_length=12, windows=overlap)
    encoded = tokenise(job_of(data, "eval", "text-classification", bert, tmp_path, ("0", "1")))
    core, room = open_tokenizer(bert).core, 10
    expected, documents = [], []
    for number, text in enumerate(texts):
        ids = core.encode(text, add_special_tokens=False).ids
        starts = range(0, max(1, len(ids) - overlap), room - overlap)
        expected += [[2, *ids[start : start + room], 3] for start in starts]
        documents += [number] * len(starts)
    found = [ids[mask == 1].tolist() for ids, mask in zip(encoded.input_ids, encoded.attention_mask, strict=True)]
    assert found == expected
    assert encoded.document.tolist() == documents
    assert encoded.labels is not None
    assert encoded.labels.tolist() == [number % 2 for number in documents]


def test_windows_that_share_all_their_tokens_are_an_error(tmp_path, bert):
    data = of_texts(tmp_path, "text-classification", ["a", "b"], max_length=12, windows=10)
    with pytest.raises(StepError, match=r"data\.windows 10 leaves no new token in a window of 10"):
        encode(data, "eval", "text-classification", bert, tmp_path / "store")


def counts(data: DataSpec, task: Task, model: Path, folder: Path) -> tuple[Encoded, dict[str, int]]:
    names = label_names(data, model) if task == "text-classification" else ()
    job = job_of(data, "train", task, model, folder, names)
    return tokenise(job), dict(job.filtered)


def test_texts_are_filtered_by_their_tokens_uncut_and_without_special_ones(tmp_path, llama, bert):
    texts = ["x" * count for count in (1, 2, 3, 50, 60)]
    for task, model in (("text-generation", llama), ("text-classification", bert)):
        core = open_tokenizer(model).core
        tokens = [len(core.encode(text, add_special_tokens=False).ids) for text in texts]
        limits = {"min_tokens": tokens[1], "max_tokens": tokens[3]}
        data = of_texts(tmp_path, task, texts, filter=limits)  # type: ignore[arg-type]
        encoded, filtered = counts(data, task, model, tmp_path)  # type: ignore[arg-type]
        assert len(set(encoded.document.tolist())) == 3
        assert filtered == {f"fewer than {tokens[1]} tokens": 1, f"more than {tokens[3]} tokens": 1}
        warning = encoded.warnings[0]
        assert warning.startswith(f"data.train: data.filter left out 2, fewer than {tokens[1]} tokens: 1, more")
        names = ("0", "1") if task == "text-classification" else ()
        whole = tokenise(job_of(data, "eval", task, model, tmp_path, names))  # type: ignore[arg-type]
        assert len(set(whole.document.tolist())) == 5


def test_pairs_are_filtered_by_the_ratio_of_their_sides(tmp_path, marian):
    rows = [{"source": "a" * one, "target": "b" * other} for one, other in ((4, 4), (4, 7), (4, 9), (9, 4))]
    file = str(write_jsonl(tmp_path / "x.jsonl", rows))
    data = DataSpec.model_validate({"train": file, "eval": file, "filter": {"max_ratio": 2}})
    encoded, filtered = counts(data, "translation", marian, tmp_path)
    assert encoded.references == ("bbbb", "bbbbbbb")
    assert filtered == {"one side more than 2 times the other": 2}


def test_recordings_are_filtered_by_their_length(tmp_path, wav2vec2):
    data = spoken(tmp_path, ["one", "two", "three"], filter={"max_duration": 0.5})
    soundfile.write(tmp_path / "1.wav", np.sin(np.arange(10_000)), 16_000)
    encoded, filtered = counts(data, "speech-recognition", wav2vec2, tmp_path)
    assert encoded.references == ("one", "three")
    assert filtered == {"longer than 0.5 s": 1}


def test_a_filter_that_leaves_nothing_is_an_error(tmp_path, marian):
    data = of_texts(tmp_path, "translation", ["a", "b"], filter={"min_tokens": 5})
    with pytest.raises(StepError, match=r"data\.filter leaves nothing, fewer than 5 tokens: 2"):
        encode(data, "train", "translation", marian, tmp_path / "store")


def test_what_was_skipped_is_a_property_and_a_warning(tmp_path, bert):
    file = write_jsonl(tmp_path / "x.jsonl", [{"text": "a", "label": 1}, {"text": "b"}, {"text": "c", "label": 2}])
    other = write_jsonl(tmp_path / "y.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": 3}])
    data = DataSpec(train=str(file), eval=str(other), max_length=8, on_bad_row="skip")
    train = encode(data, "train", "text-classification", bert, tmp_path / "store")
    held_out = encode(data, "eval", "text-classification", bert, tmp_path / "store")
    assert (len(train), len(held_out)) == (2, 1)
    assert train.warnings[0].startswith("data.train: 1 bad row was skipped, no column 'label': 1; ")
    assert "label not in the training data: 1" in held_out.warnings[0]
    store = Store(tmp_path / "store")
    properties = [store.open(entry.key).manifest["properties"] for entry in store.ls()]
    assert {(one["split"], tuple(one["skipped"])) for one in properties} == {
        ("train", ("no column 'label'",)),
        ("eval", ("label not in the training data",)),
    }


def test_an_evaluation_without_any_known_label_is_an_error(tmp_path, bert):
    file = write_jsonl(tmp_path / "x.jsonl", [{"text": "a", "label": 1}, {"text": "c", "label": 2}])
    other = write_jsonl(tmp_path / "y.jsonl", [{"text": "a", "label": 4}])
    data = DataSpec(train=str(file), eval=str(other), max_length=8, on_bad_row="skip")
    with pytest.raises(StepError, match="every record is bad, label not in the training data: 1"):
        encode(data, "eval", "text-classification", bert, tmp_path / "store")


ODD = ["a\0b c", "family 👨‍👩‍👧 🇩🇪", "שלום \u202eעולם مرحبا", "word " * 200_000 + "end"]


def test_odd_texts_can_be_encoded(tmp_path, llama, bert, marian):
    for task, model in (("text-generation", llama), ("text-classification", bert), ("translation", marian)):
        encoded = encode(of_texts(tmp_path, task, ODD), "train", task, model, tmp_path / "store")  # type: ignore[arg-type]
        assert len(set(encoded.document.tolist())) == len(ODD)
        core = open_tokenizer(model).core
        for number, text in enumerate(ODD):
            row = encoded.document.tolist().index(number)
            assert core.decode(encoded.input_ids[row].tolist()).startswith(text[:3])


def test_fingerprints_follow_what_shapes_the_split(tmp_path):
    from tasks.data.fingerprint import fingerprint

    data = tiny_data(tmp_path, "translation")
    changes = {
        "both": [{"max_target_length": 9}, {"on_bad_row": "skip"}, {"max_length": 9}],
        "train": [{"train_limit": 2}, {"filter": data.filter.model_copy(update={"min_tokens": 2})}],
    }
    for kind, updates in changes.items():
        for update in updates:
            changed = data.model_copy(update=update)
            assert fingerprint(data, "train", "translation") != fingerprint(changed, "train", "translation")
            same = fingerprint(data, "eval", "translation") == fingerprint(changed, "eval", "translation")
            assert same == (kind == "train")


def test_samples_of_a_recording_are_kept_at_its_own_rate():
    samples = np.ones(10, np.float32)
    assert resampled(Recording(samples, 8000), 8000) is samples


def several(folder: Path, rows: list[dict], **fields: object) -> DataSpec:
    file = str(write_jsonl(folder / "several.jsonl", rows))
    named = {"label": ["rude", "funny", "short"]}
    return DataSpec.model_validate({"train": file, "eval": file, "max_length": 8, "fields": named, **fields})


SEVERAL = [
    {"text": "a", "rude": 1, "funny": 0, "short": True},
    {"text": "b", "rude": 0, "funny": 0, "short": False},
    {"text": "c", "rude": "1", "funny": "1", "short": 0.0},
]


def test_several_columns_are_several_labels(tmp_path, bert):
    encoded = encode(several(tmp_path, SEVERAL), "train", "text-classification", bert, tmp_path / "store")
    assert encoded.label_names == ("rude", "funny", "short")
    assert encoded.labels is not None
    assert encoded.labels.dtype == np.uint8
    assert encoded.labels.tolist() == [[1, 0, 1], [0, 0, 0], [1, 1, 0]]
    assert collate(encoded, np.array([2, 0]))["labels"].tolist() == [[1, 1, 0], [1, 0, 1]]


def test_several_labels_keep_the_order_of_a_classifier_that_has_them(tmp_path, bert):
    model = tmp_path / "model"
    shutil.copytree(bert, model)
    config = json.loads((model / "config.json").read_text())
    config["id2label"] = {"0": "short", "1": "Rude", "2": "funny"}
    (model / "config.json").write_text(json.dumps(config))
    encoded = encode(several(tmp_path, SEVERAL), "eval", "text-classification", model, tmp_path / "store")
    assert encoded.label_names == ("short", "Rude", "funny")
    assert np.asarray(encoded.labels).tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 1]]


def test_a_value_that_is_neither_0_nor_1_is_bad(tmp_path, bert):
    rows = [*SEVERAL, {"text": "d", "rude": 2, "funny": 0, "short": 0}, {"text": "e", "rude": 1, "funny": 0}]
    with pytest.raises(StepError, match=r"several\.jsonl:4: column 'rude' is 2; one of several labels is 0 or 1"):
        preflight(several(tmp_path, rows), "text-classification")
    seen = preflight(several(tmp_path, rows, on_bad_row="skip"), "text-classification")["train"]
    assert dict(seen.skipped) == {"neither 0 nor 1": 1, "no column 'short'": 1}
    assert dict(seen.labels) == {"funny": 1, "rude": 2, "short": 1}
    assert seen.columns == ("text", "rude", "funny", "short")
    assert seen.examples[0]["label"] == "rude, short"
