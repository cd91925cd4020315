"""What differs between the families of models that are exported: signatures, samples, comparison with torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from specs.schema.base import Task
from tasks.export.convert import Signature
from tasks.export.decoding import decoding
from tasks.export.generation import generation
from tasks.export.lite_ctc import LiteRTCtc
from tasks.export.lite_file import LiteFile
from tasks.export.lite_seq2seq import LiteRTSeq2Seq
from tasks.export.lite_text import LiteRTModel
from tasks.export.names import DECODE, DECODER_IDS, IDS, MASK, SAMPLES, SCORE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tasks.context import StepContext
    from tasks.data import Encoded

_WRITTEN = 32
"""Examples that are written out for the calibration of a decoder."""

_RECORDED = 128
"""Calls of ``decode`` that are kept of them, since one example makes many."""

Batch = Mapping[str, "NDArray[Any]"]


@dataclass(frozen=True)
class Wanted:
    """The shape of an export, or of the examples that it is checked with.

    Args:
        batch: examples of one call.
        length: tokens of the input, where it is text.
        cache: tokens that a decoder's cache holds; None where it does not write.
        target_length: tokens that an encoder-decoder writes.
        duration: seconds of audio that a model for CTC takes; None for the longest training recording.
        samples: training examples.
    """

    batch: int
    length: int
    cache: int | None
    target_length: int
    duration: float | None
    samples: int


class Form(Protocol):
    """How one family is exported. ``properties`` describe the file: its shape."""

    @property
    def properties(self) -> dict[str, Any]: ...

    def signatures(self, model: Any, lookup: bool) -> list[Signature]:
        """What the file offers, from a model that has the attention for exports. ``lookup`` is for full int8."""
        ...

    def reference(self, model: Any) -> list[NDArray[np.float32]]:
        """Logits that the unchanged torch model gives for some of the samples."""
        ...

    def given(self, exported: Any) -> list[NDArray[np.float32]]:
        """The same logits from the exported file, opened."""
        ...

    def calibration(self, path: Path, threads: int) -> dict[str, list[Batch]]:
        """Inputs of every signature of the float file, for all samples."""
        ...


@dataclass
class Text:
    """A classifier, or a decoder that scores and, with ``cache``, writes."""

    task: Task
    batches: list[Batch]
    batch: int
    length: int
    cache: int | None
    pad: int | None

    @property
    def properties(self) -> dict[str, Any]:
        return {"batch": self.batch, "length": self.length, "cache": self.cache}

    def signatures(self, model: Any, lookup: bool) -> list[Signature]:
        import torch

        from tasks.export.scorer import scorer

        ids, mask = (torch.ones(self.batch, self.length, dtype=torch.int32) for _ in range(2))
        scores = Signature(SCORE, scorer(model, self.task, self.length, lookup), {IDS: ids, MASK: mask})
        return [scores, *(generation(model, self.cache, lookup) if self.cache else ())]

    def _masked(self) -> list[Batch]:
        """The first batch as it is, and with half of every example masked."""
        ids, mask = self.batches[0][IDS], self.batches[0][MASK]
        half = mask * (np.arange(self.length) < np.maximum(mask.sum(1, keepdims=True) // 2, 1))
        # Classifiers that read the last token find it in torch by the id of the padding.
        return [{IDS: ids if self.pad is None else np.where(one > 0, ids, self.pad), MASK: one} for one in (mask, half)]

    def _text(self) -> NDArray[Any]:
        """The first text, as far as the cache can hold it."""
        batch = self.batches[0]
        return batch[IDS][0, : min(int(batch[MASK][0].sum()), self.cache or 0)]

    def reference(self, model: Any) -> list[NDArray[np.float32]]:
        found = [_kept(_logits(model, batch), batch[MASK], self.task) for batch in self._masked()]
        if self.cache:
            text = self._text()
            found.append(_logits(model, {IDS: text[None], MASK: np.ones_like(text)[None]})[0, _prompt(text) - 1 :])
        return found

    def given(self, exported: Any) -> list[NDArray[np.float32]]:
        found = [_kept(exported.run(batch[IDS], batch[MASK]), batch[MASK], self.task) for batch in self._masked()]
        if self.cache:
            found.append(_written(exported, self._text()))
        return found

    def calibration(self, path: Path, threads: int) -> dict[str, list[Batch]]:
        calls = {SCORE: list(self.batches)}
        if self.cache:
            rows = [row for one in self.batches for row in zip(one[IDS], one[MASK], strict=True)][:_WRITTEN]
            texts = [ids[: min(int(mask.sum()), self.cache)] for ids, mask in rows]
            recorder = _Recorder(sum(map(len, texts)))
            lite = LiteRTModel(LiteFile(path, threads, recorder.keep))
            for text in texts:
                _written(lite, text)
            calls |= recorder.calls
        return calls


@dataclass
class Seq2Seq:
    """A model that writes from what its encoder read: translation, and Whisper."""

    inputs: Batch
    labels: NDArray[Any]
    batch: int
    length: int
    target_length: int
    start: int
    pad: int

    @property
    def properties(self) -> dict[str, Any]:
        return {"batch": self.batch, "length": self.length, "target_length": self.target_length}

    def signatures(self, model: Any, lookup: bool) -> list[Signature]:
        from tasks.export.seq2seq import seq2seq

        return seq2seq(model, self.batch, self.length, self.target_length, lookup)

    def _examples(self, count: int) -> tuple[Batch, NDArray[Any], NDArray[Any]]:
        """The first inputs, what the decoder is given with them, and where that counts."""
        labels = self.labels[:count, : self.target_length]
        shifted = np.concatenate([np.full((len(labels), 1), self.start), labels[:, :-1]], axis=1)
        inputs = {name: values[:count] for name, values in self.inputs.items()}
        return inputs, np.where(shifted < 0, self.pad, shifted), labels >= 0

    def _variants(self) -> list[tuple[Batch, NDArray[Any], NDArray[Any]]]:
        """The first examples as they are, and with half of every source masked."""
        inputs, ids, counts = self._examples(max(self.batch, 2))
        if MASK not in inputs:
            return [(inputs, ids, counts)]
        size = inputs[MASK].sum(1, keepdims=True)
        half = inputs[MASK] * (np.arange(inputs[MASK].shape[1]) < np.maximum(size // 2, 1))
        return [(inputs, ids, counts), ({**inputs, MASK: half}, ids, counts)]

    def reference(self, model: Any) -> list[NDArray[np.float32]]:
        return [_logits(model, {**inputs, DECODER_IDS: ids})[counts] for inputs, ids, counts in self._variants()]

    def given(self, exported: Any) -> list[NDArray[np.float32]]:
        return [exported.logits(inputs, ids)[counts] for inputs, ids, counts in self._variants()]

    def calibration(self, path: Path, threads: int) -> dict[str, list[Batch]]:
        inputs, ids, _ = self._examples(_WRITTEN)
        recorder = _Recorder(math.ceil(len(ids) / self.batch) * ids.shape[1])
        lite = LiteRTSeq2Seq(LiteFile(path, threads, recorder.keep))
        lite.logits(inputs, ids)
        if len(self.labels) > _WRITTEN:
            lite.write({name: values[_WRITTEN:] for name, values in self.inputs.items()}, 1)
        return recorder.calls


@dataclass
class Ctc:
    """A model that names a character, or none, for every frame of audio."""

    samples: list[NDArray[np.float32]]
    batch: int
    length: int

    @property
    def properties(self) -> dict[str, Any]:
        return {"batch": self.batch, "length": self.length}

    def signatures(self, model: Any, lookup: bool) -> list[Signature]:
        from tasks.export.ctc import ctc

        return ctc(model, self.batch, self.length, lookup, self.samples[:_WRITTEN])

    def _some(self) -> list[NDArray[np.float32]]:
        """The first recordings, and the half of the first one."""
        some = self.samples[: max(self.batch, 2)]
        return [*some, some[0][: max(len(some[0]) // 2, 1)]]

    def reference(self, model: Any) -> list[NDArray[np.float32]]:
        return [_logits(model, {SAMPLES: samples[None]})[0] for samples in self._some()]

    def given(self, exported: Any) -> list[NDArray[np.float32]]:
        some = self._some()
        logits = exported.logits(_padded(some, self.length))
        frames = exported.frames([len(samples) for samples in some])
        return [row[:count] for row, count in zip(logits, frames, strict=True)]

    def calibration(self, path: Path, threads: int) -> dict[str, list[Batch]]:
        recorder = _Recorder(_RECORDED)
        LiteRTCtc(LiteFile(path, threads, recorder.keep)).logits(_padded(self.samples, self.length))
        return recorder.calls


def open_form(
    path: Path, model: Any, encoded: Encoded, family: str, wanted: Wanted, ctx: StepContext
) -> tuple[Form, dict[str, Any], list[str]]:
    """How a model of ``family`` is exported, the fields of ``config.json`` that describe what it gives, and warnings.

    Args:
        path: the folder of the model.
        model: the model, unchanged.
        encoded: the training data, of which a seeded sample serves calibration and checks.
        family: as ``tasks.models.family_of`` says.
        wanted: shape and samples.
        ctx: of the step.
    """
    import torch

    order = torch.randperm(len(encoded), generator=ctx.generator()).numpy()[: wanted.samples]
    name = "encoder" if ctx.task == "text-classification" else family
    return _FORMS[name](path, model, encoded, np.sort(order), wanted, ctx)


def _text(
    path: Path, model: Any, encoded: Encoded, rows: NDArray[Any], wanted: Wanted, ctx: StepContext
) -> tuple[Form, dict[str, Any], list[str]]:
    from tasks.data.collate import collate

    length = wanted.length
    batches: list[Batch] = []
    for start in range(0, len(rows), wanted.batch):
        batch = collate(encoded, rows[np.arange(start, start + wanted.batch) % len(rows)], length)
        batches.append({IDS: batch[IDS], MASK: batch[MASK]})
    pad = model.config.pad_token_id
    if ctx.task == "text-generation":
        return Text(ctx.task, batches, wanted.batch, length, wanted.cache, pad), {}, []
    labels = {str(at): model.config.id2label[at] for at in sorted(model.config.id2label)}
    described = {"id2label": labels, "label2id": {name: int(at) for at, name in labels.items()}}
    return Text(ctx.task, batches, wanted.batch, length, None, pad), described, []


def _seq2seq(
    path: Path, model: Any, encoded: Encoded, rows: NDArray[Any], wanted: Wanted, ctx: StepContext
) -> tuple[Form, dict[str, Any], list[str]]:
    import torch

    from tasks.data.collate import collate

    samples = collate(encoded, rows, encoded.feature_frames or wanted.length)
    inputs = {name: values for name, values in samples.items() if name != "labels"}
    described, warnings = decoding(model, {name: torch.from_numpy(values[:1]) for name, values in inputs.items()})
    length = next(iter(inputs.values())).shape[-1]
    start, pad = described["decoder_start_token_id"], described["pad_token_id"]
    return (
        Seq2Seq(inputs, samples["labels"], wanted.batch, length, wanted.target_length, start, pad),
        described,
        warnings,
    )


def _ctc(
    path: Path, model: Any, encoded: Encoded, rows: NDArray[Any], wanted: Wanted, ctx: StepContext
) -> tuple[Form, dict[str, Any], list[str]]:
    rate = json.loads((path / "preprocessor_config.json").read_text(encoding="utf-8"))["sampling_rate"]
    longest, stride = int(encoded.lengths().max()), int(model.config.conv_stride[0])
    length = -(-(longest if wanted.duration is None else round(wanted.duration * rate)) // stride) * stride
    samples = [np.asarray(encoded.features_of(row)[:length]) for row in rows.tolist()]
    warnings = []
    if length < longest:
        cut = int((encoded.lengths() > length).sum())
        warnings.append(f"{cut} of {len(encoded)} training recordings are longer than {length / rate:g} s and are cut")
    return Ctc(samples, wanted.batch, length), {"sampling_rate": rate}, warnings


_FORMS: dict[str, Callable[..., tuple[Form, dict[str, Any], list[str]]]] = {
    "encoder": _text,
    "decoder": _text,
    "encoder-decoder": _seq2seq,
    "ctc": _ctc,
}


class _Recorder:
    """Keeps the inputs of calls: of ``decode`` a seeded share, so that about ``_RECORDED`` of ``expected`` stay."""

    def __init__(self, expected: int) -> None:
        self.calls: dict[str, list[Batch]] = {}
        self._share = _RECORDED / max(expected, 1)
        self._draw = np.random.default_rng(0)

    def keep(self, signature: str, inputs: Batch) -> None:
        kept = self.calls.setdefault(signature, [])
        if signature != DECODE or not kept or self._draw.random() < self._share:
            kept.append(inputs)


def _logits(model: Any, inputs: Batch) -> NDArray[np.float32]:
    """The torch model's logits, [examples, …]."""
    import torch

    kinds = {name: np.float32 if values.dtype.kind == "f" else np.int64 for name, values in inputs.items()}
    with torch.inference_mode():
        tensors = {name: torch.from_numpy(np.array(values, kinds[name])) for name, values in inputs.items()}
        return model(**tensors).logits.numpy()


def _kept(logits: NDArray[np.float32], mask: NDArray[Any], task: Task) -> NDArray[np.float32]:
    return logits[mask > 0] if task == "text-generation" else logits


def _prompt(text: NDArray[Any]) -> int:
    """How much of a text is taken as the prompt: the first half."""
    return max(1, len(text) // 2)


def _written(lite: Any, text: NDArray[Any]) -> NDArray[np.float32]:
    """Logits behind every token of ``text`` from the end of its prompt on, as writing it gives them."""
    prompt = _prompt(text)
    steps = [lite.prefill(text[:prompt].tolist())]
    return np.stack(steps + [lite.decode(int(text[place]), place) for place in range(prompt, len(text))])


def _padded(samples: Sequence[NDArray[np.float32]], length: int) -> Batch:
    values = np.zeros((len(samples), length), np.float32)
    mask = np.zeros((len(samples), length), np.int32)
    for row, one in enumerate(samples):
        values[row, : len(one)], mask[row, : len(one)] = one, 1
    return {SAMPLES: values, MASK: mask}
