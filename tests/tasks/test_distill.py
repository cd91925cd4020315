"""The step: every application from end to end, the student's origins, resuming, and what is refused."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tasks.compress import kept
from tasks.compress.distill import distill, look
from tasks.context import StepError
from tasks.models import load
from tests.support import as_artifact, context, tiny_config, tiny_model
from tests.tasks import tiny
from tests.tasks.taught import CASES, KEPT, distilled, spec_of, teachers, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Teacher folder and data of each kind."""
    return teachers(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("kind", CASES)
def test_each_application_from_a_part_of_the_teacher(tmp_path, made, kind):
    result, ctx, events = distilled(tmp_path, made, kind, student={"layers": 1, "hidden": 16}, hidden={}, relations={})
    network = load(ctx.out)
    assert set(result.touched) <= set(dict(network.named_parameters()))
    assert not any("projection_" in name or "distillation" in name for name in network.state_dict())
    assert type(network) is type(load(made[kind][0]))
    assert "cut out of the teacher" in result.summary
    assert not (ctx.out / "lathe.json").exists()
    assert (
        result.properties["distillation"]["student_parameters"]
        < 0.6 * (result.properties["distillation"]["teacher_parameters"])
    )
    assert {"validation_loss", "train_loss"} <= {event.get("name") for event in events}


@pytest.mark.parametrize("kind", CASES)
def test_each_application_from_a_model_and_with_kept_outputs(tmp_path, made, kind):
    other = tiny_model(tmp_path / "other", kind, CASES[kind], seed=5)
    result, ctx, events = distilled(tmp_path / "a", made, kind, taught=other, **KEPT)
    assert result.properties["distillation"]["cached"]
    progress = [event for event in events if event["event"] == "progress" and event["unit"] == "examples"]
    assert progress[-1]["done"] == progress[-1]["total"]
    assert weights_of(ctx.out) != weights_of(other)
    again = dataclasses.replace(context(tmp_path / "b", CASES[kind], made[kind][1]), store=ctx.store)
    told = []
    distill(
        as_artifact(other),
        as_artifact(made[kind][0]),
        spec=spec_of(**KEPT),
        ctx=dataclasses.replace(again, emit=told.append),
    )
    assert {"event": "note", "text": "the teacher's outputs: found in the store"} in told
    assert weights_of(again.out) == weights_of(ctx.out)  # and two runs give the same bytes


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}),
        ("bert", {"model_type": "distilbert", "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}),
        ("whisper", tiny_config("whisper") | {"d_model": 16, "decoder_layers": 1, "vocab_size": None}),
        ("wav2vec2", tiny_config("wav2vec2") | {"hidden_size": 16, "vocab_size": None}),
    ],
)
def test_a_student_of_its_own_configuration(tmp_path, made, kind, config):
    config = {name: value for name, value in config.items() if value is not None}
    result, ctx, _ = distilled(tmp_path, made, kind, config=config)
    network = load(ctx.out)
    assert "random weights" in result.summary
    assert network.config.vocab_size == load(made[kind][0]).config.vocab_size
    assert network.config.model_type == config["model_type"]
    assert (ctx.out / "tokenizer.json").read_bytes() == (made[kind][0] / "tokenizer.json").read_bytes()
    if kind == "bert":
        assert network.config.id2label == {0: "negative", 1: "positive"}
        plain = transformers.AutoModelForSequenceClassification.from_pretrained(ctx.out)
        assert type(plain).__name__ == "DistilBertForSequenceClassification"


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from specs.schema.steps.distill import DistillSpec
from tasks.compress import kept
from tasks.compress.distill import distill
from tests.support import as_artifact, context
from specs.schema.pipeline import DataSpec

folder, teacher, spec, data, at = sys.argv[1:]
kept.PIECE = 8

def emit(event):
    if at == "train" and event.get("name") == "train_loss" and event["step"] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if at == "teacher" and event.get("unit") == "examples" and event["done"] == 16:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
