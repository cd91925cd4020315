"""Which function carries out which spec. Dispatch is on the spec's type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import walk_packages
from typing import TYPE_CHECKING, Any

from specs.schema.base import StepSpec, Task
from tasks.context import StepResult

if TYPE_CHECKING:
    from tasks.models.applications import Family

Preflight = Callable[[Any, Mapping[str, Any], Task, int], tuple[list[str], list[str]]]
"""``preflight(spec, config, task, max_length)``: problems that stop a run, and warnings, known before it starts.
``config`` is the configuration of the model that comes in."""

Refusal = Callable[[Any, "Family", Task], str | None]
"""``refuses(spec, family, task)``: why the step cannot take a model of this family for this task, with what to do
instead; None where it can. ``spec`` is None where the kind of step is asked about as such."""

StepFunction = Callable[..., StepResult]
"""``function(*inputs, spec=…, ctx=…)``: the inputs are ``Artifact``s in the order of ``StepSpec.inputs()``."""


@dataclass(frozen=True)
class RegisteredStep:
    """A step function with the libraries whose versions shape its result.

    ``variants`` are specs that it refuses for reasons of their own, by the name of their row in the table of what works
    with what.
    """

    spec: type[StepSpec]
    function: StepFunction
    libraries: tuple[str, ...]
    preflight: Preflight | None = None
    refuses: Refusal | None = None
    variants: Mapping[str, StepSpec] = field(default_factory=dict)


_STEPS: dict[type[StepSpec], RegisteredStep] = {}


def step(
    spec: type[StepSpec],
    libraries: tuple[str, ...] = (),
    preflight: Preflight | None = None,
    refuses: Refusal | None = None,
    variants: Mapping[str, StepSpec] | None = None,
) -> Callable[[StepFunction], StepFunction]:
    """Register the decorated function for ``spec``; the versions of the distributions ``libraries`` join the key."""

    def register(function: StepFunction) -> StepFunction:
        _STEPS[spec] = RegisteredStep(spec, function, libraries, preflight, refuses, variants or {})
        return function

    return register


def find(spec: type[StepSpec]) -> RegisteredStep:
    """The step registered for a spec class.

    Every module under ``tasks`` is imported on the first call, so that a new step needs no entry in any list; modules
    import heavy libraries inside functions, so this costs little.

    Raises:
        LookupError: no function is registered for the class.
    """
    if spec not in _STEPS:
        import tasks

        for module in walk_packages(tasks.__path__, "tasks."):
            if module.name.count(".") >= 2:  # steps live in the subpackages
                import_module(module.name)
    if spec not in _STEPS:
        raise LookupError(
            f"no step function is registered for {spec.__name__}; decorate one with @step({spec.__name__})"
        )
    return _STEPS[spec]
