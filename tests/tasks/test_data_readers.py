"""Readers: every format gives the same records, and every mistake is told with its place and remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specs.schema.load import load
from specs.schema.pipeline import DataSpec, FieldsSpec
from tasks.context import StepError
from tasks.data.bad_rows import BadRows
from tasks.data.preflight import overview, preflight
from tasks.data.readers import records
from tests.specs.writing import GOOD, write
from tests.support import write_jsonl

ROWS = [
    {"text": "a fine film", "label": "good"},
    {"text": 'he said "naïve", twice', "label": "bad"},
    {"text": "l'été, the summer", "label": "good"},
]


def jsonl(folder: Path) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return file


def csv(folder: Path) -> Path:
    import csv as library

    file = folder / "rows.csv"
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = library.DictWriter(stream, ["text", "label"])
        writer.writeheader()
        writer.writerows(ROWS)
    return file


def tsv(folder: Path) -> Path:
    file = folder / "rows.tsv"
    lines = ["text\tlabel", *(f"{row['text']}\t{row['label']}" for row in ROWS)]
    file.write_text("\r\n".join(lines), encoding="utf-8", newline="")
    return file


def parquet(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), file)
    return file


def data(train: object, **fields: object) -> DataSpec:
    return DataSpec.model_validate({"train": str(train), "eval": str(train), **fields})


def read(train: object, task: str = "text-classification", **fields: object) -> list[tuple[str, str | None]]:
    return [(record.text, record.label) for record in records(data(train, **fields), "train", task)]  # type: ignore[arg-type]


@pytest.mark.parametrize("write", [jsonl, csv, tsv, parquet])
def test_every_format_gives_the_same_records(tmp_path, write):
    assert read(write(tmp_path)) == [(row["text"], row["label"]) for row in ROWS]


def test_a_text_file_is_one_document_with_its_line_ends(tmp_path):
    (tmp_path / "one.txt").write_bytes(b"first\r\nsecond\n")
    assert read(tmp_path / "one.txt", "text-generation") == [("first\r\nsecond\n", None)]


def test_folder_and_glob_give_their_files_in_order_and_leave_hidden_ones(tmp_path):
    for name in ("b.txt", "a.txt", ".hidden.txt", "sub/c.txt", "readme.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    expected = [(f"text of {name}", None) for name in ("a.txt", "b.txt", "sub/c.txt")]
    assert read(tmp_path, "text-generation") == expected
    assert read(tmp_path / "[ab].txt", "text-generation") == expected[:2]


def test_other_column_names(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"sentence": "fine", "y": 1}\n')
    assert read(file, fields=FieldsSpec(text="sentence", label="y")) == [("fine", "1")]


def test_a_csv_field_may_hold_line_ends_and_the_next_record_keeps_its_line_number(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text('text,label\n"two\nlines",a\nlast,\n')
    with pytest.raises(StepError, match=r"x\.csv:4: column 'label' has no label"):
        read(file)
    file.write_text('text,label\n"two\nlines",a\nlast,b\n')
    assert read(file) == [("two\nlines", "a"), ("last", "b")]


def test_limits_take_the_first_records(tmp_path):
    file = jsonl(tmp_path)
    spec = data(file, train_limit=2, eval_limit=1)
    assert len(list(records(spec, "train", "text-classification"))) == 2
    assert [record.text for record in records(spec, "eval", "text-classification")] == ["a fine film"]


def test_numbers_and_truth_values_are_labels(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 2.0}\n{"text": "c", "label": true}\n')
    assert [label for _, label in read(file)] == ["1", "2", "1"]


def test_blank_documents_are_passed_over_in_text_generation(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": ""}\n\n{"text": "kept"}\n')
    assert read(file, "text-generation") == [("kept", None)]


MISTAKES = {
    "broken JSON": ('{"text": "a", "label": 1}\n{"text": \n', r"x\.jsonl:2: broken JSON"),
    "an array of records": ('[\n{"text": "a"}\n]', r"x\.jsonl:1: .*one record a line"),
    "a record that is none": ('"text"\n', r"x\.jsonl:1: 'text' is not a record"),
    "a missing column": (
        '{"txt": "a", "label": 1}\n',
        r"x\.jsonl:1: no column 'text'; did you mean txt\? .*fields\.text",
    ),
    "an empty text": ('{"text": " ", "label": 1}\n', r"x\.jsonl:1: column 'text' is empty"),
    "a text that is none": ('{"text": 5, "label": 1}\n', r"x\.jsonl:1: column 'text' is 5, not text"),
    "no label": ('{"text": "a", "label": null}\n', r"x\.jsonl:1: column 'label' has no label"),
    "a list as a label": ('{"text": "a", "label": [1]}\n', r"x\.jsonl:1: column 'label' is \[1\]"),
    "half a label": ('{"text": "a", "label": 0.5}\n', r"x\.jsonl:1: column 'label' is 0\.5"),
    "half a surrogate pair": ('{"text": "a\\ud800", "label": 1}\n', r"x\.jsonl:1: .*surrogate pair at character 1"),
    "an empty file": ("", r"data\.train: .*x\.jsonl holds no record"),
    "deep nesting": ("[" * 100_000 + "\n", r"x\.jsonl:1: broken JSON"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_jsonl_are_told_with_their_line(tmp_path, name):
    content, message = MISTAKES[name]
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(StepError, match=message):
        read(tmp_path / "x.jsonl")


def test_bytes_that_are_not_utf8_are_told_with_their_line(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a", "label": 1}\n{"text": "\xff", "label": 1}\n')
    with pytest.raises(StepError, match=r"x\.jsonl:2: not UTF-8"):
        read(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na\n", r"x\.csv:2: 1 values for 2 columns \(text, label\)"),
        ("text,text\na,b\n", r"x\.csv:1: column 'text' stands twice"),
        ('text,label\n"a" b,c\n', r"x\.csv:2: broken CSV"),
        ("Text,label\na,b\n", r"x\.csv:2: no column 'text'; did you mean Text\?"),
    ],
)
def test_mistakes_in_csv(tmp_path, content, message):
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(StepError, match=message):
        read(tmp_path / "x.csv")


def test_mistakes_in_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(StepError, match=r"x\.parquet: not a readable parquet file"):
        read(tmp_path / "x.parquet")
    pq.write_table(pa.table({"texts": ["a"], "label": [1]}), tmp_path / "y.parquet")
    with pytest.raises(StepError, match=r"y\.parquet row 1: no column 'text'; did you mean texts\?"):
        read(tmp_path / "y.parquet")


def test_paths_that_lead_nowhere(tmp_path):
    jsonl(tmp_path)
    with pytest.raises(StepError, match=r"row\.jsonl: no such file; did you mean rows\.jsonl\?"):
        read(tmp_path / "row.jsonl")
    with pytest.raises(StepError, match="no file matches"):
        read(tmp_path / "*.csv")
    (tmp_path / "x.docx").write_text("x")
    with pytest.raises(StepError, match=r"format \.docx cannot be read; write \.jsonl"):
        read(tmp_path / "x.docx")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StepError, match="holds no data file"):
        read(tmp_path / "empty")


def test_text_without_labels_cannot_be_classified(tmp_path):
    (tmp_path / "x.txt").write_text("a text")
    with pytest.raises(StepError, match=r"x\.txt: plain text has no labels"):
        read(tmp_path / "x.txt")
    with pytest.raises(StepError, match="has no labels; for text-classification use builtin:reviews"):
        read("builtin:python-docs")


def test_hub_sources_are_checked_and_offline_is_obeyed():
    with pytest.raises(StepError, match="names no data set of the hub"):
        read("hub:a/b/c/d")
    with pytest.raises(StepError, match="HF_HUB_OFFLINE is set"):
        read("hub:no-such-org/no-such-name:train")


def test_preflight_counts_what_is_there(tmp_path):
    file = jsonl(tmp_path)
    seen = preflight(data(file), "text-classification")["train"]
    assert (seen.records, seen.complete, dict(seen.labels)) == (3, True, {"bad": 1, "good": 2})
    assert seen.bytes == file.stat().st_size
    assert seen.examples[0] == {"text": "a fine film", "label": "good"}


def test_preflight_finds_a_label_that_training_lacks(tmp_path):
    (tmp_path / "eval.jsonl").write_text('{"text": "a", "label": "god"}\n')
    spec = DataSpec(train=str(jsonl(tmp_path)), eval=str(tmp_path / "eval.jsonl"))
    with pytest.raises(StepError, match=r"eval\.jsonl:1: label 'god' is not among .*did you mean good\?"):
        preflight(spec, "text-classification")


PAIRS = [("Two men.", "Zwei Männer."), ('"One" dog, here', "Ein Hund, hier"), ("a\u2028b", "c\x85d")]


def pairs(source: object, **fields: object) -> list[tuple[str, str | None]]:
    spec = data(source, **fields)
    return [(record.text, record.target) for record in records(spec, "train", "translation")]


def parallel(folder: Path, source: str, target: str) -> str:
    (folder / "train.en").write_bytes(source.encode())
    (folder / "train.de").write_bytes(target.encode())
    return str(folder / "train.{en,de}")


def pair_jsonl(folder: Path) -> Path:
    return write_jsonl(folder / "pairs.jsonl", [{"source": source, "target": target} for source, target in PAIRS])


def pair_tsv(folder: Path) -> Path:
    lines = ["source\ttarget", *(f"{source}\t{target}" for source, target in PAIRS)]
    (folder / "pairs.tsv").write_text("\n".join(lines), encoding="utf-8")
    return folder / "pairs.tsv"


def pair_csv(folder: Path) -> Path:
    import csv as library

    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as stream:
        library.writer(stream).writerows([("source", "target"), *PAIRS])
    return folder / "pairs.csv"


def pair_parquet(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"source": source, "target": target} for source, target in PAIRS]
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    return folder / "pairs.parquet"


def pair_files(folder: Path) -> str:
    return parallel(folder, "\n".join(one for one, _ in PAIRS), "\r\n".join(other for _, other in PAIRS) + "\r\n")


@pytest.mark.parametrize("make", [pair_jsonl, pair_tsv, pair_csv, pair_parquet, pair_files])
def test_every_format_gives_the_same_pairs(tmp_path, make):
    """A line ends where the file says, not at every character that Unicode calls a separator."""
    assert pairs(make(tmp_path)) == PAIRS


def test_other_columns_hold_the_pair(tmp_path):
    file = write_jsonl(tmp_path / "x.jsonl", [{"en": "one", "de": "eins"}])
    assert pairs(file, fields={"source": "de", "target": "en"}) == [("eins", "one")]


def test_parallel_files_of_unequal_length_are_told_with_both_counts(tmp_path):
    source = parallel(tmp_path, "a\nb\nc\n", "x\ny")
    with pytest.raises(StepError, match=r"train\.en:3: .* partner.*train\.en has 3 lines and .*train\.de has 2"):
        pairs(source, train_limit=1, on_bad_row="skip")


def test_parallel_files_must_both_be_there(tmp_path):
    parallel(tmp_path, "a", "b")
    with pytest.raises(StepError, match=r"train\.fr: no such file; .* two parallel files"):
        pairs(tmp_path / "train.{en,fr}")
    with pytest.raises(StepError, match=r"no such file"):
        pairs(tmp_path / "train.{en,de,fr}")


def test_parallel_files_are_for_translation(tmp_path):
    source = parallel(tmp_path, "a", "b")
    with pytest.raises(StepError, match="two parallel files are for translation"):
        read(source, "text-generation")


def test_a_pair_with_one_empty_side_is_bad_and_one_with_two_is_none(tmp_path):
    source = parallel(tmp_path, "a\n\nb\nc\n", "x\n\n \nz\n")
    with pytest.raises(StepError, match=r"train\.en:3: column 'target' is empty"):
        pairs(source)
    assert pairs(source, on_bad_row="skip") == [("a", "x"), ("c", "z")]


def test_plain_text_holds_no_pairs(tmp_path):
    (tmp_path / "x.txt").write_text("a text")
    with pytest.raises(StepError, match=r"x\.txt: plain text has no labels, pairs or audio; .* source, target"):
        pairs(tmp_path / "x.txt")


def test_parallel_files_are_relative_to_the_spec_and_from_the_command_line_to_the_folder(tmp_path, monkeypatch):
    specs, here = tmp_path / "specs", tmp_path / "here"
    specs.mkdir()
    here.mkdir()
    parallel(here, "a", "b")
    monkeypatch.chdir(here)
    path = write(specs, GOOD.replace("./train.jsonl", '"./train.{en,de}"'))
    assert load(path).spec.data.train == str(specs / "train.{en,de}")
    assert load(path, ["data.train=./train.{en,de}"]).spec.data.train == str(here / "train.{en,de}")
    assert load(path, ["data.train=./*.de"]).spec.data.train == str(here / "*.de")
    assert load(path, ["data.train=./train.{en,fr}"]).spec.data.train == str(specs / "train.{en,fr}")


ODD = {
    "NUL": "a\0b",
    "emoji": "family 👨‍👩‍👧 flag 🇩🇪",
    "right to left": "שלום \u202eעולם مرحبا",
    "a megabyte on one line": "word " * 200_000 + "end",
    "combining": "e\u0301" * 5,
}


@pytest.mark.parametrize("name", ODD)
def test_odd_texts_come_through_every_format(tmp_path, name):
    text = ODD[name]
    (tmp_path / "x.tsv").write_text(f"source\ttarget\n{text}\tx\n", encoding="utf-8")
    (tmp_path / "x.csv").write_text(f'source,target\n"{text}",x\n', encoding="utf-8")
    written = write_jsonl(tmp_path / "x.jsonl", [{"source": text, "target": "x"}])
    for source in (written, tmp_path / "x.tsv", tmp_path / "x.csv", parallel(tmp_path, text, "x")):
        assert pairs(source) == [(text, "x")]


GOOD_ROW = '{"text": "fine", "label": 1}\n'


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('{"text": \n', "broken JSON"),
        ("[1]\n", "not a record"),
        ('{"label": 1}\n', "no column 'text'"),
        ('{"text": 5, "label": 1}\n', "not text"),
        ('{"text": " ", "label": 1}\n', "empty text"),
        ('{"text": "a"}\n', "no column 'label'"),
        ('{"text": "a", "label": null}\n', "no label"),
        ('{"text": "a", "label": [1]}\n', "not a label"),
        ('{"text": "\\ud800", "label": 1}\n', "half a surrogate pair"),
        ('{"text": "a", "label": "\\ud800"}\n', "half a surrogate pair"),
        ("\xff\n", "not UTF-8"),
    ],
)
def test_bad_rows_are_skipped_and_counted(tmp_path, bad, reason):
    file = tmp_path / "x.jsonl"
    file.write_bytes((GOOD_ROW + bad + GOOD_ROW).encode("latin-1"))
    rows = BadRows("skip")
    assert len(list(records(data(file, on_bad_row="skip"), "train", "text-classification", rows))) == 2
    assert dict(rows.counts) == {reason: 1}
    assert f"{file}:2: " in rows.first
    with pytest.raises(StepError, match=r"x\.jsonl:2: "):
        read(file)


def test_bad_rows_of_csv_are_skipped_and_the_rest_keeps_its_numbers(tmp_path):
    file = tmp_path / "x.csv"
    file.write_bytes(b'text,label\na,1\n"x" y,1\nshort\nb\xff,1\n"two\nlines",2\n,1\n')
    rows = BadRows("skip")
    spec = data(file, on_bad_row="skip")
    found = [(record.text, record.place) for record in records(spec, "train", "text-classification", rows)]
    assert found == [("a", f"{file}:2"), ("two\nlines", f"{file}:6")]
    assert dict(rows.counts) == {"broken CSV": 1, "too few or many values": 1, "not UTF-8": 1, "empty text": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b'text,label\na,1\n"open,1\nb,2\n', r"x\.csv:3: broken CSV: .*no end"),
        ("x.txt", b"caf\xe9", r"x\.txt:1: not UTF-8"),
        ("x.jsonl", "{}".encode("utf-16"), r"x\.jsonl:1: not UTF-8 but UTF-16"),
        ("x.parquet", b"PAR1", r"not a readable parquet file"),
        ("x.jsonl", b"", r"holds no record"),
        ("y.csv", b"text,label\n", r"holds no record"),
        ("z.csv", b"", r"holds no record"),
    ],
)
def test_a_file_that_cannot_be_read_stops_in_any_case(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    task = "text-generation" if name.endswith("txt") else "text-classification"
    with pytest.raises(StepError, match=message):
        read(tmp_path / name, task, on_bad_row="skip")


def test_a_missing_column_leaves_nothing_and_says_why(tmp_path):
    file = write_jsonl(tmp_path / "x.jsonl", [{"txt": "a", "label": 1}] * 3)
    with pytest.raises(StepError, match=r"every record is bad, no column 'text': 3; .*did you mean txt\?"):
        read(file, on_bad_row="skip")


def test_limits_count_good_records(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text(GOOD_ROW + "broken\n" + GOOD_ROW * 2)
    assert len(read(file, on_bad_row="skip", train_limit=2)) == 2


def test_preflight_counts_and_tells_what_was_skipped(tmp_path):
    (tmp_path / "x.jsonl").write_text(GOOD_ROW + "broken\n" + GOOD_ROW.replace("1", "2"))
    (tmp_path / "eval.jsonl").write_text('{"text": "new", "label": 1}\n{"text": "other", "label": 7}\n')
    spec = DataSpec(train=str(tmp_path / "x.jsonl"), eval=str(tmp_path / "eval.jsonl"), on_bad_row="skip")
    seen = preflight(spec, "text-classification")
    assert (seen["train"].records, dict(seen["train"].skipped)) == (2, {"broken JSON": 1})
    assert (seen["eval"].records, dict(seen["eval"].skipped)) == (1, {"label not in the training data": 1})
    assert seen["train"].warnings[0].startswith("data.train: 1 bad row was skipped, broken JSON: 1; ")
    assert "eval.jsonl:2" in seen["eval"].warnings[0]


@pytest.mark.parametrize(("task", "role"), [("text-generation", "text"), ("translation", "source")])
def test_a_leak_is_told_with_its_size_and_first_place(tmp_path, task, role):
    def rows(*texts: str) -> list[dict]:
        return [{role: text, "target": f"{number}"} for number, text in enumerate(texts)]

    spec = DataSpec(
        train=str(write_jsonl(tmp_path / "t.jsonl", rows("One  man", "two men", "two men", "Two men ", "four"))),
        eval=str(write_jsonl(tmp_path / "e.jsonl", rows("none", "one man", "four", "ones man"))),
    )
    for look in (preflight, overview):
        seen = look(spec, task)
        assert (seen["train"].repeated, seen["train"].repeated_alike) == (1, 2)
        assert (seen["eval"].in_train, seen["eval"].in_train_alike) == (1, 2)
        assert not seen["train"].warnings
        (warning,) = seen["eval"].warnings
        assert warning.startswith("data.eval: 2 of 4 records stand in data.train too (1 exactly, the first at ")
        assert "e.jsonl:2" in warning


def test_no_leak_no_warning():
    spec = DataSpec(train="builtin:toy-language", eval="builtin:toy-language")
    assert not preflight(spec, "translation")["eval"].warnings


def test_overview_measures_lengths(tmp_path):
    texts = [" ".join(["ab"] * count) for count in range(1, 101)]
    file = write_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in texts])
    words, characters = overview(data(file), "text-generation")["train"].lengths
    assert (words.what, words.unit) == ("text", "words")
    assert (words.min, words.p50, words.p90, words.p99, words.max) == (1, 50, 90, 99, 100)
    assert (characters.unit, characters.min, characters.max) == ("characters", 2, 299)
