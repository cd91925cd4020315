"""The whole spec: model, data, steps, gates, tracking, schedule, resources."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args
from zoneinfo import available_timezones

from pydantic import Field, field_validator, model_validator

import specs.schema.steps  # noqa: F401  (importing it makes every step known)
from specs.schema.base import FieldError, Name, SpecModel, StepSpec, Task
from specs.schema.gates import GateSpec
from specs.schema.metrics import WRITES
from specs.schema.suggest import nearest
from specs.schema.units import Bytes, Duration

MAX_ENTRIES = 200
"""A spec is written by a person: it has at most so many steps, and so many gates."""

MAX_THREADS = 1024

LITERAL_SOURCES = ("hub:", "builtin:")
"""Data that is no path begins with one of these."""

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+-]+:")
"""Looks like one of them, well written or not."""

_PARALLEL = re.compile(r"(.*)\{([^{},]*),([^{},]*)\}([^{}]*)", re.DOTALL)


def parallel_files(source: str) -> tuple[str, str] | None:
    """The two files that ``./train.{en,de}`` names, the source's first; None where there are no such braces."""
    found = _PARALLEL.fullmatch(source)
    return None if found is None else (f"{found[1]}{found[2]}{found[4]}", f"{found[1]}{found[3]}{found[4]}")


