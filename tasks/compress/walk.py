"""Through a model block by block: each is changed by what comes into it from the blocks changed before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.compress.calibrate import examples, forward
from tasks.models.anatomy import Anatomy, anatomy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tasks.data.encoded import Encoded


@dataclass(frozen=True)
class Stage:
    """Linear layers that are seen and changed together: those of a block, or what stands before or behind all blocks.

    Args:
        layers: names, in no particular order.
        stack: the list that holds the block; None where the layers are in none.
        index: the block's place in its stack.
    """

    layers: tuple[str, ...]
    stack: str | None = None
    index: int = 0


def stages(parts: Anatomy) -> list[Stage]:
    """The linear layers of a model without its head, in the order in which it computes them."""
    blocks = [Stage(block.layers, stack.name, block.index) for stack in parts.stacks for block in stack.blocks]
    outside = [Stage(layers) for layers in (parts.front_layers, parts.pooler)]
    return [stage for stage in (outside[0], *blocks, outside[1]) if stage.layers]


def walk(
    network: nn.Module,
    names: frozenset[str],
    data: Encoded,
    see: Callable[[str, Tensor], None],
    change: Callable[[tuple[str, ...]], None],
    *,
    device: str = "cpu",
    progress: Callable[[float, float, str], None] | None = None,
) -> None:
    """For each block in turn: show ``see`` what comes into its layers, then have ``change`` change them.

    Every example runs by itself. Blocks that are done do not compute again: what a block gave for each example is kept
    on the CPU until the next one is done, so the memory is one block's output for every example, and the time that of
    two passes through each block. The model's own code runs around the blocks, whatever it hands them.

    Args:
        network: a model in eval mode, on ``device``.
        names: the linear layers that matter; a stage without any is passed by.
        data: the examples.
        see: called with a layer's name and its input as float32 [T, D].
        change: called with the names of a stage when all examples were seen.
        progress: called with stages done, stages in all, and ``blocks``.

    Raises:
        StepError: the parts of the model are not described.
    """
    import torch

    order = [stage for stage in stages(anatomy(network)) if stage.stack or names & set(stage.layers)]
    outputs: list[dict[str, Any]] = [{} for _ in range(len(data))]
    for done, stage in enumerate(order):
        wanted = tuple(name for name in stage.layers if name in names)
        before = next((other for other in reversed(order[:done]) if other.stack), None)
        with torch.no_grad(), _shortened(network, before, device) as use, _watched(network, wanted, see) as seen:
            for batch, kept in zip(examples(data, device), outputs, strict=True):
                use(kept)
                seen.clear()
                with suppress(_Enough):
                    forward(network, batch)
        if wanted:
            change(wanted)
        if progress is not None:
            progress(done + 1, len(order), "blocks")


class _Enough(Exception):
    """Everything that was to be seen of an example was seen."""


@contextmanager
def _watched(network: nn.Module, names: tuple[str, ...], see: Callable[[str, Tensor], None]) -> Iterator[set[str]]:
    """Show ``see`` what comes into the layers, and break off when each was seen."""
    seen: set[str] = set()

    def hook(name: str) -> Any:
        def look(module: nn.Module, given: tuple[Any, ...]) -> None:
            see(name, given[0].detach().float().reshape(-1, given[0].shape[-1]))
            seen.add(name)
            if len(seen) == len(names):
                raise _Enough

        return look

    with ExitStack() as handles:
        for name in names:
            handle = network.get_submodule(name).register_forward_pre_hook(hook(name))
            handles.callback(handle.remove)
        yield seen


@contextmanager
def _shortened(network: nn.Module, last: Stage | None, device: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Let the blocks before ``last`` give what the last one of them gave, and note what ``last`` gives.

    Yields:
        A function that takes the notes of the example that comes next: for each stack what its last block done gave.
    """
    if last is None:
        yield lambda kept: None
        return
    notes: dict[str, Any] = {}

    def use(kept: dict[str, Any]) -> None:
        nonlocal notes
        notes = kept

    def note(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        notes[str(last.stack)] = _moved(output, "cpu")

    with ExitStack() as undo:
        for stack in anatomy(network).stacks:
            blocks: Any = network.get_submodule(stack.name)
            for block in blocks[: last.index] if stack.name == last.stack else blocks:
                block.forward = lambda *given, at=stack.name, **named: _moved(notes[at], device)
                undo.callback(delattr, block, "forward")
            if stack.name == last.stack:
                undo.callback(blocks[last.index].register_forward_hook(note).remove)
                break
        yield use


def _moved(value: Any, device: str) -> Any:
    """A copy of the tensors in a block's output."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(part, device) for part in value)
    return value
