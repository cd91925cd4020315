"""Attention in buckets against a naive reference of the length squared, against exact attention, and its gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tasks.attention import kernel
from tasks.attention.chunked import attend_in_chunks, draw_rotations
from tasks.attention.hashing import codes, fit
from tasks.attention.lsh import Call, Hashed, attend

pytestmark = pytest.mark.usefixtures("one_thread")


def _way(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    if compiled and kernel.library() is None:
        pytest.skip("no C++ compiler")
    if not compiled:
        monkeypatch.setattr(kernel, "usable", lambda call: False)


def _call(
    batch: int = 2, heads: int = 4, groups: int = 2, rows: int = 37, keys: int = 37, buckets: int = 5, **fields: object
) -> Call:
    """Random queries, keys, values and centres; with ``pad`` some keys are hidden, all of them in the first example."""
    generator = torch.Generator().manual_seed(int(fields.pop("seed", 0)))  # type: ignore[call-overload]
    query, key, value = (
        torch.randn(batch, count, length, width, generator=generator)
        for count, length, width in ((heads, rows, 8), (groups, keys, 8), (groups, keys, 12))
    )
    table = torch.randn(groups, buckets, 8, generator=generator)
    spread = torch.rand(groups, buckets, generator=generator)
    hashed = Hashed(table, -table.pow(2).sum(-1) / 2, spread)
    seen = None
    if fields.pop("pad", False):
        seen = torch.rand(batch, keys, generator=generator) > 0.3
        seen[0] = False
    defaults: dict[str, object] = {"scale": 8**-0.5, "offset": keys - rows, "seen": seen}
    return Call(query, key, value, hashed, **(defaults | fields))  # type: ignore[arg-type]


def _naive(call: Call) -> Tensor:
    """The definition, one query after the other: means of the buckets outside the local window, the probes with the
    largest estimated mass, and one softmax over single keys and means."""
    batch, heads, rows, _ = call.query.shape
    groups, keys = call.key.shape[1:3]
    out = torch.zeros(batch, rows, heads, call.value.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            key, value = call.key[b, g].double(), call.value[b, g].double()
            bucket = codes(call.hashed, call.key[b, g][None].expand(groups, -1, -1))[g]
            seen = torch.ones(keys, dtype=torch.bool) if call.seen is None else call.seen[b]
            for i in range(rows):
                query, place = call.query[b, h, i].double() * call.scale, i + call.offset
                near = torch.zeros(keys, dtype=torch.bool)
                outside = torch.ones(keys, dtype=torch.bool)
                if call.window:
                    low = max(0, (place // call.window - 1) * call.window)
                    high = keys if call.causal else (place // call.window + 2) * call.window
                    outside[low:high] = False
                    near = ~outside
                    if call.causal:
                        near &= torch.arange(keys) <= place
                masses = {}
                for c in range(call.hashed.table.shape[1]):
                    held = (bucket == c) & seen & outside
                    if held.any():
                        half = 0.5 * query.pow(2).sum() * call.hashed.spread[g, c].double()
                        masses[c] = (query @ key[held].mean(0) + held.sum().double().log() + half, held)
                probed = sorted(masses, key=lambda c: -float(masses[c][0]))[: call.probes]
                exact = (near & seen).clone()
                for c in probed:
                    exact |= masses[c][1]
                scores, values = [key[exact] @ query], [value[exact]]
                for c, (mass, held) in masses.items():
                    if c not in probed and call.residual:
                        scores.append(mass[None])
                        values.append(value[held].mean(0, keepdim=True))
                weights = torch.cat(scores).softmax(0)
                if len(weights):
                    out[b, i, h] = weights @ torch.cat(values)
    return out


CASES = {
    "two probes": {"probes": 2},
    "no means": {"probes": 2, "residual": False},
    "means alone": {"probes": 0},
    "padding": {"probes": 2, "pad": True},
    "window": {"probes": 1, "window": 8, "pad": True},
    "causal": {"probes": 1, "window": 8, "causal": True, "pad": True},
    "causal, prefill behind a cache": {"probes": 1, "window": 4, "causal": True, "rows": 9},
    "other lengths, as in cross-attention": {"probes": 1, "rows": 5, "keys": 21},
    "one query and one key": {"probes": 1, "rows": 1, "keys": 1},
    "many heads to a group": {"probes": 1, "heads": 6, "groups": 1},
}


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain"])
@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_definition_says(monkeypatch, case, compiled):
    _way(monkeypatch, compiled)
    call = _call(**CASES[case])
    out, mass = attend(call)
    assert torch.allclose(out.double(), _naive(call), atol=2e-5)
    if call.seen is not None and call.window == 0:
        assert torch.all(out[0] == 0), "rows that see nothing"
        assert torch.all(mass[0] == -torch.inf)


def _exact(call: Call) -> Tensor:
    mask = torch.ones(call.query.shape[2], call.key.shape[2], dtype=torch.bool)
    if call.causal:
        mask = mask.tril(call.offset)
    mask = mask[None, None]
    if call.seen is not None:
        mask = mask & call.seen[:, None, None]
    if call.band:
        far = torch.arange(mask.shape[-2])[:, None] + call.offset - torch.arange(mask.shape[-1])
        mask = mask & (far.abs() < call.band)
    per = call.query.shape[1] // call.key.shape[1]
    key, value = (tensor.repeat_interleave(per, 1) for tensor in (call.key, call.value))
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(call.query, key, value, attn_mask=mask, scale=call.scale).transpose(1, 2)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    keys=st.integers(1, 70),
    window=st.sampled_from([0, 3, 16]),
    causal=st.booleans(),
    pad=st.booleans(),
    bf16=st.booleans(),
)
def test_with_as_many_probes_as_buckets_it_is_exact_attention(seed, keys, window, causal, pad, bf16):
    call = _call(rows=keys, keys=keys, probes=5, seed=seed, window=window or 3 * causal, causal=causal, pad=pad)
    if bf16:
        call = replace(call, query=call.query.bfloat16(), key=call.key.bfloat16(), value=call.value.bfloat16())
    out = attend(call)[0]
    assert out.dtype == call.query.dtype
    same = replace(call, query=call.query.float(), key=call.key.float(), value=call.value.float())
    expected = _exact(same).nan_to_num(0)
    assert torch.allclose(out.float(), expected, atol=2e-2 if bf16 else 1e-5)


def test_a_band_is_a_sliding_window():
    for causal in (True, False):
        call = _call(rows=50, keys=50, buckets=1, probes=0, window=7, band=7, causal=causal, residual=False)
        assert torch.allclose(attend(call)[0], _exact(call), atol=1e-5)


@pytest.mark.parametrize("case", ["two probes", "window", "causal", "causal, prefill behind a cache"])
def test_compiled_and_plain_gradients_are_those_of_the_same_function(monkeypatch, case):
    _way(monkeypatch, True)
    call = _call(**CASES[case])
    tensors = [tensor.requires_grad_() for tensor in (call.query, call.key, call.value)]
    out = attend(call)[0]
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    compiled = torch.autograd.grad(out, tensors, towards)
    monkeypatch.setattr(kernel, "usable", lambda call: False)
    plain = torch.autograd.grad(attend(call)[0], tensors, towards)
    for one, other in zip(compiled, plain, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
        assert one.abs().max() > 0
    full = replace(call, probes=5)
    expected = torch.autograd.grad(_exact(full).nan_to_num(0), tensors, towards)
    for one, other in zip(torch.autograd.grad(attend(full)[0], tensors, towards), expected, strict=True):
        assert torch.allclose(one, other.nan_to_num(0), atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    length=st.integers(2, 90),
    window=st.integers(1, 20),
    at=st.floats(0, 1),
    pad=st.booleans(),
)
def test_no_later_token_changes_an_earlier_output(seed, length, window, at, pad):
    call = _call(rows=length, keys=length, probes=2, seed=seed, window=window, causal=True, pad=pad)
    assert _moved(lambda call: attend(call)[0], call, int(at * (length - 1)), seed) == 0


def _moved(attention, call: Call, at: int, seed: int) -> float:
    """How far outputs up to position ``at`` move when every later token becomes another."""
    generator = torch.Generator().manual_seed(seed)
    later = {}
    for name in ("query", "key", "value"):
        tensor = getattr(call, name).clone()
        tensor[:, :, at + 1 :] = 3 * torch.randn(tensor[:, :, at + 1 :].shape, generator=generator)
        later[name] = tensor
    before, after = attention(call), attention(replace(call, **later))
    return float((before - after)[:, : at + 1].abs().max())


def _leaks_by_means(call: Call) -> Tensor:
    """Hash functions fitted on the sequence itself, later tokens included."""
    hashed = fit("centroid", call.key[0], 5, torch.Generator().manual_seed(0))
    return attend(replace(call, hashed=hashed))[0]


def _leaks_by_chunks(call: Call) -> Tensor:
    """Sorted chunks, which the article masks causally: here a mask that hides the last token says enough."""
    rotations = draw_rotations(2, 1, 8, 4, torch.Generator().manual_seed(0))
    return attend_in_chunks(call.query, call.key, call.value, rotations, 4, None, call.scale)


@pytest.mark.parametrize("leak", [_leaks_by_means, _leaks_by_chunks])
def test_a_planted_leak_is_caught(leak):
    call = _call(rows=60, keys=60, probes=1, window=6, causal=True, residual=False)
    assert max(_moved(leak, call, at, 7) for at in (20, 40)) > 1e-3
    assert _moved(lambda call: attend(call)[0], call, 40, 7) == 0


def test_a_causal_attention_without_a_window_is_refused():
    with pytest.raises(ValueError, match="needs a window"):
        attend(_call(causal=True))


def test_threads_do_not_change_the_result():
    call = _call(batch=1, groups=1, rows=200, keys=200, probes=2, window=16, causal=True)
    one = attend(call)[0]
    torch.set_num_threads(2)
    assert torch.equal(attend(call)[0], one)


@pytest.mark.parametrize("family", ["centroid", "angular", "e2lsh"])
def test_every_family_uses_its_buckets_and_follows_the_seed(family):
    centres = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(3)) * 3
    near = torch.randint(8, (2, 400), generator=torch.Generator().manual_seed(4))
    keys = centres.gather(1, near[..., None].expand(-1, -1, 16))
    keys = keys + 0.1 * torch.randn(keys.shape, generator=torch.Generator().manual_seed(5))
    made = [fit(family, keys, 16, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(made[0].table, made[1].table)
    assert not torch.equal(made[0].table, made[2].table)
    used = [len(row.unique()) for row in codes(made[0], keys)]
    assert min(used) >= 4
    together = codes(made[0], keys)
    for group in range(2):  # what is close falls into one bucket, mostly
        alike = [together[group][near[group] == c].mode().values for c in range(8)]
        share = sum(float((together[group][near[group] == c] == alike[c]).float().mean()) for c in range(8)) / 8
        assert share > 0.5


def test_what_is_clustered_is_met_with_few_probes_and_what_is_not_is_not():
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(2, 8, 32, generator=generator)
    errors = {}
    for name, spread in (("clustered", 0.2), ("gaussian", None)):
        given = []
        for _ in range(2):
            at = torch.randint(8, (2, 256), generator=generator)
            rows = torch.randn(2, 256, 32, generator=generator)
            picked = centres.gather(1, at[..., None].expand(-1, -1, 32))
            given.append((rows if spread is None else picked + spread * rows)[None])
        value = torch.randn(1, 2, 256, 32, generator=generator)
        hashed = fit("centroid", given[1][0], 8, torch.Generator().manual_seed(0))
        call = Call(given[0], given[1], value, hashed, probes=2, scale=32**-0.5)
        expected = _exact(call)
        errors[name] = float((attend(call)[0] - expected).norm() / expected.norm())
    assert errors["clustered"] < 0.02
    assert errors["gaussian"] > 0.2


@pytest.mark.parametrize("length", [1, 7, 64, 100])
def test_chunks_that_hold_all_keys_are_exact_and_rounds_count_no_pair_twice(length):
    call = _call(rows=length, keys=length)
    seen = torch.rand(2, length, generator=torch.Generator().manual_seed(1)) > 0.3
    seen[:, 0] = True
    for rounds in (1, 3):
        rotations = draw_rotations(2, rounds, 8, 8, torch.Generator().manual_seed(0))
        out = attend_in_chunks(call.query, call.key, call.value, rotations, 64, seen, call.scale)
        assert torch.allclose(out, _exact(replace(call, seen=seen)), atol=1e-5)


def test_more_rounds_of_chunks_come_closer():
    call = _call(rows=128, keys=128)
    expected, errors = _exact(call), []
    for rounds in (1, 4, 16):
        rotations = draw_rotations(2, rounds, 8, 16, torch.Generator().manual_seed(0))
        out = attend_in_chunks(call.query, call.key, call.value, rotations, 8, None, call.scale)
        errors.append(float((out - expected).norm() / expected.norm()))
    assert errors[2] < errors[1] < errors[0]


def test_memory_of_a_training_step_grows_as_the_length(monkeypatch):
    def kept(length: int) -> int:
        call = _call(rows=length, keys=length, probes=1, window=16, causal=True)
        sizes: list[int] = []

        def hold(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            tensors = [tensor.requires_grad_() for tensor in (call.query, call.key, call.value)]
            attend(replace(call, query=tensors[0], key=tensors[1], value=tensors[2]))[0].sum().backward()
        return sum(sizes)

    assert kept(512) == 2 * kept(256)
