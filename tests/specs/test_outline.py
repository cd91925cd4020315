"""One mistake does not hide the next, and nothing is concluded from what could not be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.specs.writing import GOOD, mistakes

HEAD = "name: x\ntask: text-classification\nmodel: {source: a/b}\ndata: {train: ./a, eval: ./b}\nsteps:\n"


def _found(folder: Path, steps: str, gates: str = "") -> list[tuple[str, str]]:
    text = HEAD + "".join(f"  - {step}\n" for step in steps.splitlines())
    text += "gates:\n" + "".join(f"  - {gate}\n" for gate in gates.splitlines()) if gates else ""
    return [(mistake.field, mistake.message) for mistake in mistakes(folder, text)]


def test_steps_and_gates_with_mistakes_are_checked_against_each_other(tmp_path: Path) -> None:
    found = _found(
        tmp_path,
        "{id: x, uses: export_tflite, precision: int9}\n{id: p, uses: prune, sparsity: 50%, needs: x}",
        "{step: zz, metric: accuraccy, at_most: 3}\n{step: p, metric: size, at_most: 3 parsecs, relative_to: yy}",
    )
    assert found == [
        ("steps.x.precision", "not one of the choices"),
        (
            "steps.p.needs",
            "prune takes a model, and 'x' gives an export (a file for a device, which cannot be changed)",
        ),
        ("gates[0].step", "no step has the id 'zz'"),
        ("gates[0].metric", "metric 'accuraccy' is unknown"),
        ("gates[1].at_most", "'3 parsecs' is not a limit: unit 'parsecs' is unknown"),
        ("gates[1].relative_to", "no step has the id 'yy'"),
    ]


@pytest.mark.parametrize(
    ("steps", "gates", "expected"),
    [
        (
            "{id: q, uses: quantize, precision: int9}\n{id: e, uses: export_tflite, needs: q}\n"
            "{id: p, uses: prune, sparsity: 50%, needs: e}",
            "",
            ["steps.q.precision", "steps.p.needs"],
        ),
        (
            "{id: a, uses: finetune, epochs: two}",
            "{step: a, metric: parity_error, at_most: 5%}",
            ["steps.a.epochs", "gates[0].metric"],
        ),
        (
            "{id: a, uses: finetune}",
            "{step: a, metric: perplexity, at_most: 5 parsecs}",
            ["gates[0].metric", "gates[0].at_most"],
        ),
        (
            "{id: a, uses: finetune}\n{id: s, uses: select, from: [a], minimise: perplexity, retries: -1}",
            "",
            ["steps.s.minimise", "steps.s.retries"],
        ),
        (
            "{id: a, uses: finetune, retries: -1, needs: []}",
            "",
            ["steps.a.retries", "steps.a.needs"],
        ),
        (
            "{uses: prune, sparsity: 50%, needs: zz}",
            "",
            ["steps[0].id", "steps[0].needs"],
        ),
        (
            "{id: a, uses: finetune}\n{id: a, uses: prune, sparsity: 50%, needs: zz}",
            "",
            ["steps.a.id", "steps.a.needs"],
        ),
        (
            "{id: a, uses: finetune}\n{id: s, uses: select, from: [zz, a], minimise: size}\n"
            "{id: p, uses: prune, sparsity: 50%, needs: [zz, e]}\n{id: e, uses: export_tflite, needs: a}",
            "",
            ["steps.s.from[0]", "steps.p.needs", "steps.p.needs[0]", "steps.p.needs[1]"],
        ),
    ],
)
def test_what_can_be_read_is_checked(steps: str, gates: str, expected: list[str], tmp_path: Path) -> None:
    assert [field for field, _ in _found(tmp_path, steps, gates)] == expected


@pytest.mark.parametrize(
    ("steps", "gates", "expected"),
    [
        # what is behind a step that has no id is not the step before that
        (
            "{id: e, uses: export_tflite}\n{uses: finetune, needs: baseline}\n{id: b, uses: finetune}",
            "",
            ["steps[1].id"],
        ),
        ("{id: e, uses: export_tflite}\nslim\n{id: b, uses: finetune}", "", ["steps[1]"]),
        (
            "{id: e, uses: export_tflite}\n{id: e, uses: prun}\n{id: b, uses: finetune}",
            "",
            ["steps.e.id", "steps.e.uses"],
        ),
        # inputs that could not be read are not the step before
        ("{id: e, uses: export_tflite}\n{id: b, uses: finetune, needs: [5]}", "", ["steps.b.needs[0]"]),
        ("{id: e, uses: export_tflite}\n{id: b, uses: finetune, needs: .inf}", "", [""]),
        ("{id: e, uses: export_tflite}\n{id: s, uses: select, from: [], minimise: size}", "", ["steps.s.from"]),
        # a value that could not be read is not a missing one
        ("{id: a, uses: prune, sparsity: .inf}", "", [""]),
        ("{id: a, uses: export_tflite, precision: .inf, npu: ethos-u85-256}", "", [""]),
        ("{id: a, uses: export_tflite, npu: *a}", "{step: a, metric: npu_cycles, at_most: 5}", [""]),
        ("{id: a, uses: finetune}", "{metric: accuracy, at_least: .inf}", [""]),
        ("{id: a, uses: finetune}", "{metric: accuracy, drop: {at_most: .nan}}", [""]),
        ("{id: a, uses: finetune}", "{step: *a, metric: npu_cycles, at_most: 5}", [""]),
        ("{id: a, uses: finetune}", "{step: 5, metric: npu_cycles, at_most: 5}", ["gates[0].step"]),
        # what a step with a mistake makes, or can have measured, is left open
        ("{id: q, uses: quantize, precision: int9}\n{id: e, uses: export_tflite}", "", ["steps.q.precision"]),
        (
            "{id: e, uses: export_tflite, precision: int9, npu: ethos-u85-256}\n"
            "{id: s, uses: select, from: e, minimise: npu_cycles}",
            "{step: s, metric: npu_cycles, at_most: 5}\n{step: e, metric: parity_error, at_most: 1%}",
            ["steps.e.precision"],
        ),
    ],
)
def test_no_mistake_only_follows_from_another(steps: str, gates: str, expected: list[str], tmp_path: Path) -> None:
    assert [field for field, _ in _found(tmp_path, steps, gates)] == expected


def test_a_configuration_whose_type_could_not_be_read(tmp_path: Path) -> None:
    text = GOOD.replace("{source: org/minilm}", "{config: {model_type: .nan}}")
    assert [mistake.message for mistake in mistakes(tmp_path, text)] == ["numbers are finite here"]


def test_ids_that_are_made_up_are_not_suggested(tmp_path: Path) -> None:
    text = GOOD.replace("id: slim, ", "").replace("register_step: best", "register_step: zzz")
    remedies = [mistake.remedy for mistake in mistakes(tmp_path, text) if mistake.message.startswith("no step")]
    assert remedies[-1] == "known: student, packed, cpu, npu, best, baseline"
    assert all("steps[" not in remedy for remedy in remedies)
