"""A Prefect server and the MLflow UI on loopback, kept until they are stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

from rich.console import Console

from flows.embedded import STARTUP_SECONDS, configure
from flows.errors import PlanError
from flows.home import Home
from flows.lifeline import tied
from flows.terminal import on_interrupt
from tasks.context import StepError

LOOPBACK = "127.0.0.1"


def run_servers(home: Home, prefect_port: int, mlflow_port: int, console: Console) -> None:
    """Start both, print their addresses once they answer, wait for Ctrl-C, stop both.

    Raises:
        PlanError: a port is taken, or nothing can be written under ``home``.
        StepError: a server ended by itself.
    """
    from tasks.tracking import harden_environment, tracking_uri
    from tasks.tracking.store import artifact_root, open_client

    home.require()
    configure()
    harden_environment()
    uri = tracking_uri(home.root)
    addresses = {"Prefect": f"http://{LOOPBACK}:{prefect_port}", "MLflow": f"http://{LOOPBACK}:{mlflow_port}"}
    health = {"Prefect": f"{addresses['Prefect']}/api/health", "MLflow": f"{addresses['MLflow']}/health"}
    _check_free(prefect_port, "--prefect-port")
    commands = {"Prefect": ["prefect", "server", "start", "--host", LOOPBACK, "--port", str(prefect_port)]}
    if uri.startswith(("http://", "https://")):
        addresses["MLflow"] = f"{uri} (MLFLOW_TRACKING_URI; not started here)"
    else:
        _check_free(mlflow_port, "--mlflow-port")
        open_client(uri)  # makes the database where there is none
        root = artifact_root(uri)
        stores = ["--backend-store-uri", uri, *(["--default-artifact-root", root] if root else [])]
        host = ["--host", LOOPBACK, "--port", str(mlflow_port), "--workers", "1"]
        commands["MLflow"] = ["mlflow", "server", *host, *stores]
    logs = home.root / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    processes: dict[str, subprocess.Popen[bytes]] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(on_interrupt(signal.default_int_handler))
        stack.enter_context(_terminate_like_interrupt())
        for name, command in commands.items():
            log = logs / f"{name.lower()}-server.log"
            sink = stack.enter_context(log.open("ab"))
            processes[name] = subprocess.Popen(
                tied([sys.executable, "-P", "-m", *command]),
                stdout=sink,
                stderr=sink,
                # Without it Prefect's pages look for their server at its default port.
                env={**os.environ, "PREFECT_UI_API_URL": f"{addresses['Prefect']}/api"},
                start_new_session=True,
            )
            stack.callback(_stop, processes[name])
        for name, process in processes.items():
            _wait(name, process, health[name], logs)
        for name, address in addresses.items():
            console.print(f"{name:8} {address}", markup=False, highlight=False)
        console.print(
            f"\nIn another terminal:\n  export PREFECT_API_URL={addresses['Prefect']}/api\n  lathe run SPEC\n"
            "Stop with Ctrl-C.",
            markup=False,
            highlight=False,
        )
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(0.5)
                for name, process in processes.items():
                    if process.poll() is not None:
                        raise StepError(f"the {name} server ended with code {process.returncode}; see {logs}")


@contextlib.contextmanager
def _terminate_like_interrupt():
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _check_free(port: int, option: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise PlanError(f"port {port} is taken ({error.strerror}); choose another with {option}") from error


def _wait(name: str, process: subprocess.Popen[bytes], url: str, logs: os.PathLike[str]) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise StepError(f"the {name} server ended with code {process.returncode}; see {logs}")
        with contextlib.suppress(URLError, OSError), urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise StepError(f"the {name} server did not answer within {STARTUP_SECONDS} s; see {logs}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
