"""The numbers that a training computes with: their precision, and a random state of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from tasks.context import StepError

if TYPE_CHECKING:
    import torch


def precision_of(asked: str, device: str) -> str:
    """``fp32``, ``bf16`` or ``fp16`` for what a spec asks.

    Raises:
        StepError: the device cannot do it.
    """
    import torch

    if device == "cpu":
        if asked == "fp16":
            raise StepError("precision: fp16 needs a GPU and this step runs on the CPU; write precision: auto")
        return "fp32" if asked == "auto" else asked
    if asked == "auto":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return asked


def autocast(precision: str, device: str) -> torch.autocast:
    """Within it torch computes in ``precision``."""
    import torch

    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device, dtype=dtype, enabled=precision != "fp32")


@contextmanager
def own_random_state(device: str) -> Iterator[None]:
    """Within the block the global generators may be seeded; afterwards they are as they were."""
    import torch

    before = np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if device == "cuda" else []):
            yield
    finally:
        np.random.set_state(before)
