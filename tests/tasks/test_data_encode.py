"""Encoding: windows, bytes that scored tokens cover, labels, and one artifact for one recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from specs.schema.base import Task
from specs.schema.pipeline import DataSpec
from tasks.artifacts import Store
from tasks.context import StepError
from tasks.data import encode, fingerprint, open_encoded
from tasks.data.encode import Job, label_names, tokenise
from tasks.data.encoded import FILE, Encoded
from tasks.data.labels import agree, model_labels, numbers_of, ordered
from tasks.data.readers import Split
from tasks.data.tokens import open_tokenizer
from tests.support import tiny_data, tiny_model, tiny_text, tiny_tokenizer, write_jsonl

UNICODE = ["naïve café, 東京と🙂 mixed with plain words " * 3, "short", "  spaces \n\n and lines\t"]


def text_spec(folder: Path, texts: list[str], max_length: int) -> DataSpec:
    file = write_jsonl(folder / "texts.jsonl", [{"text": text} for text in texts])
    return DataSpec(train=str(file), eval=str(file), max_length=max_length)


def tokenised(
    data: DataSpec, split: Split, task: Task, model: Path, names: tuple[str, ...] = (), work: Path | None = None
) -> Encoded:
    return tokenise(Job(data, split, task, open_tokenizer(model), names, work or model))


def byte_level_bytes(tokenizer: Path) -> list[bytes]:
    """For every id the bytes that it stands for, by GPT-2's table of printable bytes; none for special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    described = json.loads((tokenizer / "tokenizer.json").read_text())
    special = {entry["id"] for entry in described["added_tokens"]}
    by_id = sorted(described["model"]["vocab"].items(), key=lambda entry: entry[1])
    return [b"" if number in special else bytes(byte_of[c] for c in token) for token, number in by_id]


@pytest.mark.parametrize("max_length", [5, 16, 1000])
def test_text_bytes_are_those_of_the_scored_tokens(tmp_path, max_length):
    """Against a reference that spells every token out, on text whose characters are split over windows."""
    folder = tiny_tokenizer(tmp_path / "tokenizer", "llama")
    encoded = tokenised(text_spec(tmp_path, UNICODE, max_length), "eval", "text-generation", folder)
    spelled = byte_level_bytes(folder)
    for row in range(len(encoded)):
        tokens = encoded.input_ids[row][encoded.attention_mask[row] == 1]
        assert encoded.text_bytes[row] == sum(len(spelled[token]) for token in tokens[1:])
    for number, text in enumerate(UNICODE):
        rows = encoded.document == number
        tokens = encoded.input_ids[rows][encoded.attention_mask[rows] == 1]
        assert b"".join(spelled[token] for token in tokens) == text.encode()
    if max_length == 1000:
        assert encoded.text_bytes.tolist() == [len(text.encode()) for text in UNICODE]


