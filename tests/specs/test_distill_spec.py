"""A step with a teacher: its inputs, its paths, and the mistakes that a spec can make with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from specs.schema.graph import build
from specs.schema.steps.distill import DistillSpec
from tests.specs.writing import good, mistakes

HEAD = "name: x\ntask: text-classification\nmodel: {source: a/b}\ndata: {train: ./a, eval: ./b}\nsteps:\n"
TEACHER = "  - {id: teacher, uses: finetune}\n  - {id: slim, uses: prune, sparsity: 50%, needs: baseline}\n"


def _inputs(folder: Path, fields: str, before: str = TEACHER) -> tuple[str, ...]:
    return build(good(folder, HEAD + before + f"  - {{id: s, uses: distill, {fields}}}\n").spec)["s"].inputs


def test_the_student_comes_first_and_the_teacher_last(tmp_path: Path) -> None:
    assert _inputs(tmp_path, "teacher: teacher, needs: baseline") == ("baseline", "teacher")
    assert _inputs(tmp_path, "teacher: teacher") == ("slim", "teacher")
    assert _inputs(tmp_path, "teacher: teacher, student: {layers: 2}") == ("teacher",)
    assert _inputs(tmp_path, "teacher: teacher, config: {model_type: bert}") == ("teacher",)
    assert _inputs(tmp_path, "teacher: baseline, needs: slim") == ("slim", "baseline")


def test_the_teacher_may_stand_below(tmp_path: Path) -> None:
    text = (
        "  - {id: s, uses: distill, teacher: teacher, needs: baseline}\n"
        "  - {id: teacher, uses: finetune, needs: baseline}\n"
    )
    graph = build(good(tmp_path, HEAD + text).spec)
    assert list(graph.nodes) == ["baseline", "teacher", "s"]
    assert graph.leaves() == ("s",)


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ("teacher: techer, needs: slim", "teacher", "no step has the id 'techer'"),
        ("teacher: slim", "", "'slim' is the step before too"),
        ("teacher: slim, needs: slim", "teacher", "'slim' is named in needs and in teacher"),
        ("teacher: teacher, student: {}", "student", "student names no size"),
        ("teacher: teacher, needs: slim, student: {layers: 2}", "student", "needs and student at once"),
        ("teacher: teacher, config: {hidden_size: 2}", "config", "names no model type"),
        ("teacher: teacher, alpha: 1", "alpha", "leaves the teacher nothing to say"),
        ("teacher: teacher, cache: true, hidden: {}", "cache", "need the teacher at every step"),
        ("teacher: teacher, skew: 0.2", "skew", "skew does nothing here"),
        ("teacher: teacher, augment: {}, sampling: balanced", "sampling", "belong to no class"),
        ("teacher: teacher, unlabelled: ./x.txt, class_weights: balanced", "class_weights", "belong to no class"),
        ("teacher: teacher, on_policy: {}", "on_policy", "on_policy does nothing for text-classification"),
        ("teacher: teacher, data: teacher-generated", "data", "data does nothing for text-classification"),
        ("student: {layers: 2}", "teacher", "missing"),
        ("teacher: teacher, temperature: 0", "temperature", "must be more than 0"),
        ("teacher: teacher, divergence: backward", "divergence", "not one of the choices"),
    ],
)
def test_mistakes(tmp_path: Path, fields: str, field: str, message: str) -> None:
    found = mistakes(tmp_path, HEAD + TEACHER + f"  - {{id: s, uses: distill, {fields}}}\n")
    assert len(found) == 1, [str(mistake) for mistake in found]
    assert message in found[0].message
    assert found[0].field.startswith(f"steps.s.{field}".rstrip("."))
    assert found[0].remedy


def test_texts_are_found_beside_the_spec(tmp_path: Path) -> None:
    loaded = good(tmp_path, HEAD + TEACHER + "  - {id: s, uses: distill, teacher: teacher, unlabelled: ./more.txt}\n")
    assert loaded.spec.steps[2].unlabelled == str(tmp_path / "more.txt")  # type: ignore[attr-defined]


def _spec(**fields: object) -> DistillSpec:
    return DistillSpec.model_validate({"uses": "distill", "id": "s", "teacher": "t", **fields})


def test_the_plan_knows_what_the_teacher_writes() -> None:
    assert _spec().stores(1000) == 1000 * (8 * 64 + 4)
    assert _spec(augment={"copies": 3}, top_k=2).stores(1000) == 4000 * 20
    assert _spec(hidden={}).stores(1000) == _spec(relations={}).stores(1000) == _spec(cache=False).stores(1000) == 0


def test_beams_need_something_to_translate() -> None:
    with pytest.raises(ValidationError, match="the teacher writes nothing here"):
        _spec(beams=4)
    assert _spec(beams=4, data="teacher-generated").beams == _spec(beams=4, unlabelled="x.txt").beams == 4
