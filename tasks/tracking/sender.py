"""The sender: a thread that replays the journal while the run goes on, and the upload of what it could not send."""

from __future__ import annotations

import contextlib
import importlib
import shlex
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from specs.schema.redaction import redact
from tasks.journal import Journal, entries, read
from tasks.tracking import state as states
from tasks.tracking.progress import Progress
from tasks.tracking.replay import replay
from tasks.tracking.session import Session, Stopped
from tasks.tracking.settings import TrackingError, harden_environment, shown, silence, tracking_uri
from tasks.tracking.store import Stopping, locked, open_client

POLL_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 30.0
"""Between two attempts while MLflow does not answer."""

LONGEST_CLOSE_SECONDS = 120.0
"""How long a run waits at its end for a server that is slow but gets on."""

SYSTEM_SECONDS = 10.0
"""Between two samples of the machine's load."""

LOG = "tracking.log"
"""In the run's folder: what MLflow says."""

OUTAGES = {
    "Connection refused": "nothing listens there (connection refused)",
    "Name or service not known": "there is no such machine",
    "timed out": "it did not answer in time",
    "database is locked": "the database is locked by another process",
}
"""Ordinary outages by their signs in an error's text, which else is as long as it is dark."""

LOCAL_UI = "http://127.0.0.1:5000"
"""Where ``lathe up`` shows a local store unless told otherwise."""


@dataclass(frozen=True)
class Status:
    """How much of a run MLflow has.

    Args:
        uploaded: whether everything in the journal arrived.
        waiting: events that did not.
        uri: the store, without a password.
        reason: why something waits.
        remedy: the command that sends the rest.
        problems: what will never arrive, each as one line: what, why, and what to do.
        address: the page of the run, or how to see it; empty before MLflow knows it.
    """

    uploaded: bool
    waiting: int
    uri: str
    reason: str | None = None
    remedy: str | None = None
    problems: tuple[str, ...] = ()
    address: str = ""

    def __str__(self) -> str:
        lines = [f"MLflow at {self.uri} has the whole run" if self.uploaded else f"MLflow at {self.uri}: {self.reason}"]
        if not self.uploaded:
            lines.append(f"{self.waiting} records wait on disk; send them with: {self.remedy}")
        if self.address:
            lines.append(self.address)
        return "\n".join([*lines, *self.problems])


