import copy
import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from specs.schema.steps.finetune import TrainingSpec
from tasks.context import StepError
from tasks.finetune import checkpoints
from tasks.finetune.batches import Batches, epoch_order, hold_out
from tasks.finetune.finetune import summary
from tasks.finetune.loop import schedule, train
from tasks.finetune.masks import Fixed
from tasks.finetune.objective import task_loss
from tests.tasks import tiny

SPEC = TrainingSpec(max_steps=8, batch_size=8, learning_rate=5e-3, eval_steps=3, validation=0.2)


pytestmark = pytest.mark.usefixtures("one_thread")


def _bits(model):
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def _run(folder, kind="llama", spec=SPEC, **fields):
    events = []
    task = "text-classification" if kind == "bert" else "text-generation"
    ctx = tiny.context(folder, task, emit=events.append, **fields)
    model = tiny.network(kind)
    data = tiny.sentences() if kind == "bert" else tiny.language()
    return model, train(model, data, spec, ctx), events


def _curve(events, name):
    return [(event["step"], event["value"]) for event in events if event.get("name") == name]


def test_the_rate_rises_to_its_peak_and_falls():
    rates = [schedule(step, 10, 0.2, "linear") for step in range(10)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    cosine = [schedule(step, 8, 0.0, "cosine") for step in range(8)]
    assert cosine == pytest.approx([(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)])
    assert [schedule(step, 4, 0.25, "constant") for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert schedule(0, 1, 0.1, "linear") == 1.0
    assert all(schedule(step, 3, 1.0, "linear") > 0 for step in range(3))


def test_documents_are_held_out_whole():
    document = np.repeat(np.arange(20), 5)
    train_rows, held = hold_out(document, 0.2, np.random.default_rng(0))
    assert len(held) == 20
    assert not set(document[train_rows]) & set(document[held])
    assert sorted([*train_rows, *held]) == list(range(100))


def test_windows_are_held_out_where_there_is_one_document():
    train_rows, held = hold_out(np.zeros(50, int), 0.1, np.random.default_rng(0))
    assert (len(train_rows), len(held)) == (45, 5)


@pytest.mark.parametrize(("count", "share", "held"), [(10, 0.0, 0), (10, 1.0, 9), (1, 0.5, 0), (10, 0.001, 1)])
def test_training_always_keeps_an_example(count, share, held):
    train_rows, validation = hold_out(np.arange(count), share, np.random.default_rng(0))
    assert (len(train_rows), len(validation)) == (count - held, held)


def test_an_epoch_sees_every_example_once_in_batches_of_like_length():
    lengths = np.random.default_rng(1).integers(1, 100, 333)
    batches = epoch_order(lengths, 10, np.random.default_rng(0))
    assert sorted(np.concatenate(batches)) == list(range(333))
    assert max(map(len, batches)) == 10
    padded = sum(lengths[batch].max() * len(batch) for batch in batches)
    assert padded < 1.15 * lengths.sum()
    again = epoch_order(lengths, 10, np.random.default_rng(0))
    assert all(np.array_equal(one, other) for one, other in zip(batches, again, strict=True))
    other = epoch_order(lengths, 10, np.random.default_rng(1))
    assert not np.array_equal(np.concatenate(batches), np.concatenate(other))


def test_batches_are_cut_to_their_longest_example():
    data = tiny.language(count=20, length=16)
    batch = Batches(data, 0.0, 4, 0, "cpu").tensors(np.array([0, 1]))
    longest = int(data.lengths()[:2].max())
    assert batch["input_ids"].shape == (2, longest)
    assert np.array_equal(batch["input_ids"].numpy(), data.input_ids[:2, :longest])


def test_the_language_loss_is_that_of_a_naive_loop():
    model, data = tiny.network("llama"), tiny.language(count=3, length=8)
    batch = Batches(data, 0.0, 3, 0, "cpu").tensors(np.arange(3))
    smoothing, expected, count = 0.1, 0.0, 0
    with torch.no_grad():
        for row in range(3):
            ids = batch["input_ids"][row : row + 1, : int(data.lengths()[row])]  # no padding at all
            for at in range(ids.shape[1] - 1):
                log = torch.log_softmax(model(ids).logits[0, at], -1)
                expected -= float((1 - smoothing) * log[ids[0, at + 1]] + smoothing * log.mean())
                count += 1
        total, weight = task_loss("text-generation", label_smoothing=smoothing)(model, batch)
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert int(weight) == count


def test_accumulated_parts_equal_the_large_batch(tmp_path):
    ends = []
    for name, size, parts in (("whole", 8, 1), ("parts", 2, 4)):
        spec = SPEC.model_copy(update={"batch_size": size, "gradient_accumulation_steps": parts, "validation": 0.0})
        model, _, events = _run(tmp_path / name, spec=spec)
        ends.append((torch.cat([p.detach().flatten() for p in model.parameters()]), _curve(events, "train_loss")))
    assert torch.allclose(ends[0][0], ends[1][0], atol=2e-5)
    assert [value for _, value in ends[0][1]] == pytest.approx([value for _, value in ends[1][1]], abs=1e-5)


def test_two_trainings_give_the_same_bits_and_another_seed_does_not(tmp_path):
    first, _, _ = _run(tmp_path / "a", "bert")
    second, _, _ = _run(tmp_path / "b", "bert")
    other, _, _ = _run(tmp_path / "c", "bert", seed=1)
    assert _bits(first) == _bits(second)
    assert _bits(first) != _bits(other)


def test_the_callers_random_state_is_left_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = tiny.network("bert")
    torch.manual_seed(5)
    train(model, tiny.sentences(), SPEC, tiny.context(tmp_path, "text-classification"))
    assert torch.equal(torch.rand(3), expected)


def test_curves_are_recorded_and_the_best_weights_kept(tmp_path):
    spec = SPEC.model_copy(
        update={"max_steps": 40, "learning_rate": 0.1, "eval_steps": 5, "validation": 0.25, "lr_scheduler": "constant"}
    )
    model, trained, events = _run(tmp_path, spec=spec)
    validation = _curve(events, "validation_loss")
    assert [step for step, _ in validation] == list(range(0, 41, 5))
    best_step, best = min(validation, key=lambda pair: pair[1])
    assert best_step < 40, "the rate is meant to be too high to end at the best"
    assert (trained.progress.best_step, trained.progress.best_loss) == (best_step, best)
    assert trained.progress.first_loss == validation[0][1]
    data = tiny.language()
    batches = Batches(data, 0.25, 8, 0, "cpu")
    with torch.no_grad():
        total, weight = task_loss("text-generation")(model, batches.tensors(batches.validation))
    assert float(total / weight) == pytest.approx(best, rel=1e-5)
    for name in ("train_loss", "learning_rate", "grad_norm", "tokens_per_second"):
        assert [step for step, _ in _curve(events, name)] == list(range(1, 41)), name
    assert [event["done"] for event in events if event["event"] == "progress"] == list(range(41))
    assert not model.training


def test_it_stops_early_when_validation_no_longer_improves(tmp_path):
    spec = SPEC.model_copy(
        update={"max_steps": 60, "learning_rate": 0.3, "eval_steps": 2, "early_stopping_patience": 2}
    )
    _, trained, events = _run(tmp_path, spec=spec)
    validation = _curve(events, "validation_loss")
    assert trained.progress.step < 60
    assert trained.progress.step == validation[-1][0] == trained.progress.best_step + 4


def test_epochs_become_steps(tmp_path):
    spec = TrainingSpec(epochs=1.5, batch_size=10, validation=0.0)
    _, trained, _ = _run(tmp_path, spec=spec)
    assert (trained.progress.step, trained.progress.epochs) == (15, 1.5)
    assert trained.progress.best_loss is None
    assert summary(trained).endswith(" parameters for 1.5 epochs (15 steps)")
    once = dataclasses.replace(trained, progress=dataclasses.replace(trained.progress, steps_per_epoch=1, step=1))
    assert summary(once).endswith(" parameters for 1 epoch (1 step)")


def test_masked_weights_and_their_optimiser_state_stay_zero(tmp_path):
    model = tiny.network("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    masks = {name: torch.rand(model.get_parameter(name).shape) < 0.5}
    spec = SPEC.model_copy(update={"save_every": 0.0, "validation": 0.0})
    train(model, tiny.language(), spec, tiny.context(tmp_path), masks=Fixed(masks))
    weight = model.get_parameter(name)
    assert torch.all(weight[~masks[name]] == 0)
    assert torch.all(weight[masks[name]] != 0)
    found, _ = checkpoints.load_latest(tmp_path / "checkpoints")
    assert found is not None
    for slot in ("exp_avg", "exp_avg_sq"):
        assert torch.all(found.tensors[f"optimizer.{name}.{slot}"][~masks[name]] == 0)
        assert torch.any(found.tensors[f"optimizer.{name}.{slot}"] != 0)


def test_biases_and_norms_do_not_decay(tmp_path):
    model = tiny.network("bert")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def nothing(model, batch):  # gradients of exactly 0, so that decay alone moves a weight
        return sum(parameter.sum() for parameter in model.parameters()) * 0, torch.tensor(1)

    spec = SPEC.model_copy(update={"weight_decay": 0.5, "learning_rate": 0.1, "validation": 0.0})
    train(model, tiny.sentences(), spec, tiny.context(tmp_path, "text-classification"), loss=nothing)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    norms = {name for name in before if name.endswith("bias") or "LayerNorm" in name}
    assert not moved & norms
    assert moved == {name for name in set(before) - norms if before[name].any()}


def test_a_divergence_names_the_remedy(tmp_path):
    def explode(model, batch):
        total, weight = task_loss("text-generation")(model, batch)
        return total * math.inf, weight

    spec = SPEC.model_copy(update={"learning_rate": 9.0})
    with pytest.raises(StepError, match=r"diverged.*optimiser step 0; lower learning_rate \(now 9\).*to 0\.9"):
        train(tiny.network("llama"), tiny.language(), spec, tiny.context(tmp_path), loss=explode)


def test_fp16_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(StepError, match="precision: auto"):
        _run(tmp_path, spec=SPEC.model_copy(update={"precision": "fp16"}))


def test_bf16_trains_and_keeps_float_weights(tmp_path):
    model, trained, _ = _run(tmp_path, spec=SPEC.model_copy(update={"precision": "bf16"}))
    assert trained.precision == "bf16"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert trained.progress.best_loss < trained.progress.first_loss


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from specs.schema.steps.finetune import TrainingSpec
from tasks.finetune.loop import train
from tests.tasks import tiny

def emit(event):
    if event.get("name") == "train_loss" and event["step"] == 6:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
ctx = tiny.context(Path(sys.argv[1]), "text-classification", emit=emit)
train(tiny.network("bert"), tiny.sentences(), TrainingSpec.model_validate_json(sys.argv[2]), ctx)
"""


def test_a_killed_training_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    spec = SPEC.model_copy(update={"save_every": 0.0, "gradient_accumulation_steps": 2})
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed"), spec.model_dump_json()],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        timeout=200,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (tmp_path / "killed/checkpoints/tmp-000000006").mkdir()  # as if the kill had come while it was written
    resumed, trained, events = _run(tmp_path / "killed", "bert", spec)
    assert {"event": "note", "text": "continued from step 5 of 8"} in events
    assert [step for step, _ in _curve(events, "train_loss")] == [6, 7, 8]
    whole, expected, _ = _run(tmp_path / "whole", "bert", spec)
    assert _bits(resumed) == _bits(whole)
    assert trained.progress == expected.progress
    assert not list((tmp_path / "killed/checkpoints").glob("tmp-*"))


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, file, damage):
    for step in (1, 2, 3):
        checkpoints.save(tmp_path, step, {"a": torch.arange(100.0) * step}, {"best_loss": 1 / 3})
    path = tmp_path / "step-000000003" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[:-5])
    found, damaged = checkpoints.load_latest(tmp_path)
    assert found is not None
    assert found.step == 2
    assert torch.equal(found.tensors["a"], torch.arange(100.0) * 2)
    assert found.state == {"best_loss": 1 / 3}
    assert len(damaged) == 1
    assert "step-000000003 is damaged" in damaged[0]


def test_training_goes_on_from_the_last_good_checkpoint(tmp_path):
    spec = SPEC.model_copy(update={"save_every": 0.0})
    _run(tmp_path / "a", "bert", spec.model_copy(update={"max_steps": 8}))
    newest = sorted((tmp_path / "a/checkpoints").iterdir())[-1]
    (newest / "state.json").write_text("{}")
    resumed, trained, _ = _run(tmp_path / "a", "bert", spec)
    whole, _, _ = _run(tmp_path / "b", "bert", spec)
    assert len(trained.warnings) == 1
    assert _bits(resumed) == _bits(whole)


def test_two_checkpoints_are_kept(tmp_path):
    for step in range(1, 5):
        checkpoints.save(tmp_path, step, {"a": torch.zeros(1)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000003", "step-000000004"]


def test_several_labels_are_learned_one_by_one():
    model, data = tiny.network("bert", num_labels=3), tiny.sentences(count=4)
    labels = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], np.int32)
    batch = Batches(dataclasses.replace(data, labels=labels), 0.0, 4, 0, "cpu").tensors(np.arange(4))
    with torch.no_grad():
        shares = torch.sigmoid(model(batch["input_ids"], batch["attention_mask"]).logits)
        total, weight = task_loss("text-classification")(model, batch)
    wanted = torch.tensor(labels)
    expected = -(wanted * shares.log() + (1 - wanted) * (1 - shares).log()).mean(1).sum()
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    assert int(weight) == 4


def test_weighed_classes_add_up_over_batches():
    model, data = tiny.network("bert"), tiny.sentences(count=6)
    weights = torch.tensor([0.25, 4.0])
    loss = task_loss("text-classification", class_weights=weights)
    batches = Batches(data, 0.0, 6, 0, "cpu")
    with torch.no_grad():
        parts = [loss(model, batches.tensors(np.array(rows))) for rows in ([0, 1], [2, 3, 4, 5])]
        batch = batches.tensors(np.arange(6))
        expected = torch.nn.functional.cross_entropy(
            model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"], weights
        )
    assert float(sum(a for a, _ in parts) / sum(b for _, b in parts)) == pytest.approx(float(expected), rel=1e-5)


def test_balanced_classes_count_the_same_in_training_and_validation(tmp_path):
    data = tiny.sentences(120)
    kept = np.flatnonzero((data.labels == 0) | (np.arange(120) % 8 == 0))
    data = data.take(kept)
    model, losses = tiny.network("bert"), {}
    for name in ("none", "balanced"):
        spec = SPEC.model_copy(update={"class_weights": name, "max_steps": 1})
        ctx = tiny.context(tmp_path / name, "text-classification")
        losses[name] = train(copy.deepcopy(model), data, spec, ctx).progress.first_loss
    batches = Batches(data, SPEC.validation, 8, 0, "cpu")
    batch = batches.tensors(batches.validation)
    share = np.bincount(data.labels) / len(data)
    with torch.no_grad():
        logits = model(batch["input_ids"], batch["attention_mask"]).logits
        for name, weights in (("none", [1.0, 1.0]), ("balanced", 0.5 / share)):
            expected = torch.nn.functional.cross_entropy(logits, batch["labels"], torch.tensor(weights).float())
            assert losses[name] == pytest.approx(float(expected), rel=1e-4), name
    assert losses["none"] != pytest.approx(losses["balanced"], rel=1e-3)
