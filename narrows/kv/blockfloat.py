"""Block floating point: numbers that share an exponent, each with a small signed mantissa.

A block of n elements has one exponent, `e = floor(log2 of its largest)`; an element is
`mantissa * 2^(e - m + 2)` with a mantissa of m bits, sign included, rounded half to even and
clipped to its symmetric range. With n = 32, m = 4 takes 4.25 bits an element (BFP12), m = 8 takes
8.25 (BFP16). Whoever is far below the largest of its block loses its digits, so it matters which
channels share one: `order` puts keys in another order of channels before they are blocked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

from narrows.core.errors import NarrowsError
from narrows.kv.codec import AXES, Codec, Packed, fold

MANTISSAS = (2, 4, 8)
"""Bits of a mantissa, sign included, that fill bytes."""

EXPONENT_BITS = 8
BIAS = 127
"""Added to an exponent where it is stored; blocks below 2^-127, zeros too, are stored as 0."""

Order = tuple[tuple[int, ...], ...]
"""For each KV head, its channels in the order they are blocked."""


@dataclass(frozen=True, slots=True)
class BlockFloat(Codec):
    """mantissa: bits, of MANTISSAS. block_size: elements that share an exponent.

    axis: `token`, channels of one token share it (keys: the product runs over channels), or
    `channel`, tokens of one channel (values: the product runs over tokens). order: of channels,
    a head, for the axis `token`; what is unpacked is in the order it came in, and products meet
    queries that are put in this order, so that no key is ever put back.

    Parts: mantissas uint8 (tokens, head_dim * mantissa / 8), folded as in codec.py, and exponents
    uint8, a block each.
    """

    mantissa: int
    axis: str
    block_size: int
    order: Order | None = None

    def __post_init__(self) -> None:
        if self.mantissa not in MANTISSAS:
            raise NarrowsError(f"a mantissa has 2, 4 or 8 bits, not {self.mantissa!r}")
        if self.axis not in AXES:
            raise NarrowsError(f"blocks lie along one token or one channel, not {self.axis!r}")
        if self.order is not None and self.axis != "token":
            raise NarrowsError("an order of channels matters only where channels share exponents")

    @property
    def per(self) -> tuple[int, ...]:
        """See Codec."""
        return 1, self.block_size if self.axis == "channel" else 1

    def check(self, head_dim: int) -> None:
        """See Codec."""
        if self.axis == "token" and head_dim % self.block_size:
            raise NarrowsError(
                f"blocks of {self.block_size} channels do not divide heads of {head_dim} channels; "
                "give a block that divides them"
            )
        if head_dim * self.mantissa % 8:
            raise NarrowsError(
                f"heads of {head_dim} channels do not fill whole bytes with mantissas of "
                f"{self.mantissa} bits; give more bits"
            )
        if self.order is not None and any(sorted(o) != list(range(head_dim)) for o in self.order):
            raise NarrowsError(
                f"the order of channels is not one of heads of {head_dim} channels; it belongs to "
                "another model"
            )

    def element_bits(self, head_dim: int) -> float:
        """See Codec."""
        return self.mantissa + EXPONENT_BITS / self.block_size

    def loops(self, role: str) -> Mapping[str, int] | None:
        """See Codec: of keys by token and values by channel."""
        if self.axis != {"KEY": "token", "VALUE": "channel"}[role]:
            return None
        return {f"{role}_BITS": self.mantissa, f"{role}_GROUP": self.block_size, "BLOCK_FLOAT": 1}

    def pack(self, x: torch.Tensor) -> Packed:
        """See Codec. Infinities and what is not a number are refused."""
        tokens, channels = x.shape[2:]
        self.check(channels)
        if tokens % self.block:
            raise NarrowsError(f"{tokens} tokens do not fill blocks of {self.block}")
        x = x.float()
        if not bool(x.isfinite().all()):
            raise NarrowsError(
                "the cache holds keys or values that are infinite or not a number, so they have "
                "no exponent to share"
            )
        blocked, dim = self._blocked(self.ordered(x))
        largest = blocked.abs().amax(dim, keepdim=True)
        # frexp's mantissa lies in [1/2, 1), so its exponent is one above ours
        exponent = (torch.frexp(largest)[1].int() - 1).clamp(min=-BIAS)
        exponent = torch.where(largest > 0, exponent, torch.full_like(exponent, -BIAS))
        most = 2 ** (self.mantissa - 1) - 1
        steps = blocked / _power(exponent - self.mantissa + 2)  # exact: a power of two
        whole = steps.round_().clamp_(-most, most).to(torch.int8).reshape(x.shape)
        codes = whole.view(torch.uint8) & (2**self.mantissa - 1)
        stored = (exponent + BIAS).to(torch.uint8).squeeze(dim)
        return Packed(self, (fold(codes, self.mantissa), stored))

    def unpack(self, packed: Packed) -> torch.Tensor:
        """See Codec."""
        found = self._as_blocked(packed)
        if self.order is None:
            return found
        index = _places(self.order, found.device)[1]
        return found.gather(3, index.expand(found.shape))

    def scores(self, queries: torch.Tensor, packed: Packed) -> torch.Tensor:
        """See Codec: the queries are put in the keys' order, which is far less to move."""
        return self.ordered(queries) @ self._as_blocked(packed).transpose(2, 3)

    def _as_blocked(self, packed: Packed) -> torch.Tensor:
        """What the codes stand for, channels in the order they are blocked."""
        folded, stored = packed.parts
        spare = 8 - self.mantissa
        # mantissas in the upper bits of a byte are signed numbers already, 2^spare too large
        upper = 256 - 2**spare
        planes = [(folded << up) & upper for up in range(spare, -1, -self.mantissa)]
        whole = torch.cat(planes, -1).view(torch.int8).float()
        blocked, dim = self._blocked(whole)
        step = _power(stored.int() - BIAS - self.mantissa + 2 - spare)
        return blocked.mul_(step.unsqueeze(dim)).reshape(whole.shape)

    def ordered(self, x: torch.Tensor) -> torch.Tensor:
        """See Codec."""
        if self.order is None:
            return x
        if len(self.order) != x.shape[1]:
            raise NarrowsError(
                f"the order of channels is of {len(self.order)} KV heads, the keys have "
                f"{x.shape[1]}; it belongs to another model"
            )
        return x.gather(3, _places(self.order, x.device)[0].expand(x.shape))

    def _blocked(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The same elements with those that share an exponent along one axis, and which."""
        size = self.block_size
        if self.axis == "channel":
            return x.unflatten(2, (-1, size)), 3
        return x.unflatten(3, (-1, size)), 4


def _power(exponent: torch.Tensor) -> torch.Tensor:
    """2 to an int32 exponent from -149 to 127, in fp32, exact (pow is not, below 2^-126)."""
    normal = (exponent + BIAS).clamp(min=0) << 23
    subnormal = torch.ones_like(exponent) << (exponent + 149).clamp(0, 22)
    return torch.where(exponent >= -126, normal, subnormal).view(torch.float32)


@cache
def _places(order: Order, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, kv_heads, 1, head_dim): where each channel comes from, and where it went."""
    index = torch.tensor(order, device=device)[None, :, None]
    return index, index.argsort(-1)
