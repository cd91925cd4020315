"""A Prefect server that stays for the session, and the `lathe` command: in this process, or in one of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

if TYPE_CHECKING:
    from flows.plan import PlannedStep

LATHE = (sys.executable, "-m", "flows.cli")

SPEC = """\
name: tiny
task: text-classification
model:
  config:
    model_type: bert
    vocab_size: 320
    hidden_size: 32
    num_hidden_layers: 2
    num_attention_heads: 2
    intermediate_size: 64
    max_position_embeddings: 32
data: {train: "builtin:reviews", eval: "builtin:reviews", max_length: 24, train_limit: 96, eval_limit: 60}
evaluate: {latency: {repeats: 5, warmup: 1}, bootstrap: 200}
"""


@dataclass(frozen=True)
class Server:
    """A Prefect server: its API's address and the variables that lead to it."""

    url: str
    variables: Mapping[str, str]

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON answer to a GET, or to a POST of ``body``."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        with urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or b"null")

    def flow_run(self, name: str) -> dict[str, Any]:
        """The flow run with this name."""
        found = self.ask("flow_runs/filter", {"flow_runs": {"name": {"any_": [name]}}})
        assert len(found) == 1, f"{len(found)} flow runs named {name}"
        return found[0]

    def task_states(self, flow_run: str) -> dict[str, str]:
        """State type by task-run name."""
        found = self.ask("task_runs/filter", {"task_runs": {"flow_run_id": {"any_": [flow_run]}}})
        return {run["name"]: run["state"]["type"] for run in found}


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("prefect")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    variables = {"PREFECT_HOME": str(folder), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **variables}, start_new_session=True
        )
    try:
        wait_for(lambda: _answers(f"{url}/health"), 180)
        yield Server(url, {**variables, "PREFECT_API_URL": url})
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (URLError, OSError):
        return False


def wait_for(condition: Callable[[], Any], patience: float, what: str = "the condition") -> Any:
    """The first true answer of ``condition``."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        answer = condition()
        if answer:
            return answer
        time.sleep(0.2)
    raise AssertionError(f"{what} did not come within {patience} s")


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


@dataclass
class Project:
    """A folder with a spec, and the command line in it."""

    folder: Path
    variables: Mapping[str, str]

    @property
    def spec(self) -> Path:
        return self.folder / "spec.yaml"

    @property
    def home(self) -> Path:
        return self.folder / ".lathe"

    def write(self, rest: str) -> Path:
        """A spec of the tiny model with these steps, gates and so on."""
        self.spec.write_text(SPEC + rest)
        return self.spec

    def environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        """Those of this process, of the project and of one command."""
        return {**os.environ, **self.variables, **variables}

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """The command as people run it, in a process and a process group of its own."""
        return subprocess.Popen(
            [*LATHE, *arguments],
            cwd=self.folder,
            env=self.environment(variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def lathe(self, *arguments: str, **variables: str) -> Done:
        """The command, run to its end in this process, where Prefect, MLflow and the server that forks the steps are
        loaded once for all of them."""
        from prefect import context

        from flows.cli import main

        with (
            mock.patch.dict(os.environ, self.environment(variables)),
            contextlib.chdir(self.folder),
            # Prefect reads the environment once; its threads know no other settings than these.
            mock.patch.object(context, "GLOBAL_SETTINGS_CONTEXT", context.root_settings_context()),
            # Ctrl-C is for pytest.
            mock.patch.multiple("flows.cli", end_at_once=signal.default_int_handler, leave=sys.exit),
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as err,
            pytest.raises(SystemExit) as end,
        ):
            main(arguments)
        assert isinstance(end.value.code, int)
        return Done(end.value.code, out.getvalue(), err.getvalue())

    def outcome(self, *arguments: str, **variables: str) -> tuple[int, dict[str, Any]]:
        """Exit code and JSON of `lathe run`."""
        done = self.lathe("run", "spec.yaml", "--json", *arguments, **variables)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)

    def plan(self, *overrides: str) -> dict[str, PlannedStep]:
        """What `lathe plan` shows of each step, worked out in this process, which costs less."""
        from flows.home import Home
        from flows.plan import make_plan
        from specs.schema.load import load

        made = make_plan(load(self.spec, overrides), Home(self.home))
        assert not made.problems
        return {step.node.id: step for step in made.steps}

    def plan_states(self, *overrides: str) -> dict[str, str]:
        """State by step, before a run."""
        return {name: step.state for name, step in self.plan(*overrides).items()}

    def states(self, run_id: str) -> dict[str, str]:
        """State by step, as the journal has it."""
        from flows.record import read_run

        record = read_run(self.home / "runs" / run_id)
        assert record is not None
        return {name: end["state"] for name, end in record.ended.items()}

    def run_ids(self) -> list[str]:
        """The runs, oldest first."""
        return sorted(folder.name for folder in (self.home / "runs").glob("*") if folder.is_dir())

    def mlflow(self):
        """A client of the default MLflow store."""
        from mlflow import MlflowClient

        return MlflowClient(f"sqlite:///{self.home / 'mlflow.db'}")


@pytest.fixture
def project(tmp_path: Path, prefect_server: Server) -> Project:
    return Project(tmp_path, prefect_server.variables)


@pytest.fixture
def lonely(tmp_path: Path) -> Project:
    """A project that no Prefect server was named to."""
    environment = {"PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_API_URL": ""}
    return Project(tmp_path, environment)
