"""The graph of a spec: its order, its questions, and everything that does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from specs.schema.base import StepSpec
from specs.schema.graph import BaselineSpec, Graph, GraphError, build
from specs.schema.pipeline import KINDS, PipelineSpec
from specs.schema.steps.export import ExportTfliteSpec
from specs.schema.steps.finetune import FinetuneSpec
from tests.specs.writing import GOOD, good, mistakes, place

HEAD = "name: x\ntask: text-classification\nmodel: {source: a/b}\ndata: {train: ./a, eval: ./b}\nsteps:\n"


def _graph(folder: Path, steps: str) -> Graph:
    return build(good(folder, HEAD + steps).spec)


def test_nodes_come_after_their_inputs_and_else_as_written(tmp_path: Path) -> None:
    graph = build(good(tmp_path).spec)
    assert [node.id for node in graph] == ["baseline", "student", "slim", "packed", "cpu", "npu", "best"]
    assert {node.id: node.inputs for node in graph} == {
        "baseline": (),
        "student": ("baseline",),
        "slim": ("student",),
        "packed": ("slim",),
        "cpu": ("slim",),
        "npu": ("student",),
        "best": ("cpu", "npu"),
    }
    assert {node.id: node.kind for node in graph} == {
        "baseline": "model",
        "student": "model",
        "slim": "model",
        "packed": "packed",
        "cpu": "export",
        "npu": "export",
        "best": "export",
    }


def test_a_step_may_need_one_that_stands_below_it(tmp_path: Path) -> None:
    graph = _graph(tmp_path, "  - {id: a, uses: finetune, needs: b}\n  - {id: b, uses: finetune, needs: baseline}\n")
    assert list(graph.nodes) == ["baseline", "b", "a"]


def test_questions(tmp_path: Path) -> None:
    graph = build(good(tmp_path).spec)
    assert graph.leaves() == ("packed", "best")
    assert graph.ancestors("best") == ("baseline", "student", "slim", "cpu", "npu")
    assert graph.ancestors("baseline") == ()
    assert graph.descendants("slim") == ("packed", "cpu", "best")
    assert graph.descendants("best") == ()
    assert graph.users("student") == ("slim", "npu")
    assert graph["slim"].spec.uses == "prune"
    assert len(graph) == 7


def test_the_baseline_is_the_model_and_is_not_written_in_a_spec(tmp_path: Path) -> None:
    baseline = build(good(tmp_path).spec)["baseline"].spec
    assert isinstance(baseline, BaselineSpec)
    assert (baseline.id, baseline.uses, baseline.takes) == ("baseline", "model", ())
    assert baseline.model.source == "org/minilm"
    assert BaselineSpec not in KINDS.values()


def test_select_chooses_among_runtimes_by_what_they_all_have(tmp_path: Path) -> None:
    steps = (
        "  - {id: fbgemm, uses: quantize, needs: baseline}\n"
        "  - {id: onnx, uses: export_onnx, precision: int8-dynamic, needs: baseline}\n"
        "  - {id: lite, uses: export_tflite, precision: int8-dynamic, needs: baseline}\n"
        "  - {id: cpu, uses: select, from: [fbgemm, onnx, lite], minimise: latency_p50}\n"
        "gates:\n  - {step: cpu, metric: parity_error, at_most: 5%}\n"
    )
    graph = _graph(tmp_path, steps)
    assert [node.kind for node in graph] == ["model", "packed", "export", "export", "export"]


STEPS = {
    "duplicate id": (
        "- {id: a, uses: finetune}\n  - {id: a, uses: finetune}",
        "a, uses: finetune}\n",
        2,
        "steps.a.id",
        "the id 'a' is taken by steps[0]",
        "an id of its own",
    ),
    "baseline taken": (
        "- {id: baseline, uses: finetune}",
        "baseline",
        1,
        "steps.baseline.id",
        "is taken",
        "another id",
    ),
    "run taken": (
        "- {id: run, uses: finetune}\n  - {id: b, uses: finetune, needs: run}",
        "run, uses",
        1,
        "steps.run.id",
        "taken by the run's own journal",
        "another id",
    ),
    "system taken": ("- {id: system, uses: finetune}", "system,", 1, "steps.system.id", "machine's load", "another id"),
    "unknown need": (
        "- {id: a, uses: finetune, needs: baselin}",
        "baselin}",
        1,
        "steps.a.needs",
        "no step",
        "baseline?",
    ),
    "itself": ("- {id: a, uses: finetune, needs: a}", "a}", 1, "steps.a.needs", "a -> a", "break"),
    "no input": (
        "- {id: a, uses: finetune, needs: []}",
        "[]",
        1,
        "steps.a.needs",
        "takes no artifact",
        "leave `needs` out",
    ),
    "two inputs": (
        "- {id: a, uses: finetune}\n  - {id: b, uses: finetune, needs: [a, baseline]}",
        "[a, base",
        1,
        "steps.b.needs",
        "takes one artifact, 2 are named",
        "needs: a",
    ),
    "named twice": (
        "- {id: a, uses: finetune}\n  - {id: b, uses: select, from: [a, a], maximise: accuracy}",
        "a], max",
        1,
        "steps.b.from[1]",
        "'a' is named twice",
        "once",
    ),
    "trains a packed model": (
        "- {id: q, uses: quantize}\n  - {id: b, uses: finetune, needs: q}",
        "q}",
        1,
        "steps.b.needs",
        "finetune takes a model, and 'q' gives a packed model",
        "needs: baseline",
    ),
    "follows a packed model": (
        "- {id: a, uses: finetune}\n  - {id: q, uses: quantize}\n  - {id: b, uses: export_tflite}",
        "export_tflite",
        1,
        "steps.b.uses",
        "export_tflite takes a model, and 'q' gives a packed",
        "needs: a",
    ),
    "prunes an export": (
        "- {id: e, uses: export_tflite}\n  - {id: b, uses: prune, sparsity: 50%}",
        "prune",
        1,
        "steps.b.uses",
        "'e' gives an export",
        "needs: baseline",
    ),
    "changes what may be an export": (
        "- {id: e, uses: export_tflite}\n  - {id: q, uses: quantize, needs: baseline}\n"
        "  - {id: b, uses: select, from: [q, e], minimise: size}\n  - {id: c, uses: prune, sparsity: 50%}",
        "prune",
        1,
        "steps.c.uses",
        "'b' gives an export",
        "needs: baseline",
    ),
    "metric of no input": (
        "- {id: e, uses: export_tflite}\n  - {id: b, uses: select, from: [e], minimise: npu_cycles}",
        "npu_cycles",
        1,
        "steps.b.minimise",
        "npu_cycles is a metric of an NPU build",
        "no step of the spec has it",
    ),
    "metric of another task": (
        "- {id: e, uses: export_tflite}\n  - {id: b, uses: select, from: [e], minimise: perplexity}",
        "perplexity",
        1,
        "steps.b.minimise",
        "the task text-classification has no perplexity",
        "accuracy, f1",
    ),
}


@pytest.mark.parametrize("case", STEPS)
def test_what_does_not_fit_is_shown_at_its_place(case: str, tmp_path: Path) -> None:
    steps, needle, occurrence, field, message, remedy = STEPS[case]
    text = f"{HEAD}  {steps}\n"
    (found,) = mistakes(tmp_path, text)
    if occurrence == 2:
        assert (found.line, found.column) == (7, 10)
    else:
        assert (found.line, found.column) == place(text, needle)
    assert found.field == field
    assert message in found.message
    assert remedy in found.remedy


BANDS = "  - {id: bands, uses: adaptive_input, ratio: 8x}\n"


@pytest.mark.parametrize(
    ("later", "message"),
    [
        ("{id: p, uses: prune, method: width, keep: 50%}", "prune makes the model anew in another shape"),
        ("{id: p, uses: prune, method: vocabulary}", "put 'bands' behind it"),
        ("{id: d, uses: distill, student: {layers: 1}, teacher: t}", "distill makes the model anew"),
        ("{id: b, uses: adaptive_input, ratio: 9x}", "in bands already, by 'bands'"),
    ],
)
def test_bands_are_not_followed_by_what_makes_the_model_anew(later: str, message: str, tmp_path: Path) -> None:
    between = "  - {id: t, uses: finetune}\n"
    (found,) = mistakes(tmp_path, HEAD + BANDS + between + f"  - {later}\n")
    assert message in str(found)


@pytest.mark.parametrize(
    "steps",
    [
        BANDS + "  - {id: p, uses: prune, sparsity: 50%}\n",
        "  - {id: p, uses: prune, method: width, keep: 50%}\n" + BANDS,
        BANDS + "  - {id: p, uses: prune, method: width, keep: 50%, needs: baseline}\n",
        BANDS + "  - {id: d, uses: distill, config: {model_type: bert}, teacher: bands}\n"
        "  - {id: p, uses: prune, method: width, keep: 50%}\n",
        "  - {id: t, uses: finetune}\n" + BANDS + "  - {id: d, uses: distill, needs: t, teacher: bands}\n"
        "  - {id: p, uses: prune, method: width, keep: 50%}\n",
        "  - {id: bands, uses: adaptive_input, budget: 1 GiB, allow_noop: true}\n"
        "  - {id: p, uses: prune, method: width, keep: 50%}\n",
    ],
)
def test_bands_rule_out_nothing_else(steps: str, tmp_path: Path) -> None:
    assert len(_graph(tmp_path, steps)) > 2


def test_every_cycle_is_named_in_the_direction_of_the_artifacts(tmp_path: Path) -> None:
    steps = (
        "  - {id: a, uses: finetune, needs: c}\n  - {id: b, uses: finetune, needs: a}\n"
        "  - {id: c, uses: finetune, needs: b}\n  - {id: d, uses: finetune, needs: e}\n"
        "  - {id: e, uses: finetune, needs: d}\n  - {id: f, uses: finetune}\n"
    )
    found = mistakes(tmp_path, HEAD + steps)
    assert [(m.line, m.message) for m in found] == [
        (6, "the steps need each other: a -> b -> c -> a"),
        (9, "the steps need each other: d -> e -> d"),
    ]


GATES = {
    "unknown step": ("{step: bst, metric: size, at_most: 5 MB}", "bst", "gates[0].step", "no step has", "best?"),
    "unknown reference": (
        "{step: best, metric: accuracy, drop: {at_most: 5%}, relative_to: studnt}",
        "studnt",
        "gates[0].relative_to",
        "no step has",
        "student?",
    ),
    "itself": (
        "{step: best, metric: accuracy, drop: {at_most: 5%}, relative_to: best}",
        "best}",
        "gates[0].relative_to",
        "compared with itself",
        "another step",
    ),
    "npu metric of a cpu file": (
        "{step: cpu, metric: npu_cycles, at_most: 5}",
        "npu_cycles",
        "gates[0].metric",
        "which 'cpu' is not",
        "these have it: npu",
    ),
    "export metric of a model": (
        "{step: slim, metric: parity_error, at_most: 5%}",
        "parity",
        "gates[0].metric",
        "a metric of an export",
        "cpu, npu, best",
    ),
    "npu metric against the baseline": (
        "{step: npu, metric: npu_cycles, gain: {at_least: 2x}, relative_to: baseline}",
        "baseline}",
        "gates[0].relative_to",
        "gain against 'baseline'",
        "these have it: npu",
    ),
    "no final step has it": ("{metric: npu_cycles, at_most: 5}", "npu_c", "gates[0].metric", "NPU build", "npu"),
    "not measured": ("{step: dark, metric: size, at_most: 5 MB}", "size", "gates[0].metric", "evaluate: false", "true"),
}


@pytest.mark.parametrize("case", GATES)
def test_gates_name_what_there_is(case: str, tmp_path: Path) -> None:
    gate, needle, field, message, remedy = GATES[case]
    head = GOOD[: GOOD.index("gates:")] + "  - {id: dark, uses: quantize, needs: slim, evaluate: false}\ngates:\n  - "
    text = head + gate + "\n"
    (found,) = mistakes(tmp_path, text)
    line, column = place(gate, needle)
    assert (found.line, found.column) == (17, 4 + column)
    assert line == 1
    assert found.field == field
    assert message in found.message
    assert remedy in found.remedy


def test_a_gate_may_judge_the_baseline_and_every_final_step(tmp_path: Path) -> None:
    text = GOOD.replace(
        "gates:\n", "gates:\n  - {step: baseline, metric: accuracy, at_least: 50%}\n  - {metric: size, at_most: 5 MB}\n"
    )
    assert len(good(tmp_path, text).spec.gates) == 4


def test_the_step_to_register_is_one_of_the_steps(tmp_path: Path) -> None:
    (found,) = mistakes(tmp_path, GOOD.replace("register_step: best", "register_step: bset"))
    assert found.field == "tracking.register_step"
    assert found.remedy == "did you mean best?"


def test_references_are_checked_where_a_step_could_not_be_read(tmp_path: Path) -> None:
    text = GOOD.replace("epochs: 2", "epochs: two").replace("needs: student}", "needs: studnt}")
    assert [m.field for m in mistakes(tmp_path, text)] == ["steps.student.epochs", "steps.npu.needs"]


def test_a_graph_built_by_hand_says_what_does_not_fit(tmp_path: Path) -> None:
    spec = good(tmp_path).spec
    steps = (FinetuneSpec(uses="finetune", id="a", needs=("nowhere",)), ExportTfliteSpec(uses="export_tflite", id="a"))
    broken = PipelineSpec.model_validate({**dict(spec), "steps": steps, "gates": (), "tracking": {}})
    with pytest.raises(GraphError, match="no step has the id 'nowhere'") as caught:
        build(broken)
    assert [problem.path for problem in caught.value.problems] == [("steps", 1, "id"), ("steps", 0, "needs", 0)]


def test_a_task_that_a_step_does_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FinetuneSpec, "tasks", ("text-generation",))
    (found,) = mistakes(tmp_path, GOOD)
    assert (found.field, found.message) == (
        "steps.student.uses",
        "finetune does not do the task text-classification",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_step_gives_is_what_its_documentation_says(kind: str) -> None:
    spec = KINDS[kind]
    extra = {"prune": {"sparsity": 0.5}, "select": {"from": ["a"], "minimise": "size"}, "distill": {"teacher": "t"}}
    extra["adaptive_input"] = {"ratio": 2}
    made: StepSpec = spec.model_validate({"uses": kind, "id": "x", **extra.get(kind, {})})
    for taken in spec.takes:
        assert made.gives((taken,)) in spec.makes
