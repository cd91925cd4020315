"""What every part of a spec shares: frozen models that forbid unknown keys, and the base of all steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from specs.schema.units import Duration

Kind = Literal["model", "swapped", "packed", "export", "report", "data"]
"""What an artifact is. ``swapped`` is a torch model whose attention no standard configuration can say: it runs and can
be trained, but it can neither be exported nor lose parts. ``packed`` is one whose weights are packed integers: it runs,
but it can be neither trained nor exported."""

Task = Literal["text-generation", "text-classification", "translation", "speech-recognition"]

TASKS: tuple[Task, ...] = get_args(Task)

NAME_PATTERN = r"^[A-Za-z][A-Za-z0-9_.-]{0,62}$"

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
"""Letters, digits, ``_``, ``.`` and ``-``; it becomes a folder, a run name and an address."""

RUNTIME_BYTES = 500_000_000
"""What a process with torch and transformers takes before it loads a model."""

BASELINE = "baseline"
"""The id of the model as it came in; a step may need it, none may take it."""

PREVIOUS = ""
"""Stands in ``StepSpec.inputs`` for the step before; no step has this id."""


MEASURABLE: Mapping[Kind, frozenset[str]] = {
    "packed": frozenset(("any", "model", "derived")),
    "export": frozenset(("any", "derived")),
}
"""Which metrics an artifact has, as values of ``Metric.of``, where it is no plain model."""


class FieldError(ValueError):
    """What a validator of a whole model raises where one field is to blame; the mistake is shown at that field.

    Args:
        field: the key, as a spec writes it; dotted where it lies deeper.
        message: what is wrong, and behind the first ``; `` the remedy.
    """

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)


class SpecModel(BaseModel):
    """Immutable; an unknown key is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)

    only: ClassVar[Mapping[str, tuple[Task, ...]]] = {}
    """The fields that mean something to some tasks alone, by their keys; for another task they are a mistake."""


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Needs = Annotated[
    tuple[str, ...],
    BeforeValidator(_as_tuple),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
"""One id or a list of ids."""


class StepSpec(SpecModel):
    """The base of every step's spec.

    A subclass narrows ``uses`` to a ``Literal`` with its own name and says in class variables what it takes and gives.
    """

    takes: ClassVar[tuple[Kind, ...]] = ("model",)
    makes: ClassVar[tuple[Kind, ...]] = ("model",)
    """Every kind that ``gives`` can answer with, for the documentation."""
    tasks: ClassVar[tuple[Task, ...]] = TASKS
    heavy: ClassVar[bool] = True
    """Whether the step computes with torch."""
    judges: ClassVar[bool] = False
    """Whether the step is given the evaluations of its inputs and the gates on itself."""
    names_steps: ClassVar[tuple[str, ...]] = ("needs",)
    """The keys whose values are ids of steps."""
    sources: ClassVar[tuple[str, ...]] = ()
    """The fields that name data as ``data.train`` does: relative to the spec, and known by its content."""

    uses: str = Field(description="the kind of the step")
    id: Name = Field(description="the name of the step, unique in the spec", examples=["student"])
    needs: Needs | None = Field(
        default=None,
        examples=["student"],
        description="the step whose artifact this one takes; default: the step before it",
    )
    retries: int = Field(default=0, ge=0, le=10, description="how often a failed step is tried again")
    retry_delay: Duration = Field(default=5.0, description="the wait before a further try, for example 30 s")
    timeout: Duration | None = Field(
        default=None,
        gt=0,
        examples=["2 h"],
        description="the step or its measurement fails after this time, for example 2 h; default: no limit",
    )
    evaluate: bool = Field(default=True, description="whether quality, speed and size are measured after the step")

    def inputs(self) -> tuple[tuple[str, str], ...] | None:
        """``(field, id)`` of every artifact the step takes, in order, ``PREVIOUS`` for the step before it; None where
        it takes that alone."""
        return None if self.needs is None else tuple(("needs", name) for name in self.needs)

    def gives(self, taken: tuple[Kind, ...]) -> Kind:
        """The kind of the artifact that the step makes from inputs of the kinds ``taken``.

        Raises:
            ValueError: the kinds do not go together.
        """
        return "model"

    def measurable(self, kind: Kind, taken: tuple[frozenset[str], ...]) -> frozenset[str]:
        """Which metrics the step's artifact, of ``kind``, has, as values of ``Metric.of``; ``taken`` says the same of
        the inputs."""
        return MEASURABLE.get(kind, frozenset(("any", "model")))

    @property
    def rebuilds(self) -> bool:
        """Whether the step makes a model anew from its configuration in another shape, so that nothing is left of what
        no configuration says."""
        return False

    def shaped_by(self, inputs: tuple[str, ...]) -> tuple[str, ...]:
        """Those of ``inputs`` whose structure the step's artifact has."""
        return inputs

    def forbids(self, later: StepSpec) -> str | None:
        """Why the structure that the step gives a model rules ``later`` out behind it, with the remedy behind the first
        ``; ``; None where it does not."""
        return None

    def misses(self, behind: Sequence[StepSpec]) -> str | None:
        """What the plan warns of where no step of those ``behind`` this one, which go on with its model, does what it
        relies on, with the remedy; None where nothing is missing."""
        return None

    def estimate(self, model: int) -> tuple[int, int]:
        """Bytes that the step writes and bytes of memory that it needs, roughly, for a model of ``model`` bytes."""
        return model, 2 * model + RUNTIME_BYTES

    def stores(self, scored: int) -> int:
        """Bytes that the step writes beside its artifact for training data with so many tokens, examples or frames to
        score, roughly."""
        return 0
