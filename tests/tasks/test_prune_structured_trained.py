"""Structured pruning of a model that has learned: what counts as important is what the model needs."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from specs.schema.steps.finetune import TrainingSpec
from specs.schema.steps.prune import PruneSpec
from tasks.compress.structured import _WAYS
from tasks.finetune.batches import Batches
from tasks.finetune.loop import train
from tasks.finetune.objective import task_loss
from tests.tasks import tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny Llama that has learned which token follows which, and a context."""
    ctx = tiny.context(tmp_path_factory.mktemp("trained"), threads=1)
    model = tiny.network("llama", num_hidden_layers=3)
    spec = TrainingSpec(max_steps=150, batch_size=16, learning_rate=1e-2, validation=0)
    train(model, tiny.language(), spec, ctx)
    return model, ctx


def loss(model: Any) -> float:
    """Nats of a token of sequences that it has learned."""
    data = tiny.language()
    with torch.no_grad():
        total, weight = task_loss("text-generation")(model, Batches(data, 0.0, 64, 0, "cpu").tensors(np.arange(96)))
    return float(total / weight)


@pytest.mark.parametrize("importance", ["activation", "taylor"])
@pytest.mark.parametrize("method", ["width", "depth"])
def test_what_is_important_stays(trained, method, importance):
    model, ctx = trained
    spec = PruneSpec(uses="prune", id="p", method=method, keep="50%", importance=importance)
    way = _WAYS[method](copy.deepcopy(model), spec)
    scores = way.scores(tiny.language(), ctx)
    best, _ = way.cut(scores, way.shape(0.5))
    worst, _ = way.cut({name: -score for name, score in scores.items()}, way.shape(0.5))
    assert loss(model) < loss(best) < loss(worst)


def test_principal_directions_lose_less_than_single_numbers(trained):
    model, ctx = trained
    found = {}
    for how in ("channels", "pca"):
        spec = PruneSpec(uses="prune", id="p", method="width", keep="75%", parts=["hidden"], hidden_by=how)
        way = _WAYS["width"](copy.deepcopy(model), spec)
        found[how] = loss(way.cut(way.scores(tiny.language(), ctx), way.shape(0.75))[0])
    assert loss(model) < found["pca"] < found["channels"], found


def test_training_brings_the_quality_back(trained, tmp_path):
    model, ctx = trained
    way = _WAYS["width"](copy.deepcopy(model), PruneSpec(uses="prune", id="p", method="width", keep="50%"))
    small, _ = way.cut(way.scores(tiny.language(), ctx), way.shape(0.5))
    before = loss(small)
    spec = TrainingSpec(max_steps=60, batch_size=16, learning_rate=5e-3, validation=0)
    train(small, tiny.language(), spec, tiny.context(tmp_path, threads=1))
    assert loss(small) < loss(model) + 0.5 * (before - loss(model))
