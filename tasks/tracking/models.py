"""Artifacts as MLflow 3 models: metrics hang on them, and the result of a passing run is registered."""

from __future__ import annotations

import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.schema.base import Task
from tasks import journal
from tasks.export.runtime import first_file
from tasks.journal import Event
from tasks.tracking.clean import clean_copy
from tasks.tracking.settings import Refused
from tasks.tracking.summary import note, outcome, short_id, summarise

if TYPE_CHECKING:
    from tasks.tracking.session import Session

CHAMPION = "champion"
"""The alias of the registered version to use."""

AGAIN = "run the spec again, which registers it anew"
"""The remedy where a registration failed; what was made before comes from the cache."""

KINDS = ("model", "swapped", "packed", "export")

EXTERNAL = "mlflow.model.isExternal"
"""MLflow's own tag for a model whose files lie elsewhere, here in the artifact store."""

SERVING = Path(__file__).parent.parent / "serving.py"

EXAMPLES: dict[Task, str] = {
    "text-generation": "The statement",
    "text-classification": "a gripping film from the first minute to the last",
    "translation": "Two dogs play in the snow.",
}

_REQUIRED = {
    ".tflite": ("mlflow", "numpy", "pandas", "ai-edge-litert", "transformers"),
    ".onnx": ("mlflow", "numpy", "pandas", "onnxruntime", "transformers"),
    "": ("mlflow", "numpy", "pandas", "torch", "transformers", "safetensors"),
}
"""What a served model needs, by the suffix of an exported file; without one it runs in torch."""

_AUDIO = ("soundfile", "soxr")

_OWN_LOOP: tuple[Task, ...] = ("translation", "speech-recognition")
"""Tasks whose exported files are run by Lathe's own loop."""

_LOADING = {
    True: "To load it, install Lathe from its source; no requirement names it, as it is on no package index.",
    False: "Its requirements are all that it takes to load it; Lathe need not be installed.",
}
"""What a registered version says, by whether it needs Lathe."""


def logged_model(session: Session, event: Event, run: str) -> str | None:
    """The id of the MLflow model that stands for a step's artifact, looked up or made; None for other kinds."""
    if event.get("kind") not in KINDS:
        return None
    step = event["step"]
    if step not in session.state.models:
        session.state.models[step] = _find(session, step) or _make(session, event, run)
        session.save()
    model = session.state.models[step]
    _link(session, run, model)
    return model


def _find(session: Session, step: str) -> str | None:
    wanted = f"tags.`lathe.run_id` = '{session.start['run_id']}' AND tags.`lathe.step` = '{step}'"
    found = session.client.search_logged_models([session.experiment], wanted, max_results=1)
    return found[0].model_id if found else None


def _make(session: Session, event: Event, run: str) -> str:
    step = event["step"]
    tags = {
        "lathe.run_id": session.start["run_id"],
        "lathe.step": step,
        "lathe.artifact": event.get("path") or "",
    }
    made = session.client.create_logged_model(
        session.experiment,
        name=f"{step} {short_id(session.start)}".replace(".", "_"),
        source_run_id=run,
        tags={**tags, EXTERNAL: "true"},
        params={name: str(event[name]) for name in ("kind", "key", "digest") if event.get(name)},
        model_type=event["kind"],
    )
    session.client.finalize_logged_model(made.model_id, "READY")
    return made.model_id


def _link(session: Session, run: str, model: str) -> None:
    from mlflow.entities import LoggedModelOutput

    outputs = session.client.get_run(run).outputs
    if model not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
        session.client.log_outputs(run, [LoggedModelOutput(model, step=0)])


def register(session: Session, event: Event) -> None:
    """Upload the artifact as a model that MLflow can serve, register it, and point ``champion`` at it.

    The alias is not moved away from a version that was registered by a later event, so that a late upload of an old run
    takes nothing back.

    Raises:
        Refused: the artifact is no longer there, or a secret stands in one of its binary files.
    """
    step, folder = event["step"], Path(event["path"])
    version = session.state.versions.get(step) or _find_version(session, event)
    if version is None:
        if not folder.is_dir():
            raise Refused(f"{folder} is no longer there; {AGAIN}")
        run = session.run(step, event["time"])
        model = logged_model(session, event, run)
        if model is None:
            made = f"{step} makes a {event.get('kind')}, which is no model"
            raise Refused(f"{made}; name a step that makes a model or an export in tracking.register_step")
        _upload(session, event, model, run)
        _link(session, session.run(None, event["time"]), model)
        version = _make_version(session, event, model, run)
    session.state.versions[step] = version
    session.save()
    _promote(session, event, version)


def _find_version(session: Session, event: Event) -> str | None:
    for found in session.client.search_model_versions(f"name = '{event['name']}'"):
        tags = found.tags
        if tags.get("lathe.run_id") == session.start["run_id"] and tags.get("lathe.step") == event["step"]:
            return str(found.version)
    return None


