"""How an artifact runs: in torch, or in the runtime of the exported file, on that file itself.

Text-generation and classification are scored from token ids; translation and speech recognition write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import numpy as np

from specs.schema.base import Task
from tasks.context import Artifact
from tasks.data.encoded import Encoded

Inputs = Mapping[str, np.ndarray]
"""What ``tasks.data.collate`` makes of examples, by the names that the model's ``forward`` has, without labels."""


@runtime_checkable
class Runner(Protocol):
    """Something that turns token ids into logits.

    ``batch`` and ``length`` are the fixed shape of an export, None where any shape will do; ``positions`` is how many
    tokens a sequence may have at most, None where there is no limit; ``vocabulary`` the logits of a position of
    text-generation, 0 where their memory is not of this process' making; ``rescores`` says whether it writes without a
    cache, by a pass over the whole text for every token. Ids and masks are int [B, L], rows padded on the right.
    """

    @property
    def batch(self) -> int | None: ...

    @property
    def length(self) -> int | None: ...

    @property
    def positions(self) -> int | None: ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def rescores(self) -> bool: ...

    def logits(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Float32 [B, C] or [B, L, V]."""
        ...

    def nll(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Nats of each row's tokens, from the second unmasked one on, summed; float64 [B]."""
        ...

    def generate(self, prompt: np.ndarray, limit: int, eos: int | None) -> list[int]:
        """The tokens after ``prompt``, int [P], greedily; at most ``limit``, up to ``eos``, which is left out."""
        ...

    def caller(self, ids: np.ndarray, mask: np.ndarray) -> Callable[[], object]:
        """One inference on these inputs as a call that returns when the work is done."""
        ...


@runtime_checkable
class Writer(Protocol):
    """Something that turns text or audio into text.

    ``batch`` and ``length`` are the fixed shape of an export's input (tokens, frames or samples), None where any shape
    will do; ``positions`` is how many tokens its input may have and ``target_length`` how many tokens it can write,
    None where there is no limit; ``at_once`` says whether all tokens come at the same time, as with CTC, instead of one
    after the other.
    """

    @property
    def batch(self) -> int | None: ...

    @property
    def length(self) -> int | None: ...

    @property
    def positions(self) -> int | None: ...

    @property
    def target_length(self) -> int | None: ...

    @property
    def at_once(self) -> bool: ...

    def write(self, inputs: Inputs, limit: int) -> list[list[int]]:
        """At most ``limit`` token ids for each example, greedily, without start, end and padding; for CTC collapsed."""
        ...

    def logits(self, inputs: Inputs, decoder_ids: np.ndarray | None) -> np.ndarray:
        """Float32 [B, T, V], the decoder given ``decoder_ids``, int [B, T]; for CTC, without them, [B, frames, V]."""
        ...

    def decoder_ids(self, rows: Encoded, chosen: np.ndarray) -> np.ndarray | None:
        """What the decoder is given to write the targets of the examples ``chosen``, int64 [B, T]; None for CTC, and
        for an export, which is given what its reference was."""
        ...


def open_runner(artifact: Artifact, task: Task, threads: int, device: str) -> Runner | Writer:
    """The artifact, ready to run on so many CPU threads.

    Args:
        artifact: a ``model``, ``packed`` or ``export``.
        task: what the language model does.
        threads: of the CPU.
        device: where a torch model runs; an export always runs on the CPU. For an export nothing of torch is imported.
    """
    if artifact.kind == "export":
        from tasks.evaluate import export_runners

        return export_runners.open_file(artifact.path / artifact.properties["file"], threads)
    import torch

    from tasks.evaluate import torch_runners

    torch.set_num_threads(threads)
    return torch_runners.open_folder(artifact.path, task, device)


def on_threads(runner: Runner | Writer, artifact: Artifact, task: Task, had: int, wanted: int) -> Runner | Writer:
    """The same artifact on another number of threads; a torch model stays as it is."""
    if had == wanted:
        return runner
    if artifact.kind == "export":
        return open_runner(artifact, task, wanted, "cpu")
    import torch

    torch.set_num_threads(wanted)
    return runner
