"""The step ``adaptive_input``: what it writes and says, for every family."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from specs.schema.steps.adaptive_input import AdaptiveInputSpec
from specs.schema.steps.finetune import FinetuneSpec
from specs.schema.steps.prune import PruneSpec
from specs.schema.steps.quantize import QuantizeSpec
from tasks.adaptive_input.adaptive_input import adaptive_input
from tasks.adaptive_input.bands import Measured
from tasks.adaptive_input.curves import metric
from tasks.adaptive_input.information import unigram
from tasks.adaptive_input.layout import index_bytes
from tasks.adaptive_input.table import tables
from tasks.compress.calibrate import outputs
from tasks.compress.prune import prune
from tasks.compress.quantize import quantize, relative_error
from tasks.context import StepError
from tasks.data import encode
from tasks.evaluate.footprint import of_model
from tasks.finetune.finetune import finetune
from tests.support import as_artifact, context, tiny_model
from tests.tasks.banded import load, loss_of, run, spec_of, task_of

FAMILIES = ("llama", "gpt2", "bert", "marian", "t5", "whisper")


pytestmark = pytest.mark.usefixtures("one_thread")


def _examples(ctx, folder):
    return encode(ctx.data, "train", ctx.task, folder, ctx.store).take(slice(0, 4))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_a_smaller_table_that_loads(request, tmp_path, family):
    ctx, result = run(request, tmp_path, family, ratio="4x")
    about = result.properties["adaptive_input"]
    assert about["bytes"] <= about["budget"]
    source = request.getfixturevalue(family)
    network = load(ctx.out)
    assert all(torch.isfinite(made.expanded()).all() for made in tables(network))  # what never occurs, too
    before, after = (outputs(load(folder), _examples(ctx, source)) for folder in (source, ctx.out))
    assert torch.isfinite(after).all()
    assert 0 < relative_error(before, after) < 0.6
    if task_of(family) != "text-classification":
        ids = torch.tensor([[5, 6, 7]])
        if task_of(family) == "text-generation":
            assert network.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > 3
    # Nothing dense is left of what was replaced, and the bytes in the file are the bytes that were told.
    rows = network.config.vocab_size
    state = load_file(ctx.out / "model.safetensors")
    dense = [name for name, tensor in state.items() if tensor.shape[:1] == (rows,) and tensor.ndim == 2]
    assert dense == []
    told = sum(tensor.nbytes for name, tensor in state.items() if ".table." in name)
    assert told < about["bytes"] < told + 200 * len([name for name in state if ".table." in name])
    assert result.touched
    assert sum(band["band"]["count"] for band in about["tables"][0]["bands"]) == rows
    assert sum(band["text"] for band in about["tables"][0]["bands"]) == pytest.approx(1)
    assert (ctx.out / "adaptive_input.svg").read_bytes().startswith(b"<?xml")


def test_two_runs_give_the_same_bytes(request, tmp_path):
    digests = []
    for name in ("a", "b"):
        ctx, _ = run(request, tmp_path / name, "gpt2", ratio="5x", heal={"max_steps": 2, "batch_size": 4})
        digests.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in ctx.out.iterdir()})
    assert digests[0] == digests[1]


def test_almost_the_whole_budget_gives_the_dense_table_back(request, tmp_path):
    ctx, _ = run(request, tmp_path, "gpt2", ratio="1.2x", bits=(16,), bands=1)
    dense = load(request.getfixturevalue("gpt2")).get_input_embeddings().weight
    got = load(ctx.out).get_input_embeddings().weight
    torch.testing.assert_close(got, dense.detach(), rtol=1e-3, atol=1e-4)


def test_parameters_are_counted_as_numbers_and_not_as_bytes(request, tmp_path):
    ctx, result = run(request, tmp_path, "gpt2", ratio="6x", bits=(4,), bands=1)
    band = result.properties["adaptive_input"]["tables"][0]["bands"][0]["band"]
    network = load(ctx.out)
    rest = sum(parameter.numel() for parameter in network.parameters())
    projection = band["rank"] * 32 if band["projected"] else 0
    assert of_model(ctx.out).parameters == rest + band["count"] * band["rank"] + projection + 32


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("untied"), "llama", "text-generation", tie_word_embeddings=False)


@pytest.mark.parametrize("head", ["joint", "separate", "leave"])
def test_an_output_layer_of_its_own(untied, text_data, tmp_path, head):
    ctx = context(tmp_path, "text-generation", text_data)
    result = adaptive_input(as_artifact(untied), spec=spec_of(ratio="5x", head=head), ctx=ctx)
    about = result.properties["adaptive_input"]
    dense = 4 * 320 * 32 * (1 if head == "leave" else 2)
    assert about["bytes_before"] == dense
    assert about["bytes"] <= about["budget"] == dense // 5
    network = load(ctx.out)
    assert len(tables(network)) == (1 if head == "leave" else 2)
    assert isinstance(network.get_output_embeddings(), torch.nn.Linear) == (head == "leave")
    assert ("lm_head" in result.left) == (head == "leave")
    if head == "separate":
        assert all(one["bytes"] <= about["budget"] / 2 for one in about["tables"])


@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_tables_share_the_budget_by_what_they_cost_the_model(scale):
    """Against every pair of options of one band."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(300, 8, generator=generator) * size for size in (1.0, 3.0)]
    moments = [torch.eye(8, dtype=torch.float64) * size for size in (scale, 1.0)]
    found = Measured(weights, [metric(8, one) for one in moments], unigram(np.ones(300, int)), (8, 4, 2, 1), 1)
    options = [found.options[at][0, curves.segments] for at, curves in enumerate(found.curves)]
    budget = sum(min(one.bytes for one in of) for of in options) + 1500
    shares = [layout.layout.bytes for layout in found.allocate(budget + 2 * index_bytes(300)) or ()]
    lost = [
        (scale * found.curves[0].energy * one.cost + found.curves[1].energy * other.cost, one.bytes, other.bytes)
        for one, other in itertools.product(*options)
        if one.bytes + other.bytes <= budget
    ]
    assert [share - index_bytes(300) for share in shares] == list(min(lost)[1:])
    assert (shares[0] > shares[1]) == (scale > 9)


