"""A report has every step and verdict, parses in each form, and needs no other host."""

from __future__ import annotations

import csv
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import markdown_it
import pytest

from specs.schema.metrics import METRICS
from tasks.context import Evaluation
from tasks.evaluate import outputs
from tasks.evaluate.format import figure
from tasks.evaluate.gates import Verdict
from tasks.evaluate.report import as_json, build_report, markdown, table_csv
from tasks.evaluate.summary import COLUMNS, RunSummary, StepRow, changes, rows, warnings

VOID = {"meta", "br", "link", "img", "input", "hr"}
HOSTILE = "<script>alert(1)</script> | a & b"


def measured(
    folder: Path, kind: str, size: float, latency: float, accuracy: float, wrong: tuple[int, ...] = ()
) -> Evaluation:
    """An evaluation in a new folder under ``folder``; the outputs of the examples ``wrong`` are negative."""
    values = {
        "accuracy": (accuracy, accuracy - 0.02, accuracy + 0.02),
        "latency_p50": (latency, latency * 0.97, latency * 1.04),
        "latency_p90": (latency * 1.2, None, None),
        "latency_p99": (latency * 1.5, None, None),
        "peak_memory": (4e8, None, None),
        "size": (size, None, None),
    }
    metrics = {name: dict(zip(("value", "low", "high"), given, strict=True)) for name, given in values.items()}
    how = {
        "call": "one forward pass",
        "batch": 1,
        "length": 64,
        "threads": 2,
        "warmup": 5,
        "repeats": 50,
        "runtime": "torch 2",
        "cpu": "a cpu",
    }
    record: dict[str, Any] = {
        "version": 1,
        "kind": kind,
        "metrics": metrics,
        "scenario": how,
        "dtypes": {"float32": int(size)},
        "files": {"model.safetensors": int(size)},
        "notes": ["3 of 40 examples are cut"] if kind == "export" else [],
    }
    path = folder / f"evaluation{len(list(folder.iterdir()))}"
    path.mkdir()
    found = ["negative" if number in wrong else "positive" for number in range(30)]
    kept = [
        {"input": f"{number} {HOSTILE}", "expected": "positive", "output": output, "probability": 0.75}
        for number, output in enumerate(found)
    ]
    outputs.write(path, kept)
    return Evaluation(path, record)


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory) -> RunSummary:
    folder = tmp_path_factory.mktemp("store")
    steps = (
        StepRow(
            "baseline", "model", "cached", 1.0, "23 M weights", evaluation=measured(folder, "model", 90e6, 0.025, 0.878)
        ),
        StepRow(
            "sparse",
            "prune",
            "done",
            61.0,
            "zeroed 50.0% of 10 weights",
            4,
            {"head": "kept"},
            ("zeros bring no speed",),
            evaluation=measured(folder, "model", 90e6, 0.0251, 0.87, tuple(range(3, 29, 2))),
        ),
        StepRow(
            "int4",
            "export_tflite",
            "done",
            9.0,
            HOSTILE,
            4,
            evaluation=measured(folder, "export", 12.5e6, 0.007, 0.872, (3, 4)),
        ),
        StepRow(
            "twin",
            "select",
            "done",
            2.0,
            "chose int4",
            1,
            evaluation=measured(folder, "export", 12.5e6, 0.007, 0.872, (3, 4)),
        ),
        StepRow("npu", "export_tflite", "failed", 3.0, error="vela: no int16 GELU"),
        StepRow("after", "select", "skipped", error="needs npu, which failed"),
    )
    verdicts = (
        Verdict(
            "size ≤ 14 MB", "int4", "size", "bytes", 12.5e6, None, None, 14e6, 1.5e6, "passed", False, "int4: holds"
        ),
        Verdict(
            "accuracy drop ≤ 1 points against baseline",
            "int4",
            "accuracy",
            "points",
            0.6,
            -0.2,
            1.4,
            1.0,
            0.4,
            "inconclusive",
            True,
            "int4: is inconclusive; evaluate on more examples",
        ),
        Verdict(
            "npu_cycles ≤ 9",
            "npu",
            "npu_cycles",
            "count",
            None,
            None,
            None,
            9,
            None,
            "missing",
            False,
            "npu: npu_cycles ≤ 9: no",
        ),
    )
    edges = (("baseline", "sparse"), ("sparse", "int4"), ("sparse", "npu"), ("int4", "twin"), ("npu", "after"))
    return RunSummary(
        "tiny",
        "run-7",
        "2026-01-02T03:04:05+00:00",
        75.0,
        "text-classification",
        steps,
        verdicts,
        "failed",
        {"torch": "2.13.0"},
        "lathe up",
        edges,
        "lathe run tiny.yaml --from npu",
        ("12 examples of data.eval are in data.train too",),
    )


