"""What a student learns from: the training data, texts without labels, changed copies, and what the teacher writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from specs.schema.pipeline import DataSpec
from specs.schema.steps.distill import DistillSpec
from tasks.compress.augment import augmented, neighbours_of
from tasks.compress.written import teacher_continuations, teacher_targets
from tasks.context import StepContext, StepError
from tasks.data.encoded import Encoded, FeatureFile
from tasks.finetune.batches import Roles

if TYPE_CHECKING:
    from torch import nn

_SALT = 0x61756763
_PLAIN = (".txt", ".text", ".md", ".rst")


@dataclass(frozen=True)
class Lessons:
    """All examples, and what each is there for.

    Args:
        data: the examples, those of the training data first.
        labelled: whether the example's own label or target counts, bool [N].
        roles: which train and which measure.
        parts: how many examples there are of each kind, for the report.
    """

    data: Encoded
    labelled: np.ndarray
    roles: Roles
    parts: Mapping[str, int]


def lessons(
    data: Encoded, teacher: nn.Module, about: Mapping[str, Any], folder: Path, spec: DistillSpec, ctx: StepContext
) -> Lessons:
    """Put together what the spec asks for.

    Args:
        data: the encoded training split.
        teacher: in eval mode, on ``ctx.device``.
        about: what identifies the teacher, as JSON.
        folder: with the tokenizer.
        spec: which texts besides.
        ctx: the store, the seed, progress.

    Raises:
        StepError: the texts without labels cannot be read, or nothing is left of them.
    """
    size = spec.batch_size
    limit = ctx.data.max_target_length or ctx.data.max_length
    count = len(data)
    parts, origins, labelled, trains = [data], [np.arange(count)], [np.ones(count, bool)], [np.ones(count, bool)]
    named = {"training": count}

    def add(name: str, part: Encoded, origin: np.ndarray, own: bool) -> None:
        parts.append(part)
        origins.append(origin)
        labelled.append(np.full(len(part), own))
        trains.append(np.ones(len(part), bool))
        named[name] = len(part)

    if spec.data == "teacher-generated":
        trains[0][:] = False
        if ctx.task == "text-generation":
            made = teacher_continuations(teacher, about, data, size, ctx)
        else:
            made = teacher_targets(teacher, about, data, limit, spec.beams, size, ctx)
        add("teacher-generated", made, np.arange(count), True)
    if spec.augment is not None:
        ctx.note("changing words of the training texts")
        table = teacher.get_input_embeddings().weight  # type: ignore[operator, union-attr]
        near = neighbours_of(table, _tokenizer(folder), spec.augment.candidates)
        rng = np.random.default_rng([ctx.seed, _SALT])
        made, origin = augmented(data, near, spec.augment.copies, spec.augment.replace, rng)
        add("augmented", made, origin, False)
    if spec.unlabelled is not None:
        made = unlabelled(spec.unlabelled, data, folder, ctx)
        if ctx.task == "translation":
            made = teacher_targets(teacher, about, made, limit, spec.beams, size, ctx)
        add("unlabelled", made, sum(map(len, parts)) + np.arange(len(made)), False)
    measures = np.arange(sum(map(len, parts))) < count
    roles = Roles(np.concatenate(trains), measures, np.concatenate(origins))
    return Lessons(joined(parts, ctx.work), np.concatenate(labelled), roles, named)


def unlabelled(source: str, like: Encoded, folder: Path, ctx: StepContext) -> Encoded:
    """Texts without labels, encoded as those of ``like`` are; labels and targets stand there empty.

    Of a plain text file every line is an example, unless the task is text-generation, which cuts it into windows.

    Raises:
        StepError: they cannot be read, or there is none.
    """
    from tasks.data.encode import encode
    from tasks.data.encode.job import padded
    from tasks.data.readers import records

    named: DataSpec = ctx.data.model_copy(update={"train": source, "train_limit": None})
    ctx.note("encoding the texts without labels")
    try:
        if ctx.task == "text-generation":
            return encode(named, "train", ctx.task, folder, ctx.store)
        texts = [record.text for record in records(named, "train", "text-generation")]
    except StepError as error:
        raise StepError(f"unlabelled: {str(error).removeprefix('data.train: ')}") from error
    if source.endswith(_PLAIN):
        texts = [line for text in texts for line in text.splitlines() if line.strip()]
    core = _tokenizer(folder)
    core.enable_truncation(ctx.data.max_length)
    rows = [np.array(found.ids, np.int32) for found in core.encode_batch(texts) if found.ids]
    if not rows:
        raise StepError(f"unlabelled: {source} holds no text; name a file with texts, or leave unlabelled out")
    ids, mask = padded(rows, ctx.data.max_length, like.pad)
    empty = None if like.labels is None else np.zeros((len(rows), *like.labels.shape[1:]), like.labels.dtype)
    numbers = int(np.max(like.document)) + 1 + np.arange(len(rows), dtype=np.int32)
    return Encoded(ids, mask, empty, numbers, np.zeros(len(rows), np.int32), like.label_names, pad=like.pad)


def joined(parts: Sequence[Encoded], work: Path) -> Encoded:
    """The examples of all parts, those of the first one first; recordings are written into the folder ``work``, since
    they may be more than memory holds."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    whole: dict[str, Any] = {}
    for name in ("input_ids", "attention_mask", "target_ids", "target_mask"):
        arrays = [getattr(part, name) for part in parts]
        if arrays[0] is not None:
            width = max(array.shape[1] for array in arrays)
            fill = first.pad if name.endswith("ids") else 0
            widened = [np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=fill) for a in arrays]
            whole[name] = np.concatenate(widened)
    for name in ("labels", "document", "text_bytes", "seconds"):
        arrays = [getattr(part, name) for part in parts]
        whole[name] = None if arrays[0] is None else np.concatenate(arrays)
    if first.features is not None:
        with FeatureFile(work) as file:
            for part in parts:
                for row in range(len(part)):
                    file.append(part.features_of(row))
        whole |= {"features": file.open(), "feature_ends": np.array(file.ends, np.int64)}
    return replace(first, **whole, references=())


def _tokenizer(folder: Path) -> Any:
    from tasks.data.tokens import open_tokenizer

    return open_tokenizer(folder).core
