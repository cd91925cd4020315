"""Under which conditions artifacts are measured, and the key of a measurement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specs.schema.pipeline import PipelineSpec
from tasks.keys import digest_json, library_versions, machine, source_digest

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "ai-edge-litert", "onnxruntime", "sacrebleu", "jiwer")

DERIVED = ("packed", "export")
"""Kinds that are compared with the torch model that they were made from."""


def conditions(spec: PipelineSpec, eval_fingerprint: str, device: str, threads: int) -> dict[str, Any]:
    """Everything that shapes a measurement, apart from the artifact: as JSON.

    ``evaluate`` has the threads of the latency filled in: it is taken alone on the machine, so it has all of them
    unless the spec says fewer. Quality is measured beside other branches, on its share of the threads.
    """
    from tasks.evaluate.measure import evaluate

    latency = spec.evaluate.latency
    filled = latency.model_copy(update={"threads": latency.threads or threads})
    return {
        "evaluate": spec.evaluate.model_copy(update={"latency": filled}).model_dump(mode="json"),
        "task": spec.task,
        "data": eval_fingerprint,
        "max_length": spec.data.max_length,
        "seed": spec.seed,
        "device": device,
        "threads": max(1, threads // spec.resources.parallel),
        "source": source_digest(evaluate),
        "libraries": library_versions(LIBRARIES),
        "machine": machine(),
    }


def evaluation_key(digest: str, reference: str | None, measured: Mapping[str, Any]) -> str:
    """The key of a measurement.

    Args:
        digest: of the artifact's content.
        reference: the key of the measurement of the torch model that an export was made from.
        measured: what ``conditions`` returned.
    """
    return digest_json({"artifact": digest, "reference": reference, **measured})
