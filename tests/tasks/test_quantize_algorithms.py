"""GPTQ, AWQ, SmoothQuant and the choice of bits, each against a reference written for reading."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.compress.bits import choose
from tasks.compress.calibrate import outputs
from tasks.compress.gptq import gptq, output_error
from tasks.compress.grid import round_to, scale_of
from tasks.compress.quantize import relative_error
from tasks.compress.rescale import move, shared_inputs, undivided
from tasks.compress.round_by_data import inputs_of, ranges_of, round_by_awq, round_by_gptq, share_outside, smooth
from tasks.compress.scaling import GRID, awq_scale, smooth_scale
from tasks.compress.selection import select
from tasks.context import StepError
from tasks.models.anatomy import anatomy
from tests.tasks import tiny

KINDS = ("llama", "gpt2", "bert", "marian", "t5", "whisper", "wav2vec2")


def _network(kind, **fields):
    make = tiny.network if kind in ("llama", "gpt2", "bert") else tiny.writer
    return make(kind, **fields)


def _data(kind, count=6):
    if kind in ("marian", "t5"):
        return tiny.pairs(count)
    if kind in ("whisper", "wav2vec2"):
        return tiny.recordings(kind, count)
    return (tiny.sentences if kind == "bert" else tiny.language)(count=count)


def _moments(rows, columns, count, seed):
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=random) / columns**0.5 + torch.eye(columns)
    x = torch.randn(count, columns, generator=random) @ mix
    return torch.randn(rows, columns, generator=random), x, (x.T @ x).double() / count


def _naive_gptq(weight, hessian, bits, size, damping):
    """The paper's recursion with the whole inverse, updated after every column (its equations 2 and 3)."""
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverse = torch.linalg.inv(damped)
    left, found = weight.double().clone(), torch.zeros_like(weight)
    for at in range(weight.shape[1]):
        if at % size == 0:
            scale = scale_of(left[:, at : at + size].float(), bits)
        low, high = (-8, 7) if bits == 4 else (-127, 127)
        found[:, at] = torch.round(left[:, at].float() / scale).clamp(low, high) * scale
        error = (left[:, at] - found[:, at]) / inverse[at, at]
        left -= error[:, None] * inverse[at]
        inverse = inverse - inverse[:, at : at + 1] @ inverse[at : at + 1] / inverse[at, at]
    return found


@pytest.mark.parametrize(("columns", "group"), [(24, None), (24, 8), (200, 64), (150, 32)])
def test_gptq_is_the_papers_recursion(columns, group):
    weight, _, hessian = _moments(4, columns, 400, 1)
    rounded, kept = gptq(weight, hessian, 4, group)
    naive = _naive_gptq(weight, hessian, 4, group or columns, 0.01)
    nearest = round_to(weight, 4, group)
    better = output_error(naive - weight, hessian) < output_error(nearest.weight - weight, hessian)
    expected = torch.where(better[:, None], naive, nearest.weight)
    assert kept == int((~better).sum())
    assert (rounded.weight != expected).float().mean() < 0.02  # float32 may tip a value that lies half way
    total = output_error(rounded.weight - weight, hessian).sum()
    assert total < 0.8 * output_error(nearest.weight - weight, hessian).sum()


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(2, 40),
    count=st.integers(1, 60),
    seed=st.integers(0, 2**31),
    group=st.sampled_from([None, 8]),
    order=st.booleans(),
    bits=st.sampled_from([4, 8]),
)
def test_gptq_is_never_worse_than_the_nearest_on_what_it_saw(rows, columns, count, seed, group, order, bits):
    weight, x, hessian = _moments(rows, columns, count, seed)
    x[:, 0] = 0  # an input that is never used
    hessian[0], hessian[:, 0] = 0, 0
    rounded, kept = gptq(weight, hessian, bits, group, act_order=order)
    ours = ((rounded.weight - weight).double() @ x.T.double()).square().sum(1)
    nearest = ((round_to(weight, bits, group).weight - weight).double() @ x.T.double()).square().sum(1)
    assert (ours <= nearest * (1 + 1e-6) + 1e-9).all()
    assert 0 <= kept <= rows


