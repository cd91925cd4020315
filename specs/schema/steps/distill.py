"""Distillation: a small student learns from what a teacher says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from specs.schema.base import PREVIOUS, RUNTIME_BYTES, FieldError, Name, SpecModel, StepSpec, Task
from specs.schema.steps.finetune import TrainingSpec
from specs.schema.units import Share

_TEXT: tuple[Task, ...] = ("text-generation", "text-classification", "translation")
_WRITTEN: tuple[Task, ...] = ("text-generation", "translation", "speech-recognition")


class StudentSpec(SpecModel):
    """The shape of a student that is cut out of the teacher; what is left out is as the teacher has it."""

    layers: int | None = Field(
        default=None, gt=0, examples=["2"], description="blocks of each stack, picked evenly from the teacher's"
    )
    decoder_layers: int | None = Field(
        default=None, gt=0, examples=["2"], description="blocks of the decoder; default: layers"
    )
    hidden: int | None = Field(
        default=None, gt=0, examples=["128"], description="width of the vectors between the blocks"
    )
    heads: int | None = Field(
        default=None,
        gt=0,
        examples=["4"],
        description="attention heads; default: as many of the teacher's size as fit the width",
    )
    ffn: int | None = Field(
        default=None,
        gt=0,
        examples=["512"],
        description="width of the feed-forward part; default: cut in the proportion of hidden",
    )
    calibration_samples: int = Field(
        default=128, gt=0, description="training examples that show which channels matter, where widths are cut"
    )

    @model_validator(mode="after")
    def _says_something(self) -> StudentSpec:
        if not any((self.layers, self.decoder_layers, self.hidden, self.heads, self.ffn)):
            raise ValueError("student names no size; write for example {layers: 2, hidden: 128}")
        return self


class HiddenSpec(SpecModel):
    """The loss between hidden states: mean squared error behind every block of the student, against the teacher's
    block at the same share of the depth."""

    weight: float = Field(default=1.0, gt=0, le=1000, description="what the loss counts beside the others")


class RelationsSpec(SpecModel):
    """The loss between attention relations (MiniLMv2): of queries, of keys, and of values among themselves."""

    weight: float = Field(default=1.0, gt=0, le=1000, description="what the loss counts beside the others")
    heads: int | None = Field(
        default=None,
        gt=0,
        examples=["12"],
        description="relation heads, a divisor of all widths involved; default: the largest up to the teacher's heads",
    )
    layer: int | None = Field(
        default=None,
        gt=0,
        examples=["5"],
        description="the teacher's block that is imitated, counted from 1; default: the last",
    )


class AugmentSpec(SpecModel):
    """Copies of the training texts in which words are replaced by near ones; on them only the teacher's word counts."""

    copies: int = Field(default=4, gt=0, le=100, description="changed copies of each training example")
    replace: Share = Field(default=0.4, gt=0, description="share of the tokens that are replaced, for example 40%")
    candidates: int = Field(
        default=15, gt=0, le=1000, description="nearest tokens by the teacher's embedding among which one is drawn"
    )


class OnPolicySpec(SpecModel):
    """Batches in which the student writes and the teacher says what it would have written (GKD)."""

    share: Share = Field(default=0.5, gt=0, description="share of the batches, for example 50%")
    temperature: float = Field(default=1.0, gt=0, le=100, description="the temperature at which the student samples")