class ModelSpec(SpecModel):
    """Where the model comes from: a folder or hub id (`source`), or a configuration with random weights (`config`)."""

    source: str | None = Field(
        default=None,
        min_length=1,
        examples=["./models/minilm"],
        description="a local folder (`./models/minilm`) or a hub id (`org/name`)",
    )
    revision: str | None = Field(
        default=None,
        min_length=1,
        examples=["main"],
        description="the hub revision; default: the newest, whose commit is then recorded",
    )
    config: dict[str, Any] | None = Field(
        default=None,
        examples=["{model_type: llama}"],
        description="a Hugging Face configuration with its `model_type`, for a model with random weights",
    )
    tokenizer: str | None = Field(
        default=None,
        min_length=1,
        examples=["./models/minilm"],
        description="folder or hub id of the tokenizer; default: the model's own, or one trained on the training data",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSpec:
        if (self.source is None) == (self.config is None):
            raise ValueError(
                "model takes exactly one of `source` and `config`; write for example source: ./models/minilm"
            )
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs `model_type`, for example model_type: llama")
        if self.revision is not None and self.source is None:
            raise ValueError("`revision` belongs to a hub id in `source`")
        return self


class FieldsSpec(SpecModel):
    """The names of the data's columns."""

    text: str = Field(
        default="text",
        min_length=1,
        description="the column with the text; for speech-recognition the one with the transcript",
    )
    label: str | Annotated[tuple[str, ...], Field(min_length=2)] = Field(
        default="label",
        description="the column with the label (text-classification); or a list of columns, one for each of several "
        "labels, 1 where an example has it, else 0",
    )
    source: str = Field(
        default="source", min_length=1, description="the column with the text to translate (translation)"
    )
    target: str = Field(default="target", min_length=1, description="the column with its translation (translation)")
    audio: str = Field(
        default="audio",
        min_length=1,
        description="the column with the path of the audio file, relative to the data file (speech-recognition)",
    )


class FilterSpec(SpecModel):
    """Which training records are left out; what was left out is counted. The evaluation data is never filtered."""

    only: ClassVar[Mapping[str, tuple[Task, ...]]] = {
        "max_ratio": ("translation",),
        "max_duration": ("speech-recognition",),
    }

    min_tokens: int | None = Field(default=None, gt=0, examples=["3"], description="leave out inputs of fewer tokens")
    max_tokens: int | None = Field(
        default=None, gt=0, examples=["512"], description="leave out inputs of more tokens, instead of cutting"
    )
    max_ratio: float | None = Field(
        default=None,
        gt=1,
        examples=["3"],
        description="leave out pairs whose longer side has more tokens than this many times the other",
    )
    max_duration: Duration | None = Field(
        default=None, gt=0, examples=["20 s"], description="leave out longer audio, for example 20 s"
    )

    @model_validator(mode="after")
    def _leaves_something(self) -> FilterSpec:
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            text = f"min_tokens {self.min_tokens} and max_tokens {self.max_tokens} leave out every record"
            raise FieldError("min_tokens", f"{text}; write at most {self.max_tokens}")
        return self


class DataSpec(SpecModel):
    """What the model is trained and measured on. The evaluation split is used for evaluation alone."""

    only: ClassVar[Mapping[str, tuple[Task, ...]]] = {
        "max_target_length": ("translation",),
        "max_duration": ("speech-recognition",),
        "windows": ("text-classification",),
    }

    train: str = Field(
        min_length=1,
        description="jsonl, csv, tsv, parquet or text (a path or glob), two parallel files (`./train.{en,de}`), "
        "`hub:org/name[:split]`, or `builtin:name`",
        examples=["./train.jsonl"],
    )
    eval: str = Field(min_length=1, description="evaluation data, named in the same ways", examples=["./dev.jsonl"])
    fields: FieldsSpec = Field(
        default=FieldsSpec(), examples=["{text: sentence}"], description="the names of the columns"
    )
    max_length: int = Field(
        default=128,
        gt=0,
        le=1_000_000,
        description="tokens of an example; longer texts are cut, or split for text-generation; of a transcript for "
        "speech-recognition",
    )
    max_target_length: int | None = Field(
        default=None,
        gt=0,
        le=1_000_000,
        examples=["128"],
        description="tokens of a translation; default: max_length",
    )
    max_duration: Duration = Field(
        default=30.0, gt=0, le=3600, description="audio that is longer is a bad row, for example 30 s"
    )
    windows: int | None = Field(
        default=None,
        ge=0,
        examples=["16"],
        description="text-classification: split longer texts into windows that share so many tokens, and average the "
        "windows' probabilities; default: cut",
    )
    on_bad_row: Literal["stop", "skip"] = Field(
        default="stop", description="whether a record that cannot be used stops the run, or is skipped and counted"
    )
    filter: FilterSpec = Field(
        default=FilterSpec(), examples=["{max_tokens: 512}"], description="which training records are left out"
    )

    @field_validator("train", "eval")
    @classmethod
    def _source_is_known(cls, value: str) -> str:
        scheme = SCHEME.match(value)
        if scheme and not value.startswith(LITERAL_SOURCES):
            near = nearest(scheme[0], LITERAL_SOURCES)
            raise ValueError(f"{scheme[0]!r} is no source of data; {near}, or write ./ before a path")
        return value

    train_limit: int | None = Field(
        default=None, gt=0, examples=["1000"], description="use at most so many training records; default: all"
    )
    eval_limit: int | None = Field(
        default=None, gt=0, examples=["1000"], description="use at most so many evaluation records; default: all"
    )

    @model_validator(mode="after")
    def _windows_move_on(self) -> DataSpec:
        if self.windows is not None and self.windows >= self.max_length:
            text = f"windows of {self.max_length} tokens cannot share {self.windows}"
            raise FieldError("windows", f"{text}; write less than max_length, for example {self.max_length // 4}")
        return self


class LatencySpec(SpecModel):
    """The scenario in which latency and throughput are measured."""

    batch_size: int = Field(default=1, gt=0, description="examples in one call (exports use their own fixed batch)")
    length: int | None = Field(
        default=None,
        gt=0,
        le=1_000_000,
        examples=["128"],
        description="tokens of each example; default: data.max_length (exports use their own)",
    )
    warmup: int = Field(default=5, ge=0, description="calls before the clock starts")
    repeats: int = Field(default=50, ge=3, description="calls that are timed")
    threads: int | None = Field(
        default=None, gt=0, le=MAX_THREADS, examples=["4"], description="CPU threads; default: all cores"
    )


class GenerationSpec(SpecModel):
    """How text is written when quality and speed are measured: greedily, one input after the other for the speed."""

    only: ClassVar[Mapping[str, tuple[Task, ...]]] = {
        "prompt": ("text-generation",),
        "new_tokens": WRITES,
        "repeats": WRITES,
    }

    prompt: int = Field(default=32, gt=0, description="tokens of the prompt when speed is measured (text-generation)")
    new_tokens: int | None = Field(
        default=None,
        gt=0,
        examples=["64"],
        description="tokens to write at most; default: 32 for text-generation, else max_target_length",
    )
    repeats: int = Field(default=10, ge=3, description="inputs for which the speed is measured")


class EvaluateSpec(SpecModel):
    """How every artifact is measured."""

    only: ClassVar[Mapping[str, tuple[Task, ...]]] = {"normalise": ("speech-recognition",)}

    batch_size: int = Field(default=16, gt=0, description="examples in one forward pass when quality is measured")
    latency: LatencySpec = Field(
        default=LatencySpec(), examples=["{threads: 4}"], description="the scenario in which latency is measured"
    )
    generation: GenerationSpec = Field(
        default=GenerationSpec(), examples=["{new_tokens: 64}"], description="how text is written"
    )
    normalise: Literal["none", "basic"] = Field(
        default="basic",
        description="speech-recognition: text before it is compared; basic: lower case, no punctuation, single spaces",
    )
    bootstrap: int = Field(default=1000, ge=100, le=100_000, description="resamples behind every interval")
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="the coverage of every interval")
    parity_examples: int = Field(
        default=16, gt=0, description="evaluation examples on which an export is compared with its torch model"
    )