def test_contextual_information_moves_precision(request, tmp_path):
    ctx, result = run(request, tmp_path, "gpt2", ratio="5x", information="contextual")
    assert result.properties["adaptive_input"]["information"] == "contextual"
    assert torch.isfinite(outputs(load(ctx.out), _examples(ctx, ctx.out))).all()


def test_factors_are_trained_from_scratch(request, tmp_path):
    llama, data = request.getfixturevalue("llama"), request.getfixturevalue("text_data")
    ctx = context(tmp_path / "a", "text-generation", data)
    spec = AdaptiveInputSpec(uses="adaptive_input", id="a", ratio=3.0, method="adaptive", bands=3)
    result = adaptive_input(as_artifact(llama), spec=spec, ctx=ctx)
    about = result.properties["adaptive_input"]
    assert about["bytes"] <= about["budget"]
    after = dataclasses.replace(context(tmp_path / "b", "text-generation", data), store=ctx.store)
    training = FinetuneSpec(uses="finetune", id="t", max_steps=60, batch_size=16, learning_rate=1e-2, validation=0)
    finetune(as_artifact(ctx.out), spec=training, ctx=after)
    first, second = load_file(ctx.out / "model.safetensors"), load_file(after.out / "model.safetensors")
    learned = {name for name in first if name.endswith("_float") and not torch.equal(first[name], second[name])}
    assert learned == {name for name in first if name.endswith("_float")}
    assert loss_of(after.out, after) < loss_of(ctx.out, ctx) - 1
    network = load(after.out)
    ids = torch.tensor([[5, 6, 7]])
    assert network.generate(ids, max_new_tokens=4, do_sample=True, temperature=0.7, top_k=5).shape[1] > 3
    with torch.inference_mode():
        shares = network(input_ids=ids).logits.softmax(-1).sum(-1)  # one distribution over every token of every band
    torch.testing.assert_close(shares, torch.ones(1, 3))


