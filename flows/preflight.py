"""What can be known before a run starts: data readable, model loadable, exports possible, packages present."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from flows.places import Problem, named_in, path_of_step
from flows.plan import missing_packages
from specs.schema.base import StepSpec
from specs.schema.graph import Node
from specs.schema.load import KeyPath
from specs.schema.pipeline import PipelineSpec, parallel_files
from tasks import forkserver, supervise
from tasks.context import StepError
from tasks.evaluate.format import count, duration, size
from tasks.look import Remark
from tasks.models import ModelSummary
from tasks.registry import find

if TYPE_CHECKING:
    from tasks.data import DataSummary

_BYTES_OF_A_TOKEN = 3
_FRAMES_OF_A_SECOND = 50


@dataclass
class Findings:
    """What preflight saw. ``problems`` stop a run, ``warnings`` do not; ``model_bytes`` and ``scored``, about how many
    tokens, examples or frames of the training data are scored, feed the estimates."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    model_bytes: int = 0
    scored: int = 0


def inspect(spec: PipelineSpec, nodes: Sequence[Node], device: str, threads: int, log: Path) -> Findings:
    """Look at everything the spec names without loading a weight or starting a step; what torch prints meanwhile goes
    to ``log``.

    Raises:
        ChildFailed: the look at the model broke.
    """
    findings = Findings()
    for node in nodes:
        missing = missing_packages(find(type(node.spec)).libraries)
        if missing:
            text = f"{node.id}: {', '.join(missing)} is not installed; install the project again"
            findings.problems.append(Problem(text, path_of_step(spec.steps, node.spec)))
        text = node.spec.misses(_behind(node, nodes))
        if text is not None:
            findings.warnings.append(f"{node.id}: {text}")
    _data(spec, findings)
    _sources(spec, nodes, findings)
    _model(spec, nodes, device, threads, log, findings)
    return findings


def _data(spec: PipelineSpec, findings: Findings) -> None:
    from tasks.data import preflight

    try:
        for split, seen in preflight(spec.data, spec.task).items():
            labels = f", labels {', '.join(f'{k}: {v}' for k, v in seen.labels.items())}" if seen.labels else ""
            heard = f", {duration(seen.seconds)} of audio" if seen.seconds else ""
            skipped = f", {sum(seen.skipped.values())} skipped" if seen.skipped else ""
            more = "" if seen.complete else "the first "
            text = f"{more}{seen.records} records, {size(seen.bytes)}{heard}{labels}{skipped}"
            findings.facts.append((f"data.{split}", text))
            findings.warnings += seen.warnings
            if split == "train":
                findings.scored = _scored(spec, seen)
    except StepError as error:
        findings.problems.append(Problem(str(error), _field_of_data(spec, str(error))))


def _scored(spec: PipelineSpec, seen: DataSummary) -> int:
    """About how many tokens, examples or frames of the training data a loss looks at, rather too many than too few."""
    longest = seen.records * (spec.data.max_target_length or spec.data.max_length)
    return {
        "text-generation": seen.bytes // _BYTES_OF_A_TOKEN,
        "text-classification": seen.records,
        "translation": min(longest, seen.bytes // _BYTES_OF_A_TOKEN),
        "speech-recognition": max(longest, int(seen.seconds * _FRAMES_OF_A_SECOND)),
    }[spec.task]


def _sources(spec: PipelineSpec, nodes: Sequence[Node], findings: Findings) -> None:
    """Whether the data that steps name themselves is there and can be read."""
    from tasks.data.readers import records

    for node in nodes:
        for name in node.spec.sources:
            source = getattr(node.spec, name)
            if source is None:
                continue
            try:
                next(records(spec.data.model_copy(update={"train": source}), "train", "text-generation"), None)
            except StepError as error:
                text = f"{node.id}: {name}: {str(error).removeprefix('data.train: ')}"
                findings.problems.append(Problem(text, path_of_step(spec.steps, node.spec, name)))


def _field_of_data(spec: PipelineSpec, text: str) -> KeyPath:
    """The field that is named in front, else the split whose source is."""
    if path := named_in(text):
        return path
    for split in ("train", "eval"):
        source = getattr(spec.data, split)
        if any(name in text or fnmatch(text, f"{name}*") for name in parallel_files(source) or (source,)):
            return ("data", split)
    return ("data",)


def _model(spec: PipelineSpec, nodes: Sequence[Node], device: str, threads: int, log: Path, findings: Findings) -> None:
    steps = {node.id: node.spec for node in nodes}
    job = {
        "do": "look",
        "run_id": "plan",
        "model": spec.model.model_dump(mode="json"),
        "task": spec.task,
        "data": spec.data.model_dump(mode="json"),
        "steps": [step.model_dump(mode="json", by_alias=True) for step in steps.values()],
    }
    try:
        seen = supervise.run_child(
            job,
            threads=threads,
            patient=False,
            loaded=forkserver.available(device),
            log=log,
            on_event=lambda event: None,
        )
    except supervise.ChildFailed as error:
        if error.retriable:  # it did not refuse the model, it broke
            raise
        findings.problems.append(Problem(str(error), _field_of_model(spec, str(error))))
        return
    model = ModelSummary(**seen["model"])
    findings.model_bytes = model.bytes
    findings.facts.append(
        ("model", f"{model.architecture}, {count(model.parameters)} parameters, {size(model.bytes)}; {model.tokenizer}")
    )
    reshaped = _reshaped(nodes)
    for remark in (Remark(**remark) for remark in seen["remarks"]):
        step = steps[remark.step]
        sure = [*remark.problems, *(() if remark.step in reshaped else remark.sized)]
        findings.problems += [Problem(f"{step.id}: {text}", path_of_step(spec.steps, step, text)) for text in sure]
        findings.warnings += [f"{step.id}: {warning}" for warning in remark.warnings]
        if remark.step in reshaped:
            findings.warnings += [
                f"{step.id}: {text} (so it is for the model as it came in; a step before makes another of it)"
                for text in remark.sized
            ]


def _behind(node: Node, nodes: Sequence[Node]) -> list[StepSpec]:
    """The steps that go on with the model of ``node``."""
    made, found = {node.id}, []
    for other in nodes:
        if made.intersection(other.spec.shaped_by(other.inputs)):
            made.add(other.id)
            found.append(other.spec)
    return found


def _reshaped(nodes: Sequence[Node]) -> set[str]:
    """The steps that may take a model of another shape than the one that came in."""
    made: set[str] = set()
    takes: set[str] = set()
    for node in nodes:
        shaped = node.spec.shaped_by(node.inputs)
        if made.intersection(node.inputs):
            takes.add(node.id)
        if node.spec.rebuilds or made.intersection(shaped):
            made.add(node.id)
    return takes


def _field_of_model(spec: PipelineSpec, text: str) -> KeyPath:
    """The field that is named in front, else where the model comes from."""
    if path := named_in(text):
        return path
    if spec.model.tokenizer and spec.model.tokenizer in text:
        return ("model", "tokenizer")
    return ("model", "source" if spec.model.source else "config")
