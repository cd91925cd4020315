"""The choice between branches: gates first, then the metric."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specs.schema.pipeline import EvaluateSpec
from specs.schema.steps.select import SelectSpec
from tasks.context import Artifact, Evaluation, StepContext, StepError, StepResult
from tasks.evaluate.format import figure
from tasks.evaluate.gates import judge
from tasks.registry import step


@step(SelectSpec)
def select(*candidates: Artifact, spec: SelectSpec, ctx: StepContext) -> StepResult:
    """Take the candidate with the best metric among those that pass every gate on this step.

    A gate that is inconclusive for a candidate counts against it. Of equals the first in ``from`` is taken. The files
    of the chosen artifact are linked into the new one; nothing is changed in them.

    Raises:
        StepError: no candidate passes; each is named with its reason.
    """
    evaluations = ctx.evaluations
    reasons = {name: _objections(name, spec, evaluations, ctx) for name in spec.from_}
    passing = [name for name in spec.from_ if not reasons[name]]
    if not passing:
        listed = "; ".join(f"{name}: {', '.join(found)}" for name, found in reasons.items())
        raise StepError(f"{spec.id}: none of {', '.join(spec.from_)} passes ({listed}); relax a gate or add a branch")

    values = {name: float(evaluations[name].metrics[spec.metric]["value"]) for name in passing}
    sign = 1.0 if spec.minimise else -1.0
    chosen = min(passing, key=lambda name: sign * values[name])
    artifact = candidates[spec.from_.index(chosen)]
    linked = _link(artifact.path, ctx.out)
    others = ", ".join(f"{name} {figure(spec.metric, values[name])}" for name in passing if name != chosen)
    summary = f"chose {chosen} of {', '.join(spec.from_)}: {spec.metric} {figure(spec.metric, values[chosen])}"
    return StepResult(
        kind=artifact.kind,
        touched=tuple(linked),
        summary=f"{summary} ({others})" if others else summary,
        left={name: ", ".join(found) for name, found in reasons.items() if found},
        properties={
            **artifact.properties,
            "chosen": chosen,
            "chosen_key": artifact.key,
            "candidates": {name: _measured(name, evaluations, reasons[name]) for name in spec.from_},
        },
        metrics=artifact.manifest.get("result", {}).get("metrics", {}),
        warnings=tuple(artifact.manifest.get("result", {}).get("warnings", ())),
    )


def _measured(name: str, evaluations: Mapping[str, Evaluation], reasons: list[str]) -> dict[str, Any]:
    """The figures of a candidate, what they were measured with, and why it may not be taken."""
    if name not in evaluations:
        return {"reasons": reasons}
    record = evaluations[name].record
    scenario = record.get("scenario", {})
    kept = ("runtime", "threads", "batch", "length", "warmup", "repeats", "cpu")
    return {
        "reasons": reasons,
        "metrics": {metric: entry["value"] for metric, entry in evaluations[name].metrics.items()},
        "scenario": {key: scenario[key] for key in kept if key in scenario},
    }


def _objections(name: str, spec: SelectSpec, evaluations: Mapping[str, Evaluation], ctx: StepContext) -> list[str]:
    """Why a candidate may not be taken; empty where it may."""
    if name not in evaluations:
        return ["was not evaluated; write evaluate: true"]
    entry = evaluations[name].metrics.get(spec.metric)
    if entry is None or entry["value"] is None:
        return [f"has no {spec.metric}"]
    moved = [gate.model_copy(update={"step": name}) for gate in ctx.gates]
    verdicts = judge(moved, evaluations, (), _sampling(evaluations[name]), ctx.seed)
    return [
        f"{verdict.gate} {'cannot be computed' if verdict.status == 'missing' else verdict.status}"
        + ("" if verdict.value is None else f" at {verdict.shown(verdict.value)}")
        for verdict in verdicts
        if verdict.status != "passed"
    ]


def _sampling(evaluation: Evaluation) -> EvaluateSpec:
    """Resamples and confidence as the measurement had them."""
    used = evaluation.record.get("intervals", {})
    default = EvaluateSpec()
    return EvaluateSpec(
        bootstrap=used.get("resamples", default.bootstrap), confidence=used.get("confidence", default.confidence)
    )


def _link(source: Path, target: Path) -> list[str]:
    """Hard links to every file but the manifest, copies where the file system has none; the names."""
    names = []
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        if not path.is_file() or name == "manifest.json":
            continue
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, place)
        except OSError:
            shutil.copyfile(path, place)
        names.append(name)
    return names
