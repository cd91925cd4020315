"""The constants of an exported file, as every runtime's reader gives them. Needs numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Constant:
    """A constant tensor that is stored in a file.

    Args:
        dtype: numpy's name of the type, or ``int4`` and the like.
        values: its elements.
        zero: the element that stands for zero.
        bytes: that it takes in the file.
        is_weight: whether it holds weights, and not indices, shapes or scales.
    """

    dtype: str
    values: np.ndarray
    zero: int
    bytes: int
    is_weight: bool
