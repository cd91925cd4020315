"""What a run looks like in the real MLflow on SQLite, and that sending it twice changes nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.journal import Journal
from tasks.tracking import Tracker, TrackingError, harden_environment, prepare_store, run_address, tracking_uri, upload
from tasks.tracking import state as states
from tests.tasks import tracking_run
from tests.tasks.tracking_run import CURVE, add_step, copy_database, counts, start, whole_run


@pytest.fixture
def home(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return copy_database(tmp_path_factory.getbasetemp(), tmp_path)


def folder(home: Path, name: str = "sentiment-20260101-000000-ab12") -> Path:
    return home / "runs" / name


def client(home: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri(home), tracking_uri(home))


def runs(home: Path) -> dict[str, Any]:
    """The runs by name; the pipeline's under an empty one."""
    found = client(home).search_runs(["1"])
    return {run.data.tags.get("lathe.step", ""): run for run in found}


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home whose MLflow has one whole run."""
    home = copy_database(tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp("sent"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        whole_run(folder(home), moment=1_700_000_000.0)
        assert upload(folder(home), home).uploaded
        yield home


def test_one_parent_and_a_child_for_each_step(sent: Path) -> None:
    found = runs(sent)
    parent = found.pop("")
    assert parent.info.run_name == "sentiment ab12"
    assert parent.info.status == "FINISHED"
    assert (parent.info.start_time, parent.info.end_time) == (1_700_000_000_000, 1_700_000_051_000)
    assert set(found) == {"baseline", "teacher", "narrow", "cpu"}
    for name, run in found.items():
        assert run.info.run_name == name
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["lathe.state"] == "done"
        assert run.data.tags["lathe.key"] == f"key-{name}"
        assert run.info.status == "FINISHED"
        assert run.info.end_time - run.info.start_time == 5000
    assert found["narrow"].data.params == {"uses": "prune", "id": "narrow", "keep": "0.5"}
    assert found["cpu"].data.tags["lathe.gate.accuracy"] == "passed"
    assert parent.data.params["data.max_length"] == "64"
    assert parent.data.tags["mlflow.source.git.commit"] == "0123456789abcdef"


def test_headline_metrics_of_the_parent(sent: Path) -> None:
    metrics = runs(sent)[""].data.metrics
    assert metrics == pytest.approx(
        {
            "best_accuracy": 0.872,
            "best_size_mb": 12.5,
            "best_latency_p50_ms": 3.4,
            "best_peak_memory_mb": 50,
            "baseline_accuracy": 0.878,
            "baseline_size_mb": 90.9,
            "baseline_latency_p50_ms": 10.8,
            "quality_loss": 0.6,
            "size_ratio": 90.9 / 12.5,
            "speedup": 10.8 / 3.4,
            "gates_passed": 1,
            "gates_failed": 0,
            "run_seconds": 51,
        }
    )


def test_curves_keep_their_steps_and_times(sent: Path) -> None:
    curve = client(sent).get_metric_history(runs(sent)["teacher"].info.run_id, "train_loss")
    assert [(point.step, point.value) for point in curve] == [(index, 1 / (index + 1)) for index in range(CURVE)]
    assert curve[0].timestamp == 1_700_000_010_000
    assert curve[-1].timestamp == 1_700_000_012_900


def test_metrics_carry_the_model_and_the_data(sent: Path) -> None:
    mlflow = client(sent)
    run = runs(sent)["cpu"]
    (model,) = [found for found in mlflow.search_logged_models(["1"]) if found.source_run_id == run.info.run_id]
    assert model.name == "cpu ab12"
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    figures = {metric.key: metric for metric in model.metrics}
    assert figures["accuracy"].value == 0.872
    assert figures["accuracy"].dataset_digest == "e" * 12
    inputs = {item.dataset.digest[0]: item for item in runs(sent)[""].inputs.dataset_inputs}
    assert inputs["t"].tags[0].value == "training"
    assert inputs["e"].tags[0].value == "evaluation"


def test_spec_and_environment_are_artifacts(sent: Path) -> None:
    mlflow, run = client(sent), runs(sent)[""]
    spec = mlflow.download_artifacts(run.info.run_id, "spec/spec.yaml")
    assert Path(spec).read_text() == tracking_run.SPEC_TEXT
    assert run.info.artifact_uri.startswith((sent / "mlartifacts").as_uri())
    names = {item.path for item in mlflow.list_artifacts(run.info.run_id, "spec")}
    assert names == {"spec/spec.yaml", "spec/resolved.json", "spec/environment.json"}
    assert mlflow.list_artifacts(runs(sent)["cpu"].info.run_id)


def test_the_best_run_stands_at_the_top_of_the_experiment(sent: Path) -> None:
    note = client(sent).get_experiment("1").tags["mlflow.note.content"]
    assert f"best accuracy [sentiment ab12](#/experiments/1/runs/{runs(sent)[''].info.run_id}) 0.872" in note
    assert note.endswith("fastest [sentiment ab12](" + note.rpartition("](")[2].partition(")")[0] + ") 3.40 ms")
    page = runs(sent)[""].data.tags["mlflow.note.content"]
    assert "**passed** · cpu: accuracy 0.872, 12.5 MB (7.3× smaller), 3.40 ms (3.2× faster)" in page
    assert "| accuracy drop ≤ 1.5 points | cpu | passed |" in page
    page = f"http://127.0.0.1:5000/#/experiments/1/runs/{runs(sent)[''].info.run_id}?workflowType=machine_learning"
    assert run_address(folder(sent), sent).startswith(page)
    assert run_address(folder(sent), sent, ui="http://h:1").startswith("http://h:1/#/experiments/1/runs/")
    assert run_address(sent / "runs" / "other", sent) == ""


def test_sending_again_changes_nothing(home: Path) -> None:
    whole_run(folder(home))
    assert upload(folder(home), home).uploaded
    before = counts(home)
    assert upload(folder(home), home).uploaded
    assert counts(home) == before
    # The process died after the requests and before it noted them.
    state = states.load(folder(home), tracking_uri(home))
    state.positions = {}
    states.save(folder(home), tracking_uri(home), state)
    assert upload(folder(home), home).uploaded
    assert counts(home) == before
    # Its note is gone altogether; runs and models are found by their tags.
    (folder(home) / states.FILE).unlink()
    assert upload(folder(home), home).uploaded
    assert counts(home) == before
    assert before["runs"] == 5
    assert before["logged_models"] == 4


def test_a_replaced_store_is_sent_everything_again(home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    whole_run(folder(home))
    assert upload(folder(home), home).uploaded
    before = counts(home)
    SqlAlchemyStore._engine_map[tracking_uri(home)].dispose()
    (home / "mlflow.db").unlink()
    copy_database(tmp_path_factory.getbasetemp(), home)
    assert counts(home)["runs"] == 0
    assert upload(folder(home), home).uploaded
    assert counts(home) == before


def test_the_tracker_follows_a_run_as_it_goes(home: Path) -> None:
    journal = start(folder(home))
    tracker = Tracker(folder(home), home, system_seconds=0.2)
    tracker.start()
    add_step(journal, "baseline", moment=time.time())
    deadline = time.monotonic() + 30
    while "baseline" not in states.load(folder(home), tracking_uri(home)).runs and time.monotonic() < deadline:
        time.sleep(0.1)
    assert runs(home)[""].info.status == "RUNNING"
    with tracker.quiet():
        add_step(journal, "teacher", moment=time.time(), curve=3)
        time.sleep(1.5)
        assert "teacher" not in runs(home)
    deadline = time.monotonic() + 30
    while not (folder(home) / "journal" / "system.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    journal.append("run", {"event": "run_end", "time": time.time(), "status": "failed"})
    status = tracker.close(30)
    assert status.uploaded, status
    assert runs(home)["teacher"].data.metrics["train_loss"] == pytest.approx(1 / 3)
    parent = runs(home)[""]
    assert parent.info.status == "FAILED"
    assert parent.data.metrics["system/cpu_utilization_percentage"] >= 0
    began = time.monotonic()
    assert tracker.close().uploaded
    assert time.monotonic() - began < 0.5


def test_what_never_ended_is_shown_as_killed(home: Path) -> None:
    journal = start(folder(home))
    journal.append("teacher", {"event": "step_start", "step": "teacher", "uses": "finetune", "key": "k", "spec": {}})
    end = {"event": "step_end", "step": "narrow", "state": "skipped", "key": "k", "error": "teacher failed"}
    journal.append("narrow", {**end, "result": {}, "evaluation": None})
    journal.append("run", {"event": "run_end", "status": "cancelled"})
    assert upload(folder(home), home).uploaded
    found = runs(home)
    assert {found[name].info.status for name in ("", "teacher", "narrow")} == {"KILLED"}
    assert found["narrow"].data.tags["lathe.state"] == "skipped"


def test_files_arrive_and_a_missing_one_holds_up_nothing(home: Path) -> None:
    report = home / "report"
    (report / "plots").mkdir(parents=True)
    (report / "report.html").write_text("<p>")
    (report / "plots" / "size.svg").write_text("<svg/>")
    journal = start(folder(home))
    journal.append("run", {"event": "file", "step": None, "path": str(report), "to": "report"})
    journal.append("run", {"event": "file", "step": None, "path": str(home / "gone"), "to": "x"})
    journal.append("run", {"event": "file", "path": str(report / "report.html"), "to": "named/other.html"})
    journal.append("run", {"event": "run_end", "status": "passed"})
    status = upload(folder(home), home)
    assert status.uploaded
    parent = runs(home)[""]
    by_hand = f"mlflow artifacts log-artifact --run-id {parent.info.run_id} --local-file PATH"
    reason = f"it is no longer there; where there is a copy, send it with: {by_hand}"
    assert status.problems == (f"{home / 'gone'} was not uploaded: {reason}",)
    assert str(status).splitlines()[-1] == status.problems[0]
    assert parent.info.status == "FINISHED"
    listed = {item.path for item in client(home).list_artifacts(parent.info.run_id, "report")}
    assert listed == {"report/report.html", "report/plots"}
    assert [item.path for item in client(home).list_artifacts(parent.info.run_id, "named")] == ["named/other.html"]


def test_a_partial_run_does_not_compete_for_the_best(home: Path) -> None:
    for place in range(12):  # more than a page of them
        lonely = start(folder(home, f"sentiment-{place}-p{place:03}"), tags={"lathe.partial": "true"})
        add_step(lonely, "baseline", moment=time.time())
        add_step(lonely, "teacher", moment=time.time())
        lonely.append("run", {"event": "run_end", "status": "passed"})
        assert upload(lonely.folder, home).uploaded
    assert "mlflow.note.content" not in client(home).get_experiment("1").tags
    whole = whole_run(folder(home, "sentiment-9-aaaa"))
    assert upload(whole.folder, home).uploaded
    note = client(home).get_experiment("1").tags["mlflow.note.content"]
    assert "best accuracy [sentiment aaaa]" in note
    assert "p0" not in note


def test_a_registration_that_cannot_be_says_what_and_why_and_what_to_do(home: Path) -> None:
    journal = whole_run(folder(home))
    register(journal, home / "gone", 1000.0)
    event = {"event": "register", "step": "cpu", "name": "sentiment-tiny", "task": "text-classification"}
    journal.append("run", {**event, "path": str(home), "kind": "report"})
    journal.append("run", {"event": "metric", "step": None, "name": "late", "value": 1.0, "index": 0})
    status = upload(folder(home), home)
    assert status.uploaded
    states.save(folder(home), tracking_uri(home), states.State(problems=list(status.problems)))
    assert upload(folder(home), home).problems == status.problems, "told once, however often it is sent"
    again = "run the spec again, which registers it anew"
    gone = f"sentiment-tiny (step narrow) was not registered: {home / 'gone'} is no longer there; {again}"
    no_model = "sentiment-tiny (step cpu) was not registered: cpu makes a report, which is no model; "
    assert status.problems == (gone, f"{no_model}name a step that makes a model or an export in tracking.register_step")
    assert "late" in runs(home)[""].data.metrics


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        (
            "register",
            413,
            "the server takes no file of this size; raise its limit for uploads, then run the spec again",
        ),
        ("file", 413, "the server takes no file of this size; raise its limit for uploads, then run the spec again"),
        ("register", 403, "the server forbids it; ask for the right to register models, then run the spec again"),
        ("file", 403, None),
        ("register", 503, None),
    ],
)
def test_what_a_server_will_never_take_is_told_from_an_outage(kind: str, code: int, words: str | None) -> None:
    from requests import HTTPError, Response

    from tasks.tracking.replay import _refusal

    response = Response()
    response.status_code = code
    found = _refusal(kind, HTTPError("a page of HTML", response=response))
    assert found is None if words is None else str(found).startswith(words)


def register(journal: Journal, artifact: Path, moment: float) -> None:
    event = {"event": "register", "step": "narrow", "name": "sentiment-tiny", "task": "text-classification"}
    journal.append("run", {**event, "time": moment, "path": str(artifact), "kind": "model"})


def test_the_champion_moves_on_a_register_event_alone(home: Path, bert: Path) -> None:
    first = whole_run(folder(home, "sentiment-1-aaaa"))
    register(first, bert, 1000.0)
    assert upload(first.folder, home).uploaded
    mlflow = client(home)
    assert mlflow.get_registered_model("sentiment-tiny").aliases == {"champion": 1}

    unregistered = whole_run(folder(home, "sentiment-2-bbbb"))
    assert upload(unregistered.folder, home).uploaded
    assert mlflow.get_registered_model("sentiment-tiny").aliases == {"champion": 1}

    late = whole_run(folder(home, "sentiment-3-cccc"))
    register(late, bert, 999.0)
    assert upload(late.folder, home).uploaded
    assert mlflow.get_registered_model("sentiment-tiny").aliases == {"champion": 1}

    newer = whole_run(folder(home, "sentiment-4-dddd"))
    register(newer, bert, 2000.0)
    assert upload(newer.folder, home).uploaded
    (newer.folder / states.FILE).unlink()
    assert upload(newer.folder, home).uploaded
    assert mlflow.get_registered_model("sentiment-tiny").aliases == {"champion": 3}
    assert len(mlflow.search_model_versions("name = 'sentiment-tiny'")) == 3

    version = mlflow.get_model_version("sentiment-tiny", "3")
    assert version.status == "READY"
    assert version.description.startswith("cpu: accuracy 0.872")
    assert "Lathe need not be installed" in version.description
    check_served(Path(version.source.removeprefix("file://")))


def check_served(model: Path) -> None:
    """Nothing in the model is a pickle, and it answers."""
    import mlflow.pyfunc
    import pandas

    names = [path.name for path in model.rglob("*") if path.is_file()]
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".bin", ".pt"))]
    assert {"MLmodel", "serving.py", "model.safetensors", "input_example.json"} <= set(names)
    answer = mlflow.pyfunc.load_model(str(model)).predict(pandas.DataFrame({"text": ["a gripping film", "dull"]}))
    assert list(answer.columns) == ["label", "score"]
    assert set(answer["label"]) <= {"negative", "positive"}
    assert ((answer["score"] >= 0.5) & (answer["score"] <= 1)).all()


def test_no_secret_reaches_mlflow(home: Path, bert: Path) -> None:
    secret = 'tok3n<&>"value'
    artifact = Path(shutil.copytree(bert, home / "artifact"))
    (artifact / "manifest.json").write_text('{"source": "tok3n<&>\\"value"}')
    (home / "report.html").write_text("<p>tok3n&lt;&amp;&gt;&quot;value</p>")
    (home / "plot.png").write_bytes(b"\x89PNG\xff" + secret.encode())
    journal = whole_run(folder(home), description=f"with {secret}", spec={"steps": [], "token": secret})
    journal.append("run", {"event": "file", "step": None, "path": str(home / "report.html"), "to": "report"})
    journal.append("run", {"event": "file", "step": None, "path": str(home / "plot.png"), "to": "report"})
    register(journal, artifact, 1000.0)
    status = upload(folder(home), home, secrets=[secret])
    assert status.uploaded
    assert [problem for problem in status.problems if "holds a secret" in problem] == list(status.problems)
    assert len(status.problems) == 1
    for path in (home / "mlflow.db", *(home / "mlartifacts").rglob("*"), folder(home) / states.FILE):
        if path.is_file():
            assert b"tok3n" not in path.read_bytes(), path
    report = client(home).download_artifacts(runs(home)[""].info.run_id, "report/report.html")
    assert Path(report).read_text() == "<p>***</p>"


def test_a_deleted_run_says_how_to_bring_it_back(home: Path) -> None:
    journal = whole_run(folder(home))
    assert upload(folder(home), home).uploaded
    client(home).delete_run(runs(home)[""].info.run_id)
    journal.append("run", {"event": "metric", "step": None, "name": "late", "value": 1.0, "index": 0})
    status = upload(folder(home), home, patience=0)
    assert not status.uploaded
    assert status.waiting == 1
    assert "mlflow runs restore" in str(status.reason)
    assert status.remedy == f"lathe report {folder(home).name} --upload --spec specs/sentiment.yaml"


def test_a_folder_is_no_store(home: Path) -> None:
    whole_run(folder(home))
    for uri in ("./mlruns", "file:///tmp/mlruns"):
        status = upload(folder(home), home, uri, patience=0)
        assert not status.uploaded
        assert "sqlite:///" in str(status.reason)
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI"):
        prepare_store(home, "./mlruns")


def test_the_store_is_where_the_environment_says(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri(home) == f"sqlite:///{home / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert tracking_uri(home) == "http://127.0.0.1:9"


def test_unsafe_parts_of_mlflow_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    harden_environment()
    from mlflow import environment_variables as variables

    assert variables.MLFLOW_ALLOW_PICKLE_DESERIALIZATION.get() is False
    assert variables.MLFLOW_SERVER_ENABLE_JOB_EXECUTION.get() is False
    assert variables.MLFLOW_SERVER_JOB_ENABLE_PERIODIC_TASKS.get() is False
    assert variables.MLFLOW_SERVER_ENABLE_CUSTOM_SCORERS.get() is False
    assert variables.MLFLOW_ENABLE_AI_GATEWAY.get() is False
    assert variables.MLFLOW_DISABLE_TELEMETRY.get() is True
    assert variables.MLFLOW_HTTP_REQUEST_TIMEOUT.get() == 3


def test_first_starts_that_coincide_make_one_database(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db.new").write_bytes(b"left by a process that was killed")
    code = (
        "import sys; from pathlib import Path; from tasks.tracking import upload\n"
        "home = Path(sys.argv[1]); status = upload(home / 'runs' / sys.argv[2], home)\n"
        "sys.exit(0 if status.uploaded else str(status))"
    )
    names = ["sentiment-1-aaaa", "sentiment-2-bbbb"]
    for name in names:
        whole_run(folder(tmp_path, name))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), name], stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for name in names
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err.decode()
        assert out + err == b"", "MLflow talks on the terminal"
    assert counts(tmp_path)["runs"] == 10
    assert not list(tmp_path.glob("mlflow.db.new*"))