@pytest.mark.parametrize("order", [False, True])
def test_gptq_leaves_zeros_what_they_are(order):
    weight, _, hessian = _moments(4, 200, 400, 3)
    weight.view(-1, 4)[:, :2] = 0
    rounded, kept = gptq(weight, hessian, 4, 32, act_order=order)
    assert not rounded.codes[weight == 0].any()
    nearest = output_error(round_to(weight, 4, 32).weight - weight, hessian)
    assert kept == 0
    assert output_error(rounded.weight - weight, hessian).sum() < 0.9 * nearest.sum()


def test_the_output_error_is_that_of_the_outputs():
    weight, x, hessian = _moments(3, 10, 50, 0)
    expected = (x @ weight.T).double().square().mean(0)
    assert torch.allclose(output_error(weight, hessian), expected, rtol=1e-4)


def test_awq_takes_the_alpha_that_a_plain_search_takes():
    weight, x, hessian = _moments(6, 32, 200, 3)
    x[:, 5] *= 30
    hessian = (x.T @ x).double() / len(x)
    magnitude = x.abs().mean(0)
    stored = lambda values: round_to(values, 4, None).weight  # noqa: E731
    scale, alpha = awq_scale([weight], hessian, magnitude, [stored])
    errors = {}
    for step in range(GRID):
        tried = magnitude ** (step / GRID)
        errors[step / GRID] = float(((stored(weight * tried) / tried - weight) @ x.T).square().sum())
    # A factor common to all inputs changes no rounding but for the fp16 scale.
    assert errors[alpha] <= min(errors.values()) * 1.05
    assert errors[alpha] < 0.7 * errors[0.0]
    assert scale.argmax() == 5


def test_smoothing_shares_the_outliers_by_alpha():
    weights, largest = [torch.tensor([[1.0, 4.0, 0.0]]), torch.tensor([[-2.0, 1.0, 0.0]])], torch.tensor([8.0, 1, 5])
    assert smooth_scale(weights, largest, 0.5).tolist() == pytest.approx([2.0, 0.5, 1.0])
    assert smooth_scale(weights, largest, 1.0).tolist() == pytest.approx([8.0, 1.0, 1.0])


@pytest.mark.parametrize("kind", KINDS)
def test_moving_a_scale_changes_no_output(kind):
    model, data = _network(kind), _data(kind)
    expected = outputs(model, data)
    random = torch.Generator().manual_seed(0)
    kept, moved = {}, 0
    for groups in shared_inputs(anatomy(model)).values():
        for group in groups:
            columns = dict(model.named_modules())[group.layers[0]]
            width = columns.weight.shape[0 if type(columns).__name__ == "Conv1D" else 1]
            scale = torch.rand(width, generator=random) * 3 + 0.2
            if move(model, group, scale):
                moved += 1
            else:
                kept.update(dict.fromkeys(group.layers, scale))
    assert moved
    assert kept
    assert relative_error(expected, outputs(model, data)) > 1e-3, "the inputs of some layers are not divided yet"
    hooks = undivided(model, kept)
    difference = (outputs(model, data) - expected).abs().max()
    for hook in hooks:
        hook.remove()
    assert difference < 1e-4 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_awq_and_smoothquant_are_exact_before_rounding(kind, tmp_path, monkeypatch):
    from tasks.compress import round_by_data as calibrated

    data = _data(kind)
    expected = outputs(_network(kind), data)
    model = _network(kind)
    found = smooth(model, select(model).layers, data, tiny.context(tmp_path), 0.5)
    hooks = undivided(model, found.scales)
    assert (outputs(model, data) - expected).abs().max() < 1e-5
    assert found.folded == (4 if kind == "llama" else 0)
    assert len(found.scales) == (0 if kind == "llama" else 8)
    for hook in hooks:
        hook.remove()
    monkeypatch.setattr(calibrated, "write", lambda layer, weight: None)
    model = _network(kind)
    to = dict.fromkeys(select(model).alone, (4, 32))
    found = round_by_awq(model, to, data, tiny.context(tmp_path))
    assert max(found.alphas.values()) > 0
    undivided(model, found.scales)
    assert (outputs(model, data) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_gptq_goes_through_every_layer_in_order(kind, tmp_path):
    model, data = _network(kind), _data(kind)
    selection = select(model)
    to = dict.fromkeys(selection.alone, (4, 32))
    found = round_by_gptq(model, to, data, tiny.context(tmp_path), damping=0.01, act_order=False)
    assert set(found.rounded) == set(to)
    assert found.notes == {}
    blocks = [name for block in anatomy(model).blocks for name in block.layers]
    assert [name for name in found.kept if name in blocks] == [name for name in blocks if name in to]
    first = anatomy(model).stacks[0].blocks[0].attentions[0].query
    fresh = _network(kind)
    seen = inputs_of(fresh, [first], data, tiny.context(tmp_path))[first]
    if not anatomy(model).front_layers:
        weight = dict(fresh.named_modules())[first].weight.detach()
        weight = weight.T if first in selection.transposed else weight
        rounded, _ = gptq(weight, seen.hessian / seen.count, 4, 32)
        assert torch.equal(rounded.codes, found.rounded[first].codes)
    for name, rounded in found.rounded.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight.T if name in selection.transposed else weight, rounded.weight)


