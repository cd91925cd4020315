"""Adaptive input: precision and width of tokens' vectors by how much they are needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, get_args

from pydantic import Field, model_validator

from specs.schema.base import RUNTIME_BYTES, FieldError, Kind, StepSpec, Task
from specs.schema.steps.finetune import TrainingSpec
from specs.schema.units import Bytes, Ratio, Share

Bits = Literal[16, 8, 6, 5, 4, 3, 2, 1]


class HealSpec(TrainingSpec):
    """A short distillation from the model before the step, on its outputs and on the vectors of the tokens. What is
    rounded is rounded in every pass."""

    only: ClassVar[Mapping[str, tuple[Task, ...]]] = TrainingSpec.only

    learning_rate: float = Field(default=1e-3, gt=0, lt=10, description="the peak learning rate of AdamW")
    weight_decay: float = Field(default=0.0, ge=0, lt=1, description="AdamW's weight decay")
    trains: Literal["input", "model"] = Field(
        default="input", description="what learns: the vectors of the tokens alone, or the rest of the model too"
    )
    alpha: Share = Field(
        default=0.0, description="share of the loss of the data; the rest is what the model before the step says"
    )
    temperature: float = Field(default=1.0, gt=0, le=100, description="the temperature at which outputs are compared")
    noise: Share = Field(
        default=0.1,
        le=0.5,
        description="share of the tokens that are replaced by others of the whole vocabulary, so that those which the "
        "data hardly has are healed, too; there only what the model before the step makes of them counts",
    )
    vectors: float = Field(
        default=0.1, ge=0, le=1000, description="what the squared error of the vectors counts beside the outputs"
    )


class AdaptiveInputSpec(StepSpec):
    """Make the embedding smaller by giving each token the precision that it needs. Tokens fall into bands by their
    information, each band gets a rank and bits for each of its directions, and the allocation that loses least within
    the budget is solved from error curves measured on the table, in which an error counts what it does to the model's
    outputs. A tied output layer uses the same factors. The tokenizer stays as it is. There is no hashing, which loses
    many times as much of a trained table in as many bytes, and no level by token at run time, which takes longer than
    reading the expanded row; both measured in the README."""

    only: ClassVar[Mapping[str, tuple[Task, ...]]] = {"softmax": ("text-generation",)}

    uses: Literal["adaptive_input"]
    budget: Bytes | None = Field(
        default=None,
        gt=0,
        examples=["1.5 MiB"],
        description="bytes that the file may hold of embeddings (and output layer), for example 1.5 MiB",
    )
    ratio: Ratio | None = Field(
        default=None,
        examples=["24x"],
        description="the budget as a share of what float32 takes: how many times smaller, for example 24x",
    )
    method: Literal["banded", "adaptive"] = Field(
        default="banded",
        description="banded: factors in few bits, for a trained model; adaptive: factors in float32 that a later "
        "finetune trains, for one from random weights",
    )
    softmax: Literal["full", "adaptive"] = Field(
        default="full",
        description="with method: adaptive, how the output layer makes probabilities: over all tokens, or by bands "
        "(adaptive), so that a training scores only the bands of the tokens that come next",
    )
    information: Literal["unigram", "contextual"] = Field(
        default="unigram",
        description="how much a token tells: by its frequency in the training data, or by how little the model itself "
        "foresees it (contextual; text-generation)",
    )
    bits: tuple[Bits, ...] | None = Field(
        default=None,
        min_length=1,
        examples=["[8]"],
        description="the bits that a direction may have, of 16, 8, 6, 5, 4, 3, 2 and 1; [8] for a LiteRT file in int8, "
        "where fewer save nothing; default: any of them, and float32 with method: adaptive",
    )
    bands: int = Field(default=5, gt=0, le=16, description="bands of a table, at most; how many and where is chosen")
    head: Literal["joint", "separate", "leave"] = Field(
        default="joint",
        description="an output layer of its own weights: in one budget with the embedding, as many times smaller as "
        "the embedding, or left as it is",
    )
    heal: HealSpec | None = Field(
        default=None,
        examples=["{max_steps: 300}"],
        description="distillation from the model before the step; default: none",
    )
    allow_noop: bool = Field(
        default=False, description="whether the step passes the model on where the budget asks for nothing"
    )

    @property
    def widths(self) -> tuple[int, ...]:
        """The bits that a direction may have."""
        if self.method == "adaptive":
            return (32,)
        return get_args(Bits) if self.bits is None else self.bits

    def gives(self, taken: tuple[Kind, ...]) -> Kind:
        return "model"

    def forbids(self, later: StepSpec) -> str | None:
        if isinstance(later, AdaptiveInputSpec):
            return f"the tokens are in bands already, by {self.id!r}; leave one of the two adaptive_input steps out"
        if later.rebuilds and not self.allow_noop:
            return (
                f"{later.uses} makes the model anew in another shape, and no configuration says the bands that "
                f"{self.id!r} puts the tokens into; put {self.id!r} behind it"
            )
        return None

    def misses(self, behind: Sequence[StepSpec]) -> str | None:
        if self.method != "adaptive" or any(_trains(step) for step in behind):
            return None
        return (
            "no step behind it trains the factors of method: adaptive, which say only roughly what the table said; put "
            "a finetune behind it, or leave method out for a model that is trained"
        )

    def estimate(self, model: int) -> tuple[int, int]:
        # Beside the artifact checkpoints of the healing; in memory the curves' copies of the table.
        trained = 4 * model if self.heal is not None else 0
        return model + trained, 4 * model + trained + 2 * RUNTIME_BYTES

    @model_validator(mode="after")
    def _one_size(self) -> AdaptiveInputSpec:
        if (self.budget is None) == (self.ratio is None):
            what = "says it twice" if self.budget is not None else "is missing"
            raise FieldError("budget", f"the size {what}; write budget: 1.5 MiB or ratio: 24x, one of them")
        if self.bits is not None and len(set(self.bits)) != len(self.bits):
            raise FieldError("bits", "bits names a width twice; write each once, for example [8, 4, 2]")
        for name in ("bits", "heal"):
            if self.method == "adaptive" and getattr(self, name) is not None:
                raise FieldError(
                    name, f"{name} does not go with method: adaptive, whose factors a finetune trains; leave it out"
                )
        if self.softmax == "adaptive":
            if self.method != "adaptive":
                raise FieldError("softmax", "softmax: adaptive is for training; write method: adaptive beside it")
            if self.head == "leave" or self.bands == 1:
                name = "head" if self.head == "leave" else "bands"
                raise FieldError(name, f"softmax: adaptive is about bands of the output layer; leave {name} out")
        return self


def _trains(step: StepSpec) -> bool:
    """Whether a step trains the model that it takes, as its purpose or by the way."""
    return isinstance(step, TrainingSpec) or any(isinstance(value, TrainingSpec) for _, value in step)
