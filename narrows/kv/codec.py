"""Affine codes of few bits: a minimum and a scale a group, codes that are really packed.

A code stands for `code * scale + minimum`, `scale = (largest - smallest) / (2^bits - 1)`, both in
fp16 (KIVI, arXiv 2402.02750, section 3.2 and its quantisation code). The minimum is rounded down
to fp16 and the scale is taken from there, so nothing lies below the grid and a stored element is
within half a scale of the original; where the input is fp16 already this is the official rule.

Codes of a token share bytes along its channels: byte j holds channels j, j + W, j + 2 W, ... of
the W bytes of a token, the first in the lowest bits, so that neighbouring lanes of a vector read
neighbouring bytes, and a body may have any number of tokens. Groups are apart from packing: of
`group` tokens in one channel (`channel`: KIVI's keys), or of `group` channels in one token
(`token`: its values).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from narrows.core.errors import NarrowsError

BITS = (1, 2, 4, 8)
"""Widths of a code that fill bytes."""

AXES = ("channel", "token")
"""What has a scale of its own: a channel (over a run of tokens), or a token (over channels)."""

SCALES_BITS = 32
"""Bits that a group spends on its scale and minimum."""


@dataclass(frozen=True, slots=True)
class Affine:
    """A codec. bits: of a code, of BITS. axis: of AXES. group: elements that share a scale."""

    bits: int
    axis: str
    group: int

    def check(self, head_dim: int) -> None:
        """Raise NarrowsError where heads of so many channels cannot be coded."""
        if self.axis == "token" and head_dim % self.group:
            raise NarrowsError(
                f"groups of {self.group} channels do not divide heads of {head_dim} channels; "
                "give a group_size that divides them"
            )
        if head_dim * self.bits % 8:
            raise NarrowsError(
                f"heads of {head_dim} channels do not fill whole bytes with codes of {self.bits} "
                "bits; give more bits"
            )

    def width(self, head_dim: int) -> int:
        """Bytes of a token's codes."""
        return head_dim * self.bits // 8

    def pack(self, x: torch.Tensor) -> Packed:
        """Code (batch, heads, tokens, channels); along `channel`, tokens must fill groups.

        Raises NarrowsError where groups are not filled, or values exceed what fp16 can hold.
        """
        batch, heads, tokens, channels = x.shape
        self.check(channels)
        x = x.float()
        if self.axis == "channel":
            if tokens % self.group:
                raise NarrowsError(f"{tokens} tokens do not fill groups of {self.group}")
            grouped = x.reshape(batch, heads, tokens // self.group, self.group, channels)
            dim = 3
        else:
            grouped = x.reshape(batch, heads, tokens, channels // self.group, self.group)
            dim = 4
        low = _half_below(grouped.amin(dim, keepdim=True))
        high = grouped.amax(dim, keepdim=True)
        scale = ((high - low.float()) / (2**self.bits - 1)).half()
        if not bool((low.isfinite() & scale.isfinite()).all()):
            raise NarrowsError(
                "the cache holds keys or values that fp16 cannot hold (infinite, not a number, or "
                "beyond 65504), so they cannot be quantised"
            )
        step = scale.float()
        codes = (grouped - low.float()) / torch.where(step > 0, step, torch.ones_like(step))
        codes = codes.clamp_(0, 2**self.bits - 1).round_()
        codes = torch.where(step > 0, codes, torch.zeros_like(codes)).to(torch.uint8)
        return Packed(
            self, fold(codes.reshape(x.shape), self.bits), scale.squeeze(dim), low.squeeze(dim)
        )


@dataclass(slots=True)
class Packed:
    """Coded tokens.

    codes: (batch, heads, tokens, width) uint8. scale, minimum: fp16, (batch, heads, tokens /
    group, channels) along `channel`, (batch, heads, tokens, channels / group) along `token`.
    """

    codec: Affine
    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What is stored."""
        return self.codes, self.scale, self.minimum

    def nbytes(self) -> int:
        """Bytes of codes, scales and minima."""
        return sum(t.numel() * t.element_size() for t in self.parts)

    def span(self, begin: int, end: int) -> Packed:
        """Tokens from `begin` to `end` as views; along `channel`, both at edges of groups."""
        per = self.codec.group if self.codec.axis == "channel" else 1
        if begin % per or end % per:
            raise NarrowsError(f"tokens {begin} to {end} cut through groups of {per}")
        inside = slice(begin // per, end // per)
        return Packed(
            self.codec, self.codes[:, :, begin:end], self.scale[:, :, inside],
            self.minimum[:, :, inside],
        )  # fmt: skip

    def unpack(self) -> torch.Tensor:
        """The tokens that the codes stand for, (batch, heads, tokens, channels) fp32."""
        codes = unfold(self.codes, self.codec.bits).float()
        group, (batch, heads, tokens, channels) = self.codec.group, codes.shape
        if self.codec.axis == "channel":
            shape, dim = (batch, heads, tokens // group, group, channels), 3
        else:
            shape, dim = (batch, heads, tokens, channels // group, group), 4
        scale, low = self.scale.float().unsqueeze(dim), self.minimum.float().unsqueeze(dim)
        return (codes.reshape(shape) * scale + low).reshape(codes.shape)


def fold(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (..., channels) uint8 in bytes, (..., channels * bits / 8)."""
    planes = codes.reshape(*codes.shape[:-1], 8 // bits, -1)
    folded = planes[..., 0, :].clone()
    for k in range(1, 8 // bits):
        folded |= planes[..., k, :] << (bits * k)
    return folded


def unfold(folded: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (..., channels) uint8 of bytes."""
    return torch.cat([(folded >> (bits * k)) & (2**bits - 1) for k in range(8 // bits)], -1)


def _half_below(x: torch.Tensor) -> torch.Tensor:
    """The largest fp16 number that is not above x."""
    near = x.half()
    bits = near.view(torch.int16)
    smallest = torch.full_like(bits, -32767)  # the negative number next to zero
    below = torch.where(bits > 0, bits - 1, torch.where((bits & 32767) == 0, smallest, bits + 1))
    return torch.where(near.float() > x, below, bits).view(torch.float16)
