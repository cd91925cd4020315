"""Tables in bands as LiteRT files: they compute what torch does, shrink as promised, and an Ethos-U85 takes them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specs.schema.steps.adaptive_input import AdaptiveInputSpec
from tasks.adaptive_input.adaptive_input import adaptive_input
from tasks.adaptive_input.in_exports import FORMS, Exported
from tasks.adaptive_input.table import tables
from tasks.context import StepResult
from tasks.export import graph
from tasks.models import load
from tests.support import as_artifact
from tests.tasks import exported


@cache
def banded(family: str) -> tuple[Path, StepResult]:
    """A model of the family with its tokens in bands of 8 bits."""
    spec = AdaptiveInputSpec(uses="adaptive_input", id="a", ratio="14x", bits=(8,), bands=3)  # type: ignore[arg-type]
    ctx = exported.context(family, "banded")
    return ctx.out, adaptive_input(as_artifact(exported.model(family)), spec=spec, ctx=ctx)


@cache
def export(family: str, precision: str, **fields: Any) -> tuple[Path, StepResult]:
    from tasks.export.tflite import export_tflite

    ctx = exported.context(family, f"banded-{precision}")
    result = export_tflite(as_artifact(banded(family)[0]), spec=exported.spec(precision, **fields), ctx=ctx)
    return ctx.out, result


def constants(folder: Path) -> int:
    """Bytes of the tables in a file: constants that are as long as the vocabulary, or as the bands are."""
    model = graph.read(folder / "model.tflite")
    seen: dict[int, int] = {}
    for part in model.subgraphs:
        for tensor in part.tensors:
            data = model.buffers[tensor.buffer].data
            if data is not None and tensor.shape is not None and len(tensor.shape) and max(tensor.shape) >= 32:
                seen[tensor.buffer] = len(data)
    return sum(seen.values())


def test_a_decoder_scores_and_writes_from_its_bands():
    # The step compares every signature of the float file with torch before it makes integers of it.
    folder, result = export("gpt2", "int8-dynamic", cache=exported.CACHE)
    assert {"prefill", "decode"} < set(result.properties["signatures"])
    dense, _ = exported.export("gpt2", "int8-dynamic")
    assert constants(folder) < constants(dense)
    # What the step foresees of an export is what is saved.
    (made,), form = tables(load(banded("gpt2")[0])), FORMS[1]
    foreseen = Exported(made.layout, looked_up=True, scored=True)
    saved = constants(dense) - constants(folder)
    assert saved == pytest.approx(foreseen.dense(form) - foreseen.held(form), rel=0.15)
    ids, mask = exported.examples("gpt2")
    logits = exported.lite_logits(folder, ids[:2], mask[:2])
    assert np.isfinite(logits).all()


def test_static_int8_shrinks_and_the_npu_takes_all_but_the_index():
    folder, result = export("bert", "int8", npu="ethos-u85-256")
    kinds = result.properties["operators"]
    assert kinds["GATHER"] >= 2
    assert not {"WHERE", "NON_ZERO", "EMBEDDING_LOOKUP"} & set(kinds)  # no boolean gathers
    left = result.properties["npu"]["cpu"]
    assert [name.split()[0] for name in left] == ["GATHER_ND"]  # where each token's row is: whole numbers, 4 bytes each
    assert result.metrics["npu_operator_share"] > 0.99
    dense, _ = exported.export("bert", "int8")
    assert constants(folder) < constants(dense)
    assert (folder / "model.tflite").stat().st_size < (dense / "model.tflite").stat().st_size
