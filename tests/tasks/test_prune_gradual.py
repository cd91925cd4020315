"""Zeros that come while a model trains, and zeros that stay through later training."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from specs.schema.steps.finetune import TrainingSpec
from tasks.compress.gradual import Gradual, cubic
from tasks.compress.masks import magnitude_masks
from tasks.compress.unstructured import apply, prunable
from tasks.finetune import checkpoints
from tasks.finetune.loop import Trained, train
from tasks.finetune.masks import zeros_of
from tests.tasks import tiny

SPEC = TrainingSpec(max_steps=12, batch_size=8, learning_rate=5e-3, eval_steps=4, validation=0.2, save_every=0.0)


pytestmark = pytest.mark.usefixtures("one_thread")


def gradual(model, by: Any = "magnitude", sparsity=0.5, scope: Any = "layer", ramp=0.6, every=2) -> Gradual:
    return Gradual(tuple(prunable(model)[0]), by, sparsity, scope, ramp, every)


def run(folder, masks=None, model=None, spec=SPEC, emit=lambda event: None, **fields) -> tuple[Any, Trained]:
    model = model or tiny.network("llama")
    masks = gradual(model, **fields) if masks is None and fields else masks
    return model, train(model, tiny.language(), spec, tiny.context(folder, emit=emit), masks=masks)


def bits(model):
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def test_the_schedule_by_hand():
    found = [cubic(step, 2, 6, 0.8) for step in range(9)]
    by_hand = [0, 0, 0, 0.8 * (1 - 27 / 64), 0.8 * (1 - 1 / 8), 0.8 * (1 - 1 / 64), 0.8, 0.8, 0.8]
    assert found == pytest.approx(by_hand)
    assert all(one <= other for one, other in itertools.pairwise(found))
    assert cubic(0, 0, 0, 0.5) == 0.5


@pytest.mark.parametrize("by", ["magnitude", "movement"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_final_sparsity_is_exact_and_the_best_weights_have_it(tmp_path, by, scope):
    model, trained = run(tmp_path, by=by, sparsity=0.6, scope=scope)
    weights, _ = prunable(model)
    counts = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    if scope == "layer":
        assert counts == {name: round(0.6 * weight.numel()) for name, weight in weights.items()}
    else:
        assert sum(counts.values()) == round(0.6 * sum(weight.numel() for weight in weights.values()))
        assert len({count / weights[name].numel() for name, count in counts.items()}) > 2
    assert all(torch.equal(weights[name] != 0, mask) for name, mask in trained.kept.items())
    assert trained.progress.best_step > 8, "what was measured before the last masks does not count"


def test_masks_follow_the_magnitudes_of_kept_and_dropped_weights():
    """A weight that was dropped keeps its value, and comes back when the others have become smaller."""
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    masks = Gradual(("w",), "magnitude", 0.5, "layer", 1.0, 1)
    assert masks.start({"w": weight}, 5, 0)["w"].all()
    shares = []
    for step in range(5):
        weight.grad = torch.zeros(4)
        kept = masks.at(step, {"w": weight})["w"]
        shares.append(kept.tolist())
        assert torch.equal(weight != 0, kept)
        if step == 1:  # 0.29 of four is one: the first is dropped; then the others shrink
            with torch.no_grad():
                weight.copy_(torch.tensor([0.0, 0.5, 0.4, 4.0]))
        assert masks.settled(step + 1) == (step == 4)
    assert shares[0] == [True] * 4
    assert shares[1] == [False, True, True, True]
    assert shares[2:] == [[True, False, False, True]] * 3
    assert weight.tolist() == [1, 0, 0, 4]


def test_movement_scores_are_sums_of_weight_times_gradient():
    weight = torch.nn.Parameter(torch.tensor([1.0, -1.0, 2.0, 0.5]))
    masks = Gradual(("w",), "movement", 0.5, "layer", 1.0, 2)
    masks.start({"w": weight}, 5, 0)
    score = torch.zeros(4)
    gradients = ([1.0, 1, -1, 0], [1.0, 1, -1, 0], [0, -9.0, 0, 0], [0, 0, 0, float("nan")], [0, 0, 9.0, 0])
    values = weight.detach().clone()  # nothing moves them, so that what is dropped keeps them too
    for step, gradient in enumerate(gradients):
        weight.grad = torch.tensor(gradient)
        masks.at(step, {"w": weight})
        if not any(value != value for value in gradient):
            score -= values * weight.grad
    assert score.tolist() == [-2, -7, -14, 0]
    assert torch.nonzero(weight == 0).flatten().tolist() == [1, 2]


def test_what_was_zero_before_stays_zero(tmp_path):
    for by in ("magnitude", "movement"):
        model = tiny.network("llama")
        first = magnitude_masks(prunable(model)[0], 0.3, "layer")
        apply(model, first)
        pruned, _ = run(tmp_path / by, model=model, masks=gradual(model, by=by, sparsity=0.5))
        for name, weight in prunable(pruned)[0].items():
            assert torch.all(weight[~first[name]] == 0)
            assert int((weight == 0).sum()) == round(weight.numel() / 2)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("by", ["magnitude", "movement"])
@pytest.mark.parametrize("at", [3, 6, 11])
def test_a_killed_training_ends_with_the_same_zeros_and_weights(tmp_path, by, at):
    def emit(event):
        if event.get("name") == "train_loss" and event["step"] == at:
            raise _Killed

    with pytest.raises(_Killed):
        run(tmp_path / "killed", by=by, scope="global", emit=emit)
    found, _ = checkpoints.load_latest(tmp_path / "killed/checkpoints")
    assert found is not None
    assert found.step == at - 1
    resumed, _ = run(tmp_path / "killed", by=by, scope="global")
    whole, _ = run(tmp_path / "whole", by=by, scope="global")
    assert bits(resumed) == bits(whole)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_training_has_its_zeros(tmp_path, steps):
    spec = SPEC.model_copy(update={"max_steps": steps, "warmup": 0.9})
    model, _ = run(tmp_path, spec=spec, by="movement", ramp=1.0, every=None)
    for weight in prunable(model)[0].values():
        assert int((weight == 0).sum()) == round(weight.numel() / 2)


def test_early_stopping_waits_for_the_last_masks(tmp_path):
    spec = SPEC.model_copy(
        update={"max_steps": 30, "learning_rate": 0.3, "eval_steps": 2, "early_stopping_patience": 2}
    )
    _, trained = run(tmp_path, spec=spec, by="magnitude")
    assert trained.progress.best_step >= 3 + round(0.6 * 27) + 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_later_training_keeps_the_zeros_unless_told_otherwise(tmp_path, kind):
    ends = {}
    for keep in (True, False):
        model = tiny.network(kind)
        masks = magnitude_masks(prunable(model)[0], 0.5, "layer")
        apply(model, masks)
        task = "text-classification" if kind == "bert" else "text-generation"
        data = tiny.sentences() if kind == "bert" else tiny.language()
        spec = SPEC.model_copy(update={"keep_zeros": keep, "max_steps": 3, "validation": 0.0})
        ends[keep] = train(model, data, spec, tiny.context(tmp_path / str(keep), task))
        weights, _ = prunable(model)
        still = all(bool((weights[name][~mask] == 0).all()) for name, mask in masks.items())
        assert still == keep
        assert not keep or all(torch.equal(weights[name] != 0, mask) for name, mask in masks.items())
    assert set(ends[True].kept) == set(masks)
    assert not ends[False].kept


def test_zeros_that_no_pruning_made_are_let_go():
    """The row of a table for padding, and a layer that starts from 0."""
    model: Any = tiny.network("llama", tie_word_embeddings=True)
    assert zeros_of(model) == {}
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 0
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 0
    assert list(zeros_of(model)) == ["model.layers.1.mlp.down_proj.weight"]
