"""Checkpoints of a training that survive a kill at any moment."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

KEPT = 2
"""Checkpoints that stand at a time: the newest, and the one before it in case the newest is damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors and the JSON state of a training after ``step`` optimiser steps."""

    step: int
    tensors: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]


def save(folder: Path, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint whole or not at all, and drop all but the newest ``KEPT``.

    Args:
        folder: where the checkpoints of this training stand.
        step: optimiser steps done.
        tensors: contiguous or not, on any device; no two may share memory.
        state: what JSON can say exactly (a float keeps all its bits).
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("tmp-*"):
        shutil.rmtree(stale)
    work = folder / f"tmp-{step:09d}"
    work.mkdir()
    file = work / "tensors.safetensors"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)
    record = {"step": step, "sha256": _sha256(file), "state": dict(state)}
    text = json.dumps(record, sort_keys=True)
    seal = hashlib.sha256(text.encode()).hexdigest()
    (work / "state.json").write_text(json.dumps({"record": text, "sha256": seal}), encoding="utf-8")
    for path in (file, work / "state.json", work):
        _fsync(path)
    final = _path(folder, step)
    if final.exists():  # a damaged one that was skipped, or the same step reached again
        shutil.rmtree(final)
    work.rename(final)
    _fsync(folder)
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)


def load_latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and what was wrong with each newer one.

    Every byte is checked against the hashes that were written with it; nothing is unpickled.
    """
    damaged = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return _load(path), damaged
        except (OSError, ValueError, KeyError, TypeError) as error:
            damaged.append(f"checkpoint {path.name} is damaged and was skipped: {error}")
    return None, damaged


def discard_after(folder: Path, step: int) -> None:
    """Drop the checkpoints of later steps: those that were found damaged."""
    for path in folder.glob("step-*"):
        if path.name > _path(folder, step).name:
            shutil.rmtree(path)


def _load(path: Path) -> Checkpoint:
    from safetensors.torch import load_file

    sealed = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if hashlib.sha256(sealed["record"].encode()).hexdigest() != sealed["sha256"]:
        raise ValueError("state.json does not match its hash")
    record = json.loads(sealed["record"])
    file = path / "tensors.safetensors"
    if _sha256(file) != record["sha256"]:
        raise ValueError("tensors.safetensors does not match its hash")
    return Checkpoint(record["step"], load_file(file), record["state"])


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
