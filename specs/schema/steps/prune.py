"""Pruning: weights that become zero, and parts of the model that go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from specs.schema.base import RUNTIME_BYTES, FieldError, StepSpec
from specs.schema.steps.finetune import TrainingSpec
from specs.schema.units import KeepField, Share

Method = Literal["threshold", "magnitude", "width", "depth", "vocabulary"]

Part = Literal["heads", "ffn", "hidden"]

Side = Literal["encoder", "decoder"]


class PruneSpec(StepSpec):
    """Remove what the model needs least: single weights, which become zero, or whole parts, so that the model is a
    smaller one of the same kind. Zeros (`threshold`, `magnitude`) make neither the file smaller nor the model faster on
    ordinary hardware; the report says so. `width` removes attention heads, feed-forward channels and hidden numbers,
    `depth` whole blocks, `vocabulary` the tokens that the training data never uses: these make the file smaller and the
    model faster everywhere. With `recover` the model is trained afterwards; zeros stay zero."""

    uses: Literal["prune"]
    method: Method = Field(
        default="magnitude",
        description="threshold: |w| < threshold becomes 0; magnitude: the smallest weights become 0; width: heads, "
        "channels and hidden numbers go; depth: blocks go; vocabulary: unused tokens go",
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
        description="share of the weights that become 0 (method magnitude)",
    )
    scope: Literal["layer", "global"] = Field(
        default="layer",
        description="whether the sparsity holds in every layer or over all of them (method magnitude)",
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
        default=128, gt=0, description="training examples that the importance is measured on"
    )
    recover: TrainingSpec | None = Field(
        default=None,
        examples=["{epochs: 1}"],
        description="training after pruning, with the zeros kept; default: none",
    )

    def estimate(self, model: int) -> tuple[int, int]:
        trains = self.recover is not None
        return (5 if trains else 1) * model, (5 if trains else 2) * model + RUNTIME_BYTES

    @model_validator(mode="after")
    def _fields_belong_to_the_method(self) -> PruneSpec:
        needed, possible = FIELDS[self.method]
        for name in OWN:
            given = getattr(self, name) != type(self).model_fields[name].default
            if given and name not in (*needed, *possible):
                owners = [method for method, (must, may) in FIELDS.items() if name in (*must, *may)]
                raise FieldError(
                    name,
                    f"{name} does not go with method {self.method}; it is for {' and '.join(owners)}: leave it out",
                )
            if not given and name in needed:
                raise FieldError(name, f"method {self.method} needs {name}; write for example {name}: {needed[name]}")
        for name in ("parts", "stacks"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise FieldError(name, f"{name} names the same twice; write each once")
        return self


_CALIBRATED = ("importance", "calibration_examples")

FIELDS: Mapping[Method, tuple[Mapping[str, str], tuple[str, ...]]] = {
    "threshold": ({"threshold": "0.02"}, ()),
    "magnitude": ({"sparsity": "50%"}, ("scope",)),
    "width": ({"keep": "50%"}, ("parts", "multiple_of", *_CALIBRATED)),
    "depth": ({"keep": "50%"}, ("stacks", *_CALIBRATED)),
    "vocabulary": ({}, ()),
}
"""The fields that a method needs, each with an example, and those that it may have; ``recover`` goes with all."""

OWN = tuple(dict.fromkeys(name for needed, possible in FIELDS.values() for name in (*needed, *possible)))
