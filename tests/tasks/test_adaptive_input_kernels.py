"""Layout, allocation and tables in bands, each against a naive reference."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MarianConfig, MarianMTModel

from tasks.adaptive_input import curves, rounding, table
from tasks.adaptive_input.adaptive_input import stored_table
from tasks.adaptive_input.allocate import allocate
from tasks.adaptive_input.bands import Fitted, Measured
from tasks.adaptive_input.curves import Curves, metric, ranks, segments
from tasks.adaptive_input.heal import harden, soften
from tasks.adaptive_input.information import contextual, unigram
from tasks.adaptive_input.layout import _HEADER as HEADER
from tasks.adaptive_input.layout import Band, Layout, least_bytes, pack_index, positions, unpack_index
from tasks.adaptive_input.places import places
from tasks.adaptive_input.rounding import FLOAT
from tasks.adaptive_input.sensitivity import moments
from tasks.compress.calibrate import examples, sample
from tasks.context import StepError
from tasks.models import load
from tests.support import as_artifact, context


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_allocation_is_the_best_of_all(data):
    most, tables = data.draw(st.integers(1, 3)), []
    for _ in range(data.draw(st.integers(1, 2))):
        count = data.draw(st.integers(1, 4))
        option = st.tuples(st.integers(1, 30), st.integers(0, 50).map(float))
        runs = {
            (i, j): data.draw(st.lists(option, min_size=1, max_size=3))
            for i in range(count)
            for j in range(i + 1, count + 1)
        }
        tables.append((count, runs))
    budget = data.draw(st.integers(1, 90))
    best = math.inf
    for ways in itertools.product(*(_ways(count, runs, most) for count, runs in tables)):
        if sum(size for size, _ in ways) <= budget:
            best = min(best, sum(cost for _, cost in ways))
    got = allocate(tables, most, budget)
    if got is None:
        assert best == math.inf
        return
    spent = cost = 0
    for (count, runs), bands in zip(tables, got, strict=True):
        assert [start for start, _, _ in bands] == [0, *(end for _, end, _ in bands[:-1])]
        assert bands[-1][1] == count
        assert len(bands) <= most
        spent += sum(runs[start, end][option][0] for start, end, option in bands)
        cost += sum(runs[start, end][option][1] for start, end, option in bands)
    assert spent <= budget
    assert cost == best


def _ways(count, runs, most):
    """Bytes and cost of every way to cut ``count`` segments into bands and choose for each."""
    found = []
    for number in range(1, most + 1):
        for cuts in itertools.combinations(range(1, count), number - 1):
            edges = [0, *cuts, count]
            for chosen in itertools.product(*(runs[i, j] for i, j in itertools.pairwise(edges))):
                found.append((sum(size for size, _ in chosen), sum(cost for _, cost in chosen)))
    return found


def test_large_budgets_in_units_stay_within_the_budget():
    rng = np.random.default_rng(0)
    runs = {
        (i, j): [(int(size), float(1e6 / size)) for size in rng.integers(1000, 100_000, 5)]
        for i in range(4)
        for j in range(i + 1, 5)
    }
    got = allocate([(4, runs)], 4, 123_457)
    exact = allocate([(4, runs)], 4, 123_457, units=10**9)
    assert got is not None
    assert exact is not None
    spent, best = ([runs[i, j][k] for i, j, k in bands[0]] for bands in (got, exact))
    assert sum(size for size, _ in spent) <= 123_457
    assert sum(cost for _, cost in spent) <= 1.01 * sum(cost for _, cost in best)


def _measured(rows=300, width=16, seed=0, bits=rounding.BITS, most=4, copies=1):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.2, 0.02, width)  # directions in which tokens differ much, and little
    tables = [torch.randn(rows, width, generator=generator) * spread + 0.3 for _ in range(copies)]
    counts = np.random.default_rng(seed).permutation((1000 / (1 + np.arange(rows)) ** 1.2).astype(np.int64))
    told = unigram(counts)
    metrics = [metric(width, None) for _ in range(copies)]
    return tables, told, Measured(tables, metrics, told, bits, most)


@pytest.fixture(scope="module")
def measured():
    return _measured(800, 24)


def _allocated(found, budget):
    fitted = found.allocate(budget)
    assert fitted is not None
    return fitted[0]


def _taken(made):
    return sum(tensor.nbytes + HEADER for tensor in made.state_dict().values())


@given(budget=st.integers(3000, 70_000))
@settings(max_examples=25, deadline=None)
def test_a_table_never_takes_more_than_its_budget(measured, budget):
    fitted = measured[2].allocate(budget)
    if fitted is None:
        assert budget < least_bytes(800, 24, rounding.BITS) * 1.02
        return
    assert fitted[0].layout.bytes <= budget
    assert _taken(stored_table(fitted[0])) == fitted[0].layout.bytes


@given(rows=st.integers(5, 90), width=st.sampled_from([8, 12, 16]), share=st.floats(0.2, 0.9), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_a_table_of_any_vocabulary_is_whole(rows, width, share, seed):
    _, told, found = _measured(rows, width, seed, bits=(16, 4, 1), most=2)
    budget = int(least_bytes(rows, width, (16, 4, 1)) * (1 + share))
    fitted = found.allocate(budget)
    assert fitted is not None
    assert sum(band.count for band in fitted[0].layout.bands) == rows
    made = stored_table(fitted[0])
    assert _taken(made) <= budget
    assert sorted(made.positions.tolist()) == list(range(rows))
    assert torch.isfinite(made.expanded()).all()
    # The most frequent tokens are in the first band.
    assert fitted[0].band_of[int(told.order[0])] == 0


def _lost(measured, made):
    tables, told, _ = measured
    wrong = (made.expanded() - tables[0]).double().square().sum(1)
    return float((torch.from_numpy(told.weights) * wrong).sum())


def test_more_bytes_lose_no_more(measured):
    lost = [_lost(measured, stored_table(_allocated(measured[2], budget))) for budget in (6000, 9000, 14_000, 24_000)]
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 0.1 * lost[0]


def test_the_measured_cost_is_that_of_what_is_stored(measured):
    tables, told, found = measured
    fitted = _allocated(found, 9000)
    energy = (torch.from_numpy(told.weights) * tables[0].double().square().sum(1)).sum()
    # The fit goes on where the curve stops, so that it may be better, and never much worse.
    assert 0.5 * fitted.cost < _lost(measured, stored_table(fitted)) / float(energy) < 1.1 * fitted.cost


def test_bands_beat_one_band(measured):
    ours = _lost(measured, stored_table(_allocated(measured[2], 9000)))
    alone = _lost(measured, stored_table(_allocated(_measured(800, 24, most=1)[2], 9000)))
    assert ours < 0.9 * alone


GRADED = (((16, 4),), ((3, 1), (1, 1)), ((8, 2),))


def _tiny_fit(levels=GRADED, with_projection=(False, True, True)):
    """Eight tokens of width 4 in three bands, the second and third with projections."""
    generator = torch.Generator().manual_seed(5)
    counts, band_of = (2, 3, 3), torch.tensor([1, 0, 2, 1, 2, 2, 0, 1])
    bands, rows, projections, means = [], [], [], []
    for count, each, project in zip(counts, levels, with_projection, strict=True):
        bands.append(Band(count, each, project))
        rows.append(torch.randn(count, bands[-1].rank, generator=generator))
        projections.append(torch.randn(2, 4, generator=generator) if project else None)
        means.append(torch.randn(4, generator=generator))
    return Fitted(Layout(8, 4, tuple(bands)), band_of, rows, projections, means)


def _floats():
    return _tiny_fit((((FLOAT, 4),), ((FLOAT, 2),), ((FLOAT, 2),)))


def _naive(fitted):
    """Every token's vector, one by one."""
    found, seen = [], [0, 0, 0]
    for band in fitted.band_of.tolist():
        levels, rows, projection = fitted.layout.bands[band].levels, fitted.rows[band], fitted.projections[band]
        bits = [bits for bits, columns in levels for _ in range(columns)]
        if projection is None:
            vector = rounding.rounded(rows, bits[0])[seen[band]]
        else:
            vector = torch.zeros(4)
            for column, each in enumerate(bits):
                kept = rounding.rounded(rows[:, column][None], each)[0, seen[band]]
                behind = {1: 4, 3: 6, 8: 8}[each]
                vector = vector + kept * rounding.rounded(projection[column][None], behind)[0]
        found.append(vector + fitted.means[band].half().float())
        seen[band] += 1
    return torch.stack(found)


