"""A torch model to a float LiteRT file of fixed shape, by litert-torch and without TensorFlow."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.context import StepError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Signature:
    """One entry of a file: a module, and an example of each of its inputs by name. Signatures share their weights.

    ``module`` gives one tensor or a dictionary of tensors.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]


def to_litert(signatures: Sequence[Signature], path: Path) -> None:
    """Convert the signatures and write them as one file; the first is the one that runs by default.

    Raises:
        StepError: litert-torch cannot convert the model.
    """
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    import litert_torch
    import torch
    from litert_torch import progress

    shown, progress.config.show_progress = progress.config.show_progress, False
    converter = litert_torch.Converter()
    for signature in signatures:
        converter.signature(signature.name, signature.module.eval(), (), dict(signature.inputs))
    try:
        with torch.no_grad(), _settled():
            converter.convert().export(str(path))
    except StepError:
        raise
    except Exception as error:  # the converter raises whatever its many passes meet
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise StepError(
            f"litert-torch cannot convert this model: {lines[0][:300]}; another attention or activation may convert"
        ) from error
    finally:
        progress.config.show_progress = shown


@contextlib.contextmanager
def _settled() -> Iterator[None]:
    """Within the block nothing that stands is looked at for garbage: a conversion makes so many small objects that this
    would take a quarter of its time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
