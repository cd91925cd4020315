"""What this machine has, and whether the stores are in order."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from flows.embedded import configure, has_server
from flows.errors import PlanError
from flows.home import Home
from flows.plan import device_of, missing_packages
from tasks.evaluate.format import size
from tasks.journal import environment
from tasks.registry import find

MINIMUM_FREE_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Finding:
    """One line: ``good`` is None where it is only information."""

    name: str
    value: str
    good: bool | None = None


def examine(home: Home) -> list[Finding]:
    """Look at versions, devices, servers and stores."""
    return [*_packages(), *_machine(home), *_services(home)]


def _packages() -> Iterator[Finding]:
    from specs.schema.pipeline import KINDS

    for name, version in environment()["libraries"].items():
        yield Finding(name, version or "not installed", bool(version))
    needed = {library for spec in KINDS.values() for library in find(spec).libraries}
    missing = missing_packages(needed)
    yield Finding("packages of the steps", f"missing: {', '.join(missing)}" if missing else "all there", not missing)


def _machine(home: Home) -> Iterator[Finding]:
    import psutil

    yield Finding("device", device_of("auto"))
    yield Finding("cores", str(len(os.sched_getaffinity(0))))
    yield Finding("memory available", size(psutil.virtual_memory().available))
    folder = home.root
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    yield Finding("disk free", f"{size(free)} under {folder}", free > MINIMUM_FREE_BYTES)
    try:
        Home(folder).require()
    except PlanError as error:
        yield Finding("home", str(error), False)
    else:
        yield Finding("home", str(home.root), True)


def _services(home: Home) -> Iterator[Finding]:
    from tasks.artifacts import Store
    from tasks.tracking import tracking_uri

    configure()
    if has_server():
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            error = client.api_healthcheck()
        yield Finding("Prefect server", f"{client.api_url}{f': {error}' if error else ''}", error is None)
    else:
        yield Finding("Prefect server", "embedded, for each run; `lathe up` starts one that stays")
    yield Finding("MLflow", tracking_uri(home.root))
    if home.store.is_dir():
        entries = Store(home.store).ls()
        yield Finding("store", f"{len(entries)} artifacts, {size(sum(entry.size for entry in entries))}", True)
    else:
        yield Finding("store", "empty")
