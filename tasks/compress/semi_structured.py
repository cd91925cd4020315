"""2:4 in execution: what a GPU of compute capability 8.0 or newer computes with half the multiplications."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.compress.packed import put
from tasks.models.layout import linear_layers

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

LARGEST_ERROR = 1e-2
"""Relative difference between the sparse and the dense product in half precision beyond which one is wrong."""

_TOKENS = 2048
_WARMUP, _REPEATS = 5, 30


@dataclass(frozen=True)
class Gain:
    """Dense and 2:4 layers beside each other on one GPU.

    Args:
        layers: how many run as 2:4.
        left: the others with the reason.
        seconds: of one product of each layer that runs as 2:4, for ``tokens`` vectors: dense, and 2:4.
        error: the largest relative difference between the two.
    """

    layers: int
    left: dict[str, str]
    seconds: tuple[float, float]
    error: float
    tokens: int = _TOKENS


def is_two_four(matrix: Tensor) -> bool:
    """Whether of every four neighbours in a row of ``matrix`` [out, in] at least two are 0."""
    if matrix.shape[1] % 4:
        return False
    return bool(((matrix.reshape(-1, 4) != 0).sum(1) <= 2).all())


def why_not(device: str) -> str | None:
    """Why 2:4 cannot run on ``device``; None where it can."""
    import torch

    if device != "cuda":
        return "2:4 is computed faster by GPUs alone, and this runs on the CPU"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"2:4 needs a GPU of compute capability 8.0 or newer, and this one has {major}.{minor}"
    return None


def accelerate(network: nn.Module, dtype: torch.dtype) -> tuple[tuple[str, ...], dict[str, str]]:
    """Have the linear layers whose weights hold 2:4 computed as such, in place and for inference only.

    Args:
        network: on a GPU for which ``why_not`` has no reason; it is converted to ``dtype``.
        dtype: float16 or bfloat16.

    Returns:
        The names of the layers that run as 2:4, and the others with the reason.

    Raises:
        RuntimeError: the model is not on a GPU that can.
    """
    reason = why_not(next(network.parameters()).device.type)
    if reason is not None:
        raise RuntimeError(reason)
    from torch import nn

    network.to(dtype).requires_grad_(False)
    done, left = [], {}
    for layer in linear_layers(network):
        found = _compressed(layer.matrix) if layer.tied is None else f"tied to {layer.tied}"
        if isinstance(found, str):
            left[layer.name] = found
            continue
        outputs, inputs = layer.shape
        fast: Any = nn.Linear(inputs, outputs, bias=False, device="meta")
        fast.weight = nn.Parameter(found, requires_grad=False)
        fast.bias = getattr(layer.module, "bias", None)
        put(network, layer.name, fast)
        done.append(layer.name)
    return tuple(done), left


def measure(network: nn.Module, names: frozenset[str], dtype: torch.dtype) -> Gain:
    """Time the layers ``names`` of a model on a GPU, dense and as 2:4, and compare what they give; nothing changes."""
    import torch
    from torch.nn.functional import linear

    left: dict[str, str] = {}
    seconds: dict[tuple[int, ...], tuple[float, float]] = {}
    counted = [0.0, 0.0]
    done, error = 0, 0.0
    for layer in linear_layers(network):
        if layer.name not in names:
            continue
        dense = layer.matrix.detach().to(dtype).contiguous()
        sparse = _compressed(dense)
        if isinstance(sparse, str):
            left[layer.name] = sparse
            continue
        random = torch.Generator(dense.device).manual_seed(0)
        x = torch.randn(_TOKENS, dense.shape[1], device=dense.device, dtype=dtype, generator=random)
        expected = linear(x, dense).float()
        error = max(error, float((linear(x, sparse).float() - expected).norm() / expected.norm().clamp_min(1e-30)))
        if dense.shape not in seconds:
            pair = (dense, sparse)
            seconds[dense.shape] = tuple(_seconds(lambda w=w, x=x: linear(x, w)) for w in pair)  # type: ignore[assignment]
        counted = [total + part for total, part in zip(counted, seconds[dense.shape], strict=True)]
        done += 1
    return Gain(done, left, (counted[0], counted[1]), error)


def _compressed(matrix: Tensor) -> Any:
    """The matrix in the GPU's own form, or why it has none."""
    import torch

    if not is_two_four(matrix):
        return "its weights do not hold 2:4"
    try:
        return torch.sparse.to_sparse_semi_structured(matrix.detach().contiguous())
    except (RuntimeError, ValueError) as error:  # the shapes that a kernel takes depend on the GPU and the type
        return str(error).splitlines()[0]


def _seconds(call: Callable[[], object]) -> float:
    import torch

    taken = []
    for _ in range(_WARMUP + _REPEATS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()  # type: ignore[no-untyped-call]
        call()
        ended.record()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        taken.append(began.elapsed_time(ended) / 1000)
    return statistics.median(taken[_WARMUP:])
