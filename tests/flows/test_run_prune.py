"""A run that prunes by data and trains on: the zeros are those of the pattern; what does not fit stops the plan."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from flows.record import read_run
from tests.flows.conftest import Project

STEPS = """
steps:
  - {id: slim, uses: prune, method: sparsegpt, pattern: "2:4", calibration_examples: 8, evaluate: false}
  - {id: tuned, uses: finetune, max_steps: 3, batch_size: 16, learning_rate: 1e-3, evaluate: false}
"""


def test_a_run_prunes_by_data_and_keeps_the_zeros(project: Project):
    project.write(STEPS)
    code, outcome = project.outcome()
    assert code == 0, outcome
    record = read_run(Path(outcome["folder"]))
    assert record is not None
    for name in ("slim", "tuned"):
        tensors = load_file(Path(record.ended[name]["path"]) / "model.safetensors")
        inside = [tensor for key, tensor in tensors.items() if ".layer." in key and tensor.ndim == 2]
        assert len(inside) == 12
        assert all(((tensor.reshape(-1, 4) != 0).sum(1) == 2).all() for tensor in inside), name
    said = " ".join(record.ended["slim"]["result"]["warnings"])
    assert "nothing faster on a CPU, in LiteRT or on an NPU" in said


def test_a_pattern_that_does_not_fit_stops_the_plan(lonely: Project):
    path = lonely.write('\nsteps:\n  - {id: slim, uses: prune, method: sparsegpt, pattern: "2:5"}\n')
    refused = lonely.lathe("plan", "spec.yaml")
    assert refused.returncode == 2
    said = " ".join((refused.stdout + refused.stderr).split())
    assert "pattern 2:5 needs a multiple of 5 inputs, and 13 of 13 linear layers have none" in said
    line = next(number for number, text in enumerate(path.read_text().splitlines(), 1) if "2:5" in text)
    assert f"spec.yaml:{line}:" in said