def test_a_skipped_layer_is_not_touched_by_a_scale(tmp_path):
    model, data = _network("llama"), _data("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    names = [name for name in select(model).alone if not name.endswith(("k_proj", "up_proj"))]
    found = round_by_awq(model, dict.fromkeys(names, (4, 32)), data, tiny.context(tmp_path))
    for name, weight in model.state_dict().items():
        if name.endswith(("k_proj.weight", "up_proj.weight", "layernorm.weight")):
            assert torch.equal(weight, before[name]), name
    scaled = {name.rpartition(".")[2] for name in found.scales}
    assert scaled <= {"q_proj", "v_proj", "gate_proj", "o_proj", "down_proj"}


def test_ranges_are_the_ends_of_what_was_seen(tmp_path):
    model, data = _network("llama"), _data("llama")
    name, seen = "model.layers.1.mlp.down_proj", []
    model.get_submodule(name).register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    low, high = ranges_of(model, [name], data, {}, tiny.context(tmp_path))[name]
    assert (low, high) == (min(float(x.min()) for x in seen), max(float(x.max()) for x in seen))
    assert share_outside(model, {name: (low, high)}, data, {}) == {name: 0.0}
    assert share_outside(model, {name: (low / 4, high / 4)}, data, {})[name] > 0.01
    divided = ranges_of(model, [name], data, {name: torch.full((64,), 2.0)}, tiny.context(tmp_path))[name]
    assert divided == pytest.approx((low / 2, high / 2))


def test_activations_that_are_not_finite_are_refused(tmp_path):
    model = _network("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.mul_(1e38)
    with pytest.raises(StepError, match=r"come into model.layers.1.self_attn.q_proj are not finite.*; look for"):
        inputs_of(model, ["model.layers.1.self_attn.q_proj"], _data("llama"), tiny.context(tmp_path))


@settings(deadline=None)
@given(
    options=st.lists(
        st.lists(st.tuples(st.integers(1, 30), st.floats(0, 10)), min_size=1, max_size=3), min_size=1, max_size=6
    ),
    budget=st.integers(0, 120),
)
def test_the_choice_of_bits_is_the_best_of_all(options, budget):
    fitting = [
        sum(cost for _, cost in pick) for pick in itertools.product(*options) if sum(size for size, _ in pick) <= budget
    ]
    chosen = choose(options, budget)
    if not fitting:
        assert chosen is None
        return
    assert chosen is not None
    pick = [choices[option] for choices, option in zip(options, chosen, strict=True)]
    assert sum(size for size, _ in pick) <= budget
    assert sum(cost for _, cost in pick) == pytest.approx(min(fitting), rel=1e-9, abs=1e-12)


def test_many_layers_of_few_shapes_are_solved_at_once():
    options = [[(1000 + 7 * (n % 3), 1.0 + n), (2000, 0.1 * n), (4000, 0.0)] for n in range(300)]
    chosen = choose(options, 700_000)
    assert chosen is not None
    assert sum(options[n][option][0] for n, option in enumerate(chosen)) <= 700_000
