"""The table of what works with what is true: what it allows runs, what it refuses is refused by the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from specs.schema.base import StepSpec, Task
from specs.schema.graph import build
from specs.schema.pipeline import KINDS, PipelineSpec
from specs.schema.steps.adaptive_input import AdaptiveInputSpec
from specs.schema.steps.export import ExportTfliteSpec
from specs.schema.steps.finetune import FinetuneSpec
from specs.schema.steps.prune import PruneSpec
from specs.schema.steps.quantize import QuantizeSpec
from tasks import registry
from tasks.models import Family, family_of, load
from tasks.models.applications import pairs
from tasks.models.support import matrix, supports
from tasks.registry import RegisteredStep, find
from tests import support
from tests.support import as_artifact, context, tiny_config, tiny_data, tiny_model

MODELS: dict[tuple[Task, Family], support.Family] = {
    ("text-generation", "decoder"): "llama",
    ("text-classification", "encoder"): "bert",
    ("text-classification", "decoder"): "llama",
    ("translation", "encoder-decoder"): "marian",
    ("speech-recognition", "ctc"): "wav2vec2",
    ("speech-recognition", "encoder-decoder"): "whisper",
}
STEPS: dict[str, StepSpec] = {
    "finetune": FinetuneSpec(uses="finetune", id="t", max_steps=1, batch_size=4, validation=0),
    "prune": PruneSpec(uses="prune", id="p", sparsity=0.5),
    "width": PruneSpec(uses="prune", id="p", method="width", keep=0.5, calibration_examples=2),
    "depth": PruneSpec(uses="prune", id="p", method="depth", keep=0.5, calibration_examples=2),
    "vocabulary": PruneSpec(uses="prune", id="p", method="vocabulary"),
    "quantize": QuantizeSpec(uses="quantize", id="q"),
    "adaptive": AdaptiveInputSpec(uses="adaptive_input", id="a", ratio=4.0, bits=(4,), bands=1),
}


NPU = ExportTfliteSpec(uses="export_tflite", id="npu", precision="int8", npu="ethos-u85-256")


def test_the_table_has_every_step_and_every_pair():
    rows = {row.step: row.reasons for row in matrix()}
    assert set(KINDS) <= set(rows)
    assert all(set(reasons) == set(pairs()) for reasons in rows.values())
    assert set(MODELS) == set(pairs())
    for name, kind in KINDS.items():
        for (task, family), reason in rows[name].items():
            assert reason == supports(kind, family, task)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("made")
    found: dict[tuple[Task, Family], Any] = {}
    for (task, family), kind in MODELS.items():
        place = folder / f"{task}-{family}"
        overrides = {"pad_token_id": 0} if kind == "llama" else {}
        data = tiny_data(place / "data", task, train=8, eval=4)
        found[task, family] = (tiny_model(place / "model", kind, task, **overrides), data)
    return found


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("pair", MODELS, ids=lambda pair: "-".join(pair))
def test_what_the_table_allows_runs(made, tmp_path, pair, step):
    (task, family), (folder, data) = pair, made[pair]
    assert family_of(load(folder).config) == family  # type: ignore[arg-type]
    spec = STEPS[step]
    if (step, task) == ("vocabulary", "speech-recognition") or (step, family) == ("adaptive", "ctc"):
        assert supports(spec, family, task) is not None
        return
    assert supports(spec, family, task) is None
    ctx = context(tmp_path, task, data)
    result = find(type(spec)).function(as_artifact(folder), spec=spec, ctx=ctx)
    assert result.touched
    load(ctx.out)


def test_full_int8_is_refused_for_models_that_read_and_then_write():
    int8 = ExportTfliteSpec(uses="export_tflite", id="x", precision="int8")
    refused = {pair: supports(int8, pair[1], pair[0]) for pair in pairs()}
    assert {pair for pair, reason in refused.items() if reason} == {
        ("translation", "encoder-decoder"),
        ("speech-recognition", "encoder-decoder"),
    }
    assert all("int8-dynamic" in reason for reason in refused.values() if reason)


def test_a_family_that_cannot_do_the_task_is_refused_with_those_that_can():
    reason = supports(PruneSpec, "ctc", "translation")
    assert reason == "translation needs a model that is encoder-decoder, and this one is ctc"
    assert "ctc or encoder-decoder" in str(supports(STEPS["prune"], "decoder", "speech-recognition"))


class _TextOnly(StepSpec):
    tasks: ClassVar[tuple[Task, ...]] = ("text-generation", "text-classification")


def test_a_step_says_itself_what_it_refuses(monkeypatch):
    assert supports(_TextOnly, "ctc", "speech-recognition") == (
        "this step is for text-generation, text-classification, not for speech-recognition"
    )

    def refuses(spec: PruneSpec | None, family: Family, task: Task) -> str | None:
        return "prune no encoders" if family == "encoder" and (spec is None or spec.sparsity == 0.5) else None

    own = find(PruneSpec)
    odd = RegisteredStep(PruneSpec, own.function, (), refuses=refuses, variants={"prune (half)": STEPS["prune"]})
    monkeypatch.setitem(registry._STEPS, PruneSpec, odd)
    rows = {row.step: row.reasons for row in matrix()}
    assert rows["prune"]["text-classification", "encoder"] == "prune no encoders"
    assert rows["prune (half)"]["text-classification", "encoder"] == "prune no encoders"
    assert rows["prune"]["text-classification", "decoder"] is None
    other = PruneSpec(uses="prune", id="p", sparsity=0.25)
    assert supports(other, "encoder", "text-classification") is None


def test_the_plan_refuses_with_the_reason(speech_data, tmp_path):
    from flows.preflight import inspect

    def problems(family: support.Family) -> list[str]:
        spec = PipelineSpec.model_validate(
            {
                "name": "speech",
                "task": "speech-recognition",
                "model": {"config": tiny_config(family)},
                "data": speech_data.model_dump(),
                "steps": [NPU.model_dump(exclude_unset=True)],
            }
        )
        found = inspect(spec, list(build(spec)), "cpu", 1, tmp_path / "log")
        return [problem.text for problem in found.problems]

    refused = supports(NPU, "encoder-decoder", "speech-recognition")
    assert refused is not None
    assert any(refused in problem and problem.startswith("npu: ") for problem in problems("whisper"))
    assert not any("npu: " in problem and "token by token" in problem for problem in problems("wav2vec2"))


def test_the_table_is_printed(tmp_path: Path):
    from flows.cli import app

    shown = CliRunner().invoke(app, ["steps", "--matrix"], env={"COLUMNS": "100"})
    assert shown.exit_code == 0
    for row in matrix():
        assert row.step in shown.stdout
        for reason in filter(None, row.reasons.values()):
            assert " ".join(reason.split()) in " ".join(shown.stdout.split())
    one = CliRunner().invoke(app, ["steps", "prune", "--matrix"])
    assert "prune" in one.stdout
    assert "quantize" not in one.stdout
    unknown = CliRunner().invoke(app, ["steps", "prun", "--matrix"])
    assert unknown.exit_code != 0
