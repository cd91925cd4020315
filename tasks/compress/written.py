"""What models write for others to learn from: the teacher's translations, transcripts and continuations, and the
student's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from specs.schema.base import Task
from tasks.compress import kept
from tasks.context import StepContext
from tasks.data.collate import IGNORED, collate
from tasks.data.encoded import Encoded

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

PROMPT = 4
"""A text is continued from its first tokens, one in so many, and at least one."""


def own_batches(task: Task, temperature: float) -> Callable[[nn.Module, Mapping[str, Tensor]], dict[str, Tensor]]:
    """What turns a batch into one that the student writes itself (GKD, 2306.13649): translations of the same texts,
    transcripts of the same recordings, or continuations of the texts' beginnings as long as the batch is. Only what it
    wrote is scored. It draws from torch's generator, so that a training step that seeds this one writes the same
    again."""

    def write(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        import torch

        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                if task == "text-generation":
                    return _continued(model, batch, temperature)
                return _answered(model, batch, temperature)
        finally:
            model.train(training)

    return write


def teacher_targets(
    teacher: nn.Module, about: Mapping[str, Any], data: Encoded, limit: int, beams: int, size: int, ctx: StepContext
) -> Encoded:
    """``data`` with targets that the teacher writes (sequence-level distillation, Kim & Rush, 1606.07947; of recordings
    the pseudo-labels of Distil-Whisper, 2311.00430).

    Args:
        teacher: a model that translates, or an encoder-decoder that transcribes.
        about: what identifies it, as JSON.
        data: what is to be translated or transcribed.
        limit: tokens of a target at most.
        beams: of the search; 1 is greedy.
        size: examples whose targets are written together.
        ctx: store, seed and progress.
    """

    def make(rows: np.ndarray) -> dict[str, np.ndarray]:
        found: dict[int, list[int]] = {}
        for part in _batches(data, rows, size):
            batch = _tensors(data, part, ctx.device)
            given = {name: tensor for name, tensor in batch.items() if name != "labels"}
            start = _start(teacher, batch.get("labels"), len(part))
            with _eval(teacher):
                out = _generate(teacher, given, limit, start=start, beams=beams)
            found.update(zip(part.tolist(), _ended(out[:, 1:], teacher), strict=True))
        return _packed([found[row] for row in rows.tolist()])

    recipe = {"about": about, "data": kept.digest(replace(data, target_ids=None, target_mask=None)), "limit": limit}
    made = kept.keep("the teacher writes targets", {**recipe, "beams": beams}, make, len(data), ctx, teacher_targets)
    ids, mask = _unpacked(made, len(data), data.pad)
    return replace(data, target_ids=ids, target_mask=mask, references=())


def teacher_continuations(
    teacher: nn.Module, about: Mapping[str, Any], data: Encoded, size: int, ctx: StepContext
) -> Encoded:
    """``data`` with texts that begin as its own do, one token in ``PROMPT``, and go on as the teacher samples them."""
    lengths = data.lengths()
    prompts = np.maximum(1, lengths // PROMPT)

    def make(rows: np.ndarray) -> dict[str, np.ndarray]:
        import torch

        found: dict[int, list[int]] = {}
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if ctx.device == "cuda" else []):
            torch.manual_seed(ctx.generator(int(rows[0]) + 1).initial_seed())
            for prompt in np.unique(prompts[rows]).tolist():
                alike = rows[prompts[rows] == prompt]
                for part in (alike[at : at + size] for at in range(0, len(alike), size)):
                    ids = torch.from_numpy(np.asarray(data.input_ids[part, :prompt], np.int64)).to(ctx.device)
                    limit = int(lengths[part].max()) - prompt
                    with _eval(teacher):
                        out = _generate(teacher, {"input_ids": ids}, max(1, limit), sample=True)
                    texts = _ended(out[:, prompt:], teacher)
                    found.update(
                        (row, [*start, *text])
                        for row, start, text in zip(part.tolist(), ids.tolist(), texts, strict=True)
                    )
        return _packed([found[row] for row in rows.tolist()])

    recipe = {"about": about, "data": kept.digest(data), "seed": ctx.seed, "batch": size}
    made = kept.keep("the teacher writes", recipe, make, len(data), ctx, teacher_continuations)
    ids, mask = _unpacked(made, len(data), data.pad)
    return replace(data, input_ids=ids, attention_mask=mask, text_bytes=np.zeros(len(data), np.int32))


def _answered(model: nn.Module, batch: Mapping[str, Tensor], temperature: float) -> dict[str, Tensor]:
    given = {name: tensor for name, tensor in batch.items() if name != "labels"}
    start = _start(model, batch["labels"], len(batch["labels"]))
    known = 0 if start is None else start.shape[1] - 1
    limit = max(1, batch["labels"].shape[1] - known)
    out = _generate(model, given, limit, start=start, sample=True, temperature=temperature)[:, 1:]
    real = _real(out, model)
    written = real.clone()
    written[:, :known] = False
    return {**given, "labels": out.masked_fill(~real, IGNORED), "scored": written}


def _start(model: Any, labels: Tensor | None, count: int) -> Tensor | None:
    """What the decoder of a model that transcribes is given before it writes, [B, P]: the token that it starts with and
    the marks of language and task that the targets begin with. None for any other: transformers knows its start.

    Whisper's own ``generate`` would choose these marks itself, cut a recording, and leave its start away.
    """
    import torch

    if labels is None or model.main_input_name != "input_features":
        return None
    named: Any = model.generation_config
    marks = [*(getattr(named, "lang_to_id", None) or {}).values(), *(getattr(named, "task_to_id", None) or {}).values()]
    marks += [getattr(named, "no_timestamps_token_id", None) or -1]
    alike = torch.isin(labels, torch.tensor(marks, device=labels.device)).all(0).long().cumprod(0)
    first = torch.full((count, 1), model.config.decoder_start_token_id, device=labels.device)
    return torch.cat([first, labels[:, : int(alike.sum())]], 1)


def _continued(model: nn.Module, batch: Mapping[str, Tensor], temperature: float) -> dict[str, Tensor]:
    import torch

    ids, mask = batch["input_ids"], batch["attention_mask"]
    prompt = max(1, int(mask.sum(1).min()) // PROMPT)
    given = {"input_ids": ids[:, :prompt]}
    out = _generate(model, given, max(1, ids.shape[1] - prompt), sample=True, temperature=temperature)
    real = torch.cat([torch.ones_like(out[:, :prompt], dtype=torch.bool), _real(out[:, prompt:], model)], 1)
    written = torch.arange(1, out.shape[1], device=out.device) >= prompt
    return {"input_ids": out, "attention_mask": real.long(), "scored": real[:, 1:] & written}


def _generate(
    model: Any,
    given: Mapping[str, Tensor],
    limit: int,
    *,
    start: Tensor | None = None,
    beams: int = 1,
    sample: bool = False,
    temperature: float = 1.0,
) -> Tensor:
    """What the model writes, [B, T], behind its prompt, the token that its decoder starts with, or ``start``."""
    import torch
    from transformers import GenerationMixin

    settings: dict[str, Any] = {"num_beams": beams, "do_sample": sample, "max_new_tokens": limit, "use_cache": True}
    if sample:
        settings |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    if "attention_mask" not in given and "input_ids" in given:
        given = {**given, "attention_mask": torch.ones_like(given["input_ids"])}
    pad = getattr(model.config, "pad_token_id", None)
    settings["pad_token_id"] = 0 if pad is None else pad
    if start is None:
        return model.generate(**given, **settings)
    plain: Any = GenerationMixin
    return plain.generate(model, **given, **settings, decoder_input_ids=start)


def _ends(model: Any) -> list[int]:
    end = getattr(model.generation_config, "eos_token_id", None)
    end = getattr(model.config, "eos_token_id", None) if end is None else end
    return [] if end is None else list(end) if isinstance(end, (list, tuple)) else [int(end)]


def _real(out: Tensor, model: nn.Module) -> Tensor:
    """Which tokens [B, T] a model wrote: all up to the first end mark, that one too."""
    import torch

    ended = torch.isin(out, torch.tensor(_ends(model), dtype=out.dtype, device=out.device))
    return ended.long().cumsum(1) - ended.long() == 0


def _ended(out: Tensor, model: nn.Module) -> list[list[int]]:
    return [row[real].tolist() for row, real in zip(out, _real(out, model), strict=True)]


@contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    import torch

    model.eval()
    with torch.no_grad():
        yield


def _batches(data: Encoded, rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """The examples by length, some at a time."""
    order = rows[np.argsort(data.lengths()[rows], kind="stable")]
    return (order[at : at + size] for at in range(0, len(order), size))


def _tensors(data: Encoded, rows: np.ndarray, device: str) -> dict[str, torch.Tensor]:
    import torch

    batch = {name: torch.from_numpy(array).to(device) for name, array in collate(data, rows).items()}
    return {name: tensor if tensor.is_floating_point() else tensor.long() for name, tensor in batch.items()}


def _packed(texts: list[list[int]]) -> dict[str, np.ndarray]:
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    return {"ids": np.concatenate([np.array(text, np.int32) for text in texts]), "ends": ends}


def _unpacked(made: kept.Kept, count: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    from tasks.data.encode.targets import fitted

    return fitted([made.rows(np.array([row]))["ids"] for row in range(count)], pad)  # type: ignore[arg-type]