@pytest.mark.parametrize("padding", [None, *range(8)])
def test_lookup_and_scores_are_those_of_the_naive_table(padding):
    fitted = _tiny_fit()
    made, naive = stored_table(fitted), _naive(fitted)
    ids = torch.tensor([[7, 0, 3], [2, 2, 6], [5, 1, 4]])
    embed, head = table.embedding(made, 2.0, padding), table.head(made, torch.arange(8.0))
    half = {"rtol": 1e-3, "atol": 1e-3}  # a column's scale is float16
    torch.testing.assert_close(embed(ids), 2 * naive[ids], **half)
    torch.testing.assert_close(made._from_factors(ids), embed.weight[ids])  # as a training and an export do
    torch.testing.assert_close(embed.weight, naive, **half)
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(head(x), x @ embed.weight.T + torch.arange(8.0))


def test_the_index_says_the_band_of_every_token():
    bands = torch.tensor([3, 0, 15, 1, 1])
    assert pack_index(bands).tolist() == [3, 15 | 16, 1]
    assert unpack_index(pack_index(bands), 5).tolist() == bands.tolist()
    layout = Layout(5, 4, tuple(Band(count, ((8, 4),), False) for count in (2, 2, 1)))
    assert positions(torch.tensor([1, 0, 2, 1, 0]), layout).tolist() == [2, 0, 4, 3, 1]


