"""What every runtime asks of its inputs. Needs numpy only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.export.errors import InputError
from tasks.export.names import IDS, MASK

if TYPE_CHECKING:
    from numpy.typing import NDArray

Inputs = Mapping[str, "NDArray[Any]"]


def read_config(path: Path) -> dict[str, Any]:
    file = path.parent / "config.json"
    if not file.is_file():
        raise InputError(f"{file} is missing: it says how to read and write; give the folder of an export")
    return json.loads(file.read_text(encoding="utf-8"))


def check_ids(ids: NDArray[Any], rows: int | None) -> None:
    lowest, highest = int(ids.min()), int(ids.max())
    top = rows - 1 if rows is not None else np.iinfo(np.int32).max
    if lowest < 0 or highest > top:
        wrong = lowest if lowest < 0 else highest
        raise InputError(
            f"{IDS} has the id {wrong}; this file knows 0 to {top}: was the text encoded with its own tokenizer?"
        )


def check_mask(mask: NDArray[Any]) -> None:
    if int(mask.min()) < 0 or int(mask.max()) > 1:
        raise InputError(f"{MASK} has values from {mask.min()} to {mask.max()}; it takes 0 and 1")


def ends_of(eos: Any) -> frozenset[int]:
    if eos is None:
        return frozenset()
    return frozenset([int(eos)]) if np.ndim(eos) == 0 else frozenset(int(token) for token in eos)