class TrackingSpec(SpecModel):
    """Where the run is recorded in MLflow."""

    experiment: str | None = Field(
        default=None, min_length=1, examples=["sentiment"], description="the experiment; default: the spec's name"
    )
    register_: Name | None = Field(
        default=None,
        alias="register",
        examples=["sentiment-minilm"],
        description="register the result of a passing run under this name, alias champion",
    )
    register_step: str | None = Field(
        default=None,
        examples=["student"],
        description="the step whose artifact is registered; default: the last final step",
    )


class ScheduleSpec(SpecModel):
    """When `lathe deploy` runs the spec again."""

    cron: str | None = Field(default=None, examples=['"0 3 * * 1"'], description="a cron line, for example 0 3 * * 1")
    interval: Duration | None = Field(
        default=None, ge=1, examples=["6 h"], description="the time between runs, for example 6 h"
    )
    timezone: str = Field(default="UTC", description="the zone in which cron is read, for example Europe/Berlin")

    @field_validator("cron")
    @classmethod
    def _cron_is_valid(cls, value: str | None) -> str | None:
        if value is not None:
            from croniter import CroniterBadDateError, croniter

            if len(value.split()) != 5 or not croniter.is_valid(value):
                raise ValueError(f'{value!r} is not a cron line of five fields; write for example "0 3 * * 1"')
            try:
                croniter(value).get_next()
            except CroniterBadDateError:
                raise ValueError(f'{value!r} is a date that never comes; write for example "0 3 * * 1"') from None
        return value

    @field_validator("timezone")
    @classmethod
    def _zone_exists(cls, value: str) -> str:
        if value not in available_timezones():
            raise ValueError(f"time zone {value!r} is unknown; {nearest(value, sorted(available_timezones()))}")
        return value

    @model_validator(mode="after")
    def _one_rhythm(self) -> ScheduleSpec:
        if (self.cron is None) == (self.interval is None):
            raise ValueError('schedule takes exactly one of `cron` and `interval`; write for example cron: "0 3 * * 1"')
        return self


class ResourcesSpec(SpecModel):
    """What the run may use."""

    parallel: int = Field(default=1, gt=0, le=64, description="how many branches run side by side")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where torch runs; auto is the GPU where there is one"
    )
    threads: int | None = Field(
        default=None, gt=0, le=MAX_THREADS, examples=["4"], description="CPU threads of one step; default: all cores"
    )
    disk: Bytes | None = Field(
        default=None,
        gt=0,
        examples=["20 GiB"],
        description="the plan refuses a run estimated to write more, for example 20 GiB; default: the free space",
    )


KINDS: dict[str, type[StepSpec]] = {
    get_args(kind.model_fields["uses"].annotation)[0]: kind for kind in StepSpec.__subclasses__()
}
"""Every kind of step that a spec may use, by its name."""

if TYPE_CHECKING:
    AnyStep = StepSpec
else:
    AnyStep = Annotated[reduce(or_, KINDS.values()), Field(discriminator="uses")]


class PipelineSpec(SpecModel):
    """One spec: a model, its data, the steps that optimise it, and the gates that the result must pass."""

    name: Name = Field(description="the name of the pipeline", examples=["sentiment"])
    description: str = Field(default="", examples=["sentiment of film reviews"], description="what the pipeline is for")
    task: Task = Field(description="what the model does")
    model: ModelSpec = Field(description="the model as it comes in", examples=["{source: ./models/minilm}"])
    data: DataSpec = Field(
        description="training and evaluation data", examples=["{train: ./train.jsonl, eval: ./dev.jsonl}"]
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="every random choice follows from it")
    steps: tuple[AnyStep, ...] = Field(
        min_length=1,
        max_length=MAX_ENTRIES,
        examples=["[{id: student, uses: finetune}]"],
        description="the steps; each takes the artifact of the one before it unless it says `needs`",
    )
    gates: tuple[GateSpec, ...] = Field(
        default=(),
        max_length=MAX_ENTRIES,
        examples=["[{metric: accuracy, at_least: 85%}]"],
        description="limits on metrics; the run fails when one does not hold",
    )
    evaluate: EvaluateSpec = Field(
        default=EvaluateSpec(), examples=["{batch_size: 32}"], description="how every artifact is measured"
    )
    tracking: TrackingSpec = Field(
        default=TrackingSpec(), examples=["{experiment: sentiment}"], description="where the run is recorded"
    )
    schedule: ScheduleSpec | None = Field(
        default=None,
        examples=['{cron: "0 3 * * 1"}'],
        description="when `lathe deploy` runs the spec again; default: never",
    )
    resources: ResourcesSpec = Field(
        default=ResourcesSpec(), examples=["{parallel: 2}"], description="what the run may use"
    )
