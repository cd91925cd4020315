"""Where a model or tokenizer named in a spec lies on this machine: a folder, or a snapshot from the hub."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from specs.schema.pipeline import ModelSpec
from specs.schema.suggest import nearest
from tasks.context import StepError

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.spm", "*.jinja")
"""What is fetched from the hub beside the weights: never Python files, never pickles."""

WEIGHT_FILES = ("*.safetensors",)


@dataclass(frozen=True)
class Resolved:
    """A folder, and the commit where it came from the hub."""

    folder: Path
    revision: str | None = None


def is_local(source: str) -> bool:
    """Whether ``source`` names a folder; the loader of specs has made folders absolute."""
    return Path(source).is_absolute() or source.startswith((".", "~"))


def resolve(source: str, revision: str | None = None, weights: bool = True) -> Resolved:
    """The folder of a model or tokenizer; a hub id is fetched into the hub's cache, or taken from it when offline.

    Args:
        source: a folder or a hub id.
        revision: of the hub id.
        weights: whether the weights are needed too.

    Raises:
        StepError: there is no such folder, or the hub does not give it.
    """
    if is_local(source):
        return Resolved(_model_folder(_existing(Path(source).expanduser())))
    from huggingface_hub import snapshot_download

    patterns = [*SMALL_FILES, *(WEIGHT_FILES if weights else ())]
    try:
        snapshot = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except Exception as error:  # network, rights, cache, malformed id: the library raises many kinds
        raise StepError(f"{source}: {_hub_reason(error)}") from error
    return Resolved(_model_folder(snapshot), snapshot.name)


def fingerprint(model: ModelSpec) -> str:
    """A hash of what the model block names: the content of a folder, the commit of a hub id, the configuration.

    Raises:
        StepError: a folder or hub id cannot be had.
    """
    parts: dict[str, Any] = {"config": model.config}
    for field in ("source", "tokenizer"):
        source = getattr(model, field)
        revision = model.revision if field == "source" else None
        parts[field] = source and (_content(source) if is_local(source) else _commit(source, revision))
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _existing(folder: Path) -> Path:
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise StepError(f"{folder} is a file; name the folder that holds it and its config.json")
    siblings = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()] if folder.parent.is_dir() else []
    where = nearest(folder.name, sorted(siblings)[:50]) if siblings else f"{folder.parent} holds no folder"
    raise StepError(f"{folder}: no such folder; {where}")


def _model_folder(folder: Path) -> Path:
    """The folder itself, or where older sentence-transformers keep the model inside it."""
    modules = folder / "modules.json"
    if (folder / "config.json").exists() or not modules.is_file():
        return folder
    try:
        listed = json.loads(modules.read_text(encoding="utf-8"))
        inner = next((str(module["path"]) for module in listed if str(module["type"]).endswith(".Transformer")), "")
    except (ValueError, KeyError, TypeError) as error:
        raise StepError(f"{modules} is damaged: {error}") from error
    if Path(inner).is_absolute() or ".." in Path(inner).parts:
        raise StepError(f"{modules} points outside its folder: {inner!r}")
    return folder / inner


def _content(source: str) -> list[list[str]]:
    folder = resolve(source).folder
    files = sorted({file for pattern in (*SMALL_FILES, *WEIGHT_FILES) for file in folder.glob(pattern)})
    return [[file.name, _digest(str(file), file.stat().st_size, file.stat().st_mtime_ns)] for file in files]


@lru_cache(maxsize=1024)
def _digest(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _commit(source: str, revision: str | None) -> str:
    return f"{source}@{resolve(source, revision, weights=False).revision}"


def _hub_reason(error: Exception) -> str:
    from huggingface_hub import constants

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if constants.HF_HUB_OFFLINE:
        return f"{text} HF_HUB_OFFLINE is set and this is not in the cache; unset it, or name a local folder (./…)"
    return f"{text} Check the id and the network, or download it and name the local folder (./…)"
