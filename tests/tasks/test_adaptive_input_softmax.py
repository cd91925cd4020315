"""The adaptive softmax of the step ``adaptive_input``: that the output layer has one where a spec asks for it, and that
models with bands compute in every type."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tasks.adaptive_input import table
from tasks.adaptive_input.adaptive_input import adaptive_input, stored_table
from tasks.adaptive_input.allocate import allocate
from tasks.adaptive_input.bands import Measured
from tasks.adaptive_input.curves import metric
from tasks.adaptive_input.information import unigram
from tasks.adaptive_input.places import places
from tasks.adaptive_input.preflight import look
from tasks.context import StepError
from tests.support import as_artifact, context, tiny_model
from tests.tasks.banded import load, spec_of

pytestmark = pytest.mark.usefixtures("one_thread")

ADAPTIVE = {"method": "adaptive", "softmax": "adaptive", "bits": None}


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("untied"), "llama", "text-generation", tie_word_embeddings=False)


def test_an_output_layer_gets_several_bands_where_one_would_lose_less(untied, text_data, tmp_path):
    data = text_data.model_copy(update={"train_limit": 24})
    ctx = context(tmp_path, "text-generation", data)
    result = adaptive_input(as_artifact(untied), spec=spec_of(ratio="3x", **ADAPTIVE), ctx=ctx)
    layer = load(ctx.out).get_output_embeddings()
    assert len(layer.table.layout.bands) > 1
    assert hasattr(layer, "surprisal")
    about = result.properties["adaptive_input"]
    assert about["bytes"] <= about["budget"]


def test_the_least_budget_of_the_plan_is_enough_for_the_step(untied, text_data, tmp_path):
    config = {"vocab_size": 320, "hidden_size": 32, "tie_word_embeddings": False}
    problems, _ = look(spec_of(budget="2 KiB", **ADAPTIVE), config, "text-generation", 32)
    least = int(problems[0].split("smallest takes ")[1].split()[0])
    ctx = context(tmp_path, "text-generation", text_data.model_copy(update={"train_limit": 24}))
    result = adaptive_input(as_artifact(untied), spec=spec_of(budget=least, **ADAPTIVE), ctx=ctx)
    assert result.properties["adaptive_input"]["bytes"] <= least
    with pytest.raises(StepError, match="smallest takes"):
        adaptive_input(as_artifact(untied), spec=spec_of(budget=least - 1, **ADAPTIVE), ctx=ctx)


def test_a_vocabulary_without_two_bands_is_refused():
    config = {"vocab_size": 31, "hidden_size": 32, "tie_word_embeddings": True}
    problems, _ = look(spec_of(ratio="2x", **ADAPTIVE), config, "text-generation", 32)
    assert "over two bands of 16 tokens at least, and the vocabulary has 31; leave softmax out" in problems[0]


@pytest.mark.parametrize("at", [None, [1]])
def test_the_table_of_the_output_layer_alone_must_have_several_bands(at):
    weights = [torch.ones(64, 8), torch.ones(64, 8)]  # of which one band says all
    found = Measured(weights, [metric(8, None)] * 2, unigram(np.ones(64, int)), (32,), 3)
    assert [len(one.layout.bands) for one in found.allocate(9000, at) or ()] == [1] * (1 if at else 2)
    assert [len(one.layout.bands) for one in found.allocate(9000, at, [1]) or ()] == ([2] if at else [1, 2])


def test_a_table_gets_no_fewer_bands_than_it_must():
    runs = {(0, 1): [(4, 1.0)], (1, 2): [(4, 1.0)], (0, 2): [(5, 0.0)]}
    assert allocate([(2, runs)], 2, 20) == [[(0, 2, 0)]]
    assert allocate([(2, runs)], 2, 20, fewest=[2]) == [[(0, 1, 0), (1, 2, 0)]]
    assert allocate([(2, runs)], 2, 7, fewest=[2]) is None
    assert allocate([(2, runs), (2, runs)], 2, 13, fewest=[1, 2]) == [[(0, 2, 0)], [(0, 1, 0), (1, 2, 0)]]
    assert allocate([(1, runs)], 2, 20, fewest=[2]) is None


def test_what_only_just_fits_is_found_although_bytes_are_counted_in_units():
    runs = {(0, 1): [(8_191, 1.0), (9_000, 0.0)]}
    assert allocate([(1, runs)], 1, 8_191, units=4_000) == [[(0, 1, 0)]]
    assert allocate([(1, runs)], 1, 8_190, units=4_000) is None


def _in_bands(folder, bits, *, adaptive=False):
    """The model in ``folder`` with its tables in bands, all of their tokens counted alike."""
    network = load(folder)
    found, _ = places(network)
    weights = [place.weight for place in found]
    measured = Measured(weights, [metric(32, None)] * 2, unigram(np.ones(320, int)), bits, 2)
    fitted = measured.allocate(40_000, several=[0, 1]) or []
    for place, one in zip(found, fitted, strict=True):
        table.place(network, stored_table(one), place.embeddings, place.heads, adaptive and bool(place.heads))
    return network


@pytest.mark.parametrize(("bits", "adaptive"), [((4, 1), False), ((32,), False), ((32,), True)])
def test_what_comes_out_of_a_table_has_the_type_that_the_model_computes_in(untied, bits, adaptive):
    network, ids = _in_bands(untied, bits, adaptive=adaptive), torch.arange(24).view(2, 12)
    stored = {name: tensor.clone() for name, tensor in network.state_dict().items() if ".table." in name}
    exact = network(input_ids=ids).logits.detach()
    for dtype, close in ((torch.float16, 0.01), (torch.bfloat16, 0.1), (torch.float64, 1e-4), (torch.float32, 0.1)):
        network.to(dtype)
        for mode in (torch.no_grad(), torch.enable_grad()):  # expanded, and through the factors
            with mode:
                assert network.get_input_embeddings()(ids).dtype == dtype
                logits = network(input_ids=ids).logits.detach()
        assert network.get_input_embeddings().weight.dtype == network.get_output_embeddings().weight.dtype == dtype
        torch.testing.assert_close(logits.float(), exact, atol=close, rtol=0.05)
        assert network.generate(ids[:, :4], max_new_tokens=2, do_sample=False).shape == (2, 6)
        exact = network.float()(input_ids=ids).logits.detach()  # the other weights were rounded
    for name, tensor in network.state_dict().items():
        assert ".table." not in name or torch.equal(tensor, stored[name])


def test_factors_learn_under_autocast(untied):
    network, ids = _in_bands(untied, (32,)), torch.arange(320).view(10, 32)
    with torch.autocast("cpu", torch.bfloat16):
        network(input_ids=ids, labels=ids).loss.backward()
    learned = {name: one.grad for name, one in network.named_parameters() if name.endswith("_float")}
    assert learned
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() and grad.any() for grad in learned.values())
