"""`lathe data`: what it counts and shows, for every task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows import cli
from flows.terminal import ExitCode
from specs.schema.base import TASKS, Task
from tests import support

MODELS = {
    "text-generation": "llama",
    "text-classification": "bert",
    "translation": "marian",
    "speech-recognition": "wav2vec2",
}


def lathe(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    assert isinstance(ended.value.code, int)
    return int(ended.value.code)


def spec(folder: Path, task: Task, data: dict[str, Any], model: str = "") -> Path:
    source = f"{{source: {model}}}" if model else f"{{config: {{model_type: {MODELS[task]}}}}}"
    lines = [
        "name: look",
        f"task: {task}",
        f"model: {source}",
        f"data: {json.dumps(data)}",
        "steps: [{id: student, uses: finetune}]",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.yaml").write_text("\n".join(lines) + "\n")
    return folder / "spec.yaml"


def shown(path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert lathe("data", path, "--json", *words) == ExitCode.PASSED
    answer = json.loads(capsys.readouterr().out)
    assert answer["version"] == 1
    return answer["splits"]


UNITS = {
    "text-generation": [("text", "words"), ("text", "characters")],
    "text-classification": [("text", "words"), ("text", "characters")],
    "translation": [("text", "words"), ("text", "characters"), ("translation", "words"), ("translation", "characters")],
    "speech-recognition": [("audio", "seconds"), ("text", "words"), ("text", "characters")],
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_its_counts_and_lengths(tmp_path, capsys, task):
    data = support.tiny_data(tmp_path, task, train=12, eval=6)
    limits = {"max_duration": 1} if task == "speech-recognition" else {}
    path = spec(tmp_path, task, {"train": data.train, "eval": data.eval, **limits})
    splits = shown(path, capsys)
    assert {name: split["records"] for name, split in splits.items()} == {"train": 12, "eval": 6}
    for split in splits.values():
        assert [(entry["what"], entry["unit"]) for entry in split["lengths"]] == UNITS[task]
        for entry in split["lengths"]:
            assert 0 < entry["min"] <= entry["p50"] <= entry["p90"] <= entry["p99"] <= entry["max"]
        assert len(split["examples"]) == 3
    assert lathe("data", path) == ExitCode.PASSED
    printed = capsys.readouterr().out
    assert "records" in printed
    assert "12" in printed
    assert splits["train"]["examples"][0]["text"][:20] in printed


def test_labels_duplicates_leaks_and_bad_rows_are_shown(tmp_path, capsys):
    rows = [{"text": text, "label": label} for text, label in (("a", 0), ("b", 1), ("B ", 1), ("b", 1))]
    support.write_jsonl(tmp_path / "train.jsonl", [*rows, {"text": "c"}])
    support.write_jsonl(tmp_path / "dev.jsonl", [{"text": "A", "label": 0}, {"text": "new", "label": 1}])
    path = spec(tmp_path, "text-classification", {"train": "train.jsonl", "eval": "dev.jsonl", "on_bad_row": "skip"})
    splits = shown(path, capsys)
    assert splits["train"]["labels"] == {"0": 1, "1": 3}
    assert (splits["train"]["repeated"], splits["train"]["repeated_alike"]) == (1, 2)
    assert splits["train"]["skipped"] == {"no column 'label'": 1}
    assert (splits["eval"]["in_train"], splits["eval"]["in_train_alike"]) == (0, 1)
    assert lathe("data", path) == ExitCode.PASSED
    printed = capsys.readouterr()
    for piece in ("1 (25.0%)", "3 (75.0%)", "1, 2 but for case and space", "1 (no column 'label': 1)"):
        assert piece in printed.out
    assert "warning: data.train: 1 bad row was skipped" in printed.err
    assert "train.jsonl:5" in printed.err
    assert "warning: data.eval: 1 of 2 records stand in data.train too" in printed.err


def test_a_leak_of_audio_is_one_of_its_content(tmp_path, capsys):
    data = support.tiny_data(tmp_path, "speech-recognition", train=4, eval=2)
    rows = [json.loads(line) for name in (data.train, data.eval) for line in Path(name).read_text().splitlines()]
    (tmp_path / "copy.wav").write_bytes((tmp_path / rows[1]["audio"]).read_bytes())
    support.write_jsonl(tmp_path / "eval.jsonl", [*rows[4:], {"audio": "copy.wav", "text": "seven"}])
    path = spec(tmp_path, "speech-recognition", {"train": data.train, "eval": data.eval})
    splits = shown(path, capsys)
    assert (splits["eval"]["records"], splits["eval"]["in_train"]) == (3, 1)
    assert "eval.jsonl:3" in splits["eval"]["warnings"][0]


def test_tokens_are_counted_where_the_model_has_a_tokenizer(tmp_path, capsys, marian):
    data = support.tiny_data(tmp_path, "translation", train=12, eval=6)
    block = {"train": data.train, "eval": data.eval, "filter": {"max_tokens": 15}}
    splits = shown(spec(tmp_path, "translation", block, str(marian)), capsys)
    lengths = {(entry["what"], entry["unit"]): entry for entry in splits["train"]["lengths"]}
    assert lengths["text", "tokens"]["max"] > 15
    (reason,) = splits["train"]["filtered"]
    assert reason == "more than 15 tokens"
    assert 0 < splits["train"]["filtered"][reason] < 12
    assert splits["eval"]["filtered"] == {}
    without = shown(spec(tmp_path, "translation", block), capsys)
    assert without["train"]["filtered"] is None
    assert lathe("data", spec(tmp_path, "translation", block)) == ExitCode.PASSED
    assert "known once there is a" in capsys.readouterr().out


def test_the_command_line_may_change_the_data(tmp_path, capsys):
    data = support.tiny_data(tmp_path, "text-generation", train=12, eval=6)
    path = spec(tmp_path, "text-generation", {"train": data.train, "eval": data.eval})
    assert shown(path, capsys, "--set", "data.train_limit=5")["train"]["records"] == 5


def test_bad_data_and_bad_specs_are_told(tmp_path, capsys):
    support.write_jsonl(tmp_path / "train.jsonl", [{"txt": "a"}])
    path = spec(tmp_path, "text-generation", {"train": "train.jsonl", "eval": "train.jsonl"})
    assert lathe("data", path) == ExitCode.SPEC
    assert "train.jsonl:1: no column 'text'; did you mean txt?" in capsys.readouterr().err
    assert lathe("data", path, "--set", "data.wrong=1") == ExitCode.SPEC
    assert lathe("data", tmp_path / "none.yaml") == ExitCode.SPEC


def test_markup_in_the_data_is_text(tmp_path, capsys):
    support.write_jsonl(tmp_path / "train.jsonl", [{"text": "[red]danger[/red] \u202e \x1b[31m \0"}])
    path = spec(tmp_path, "text-generation", {"train": "train.jsonl", "eval": "train.jsonl"})
    assert lathe("data", path) == ExitCode.PASSED
    assert "[red]danger[/red] � �[31m �\n" in capsys.readouterr().out


def test_values_from_the_environment_are_kept_secret(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LATHE_TEST_SECRET", "hunter2hunter2")
    support.write_jsonl(tmp_path / "train.jsonl", [{"hunter2hunter2": "a text"}])
    block = {"train": "train.jsonl", "eval": "train.jsonl", "fields": {"text": "${LATHE_TEST_SECRET}"}}
    path = spec(tmp_path, "text-generation", block)
    assert "hunter2" not in json.dumps(shown(path, capsys))


def test_the_plan_warns_of_leaks_and_of_skipped_rows(tmp_path):
    from flows.preflight import inspect
    from specs.schema.load import load

    support.write_jsonl(tmp_path / "train.jsonl", [{"text": "one text"}, {"wrong": 1}, {"text": "another"}])
    support.write_jsonl(tmp_path / "dev.jsonl", [{"text": "One text"}, {"text": "new"}])
    block = {"train": "train.jsonl", "eval": "dev.jsonl", "on_bad_row": "skip", "max_length": 16}
    findings = inspect(load(spec(tmp_path, "text-generation", block)).spec, [], "cpu", 1, tmp_path / "log")
    facts = dict(findings.facts)
    assert facts["data.train"].startswith("2 records")
    assert facts["data.train"].endswith("1 skipped")
    skipped, leaked = findings.warnings
    assert skipped.startswith("data.train: 1 bad row was skipped, no column 'text': 1; ")
    assert leaked.startswith("data.eval: 1 of 2 records stand in data.train too (0 exactly")