class Tracker:
    """Sends a run's journal to MLflow from a daemon thread; nothing here ever waits for MLflow, save ``close``.

    Args:
        run_folder: ``<home>/runs/<run id>``.
        home: where the default store lies.
        uri: the store; default: ``tracking_uri(home)``.
        secrets: values that must not be sent.
        system_seconds: the time between samples of the machine's load, which join the journal; 0 takes none.
    """

    def __init__(
        self,
        run_folder: Path,
        home: Path,
        uri: str | None = None,
        secrets: Iterable[str] = (),
        system_seconds: float = SYSTEM_SECONDS,
    ) -> None:
        self.run_folder = run_folder
        self.uri = uri or tracking_uri(home)
        self._secrets = tuple(secrets)
        self._system_seconds = system_seconds
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._stop = threading.Event()
        self._loud = threading.Event()
        self._loud.set()
        self._reason: str | None = None
        self._progress = Progress()
        self._sampled = threading.Event()
        self._sender: threading.Thread | None = None
        self._sampler: threading.Thread | None = None

    def start(self) -> None:
        """Start sending; returns at once."""
        harden_environment()
        self._sender = _launch("lathe-tracking", self._send_all)

    def close(self, timeout: float = 5.0, longest: float = LONGEST_CLOSE_SECONDS) -> Status:
        """Send the rest and stop; once closed, it only tells. What could not be sent stays on disk.

        Args:
            timeout: give up when nothing has arrived for so many seconds.
            longest: give up after so many seconds, whatever arrives.
        """
        if self._stop.is_set():
            return self._told()
        began = time.monotonic()
        self._sampled.set()
        self._loud.set()
        # The last sample is to be in the journal before the last pass over it.
        if self._sampler is not None:
            self._sampler.join(min(0.5, timeout))
        self._closing.set()
        self._wake.set()
        advanced, total = began, self._progress.total()
        while self._sender is not None and self._sender.is_alive():
            self._sender.join(0.1)
            now, before, total = time.monotonic(), total, self._progress.total()
            advanced = now if total > before else advanced
            if now - advanced >= timeout or now - began >= longest:
                break
        self._stop.set()
        return self._told()

    def _told(self) -> Status:
        return _status(self.run_folder, self.uri, self._reason or "MLflow did not take everything in time")

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Within the block the sender does nothing, so that a latency can be taken; a request under way is finished."""
        self._loud.clear()
        try:
            yield
        finally:
            self._loud.set()

    def _stopping(self) -> bool:
        return self._stop.is_set() or not self._loud.is_set()

    def _send_all(self) -> None:
        pause = POLL_SECONDS
        while not self._stop.is_set():
            self._loud.wait()
            closing = self._closing.is_set()
            try:
                if _waiting(self.run_folder, self.uri):
                    send(self.run_folder, self.uri, self._secrets, self._stopping, self._progress)
                self._reason, pause = None, POLL_SECONDS
                if closing:
                    return
            except TrackingError as error:
                self._reason = str(error)
                pause = 0.5 if closing else min(2 * pause, LONGEST_WAIT_SECONDS)
            except Stopped:
                pause = POLL_SECONDS
            if self._sampler is None and self._system_seconds and not closing:
                self._sampler = _launch("lathe-system", self._sample)
            if closing:
                time.sleep(pause)
            else:
                self._wake.wait(pause)

    def _sample(self) -> None:
        journal = Journal(self.run_folder)
        monitors = _monitors()
        index = 0
        while not self._sampled.wait(self._system_seconds):
            if not self._loud.is_set():
                continue
            for monitor in monitors:
                monitor.collect_metrics()
                for name, value in monitor.aggregate_metrics().items():
                    event = {"event": "metric", "step": None, "name": f"system/{name}", "value": value, "index": index}
                    journal.append("system", event)
                monitor.clear_metrics()
            index += 1


def _launch(name: str, work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread


def _monitors() -> list:
    found = []
    for module, name in (("cpu", "CPU"), ("disk", "Disk"), ("network", "Network"), ("gpu", "GPU"), ("rocm", "ROCM")):
        try:
            place = importlib.import_module(f"mlflow.system_metrics.metrics.{module}_monitor")
            found.append(getattr(place, f"{name}Monitor")())
        except Exception:
            continue  # MLflow's monitors raise anything at all where the machine has no such device
    return found


def send(
    run_folder: Path,
    uri: str,
    secrets: tuple[str, ...] = (),
    stopping: Stopping = lambda: False,
    progress: Progress | None = None,
) -> int:
    """Send what the journal holds and the store has not; returns how many events that were.

    Raises:
        TrackingError: MLflow does not take it now.
        Stopped: ``stopping`` said so.
    """
    harden_environment()
    silence(run_folder / LOG)
    try:
        with locked(run_folder / states.LOCK, 0.0, stopping, "another process is sending this run"):
            state = states.load(run_folder, uri)
            progress = progress or Progress()

            def save() -> None:
                states.save(run_folder, uri, state)
                progress.recorded(state)

            client = open_client(uri, stopping)
            session = Session(
                client=client,
                uri=uri,
                folder=run_folder,
                state=state,
                save=save,
                secrets=secrets,
                stopping=stopping,
                progress=progress,
            )
            return replay(session)
    except (TrackingError, Stopped):
        raise
    except Exception as error:
        # Databases, servers and the network fail in the classes of a dozen libraries; all of it means: later.
        raise TrackingError(_short(error, secrets)) from error


def _short(error: Exception, secrets: tuple[str, ...]) -> str:
    text = str(error).strip()
    for sign, words in OUTAGES.items():
        if sign in text:
            return words
    return redact(f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300], secrets)


def upload(
    run_folder: Path, home: Path, uri: str | None = None, secrets: Iterable[str] = (), patience: float = 30.0
) -> Status:
    """Send what MLflow does not have of a run, however often it is called; the caller waits for it.

    Args:
        run_folder: ``<home>/runs/<run id>``.
        home: where the default store lies.
        uri: the store; default: ``tracking_uri(home)``.
        secrets: values that must not be sent.
        patience: seconds during which a failure is tried again.
    """
    uri = uri or tracking_uri(home)
    deadline = time.monotonic() + patience
    while True:
        try:
            while send(run_folder, uri, tuple(secrets)):
                pass
            return _status(run_folder, uri, None)
        except TrackingError as error:
            if time.monotonic() + 1.0 > deadline:
                return _status(run_folder, uri, str(error))
        time.sleep(1.0)


def _waiting(run_folder: Path, uri: str) -> int:
    return sum(1 for _ in entries(run_folder, states.load(run_folder, uri).positions))


def _status(run_folder: Path, uri: str, reason: str | None) -> Status:
    state = states.load(run_folder, uri)
    waiting = _waiting(run_folder, uri)
    return Status(
        uploaded=not waiting,
        waiting=waiting,
        uri=shown(uri),
        reason=reason if waiting else None,
        remedy=_upload_command(run_folder) if waiting else None,
        problems=tuple(state.problems),
        address=_address(run_folder, uri),
    )


def _upload_command(run_folder: Path) -> str:
    """What sends the rest, from whichever folder it is called."""
    start = next((event for event in read(run_folder) if event["event"] == "run_start"), {})
    spec = ["--spec", str(start["spec_path"])] if start.get("spec_path") else []
    return shlex.join(["lathe", "report", run_folder.name, "--upload", *spec])


def run_address(run_folder: Path, home: Path, step: str | None = None, ui: str | None = None) -> str:
    """The page of a run's, or a step's, MLflow run, or how to see it; empty before MLflow knows it.

    Args:
        run_folder: ``<home>/runs/<run id>``.
        home: where the default store lies.
        step: the step's id; default: the pipeline itself.
        ui: the address of MLflow's UI; default: the store's own, where that is a server.
    """
    return _address(run_folder, tracking_uri(home), step, ui)


def _address(run_folder: Path, uri: str, step: str | None = None, ui: str | None = None) -> str:
    state = states.load(run_folder, uri)
    run = state.runs.get(step or states.PARENT)
    if run is None:
        return ""
    base = ui or (shown(uri) if uri.startswith(("http://", "https://")) else None)
    # MLflow's UI has two faces; the one it starts with shows no models.
    page = f"#/experiments/{state.experiment}/runs/{run}?workflowType=machine_learning"
    return f"{base.rstrip('/')}/{page}" if base else f"{LOCAL_UI}/{page} (after `lathe up`)"