def test_an_adaptive_softmax_is_one_distribution_that_trains_and_writes(request, tmp_path):
    tied, data = request.getfixturevalue("gpt2"), request.getfixturevalue("text_data")
    ctx = context(tmp_path / "a", "text-generation", data)
    spec = spec_of(ratio=1.5, method="adaptive", softmax="adaptive", bits=None)
    about = adaptive_input(as_artifact(tied), spec=spec, ctx=ctx).properties["adaptive_input"]
    assert about["bytes"] <= about["budget"]
    after = dataclasses.replace(context(tmp_path / "b", "text-generation", data), store=ctx.store)
    training = FinetuneSpec(uses="finetune", id="t", max_steps=30, batch_size=16, learning_rate=1e-2, validation=0)
    finetune(as_artifact(ctx.out), spec=training, ctx=after)
    assert loss_of(after.out, after) < loss_of(ctx.out, ctx) - 1
    network = load(after.out)
    head = network.get_output_embeddings()
    assert len(head.table.layout.bands) > 1
    assert head.table is network.get_input_embeddings().table  # tied: nothing dense stands beside the factors
    ids = torch.arange(320).view(10, 32)
    with torch.inference_mode():
        logs = network(input_ids=ids).logits
        with head.passing():
            hidden = network(input_ids=ids).logits
        told = head.surprisal(hidden.flatten(0, 1), ids.flatten())
        torch.testing.assert_close(logs.logsumexp(-1), torch.zeros(10, 32), atol=1e-5, rtol=0)
        torch.testing.assert_close(told, -logs.gather(-1, ids[..., None]).flatten())
        expected = _by_hand(head, hidden[0, 0])
    torch.testing.assert_close(logs[0, 0], expected)
    written = network.generate(ids[:1, :4], max_new_tokens=6, do_sample=False)
    assert written[0, 4] == logs[0, 3].argmax()
    both = network.generate(ids[:1, :4], max_new_tokens=6, num_beams=2, do_sample=True, top_p=0.9, temperature=0.8)
    assert both.shape[1] > 4


def _by_hand(head, x):
    """The log-probability of every token behind ``x``, one after the other, from the definition."""
    table = head.table
    vectors, band = table.expanded(), table.band_of.long()
    first = torch.cat([vectors[band == 0] @ x, head.others @ x])
    logs = torch.empty(len(vectors))
    for token in range(len(vectors)):
        score = vectors[token] @ x
        if band[token] == 0:
            logs[token] = score - first.logsumexp(0)
        else:
            own = head.others[band[token] - 1] @ x - first.logsumexp(0)
            logs[token] = own + score - (vectors[band == band[token]] @ x).logsumexp(0)
    return logs


def test_later_steps_keep_the_tables(request, tmp_path):
    ctx, _ = run(request, tmp_path / "a", "gpt2", ratio="5x")
    after = dataclasses.replace(context(tmp_path / "b", "text-generation", ctx.data), store=ctx.store)
    training = FinetuneSpec(uses="finetune", id="t", max_steps=2, batch_size=4, learning_rate=1e-3, validation=0)
    finetune(as_artifact(ctx.out), spec=training, ctx=after)
    first, second = load_file(ctx.out / "model.safetensors"), load_file(after.out / "model.safetensors")
    assert first.keys() == second.keys()
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed
    assert not any(".table." in name for name in changed)
    packed = dataclasses.replace(context(tmp_path / "c", "text-generation", ctx.data), store=ctx.store)
    quantize(as_artifact(after.out), spec=QuantizeSpec(uses="quantize", id="q"), ctx=packed)
    assert torch.isfinite(outputs(load(packed.out), _examples(ctx, ctx.out))).all()
    assert len(tables(load(packed.out))) == len(tables(load(ctx.out)))
    with pytest.raises(StepError, match="in bands already"):
        adaptive_input(as_artifact(after.out), spec=spec_of(ratio="5x"), ctx=packed)
    # The plan refuses these, unless the step might have left the model as it was.
    for fields in ({"method": "width", "keep": "50%"}, {"method": "depth", "keep": "50%"}, {"method": "vocabulary"}):
        shape = PruneSpec.model_validate({"uses": "prune", "id": "p"} | fields)
        with pytest.raises(StepError, match="put that step behind this one"):
            prune(as_artifact(after.out), spec=shape, ctx=packed)


def test_the_scores_of_a_large_vocabulary_are_computed_a_few_at_a_time(request, tmp_path, monkeypatch):
    from tasks.adaptive_input import information

    network, shapes = load(request.getfixturevalue("gpt2")), []
    ctx = context(tmp_path, "text-generation", request.getfixturevalue("text_data"))
    data = _examples(ctx, request.getfixturevalue("gpt2"))
    whole = information.surprise(network, data, 320)
    network.get_output_embeddings().register_forward_hook(lambda module, given, out: shapes.append(len(out)))
    monkeypatch.setattr(information, "_SCORES", 2 * data.length * 320)
    for found, wanted in zip(information.surprise(network, data, 320), whole, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert shapes == [2, 2]
