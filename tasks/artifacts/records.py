"""Records: JSON files that carry a checksum of themselves, and the manifest that makes a folder an artifact."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from specs.schema.base import Kind
from tasks.artifacts.files import StoreError, Unsound, hash_file, read_bytes, reading, scan
from tasks.context import StepResult
from tasks.keys import digest_json

MANIFEST = "manifest.json"
VERSION = 1

_RESULT: Mapping[str, Any] = {"summary": "", "touched": [], "left": {}, "warnings": [], "metrics": {}, "data": []}
_FIELDS = {"version", "key", "kind", "digest", "files", "recipe", "result", "properties", "created"}
_PICKLED = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}


def now() -> str:
    """The time in UTC, to the microsecond, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def seal(body: Mapping[str, Any]) -> bytes:
    """The bytes of a record: ``body`` with its own checksum.

    Raises:
        TypeError, ValueError: ``body`` is not JSON.
    """
    return _text({**body, "checksum": digest_json(body)})


def unseal(raw: bytes) -> dict[str, Any]:
    """The body that ``seal`` was given. Any changed bit is found: the bytes must be exactly what ``seal`` writes.

    Raises:
        Unsound: the bytes are not what was written.
    """
    try:
        record = json.loads(raw.decode("utf-8"))
        intact = isinstance(record, dict) and _text(record) == raw
    except (ValueError, RecursionError):
        intact = False
    if not intact or record.pop("checksum", None) != digest_json(record):
        raise Unsound("its bytes differ from what was written")
    return record


def _text(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("ascii")


def content_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """The digest of an artifact's content: over the sorted pairs of relative path and SHA-256, and nothing else."""
    return digest_json([[path, files[path]["sha256"]] for path in sorted(files)])


def describe(folder: Path) -> tuple[dict[str, dict[str, Any]], list[Path]]:
    """Size and SHA-256 of every file of a folder that is to become an artifact, with the bytes on the disk; and its
    folders, inner ones first.

    Raises:
        StoreError: the folder is empty, or holds what no artifact may hold.
        OSError: a file cannot be read or synced.
    """
    try:
        sizes, folders = scan(folder)
    except Unsound as why:
        raise StoreError(f"{folder} cannot become an artifact: {why}; write plain files only") from None
    if not sizes:
        raise StoreError(f"{folder} cannot become an artifact: it has no files; write at least one")
    for name in sizes:
        if name == MANIFEST:
            raise StoreError(f"{folder} cannot become an artifact: {MANIFEST} is the store's own; use another name")
        if PurePosixPath(name.lower()).suffix in _PICKLED:
            raise StoreError(
                f"{folder} cannot become an artifact: {name} may be a pickle, which runs code when it is read; "
                "write safetensors or JSON"
            )
    return {
        name: {"size": size, "sha256": hash_file(folder / name, sync=True)} for name, size in sizes.items()
    }, folders


def manifest_body(
    key: str,
    kind: Kind,
    files: Mapping[str, Mapping[str, Any]],
    recipe: Mapping[str, Any],
    result: Mapping[str, Any] | StepResult,
    properties: Mapping[str, Any],
) -> dict[str, Any]:
    """The body of a manifest, as it will be read back.

    Raises:
        StoreError: the kind is unknown, ``result`` has an unknown field, or something is not JSON.
    """
    if kind not in get_args(Kind):
        raise StoreError(f"{kind!r} is not a kind of artifact; use one of {', '.join(get_args(Kind))}")
    if isinstance(result, StepResult):
        result = {name: value for name, value in vars(result).items() if name in _RESULT}
    if unknown := set(result) - set(_RESULT):
        raise StoreError(f"a result has no field {', '.join(sorted(unknown))}; it has {', '.join(_RESULT)}")
    body = {
        "version": VERSION,
        "key": key,
        "kind": kind,
        "digest": content_digest(files),
        "files": files,
        "recipe": recipe,
        "result": {**_RESULT, **result},
        "properties": properties,
        "created": now(),
    }
    for name in ("recipe", "result", "properties"):
        try:
            digest_json(body[name])
        except (TypeError, ValueError) as why:
            raise StoreError(f"the {name} of artifact {key} is not JSON: {why}; use plain finite values") from None
    return unseal(seal(body))


def read_manifest(folder: Path, key: str) -> dict[str, Any]:
    """The manifest of the artifact in ``folder``; its files are not looked at.

    Raises:
        Unsound: it is missing, changed, or of another artifact.
        StoreError: it cannot be read for a reason of this process, or a newer version wrote it.
    """
    path = folder / MANIFEST
    with reading(path, MANIFEST):
        raw = read_bytes(path)
    try:
        body = unseal(raw)
    except Unsound as why:
        raise Unsound(f"{MANIFEST}: {why}") from None
    if isinstance(body.get("version"), int) and body["version"] > VERSION:
        raise StoreError(f"{path} was written by a newer version of Lathe; upgrade, or use another store")
    if set(body) != _FIELDS or body["kind"] not in get_args(Kind) or not isinstance(body["files"], dict):
        raise Unsound(f"{MANIFEST}: it is not a manifest")
    if body["key"] != key:
        raise Unsound(f"{MANIFEST}: it belongs to {body['key']}")
    return body


def sound(folder: Path, key: str) -> dict[str, Any]:
    """The manifest of the artifact in ``folder``, after size and SHA-256 of every file have been compared with it.

    Raises:
        Unsound: naming the first file that differs, is missing or does not belong.
        StoreError: a file cannot be read for a reason of this process.
    """
    manifest = read_manifest(folder, key)
    with reading(folder, "the folder"):
        sizes, _ = scan(folder)
    del sizes[MANIFEST]
    files = manifest["files"]
    for name in sorted(files.keys() | sizes.keys()):
        if name not in sizes:
            raise Unsound(f"{name}: it is missing")
        if name not in files:
            raise Unsound(f"{name}: it does not belong to the artifact")
        if sizes[name] != files[name]["size"]:
            raise Unsound(f"{name}: it has {sizes[name]} bytes instead of {files[name]['size']}")
        with reading(folder / name, name):
            intact = hash_file(folder / name) == files[name]["sha256"]
        if not intact:
            raise Unsound(f"{name}: its content differs from what was written")
    if content_digest(files) != manifest["digest"]:
        raise Unsound(f"{MANIFEST}: the digest does not fit the files")
    return manifest
