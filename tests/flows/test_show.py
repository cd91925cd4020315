"""The last screen of a run, and the report of one that goes on or was killed."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows.finish import report_of, snippet
from flows.home import Home
from flows.record import KILLED
from flows.show import show_outcome, show_report
from tasks.artifacts import Store
from tasks.journal import Journal
from tasks.models.transforms import Extras, write_extras
from tests.tasks.tracking_run import evaluation, start

WARNINGS = [f"this is trap number {number}" for number in range(5)]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Home(tmp_path)


def finished(home: Home) -> Path:
    """A run of a baseline and an NPU build, with more warnings than a screen takes."""
    journal = start(home.run("sentiment-20260101-000000-done"), warnings=WARNINGS)
    for name in ("baseline", "teacher", "narrow", "cpu"):
        record = evaluation(0.8, 12.5e6, 0.004)
        record["metrics"]["npu_operator_share"] = {
            "value": 0.9876 if name == "cpu" else None,
            "low": None,
            "high": None,
        }
        end = {"event": "step_end", "step": name, "state": "done", "error": None, "seconds": 1.0, "evaluation": record}
        result = {"summary": f"converted 37 of 38 layers of {name}"}
        journal.append(name, {"event": "step_start", "step": name, "uses": "quantize", "key": "k", "spec": {}})
        journal.append(name, {**end, "key": "k", "result": result, "evaluation_path": str(home.root)})
    journal.append("run", {"event": "run_end", "status": "passed", "message": ""})
    return journal.folder


def outcome(folder: Path, **more: Any) -> dict[str, Any]:
    plain = {"folder": str(folder), "status": "passed", "message": "passed: 1 of 1 gates hold", "failures": {}}
    told = {"notes": [], "tracking": "sqlite:///mlflow.db", "tracking_incomplete": "", "next": "lathe up"}
    files = {"model.tflite": 13_300_000, "tokenizer.json": 700_000, "config.json": 600, "vocab.txt": 10, "x.txt": 9}
    result = {"result": "/store/ab", "files": files, "snippet": "from lib import Model\nmodel = Model('/store/ab')"}
    return {**plain, **told, **result, **more}


def screen(told: dict[str, Any], width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    show_outcome(told, console)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_the_last_screen_has_files_operator_share_and_is_about_a_dozen_lines(home: Home) -> None:
    lines = screen(outcome(finished(home)), 80)
    table = 1 + lines.index(next(line for line in lines if line.startswith("cpu ")))
    text = "\n".join(lines)
    assert "result    /store/ab: model.tflite 13.3 MB, tokenizer.json 700 kB, config.json 600 B and 2 more" in lines
    assert "NPU       98.8% of the operators of cpu" in lines
    assert "load it   from lib import Model" in lines
    assert "          model = Model('/store/ab')" in lines
    assert text.count("trap number") == 3
    assert "2 more warnings in the report" in text
    told = [line for line in lines[table:] if line and not line.startswith("  ")]
    assert len(told) <= 12, text


def test_what_changed_is_in_a_wide_table_and_below_a_narrow_one(home: Home) -> None:
    folder = finished(home)
    wide, narrow = screen(outcome(folder), 120), screen(outcome(folder), 80)
    assert "what changed" in wide[1]
    assert next(line for line in wide if line.startswith("cpu ")).rstrip().endswith("converted 37 of 38 layers of cpu")
    assert "  cpu: converted 37 of 38 layers of cpu" in narrow
    assert all("  cpu: " not in line for line in wide)
    assert "smaller" in screen(outcome(folder), 150)[1]
    assert max(map(len, wide[:6])) <= 120


def test_a_report_is_named_only_where_there_is_one(home: Home) -> None:
    folder = finished(home)
    page = folder / "report" / "report.html"
    note = "the report could not be written"
    lines = screen(outcome(folder, notes=[note]), 80)
    assert f"! {note}" in lines
    assert not any(line.startswith("report") for line in lines)
    page.parent.mkdir()
    page.write_text("<html>")
    assert f"report    {page}" in screen(outcome(folder), 80)


def test_the_resuming_command_stands_once(home: Home) -> None:
    failures = {name: f"too thin\nlog: {name}.log\ngo on with: lathe run s.yaml" for name in ("teacher", "narrow")}
    lines = screen(outcome(finished(home), failures=failures, next="lathe run s.yaml"), 80)
    assert "✗ teacher: too thin" in lines
    assert "log: narrow.log" in lines
    assert sum("lathe run s.yaml" in line for line in lines) == 1


def test_a_run_that_goes_on_is_running_as_long_as_its_lease_is_held(home: Home) -> None:
    moment = time.time() - 60
    journal = start(home.run("sentiment-20260101-000000-live"), moment=moment)
    end(journal, "baseline", moment + 5)
    begin(journal, "teacher", moment + 10)
    with Store(home.store).lease(journal.folder.name):
        run = report_of(journal.folder)
        console = Console(file=io.StringIO(), width=80)
        show_report(run, "table", console)
    assert run.status == "running"
    assert {step.id: step.state for step in run.steps} == {
        "baseline": "done",
        "teacher": "running",
        "narrow": "waiting",
        "cpu": "waiting",
    }
    assert run.seconds >= 60
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.startswith(f"{journal.folder.name}: running\n")
    assert "waiting" in shown

    killed = report_of(journal.folder)
    assert killed.status == "error"
    assert {step.id: (step.state, step.error) for step in killed.steps} == {
        "baseline": ("done", None),
        "teacher": ("failed", KILLED),
        "narrow": ("cancelled", None),
        "cpu": ("cancelled", None),
    }
    assert killed.seconds == pytest.approx(10)


def test_a_step_that_is_tried_again_is_running(home: Home) -> None:
    moment = time.time() - 60
    journal = start(home.run("sentiment-20260101-000000-again"), moment=moment)
    begin(journal, "baseline", moment)
    end(journal, "baseline", moment + 5, state="failed")
    begin(journal, "baseline", moment + 6)
    with Store(home.store).lease(journal.folder.name):
        assert report_of(journal.folder).steps[0].state == "running"


def begin(journal: Journal, name: str, moment: float) -> None:
    event = {"event": "step_start", "step": name, "uses": "finetune", "key": name, "spec": {}}
    journal.append(name, {**event, "time": moment})


def end(journal: Journal, name: str, moment: float, state: str = "done") -> None:
    event = {"event": "step_end", "step": name, "state": state, "key": name, "error": None, "seconds": 5.0}
    journal.append(name, {**event, "time": moment, "result": {}, "evaluation": None})


def test_a_snippet_says_where_lathe_is_needed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    plain = snippet("model", tmp_path, "text-classification")
    assert plain.startswith("from transformers import AutoModelForSequenceClassification\n")
    for name, module in (("model.onnx", "onnxruntime"), ("model.tflite", "ai_edge_litert.interpreter")):
        (tmp_path / name).touch()
        exported = snippet("export", tmp_path, "text-classification")
        assert "tasks" not in exported
        assert f" {module}" in exported
        assert repr(str(tmp_path / name)) in exported
    packed = snippet("packed", tmp_path, "text-classification")
    assert "from tasks.models import load" in packed
    assert "Lathe's own format" in packed
    write_extras(tmp_path, Extras(transforms=({"name": "lsh"},)))
    changed = snippet("model", tmp_path, "text-classification")
    assert "from tasks.models import load" in changed
    assert "lathe.json" in changed
