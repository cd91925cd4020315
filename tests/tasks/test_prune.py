import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specs.schema.steps.prune import PruneSpec
from tasks.compress.masks import magnitude_masks, quantiles, threshold_masks
from tasks.compress.unstructured import apply, plan, prunable, prunable_layers
from tasks.context import StepError
from tests.tasks import tiny


def _naive_zeros(values, count):
    """The places of the ``count`` smallest magnitudes, the first of equals first."""
    return set(sorted(range(len(values)), key=lambda at: (abs(values[at]), at))[:count])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=40), st.floats(0, 1))
def test_exactly_the_smallest_are_dropped_whatever_the_ties(values, sparsity):
    masks = magnitude_masks({"w": torch.tensor(values, dtype=torch.float32)}, sparsity, "layer")
    dropped = {at for at, keep in enumerate(masks["w"].tolist()) if not keep}
    zeros = {at for at, value in enumerate(values) if value == 0}
    assert dropped == _naive_zeros(values, round(sparsity * len(values))) | zeros


def test_a_layer_scope_holds_in_each_and_a_global_one_over_all():
    weights = {"small": torch.tensor([[0.1, -0.2], [0.3, -0.4]]), "large": torch.tensor([1.0, -2.0, 3.0, -4.0])}
    layer = magnitude_masks(weights, 0.5, "layer")
    assert layer["small"].tolist() == [[False, False], [True, True]]
    assert layer["large"].tolist() == [False, False, True, True]
    whole = magnitude_masks(weights, 0.5, "global")
    assert not whole["small"].any()
    assert whole["large"].all()


def test_zeros_count_toward_the_sparsity_and_stay_dropped():
    weights = {"w": torch.tensor([0.0, 5.0, 0.0, 1.0, 2.0, 3.0])}
    assert magnitude_masks(weights, 0.5, "layer")["w"].tolist() == [False, True, False, False, True, True]
    assert magnitude_masks(weights, 1 / 6, "layer")["w"].tolist() == [False, True, False, True, True, True]


def test_a_threshold_keeps_what_reaches_it():
    masks = threshold_masks({"w": torch.tensor([-0.2, 0.1, 0.0, 0.3, -0.1])}, 0.2)
    assert masks["w"].tolist() == [True, False, False, True, False]


def test_quantiles_are_those_of_the_sorted_magnitudes():
    found = quantiles({"a": torch.arange(1.0, 51.0), "b": -torch.arange(51.0, 101.0)})
    assert found[0.5] == 50
    assert found[0.99] == 99


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("gpt2", True), ("bert", False)])
def test_the_inside_is_pruned_and_the_head_is_left_with_the_reason(kind, tied):
    model = tiny.network(kind, tie_word_embeddings=tied)
    weights, left = prunable(model)
    head = "classifier" if kind == "bert" else "lm_head"
    assert set(left) == {head}
    assert left[head].startswith("tied to ") == tied
    assert len(weights) == {"llama": 14, "gpt2": 8, "bert": 13}[kind]
    assert not any("embed" in name or "wte" in name or "norm" in name.lower() for name in weights)


@pytest.mark.parametrize(
    ("fields", "found", "suggested"),
    [
        ({"method": "threshold", "threshold": 1e-9}, "no weight", "threshold: "),
        ({"method": "threshold", "threshold": 50.0}, "every weight", "threshold: "),
        ({"sparsity": "0.0001%"}, "no weight", "sparsity: 50%"),
        ({"sparsity": "99.9999%"}, "every weight", "sparsity: 50%"),
    ],
)
def test_nothing_and_everything_are_refused_with_a_value_that_works(fields, found, suggested):
    layers, _ = prunable_layers(tiny.network("llama"))
    spec = PruneSpec(uses="prune", id="p", **fields)
    with pytest.raises(StepError, match=f"sets {found} to zero.*50%: 0.0.*write for example {suggested}") as caught:
        plan(layers, spec)
    key, _, value = str(caught.value).rpartition("write for example ")[2].partition(": ")
    masks = plan(layers, spec.model_copy(update={key: float(value.rstrip("%")) / (100 if "%" in value else 1)}))
    kept = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    assert kept == pytest.approx(0.5, abs=0.01)


def test_pruning_again_to_the_same_sparsity_is_refused():
    model = tiny.network("llama")
    layers, _ = prunable_layers(model)
    spec = PruneSpec(uses="prune", id="p", sparsity=0.5)
    apply(model, plan(layers, spec))
    with pytest.raises(StepError, match="sets no weight to zero"):
        plan(layers, spec)


def test_apply_zeroes_the_dropped_and_nothing_else():
    model = tiny.network("gpt2")
    before = copy.deepcopy(model.state_dict())
    masks = plan(prunable_layers(model)[0], PruneSpec(uses="prune", id="p", sparsity=0.7, scope="global"))
    apply(model, masks)
    for name, tensor in model.state_dict().items():
        expected = before[name] * masks[name] if name in masks else before[name]
        assert torch.equal(tensor, expected), name
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.7 * total)
