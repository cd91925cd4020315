"""A good spec to spoil, and what a load of the spoilt one says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from specs.schema.load import LoadedSpec, Mistake, SpecErrors, load

GOOD = """\
name: sentiment
task: text-classification
model: {source: org/minilm}
data:
  train: ./train.jsonl
  eval: ../dev.jsonl
  max_length: 64
steps:
  - {id: student, uses: finetune, epochs: 2, learning_rate: 1e-4}
  - {id: slim, uses: prune, sparsity: 50%}
  - {id: packed, uses: quantize, needs: slim}
  - {id: cpu, uses: export_tflite, precision: int4-block32, needs: slim}
  - {id: npu, uses: export_tflite, precision: int8, npu: ethos-u85-256, needs: student}
  - {id: best, uses: select, from: [cpu, npu], minimise: latency_p50}
gates:
  - {step: best, metric: accuracy, drop: {at_most: 1.5 points}}
  - {step: npu, metric: npu_operator_share, at_least: 99%}
tracking: {experiment: sentiment, register: minilm, register_step: best}
schedule: {cron: "0 3 * * 1", timezone: Europe/Berlin}
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "spec.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def good(folder: Path, text: str = GOOD, overrides: Sequence[str] = ()) -> LoadedSpec:
    return load(write(folder, text), overrides)


def mistakes(folder: Path, text: str | bytes, overrides: Sequence[str] = ()) -> list[Mistake]:
    with pytest.raises(SpecErrors) as caught:
        load(write(folder, text), overrides)
    return caught.value.mistakes


def spoilt(folder: Path, old: str, new: str) -> list[Mistake]:
    assert GOOD.count(old) == 1, f"{old!r} stands {GOOD.count(old)} times"
    return mistakes(folder, GOOD.replace(old, new))


def place(text: str, needle: str) -> tuple[int, int]:
    """Line and column of ``needle``, counted as an editor counts."""
    before = text[: text.index(needle)]
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
