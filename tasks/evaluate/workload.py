"""What is run when speed and memory are measured: the table by task, and the calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from zlib import crc32

import numpy as np

from specs.schema.base import Task
from specs.schema.pipeline import DataSpec, EvaluateSpec
from tasks.context import StepError
from tasks.data.encoded import Encoded
from tasks.evaluate import speed
from tasks.evaluate.quality import language
from tasks.evaluate.quality.batches import source
from tasks.evaluate.runners import Inputs, Runner, Writer
from tasks.evaluate.subject import UNLIMITED, Subject

FORWARD = "one forward pass"
WRITING = "from the input to the whole output, greedily, up to the reference's length"
AT_ONCE = "from the input to the whole output, all of it at once"
FEATURES = "; features are made before"


@dataclass(frozen=True)
class Shape:
    """The batch of one call, and the tokens, frames or samples of each of its inputs."""

    batch: int
    length: int


@dataclass(frozen=True)
class Timed:
    """The calls that latency is measured on.

    Args:
        what: what one call does, in words.
        calls: they are taken in turn.
        inputs: a number for the inputs of each call; empty where all calls are the same.
        length: tokens of each input; None where they are those of the examples.
    """

    what: str
    calls: Sequence[Callable[[], object]]
    inputs: Sequence[int]
    length: int | None


@dataclass(frozen=True)
class Work:
    """What is run for the tasks of one kind.

    Args:
        shape: of the inputs, for an artifact.
        first: runs the artifact once, at its largest, before any data is there: its peak memory is measured.
        latency: the calls that are timed.
        writing: how fast text is written; None where the task writes none.
    """

    shape: Callable[[Runner | Writer, EvaluateSpec, DataSpec], Shape]
    first: Callable[[Runner | Writer, Shape, Path, DataSpec], object]
    latency: Callable[[Subject, Shape, int], Timed]
    writing: Callable[[Subject], speed.Written] | None


def tokens(rows: Encoded, count: int, length: int) -> np.ndarray:
    """Real tokens without padding, int32 [count, length]: rows one after the other, over again."""
    pieces, needed = [], count * length
    for row, present in enumerate(rows.lengths().tolist()):
        pieces.append(np.asarray(rows.input_ids[row, :present]))
        needed -= present
        if needed <= 0:
            break
    return np.resize(np.concatenate(pieces), (count, length)).astype(np.int32)


def _of_tokens(runner: Runner | Writer, spec: EvaluateSpec, data: DataSpec) -> Shape:
    """As an export has it, or as the spec says.

    Raises:
        StepError: the model has fewer positions.
    """
    length = runner.length or spec.latency.length or data.max_length
    if runner.length is None and runner.positions is not None and length > runner.positions:
        field = "data.max_length" if spec.latency.length is None else "evaluate.latency.length"
        most = runner.positions
        raise StepError(
            f"{field} is {length}, but the model takes at most {most} tokens; write {field}: {most} or less"
        )
    return Shape(runner.batch or spec.latency.batch_size, length)


def _of_audio(runner: Runner | Writer, spec: EvaluateSpec, data: DataSpec) -> Shape:
    """Frames or samples of the longest audio that is allowed; 0 where they follow from the model."""
    return Shape(runner.batch or spec.latency.batch_size, runner.length or 0)


def _score_once(runner: Any, shape: Shape, folder: Path, data: DataSpec) -> None:
    filler = np.ones((shape.batch, shape.length), np.int32)
    runner.caller(filler, filler)()


def _translate_once(runner: Any, shape: Shape, folder: Path, data: DataSpec) -> None:
    filler = np.ones((shape.batch, shape.length), np.int32)
    runner.write({"input_ids": filler, "attention_mask": filler}, _most(runner, data))


def _hear_once(runner: Any, shape: Shape, folder: Path, data: DataSpec) -> None:
    """Silence: frames of as many bands as the features have, or samples."""
    features = json.loads((folder / "preprocessor_config.json").read_bytes())
    bands = int(features["feature_size"])
    if bands > 1:
        filler = np.zeros((shape.batch, bands, shape.length or int(features["nb_max_frames"])), np.float32)
        inputs = {"input_features": filler}
    else:
        filler = np.zeros((shape.batch, shape.length or int(data.max_duration * features["sampling_rate"])), np.float32)
        inputs = {"input_values": filler, "attention_mask": np.ones(filler.shape, np.int32)}
    runner.write(inputs, _most(runner, data))


def _forward(subject: Subject, shape: Shape, repeats: int) -> Timed:
    ids = tokens(subject.rows, shape.batch, shape.length)
    runner = cast(Runner, subject.runner)
    return Timed(FORWARD, [runner.caller(ids, np.ones_like(ids))], (), shape.length)


def _write_examples(subject: Subject, shape: Shape, repeats: int) -> Timed:
    """One call for each batch of examples in turn; the reference says where each is to end at the latest."""
    runner, rows = cast(Writer, subject.runner), subject.rows
    calls, inputs = [], []
    for start in range(0, min(len(rows), repeats * shape.batch), shape.batch):
        chosen = np.arange(start, start + shape.batch) % len(rows)
        given = source(rows, chosen, runner.length)
        longest = int(np.asarray(rows.target_mask)[chosen].sum(1).max())
        limit = subject.limit if runner.at_once else max(1, min(subject.limit, longest))
        calls.append(lambda given=given, limit=limit: runner.write(given, limit))
        inputs.append(_number(given))
    what = (AT_ONCE if runner.at_once else WRITING) + ("" if rows.features is None else FEATURES)
    return Timed(what, calls, [inputs[place % len(inputs)] for place in range(repeats)], runner.length)


def _continue_texts(subject: Subject) -> speed.Written:
    """The spec's number of prompts of the same length; the end of text does not end it, so that all write as much."""
    runner = cast(Runner, subject.runner)
    length, limit = language.room(subject)
    prompts = tokens(subject.rows, subject.spec.generation.repeats, length)
    calls = [lambda count, prompt=prompt: len(runner.generate(prompt, count, None)) for prompt in prompts]
    ids = [_number({"input_ids": prompt}) for prompt in prompts]
    how = ", every one by a pass over the whole text" if runner.rescores else ""
    what = f"{len(prompts)} prompts of {length} tokens one after the other, {limit} tokens after each{how}"
    return speed.time_writing(calls, limit, what, at_once=False, audio=(), ids=ids)


