"""What flows through a model's layers for training examples: the data that calibrated methods decide by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tasks.context import Artifact, StepContext, StepError
from tasks.models.applications import family_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tasks.data.encoded import Encoded

_SALT = 17


def sample(model: Artifact, count: int, ctx: StepContext) -> Encoded:
    """``count`` training examples, or all where there are fewer, drawn by the seed.

    Raises:
        StepError: the training data has none.
    """
    import torch

    from tasks.data import encode

    data = encode(ctx.data, "train", ctx.task, model.path, ctx.store)
    if not len(data):
        raise StepError("the training data has no example to calibrate with; check data.train and its filters")
    chosen = torch.randperm(len(data), generator=ctx.generator(_SALT))[:count]
    return data.take(chosen.sort().values.numpy())


def examples(data: Encoded, device: str = "cpu") -> Iterator[dict[str, Tensor]]:
    """The inputs of a model for one example after the other, labels left out unless they are what a decoder is given.

    An example comes alone, so that there is no padding that a layer might see, and whose share would depend on which
    examples come together.
    """
    import numpy as np

    for row in range(len(data)):
        yield inputs(data, np.array([row]), device)


def inputs(data: Encoded, rows: Any, device: str = "cpu") -> dict[str, Tensor]:
    """The inputs of a model for the examples ``rows``; whole numbers are int64. What a decoder writes is under
    ``labels``."""
    import torch

    from tasks.data.collate import collate

    batch = {name: torch.from_numpy(array).to(device) for name, array in collate(data, rows).items()}
    if data.labels is not None:
        batch.pop("labels", None)
    return {name: tensor if tensor.is_floating_point() else tensor.long() for name, tensor in batch.items()}


def forward(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits for ``batch``, float32 [B, …, C]. An encoder-decoder is given what it is to write."""
    taken = dict(batch)
    if family_of(network.config) != "encoder-decoder":  # type: ignore[arg-type]
        taken.pop("labels", None)
    return network(**taken).logits.float()


def outputs(network: nn.Module, data: Encoded) -> Tensor:
    """The logits for encoded examples, float32; of every token that is no padding where there is one for each token, of
    what is to be written where the model writes, and of every frame for CTC."""
    import numpy as np
    import torch

    from tasks.data.collate import IGNORED

    batch = inputs(data, np.arange(len(data)))
    with torch.inference_mode():
        logits = forward(network, batch)
    family = family_of(network.config)  # type: ignore[arg-type]
    if family == "encoder-decoder" and "labels" in batch:
        return logits[batch["labels"] != IGNORED]
    if logits.ndim == 2 or family == "ctc":
        return logits
    return logits[batch["attention_mask"].bool()]


def observe(
    network: nn.Module,
    names: Iterable[str],
    data: Encoded,
    see: Callable[[str, Tensor], None],
    *,
    device: str = "cpu",
    progress: Callable[[float, float, str], None] | None = None,
) -> None:
    """Run the model over ``data`` and show ``see`` what comes into the modules ``names``.

    Args:
        network: a model in eval mode, on ``device``.
        names: of modules whose first input is a tensor.
        data: the examples; each is run by itself.
        see: called with the name of the module and its input as float32 [T, D], T vectors of an example, in the order
            in which the model computes; a module that is used twice in a pass is seen twice.
        progress: called with examples done, examples in all, and ``examples``.
    """
    import torch

    with torch.inference_mode(), _watched(network, names, see):
        for done, batch in enumerate(examples(data, device), start=1):
            forward(network, batch)
            if progress is not None:
                progress(done, len(data), "examples")


@contextmanager
def _watched(network: nn.Module, names: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook(name: str) -> Any:
        return lambda module, given: see(name, given[0].detach().float().reshape(-1, given[0].shape[-1]))

    handles = [network.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
