"""How much a model needs each of its parts, seen on training examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tasks.compress.calibrate import examples, forward
from tasks.compress.cut import Axis, Source

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tasks.data.encoded import Encoded
    from tasks.finetune.objective import Loss

Progress = Callable[[float, float, str], None]

BATCH = 8
"""Examples whose gradient Taylor importance takes at once."""


def activation(
    network: nn.Module, axes: Sequence[Axis], data: Encoded, *, device: str = "cpu", progress: Progress | None = None
) -> dict[str, Tensor]:
    """The mean size of what flows through each unit (Minitron, 2407.14679): of channels the mean magnitude, of heads
    the mean norm of what each gives to the output projection, of hidden numbers the mean magnitude behind the norms.

    Where an axis is seen in several places, they are summed. The paper takes means over the sequence and then norms
    over the batch; here every token counts the same.

    Args:
        network: a model in eval mode, on ``device``.
        axes: whose units are judged.
        data: the examples, each run by itself.

    Returns:
        The name of each axis to the importance of its units, float64 [n].
    """
    import torch

    seen: dict[Source, Tensor] = {}
    tokens: dict[Source, int] = {}

    def see(source: Source, vectors: Tensor) -> None:
        sizes = vectors.reshape(len(vectors), -1, source.unit).norm(dim=-1).double().sum(0).cpu()
        seen[source] = seen.get(source, 0) + sizes
        tokens[source] = tokens.get(source, 0) + len(vectors)

    sources = [source for axis in axes for source in axis.sources]
    with torch.inference_mode(), _watched(network, sources, see):
        _run(network, data, device, progress)
    return {
        axis.name: sum(seen[source] / tokens[source] for source in axis.sources).reshape(axis.size, -1).sum(1)  # type: ignore[union-attr]
        for axis in axes
    }


def block_influence(
    network: nn.Module, blocks: Iterable[str], data: Encoded, *, device: str = "cpu", progress: Progress | None = None
) -> dict[str, float]:
    """How much each block turns what goes through it: 1 - the mean cosine between its input and its output over all
    tokens (ShortGPT, 2403.03853)."""
    import torch

    total: dict[str, float] = {}
    tokens: dict[str, int] = {}

    def hook(name: str) -> Any:
        def look(module: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any], result: Any) -> None:
            before = given[0] if given else named["hidden_states"]
            after = result if isinstance(result, torch.Tensor) else result[0]
            cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
            total[name] = total.get(name, 0.0) + float(cosine.sum())
            tokens[name] = tokens.get(name, 0) + cosine.numel()

        return look

    handles = [network.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in blocks]
    try:
        with torch.inference_mode():
            _run(network, data, device, progress)
    finally:
        for handle in handles:
            handle.remove()
    return {name: 1 - total[name] / tokens[name] for name in total}


def taylor(
    network: nn.Module, data: Encoded, loss: Loss, *, device: str = "cpu", progress: Progress | None = None
) -> dict[str, Tensor]:
    """``|weight * gradient|`` of every parameter, float64, summed over batches of ``BATCH`` examples.

    To first order it is how much the loss changes where the weight becomes zero (Molchanov et al., 1906.10771, who
    square it).

    Args:
        network: a model in eval mode, on ``device``; its gradients are used and taken away again.
        data: the examples.
        loss: the loss of the task.
    """
    import numpy as np
    import torch

    from tasks.data.collate import collate

    weights = dict(network.named_parameters())
    asked = {name: weight.requires_grad for name, weight in weights.items()}
    found = {name: torch.zeros(weight.shape, dtype=torch.float64) for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    for start in range(0, len(data), BATCH):
        rows = np.arange(start, min(start + BATCH, len(data)))
        batch = {name: torch.from_numpy(array).to(device) for name, array in collate(data, rows).items()}
        batch = {name: tensor if tensor.is_floating_point() else tensor.long() for name, tensor in batch.items()}
        network.zero_grad(set_to_none=True)
        total, weight = loss(network, batch)
        (total / weight.clamp(min=1)).backward()
        for name, parameter in weights.items():
            if parameter.grad is not None:
                found[name] += (parameter.detach() * parameter.grad).abs().double().cpu()
        if progress is not None:
            progress(min(start + BATCH, len(data)), len(data), "examples")
    network.zero_grad(set_to_none=True)
    for name, weight in weights.items():
        weight.requires_grad_(asked[name])
    return found


def by_axis(found: Mapping[str, Tensor], axes: Iterable[Axis]) -> dict[str, Tensor]:
    """The sums of ``taylor`` over all that goes with each unit; a weight that has several names counts once."""
    scores = {}
    for axis in axes:
        sums = []
        for place in axis.places:
            if place.tensor not in found:
                continue
            tensor = found[place.tensor]
            flat = tensor.movedim(place.dim, 0).reshape(tensor.shape[place.dim], -1).sum(1)
            sums.append(flat.reshape(place.segments, axis.size, place.unit).sum((0, 2)))
        scores[axis.name] = sum(sums)
    return scores


def by_block(found: Mapping[str, Tensor], blocks: Iterable[str]) -> dict[str, float]:
    """The sums of ``taylor`` over each block."""
    return {
        block: float(sum(tensor.sum() for name, tensor in found.items() if name.startswith(f"{block}.")))
        for block in blocks
    }


def _run(network: nn.Module, data: Encoded, device: str, progress: Progress | None) -> None:
    for done, batch in enumerate(examples(data, device), start=1):
        forward(network, batch)
        if progress is not None:
            progress(done, len(data), "examples")


@contextmanager
def _watched(network: nn.Module, sources: Sequence[Source], see: Callable[[Source, Tensor], None]) -> Iterator[None]:
    """``see`` is shown what goes into or comes out of modules, as float32 [T, D]."""
    from torch import nn

    def look(source: Source, value: Any, module: nn.Module) -> None:
        tensor = value if not isinstance(value, tuple) else value[0]
        if isinstance(module, nn.Conv1d):
            tensor = tensor.transpose(1, 2)
        see(source, tensor.detach().float().reshape(-1, tensor.shape[-1]))

    def hook(source: Source) -> Any:
        if source.side == "input":
            return lambda module, given: look(source, given, module)
        return lambda module, given, result: look(source, result, module)

    handles = []
    for source in sources:
        module = network.get_submodule(source.module)
        register = module.register_forward_pre_hook if source.side == "input" else module.register_forward_hook
        handles.append(register(hook(source)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
