"""One run through the ways to prune: the plan says what zeros bring, and every artifact has the zeros it should."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from flows.record import read_run
from tests.flows.conftest import Project

STEPS = """
steps:
  - {id: base, uses: finetune, max_steps: 4, batch_size: 16, learning_rate: 1e-3, evaluate: false}
  - {id: wanda, uses: prune, method: wanda, pattern: "2:4", calibration_examples: 8, evaluate: false}
  - {id: tuned, uses: finetune, max_steps: 3, batch_size: 16, learning_rate: 1e-3}
  - {id: surgery, uses: prune, method: sparsegpt, sparsity: 60%, calibration_examples: 8, needs: base, evaluate: false}
  - {id: moved, uses: prune, method: movement, sparsity: 70%, needs: base, evaluate: false,
     recover: {max_steps: 6, batch_size: 16, learning_rate: 1e-3}}
"""


def test_a_run_prunes_by_data_and_while_it_trains(project: Project):
    project.write(STEPS)
    planned = project.lathe("plan", "spec.yaml")
    assert planned.returncode == 0, planned.stderr
    said = " ".join(planned.stdout.split())
    assert "wanda: the zeros of 2:4 make the file no smaller" in said
    assert "surgery: zeros alone make neither the file smaller" in said
    code, outcome = project.outcome()
    assert code == 0, outcome
    record = read_run(Path(outcome["folder"]))
    assert record is not None
    for name, sparsity in (("wanda", 0.5), ("tuned", 0.5), ("surgery", 0.6), ("moved", 0.7)):
        tensors = load_file(Path(record.ended[name]["path"]) / "model.safetensors")
        inside = [tensor for key, tensor in tensors.items() if ".layer." in key and tensor.ndim == 2]
        assert len(inside) == 12
        for tensor in inside:
            assert int((tensor == 0).sum()) == round(sparsity * tensor.numel()), name


def test_a_pattern_that_does_not_fit_stops_the_plan(lonely: Project):
    path = lonely.write('\nsteps:\n  - {id: slim, uses: prune, method: sparsegpt, pattern: "2:5"}\n')
    refused = lonely.lathe("plan", "spec.yaml")
    assert refused.returncode == 2
    said = " ".join((refused.stdout + refused.stderr).split())
    assert "pattern 2:5 needs a multiple of 5 inputs, and 13 of 13 linear layers have none" in said
    line = next(number for number, text in enumerate(path.read_text().splitlines(), 1) if "2:5" in text)
    assert f"spec.yaml:{line}:" in said