def test_float_tables_learn_as_dense_ones_do():
    fitted = _floats()
    made = stored_table(fitted)
    ids, wanted = torch.tensor([[0, 1, 2, 6, 7]]), torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    embed = table.embedding(made, 1.0, 6)
    (embed(ids)[0] * wanted).sum().backward()
    grads = {name: parameter.grad for name, parameter in made.named_parameters()}
    assert grads["rows0_float"][0].tolist() == wanted[1].tolist()  # token 1 is the first of band 0
    assert not grads["rows0_float"][1].any()  # token 6 is padding
    project = made.projection1_float.detach()
    torch.testing.assert_close(grads["rows1_float"][0], project @ wanted[0])
    torch.testing.assert_close(grads["rows1_float"][2], project @ wanted[4])
    rows = made.rows1_float.detach()
    torch.testing.assert_close(
        grads["projection1_float"], torch.outer(rows[0], wanted[0]) + torch.outer(rows[2], wanted[4])
    )


def test_what_is_kept_between_lookups_follows_the_weights():
    made = stored_table(_floats())
    ids = torch.tensor([1])
    with torch.no_grad():
        before = made.lookup(ids).clone()
        made.rows0_float.add_(1.0)
        torch.testing.assert_close(made.lookup(ids), before + 1)


def test_casts_leave_the_stored_types():
    made = stored_table(_tiny_fit())
    before = {name: tensor.dtype for name, tensor in made.state_dict().items()}
    made.float()
    assert {name: tensor.dtype for name, tensor in made.state_dict().items()} == before


def test_a_soft_table_reads_as_the_hard_one_it_becomes():
    fitted = _tiny_fit()
    soft = soften(fitted)
    torch.testing.assert_close(soft.expanded(), stored_table(fitted).expanded(), rtol=2e-3, atol=2e-3)
    with torch.no_grad():
        soft.rows1 += 0.05
        soft.rows1_log -= 0.2
        soft.projection2 *= 1.1
    torch.testing.assert_close(soft.expanded(), harden(soft).expanded(), rtol=2e-3, atol=2e-3)


def test_information_by_hand():
    told = unigram(np.array([6, 0, 2]))
    assert told.bits.tolist() == pytest.approx([-math.log2(7 / 11), -math.log2(1 / 11), -math.log2(3 / 11)])
    assert told.weights.tolist() == pytest.approx([0.9 * part / 11 + 0.1 / 3 for part in (7, 1, 3)])
    assert told.order.tolist() == [0, 2, 1]
    # A token that the model always foresees weighs less than its frequency says.
    seen = contextual(np.array([6, 0, 2]), np.array([0.0, 0.0, 200.0]), np.array([50.0, 0.0, 50.0]))
    assert seen.bits[0] == pytest.approx(8 * told.bits[0] / 58)
    assert seen.order[0] == 2


def test_borders_and_ranks():
    weights = np.sort(np.random.default_rng(0).random(1000))[::-1]
    counts = np.where(np.arange(1000) < 700, 5, 0)
    borders = segments(weights, counts)
    assert borders[0] == 0
    assert borders[-1] == 1000
    assert 700 in borders
    assert borders == sorted(set(borders))
    assert ranks(128, 4000)[0] == 8
    assert 90 < ranks(128, 4000)[-1] < 128
    assert ranks(4, 100) == []
    assert max(ranks(128, 20)) <= 20
    assert all(rank % 8 == 0 for rank in ranks(128, 4000))


def test_the_metric_counts_what_the_outputs_feel():
    found = metric(4, torch.diag(torch.tensor([9.0, 1.0, 0.0, 0.0])))
    whole = found.half @ found.half.T
    torch.testing.assert_close(whole, torch.diag(torch.tensor([0.2 + 0.8 * 3.6, 0.2 + 0.8 * 0.4, 0.2, 0.2])))
    torch.testing.assert_close(found.half @ found.back, torch.eye(4), atol=1e-5, rtol=1e-5)


