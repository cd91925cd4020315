"""What a teacher has said, made once, kept in the store in pieces, and continued where a killed run left off."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.context import StepContext, StepResult
from tasks.data.encoded import Encoded, open_arrays

if TYPE_CHECKING:
    import numpy as np

PIECE = 512
"""Examples of a piece: what a killed run loses at most."""

Make = Callable[["np.ndarray"], Mapping[str, "np.ndarray"]]
"""From the numbers of some examples to arrays, one after the other: ``ends`` [B] says where each example's rows of all
the other arrays end."""


class Kept:
    """Arrays of any number of rows for each example, mapped from a folder of pieces.

    Args:
        folder: as ``keep`` has written it.
        examples: how many there are.
    """

    def __init__(self, folder: Path, examples: int) -> None:
        self.folder, self.examples = folder, examples
        self._pieces: dict[int, Mapping[str, np.ndarray]] = {}

    def rows(self, examples: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of ``examples``, in their order, one after the other."""
        import numpy as np

        found: dict[str, list[np.ndarray]] = {}
        for example in examples.tolist():
            piece = self._piece(example // PIECE)
            at, ends = example % PIECE, piece["ends"]
            part = slice(int(ends[at - 1]) if at else 0, int(ends[at]))
            for name, array in piece.items():
                if name != "ends":
                    found.setdefault(name, []).append(array[part])
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def _piece(self, number: int) -> Mapping[str, np.ndarray]:
        if number not in self._pieces:
            self._pieces[number] = open_arrays(self.folder / f"{_name(number)}.safetensors")[0]
        return self._pieces[number]


def keep(
    what: str, recipe: Mapping[str, Any], make: Make, examples: int, ctx: StepContext, function: Callable[..., Any]
) -> Kept:
    """What ``make`` gives for all examples, from the store where it is there.

    A piece is written whole or not at all into the key's checkpoints, so that a killed run goes on behind the last one;
    when all are there they become an artifact of the store, which checks every byte on each use.

    Args:
        what: is made, for the display.
        recipe: all that shapes it, as JSON; its digest is the key.
        make: makes a piece.
        examples: how many there are.
        ctx: the store, progress and notes.
        function: whose source, with all that it imports, shapes it too.
    """
    from tasks.artifacts import Store
    from tasks.keys import digest_json, library_versions, source_digest

    whole = {
        **recipe,
        "step": what,
        "uses": "data",
        "device": ctx.device,
        "source": source_digest(function),
        "libraries": library_versions(("torch", "transformers")),
    }
    key, shelf = digest_json(whole), Store(ctx.store)
    artifact = shelf.find(key)
    if artifact is not None:
        ctx.note(f"{what}: found in the store")
        return Kept(artifact.path, examples)
    with shelf.lock(key):
        artifact = shelf.find(key)
        if artifact is None:
            place = shelf.checkpoints(key)
            pieces = _made(what, make, examples, ctx, place)
            with shelf.scratch() as scratch:
                folder = scratch / "out"
                folder.mkdir()
                for number, piece in enumerate(pieces):
                    shutil.copyfile(piece, folder / f"{_name(number)}.safetensors")
                result = StepResult("data", (what,), f"{examples} examples")
                artifact = shelf.commit(
                    folder, key=key, kind="data", recipe=whole, result=result, properties={"examples": examples}
                )
    return Kept(artifact.path, examples)


def identity(folder: Path) -> dict[str, str]:
    """What tells one model from another: the hashes of its weights and of what describes it."""
    from tasks.artifacts.files import hash_file

    shaping = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])
    return {path.name: hash_file(path) for path in shaping if path.name != "manifest.json"}


def digest(data: Encoded) -> str:
    """A hash of what a model is given of encoded data."""
    import hashlib

    import numpy as np

    found = hashlib.sha256(json.dumps([data.feature_input, data.feature_frames, data.pad]).encode())
    names = ("input_ids", "attention_mask", "target_ids", "target_mask", "features", "feature_ends")
    for name in names:
        array = getattr(data, name)
        if array is not None:
            found.update(f"{name} {array.shape} {array.dtype}".encode())
            found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def _made(what: str, make: Make, examples: int, ctx: StepContext, place: Path) -> list[Path]:
    """Every piece in the folder ``place``, those that are sound and stand there already left alone."""
    import numpy as np

    pieces: list[Path] = []
    started, made = time.monotonic(), 0
    ctx.progress(0, examples, "examples")
    for number, first in enumerate(range(0, examples, PIECE)):
        rows = np.arange(first, min(first + PIECE, examples))
        piece = _standing(place, number)
        if piece is None:
            piece = _write(place, number, make(rows))
            made += len(rows)
        pieces.append(piece)
        done, rate = int(rows[-1]) + 1, made / max(time.monotonic() - started, 1e-9)
        if made and done < examples:
            ctx.note(f"{what}: {rate:.3g} examples a second, {(examples - done) / rate:.0f} s left")
        ctx.progress(done, examples, "examples")
    return pieces


def _standing(place: Path, number: int) -> Path | None:
    """The piece that a killed run has left, where its bytes are those that were written: its name says their hash."""
    from tasks.artifacts.files import hash_file

    for found in sorted(place.glob(f"{_name(number)}-*.safetensors")):
        if found.stem.endswith(hash_file(found)):
            return found
        found.unlink()
    return None


def _write(place: Path, number: int, arrays: Mapping[str, np.ndarray]) -> Path:
    import hashlib

    import numpy as np
    from safetensors.numpy import save

    from tasks.artifacts.files import sync_folder, write_synced

    content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    final = place / f"{_name(number)}-{hashlib.sha256(content).hexdigest()}.safetensors"
    work = place / "tmp"
    work.unlink(missing_ok=True)
    write_synced(work, content)
    work.rename(final)
    sync_folder(place)
    return final


def _name(number: int) -> str:
    return f"piece-{number:06d}"