ctx = context(Path(folder), "text-generation", DataSpec.model_validate_json(data), emit=emit)
distill(as_artifact(Path(teacher)), spec=DistillSpec.model_validate_json(spec), ctx=ctx)
"""


@pytest.mark.parametrize("at", ["train", "teacher"])
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, made, monkeypatch, at):
    teacher, data = made["llama"]
    spec = spec_of(
        student={"layers": 1, "hidden": 16},
        max_steps=7,
        save_every=0.0,
        eval_steps=2,
        **({"on_policy": {"share": 0.5}, "hidden": {}} if at == "train" else {}),
    )
    arguments = [str(tmp_path / "killed"), str(teacher), spec.model_dump_json(), data.model_dump_json(), at]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    monkeypatch.setattr(kept, "PIECE", 8)
    ends = {}
    for name in ("killed", "whole"):
        events = []
        folder = tmp_path / name
        for part in ("out", "work"):
            shutil.rmtree(folder / part, ignore_errors=True)
        ctx = context(folder, "text-generation", data, emit=events.append)
        distill(as_artifact(teacher), spec=spec, ctx=ctx)
        ends[name] = (weights_of(ctx.out), events)
    assert ends["killed"][0] == ends["whole"][0]
    steps = [event["step"] for event in ends["killed"][1] if event.get("name") == "train_loss"]
    assert steps == ([5, 6, 7] if at == "train" else [1, 2, 3, 4, 5, 6, 7])


def test_a_damaged_piece_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "PIECE", 4)
    ctx = tiny.context(tmp_path)
    calls = []

    def make(rows):
        calls.append(rows.tolist())
        if len(calls) == 3:
            raise StepError("killed")
        return {"x": np.repeat(rows, 2).astype(np.float32), "ends": 2 * np.arange(1, len(rows) + 1)}

    with pytest.raises(StepError, match="killed"):
        kept.keep("it", {"a": 1}, make, 10, ctx, test_a_damaged_piece_is_made_again)
    pieces = sorted((tmp_path / "store").rglob("piece-*.safetensors"))
    assert len(pieces) == 2
    content = bytearray(pieces[1].read_bytes())
    content[-1] ^= 1
    pieces[1].write_bytes(content)
    found = kept.keep("it", {"a": 1}, make, 10, ctx, test_a_damaged_piece_is_made_again)
    assert calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [4, 5, 6, 7], [8, 9]]
    assert found.rows(np.array([9, 0, 5]))["x"].tolist() == [9, 9, 0, 0, 5, 5]
    assert kept.keep("it", {"a": 1}, make, 10, ctx, test_a_damaged_piece_is_made_again).rows(np.array([2]))
    assert len(calls) == 5


def _edited(source, folder, **fields):
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def test_pairs_that_do_not_go_together(tmp_path, made):
    three = tiny_model(tmp_path / "three", "bert", "text-classification", labels=3)
    with pytest.raises(StepError, match=r"knows 2 labels \(negative, positive\) and the student 3 \(class0, "):
        distilled(tmp_path / "a", made, "bert", taught=three)
    strange = tiny_model(tmp_path / "strange", "llama", "text-generation", vocab_size=300)
    with pytest.raises(StepError, match=r"vocabulary \(300 tokens\) is not the teacher's \(320.*instead of needs"):
        distilled(tmp_path / "b", made, "llama", taught=strange)
    writes = tiny_model(tmp_path / "writes", "llama", "text-generation")
    with pytest.raises(StepError, match="the student does text-generation and the teacher text-classification"):
        distilled(tmp_path / "c", made, "bert", taught=writes)
    decoder = tiny_model(tmp_path / "decoder", "llama", "text-classification", pad_token_id=0)
    with pytest.raises(StepError, match="family decoder and the teacher encoder"):
        distilled(tmp_path / "d", made, "bert", taught=decoder)
    wider = tiny_model(tmp_path / "wav", "wav2vec2", "speech-recognition", conv_stride=[5, 4, 2])
    with pytest.raises(StepError, match="another number of frames"):
        distilled(tmp_path / "e", made, "wav2vec2", taught=wider)


@pytest.mark.parametrize("broken", ["teacher", "student"])
def test_weights_that_are_no_numbers_teach_and_learn_nothing(tmp_path, made, broken):
    from tasks.models import save

    teacher, data = made["bert"]
    network = load(teacher)
    with torch.no_grad():
        network.bert.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    save(network, tmp_path / "broken", tokenizer_from=teacher)
    pair = {"teacher": teacher, "student": teacher, broken: tmp_path / "broken"}
    events = []
    ctx = context(tmp_path / "run", "text-classification", data, emit=events.append)
    with pytest.raises(StepError, match=r"layer\.0\.output\.dense\.weight holds weights that are not finite"):
        distill(as_artifact(pair["student"]), as_artifact(pair["teacher"]), spec=spec_of(), ctx=ctx)
    assert events == []
    assert list(ctx.out.iterdir()) == []


def test_labels_in_another_order_are_put_in_order(tmp_path, made):
    teacher, _ = made["bert"]
    turned = _edited(
        teacher,
        tmp_path / "turned",
        id2label={"0": "positive", "1": "negative"},
        label2id={"positive": 0, "negative": 1},
    )
    from tasks.compress.fit import label_order

    assert label_order(load(turned), load(teacher)) == [1, 0]
    assert label_order(load(teacher), load(teacher)) is None
    result, _, _ = distilled(tmp_path / "a", made, "bert", taught=turned)
    assert result.touched


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("llama", {"model_type": "llama", "vocab_size": 50}, "config: vocab_size 50 is not the teacher's 320"),
        ("llama", {"model_type": "lama"}, "config.model_type 'lama' is unknown; did you mean"),
        ("llama", {"model_type": "llama", "layers": 2}, "config.layers is no field of llama"),
        ("bert", {"model_type": "llama"}, "family decoder, the teacher is encoder; .* for example bert"),
    ],
)
def test_configurations_that_the_plan_refuses(made, kind, config, message):
    teacher = json.loads((made[kind][0] / "config.json").read_text())
    problems, _ = look(spec_of(config=config), teacher, CASES[kind], 32)
    import re

    assert len(problems) == 1
    assert re.search(message, problems[0]), problems


def test_sizes_that_the_plan_refuses(made):
    teacher = json.loads((made["whisper"][0] / "config.json").read_text())
    shape = {"layers": 2, "decoder_layers": 3, "hidden": 64}
    problems, _ = look(spec_of(student=shape), teacher, "speech-recognition", 32)
    assert problems == [
        "student.hidden 64 is more than the model's 32; write at most 32",
        "student.decoder_layers 3 is more than the model's 2; write at most 2",
    ]
    assert look(spec_of(student={"layers": 1}), teacher, "speech-recognition", 32) == ([], [])
    bert = json.loads((made["bert"][0] / "config.json").read_text())
    problems, _ = look(spec_of(student={"decoder_layers": 1, "hidden": 16, "heads": 3}), bert, CASES["bert"], 32)
    assert problems == [
        "student.decoder_layers: a bert model has no decoder; write layers",
        "student.heads: 3 heads do not divide the width 16; write a divisor of it",
    ]