class Page(HTMLParser):
    """Collects the text and complains about what no browser should have to mend."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name.endswith("href") or name == "src":
                self.links.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def test_the_page_is_whole_and_asks_nobody(run: RunSummary, tmp_path: Path) -> None:
    files = build_report(run, tmp_path / "report")
    assert all(path.is_file() and path.stat().st_size > 100 for path in files.values())
    text = files["report.html"].read_text()
    page = Page(text)
    assert not re.findall(r"(?:https?:)?//\w[^\s\"'<]*", text), "names another host"
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    assert page.links
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert page.tags.count("svg") == 3
    words = " ".join(page.words)
    for step in run.steps:
        assert words.count(step.id) >= 2, step.id
        assert (step.error or step.summary) in words
    for said in ("✓ passed", "? inconclusive", "✗ missing", "✗ failed", "zeros bring no speed", "7.2x smaller"):
        assert said in " ".join(words.split()), said
    assert "0.852 to 0.892" in words
    assert "3.6x faster" in words


def test_reports_are_the_same_bytes_twice(run: RunSummary, tmp_path: Path) -> None:
    first, second = build_report(run, tmp_path / "one"), build_report(run, tmp_path / "two")
    for name in first:
        assert first[name].read_bytes() == second[name].read_bytes(), name


def test_csv_has_bare_figures(run: RunSummary) -> None:
    table = list(csv.DictReader(io.StringIO(table_csv(run))))
    assert [row["step"] for row in table] == [step.id for step in run.steps]
    assert float(table[2]["size_bytes"]) == 12.5e6
    assert float(table[2]["latency_p50_seconds"]) == 0.007
    assert float(table[2]["accuracy_low"]) == pytest.approx(0.852)
    assert table[4]["size_bytes"] == ""
    assert table[4]["state"] == "failed"
    assert {name.removesuffix("_bytes").removesuffix("_seconds") for name in table[0]} >= set(METRICS)


def test_json_is_strict_and_versioned(run: RunSummary, tmp_path: Path) -> None:
    record = json.loads(build_report(run, tmp_path)["report.json"].read_text(), parse_constant=pytest.fail)
    assert record == json.loads(json.dumps(as_json(run)))
    assert record["version"] == 1
    assert record["status"] == "failed"
    assert [verdict["status"] for verdict in record["verdicts"]] == ["passed", "inconclusive", "missing"]
    assert record["steps"][2]["evaluation"]["metrics"]["size"]["value"] == 12.5e6
    assert record["edges"][0] == ["baseline", "sparse"]


def test_markdown_has_a_row_per_step(run: RunSummary) -> None:
    text = markdown(run)
    table = [line for line in text.partition("## Examples")[0].splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(run.steps)
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
    assert cells == {len(COLUMNS) + 1}
    assert "<script>" not in text
    assert "inconclusive" in text


def test_rows_compare_with_the_baseline(run: RunSummary) -> None:
    found = {row["step"]: row for row in rows(run)}
    assert set(found["int4"]) == set(COLUMNS)
    assert found["int4"]["size"] == "12.5 MB"
    assert found["int4"]["ratio"] == "7.2x"
    assert found["int4"]["speedup"] == "3.6x"
    assert found["int4"]["latency"] == "7.00 / 8.40 / 10.5 ms"
    assert found["int4"]["quality"] == "0.872 [0.852, 0.892]"
    assert found["npu"]["size"] == "–"
    assert found["npu"]["changed"] == "vela: no int16 GELU"


def test_a_warning_of_several_steps_is_said_once(run: RunSummary) -> None:
    assert warnings(run) == [
        ("data", "12 examples of data.eval are in data.train too"),
        ("sparse", "zeros bring no speed"),
        ("int4, twin", "3 of 40 examples are cut"),
    ]


def test_examples_show_first_what_a_step_changed(run: RunSummary, tmp_path: Path) -> None:
    found = changes(run)
    assert list(found) == ["baseline", "sparse", "int4", "twin"]
    assert (found["baseline"].against, len(found["baseline"].examples)) == ("", outputs.UNCHANGED)
    sparse = found["sparse"]
    assert (sparse.against, sparse.changed, sparse.total) == ("baseline", 13, 30)
    assert [example.input.split()[0] for example in sparse.examples] == [str(number) for number in range(3, 23, 2)]
    assert all((one.before, one.after) == ("positive", "negative") for one in sparse.examples)
    assert (found["int4"].against, found["int4"].changed) == ("sparse", 13), "4 became wrong, 12 right again"
    assert (found["twin"].changed, len(found["twin"].examples)) == (0, outputs.UNCHANGED)

    files = build_report(run, tmp_path)
    section = files["report.md"].read_text().partition("## Examples")[2]
    assert "13 of 30 outputs are not those of baseline." in section
    assert "| input | expected | before | after |" in section
    assert "| input | expected | output |" in section.partition("### sparse")[0]
    table = [
        line for line in section.partition("### int4")[0].partition("### sparse")[2].splitlines() if line[:1] == "|"
    ]
    assert len(table) == 2 + outputs.SHOWN
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {5}
    assert "3 &lt;script>" in table[2]
    assert "0 of 30 outputs are not those of int4." in section
    words = " ".join(" ".join(Page(files["report.html"].read_text()).words).split())
    assert "13 of 30 outputs are not those of baseline." in words
    assert f"negative (75.0%) 5 {HOSTILE}" in words
    kept = json.loads(files["report.json"].read_text())["steps"][1]["examples"]
    assert (kept["changed"], kept["examples"][0]["before"]) == (13, "positive")


def test_outputs_on_other_inputs_are_not_compared(tmp_path: Path) -> None:
    one, other = [{"input": "a", "output": "x"}], [{"input": "b", "output": "y"}]
    assert outputs.compare(one, other, "before").against == ""
    assert outputs.compare(one, [{"input": "a", "output": "y"}], "before").changed == 1
    assert outputs.read(tmp_path / "gone") == []


def test_any_text_can_be_kept_and_read_again(tmp_path: Path) -> None:
    hostile = "NUL \0, half a pair \ud800, עברית, 👩‍👩‍👧 " + "long " * 500
    outputs.write(tmp_path, [{"input": hostile, "expected": None, "output": "\n"}])
    (kept,) = outputs.read(tmp_path)
    assert kept["input"].startswith("NUL \0, half a pair ?, עברית, 👩‍👩‍👧 long")
    assert len(kept["input"]) < 700
    assert kept["output"] == "\n"


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("bleu", 27.312, "27.3"),
        ("chrf", 52.08, "52.1"),
        ("length_ratio", 0.98712, "0.987"),
        ("wer", 0.0421, "4.2%"),
        ("cer", 0.0, "0.0%"),
        ("real_time_factor", 0.03124, "0.031"),
        ("real_time_factor", 12.3, "12"),
        ("mcc", -0.12345, "-0.123"),
        ("calibration_error", 0.0312, "0.031"),
        ("tokens_per_second", 412.3, "412"),
        ("time_to_first_token", 0.0123, "12.3 ms"),
        ("accuracy", 0.8724, "0.872"),
        ("wer", None, "–"),
    ],
)
def test_metrics_are_written_as_their_field_does(metric: str, value: float | None, text: str) -> None:
    assert figure(metric, value) == text


def _labels(svg: Path) -> dict[str, tuple[float, float]]:
    """Where each step's name stands in a plot."""
    found = {}
    for element in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text"):
        place = re.search(r"translate\(([-0-9.]+) ([-0-9.]+)\)", element.get("transform", ""))
        x, y = place.groups() if place else (element.get("x", "0"), element.get("y", "0"))
        found["".join(element.itertext())] = (float(x), float(y))
    return found


