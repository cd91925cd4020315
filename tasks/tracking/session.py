"""One pass over the journal of one run: the client, what was sent before, and how things are named in MLflow."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.journal import Event, read, redact_event
from tasks.tracking.progress import Progress
from tasks.tracking.state import PARENT, State
from tasks.tracking.store import Stopping, experiment_id
from tasks.tracking.summary import short_id

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

BATCH = 900
"""Metrics in one request; MLflow takes at most 1,000 entities."""

_TAG_LIMIT = 5000
_PARAM_LIMIT = 2000
_UNFIT = re.compile(r"[^A-Za-z0-9_\-. :/]")


class Stopped(Exception):
    """The sender was told to stop; what is left stays on disk."""


@dataclass
class Session:
    """One pass over the journal of one run.

    Args:
        client: of the store at ``uri``.
        uri: the store's address.
        folder: the run's folder.
        state: what was sent before; changed as events arrive.
        save: called whenever ``state`` is worth keeping.
        secrets: values that must not leave the machine.
        stopping: asked before every event.
        progress: told of what arrives.
    """

    client: MlflowClient
    uri: str
    folder: Path
    state: State
    save: Callable[[], None]
    secrets: tuple[str, ...] = ()
    stopping: Stopping = lambda: False
    progress: Progress = field(default_factory=Progress)
    start: Event = field(default_factory=dict)
    metrics: dict[str, list[Metric]] = field(default_factory=dict)
    sent_metrics: int = 0

    def run(self, step: str | None, moment: float) -> str:
        """The id of the MLflow run of a step, or of the pipeline; it is looked up, then made."""
        key = step or PARENT
        if key not in self.state.runs:
            self.state.runs[key] = self._find_run(step) or self._make_run(step, moment)
            self.save()
        return self.state.runs[key]

    def _find_run(self, step: str | None) -> str | None:
        wanted = f"tags.`lathe.run_id` = '{self.start['run_id']}' AND tags.`lathe.role` = "
        wanted += f"'step' AND tags.`lathe.step` = '{step}'" if step else "'pipeline'"
        found = self.client.search_runs([self.experiment], wanted, max_results=1)
        return found[0].info.run_id if found else None

    def _make_run(self, step: str | None, moment: float) -> str:
        start = self.start
        if step:
            tags = {"lathe.role": "step", "lathe.step": step, "mlflow.parentRunId": self.run(None, moment)}
            name = step
        else:
            tags = {"lathe.role": "pipeline", **{str(key): value for key, value in (start.get("tags") or {}).items()}}
            name = run_name(start)
        tags |= {"lathe.run_id": start["run_id"], "lathe.spec": start["name"], **_origin(start)}
        made = self.client.create_run(
            self.experiment, start_time=milliseconds(moment), tags=_texts(tags), run_name=name
        )
        return made.info.run_id

    @property
    def experiment(self) -> str:
        """The id of the experiment."""
        if self.state.experiment is None:
            self.state.experiment = experiment_id(
                self.client, self.uri, self.start.get("experiment") or self.start["name"]
            )
        return self.state.experiment

    def tag(self, run: str, tags: Mapping[str, Any]) -> None:
        """Set tags on a run."""
        from mlflow.entities import RunTag

        self.client.log_batch(run, tags=[RunTag(key, value) for key, value in _texts(tags).items()])

    def params(self, run: str, params: Mapping[str, Any]) -> None:
        """Set parameters on a run, a hundred at a time as MLflow allows; empty ones are left out."""
        from mlflow.entities import Param

        items = [Param(valid_name(key), text) for key, value in flatten(params).items() if (text := _param(value))]
        for place in range(0, len(items), 100):
            self.client.log_batch(run, params=items[place : place + 100])

    def write(self, run: str, files: Mapping[str, Any]) -> None:
        """Upload text and JSON under the paths that are the keys."""
        for path, content in files.items():
            if isinstance(content, str):
                self.client.log_text(run, content, path)
            elif content is not None:
                self.client.log_text(run, json.dumps(content, indent=2), path)

    def events(self) -> Iterator[Event]:
        """The whole journal, without secrets."""
        return (redact_event(event, self.secrets) for event in read(self.folder) if event["event"] != "metric")

    def add_metric(self, run: str, metric: Metric) -> None:
        """Collect a metric; ``flush`` sends it."""
        self.metrics.setdefault(run, []).append(metric)
        if len(self.metrics[run]) >= BATCH:
            self.flush()

    def flush(self) -> None:
        """Send the collected metrics."""
        for run, metrics in self.metrics.items():
            for place in range(0, len(metrics), BATCH):
                batch = metrics[place : place + BATCH]
                self.client.log_batch(run, metrics=batch)
                self.sent_metrics += len(batch)
                self.progress.metrics(self.sent_metrics)
        self.metrics.clear()


def run_name(start: Event) -> str:
    """The name of the pipeline's run in MLflow: the spec's name and the last part of the run's id."""
    return f"{start['name']} {short_id(start)}"


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, the keys joined by dots; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        flat |= flatten(item, f"{name}.") if isinstance(item, Mapping) else {name: item}
    return flat


def _origin(start: Event) -> dict[str, Any]:
    import getpass

    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without a user table
        user = None
    return {
        "mlflow.source.name": "lathe run",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": (start.get("git") or {}).get("revision"),
        "mlflow.user": user,
    }


def _texts(tags: Mapping[str, Any]) -> dict[str, str]:
    return {
        valid_name(key): _text(value)[:_TAG_LIMIT] for key, value in tags.items() if value is not None and value != ""
    }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _param(value: Any) -> str:
    empty: Iterable[Any] = (None, "", [], {})
    return "" if any(value is nothing or value == nothing for nothing in empty) else _text(value)[:_PARAM_LIMIT]


def valid_name(name: str) -> str:
    """A name that MLflow takes for a metric, a parameter or a tag."""
    return _UNFIT.sub("_", name)[:250]


def milliseconds(seconds: float) -> int:
    """MLflow's timestamps, from seconds."""
    return int(seconds * 1000)
