"""Rounding and packing of rows, against naive references."""

from __future__ import annotations

import pytest
import torch

from tasks.adaptive_input import rounding

CODED = [bits for bits in rounding.BITS if bits < 16]


@pytest.mark.parametrize("bits", CODED)
def test_packed_codes_are_a_stream_of_bits(bits):
    codes = torch.randint(2**bits, (5, 13), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    packed = rounding.pack(codes, bits)
    for row, stored in zip(codes.tolist(), packed.tolist(), strict=True):
        stream = "".join(f"{code:0{bits}b}"[::-1] for code in row)
        wanted = [int(stream[at : at + 8][::-1], 2) for at in range(0, len(stream), 8)]
        assert stored == wanted
    assert torch.equal(rounding.unpack(packed, 13, bits), codes)
    assert packed.numel() + 2 * 5 == rounding.bytes_of(5, 13, bits)


@pytest.mark.parametrize("bits", CODED)
def test_rounding_takes_the_nearest_level(bits):
    rows = torch.randn(6, 24, generator=torch.Generator().manual_seed(bits))
    rows[2] = 0
    scale = rounding.scales_of(rows, bits)
    got = rounding.values(rounding.to_codes(rows, scale, bits), scale, bits)
    for row, one, step in zip(rows.tolist(), got.tolist(), scale.tolist(), strict=True):
        levels = [(code - (2**bits - 1) / 2) * step for code in range(2**bits)]
        for value, kept in zip(row, one, strict=True):
            assert abs(kept - value) <= min(abs(level - value) for level in levels) + 1e-6
    assert not got[2].any()
    plain = rows.abs().amax(1) / ((2**bits - 1) / 2)  # no scale that was tried may be worse than the plain one
    simple = rounding.values(rounding.to_codes(rows, plain.half(), bits), plain.half(), bits)
    assert ((got - rows).square().sum(1) <= (simple - rows).square().sum(1) + 1e-6).all()


LEVELS = [(8, 1), (5, 2), (1, 3)]


def test_rows_of_different_bits_are_rounded_and_packed_one_by_one():
    bits = [bits for bits, count in LEVELS for _ in range(count)]
    rows = torch.randn(6, 11, generator=torch.Generator().manual_seed(1))
    scale = rounding.scales_of(rows, bits)
    codes = rounding.to_codes(rows, scale, bits)
    for at, each in enumerate(bits):
        alone = rows[at : at + 1]
        assert torch.equal(scale[at : at + 1], rounding.scales_of(alone, each))
        assert torch.equal(rounding.rounded(rows, bits)[at : at + 1], rounding.rounded(alone, each))
        through = rounding.through(rows, scale.float(), bits)[at : at + 1]
        torch.testing.assert_close(through, rounding.rounded(alone, each))
    packed = rounding.pack_levels(codes, LEVELS)
    assert len(packed) == 11 + 2 * 7 + 3 * 2
    assert torch.equal(rounding.unpack_levels(packed, 11, LEVELS), codes)


def test_training_through_rounding_moves_the_scale_and_what_lies_within_reach():
    rows = torch.tensor([[0.2, -0.7, 9.0]], requires_grad=True)
    scale = torch.tensor([0.5], requires_grad=True)
    got = rounding.through(rows, scale, 2)
    assert got.tolist() == [[0.25, -0.75, 0.75]]
    got.sum().backward()
    assert rows.grad is not None
    assert scale.grad is not None
    assert rows.grad.tolist() == [[1.0, 1.0, 0.0]]
    # d/ds of (round(x/s + 1.5) - 1.5) s: (round - x/s) within reach, the outermost level beyond.
    wanted = (0.5 - 0.2 / 0.5) + (-1.5 + 0.7 / 0.5) + 1.5
    assert scale.grad.item() == pytest.approx(wanted, abs=1e-5)
