"""The evaluation of one artifact: speed, memory, quality, size, and for an export parity, on the very files that ship.

It runs in a process of its own that has done nothing but load torch. For an export it has not even done that.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from specs.schema.base import Task
from specs.schema.metrics import METRICS
from specs.schema.pipeline import DataSpec, EvaluateSpec
from tasks import memory
from tasks.conditions import DERIVED
from tasks.context import Artifact, StepError
from tasks.data.encode import encode
from tasks.data.tokens import open_tokenizer
from tasks.evaluate import footprint, outputs, parity, quality, scores, speed
from tasks.evaluate.runners import on_threads, open_runner
from tasks.evaluate.subject import Scored, Subject
from tasks.evaluate.workload import WORK, Shape, Timed
from tasks.export.runtime import runtime_of
from tasks.keys import processor
from tasks.quiet import undisturbed

VERSION = 1
FILE = "evaluation.json"

Emit = Callable[[Mapping[str, Any]], None]


def evaluate(
    artifact: Artifact,
    *,
    task: Task,
    data: DataSpec,
    spec: EvaluateSpec,
    store: Path,
    out: Path,
    threads: int,
    device: str,
    seed: int,
    tokenizer: Path,
    reference: Path | None,
    exclusive: Callable[[], AbstractContextManager[None]],
    emit: Emit,
) -> None:
    """Measure an artifact and write ``evaluation.json``, ``scores.safetensors``, ``outputs.json`` and, for a torch
    model, ``reference.safetensors`` into ``out``.

    Args:
        artifact: a ``model``, ``packed`` or ``export``.
        task: what the language model does.
        data: the evaluation split is read, and only that.
        spec: scenario of the latency, resamples and confidence of the intervals.
        store: root of the artifact store, for the encoded data.
        out: an empty folder.
        threads: CPU threads of the quality measurement, and of the latency where the spec names none.
        device: where a torch model runs; an export always runs on the CPU.
        seed: of the resamples.
        tokenizer: folder with ``tokenizer.json`` and, for speech, ``preprocessor_config.json``.
        reference: folder of the evaluation of the torch model that an export or a packed model was made from.
        exclusive: while it is held nothing else of the run computes; latency and the speed of writing are taken inside.
        emit: receives progress and notes.

    Raises:
        StepError: the latency scenario does not fit the model, or the data is empty.
    """
    latency_threads, work = spec.latency.threads or threads, WORK[task]
    before = memory.peak()
    runner = open_runner(artifact, task, latency_threads, device)
    shape = work.shape(runner, spec, data)
    work.first(runner, shape, tokenizer, data)
    peak = memory.peak()

    rows, text = encode(data, "eval", task, tokenizer, store), open_tokenizer(tokenizer)
    if not len(rows):
        raise StepError(f"the evaluation data {data.eval} holds no example; give at least one in data.eval")
    unit = UNITS[task]

    def progress(done: int, total: int) -> None:
        emit({"event": "progress", "done": done, "total": total, "unit": unit})

    subject = Subject(task, runner, rows, text, data, spec, progress)
    with exclusive():
        timed = work.latency(subject, shape, spec.latency.repeats)
        seconds, disturbed = undisturbed(
            lambda: speed.time_calls(timed.calls, warmup=spec.latency.warmup, repeats=spec.latency.repeats),
            "the latency",
        )
        written = work.writing(subject) if work.writing is not None else None

    subject = replace(subject, runner=on_threads(runner, artifact, task, latency_threads, threads))
    scored = quality.score(subject)
    sampling = {"resamples": spec.bootstrap, "confidence": spec.confidence, "seed": seed}
    metrics = quality.sample(scored.scores).metrics(**sampling)
    metrics |= speed.metrics(seconds, shape.batch, **sampling)
    metrics |= written.metrics(**sampling) if written is not None else {}
    metrics["peak_memory"] = scores.metric(peak)
    notes = _notes(artifact, subject) + ([disturbed] if disturbed else [])
    if artifact.kind in DERIVED:
        parity_metrics, note = _parity(reference, subject)
        metrics |= parity_metrics
        notes += [note] if note else []
    if artifact.kind != "export":
        parity.write(out, subject)

    weighed = _footprint(artifact)
    for name, value in (
        ("size", weighed.size),
        ("parameters", weighed.parameters),
        ("nonzero_parameters", weighed.nonzero),
    ):
        metrics[name] = scores.metric(value)
    metrics |= _measured_by_step(artifact)

    scores.write(out, scored.scores)
    outputs.write(out, scored.outputs)
    record = {
        "version": VERSION,
        "artifact": artifact.key,
        "kind": artifact.kind,
        "task": task,
        "npu": (artifact.properties.get("npu") or {}).get("target"),
        "metrics": {name: metrics[name] for name in METRICS if name in metrics},
        "scenario": {
            **_scenario(timed, shape, spec, subject, scored),
            "threads": latency_threads,
            "device": "cpu" if artifact.kind == "export" else device,
            **_machine(artifact, device),
            "memory_before_load": before,
            "quality_threads": threads,
        },
        "intervals": {"confidence": spec.confidence, "resamples": spec.bootstrap, "seed": seed},
        "dtypes": weighed.dtypes,
        "files": weighed.files,
        "notes": notes,
        "latency_samples": seconds.tolist(),
        "latency_inputs": list(timed.inputs),
        "writing_samples": asdict(written) if written is not None else None,
    }
    _write(out / FILE, record)


UNITS: dict[Task, str] = {
    "text-generation": "windows",
    "text-classification": "examples",
    "translation": "sentences",
    "speech-recognition": "utterances",
}
"""What progress is counted in."""


def _scenario(timed: Timed, shape: Shape, spec: EvaluateSpec, subject: Subject, scored: Scored) -> dict[str, Any]:
    """How speed and quality were measured."""
    return {
        "call": timed.what,
        "batch": shape.batch,
        "length": timed.length,
        "warmup": spec.latency.warmup,
        "repeats": spec.latency.repeats,
        "examples": len(subject.rows),
        **scored.facts,
    }


def _parity(reference: Path | None, subject: Subject) -> tuple[dict[str, dict[str, Any]], str | None]:
    if reference is None or not (reference / parity.FILE).is_file():
        return {}, "no parity: the torch model it was made from was not evaluated"
    return parity.compare(reference, subject.runner, subject.text.pad)


def _footprint(artifact: Artifact) -> footprint.Footprint:
    if artifact.kind != "export":
        return footprint.of_model(artifact.path)
    return footprint.of_export(artifact.path, deployed_files(artifact), artifact.properties["file"])


def deployed_files(artifact: Artifact) -> list[str]:
    """The files of an export that the device is given: the compiled one where there is an NPU build."""
    npu = artifact.properties.get("npu")
    return [npu["file"]] if npu else artifact.properties.get("files") or [artifact.properties["file"]]


def _measured_by_step(artifact: Artifact) -> dict[str, dict[str, Any]]:
    given = artifact.manifest.get("result", {}).get("metrics", {})
    return {name: scores.metric(float(value)) for name, value in given.items() if name in METRICS}


def _notes(artifact: Artifact, subject: Subject) -> list[str]:
    notes = list(subject.rows.warnings)
    if artifact.kind == "export" and artifact.properties.get("npu"):
        notes.append(
            "latency, memory and quality are those of the LiteRT file on the CPU; vela estimates the NPU's own"
        )
    limit = subject.runner.length
    longer = 0 if limit is None else int((subject.rows.lengths() > limit).sum())
    if longer:
        how = "split, so that every token is scored, with less context" if subject.task == "text-generation" else "cut"
        unit = "tokens" if subject.rows.seconds is None else "frames"
        notes.append(f"{longer} of {len(subject.rows)} examples exceed the export's {limit} {unit} and are {how}")
    return notes


def _machine(artifact: Artifact, device: str) -> dict[str, Any]:
    is_export = artifact.kind == "export"
    names = (runtime_of(artifact.properties["file"]).library,) if is_export else ("torch", "transformers")
    runtime = ", ".join(f"{name} {_version(name)}" for name in names)
    found: dict[str, Any] = {"cpu": processor(), "cores": os.cpu_count(), "system": platform.platform()}
    found |= {"python": platform.python_version(), "runtime": runtime}
    if not is_export and device == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
        found["peak_gpu_memory"] = torch.cuda.max_memory_allocated()
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _write(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
