"""Ctrl-C, a cancellation in Prefect, and kill -9: nothing finished is lost, nothing half is left."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from flows.record import read_run
from tests.flows.conftest import Project, Server, wait_for

LONG = """
steps:
  - {id: trained, uses: finetune, epochs: %d, learning_rate: 1e-3, save_every: 0.5 s, eval_steps: 1000, evaluate: false}
  - {id: half, uses: quantize, precision: bf16, evaluate: false}
"""


def training(project: Project, process) -> str:
    """The id of the run, once its training has saved a checkpoint."""

    def begun():
        assert process.poll() is None, process.communicate()
        return any((project.home / "store" / "checkpoints").glob("*/*/*")) and project.run_ids()

    return wait_for(begun, 120, "a checkpoint")[-1]


def whole(project: Project) -> None:
    done = project.lathe("cache", "verify")
    assert done.returncode == 0, done.stdout


def children(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def assert_gone(pids: list[int]) -> None:
    alive = lambda: [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]  # noqa: E731
    wait_for(lambda: not alive(), 30, f"the end of {pids}")


def test_ctrl_c_cancels_in_good_order(project: Project, prefect_server: Server):
    measured = (LONG % 900).replace("bf16, evaluate: false", "bf16")
    project.write(measured + "gates:\n  - {step: half, metric: size, at_most: 1 GB}\n")
    process = project.start("run", "spec.yaml", "--json")
    run = training(project, process)
    started = children(process.pid)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert json.loads(out)["status"] == "cancelled"
    assert err.endswith("\ninterrupted\n")
    assert project.states(run) == {"baseline": "done", "trained": "cancelled", "half": "cancelled"}
    record = read_run(project.home / "runs" / run)
    assert record is not None
    assert record.verdicts == [], "what was cancelled has failed no gate"
    assert prefect_server.flow_run(run)["state"]["type"] == "CANCELLED"
    runs = project.mlflow().search_runs([project.mlflow().get_experiment_by_name("tiny").experiment_id])
    parent = next(found for found in runs if "mlflow.parentRunId" not in found.data.tags)
    assert parent.info.status == "KILLED"
    assert_gone(started)
    whole(project)


def test_a_second_ctrl_c_waits_for_nothing_and_leaves_an_end(project: Project, prefect_server: Server):
    project.write(LONG % 900)
    process = project.start("run", "spec.yaml")
    run = training(project, process)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: project.states(run).get("trained") == "cancelled", 60, "the effect of the first one")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"{run}: " in out
    assert "; finished steps are kept\n" in out
    assert "next      lathe run spec.yaml" in out
    assert err.endswith("\ninterrupted\n")
    assert "Traceback" not in err
    assert "Error logging" not in err
    assert project.states(run) == {"baseline": "done", "trained": "cancelled", "half": "cancelled"}
    record = read_run(project.home / "runs" / run)
    assert record is not None
    assert record.end is not None
    assert record.end["status"] == "cancelled"
    assert prefect_server.flow_run(run)["state"]["type"] == "CANCELLED"
    whole(project)


def test_an_interrupt_in_the_first_seconds_is_told(lonely: Project):
    lonely.write(LONG % 900)
    process = lonely.start("run", "spec.yaml")
    wait_for(lambda: (lonely.home / "prefect-server.log").exists(), 60, "the start of the server")
    started = wait_for(lambda: children(process.pid), 10, "the process of the server")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.endswith("interrupted\n")
    assert "Traceback" not in err
    assert lonely.run_ids() == []
    assert_gone(started)


def test_a_cancellation_in_prefect_stops_the_run(project: Project, prefect_server: Server):
    project.write(LONG % 900)
    process = project.start("run", "spec.yaml", "--json")
    run = training(project, process)
    flow_run = prefect_server.flow_run(run)
    body = {"state": {"type": "CANCELLING", "name": "Cancelling"}, "force": False}
    prefect_server.ask(f"flow_runs/{flow_run['id']}/set_state", body)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert prefect_server.flow_run(run)["state"]["type"] == "CANCELLED"
    whole(project)


@pytest.mark.timeout(400)
def test_kill_9_loses_nothing_and_the_resumed_weights_are_those_of_an_uninterrupted_run(
    project: Project, prefect_server: Server, tmp_path: Path
):
    project.write(LONG % 60)
    process = project.start("run", "spec.yaml")
    run = training(project, process)
    started = children(process.pid)
    process.kill()
    process.wait()
    assert_gone(started)
    whole(project)
    flow_run = prefect_server.flow_run(run)
    assert flow_run["state"]["type"] == "RUNNING", "a killed process cannot have reported its end"

    code, resumed = project.outcome()
    assert code == 0
    assert project.states(resumed["run_id"])["baseline"] == "cached"
    assert resumption(project, resumed["run_id"]) > 0, "training began again from the start"
    assert prefect_server.flow_run(run)["state"]["type"] == "CRASHED"
    assert "RUNNING" not in prefect_server.task_states(flow_run["id"]).values()
    assert project.states(run)["trained"] == "failed"

    other = Project(tmp_path / "uninterrupted", prefect_server.variables)
    other.folder.mkdir()
    other.write(LONG % 60)
    code, _straight = other.outcome()
    assert code == 0
    assert weights(other, "trained") == weights(project, "trained")


def resumption(project: Project, run: str) -> float:
    """The first optimiser step that the run itself reported."""
    from tasks.journal import read

    steps = [
        event["index"]
        for event in read(project.home / "runs" / run)
        if event["event"] == "metric" and event["name"] == "train_loss"
    ]
    return min(steps) - 1


def weights(project: Project, step: str) -> str:
    plan = json.loads(project.lathe("plan", "spec.yaml", "--json").stdout)
    key = next(found["key"] for found in plan["steps"] if found["id"] == step)
    manifest = json.loads((project.home / "store" / "artifacts" / key[:2] / key / "manifest.json").read_text())
    return manifest["files"]["model.safetensors"]["sha256"]


def test_the_embedded_server_goes_with_a_killed_run(lonely: Project):
    lonely.write(LONG % 900)
    process = lonely.start("run", "spec.yaml")
    wait_for(lambda: (lonely.home / "workers.log").exists(), 60, "the start of both servers")
    started = wait_for(lambda: children(process.pid), 10, "their processes")
    assert any("flows.embedded" in " ".join(psutil.Process(pid).cmdline()) for pid in started)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert_gone(started)