def _write_texts(subject: Subject) -> speed.Written:
    """The first inputs, one after the other."""
    runner, rows = cast(Writer, subject.runner), subject.rows
    count = min(subject.spec.generation.repeats, len(rows))
    given = [source(rows, np.array([row]), runner.length) for row in range(count)]
    calls = [lambda limit, one=one: sum(map(len, runner.write(one, limit))) for one in given]
    audio = [] if rows.seconds is None else _heard(subject, count)
    most = "" if subject.limit == UNLIMITED else f", at most {subject.limit} tokens from each"
    what = f"{count} inputs one after the other{most}"
    ids = [_number(one) for one in given]
    return speed.time_writing(calls, subject.limit, what, at_once=runner.at_once, audio=audio, ids=ids)


def _heard(subject: Subject, count: int) -> list[float]:
    """Seconds of audio of the first inputs, less what an export has no room for."""
    lengths = subject.rows.lengths()[:count]
    shares = np.minimum(1.0, (subject.runner.length or lengths) / lengths)
    return (np.asarray(subject.rows.seconds)[:count] * shares).tolist()


def _most(runner: Writer, data: DataSpec) -> int:
    wanted = data.max_target_length or data.max_length
    return wanted if runner.target_length is None else min(wanted, runner.target_length)


def _number(inputs: Inputs) -> int:
    return crc32(b"".join(np.ascontiguousarray(inputs[name]).tobytes() for name in sorted(inputs)))


WORK: dict[Task, Work] = {
    "text-generation": Work(_of_tokens, _score_once, _forward, _continue_texts),
    "text-classification": Work(_of_tokens, _score_once, _forward, None),
    "translation": Work(_of_tokens, _translate_once, _write_examples, _write_texts),
    "speech-recognition": Work(_of_audio, _hear_once, _write_examples, _write_texts),
}