@pytest.mark.parametrize("name", ["quality_size.svg", "quality_latency.svg"])
def test_every_step_has_its_own_label(run: RunSummary, tmp_path: Path, name: str) -> None:
    labels = _labels(build_report(run, tmp_path)[name])
    shown = {step.id: labels[step.id] for step in run.steps if step.evaluation is not None}
    assert len(shown) == 4
    for one, (x, y) in shown.items():
        for other, (left, top) in shown.items():
            assert one == other or abs(y - top) > 9 or abs(x - left) > 7 * max(len(one), len(other)), (one, other)


def test_a_run_that_measured_nothing_still_has_a_report(tmp_path: Path) -> None:
    bare = RunSummary(
        "bare",
        "r",
        "now",
        1.0,
        "text-generation",
        (StepRow("a", "finetune", "failed", error="no data"),),
        status="error",
    )
    files = build_report(bare, tmp_path)
    assert set(files) == {"report.md", "report.html", "report.csv", "report.json"}
    assert "no data" in " ".join(Page(files["report.html"].read_text()).words)


@pytest.mark.parametrize(
    "text",
    ["![x](http://h/t.png)", "[a](http://h)", "a\rb", "__x__", "_x_", "*x*", "~~x~~", "&lt;b>", "<b>", "`x`", "a|b"],
)
def test_text_from_the_data_stays_text_in_markdown(text: str):
    from tasks.evaluate.report import _md

    page = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    shown = page.render(f"| h |\n| --- |\n| {_md(text)} |\n")
    cell = shown.partition("<td>")[2].partition("</td>")[0]
    assert html.unescape(cell) == text.replace("\r", " ")
    assert "<" not in cell
    assert _md("snake_case_name") == "snake_case_name"
