"""Which step a run's headline figures are of."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.journal import read
from tasks.tracking import result_step
from tasks.tracking.summary import headline, note, summarise
from tests.tasks.tracking_run import NEEDS, add_step, start

FORK = [{"id": "baseline", "needs": []}, {"id": "cpu", "needs": ["baseline"]}, {"id": "npu", "needs": ["baseline"]}]


@pytest.mark.parametrize(
    ("steps", "registered", "result"),
    [
        (FORK, None, "npu"),
        (FORK[:2], None, "cpu"),
        (FORK, "cpu", "cpu"),
        (FORK, "baseline", "baseline"),
        (FORK[:2], "npu", "cpu"),
        ([{"id": "one", "needs": ["two"]}, {"id": "two", "needs": []}], None, "one"),
        ([], None, None),
    ],
)
def test_the_result_is_what_the_spec_registers_else_the_last_final_step(steps, registered, result):
    assert result_step(steps, registered) == result


def test_a_failed_result_lends_its_name_to_no_other_step(tmp_path: Path) -> None:
    journal = start(tmp_path / "run-1-aaaa", moment=1000.0)
    for name in ("baseline", "teacher", "narrow"):
        add_step(journal, name, moment=1001.0)
    end = {"event": "step_end", "step": "cpu", "state": "failed", "error": "no room", "time": 1010.0}
    journal.append("cpu", {**end, "result": {}, "evaluation": None})
    journal.append("run", {"event": "run_end", "time": 1011.0, "status": "error"})
    summary = summarise(read(journal.folder))
    assert summary.result == list(NEEDS)[-1] == "cpu"
    assert {name for name in headline(summary) if name.startswith("best_")} == set()
    assert headline(summary)["baseline_accuracy"] == 0.878
    assert note(summary).startswith("**error**\n")