def _upload(session: Session, event: Event, model: str, run: str) -> None:
    with tempfile.TemporaryDirectory(prefix="lathe-model-") as scratch, session.progress.files(Path(scratch)):
        built = Path(scratch) / "built"
        files = {"model": clean_copy(Path(event["path"]), Path(scratch) / "model", session.secrets)}
        if event.get("tokenizer"):
            files["tokenizer"] = Path(event["tokenizer"])
        save_model(built, files, event["task"], model=model, run=run)
        session.client.log_model_artifacts(model, str(built))
    session.client.finalize_logged_model(model, "READY")
    if EXTERNAL in session.client.get_logged_model(model).tags:
        session.client.delete_logged_model_tag(model, EXTERNAL)


def save_model(out: Path, files: dict[str, Path], task: Task, *, model: str | None = None, run: str | None = None):
    """Write an MLflow model from code: the files, and the script ``tasks/serving.py`` that answers with them.

    Nothing is pickled. The signature is stated, never found out by running the model. Lathe is not among the
    requirements even where it is needed: an index may have given that name to anybody.

    Args:
        out: the folder to make.
        files: ``model``, the artifact's folder; ``tokenizer``, where that folder has none.
        task: decides on the signature.
        model: MLflow's id of the model.
        run: MLflow's id of the run that made it.
    """
    import mlflow.pyfunc
    import pandas
    from mlflow.models import Model

    needed = _REQUIRED[_suffix(files["model"])] + (_AUDIO if task == "speech-recognition" else ())
    versions = {name: found for name in needed if (found := journal.library_version(name))}
    mlflow.pyfunc.save_model(
        path=str(out),
        python_model=str(SERVING),
        artifacts={name: str(path) for name, path in files.items()},
        model_config={"task": task},
        signature=signature(task),
        input_example=pandas.DataFrame({"text": [EXAMPLES[task]]} if task in EXAMPLES else {"audio": [_silence()]}),
        pip_requirements=[f"{name}=={found.partition('+')[0]}" for name, found in versions.items()],
        mlflow_model=Model(model_uuid=model, run_id=run, model_id=model),
    )


def needs_lathe(folder: Path, task: Task) -> bool:
    """Whether the artifact in ``folder`` cannot be loaded by public libraries alone."""
    return (folder / "lathe.json").exists() or (task in _OWN_LOOP and bool(_suffix(folder)))


def _suffix(folder: Path) -> str:
    """How the name of an exported file in ``folder`` ends; empty where there is none."""
    file = first_file(folder)
    return file.suffix if file else ""


def _silence() -> bytes:
    """A wav file of half a second."""
    import io
    import wave

    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(bytes(16_000))
    return content.getvalue()


def signature(task: Task) -> Any:
    """Text goes in, or the content of an audio file; a label with its probability comes out, or text."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    audio = task == "speech-recognition"
    inputs = Schema([ColSpec("binary", "audio") if audio else ColSpec("string", "text")])
    if task == "text-classification":
        return ModelSignature(inputs, Schema([ColSpec("string", "label"), ColSpec("double", "score")]))
    length = ParamSchema([ParamSpec("max_new_tokens", "long", 32)])
    return ModelSignature(inputs, Schema([ColSpec("string", "text")]), length)


def _make_version(session: Session, event: Event, model: str, run: str) -> str:
    from mlflow.exceptions import MlflowException

    client, name = session.client, event["name"]
    try:
        client.create_registered_model(name, description=session.start.get("description") or None)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {"lathe.run_id": session.start["run_id"], "lathe.step": event["step"], "lathe.time": _utc(event)}
    summary = summarise(session.events())
    loading = _LOADING[needs_lathe(Path(event["path"]), event["task"])]
    made = client.create_model_version(
        name,
        # MLflow resolves a `models:/` source with the store of the process, which need not be this one.
        source=client.get_logged_model(model).artifact_location,
        run_id=run,
        tags=tags,
        description=f"{outcome(summary)}\n\n{loading}\n\n{note(summary)}",
        await_creation_for=0,
        model_id=model,
    )
    client.set_logged_model_tags(
        model, {"mlflow.modelVersions": json.dumps([{"name": name, "version": int(made.version)}])}
    )
    return str(made.version)


def _utc(event: Event) -> str:
    return datetime.fromtimestamp(event["time"], UTC).isoformat(timespec="milliseconds")


def _promote(session: Session, event: Event, version: str) -> None:
    client, name = session.client, event["name"]
    current = client.get_registered_model(name).aliases.get(CHAMPION)
    if current is not None and str(current) != version:
        since = client.get_model_version(name, str(current)).tags.get("lathe.time")
        if since is not None and since > _utc(event):
            return
    client.set_registered_model_alias(name, CHAMPION, version)
    client.set_tag(session.run(None, event["time"]), "lathe.registered", f"{name} version {version}")
