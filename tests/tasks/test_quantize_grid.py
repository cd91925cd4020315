"""Codes of few bits: rounding, groups, two to a byte, and layers that keep them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tasks.compress import weight_only
from tasks.compress.grid import Rounded, clipped, pack_pairs, round_to, unpack_pairs

shapes = {"rows": st.integers(1, 5), "columns": st.integers(1, 70), "seed": st.integers(0, 2**31)}


def _naive(weight, bits, group):
    """Every group by its definition."""
    found = torch.zeros_like(weight)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], group or weight.shape[1]):
            part = weight[row, start : start + (group or weight.shape[1])]
            extreme = max(part.tolist(), key=abs)
            scale = extreme / -8 if bits == 4 else abs(extreme) / 127
            scale = torch.tensor(scale).half().item() or 1.0
            for at, value in enumerate(part.tolist()):
                code = min(max(round(value / scale), -8 if bits == 4 else -127), 7 if bits == 4 else 127)
                found[row, start + at] = code * scale
    return found


@settings(deadline=None, max_examples=40)
@given(bits=st.sampled_from([4, 8]), group=st.sampled_from([None, 32, 64]), **shapes)
def test_rounding_is_what_it_says(bits, group, rows, columns, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    rounded = round_to(weight, bits, group)
    # A value half way between two codes may go to either.
    assert (rounded.weight - _naive(weight, bits, group)).abs().max() <= rounded.scale.abs().max().item() * 1.001
    assert torch.allclose(rounded.weight, _naive(weight, bits, group), atol=1e-6) or columns > 1
    assert rounded.scale.dtype == torch.float16
    assert rounded.clipped == 0
    steps = rounded.scale.float().abs().repeat_interleave(rounded.group, 1)[:, :columns]
    assert ((rounded.weight - weight).abs() <= steps * (1.01 if bits == 4 else 0.56)).all()
    again = round_to(rounded.weight, bits, group)
    assert torch.equal(again.codes, rounded.codes)
    assert torch.equal(again.scale, rounded.scale)


def test_by_hand():
    rounded = round_to(torch.tensor([[-4.0, 1.0, 0.26, 3.9], [0, 0, 0, 0], [8, 4, 0, -1]]), 4, None)
    assert rounded.codes.tolist() == [[-8, 2, 1, 7], [0, 0, 0, 0], [-8, -4, 0, 1]]
    assert rounded.scale.tolist() == [[0.5], [1.0], [-1.0]]
    groups = round_to(torch.tensor([[1.0, 127, 254, 2]]), 8, 2)
    assert groups.codes.tolist() == [[1, 127, 127, 1]]
    assert groups.scale.tolist() == [[1.0, 2.0]]


@settings(deadline=None, max_examples=40)
@given(**shapes)
def test_two_to_a_byte_and_back(rows, columns, seed):
    codes = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack_pairs(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, (columns + 1) // 2)
    assert torch.equal(unpack_pairs(packed, columns), codes)


def test_scales_beyond_fp16_are_kept_as_float32():
    for factor in (1e-6, 1e7):
        rounded = round_to(torch.tensor([[1.0, 3, -8]]) * factor, 4, None)
        assert rounded.scale.dtype == torch.float32
        assert rounded.codes.tolist() == [[1, 3, -8]]
        assert weight_only.described(rounded)["scale"] == "float32"


def test_clipped_counts_what_is_more_than_a_step_outside():
    assert clipped(torch.tensor([[7.9, 8.1, -9.1, -8.9]]), torch.ones(1, 1), 4) == pytest.approx(0.5)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_layer_and_a_table_compute_with_what_is_stored(bits):
    torch.manual_seed(0)
    weight = torch.randn(6, 45)
    stored: Rounded | torch.Tensor = weight if bits == 16 else round_to(weight, bits, 32)
    expected = stored.weight if isinstance(stored, Rounded) else weight.half().float()
    tensors, x, bias, divisor = weight_only.tensors_of(stored), torch.randn(3, 45), torch.randn(6), torch.rand(45) + 0.5
    layer = weight_only.stored_linear(tensors, 45, 32, bias, None)
    assert torch.equal(layer(x), nn.functional.linear(x, expected, bias))
    scaled = weight_only.stored_linear(tensors, 45, 32, None, 1 / divisor)
    assert torch.allclose(scaled(x), nn.functional.linear(x / divisor, expected), atol=1e-5)
    table = weight_only.stored_embedding(tensors, 45, 32, None, 3.0)
    ids = torch.tensor([[0, 5], [2, 2]])
    assert torch.equal(table(ids), expected[ids] * 3)
    assert sum(tensor.nbytes for tensor in tensors.values()) == {4: 6 * (23 + 4), 8: 6 * (45 + 4), 16: 6 * 90}[bits]
