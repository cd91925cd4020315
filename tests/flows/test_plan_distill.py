"""The plan of a step with a teacher: its key, its estimate, and what it refuses before the run."""

from __future__ import annotations

from pathlib import Path

from flows.home import Home
from flows.plan import Plan, make_plan
from specs.schema.load import load
from tests.flows.conftest import SPEC
from tests.specs.writing import write

STEPS = (
    "steps:\n"
    "  - {id: t, uses: finetune}\n"
    "  - {id: s, uses: distill, teacher: t, student: {layers: 1}, unlabelled: ./more.txt}\n"
)


def _plan(folder: Path, steps: str = STEPS) -> Plan:
    return make_plan(load(write(folder, SPEC + steps)), Home(folder / ".lathe"))


def test_the_content_of_the_texts_is_in_the_key_and_their_name_is_not(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("a text\n")
    first = _plan(tmp_path)
    assert first.problems == ()
    (tmp_path / "more.txt").rename(tmp_path / "moved.txt")
    moved = _plan(tmp_path, STEPS.replace("more", "moved"))
    (tmp_path / "more.txt").write_text("another text\n")
    changed = _plan(tmp_path)
    assert first.steps[2].key == moved.steps[2].key != changed.steps[2].key
    assert first.steps[1].key == changed.steps[1].key
    renamed = STEPS.replace("id: t,", "id: tutor,").replace("teacher: t,", "teacher: tutor,")
    assert _plan(tmp_path, renamed).steps[2].key == changed.steps[2].key


def test_what_the_teacher_says_is_in_the_estimate(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("a text\n")
    with_cache, without = _plan(tmp_path), _plan(tmp_path, STEPS.replace("student:", "cache: false, student:"))
    assert with_cache.steps[2].disk - without.steps[2].disk == 96 * (8 * 64 + 4)


def test_problems_are_shown_where_they_stand(tmp_path: Path) -> None:
    steps = STEPS.replace("layers: 1", "layers: 9")
    problems = sorted(_plan(tmp_path, steps).problems, key=len)
    assert len(problems) == 2
    assert "spec.yaml:16:" in problems[0]
    assert "s: student.layers 9 is more than the model's 2; write at most 2" in problems[0]
    assert "unlabelled: " in problems[1]
    assert "more.txt: no such file" in problems[1]
