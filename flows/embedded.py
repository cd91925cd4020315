"""The Prefect server behind a run that has no other: started for the run, gone with it.

Prefect's own temporary server shares the terminal's process group, so that Ctrl-C ends it before the run can be marked
as cancelled, and survives a killed run as an orphan. This one has its own session and dies with its parent.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

STARTUP_VARIABLE = "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"
STARTUP_SECONDS = 180
"""Prefect's own 20 s are too few: creating the database alone takes that long on a slow machine."""


class ServerFailed(Exception):
    """The embedded Prefect server did not come up."""


def configure() -> None:
    """Set what Prefect reads from the environment, unless the user has set it. Must precede the import of prefect."""
    for name, value in {
        STARTUP_VARIABLE: str(STARTUP_SECONDS),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
        "PREFECT_CLI_PROMPT": "false",
        "DO_NOT_TRACK": "1",
    }.items():
        os.environ.setdefault(name, value)


def has_server() -> bool:
    """Whether the user named a Prefect server."""
    if os.environ.get("PREFECT_API_URL"):
        return True
    profile = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser() / "profiles.toml"
    if not profile.exists():
        return False
    from prefect.settings import PREFECT_API_URL

    return bool(PREFECT_API_URL.value())


@contextlib.contextmanager
def server(log: Path) -> Iterator[Server]:
    """A server for the block: the user's own where one is named, else an embedded one that starts in the background."""
    configure()
    if has_server():
        yield Server(None, log)
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    with log.open("ab") as sink:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "flows.embedded", str(port), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            env={
                **os.environ,
                "PREFECT_UI_ENABLED": "0",
                "PREFECT__SERVER_EPHEMERAL": "1",
                "PREFECT__SERVER_FINAL": "1",
            },
            start_new_session=True,
        )
    os.environ["PREFECT_API_URL"] = url
    try:
        yield Server(process, log, url)
    finally:
        os.environ.pop("PREFECT_API_URL", None)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait()


class Server:
    """A server that may still be starting."""

    def __init__(self, process: subprocess.Popen[bytes] | None, log: Path, url: str = "") -> None:
        self._process = process
        self._log = log
        self._url = url

    @property
    def embedded(self) -> bool:
        """Whether this server lives only as long as the run."""
        return self._process is not None

    def wait(self) -> None:
        """Return once the server answers.

        Raises:
            ServerFailed: it died, or did not answer in time.
        """
        if self._process is None:
            reach_named_server()
            return
        limit = float(os.environ.get(STARTUP_VARIABLE, STARTUP_SECONDS))
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerFailed(
                    f"the embedded Prefect server ended with code {self._process.returncode}; see {self._log}"
                )
            with contextlib.suppress(URLError, OSError), urlopen(f"{self._url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.1)
        raise ServerFailed(
            f"the embedded Prefect server did not answer within {limit:g} s; see {self._log}, or set {STARTUP_VARIABLE}"
        )


def reach_named_server() -> None:
    """Return where the server that the user named answers.

    Raises:
        ServerFailed: it does not.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        error = client.api_healthcheck()
    if error is not None:
        raise ServerFailed(
            f"the Prefect server at {client.api_url} does not answer ({error}); start it, for example with `lathe up`, "
            "or unset PREFECT_API_URL to use an embedded one"
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(port: int, parent: int) -> None:
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before this was ready to end with it
        return
    import uvicorn

    uvicorn.run(
        "prefect.server.api.server:create_app",
        factory=True,
        host="127.0.0.1",
        port=port,
        log_level="error",
        lifespan="on",
    )


if __name__ == "__main__":
    _serve(*map(int, sys.argv[1:]))