class DistillSpec(StepSpec, TrainingSpec):
    """Train a small student to say what a larger teacher says: ``alpha * CE + (1 - alpha) * T² * KL``, on the training
    data and on texts without labels. The student is the model of ``needs``, a new one from ``config``, or is cut out of
    the teacher by ``student``. A killed run continues from its last checkpoint and ends with the same weights."""

    only: ClassVar[Mapping[str, tuple[Task, ...]]] = {
        **TrainingSpec.only,
        "data": _WRITTEN,
        "beams": ("translation", "speech-recognition"),
        "on_policy": _WRITTEN,
        "unlabelled": _TEXT,
        "augment": ("text-classification",),
    }
    names_steps: ClassVar[tuple[str, ...]] = ("needs", "teacher")
    sources: ClassVar[tuple[str, ...]] = ("unlabelled",)

    uses: Literal["distill"]
    teacher: Name = Field(description="the step whose model teaches, or baseline", examples=["teacher"])
    config: dict[str, Any] | None = Field(
        default=None,
        examples=["{model_type: bert}"],
        description="a Hugging Face configuration with its `model_type`: a student with random weights",
    )
    student: StudentSpec | None = Field(
        default=None,
        examples=["{layers: 2}"],
        description="the shape of a student that is cut out of the teacher",
    )
    alpha: Share = Field(default=0.5, description="share of the loss of the data; the rest is the teacher's")
    temperature: float = Field(
        default=2.0, gt=0, le=100, description="both sides' logits are divided by it where they are compared"
    )
    divergence: Literal["forward", "reverse", "skewed"] = Field(
        default="forward",
        description="forward: KL(teacher, student); reverse: KL(student, teacher); skewed: KL(teacher, mixture)",
    )
    skew: Share = Field(
        default=0.1, gt=0, lt=1, description="the teacher's share of the mixture of divergence: skewed (DistiLLM)"
    )
    hidden: HiddenSpec | None = Field(
        default=None,
        examples=["{weight: 1}"],
        description="hidden states are compared too (TinyBERT); default: they are not",
    )
    relations: RelationsSpec | None = Field(
        default=None,
        examples=["{heads: 12}"],
        description="attention relations are compared too (MiniLMv2); default: they are not",
    )
    data: Literal["training", "teacher-generated"] = Field(
        default="training",
        description="teacher-generated: the teacher writes the targets, or continues the beginnings of the texts; not "
        "for models of CTC, which write nothing",
    )
    beams: int = Field(
        default=1,
        gt=0,
        le=64,
        description="beams with which the teacher translates or transcribes (data: teacher-generated)",
    )
    on_policy: OnPolicySpec | None = Field(
        default=None,
        examples=["{share: 50%}"],
        description="a share of the batches is what the student writes itself (not CTC); default: none",
    )
    unlabelled: str | None = Field(
        default=None,
        min_length=1,
        examples=["./more.txt"],
        description="texts without labels, named as data.train is; only the teacher's word counts on them",
    )
    augment: AugmentSpec | None = Field(
        default=None,
        examples=["{copies: 4}"],
        description="changed copies of the training texts (TinyBERT); default: none",
    )
    cache: bool | None = Field(
        default=None,
        examples=["true"],
        description="whether the teacher's outputs are kept on the disk, so that it runs once; default: unless hidden "
        "or relations need it at every step",
    )
    top_k: int = Field(
        default=64,
        gt=0,
        description="classes whose probabilities are kept of each token, the largest; the others are one class",
    )

    def inputs(self) -> tuple[tuple[str, str], ...]:
        taught = ("teacher", self.teacher)
        if self.config is not None or self.student is not None:
            return (taught,)
        return (*((("needs", name) for name in self.needs) if self.needs else (("needs", PREVIOUS),)), taught)

    @property
    def rebuilds(self) -> bool:
        return self.student is not None or self.config is not None

    def shaped_by(self, inputs: tuple[str, ...]) -> tuple[str, ...]:
        if self.config is not None:
            return ()
        return inputs if self.student is not None else inputs[:-1]

    @property
    def cached(self) -> bool:
        """Whether the teacher's outputs are kept on the disk."""
        return self.cache if self.cache is not None else self.hidden is None and self.relations is None

    def estimate(self, model: int) -> tuple[int, int]:
        # As a fine-tuning, with the teacher beside it.
        return 5 * model, 6 * model + 2 * RUNTIME_BYTES

    def stores(self, scored: int) -> int:
        passes = 1 + (self.augment.copies if self.augment else 0)
        return scored * passes * (8 * self.top_k + 4) if self.cached else 0

    @model_validator(mode="after")
    def _one_student(self) -> DistillSpec:
        named = [name for name in ("needs", "config", "student") if getattr(self, name) is not None]
        if len(named) > 1:
            raise FieldError(
                named[1], f"the student is {named[0]} and {named[1]} at once; leave one of them out: it has one origin"
            )
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise FieldError("config", "config names no model type; write for example {model_type: bert}")
        return self

    @model_validator(mode="after")
    def _parts_go_together(self) -> DistillSpec:
        if self.alpha == 1 and self.hidden is None and self.relations is None:
            raise FieldError("alpha", "alpha 1 leaves the teacher nothing to say; write less, or use finetune")
        if self.cache and (self.hidden or self.relations):
            raise FieldError(
                "cache", "hidden and relations need the teacher at every step; leave cache out, or leave them out"
            )
        uneven = next((name for name in ("class_weights", "sampling") if getattr(self, name) == "balanced"), None)
        if uneven is not None and (self.unlabelled is not None or self.augment is not None):
            raise FieldError(uneven, f"texts without labels belong to no class; leave {uneven} out")
        if self.skew != type(self).model_fields["skew"].default and self.divergence != "skewed":
            raise FieldError("skew", "skew does nothing here; write divergence: skewed, or leave it out")
        if self.beams > 1 and self.data == "training" and self.unlabelled is None:
            raise FieldError("beams", "the teacher writes nothing here; write data: teacher-generated, or leave it out")
        return self
