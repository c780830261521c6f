"""Codecs: what keys and values are stored in, and attention over them as they are stored.

A codec turns (batch, kv_heads, tokens, head_dim) into parts whose rows stand for one or more
tokens. It may attend in the space of its codes (`scores`, `mix`); without that, what is needed is
unpacked block by block. Any codec can be put in any tier (tier.py) under any policy (_base.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from narrows.core.errors import NarrowsError
from narrows.kv import pack_affine

BITS = (1, 2, 4, 8)
"""Widths of a code that fill bytes."""

AXES = ("channel", "token")
"""What has a scale of its own: a channel (over a run of tokens), or a token (over channels)."""

SCALES_BITS = 32
"""Bits that a group spends on its scale and minimum."""


class Codec(ABC):
    """A way to store tokens. Frozen, so that equal codecs share compiled code."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Codec:
        return self  # caches share what they are coded by

    @property
    @abstractmethod
    def per(self) -> tuple[int, ...]:
        """Tokens that one row of each part stands for."""

    @property
    def block(self) -> int:
        """Tokens that can only be packed together."""
        return max(self.per)

    @abstractmethod
    def check(self, head_dim: int) -> None:
        """Raise NarrowsError where heads of so many channels cannot be coded."""

    @abstractmethod
    def element_bits(self, head_dim: int) -> float:
        """Bits an element takes, scales included."""

    @abstractmethod
    def pack(self, x: torch.Tensor) -> Packed:
        """Code (batch, kv_heads, tokens, head_dim), a whole number of blocks.

        Raises NarrowsError for values that cannot be coded.
        """

    @abstractmethod
    def unpack(self, packed: Packed) -> torch.Tensor:
        """What the codes stand for, (batch, kv_heads, tokens, head_dim) fp32."""

    def loops(self, role: str) -> Mapping[str, int] | None:
        """Sizes that attend_packed.c is built with to read this; None where it cannot.

        role: `KEY` or `VALUE`, which their names begin with. Keys and values must name one family.
        """
        return None

    def ordered(self, x: torch.Tensor) -> torch.Tensor:
        """Queries or keys (batch, kv_heads, tokens, head_dim), channels as the codes have them."""
        return x

    def scores(self, queries: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Products with packed keys, (batch, kv_heads, rows, tokens) fp32.

        queries: (batch, kv_heads, rows, head_dim) fp32, all that share a KV head, scaled.
        """
        return queries @ self.unpack(packed).transpose(2, 3)

    def mix(self, weights: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Packed values by weights (batch, kv_heads, rows, tokens); (..., rows, head_dim) fp32."""
        return weights @ self.unpack(packed)


@dataclass(slots=True)
class Packed:
    """Coded tokens. parts: what is stored, each (batch, kv_heads, tokens / per, width)."""

    codec: Any
    parts: tuple[torch.Tensor, ...]

    @property
    def tokens(self) -> int:
        """How many tokens these are."""
        return self.parts[0].shape[2] * self.codec.per[0]

    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(t.numel() * t.element_size() for t in self.parts)

    def span(self, begin: int, end: int) -> Packed:
        """Tokens from `begin` to `end` as views; both at edges of blocks."""
        block = self.codec.block
        if begin % block or end % block:
            raise NarrowsError(f"tokens {begin} to {end} cut through groups of {block}")
        return Packed(
            self.codec,
            tuple(
                t[:, :, begin // per : end // per]
                for t, per in zip(self.parts, self.codec.per, strict=True)
            ),
        )

    def take(self, index: torch.Tensor) -> Packed:
        """Chosen tokens, index (batch, kv_heads, k); NarrowsError where tokens are coded together.

        A choice among tokens that share scales goes through `unpack`.
        """
        if self.codec.block > 1:
            raise NarrowsError(
                f"single tokens cannot be taken out of groups of {self.codec.block} that share "
                "their scales"
            )
        return Packed(
            self.codec,
            tuple(
                t.gather(2, index.unsqueeze(-1).expand(*index.shape, t.shape[3]))
                for t in self.parts
            ),
        )

    def unpack(self) -> torch.Tensor:
        """What the codes stand for, (batch, kv_heads, tokens, head_dim) fp32."""
        return self.codec.unpack(self)


@dataclass(frozen=True, slots=True)
class Dense(Codec):
    """Full precision: tokens as they come, in `dtype` (None: their own)."""

    dtype: torch.dtype | None = None

    @property
    def per(self) -> tuple[int, ...]:
        """See Codec."""
        return (1,)

    def check(self, head_dim: int) -> None:
        """Every head can be kept as it is."""

    def element_bits(self, head_dim: int) -> float:
        """Of the stored type; fp32 where it is the tokens' own."""
        return 8.0 * torch.empty(0, dtype=self.dtype or torch.float32).element_size()

    def pack(self, x: torch.Tensor) -> Packed:
        """The tokens themselves."""
        return Packed(self, (x if self.dtype is None else x.to(self.dtype),))

    def unpack(self, packed: Packed) -> torch.Tensor:
        """See Codec."""
        return packed.parts[0].float()


@dataclass(frozen=True, slots=True)
class Affine(Codec):
    """Codes of few bits, a minimum and a scale a group. bits: of a code, of BITS. axis: of AXES.

    A code stands for `code * scale + minimum`, `scale = (largest - smallest) / (2^bits - 1)`,
    both in fp16 (KIVI, arXiv 2402.02750, section 3.2 and its quantisation code). The minimum is
    rounded down to fp16 and the scale is taken from there, so nothing lies below the grid and a
    stored element is within half a scale of the original; where the input is fp16 already this is
    the official rule. `group` elements share a scale: tokens of one channel (`channel`: KIVI's
    keys), or channels of one token (`token`: its values).

    Parts: codes uint8 (tokens, head_dim * bits / 8), scale and minimum fp16. Byte j of a token
    holds channels j, j + W, j + 2 W, ... of the W bytes of a token, the first in the lowest bits,
    so that neighbouring lanes of a vector read neighbouring bytes.
    """

    bits: int
    axis: str
    group: int

    @property
    def per(self) -> tuple[int, ...]:
        """See Codec."""
        of = self.group if self.axis == "channel" else 1
        return 1, of, of

    def check(self, head_dim: int) -> None:
        """See Codec."""
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

    def element_bits(self, head_dim: int) -> float:
        """See Codec."""
        return self.bits + SCALES_BITS / self.group

    def loops(self, role: str) -> Mapping[str, int] | None:
        """See Codec: of keys by channel and values by token."""
        if self.axis != {"KEY": "channel", "VALUE": "token"}[role]:
            return None
        return {f"{role}_BITS": self.bits, f"{role}_GROUP": self.group}

    def pack(self, x: torch.Tensor) -> Packed:
        """See Codec. Raises also where values exceed what fp16 can hold."""
        tokens, channels = x.shape[2:]
        self.check(channels)
        if tokens % self.block:
            raise NarrowsError(f"{tokens} tokens do not fill groups of {self.block}")
        x = x.float()
        looped = pack_affine.packed(x, self.bits, self.axis == "token", self.group)
        parts = self.plain(x) if looped is None else looped
        if parts is None:
            raise NarrowsError(
                "the cache holds keys or values that fp16 cannot hold (infinite, not a number, or "
                "beyond 65504), so they cannot be quantised"
            )
        return Packed(self, parts)

    def plain(self, x: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """The parts by plain torch, on any device; None where fp16 cannot hold them.

        x: (batch, kv_heads, tokens, head_dim) fp32.
        """
        grouped, dim = self._grouped(x)
        low = _half_below(grouped.amin(dim, keepdim=True))
        high = grouped.amax(dim, keepdim=True)
        scale = ((high - low.float()) / (2**self.bits - 1)).half()
        if not bool((low.isfinite() & scale.isfinite()).all()):
            return None
        step = scale.float()
        codes = (grouped - low.float()) / torch.where(step > 0, step, torch.ones_like(step))
        codes = codes.clamp_(0, 2**self.bits - 1).round_()
        codes = torch.where(step > 0, codes, torch.zeros_like(codes)).to(torch.uint8)
        folded = fold(codes.reshape(x.shape), self.bits)
        return folded, scale.squeeze(dim), low.squeeze(dim)

    def unpack(self, packed: Packed) -> torch.Tensor:
        """See Codec."""
        folded, scale, low = packed.parts
        codes = unfold(folded, self.bits).float()
        grouped, dim = self._grouped(codes)
        grouped = grouped * scale.float().unsqueeze(dim) + low.float().unsqueeze(dim)
        return grouped.reshape(codes.shape)

    def _grouped(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The same elements with those that share a scale along one axis, and which that is."""
        batch, heads, tokens, channels = x.shape
        if self.axis == "channel":
            return x.reshape(batch, heads, tokens // self.group, self.group, channels), 3
        return x.reshape(batch, heads, tokens, channels // self.group, self.group), 4


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
