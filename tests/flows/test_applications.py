"""Every application from its data to a file that runs: the shipped specs made small, with every step they have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.flows.conftest import Project, Server

SPECS = Path(__file__).parents[2] / "specs"

SMALL = ("gates=[]", "evaluate.latency.repeats=3", "evaluate.latency.warmup=1", "evaluate.bootstrap=100")

WHISPER = (
    "model.config={model_type: whisper, vocab_size: 300, d_model: 32, encoder_layers: 1, decoder_layers: 1, "
    "encoder_attention_heads: 2, decoder_attention_heads: 2, encoder_ffn_dim: 64, decoder_ffn_dim: 64, "
    "max_source_positions: 200, max_target_positions: 32, num_mel_bins: 40}",
    "data.max_length=32",
    "steps=[{id: teacher, uses: finetune, max_steps: 3, batch_size: 8}, {id: int8, uses: quantize}, "
    "{id: cpu, uses: export_tflite, precision: float32, needs: teacher}]",
    "tracking={register_step: cpu}",
)
CASES: dict[str, tuple[str, tuple[str, ...], set[str]]] = {
    "text-generation": (
        "text-generation.yaml",
        (
            "model.config.vocab_size=400",
            "model.config.hidden_size=32",
            "model.config.num_hidden_layers=2",
            "data.train_limit=60",
            "data.eval_limit=6",
            "steps.teacher.max_steps=3",
            "steps.pruned.recover.max_steps=2",
        ),
        {"perplexity", "bits_per_byte", "tokens_per_second", "time_to_first_token"},
    ),
    "sentiment": (
        "sentiment.yaml",
        (
            "data.train_limit=60",
            "data.eval_limit=20",
            "steps.teacher.max_steps=3",
            "steps.pruned.recover.max_steps=2",
        ),
        {"accuracy", "f1", "mcc", "calibration_error"},
    ),
    "translation": (
        "translation.yaml",
        (
            "model.config.d_model=32",
            "data.train_limit=60",
            "data.eval_limit=10",
            "steps.teacher.max_steps=3",
            "steps.pruned.recover.max_steps=2",
        ),
        {"bleu", "chrf", "length_ratio", "tokens_per_second"},
    ),
    "speech-ctc": (
        "speech.yaml",
        ("data.train_limit=24", "data.eval_limit=6", "steps.teacher.max_steps=2", "steps.teacher.batch_size=4"),
        {"wer", "cer", "real_time_factor"},
    ),
    "speech-whisper": (
        "speech.yaml",
        ("data.train_limit=24", "data.eval_limit=6", *WHISPER),
        {"wer", "cer", "real_time_factor", "tokens_per_second"},
    ),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES)
def test_an_application_runs_from_its_data_to_its_files(tmp_path: Path, prefect_server: Server, case: str):
    from flows.record import read_run

    spec, changes, metrics = CASES[case]
    project = Project(tmp_path, prefect_server.variables)
    options = [word for change in (*SMALL, *changes) for word in ("--set", change)]
    done = project.lathe("run", str(SPECS / spec), "--json", *options, LATHE_HOME=str(project.home))
    assert done.returncode == 0, done.stdout + done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout)
    record = read_run(Path(outcome["folder"]))
    assert record is not None
    assert set(record.ended) == {row["step"] for row in outcome["rows"]}
    for name, end in record.ended.items():
        assert end["state"] == "done", name
        assert metrics <= set(end["evaluation"]["metrics"]), name
    files = {name: end["evaluation"] for name, end in record.ended.items() if end["evaluation"]["kind"] == "export"}
    assert files
    for name, evaluation in files.items():
        assert "parity_agreement" in evaluation["metrics"], name
    if case == "speech-whisper":  # a float file writes what torch writes
        assert files["cpu"]["metrics"]["parity_agreement"]["value"] == 1.0
    report = (Path(outcome["folder"]) / "report" / "report.md").read_text()
    for name, text in (("translation", "nrefs:1"), ("speech", "NFKC")):
        assert (text in report) == case.startswith(name)
