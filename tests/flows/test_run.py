"""`lathe run` from data to report, with the real Prefect and the real MLflow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tasks.artifacts import Store
from tests.flows.conftest import Project, Server, wait_for

FORKED = """
steps:
  - {id: trained, uses: finetune, epochs: 3, learning_rate: 2e-3}
  - {id: half, uses: quantize, precision: bf16}
  - {id: packed, uses: quantize, needs: trained}
  - {id: best, uses: select, from: [half, packed], minimise: size}
gates:
  - {step: best, metric: accuracy, drop: {at_most: 60 points}, relative_to: trained}
  - {step: best, metric: size, gain: {at_least: 2x}}
tracking: {experiment: forks, register: tiny}
resources: {parallel: 2}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, prefect_server: Server):
    project = Project(tmp_path_factory.mktemp("finished"), prefect_server.variables)
    project.write(FORKED)
    return project, project.outcome()


def test_a_passing_run_says_so_everywhere(finished, prefect_server: Server):
    _project, (code, outcome) = finished
    assert (code, outcome["status"]) == (0, "passed")
    assert [row["step"] for row in outcome["rows"]] == ["baseline", "trained", "half", "packed", "best"]
    flow_run = prefect_server.flow_run(outcome["run_id"])
    assert flow_run["state"]["type"] == "COMPLETED"
    assert prefect_server.task_states(flow_run["id"]) == dict.fromkeys(
        ["baseline", "trained", "half", "packed", "best"], "COMPLETED"
    )


def test_every_artifact_is_measured_on_its_own_file(finished):
    _project, (_, outcome) = finished
    from flows.record import read_run

    record = read_run(Path(outcome["folder"]))
    assert record is not None
    for name in ("trained", "half", "packed", "best"):
        metrics = record.ended[name]["evaluation"]["metrics"]
        assert {"accuracy", "f1", "latency_p50", "latency_p99", "throughput", "peak_memory", "size"} <= set(metrics)
        assert metrics["accuracy"]["low"] <= metrics["accuracy"]["value"] <= metrics["accuracy"]["high"]
        folder = Path(record.ended[name]["path"])
        assert metrics["size"]["value"] == sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_the_report_and_the_table_artifact_are_there(finished, prefect_server: Server):
    _project, (_, outcome) = finished
    report = Path(outcome["folder"]) / "report"
    for name in ("report.md", "report.html", "report.csv", "report.json"):
        assert "packed" in (report / name).read_text()
    artifacts = prefect_server.ask("artifacts/filter", {"artifacts": {"key": {"any_": ["report"]}}})
    table = next(found for found in artifacts if outcome["run_id"] in (found["description"] or ""))
    assert [row["step"] for row in json.loads(table["data"])] == ["baseline", "trained", "half", "packed", "best"]


