"""``--set`` lands where it says, and its mistakes name it."""

from __future__ import annotations

from pathlib import Path

import pytest

from specs.schema.load import load
from tests.specs.writing import GOOD, good, mistakes


def test_overrides_lie_over_the_spec_in_order(tmp_path: Path) -> None:
    spec = good(
        tmp_path,
        overrides=[
            "steps.student.epochs=5",
            "steps.student.epochs=7",
            "steps.1.sparsity=25%",
            "evaluate.latency.repeats=9",
            "gates.1.at_least=90%",
            "steps.best.from=[cpu]",
            "schedule=",
            "resources={parallel: 2}",
        ],
    ).spec
    assert spec.steps[0].epochs == 7  # type: ignore[attr-defined]
    assert spec.steps[1].sparsity == 0.25  # type: ignore[attr-defined]
    assert spec.evaluate.latency.repeats == 9
    assert spec.gates[1].limit.number == 0.9
    assert spec.steps[5].inputs() == (("from", "cpu"),)
    assert spec.schedule is None
    assert spec.resources.parallel == 2


def test_an_id_may_hold_dots(tmp_path: Path) -> None:
    text = GOOD.replace("id: slim", "id: slim.v2").replace("needs: slim", "needs: slim.v2")
    assert good(tmp_path, text, ["steps.slim.v2.sparsity=10%"]).spec.steps[1].sparsity == 0.1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("override", "message", "remedy"),
    [
        ("steps.studnt.epochs=3", "steps has no 'studnt'", "student?"),
        ("steps.9.epochs=3", "steps has 6 entries", "from 0"),
        ("steps.student.epoch=3", "unknown key 'epoch'", "epochs?"),
        ("steps.student.epochs=two", "not a number", "passes"),
        ("nonsense=1", "unknown key 'nonsense'", "known"),
        ("seed", "not an override", "key=value"),
        ("=3", "not an override", "key=value"),
        ("a..b=3", "not an override", "key=value"),
        ("seed.x=3", "seed is a single value" if "seed:" in GOOD else "", ""),
        ("name.x=3", "name is a single value", "name=…"),
        ("seed=[1", "not valid YAML", "bracket"),
        ("seed=&a 1", "anchor", "write the value out"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str, remedy: str, tmp_path: Path) -> None:
    found = mistakes(tmp_path, GOOD, [override])
    assert [m.file for m in found][-1] == f"--set {override}"
    assert message in found[-1].message
    assert remedy in found[-1].remedy


def test_mistakes_of_the_file_and_of_overrides_come_together(tmp_path: Path) -> None:
    found = mistakes(tmp_path, GOOD.replace("h: 64", "h: many"), ["steps.student.epochs=two", "steps.x.y=1"])
    assert [m.field for m in found] == ["data.max_length", "steps.student.epochs", ""]


def test_a_source_takes_the_place_of_a_config(tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "name: a\ntask: text-generation\nmodel: {config: {model_type: gpt2}}\n"
        "data: {train: 'builtin:python-docs', eval: 'builtin:python-docs'}\n"
        "steps: [{id: half, uses: quantize, precision: bf16}]\nschedule: {cron: '0 3 * * *'}\n"
    )
    loaded = load(spec, ["model.source=org/name", "schedule.interval=2 h"])
    assert loaded.spec.model.source == "org/name"
    assert loaded.spec.model.config is None
    assert loaded.spec.schedule is not None
    assert loaded.spec.schedule.cron is None
    unchanged = load(spec, ["schedule.interval=null"]).spec.schedule
    assert unchanged is not None
    assert unchanged.cron == "0 3 * * *"
