"""Opening MLflow's store. A local SQLite file is made whole or not at all, by one process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.parse import unquote
from urllib.request import Request, urlopen

from tasks.tracking.settings import TrackingError, harden_environment, shown, silence

if TYPE_CHECKING:
    from mlflow import MlflowClient

PATIENCE_SECONDS = 120.0
"""How long to wait for another process that is making the database."""

Stopping = Callable[[], bool]

_CREDENTIALS = re.compile(r"(?<=://)[^/@]*@")
_IMPORTING = threading.Lock()
"""Two threads that import MLflow for the first time at once may see half of it."""


def open_client(uri: str, stopping: Stopping = lambda: False) -> MlflowClient:
    """A client of the store at ``uri``; a SQLite database that is not there yet is made.

    Args:
        uri: ``http(s)://…``, ``sqlite:///…`` or another address that MLflow knows.
        stopping: asked now and then while it waits for another process.

    Raises:
        TrackingError: the address cannot be a store, or another process has been making the database for too long.
    """
    scheme, mark, _ = uri.partition("://")
    if not mark or scheme == "file":
        raise TrackingError(
            f"{uri!r} is a folder; MLflow keeps no runs in folders any more. "
            "Set MLFLOW_TRACKING_URI to a server (http://…) or a database (sqlite:///…), or unset it"
        )
    database = sqlite_file(uri)
    if database is not None and not database.exists():
        _create(database, stopping)
    with _IMPORTING:
        from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def answers(uri: str, patience: float = 3.0) -> bool:
    """Whether the store at ``uri`` is worth a try: a server has to say something within ``patience`` seconds."""
    if not uri.startswith(("http://", "https://")):
        return True
    request = Request(f"{_CREDENTIALS.sub('', uri).rstrip('/')}/health")
    try:
        with urlopen(request, timeout=patience):
            return True
    except HTTPError as error:
        return error.code < 500  # it may want to know who asks, or be no MLflow server of today
    except (OSError, ValueError, HTTPException):
        return False


def prepare_store(home: Path, uri: str) -> None:
    """Make what a server on ``uri`` needs before it starts: the database, if it is a local one, and its folder.

    Args:
        home: where the default store lies; MLflow's log goes there.
        uri: see ``open_client``.

    Raises:
        TrackingError: see ``open_client``.
    """
    harden_environment()
    silence(home / "logs" / "mlflow.log")
    open_client(uri)


def sqlite_file(uri: str) -> Path | None:
    """The file of a ``sqlite:///`` address; None for any other."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0])).absolute()


def artifact_root(uri: str) -> str | None:
    """Where the artifacts of a local database go: beside it. None where the server decides."""
    database = sqlite_file(uri)
    return None if database is None else (database.parent / "mlartifacts").as_uri()


@contextlib.contextmanager
def locked(path: Path, patience: float, stopping: Stopping, busy: str) -> Iterator[None]:
    """Hold the kernel's lock on ``path``; a process that dies holds none.

    Raises:
        TrackingError: with the text ``busy``, when the lock was not free within ``patience`` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stopping() or time.monotonic() >= deadline:
                    raise TrackingError(busy) from None
                time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def _create(database: Path, stopping: Stopping) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    busy = f"another process is making {database}"
    with locked(database.with_name(f"{database.name}.lock"), PATIENCE_SECONDS, stopping, busy):
        if database.exists():
            return
        # MLflow migrates an empty file in dozens of steps, and one that was interrupted cannot be migrated again.
        unfinished = database.with_name(f"{database.name}.new")
        for rest in (unfinished, unfinished.with_name(f"{unfinished.name}-journal")):
            rest.unlink(missing_ok=True)
        store = SqlAlchemyStore(f"sqlite:///{unfinished}", artifact_root(f"sqlite:///{database}"))
        store.engine.dispose()
        unfinished.rename(database)


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """The id of the experiment, which is made where it is missing.

    Raises:
        TrackingError: an experiment of this name lies in MLflow's trash.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        root = artifact_root(uri)
        try:
            location = root and f"{root}/{_folder(name)}"
            # Without its kind MLflow's UI takes an experiment for one of traces and prompts.
            return client.create_experiment(name, location, {"mlflow.experimentKind": "custom_model_development"})
        except MlflowException as error:
            found = client.get_experiment_by_name(name)  # another run may have been quicker
            if found is None:
                raise error
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"the experiment {name!r} was deleted in MLflow ({shown(uri)}); "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}` brings it back"
        )
    return found.experiment_id


def _folder(name: str) -> str:
    return "".join(char if char.isalnum() or char in "-_." else "_" for char in name)