def test_a_table_of_more_rows_than_are_computed_with_at_a_time_is_fitted_alike(monkeypatch):
    rows = torch.randn(200, 12, generator=torch.Generator().manual_seed(7))
    found = Curves(rows, torch.linspace(2, 1, 200).double() / 300, [0, 200], metric(12, None))
    band = Band(200, ((8, 6), (3, 4)))
    costs, fitted = [one.cost for one in found.options((0, 1), (4, 2))], found.fit((0, 1), band)
    monkeypatch.setattr(curves, "_ROWS", 70)
    again = Curves(rows, found.weights, [0, 200], metric(12, None))
    assert [one.cost for one in again.options((0, 1), (4, 2))] == pytest.approx(costs)
    vectors = [one @ two + mean for one, two, mean in (fitted, again.fit((0, 1), band))]
    torch.testing.assert_close(*vectors, rtol=1e-3, atol=1e-3)


def test_tables_that_bands_cannot_hold_are_refused(gpt2):
    network: Any = load(gpt2)
    with torch.no_grad():
        network.get_input_embeddings().weight[3, 5] = 1e5
    with pytest.raises(StepError, match=r"has a vector of length 1e[+]05, and bands hold"):
        places(network)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = MarianConfig(
        **sizes,
        vocab_size=40,
        decoder_vocab_size=50,
        share_encoder_decoder_embeddings=False,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        pad_token_id=1,
        max_position_embeddings=16,
    )
    with pytest.raises(StepError, match="two vocabularies"):
        places(MarianMTModel(config))


def test_profiles_of_bits_are_the_best_that_there_are():
    """Every profile of 0, 1 or 2 bits of four directions, one by one."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(200, 4, generator=generator) * torch.tensor([1.0, 0.6, 0.3, 0.05])
    found = Curves(rows, torch.full((200,), 1 / 200, dtype=torch.float64), [0, 200], metric(4, None))
    values = torch.linalg.eigvalsh((rows - rows.mean(0)).double().T @ (rows - rows.mean(0)).double() / 200)
    errors = torch.stack([values.flip(0), 0.4 * values.flip(0), 0.15 * values.flip(0)]).numpy()
    bands = found._profiles(200, errors, (1, 2))
    sizes = {0: 0, 1: 8 * 200 + 8 * 4 * 4 + 16, 2: 16 * 200 + 8 * 4 * 5 + 16}
    every = [
        (sum(sizes[one] for one in bits), sum(errors[one, at] for at, one in enumerate(bits)))
        for bits in itertools.product(range(3), repeat=4)
    ]
    for band in bands[1:]:
        bits = [bits for bits, columns in band.levels for _ in range(columns)] + [0] * (4 - band.rank)
        size = sum(sizes[one] for one in bits)
        assert sum(errors[one, at] for at, one in enumerate(bits)) <= min(e for s, e in every if s <= size) + 1e-9
    assert len({band.levels for band in bands}) == len(bands) > 2


def test_directions_get_bits_by_what_they_hold(measured):
    graded = [band for band in _allocated(measured[2], 9000).layout.bands if band.projected and len(band.levels) > 2]
    assert graded
    costs = [option.cost for option in measured[2].options[0][0, measured[2].curves[0].segments]]
    assert costs == sorted(costs, reverse=True)


def test_the_sensitivity_is_what_errors_do_to_the_outputs(gpt2, text_data, tmp_path):
    """The divergence that small errors of looked-up rows cause, against what the second moment foretells."""
    network, ctx = load(gpt2), context(tmp_path, "text-generation", text_data)
    data = sample(as_artifact(gpt2), 24, ctx)
    found, _ = places(network)
    both = moments(network, found, data, torch.Generator().manual_seed(0))[0]
    heads = dataclasses.replace(found[0], embeddings={})
    alone = moments(network, [heads], data, torch.Generator().manual_seed(0))[0]
    assert torch.equal(alone, alone.T)
    fisher = (both - alone) / 2
    generator, table_ = torch.Generator().manual_seed(1), found[0].weight
    told, seen = 0.0, 0.0
    for _ in range(3):
        error = torch.randn(table_.shape[1], generator=generator) * 1e-2
        told += float(error.double() @ fisher @ error.double()) / 2
        for batch in examples(data):
            before = network(**batch).logits.log_softmax(-1)
            for at in range(batch["input_ids"].shape[1]):
                vectors = network.get_input_embeddings()(batch["input_ids"]).detach()
                vectors[0, at] += error
                after = network(inputs_embeds=vectors, attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
                seen += float((before.exp() * (before - after)).sum())
    assert told == pytest.approx(seen, rel=0.35)
