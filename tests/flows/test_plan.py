"""The plan: its graph, the places of its problems, and the folder that everything goes to."""

from __future__ import annotations

import io
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from flows.errors import PlanError
from flows.home import Home
from flows.optimize import resume_command
from flows.places import Problem, path_of_step, placed
from flows.plan import Plan, PlannedStep, make_plan
from flows.record import home_for
from flows.show import graph_lines, show_plan
from flows.terminal import ExitCode
from specs.schema.graph import build
from specs.schema.load import LoadedSpec, load
from tasks import events, supervise
from tasks.artifacts import Store
from tests.flows.conftest import SPEC
from tests.flows.test_cli_spec import lathe
from tests.specs.writing import place, write

ROOT = Path(__file__).parents[2]

FORKED = """\
steps:
  - {id: t, uses: finetune}
  - {id: a, uses: prune, sparsity: 50%, needs: t}
  - {id: b, uses: quantize, needs: t}
  - {id: c, uses: quantize, needs: a}
  - {id: best, uses: select, from: [b, c], minimise: size}
"""


def tiny(folder: Path, text: str, overrides: tuple[str, ...] = ()) -> LoadedSpec:
    return load(write(folder, text), overrides)


def planned(loaded: LoadedSpec, problems: tuple[str, ...] = ()) -> Plan:
    """A plan as preflight leaves it when it found problems: nothing is known of any step."""
    graph = build(loaded.spec)
    steps = tuple(PlannedStep(node, "", {}, "unknown", False, "") for node in graph)
    facts = (("device", "cpu"),)
    return Plan(loaded.spec, graph, "cpu", 1, {}, {}, steps, facts, problems, ())


def test_every_step_stands_under_its_first_input(tmp_path: Path) -> None:
    lines = [line.rstrip() for line, _ in graph_lines(planned(tiny(tmp_path, SPEC + FORKED)))]
    assert lines == [
        "baseline    model",
        "└─t         finetune",
        "  ├─a       prune",
        "  │ └─c     quantize",
        "  └─b       quantize",
        "    └─best  select (+ c)",
    ]


def test_what_changed_is_told_against_runs_of_the_same_spec(tmp_path: Path) -> None:
    from flows.plan import latest_recipes

    store = Store(tmp_path / "store")
    for number, spec in enumerate(("mine", "other")):
        with store.scratch() as scratch:
            out = scratch / "out"
            out.mkdir()
            (out / "file").write_text(spec)
            recipe = {"step": "teacher", "uses": "finetune", "spec": {"epochs": number}}
            key = str(number) * 64
            store.commit(out, key=key, kind="model", recipe=recipe, result={}, properties={})
        store.pin(f"run-{number}", [key], spec=spec)
    assert latest_recipes(store, "mine")["teacher"]["spec"] == {"epochs": 0}
    assert latest_recipes(store, "other")["teacher"]["spec"] == {"epochs": 1}
    assert latest_recipes(store, "third") == {}


def test_each_line_belongs_to_its_step(tmp_path: Path) -> None:
    drawn = graph_lines(planned(tiny(tmp_path, SPEC + FORKED)))
    assert [step.node.id for _, step in drawn] == ["baseline", "t", "a", "c", "b", "best"]
    assert all(f"─{step.node.id} " in line for line, step in drawn[1:])


def test_an_estimate_of_a_run_that_cannot_start_is_not_given(tmp_path: Path) -> None:
    loaded = tiny(tmp_path, SPEC + FORKED)
    for problems, told in (((), True), (("no data",), False)):
        console = Console(file=io.StringIO(), width=80)
        show_plan(planned(loaded, problems), console)
        assert ("estimate" in console.file.getvalue()) is told  # type: ignore[attr-defined]


def test_problems_of_the_model_and_the_data_have_a_place(tmp_path: Path) -> None:
    text = SPEC.replace("hidden_size", "hidden_sizee").replace('train: "builtin:reviews"', "train: none.jsonl") + FORKED
    loaded = tiny(tmp_path, text)
    data, model = make_plan(loaded, Home(tmp_path / "home")).problems
    line, column = place(text, "train: none.jsonl")
    assert data.startswith(f"{tmp_path / 'spec.yaml'}:{line}:{column}: data.train: {tmp_path / 'none.jsonl'}: no such")
    line, column = place(text, "hidden_sizee")
    assert model.startswith(f"{tmp_path / 'spec.yaml'}:{line}:{column}: model.config.hidden_sizee is no field of bert;")


def test_problems_of_a_step_stand_at_its_field_or_at_the_step(tmp_path: Path) -> None:
    text = SPEC + FORKED + "  - {id: cpu, uses: export_tflite, length: 99, needs: t}\n"
    loaded = tiny(tmp_path, text)
    (problem,) = make_plan(loaded, Home(tmp_path / "home")).problems
    line, column = place(text, "length: 99")
    assert problem.startswith(f"{tmp_path / 'spec.yaml'}:{line}:{column}: cpu: length is 99")
    steps = loaded.spec.steps
    path = path_of_step(steps, steps[2], "cannot be done")
    line, column = place(text, "{id: b,")
    assert placed(loaded, Problem("b: cannot", path)) == f"{tmp_path / 'spec.yaml'}:{line}:{column}: b: cannot"


