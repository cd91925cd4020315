"""Checking and padding what a file of fixed shape is given. Needs numpy only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.export.errors import InputError
from tasks.export.inputs import Inputs
from tasks.export.lite_file import Call, Port
from tasks.export.names import IDS

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def checked_inputs(inputs: Inputs, call: Call, source: str) -> dict[str, NDArray[Any]]:
    """The inputs that the call takes from outside, checked: no longer than the file's, and as many of each."""
    found: dict[str, NDArray[Any]] = {}
    for name, port in call.entry.inputs.items():
        if name not in inputs:
            raise InputError(f"the inputs are {', '.join(inputs)}; this file takes {', '.join(call.entry.inputs)}")
        values = np.asarray(inputs[name])
        if values.ndim != len(port.shape) or values.shape[1:-1] != port.shape[1:-1] or not len(values):
            raise InputError(f"{name} has the shape {list(values.shape)}; this file takes {list(port.shape)}")
        if values.shape[-1] > port.shape[-1]:
            raise InputError(
                f"{name} has the shape {list(values.shape)}; this file takes {port.shape[-1]} at most: cut it, or "
                "export with a greater `length` or `duration`"
            )
        found[name] = values
    if len({len(values) for values in found.values()}) != 1:
        raise InputError(f"{source} has {len(found[source])} examples and the other inputs have not as many")
    return found


def filled(values: NDArray[Any], port: Port, pad: int) -> NDArray[Any]:
    """``values`` padded to the port's shape: with ``pad`` where they are ids, else with 0; rows with the first one."""
    whole = np.full(port.shape, pad if port.name == IDS else 0, values.dtype)
    whole[: len(values), ..., : values.shape[-1]] = values
    whole[len(values) :] = whole[:1]
    return whole


def checked(values: ArrayLike, name: str, shape: tuple[int, int]) -> NDArray[np.generic]:
    array = np.asarray(values)
    if array.shape != shape:
        raise InputError(
            f"{name} has the shape {list(array.shape)}; this file takes {list(shape)}: "
            "pad or cut to it, or export with other `batch` and `length`"
        )
    if not (np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_):
        raise InputError(f"{name} is {array.dtype}; it takes integers")
    return array


def scalar(value: int) -> NDArray[np.int32]:
    return np.array([value], np.int32)
