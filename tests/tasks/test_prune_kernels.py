"""Masks by pattern, Wanda and SparseGPT on plain tensors, against references written for reading."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.compress.masks import pattern_mask, row_mask, score_masks
from tasks.compress.prune_by_data import by_sparsegpt, by_wanda
from tasks.compress.sparsegpt import sparsegpt
from tasks.context import StepError


def correlated(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs that go together, some of them much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return mixed * torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]


def matrix(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_two_of_four_by_hand():
    weight = torch.tensor([[1.0, -3, 2, 0.5, 9, 8, 7, -7], [0, 0, 0, 4, 1, 1, 1, 1]])
    kept = pattern_mask(weight.abs(), weight, 2, 4)
    assert kept.int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0, 1, 1]]
    assert pattern_mask(weight.abs(), weight, 1, 4).sum(1).tolist() == [2, 2]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.data())
def test_a_pattern_keeps_the_highest_of_every_group(of, data):
    kept = data.draw(st.integers(1, of))
    groups = data.draw(st.integers(1, 4))
    values = data.draw(st.lists(st.integers(-3, 3), min_size=2 * groups * of, max_size=2 * groups * of))
    weight = torch.tensor(values, dtype=torch.float32).view(2, -1)
    mask = pattern_mask(weight.abs(), weight, kept, of).view(-1, of)
    for row, keep in zip(weight.view(-1, of).abs().tolist(), mask.tolist(), strict=True):
        nonzero = sum(value > 0 for value in row)
        assert sum(keep) == min(kept, nonzero)
        taken, dropped = ([v for v, k in zip(row, keep, strict=True) if k is want] for want in (True, False))
        assert min(taken, default=math.inf) >= max(dropped, default=0)


def test_scores_below_zero_are_compared_as_they_are():
    scores = {"a": torch.tensor([-5.0, 3.0, 0.0]), "b": torch.tensor([-1.0, 2.0, -1.0])}
    assert score_masks(scores, 1 / 3, "layer")["b"].tolist() == [False, True, True]
    whole = score_masks(scores, 0.5, "global")
    assert (whole["a"].tolist(), whole["b"].tolist()) == ([False, True, True], [False, True, False])


def test_of_equal_scores_the_smaller_weight_goes():
    weight = torch.tensor([[3.0, -1.0, 2.0, 9.0]])
    score = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    assert row_mask(score, weight, 2).tolist() == [[True, False, False, True]]


def test_wanda_by_hand():
    """Inputs (1, 10), (1, 10): the small weight on the large input outweighs the large one on the small input."""
    rule = by_wanda(0.5, None)
    squares = rule.gather(torch.tensor([[1.0, 10.0], [1.0, 10.0]]))
    assert squares.tolist() == [2, 200]
    pruned, kept = rule.prune(torch.tensor([[2.0, 0.5], [30.0, 1.0]]), squares)
    assert kept.tolist() == [[False, True], [True, False]]
    assert pruned.tolist() == [[0, 0.5], [30, 0]]


@pytest.mark.parametrize("sparsity", [0.5, 0.3])
def test_wanda_is_the_naive_loop(sparsity):
    weight, x = matrix(5, 12), correlated(40, 12)
    x[:, 3] = 0
    rule = by_wanda(sparsity, None)
    pruned, kept = rule.prune(weight, rule.gather(x))
    for row in range(5):
        cost = [abs(float(weight[row, at])) * math.sqrt(float((x[:, at] ** 2).sum())) for at in range(12)]
        dropped = sorted(range(12), key=lambda at: (cost[at], abs(float(weight[row, at]))))[: round(sparsity * 12)]
        assert set(torch.nonzero(~kept[row]).flatten().tolist()) == set(dropped)
        assert 3 in dropped, "an input that was always 0 needs no weight"
    assert torch.equal(pruned, weight * kept)


def naive_sparsegpt(weight, hessian, sparsity, pattern, block, damping):
    """Optimal brain surgery, row by row, with an explicit inverse for every column. An unstructured mask is chosen for
    a block of columns over all rows, a pattern group by group."""
    work, h = weight.double().clone(), hessian.double().clone()
    rows, columns = work.shape
    dead = h.diagonal() == 0
    mean = h.diagonal()[~dead].mean()
    h += torch.diag(torch.where(dead, 1.0, damping * mean))
    inverse = [torch.linalg.inv(h[at:, at:]) for at in range(columns)]
    kept = torch.ones(rows, columns, dtype=torch.bool)

    def cost(row, at):
        if dead[at]:
            return (0, abs(float(work[row, at])))
        return (1, float(work[row, at] ** 2 / inverse[at][0, 0]))

    def drop(places, count):
        for row, at in sorted(places, key=lambda place: cost(*place))[:count]:
            kept[row, at] = False

    for at in range(columns):
        if pattern is None and at % block == 0:
            end = min(at + block, columns)
            count = round(sparsity * rows * end) - round(sparsity * rows * at)
            drop([(row, column) for row in range(rows) for column in range(at, end)], count)
        elif pattern is not None and at % pattern[1] == 0:
            for row in range(rows):
                drop([(row, column) for column in range(at, at + pattern[1])], pattern[1] - pattern[0])
        for row in range(rows):
            if not kept[row, at]:
                work[row, at:] -= work[row, at] / inverse[at][0, 0] * inverse[at][0]
                work[row, at] = 0
    return work.float(), kept


@pytest.mark.parametrize(
    ("sparsity", "pattern", "block"),
    [(0.5, None, 12), (0.5, None, 4), (0.35, None, 5), (None, (2, 4), 8), (None, (1, 3), 4)],
)
def test_sparsegpt_is_optimal_brain_surgery(sparsity, pattern, block):
    weight, x = matrix(6, 12), correlated(50, 12)
    x[:, 5] = 0
    hessian = x.T @ x
    expected, mask = naive_sparsegpt(weight, hessian, sparsity, pattern, block, 0.01)
    found, kept = sparsegpt(weight, hessian, sparsity=sparsity, pattern=pattern, block=block, damping=0.01)
    assert torch.equal(kept, mask)
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-3)
    assert torch.equal(found != 0, kept)
    if pattern is None:
        assert int((~kept).sum()) == round(sparsity * 72)
    else:
        assert torch.all(kept.view(-1, pattern[1]).sum(1) == pattern[0])


def test_one_weight_of_two_is_made_up_for_by_the_other():
    """Two inputs that are always the same: the second weight takes over what the first did."""
    x = torch.ones(10, 2)
    found, kept = sparsegpt(torch.tensor([[1.0, 2.0]]), x.T @ x, sparsity=0.5, damping=1e-6)
    assert kept.tolist() == [[False, True]]
    assert found[0, 1] == pytest.approx(3, abs=1e-4)


@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"sparsity": 0.6}, {"pattern": (2, 4)}])
@pytest.mark.parametrize("seed", range(3))
def test_sparsegpt_errs_less_than_wanda_and_wanda_than_magnitude(amount, seed):
    """On inputs near a subspace, some of them larger than others, as activations are."""
    weight, noise, scale = matrix(32, 64, seed), matrix(400, 64, seed + 10), correlated(1, 64, seed)
    x = (matrix(400, 32, seed + 20) @ matrix(32, 64, seed + 30) + noise / 2) * scale.abs().sqrt()
    sparsity, pattern = amount.get("sparsity"), amount.get("pattern")

    def error(pruned):
        return float(((pruned - weight) @ x.T).norm())

    if pattern is None:
        magnitude = weight * row_mask(weight.abs(), weight, round(sparsity * 64))
    else:
        magnitude = weight * pattern_mask(weight.abs(), weight, *pattern)
    wanda, surgery = by_wanda(sparsity, pattern), by_sparsegpt(sparsity, pattern)
    errors = [error(rule.prune(weight, rule.gather(x))[0]) for rule in (surgery, wanda)]
    assert errors[0] < errors[1] < error(magnitude)


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_what_was_zero_stays_zero_and_counts(pattern):
    weight, x = matrix(8, 16), correlated(60, 16)
    weight[:, ::4] = 0
    sparsity = None if pattern else 0.5
    for rule in (by_wanda(sparsity, pattern), by_sparsegpt(sparsity, pattern, 8, 0.01)):
        pruned, kept = rule.prune(weight, rule.gather(x))
        assert torch.all(pruned[:, ::4] == 0)
        assert int((~kept).sum()) == int((pruned == 0).sum()) == 64


def test_inputs_that_are_all_dead_lose_the_smallest_weights():
    weight = matrix(4, 8)
    found, kept = sparsegpt(weight, torch.zeros(8, 8), sparsity=0.5, block=8)
    assert torch.equal(kept, score_masks({"": weight.abs()}, 0.5, "layer")[""])
    assert torch.equal(found, weight * kept)


def test_a_hessian_that_is_none_is_refused_with_the_remedy():
    with pytest.raises(StepError, match=r"not positive definite with damping 0\.01; raise damping, .* to 0\.1"):
        sparsegpt(matrix(2, 3), -torch.eye(3), sparsity=0.5)
