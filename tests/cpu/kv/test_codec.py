"""Codes of few bits equal those written out group by group, and take the bytes they say."""

from __future__ import annotations

import pytest
import torch

from narrows.claims._kivi import by_definition
from narrows.core.errors import NarrowsError
from narrows.kv import pack_affine
from narrows.kv.codec import Affine, fold, unfold


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("group", [1, 4, 16])
def test_codes_scales_and_minima_are_those_of_the_definition(bits, axis, group):
    x = torch.randn(2, 2, 32, 16, generator=torch.Generator().manual_seed(bits)) * 3 + 1
    packed = Affine(bits, axis, group).pack(x)
    folded, scale, low = packed.parts
    codes = unfold(folded, bits)
    for b in range(2):
        for h in range(2):
            wanted = by_definition(x[b, h].numpy(), bits, axis, group)
            found = codes[b, h], scale[b, h], low[b, h]
            for mine, theirs in zip(found, wanted, strict=True):
                assert (mine.numpy() == theirs).all()
    assert packed.nbytes() == x.numel() * bits // 8 + 4 * x.numel() // group


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("group", [1, 8, 32])
def test_the_loops_pack_bit_for_bit_as_plain_torch(bits, axis, group):
    made = torch.Generator().manual_seed(group)
    wide = torch.randn(2, 3, 200, 64, generator=made)
    wide[0] *= 10.0 ** torch.randint(-9, 4, (3, 200, 1), generator=made)  # subnormals of fp16 too
    wide[1, 0] = (wide[1, 0] * 4).round() / 4  # ties
    wide[1, 1] = 0.1  # groups without a spread
    x = wide[:, :, 50:146]  # in a buffer of more, as recent tokens lie
    looped = pack_affine.packed(x, bits, axis == "token", group)
    if looped is None:
        pytest.skip("no C compiler here")
    for mine, plain in zip(looped, Affine(bits, axis, group).plain(x), strict=True):
        assert torch.equal(mine, plain)
    for wrong in (torch.inf, -torch.inf, torch.nan, -65520.0, 65520.0, 1e8):
        odd = x.clone()
        odd[1, 2, 60, 3] = wrong
        looped = pack_affine.packed(odd, bits, axis == "token", group)
        plain = Affine(bits, axis, group).plain(odd)
        assert (looped is None) == (plain is None)
        assert plain is None or wrong > 0
        for mine, theirs in zip(looped or (), plain or (), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_folding_is_undone(bits):
    codes = torch.randint(0, 2**bits, (3, 5, 24), dtype=torch.uint8)
    folded = fold(codes, bits)
    assert folded.shape[-1] == 24 * bits // 8
    assert torch.equal(unfold(folded, bits), codes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shift", [0.0, 100.0, -1e-6, -3000.0])
def test_no_element_is_further_than_half_a_scale(dtype, shift):
    made = torch.Generator().manual_seed(0)
    x = (torch.randn(1, 2, 64, 32, generator=made) + shift).to(dtype)
    for axis, dim in (("channel", 2), ("token", 3)):
        packed = Affine(2, axis, 16).pack(x)
        error = (packed.unpack() - x.float()).abs()
        scale = packed.parts[1].float().repeat_interleave(16, dim)
        assert (error <= scale * 0.501 + 2**-23).all()
        assert error.max() > 0


def test_constant_groups_and_zeros_are_kept():
    x = torch.zeros(1, 1, 32, 32)
    x[..., 16:] = 0.5
    packed = Affine(2, "channel", 32).pack(x)
    assert torch.equal(packed.unpack(), x)
    assert (packed.parts[1] == 0).all()
    odd = torch.full((1, 1, 32, 32), 0.1)
    assert (Affine(2, "token", 32).pack(odd).unpack() - odd).abs().max() < 1e-6


def test_a_span_is_a_view_of_whole_groups():
    packed = Affine(2, "channel", 16).pack(torch.randn(1, 1, 64, 8))
    part = packed.span(16, 48)
    assert torch.equal(part.unpack(), packed.unpack()[:, :, 16:48])
    assert part.parts[0].data_ptr() == packed.parts[0].data_ptr() + 16 * 2
    with pytest.raises(NarrowsError, match="cut through"):
        packed.span(8, 48)


def test_what_cannot_be_coded_is_refused():
    with pytest.raises(NarrowsError, match="do not divide heads"):
        Affine(2, "token", 32).pack(torch.randn(1, 1, 4, 48))
    with pytest.raises(NarrowsError, match="whole bytes"):
        Affine(2, "channel", 4).pack(torch.randn(1, 1, 4, 6))
    with pytest.raises(NarrowsError, match="do not fill groups"):
        Affine(2, "channel", 32).pack(torch.randn(1, 1, 33, 8))
    for bad in (torch.nan, torch.inf, -torch.inf, 1e6, -1e6):
        x = torch.randn(1, 1, 32, 8)
        x[0, 0, 3, 3] = bad
        with pytest.raises(NarrowsError, match="fp16 cannot hold"):
            Affine(2, "channel", 32).pack(x)