def test_sizes_that_a_step_before_may_change_are_no_problem_yet(tmp_path: Path) -> None:
    steps = """\
steps:
  - {id: v, uses: prune, method: vocabulary}
  - {id: behind, uses: adaptive_input, budget: 1 KiB}
  - {id: alone, uses: adaptive_input, budget: 1 KiB, needs: baseline}
"""
    plan = make_plan(tiny(tmp_path, SPEC + steps), Home(tmp_path / "home"))
    (problem,) = plan.problems
    assert ": alone: budget 1.02 kB is smaller than" in problem
    assert [text for text in plan.warnings if text.startswith("behind: budget 1.02 kB is smaller than")]


def test_a_value_from_the_command_line_is_its_own_place(tmp_path: Path) -> None:
    override = "data.eval=none.csv"
    (problem,) = make_plan(tiny(tmp_path, SPEC + FORKED, (override,)), Home(tmp_path / "home")).problems
    assert problem.startswith(f"--set {override}: data.eval: ")


def test_every_step_that_is_named_is_meant(tmp_path: Path) -> None:
    loaded, home = tiny(tmp_path, SPEC + FORKED), Home(tmp_path / "home")
    states = {step.node.id: step.state for step in make_plan(loaded, home, only=["a", "b"]).steps}
    assert states == {"baseline": "run", "t": "run", "a": "run", "b": "run", "c": "out", "best": "out"}
    forced = {step.node.id for step in make_plan(loaded, home, from_step=["b", "c"]).steps if step.force}
    assert forced == {"b", "c", "best"}


def test_an_option_that_is_given_again_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, SPEC + FORKED)
    assert lathe("plan", path, "--only", "nosuch", "--only", "a") == ExitCode.SPEC
    assert "--only nosuch: there is no such step" in capsys.readouterr().err
    assert resume_command(path, ("a=1", "b=2"), ("a", "b")).endswith("--set a=1 --set b=2 --only a --only b")


def test_a_device_that_is_not_there_has_a_place(tmp_path: Path) -> None:
    text = SPEC + FORKED + "resources: {device: cuda}\n"
    line, column = place(text, "device: cuda")
    with pytest.raises(PlanError, match=f"spec.yaml:{line}:{column}: resources.device is cuda"):
        make_plan(tiny(tmp_path, text), Home(tmp_path / "home"))


def test_an_interrupt_while_planning_begins_no_run(tmp_path: Path) -> None:
    from flows.optimize import optimize

    def interrupt(event: events.Event) -> None:
        if event.get("text") == "planning":
            signal.raise_signal(signal.SIGINT)

    path, home = write(tmp_path, SPEC + FORKED), Home(tmp_path / "home")
    try:
        with events.listening(interrupt):
            state = optimize.fn(str(path), home=str(home.root))
    finally:
        supervise.reset(1)
    assert state.is_cancelled()
    assert not home.runs.exists()


def test_a_home_that_cannot_be_made_stops_every_command_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, SPEC + FORKED)
    for home, reason in ((path, "File exists"), (Path("/proc/nope"), "No such file or directory")):
        monkeypatch.setenv("LATHE_HOME", str(home))
        for words in (("plan", path), ("run", path), ("up",)):
            assert lathe(*words) == ExitCode.SPEC
            told = f"{home}, where runs and artifacts go, cannot be made: {reason}; set LATHE_HOME"
            assert capsys.readouterr().err.startswith(told), words
        assert lathe("doctor") == ExitCode.STEP
        assert "cannot be" in capsys.readouterr().out


def test_a_taken_port_is_a_mistake_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LATHE_HOME", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert lathe("up", "--prefect-port", str(port)) == ExitCode.SPEC
    assert f"port {port} is taken" in capsys.readouterr().err


def test_an_unknown_form_is_a_mistake_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert lathe("report", "--format", "xx") == ExitCode.SPEC
    assert "'xx' is not one of 'table', 'md', 'csv', 'json'" in capsys.readouterr().err


@pytest.mark.parametrize(("parallel", "shared"), [(1, set()), (2, {"a", "b", "c"})])
def test_steps_that_may_work_at_the_same_time_are_known(tmp_path: Path, parallel: int, shared: set[str]) -> None:
    plan = planned(tiny(tmp_path, SPEC + FORKED + f"resources: {{parallel: {parallel}}}\n"))
    assert {step.node.id for step in plan.steps if plan.side_by_side(step.node.id)} == shared
    standing = replace(plan, steps=tuple(replace(step, state="cached") for step in plan.steps))
    assert not any(standing.side_by_side(step.node.id) for step in standing.steps)


def test_the_plan_loads_no_torch(tmp_path: Path) -> None:
    """Its process is that of the run, where torch and transformers would cost memory and six seconds."""
    path = write(tmp_path, SPEC + FORKED)
    code = (
        "import sys; from pathlib import Path\n"
        "from flows.home import Home; from flows.plan import make_plan; from specs.schema.load import load\n"
        f"plan = make_plan(load(Path({str(path)!r})), Home(Path({str(tmp_path)!r})))\n"
        "assert not plan.problems and dict(plan.facts)['model'].startswith('BertFor'), plan\n"
        "print({'torch', 'transformers', 'mlflow', 'tensorflow'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr


def test_a_home_that_is_named_comes_before_one_that_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "specs" / ".lathe" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LATHE_HOME", raising=False)
    assert home_for(None).root == tmp_path / "specs" / ".lathe"
    monkeypatch.setenv("LATHE_HOME", str(tmp_path / "elsewhere"))
    assert home_for(None).root == tmp_path / "elsewhere"
    assert home_for(tmp_path / "specs" / "any.yaml").root == tmp_path / "elsewhere"
