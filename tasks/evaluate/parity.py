"""How close the outputs of an export or a packed model are to those of the torch model it was made from.

The torch model's evaluation keeps its inputs and logits in ``reference.safetensors``; the other is run on those very
inputs. A decoder is given the tokens of the reference text, so that both predict the same ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tasks.evaluate.quality.batches import padded, source
from tasks.evaluate.runners import Inputs, Runner, Writer
from tasks.evaluate.scores import metric
from tasks.evaluate.subject import Subject

FILE = "reference.safetensors"
_BYTES = 20_000_000
_INPUT = "input."


def write(folder: Path, subject: Subject) -> None:
    """Keep inputs and logits of the first ``evaluate.parity_examples`` examples, as many as fit into 20 MB.

    ``logits`` is float32 [n, C] for classification, else [n, P, V] with ``positions`` [n] that count; of an example
    that is too large alone the first positions are kept. ``lengths`` [n] are the tokens, frames or samples of the
    inputs, ``decoder_ids`` [n, T] what a decoder was given.
    """
    from safetensors.numpy import save_file

    wanted = np.arange(min(subject.spec.parity_examples, len(subject.rows)))
    given = source(subject.rows, wanted, None)
    decoder_ids = None if isinstance(subject.runner, Runner) else subject.runner.decoder_ids(subject.rows, wanted)
    found: list[np.ndarray] = []
    for row in wanted.tolist():
        logits = _logits(subject, row, decoder_ids)
        found.append(logits[: max(1, _BYTES // (4 * logits.shape[-1]))] if logits.ndim == 2 else logits)
        if sum(one.nbytes for one in found) > _BYTES and len(found) > 1:
            found.pop()
            break
    count = len(found)
    width = max(len(one) for one in found)
    kept = {f"{_INPUT}{name}": array[:count] for name, array in given.items()}
    kept["logits"] = np.stack([np.pad(one, [(0, width - len(one))] + [(0, 0)] * (one.ndim - 1)) for one in found])
    kept["positions"] = np.array([len(one) if one.ndim == 2 else 0 for one in found])
    kept["lengths"] = subject.rows.lengths()[:count]
    if decoder_ids is not None:
        kept["decoder_ids"] = decoder_ids[:count]
    save_file({name: np.ascontiguousarray(array) for name, array in kept.items()}, folder / FILE)


def compare(folder: Path, runner: Runner | Writer, pad: int) -> tuple[dict[str, dict[str, Any]], str | None]:
    """``parity_error`` and ``parity_agreement`` against the reference in ``folder``, and a note.

    ``parity_error`` is the Euclidean norm of the difference of the logits over that of the reference's logits, over all
    positions that both have; ``parity_agreement`` the share of these positions with the same largest logit. An example
    that the export's length would cut is left out, but for text-generation, where what follows changes nothing.
    """
    from safetensors.numpy import load_file

    kept = load_file(folder / FILE)
    expected, positions, lengths, limit = kept["logits"], kept["positions"], kept["lengths"], runner.length
    cuttable = limit is None or (isinstance(runner, Runner) and bool(positions.any()))
    usable = [row for row, length in enumerate(lengths.tolist()) if length and (cuttable or length <= (limit or 0))]
    if not usable:
        return {}, f"no parity: every reference example is longer than the export's {limit}"
    wrong = norm = 0.0
    agree: list[np.ndarray] = []
    size = runner.batch or 1
    for start in range(0, len(usable), size):
        chosen = usable[start : start + size]
        for mine, row in zip(_again(kept, chosen, runner, pad), chosen, strict=False):
            theirs = expected[row]
            if positions[row]:
                upto = min(int(positions[row]), len(mine))
                mine, theirs = mine[:upto], theirs[:upto]
            wrong += float(np.square(mine - theirs, dtype=np.float64).sum())
            norm += float(np.square(theirs, dtype=np.float64).sum())
            agree.append(np.atleast_1d(mine.argmax(-1) == theirs.argmax(-1)))
    flags = np.concatenate(agree)
    error = float(np.sqrt(wrong / norm)) if norm else float("nan")
    left = len(lengths) - len(usable)
    note = f"parity leaves out {left} of {len(lengths)} examples longer than {limit}" if left else None
    return {
        "parity_error": metric(error, n=flags.size),
        "parity_agreement": metric(float(flags.mean()), n=flags.size),
    }, note


def _logits(subject: Subject, row: int, decoder_ids: np.ndarray | None) -> np.ndarray:
    """Logits of one example alone, without padding: float32 [C] or [positions, V]."""
    runner, rows = subject.runner, subject.rows
    inputs = source(rows, np.array([row]), None)
    if isinstance(runner, Runner):
        return runner.logits(inputs["input_ids"], inputs["attention_mask"])[0]
    if decoder_ids is None:
        return runner.logits(inputs, None)[0]
    tokens = int(np.asarray(rows.target_mask)[row].sum())
    return runner.logits(inputs, decoder_ids[row : row + 1, :tokens])[0]


def _again(kept: Inputs, chosen: list[int], runner: Runner | Writer, pad: int) -> np.ndarray:
    """Logits of an export for examples of the reference."""
    limit = runner.length
    inputs = {name.removeprefix(_INPUT): array[chosen] for name, array in kept.items() if name.startswith(_INPUT)}
    if isinstance(runner, Runner):
        lengths = kept["lengths"][chosen]
        pieces = [ids[:count][:limit] for ids, count in zip(inputs["input_ids"], lengths, strict=True)]
        return runner.logits(*padded(pieces, runner, pad))
    short = {name: np.ascontiguousarray(array[..., :limit]) for name, array in inputs.items()}
    decoder_ids = kept.get("decoder_ids")
    return runner.logits(short, None if decoder_ids is None else decoder_ids[chosen][:, : runner.target_length])
