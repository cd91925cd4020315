"""Pruning: weights that become zero, and parts that go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from specs.schema.base import RUNTIME_BYTES, FieldError, StepSpec
from specs.schema.steps.finetune import TrainingSpec
from specs.schema.units import KeepField, Share

Method = Literal["threshold", "magnitude", "movement", "wanda", "sparsegpt", "width", "depth", "vocabulary"]

Part = Literal["heads", "ffn", "hidden"]

Side = Literal["encoder", "decoder"]

STRUCTURED: tuple[Method, ...] = ("width", "depth")
"""The methods that take whole parts out."""


@dataclass(frozen=True)
class MethodFields:
    """Which of the fields of ``PruneSpec`` mean something to a method; the others are a mistake there.

    Args:
        one_of: groups of fields; exactly one of each group is to be given.
        may: fields that may be given.
    """

    one_of: tuple[tuple[str, ...], ...] = ()
    may: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """Every field of the method."""
        return (*(field for group in self.one_of for field in group), *self.may)


FIELDS: Mapping[Method, MethodFields] = {
    "threshold": MethodFields((("threshold",),), ("recover",)),
    "magnitude": MethodFields((("sparsity", "pattern"),), ("scope", "schedule", "ramp", "mask_steps", "recover")),
    "movement": MethodFields((("sparsity",), ("recover",)), ("scope", "ramp", "mask_steps")),
    "wanda": MethodFields((("sparsity", "pattern"),), ("calibration_examples", "recover")),
    "sparsegpt": MethodFields((("sparsity", "pattern"),), ("calibration_examples", "damping", "block_size", "recover")),
    "width": MethodFields(
        (("keep",),), ("parts", "hidden_by", "multiple_of", "importance", "calibration_examples", "recover")
    ),
    "depth": MethodFields((("keep",),), ("stacks", "importance", "calibration_examples", "recover")),
    "vocabulary": MethodFields((), ("recover",)),
}

_EXAMPLES: Mapping[str, str] = {
    "threshold": "threshold: 0.02",
    "sparsity": "sparsity: 50%",
    "pattern": 'pattern: "2:4"',
    "recover": "recover: {epochs: 1}",
    "keep": "keep: 50%",
}


class PruneSpec(StepSpec):
    """Remove what the model needs least: single weights, which become zero, or whole parts, so that the model is a
    smaller one of the same kind. Zeros (`threshold`, `magnitude`, `movement`, `wanda`, `sparsegpt`) make neither the
    file smaller nor the model faster on ordinary hardware; the report says so. `width` removes attention heads,
    feed-forward channels and hidden numbers, `depth` whole blocks, `vocabulary` the tokens that the training data never
    uses: these make the file smaller and the model faster everywhere. With `recover` the model is trained afterwards;
    zeros stay zero."""

    uses: Literal["prune"]
    method: Method = Field(
        default="magnitude",
        description="threshold: |w| < threshold; magnitude: the smallest weights; movement: those that training moves "
        "towards zero; wanda: the smallest |w| times the norm of their input; sparsegpt: those whose loss the other "
        "weights can make up for, and do; width: heads, channels and hidden numbers go; depth: blocks go; vocabulary: "
        "unused tokens go",
    )
    threshold: float | None = Field(
        default=None,
        gt=0,
        examples=["0.02"],
        description="weights of smaller magnitude become 0 (method threshold)",
    )
    sparsity: Share | None = Field(
        default=None,
        gt=0,
        lt=1,
        examples=["50%"],
        description="share of the weights that become 0 (magnitude, movement, wanda, sparsegpt)",
    )
    pattern: str | None = Field(
        default=None,
        pattern=r"^[1-9][0-9]{0,3}:[1-9][0-9]{0,3}$",
        examples=["2:4"],
        description="instead of sparsity, N:M keeps N of every M neighbouring inputs of an output, for example "
        '"2:4", which some GPUs compute faster; "1:4" is 75% zeros (magnitude, wanda, sparsegpt)',
    )
    scope: Literal["layer", "global"] = Field(
        default="layer",
        description="whether the sparsity holds in every layer or over all of them (magnitude, movement)",
    )
    schedule: Literal["one-shot", "cubic"] = Field(
        default="one-shot",
        description="magnitude: cubic lets the sparsity rise while `recover` trains, quickly at first; movement is "
        "always cubic",
    )
    ramp: Share = Field(
        default=0.7,
        gt=0,
        description="cubic: share of the steps after the warm-up of `recover` in which the sparsity rises; the rest "
        "trains with the final zeros",
    )
    mask_steps: int | None = Field(
        default=None,
        gt=0,
        examples=["10"],
        description="cubic: optimiser steps between new masks; default: a hundredth of the rise",
    )
    keep: KeepField | None = Field(
        default=None,
        examples=["50%", "5M", "8 ms"],
        description="what stays: a share of the heads, channels or blocks, as many as fit into a number of parameters, "
        "or into the time of a forward pass, which is measured here (methods width and depth)",
    )
    parts: tuple[Part, ...] = Field(
        default=(),
        examples=["[heads, ffn]"],
        description="what becomes narrower (method width); default: heads and ffn, or ffn alone where the model's "
        "configuration ties the size of a head to the hidden size (BERT, GPT-2, BART, Whisper, wav2vec2: there heads "
        "go only together with hidden)",
    )
    hidden_by: Literal["channels", "pca"] = Field(
        default="channels",
        description="how the hidden size becomes smaller (method width, parts with hidden): channels keeps the numbers "
        "of most importance; pca turns them first so that the directions of most variance stay (SliceGPT), for models "
        "that normalise before every block (Llama, Mistral, Qwen, GPT-2); a tied head becomes a table of its own",
    )
    stacks: tuple[Side, ...] = Field(
        default=(),
        examples=["[decoder]"],
        description="whose blocks go (method depth); default: every stack, by the same share",
    )
    importance: Literal["activation", "taylor"] = Field(
        default="activation",
        description="what decides what stays (methods width and depth): activation is the size of what flows through "
        "it, or for blocks how much they change it; taylor is the sum of |weight * gradient|",
    )
    multiple_of: int = Field(
        default=8,
        gt=0,
        description="new widths of ffn and hidden are multiples of this where the old ones are (method width)",
    )
    calibration_examples: int = Field(
        default=128, gt=0, description="training examples that decide what goes (wanda, sparsegpt, width, depth)"
    )
    damping: float = Field(
        default=0.01, gt=0, lt=10, description="sparsegpt: share of the mean of the Hessian's diagonal added to it"
    )
    block_size: int | None = Field(
        default=None,
        gt=0,
        examples=["128"],
        description="sparsegpt: inputs whose weights are chosen together before the next ones are updated; default: an "
        "eighth of a layer's inputs, 16 to 128",
    )
    recover: TrainingSpec | None = Field(
        default=None,
        examples=["{epochs: 1}"],
        description="training after pruning, or while the sparsity rises, with the zeros kept; default: none",
    )

    @property
    def gradual(self) -> bool:
        """Whether the zeros come while ``recover`` trains."""
        return self.method == "movement" or self.schedule == "cubic"

    @property
    def rebuilds(self) -> bool:
        return self.method in (*STRUCTURED, "vocabulary")

    def estimate(self, model: int) -> tuple[int, int]:
        trains = self.recover is not None
        return (5 if trains else 1) * model, (5 if trains else 2) * model + RUNTIME_BYTES

    @model_validator(mode="after")
    def _fields_of_the_method(self) -> PruneSpec:
        fields = FIELDS[self.method]
        # A spec that went through JSON has every field, so that what is given is what differs from the default.
        known = dict.fromkeys(name for method in FIELDS.values() for name in method.all)
        given = [name for name in known if getattr(self, name) != PruneSpec.model_fields[name].default]
        for name in given:
            if name not in fields.all:
                able = [method for method, its in FIELDS.items() if name in its.all]
                raise FieldError(
                    name, f"method {self.method} takes no `{name}`; leave it out, or write method: {' or '.join(able)}"
                )
        for group in fields.one_of:
            found = [name for name in group if name in given]
            if len(found) > 1:
                raise FieldError(found[-1], f"`{found[0]}` says how much becomes 0 already; leave one of the two out")
            if not found:
                names = " or ".join(f"`{name}`" for name in group)
                raise FieldError(
                    "method", f"method {self.method} needs {names}; write for example {_EXAMPLES[group[0]]}"
                )
        for name in ("parts", "stacks"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise FieldError(name, f"{name} names the same twice; write each once")
        return self

    @model_validator(mode="after")
    def _fields_go_together(self) -> PruneSpec:
        if self.pattern is not None:
            kept, of = kept_of(self.pattern)
            if kept >= of:
                raise FieldError(
                    "pattern", f"{self.pattern!r} keeps every weight; write for example {of // 2 or 1}:{of}"
                )
            for name, value in (("scope", "layer"), ("schedule", "one-shot")):
                if getattr(self, name) != value:
                    raise FieldError(name, f"a pattern holds in every layer and from the start; write {name}: {value}")
        if self.hidden_by == "pca" and "hidden" not in self.parts:
            raise FieldError("hidden_by", "pca is about the hidden size; write for example parts: [heads, ffn, hidden]")
        if self.schedule == "cubic" and self.recover is None:
            raise FieldError("schedule", "cubic rises during `recover`; write for example recover: {epochs: 1}")
        if not self.gradual:
            for name in ("ramp", "mask_steps"):
                if getattr(self, name) != PruneSpec.model_fields[name].default:
                    raise FieldError(name, f"`{name}` is for a sparsity that rises; write schedule: cubic")
        makes_zeros = self.method not in (*STRUCTURED, "vocabulary")
        if makes_zeros and self.recover is not None and not self.recover.keep_zeros:
            raise FieldError("recover.keep_zeros", "the zeros of this step are kept in any case; leave keep_zeros out")
        return self


def kept_of(pattern: str) -> tuple[int, int]:
    """``(N, M)`` of ``N:M``: of every M weights of an output that stand beside each other, N are kept and M - N are 0.

    As NVIDIA and Zhou et al. (2102.04010) write it; SparseGPT's own code counts the zeros instead, which is the same
    for 2:4.
    """
    kept, _, of = pattern.partition(":")
    return int(kept), int(of)
