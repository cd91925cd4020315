"""The plots that steps leave in their artifacts, in the report of a run."""

from __future__ import annotations

import re
from pathlib import Path

from tasks.attention import breakeven
from tasks.evaluate.report import build_report
from tasks.evaluate.summary import RunSummary, StepRow


def test_what_a_step_drew_is_in_the_report(tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    drawn = breakeven.draw({"exact": {4096: 0.9, 128: 0.1}, "lsh": {128: 0.2, 4096: 0.3}}, [4096])
    for name, content in drawn.items():
        (artifact / name).write_bytes(content)
    (artifact / "logo.svg").write_text("<svg>not drawn by a step</svg>")
    steps = (StepRow("buckets", "attention", "done", folder=artifact), StepRow("gone", "prune", "failed", error="no"))
    files = build_report(RunSummary("n", "r", "now", 1.0, "text-generation", steps), tmp_path / "report")
    page = files["report.html"].read_text()
    assert "<figcaption>buckets: attention</figcaption>" in page
    assert "faster from 4096 on" in page
    assert "not drawn by a step" not in page
    assert not re.findall(r"(?:https?:)?//\w[^\s\"'<]*", page), "names another host"
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    assert "![buckets: attention](buckets_attention.png)" in files["report.md"].read_text()
    for name, content in drawn.items():
        assert files[f"buckets_{name}"].read_bytes() == content