def test_text_bytes_follow_from_offsets_where_tokens_are_not_bytes(tmp_path):
    """A WordPiece tokenizer that lowers case and drops accents; the bytes are those of the text as it stands."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    core = Tokenizer(models.WordPiece({"[UNK]": 0, "naive": 1, "cafe": 2, "lat": 3, "##te": 4}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.save(str(tmp_path / "tokenizer.json"))
    spec = text_spec(tmp_path, ["Naïve  CAFÉ latte 東"], 3)
    encoded = tokenised(spec, "eval", "text-generation", tmp_path)
    assert encoded.input_ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert encoded.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert encoded.text_bytes.tolist() == [len("  CAFÉ lat".encode()), len(" 東".encode())]


def test_windows_keep_every_token_and_cross_no_document(tmp_path):
    folder = tiny_tokenizer(tmp_path / "tokenizer", "llama")
    texts = tiny_text(6)
    encoded = tokenised(text_spec(tmp_path, texts, 16), "train", "text-generation", folder)
    core = open_tokenizer(folder).core
    for number, text in enumerate(texts):
        whole = [1, *core.encode(text, add_special_tokens=False).ids, 2]
        windows = [whole[start : start + 16] for start in range(0, len(whole), 16)]
        rows = np.flatnonzero(encoded.document == number)
        kept = [encoded.input_ids[row][encoded.attention_mask[row] == 1].tolist() for row in rows]
        assert kept == [window for window in windows if len(window) > 1]
    assert encoded.input_ids[encoded.attention_mask == 0].max(initial=0) == 0
    assert (np.diff(encoded.attention_mask.astype(int), axis=1) <= 0).all()


def test_a_saved_truncation_or_padding_of_the_tokenizer_does_not_count(tmp_path):
    folder = tiny_tokenizer(tmp_path / "tokenizer", "llama")
    spec = text_spec(tmp_path, tiny_text(4), 16)
    expected = tokenised(spec, "eval", "text-generation", folder)
    core = open_tokenizer(folder).core
    core.enable_truncation(4)
    core.enable_padding(length=64)
    core.save(str(folder / "tokenizer.json"))
    again = tokenised(spec, "eval", "text-generation", folder)
    assert np.array_equal(expected.input_ids, again.input_ids)


def test_classification_equals_what_transformers_makes_of_it(bert, review_data):
    from tasks.models import load_tokenizer

    names = label_names(review_data, bert)
    encoded = tokenised(review_data, "eval", "text-classification", bert, names)
    rows = [json.loads(line) for line in Path(review_data.eval).read_text().splitlines()]
    expected = load_tokenizer(bert)(
        [row["text"] for row in rows], truncation=True, max_length=32, padding="max_length", return_tensors="np"
    )
    assert np.array_equal(encoded.input_ids, expected["input_ids"])
    assert np.array_equal(encoded.attention_mask, expected["attention_mask"])
    assert encoded.labels is not None
    assert [encoded.label_names[label] for label in encoded.labels] == [row["label"] for row in rows]


def test_labels_are_ordered_by_number_or_name():
    assert ordered(["10", "9", "-1"]) == ("-1", "9", "10")
    assert ordered(["b", "10", "a"]) == ("10", "a", "b")


@pytest.mark.parametrize(
    ("found", "of_model", "names", "numbers"),
    [
        (("negative", "positive"), ("POSITIVE", "NEGATIVE"), ("POSITIVE", "NEGATIVE"), [1, 0]),
        (("0", "1"), ("NEGATIVE", "POSITIVE"), ("NEGATIVE", "POSITIVE"), [0, 1]),
        (("a", "b"), ("LABEL_0", "LABEL_1"), ("a", "b"), [0, 1]),
        (("a", "b"), ("x", "y"), None, None),
        (("a", "b"), ("a", "b", "c"), None, None),
        (("0", "1"), ("1", "0"), ("1", "0"), [1, 0]),
        (("a", "b"), None, None, None),
        (("Pos", "pos"), ("Pos", "pos"), ("Pos", "pos"), [0, 1]),
        (("Neg", "Pos", "pos"), ("neg", "pos"), None, None),
    ],
)
def test_labels_agree_with_those_of_a_classifier(found, of_model, names, numbers):
    assert agree(found, of_model) == names
    if names is not None:
        assert list(numbers_of(found, names).values()) == numbers


def test_labels_that_differ_in_case_alone_stay_apart():
    assert numbers_of(("Pos", "pos"), ("Pos", "pos")) == {"Pos": 0, "pos": 1}


def test_texts_that_are_cut_are_counted(tmp_path):
    model = tiny_model(tmp_path / "model", "bert", "text-classification")
    data = tiny_data(tmp_path, "text-classification").model_copy(update={"max_length": 3})
    cut = encode(data, "train", "text-classification", model, tmp_path / "store").warnings
    assert any("texts cut at data.max_length" in text for text in cut)
    windowed = data.model_copy(update={"windows": 0})
    assert encode(windowed, "train", "text-classification", model, tmp_path / "store").warnings == ()


def test_only_a_classifier_has_labels():
    config = {"architectures": ["BertForSequenceClassification"], "id2label": {"1": "b", "0": "a", "10": "c"}}
    assert model_labels(config) == ("a", "b", "c")
    assert model_labels({**config, "architectures": ["BertModel"]}) is None


def test_the_order_of_a_classifier_is_kept_when_encoding(tmp_path):
    data = tiny_data(tmp_path, "text-classification")
    model = tiny_model(tmp_path / "model", "bert", "text-classification")
    config = json.loads((model / "config.json").read_text())
    config["id2label"] = {"0": "Positive", "1": "Negative"}
    (model / "config.json").write_text(json.dumps(config))
    encoded = encode(data, "eval", "text-classification", model, tmp_path / "store")
    first = json.loads(Path(data.eval).read_text().splitlines()[0])["label"]
    assert encoded.label_names == ("Positive", "Negative")
    assert encoded.labels is not None
    assert encoded.labels[0] == ["positive", "negative"].index(first)


def test_a_label_unseen_in_training_is_an_error(tmp_path, bert):
    train = write_jsonl(tmp_path / "train.jsonl", [{"text": "x", "label": label} for label in ("good", "bad")])
    other = write_jsonl(tmp_path / "eval.jsonl", [{"text": "x", "label": "god"}])
    spec = DataSpec(train=str(train), eval=str(other), max_length=8)
    with pytest.raises(StepError, match=r"eval\.jsonl:1: label 'god' is not among .*did you mean good\?"):
        encode(spec, "eval", "text-classification", bert, tmp_path / "store")


def test_one_label_alone_is_an_error(tmp_path, bert):
    train = write_jsonl(tmp_path / "train.jsonl", [{"text": "x", "label": "good"}] * 3)
    with pytest.raises(StepError, match="has the label 'good' alone"):
        label_names(DataSpec(train=str(train), eval=str(train)), bert)


def test_a_length_without_room_is_an_error(tmp_path, bert, llama):
    data = tiny_data(tmp_path, "text-classification", max_length=2)
    with pytest.raises(StepError, match="max_length 2 leaves no room for text beside 2 special tokens"):
        encode(data, "train", "text-classification", bert, tmp_path / "store")
    with pytest.raises(StepError, match="a window needs two tokens"):
        encode(text_spec(tmp_path, ["a text"], 1), "train", "text-generation", llama, tmp_path / "store")


def test_encoding_is_kept_mapped_and_made_once(tmp_path, llama, text_data):
    first = encode(text_data, "eval", "text-generation", llama, tmp_path)
    second = encode(text_data, "eval", "text-generation", llama, tmp_path)
    assert isinstance(second.input_ids, np.memmap)
    assert not second.input_ids.flags.writeable
    assert np.array_equal(first.input_ids, second.input_ids)
    (entry,) = Store(tmp_path).ls()
    assert entry.kind == "data"
    reopened = open_encoded(Store(tmp_path).open(entry.key).path)
    assert np.array_equal(reopened.text_bytes, second.text_bytes)
    encode(text_data.model_copy(update={"max_length": 16}), "eval", "text-generation", llama, tmp_path)
    assert len(Store(tmp_path).ls()) == 2


def test_a_tokenizer_of_links_as_in_the_hubs_cache_is_the_one_behind_them(tmp_path, llama, text_data):
    links = tmp_path / "snapshot"
    links.mkdir()
    for file in llama.iterdir():
        (links / file.name).symlink_to(file)
    for folder in (llama, links):
        encode(text_data, "eval", "text-generation", folder, tmp_path / "store")
    assert len(Store(tmp_path / "store").ls()) == 1


def test_reading_encoded_data_needs_neither_torch_nor_transformers(tmp_path, llama, text_data):
    encode(text_data, "eval", "text-generation", llama, tmp_path)
    (entry,) = Store(tmp_path).ls()
    code = (
        "import sys; from pathlib import Path; from tasks.data.encoded import open_encoded; "
        f"print(len(open_encoded(Path({str(Store(tmp_path).open(entry.key).path)!r})))); "
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_two_processes_that_encode_the_same_agree(tmp_path, llama, text_data):
    code = (
        "from pathlib import Path; from specs.schema.pipeline import DataSpec; from tasks.data import encode; "
        f"data = DataSpec.model_validate_json({text_data.model_dump_json()!r}); "
        f"made = encode(data, 'train', 'text-generation', Path({str(llama)!r}), Path({str(tmp_path)!r})); "
        "print(made.input_ids.sum())"
    )
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = {process.communicate(timeout=120)[0] for process in running}
    assert len(sums) == 1
    assert sums.pop().strip()
    assert len(Store(tmp_path).ls()) == 1


def test_damaged_encoded_data_is_told(tmp_path):
    (tmp_path / FILE).write_bytes(b"\xff" * 64)
    with pytest.raises(StepError, match="missing or damaged"):
        open_encoded(tmp_path)


def test_fingerprints_follow_the_content_and_not_the_place(tmp_path):
    here, there = (tiny_data(tmp_path / name, "text-generation") for name in ("here", "there"))
    before = fingerprint(here, "train", "text-generation")
    assert before == fingerprint(there, "train", "text-generation")
    assert before != fingerprint(here, "eval", "text-generation")
    assert before != fingerprint(here.model_copy(update={"train_limit": 3}), "train", "text-generation")
    with Path(here.train).open("a") as stream:
        stream.write('{"text": "one more"}\n')
    assert before != fingerprint(here, "train", "text-generation")
    assert fingerprint(here, "eval", "text-generation") == fingerprint(there, "eval", "text-generation")


def test_fingerprints_of_built_in_corpora_tell_the_splits_apart():
    data = DataSpec(train="builtin:reviews", eval="builtin:reviews")
    assert fingerprint(data, "train", "text-generation") != fingerprint(data, "eval", "text-generation")