def test_mlflow_has_parent_children_curves_and_the_champion(finished):
    project, (_, _outcome) = finished
    client = project.mlflow()
    experiment = client.get_experiment_by_name("forks")
    runs = client.search_runs([experiment.experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(runs) == 6
    assert len(children) == 5
    trained = next(run for run in children if run.info.run_name == "trained")
    assert len(client.get_metric_history(trained.info.run_id, "train_loss")) > 2
    best = client.get_model_version_by_alias("tiny", "champion")
    assert best.version


def test_a_second_run_does_no_work_and_a_change_only_what_depends_on_it(finished):
    project, _ = finished
    code, again = project.outcome()
    assert code == 0
    assert set(project.states(again["run_id"]).values()) == {"cached"}
    assert encoded(project, again["run_id"]) == {"data.train", "data.eval"}
    plan = project.plan("steps.half.precision=fp16")
    assert {name: step.state for name, step in plan.items()} == {
        "baseline": "cached",
        "trained": "cached",
        "half": "run",
        "packed": "cached",
        "best": "run",
    }
    assert "bf16" in plan["half"].reason
    assert "fp16" in plan["half"].reason
    assert "half" in plan["best"].reason


def encoded(project: Project, run_id: str) -> set[str]:
    """The encoded data that a run refers to."""
    listed = json.loads(project.lathe("cache", "ls", "--json").stdout)
    return {entry["step"] for entry in listed if entry["kind"] == "data" and run_id in entry["runs"]}


def test_from_makes_a_step_and_its_descendants_anew_with_the_same_bytes(finished):
    project, _ = finished
    before = digests(project)
    code, again = project.outcome("--from", "half")
    assert code == 0
    states = project.states(again["run_id"])
    assert states == {"baseline": "cached", "trained": "cached", "half": "done", "packed": "cached", "best": "done"}
    assert digests(project) == before


def test_only_makes_one_step_and_what_it_needs(finished):
    project, _ = finished
    code, outcome = project.outcome("--only", "packed")
    assert code == 0
    assert set(project.states(outcome["run_id"])) == {"baseline", "trained", "packed"}
    assert "2 gates on steps outside the selection were not judged" in outcome["message"]
    assert Path(outcome["result"]).is_dir()


def test_commands_on_a_finished_run(finished):
    project, (_, outcome) = finished
    assert "every artifact is whole" in project.lathe("cache", "verify").stdout
    listed = json.loads(project.lathe("cache", "ls", "--json").stdout)
    assert {"trained", "half", "packed", "best"} <= {entry["step"] for entry in listed}
    table = project.lathe("report", outcome["run_id"])
    assert table.returncode == 0
    assert "packed" in table.stdout
    assert project.lathe("report", outcome["run_id"], "--format", "csv").stdout.startswith("step,")
    wrong = project.lathe("report", "tinny-1")
    assert wrong.returncode == 2
    assert "unknown" in wrong.stderr


def test_gc_keeps_what_a_kept_run_refers_to(finished):
    project, (_, outcome) = finished
    store, dropped = Store(project.home / "store"), 64 * "0"
    with store.scratch() as folder:
        (folder / "report").mkdir()
        (folder / "report" / "x").touch()
        store.commit(folder / "report", key=dropped, kind="report", recipe={}, result={}, properties={})
    store.pin("another-run", [dropped])
    before = {entry.key for entry in store.ls()}
    kept = project.lathe("cache", "gc", "--keep-runs", "0", "--keep", outcome["run_id"])
    assert kept.returncode == 0, kept.stderr
    after = {entry["key"]: entry for entry in json.loads(project.lathe("cache", "ls", "--json").stdout)}
    assert dropped in before - after.keys()
    assert all(outcome["run_id"] in entry["runs"] for entry in after.values())
    assert {"data.train", "data.eval"} <= {entry["step"] for entry in after.values()}
    assert set(project.plan_states().values()) == {"cached"}


def test_a_damaged_artifact_is_found_and_made_anew(finished):
    project, _ = finished
    key = project.plan()["half"].key
    weights = project.home / "store" / "artifacts" / key[:2] / key / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(data)
    damaged = project.lathe("cache", "verify")
    assert damaged.returncode == 1
    assert key in damaged.stdout
    states = project.plan_states()
    assert (states["trained"], states["half"]) == ("cached", "run")


def digests(project: Project) -> dict[str, str]:
    store = Store(project.home / "store")
    return {name: store.open(step.key).digest for name, step in project.plan().items()}


def test_a_failing_gate_is_exit_code_1_and_moves_no_champion(project: Project):
    project.write(
        "steps:\n  - {id: half, uses: quantize, precision: bf16}\n"
        "gates:\n  - {step: half, metric: accuracy, at_least: 99%}\n"
        "tracking: {register: never}\n"
    )
    code, outcome = project.outcome()
    assert (code, outcome["status"]) == (1, "failed")
    with pytest.raises(Exception, match="never"):
        project.mlflow().get_registered_model("never")


def test_a_failed_step_does_not_stop_the_other_branch(project: Project, prefect_server: Server):
    project.write(
        "steps:\n"
        "  - {id: good, uses: quantize, precision: bf16, evaluate: false, needs: baseline}\n"
        "  - {id: bad, uses: quantize, skip: ['*no_such_layer*'], retries: 2, needs: baseline}\n"
        "  - {id: after, uses: select, from: bad, minimise: size, evaluate: false}\n"
    )
    code, outcome = project.outcome()
    assert (code, outcome["status"]) == (3, "error")
    assert project.states(outcome["run_id"]) == {
        "baseline": "done",
        "good": "done",
        "bad": "failed",
        "after": "skipped",
    }
    assert "no_such_layer" in outcome["failures"]["bad"]
    flow_run = prefect_server.flow_run(outcome["run_id"])
    assert flow_run["state"]["name"] == "StepFailed"
    runs = prefect_server.ask("task_runs/filter", {"task_runs": {"flow_run_id": {"any_": [flow_run["id"]]}}})
    assert next(run["run_count"] for run in runs if run["name"] == "bad") == 1, "a refused input was tried again"
    assert project.plan_states() == {"baseline": "cached", "good": "cached", "bad": "run", "after": "run"}


def test_a_step_past_its_timeout_is_stopped_and_tried_again(project: Project, prefect_server: Server):
    project.write(
        "steps:\n  - {id: slow, uses: finetune, epochs: 900, timeout: 5 s, retries: 1, retry_delay: 0 s, "
        "evaluate: false}\n"
    )
    code, outcome = project.outcome()
    assert code == 3
    assert "timeout of 5 s" in outcome["failures"]["slow"]
    flow_run = prefect_server.flow_run(outcome["run_id"])
    runs = prefect_server.ask("task_runs/filter", {"task_runs": {"flow_run_id": {"any_": [flow_run["id"]]}}})
    assert next(run["run_count"] for run in runs if run["name"] == "slow") == 2


def test_the_embedded_server_serves_a_run_without_any_other(lonely: Project):
    (lonely.folder / "tasks").mkdir()
    (lonely.folder / "tasks" / "__init__.py").write_text("raise SystemExit('a stranger ran')")
    lonely.write("steps:\n  - {id: half, uses: quantize, precision: bf16, evaluate: false}\n")
    process = lonely.start("run", "spec.yaml", PYTHONSAFEPATH="1")  # as the installed command starts
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "passed" in out
    assert "half: done" in err
    assert "Traceback" not in err
    assert "a stranger ran" not in out + err


def test_an_outage_of_mlflow_costs_records_nothing(project: Project):
    project.write("steps:\n  - {id: half, uses: quantize, precision: bf16, evaluate: false}\n")
    code, outcome = project.outcome(MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert code == 0
    assert "--upload" in outcome["tracking_incomplete"]
    sent = project.lathe("report", outcome["run_id"], "--upload")
    assert sent.returncode == 0, sent.stderr
    client = project.mlflow()
    experiment = client.get_experiment_by_name("tiny")
    assert len(client.search_runs([experiment.experiment_id])) == 3


def test_secrets_reach_no_record(project: Project, tmp_path: Path):
    secret = "hunter2-very-secret"
    project.write(
        "description: ${LATHE_TEST_SECRET}\n"
        "steps:\n"
        "  - {id: half, uses: quantize, precision: bf16, evaluate: false}\n"
        "  - {id: bad, uses: quantize, skip: ['${LATHE_TEST_SECRET}*'], evaluate: false, needs: baseline}\n"
    )
    code, outcome = project.outcome(LATHE_TEST_SECRET=secret)
    assert code == 3
    assert secret not in json.dumps(outcome)
    holders = [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert holders == []


def test_a_choice_is_made_again_when_the_measurements_are(project: Project):
    project.write(
        "steps:\n"
        "  - {id: half, uses: quantize, precision: bf16}\n"
        "  - {id: best, uses: select, from: [half], minimise: latency_p50}\n"
    )
    assert project.outcome()[0] == 0
    assert project.plan_states() == {"baseline": "cached", "half": "cached", "best": "cached"}
    changed = project.plan_states("evaluate.latency.repeats=6")
    assert changed == {"baseline": "measure", "half": "measure", "best": "run"}


def test_two_runs_share_a_store_and_make_each_artifact_once(project: Project):
    project.write("steps:\n  - {id: half, uses: quantize, precision: bf16, evaluate: false}\n")
    other = project.start("run", "spec.yaml", "--json")
    wait_for(project.run_ids, 60, "the other run")
    code, outcome = project.outcome()
    outcomes = [outcome, json.loads(other.communicate(timeout=200)[0])]
    assert (code, other.returncode) == (0, 0)
    made = [project.states(outcome["run_id"])["half"] for outcome in outcomes]
    assert sorted(made) == ["cached", "done"]


def test_a_problem_found_by_the_plan_stops_the_run_before_it_starts(project: Project):
    project.write("steps:\n  - {id: half, uses: quantize, precision: bf16}\n")
    missing = project.lathe("plan", "spec.yaml", "--set", "data.train=no-such-file.jsonl")
    assert missing.returncode == 2
    assert "no-such-file.jsonl" in missing.stdout
    refused = project.lathe("run", "spec.yaml", "--set", "data.train=no-such-file.jsonl")
    assert refused.returncode == 2
    assert "no-such-file.jsonl" in refused.stderr
    assert project.run_ids() == []
