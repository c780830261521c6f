"""Block floating point for the cache, and K-sort: keys' channels in order (arXiv 2403.20137).

Narrow point: every decoded token reads the whole cache, so memory bandwidth limits decode, and
the bytes of the cache cap the batch. Formats whose blocks share an exponent are cheap in hardware
but lose small elements beside large ones, and keys have a few large channels.

Mechanism. A block of n elements shares an exponent of 8 bits, each has a mantissa of m: 4.25 bits
an element at m = 4, n = 32 (BFP12) beside 8.25 at m = 8 (BFP16). Keys are blocked along channels,
values along tokens: each along what its product sums over. K-sort puts the channels of each KV
head in the order of the norms of their rows in W_k, once, from the weights alone, so that large
channels share blocks with each other. Queries are put in the same order: products stay what they
were. Positions rotate channels in pairs with a frequency each, so the order is applied behind
them, by one gather of new keys and one of queries, pairs side by side.

It hurts where no key channel is larger than the others (the order changes nothing), where a block
is a whole head (it cannot) or half of one (channels next in size join the largest: sorting may
lose more than it spares), where the rows of W_k do not tell which channels are large, and wherever
decode is not limited by the cache: unpacking costs operations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.core.method import Price
from narrows.kv._coded import Coding

if TYPE_CHECKING:
    from narrows.kv.blockfloat import Order
    from narrows.kv.store_torch import Store

MANTISSAS = (2, 4, 8)
EXPONENT_BITS = 8


class BFP(Coding):
    """Stores the cache of every layer that attends to all tokens in block floating point.

    key_mantissa, value_mantissa: bits, sign included. block: channels of a key, or tokens of a
    value, that share an exponent; divides head_dim. sort: whether channels of keys are put in the
    order of their weights' norms, which `of` reads from the model.
    """

    key = "bfp"
    paper = "arXiv:2403.20137"
    relieves = "memory capacity"
    settings = "key_mantissa", "value_mantissa", "block", "sort"
    price = Price(
        quality="keys and values are rounded to the exponent of their block: some perplexity",
        memory="up to a block of recent values in full; a layer's prompt twice while it is packed",
    )

    def __init__(
        self,
        key_mantissa: int = 4,
        value_mantissa: int = 4,
        block: int = 32,
        sort: bool = True,
    ) -> None:
        for name, bits in (("key_mantissa", key_mantissa), ("value_mantissa", value_mantissa)):
            if not _whole(bits) or bits not in MANTISSAS:
                raise NarrowsError(f"bfp: {name} must be 2, 4 or 8 bits, not {bits!r}")
        if not _whole(block) or block < 1:
            raise NarrowsError(f"bfp: block must be a whole number from 1 up, not {block!r}")
        if not isinstance(sort, bool):
            raise NarrowsError(f"bfp: sort must be True or False, not {sort!r}")
        self.key_mantissa, self.value_mantissa = int(key_mantissa), int(value_mantissa)
        self.block, self.sort = int(block), sort
        self.order = ""  # a digest of the order, so that saved caches tell orders apart
        self._orders: Mapping[int, Order] | None = None

    @classmethod
    def variants(cls, case: Case) -> tuple[BFP, ...]:
        """The default; and mantissas of 8 bits, which hurt hardly at all."""
        return cls(), cls(8, 8)

    @classmethod
    def ladder(cls, case: Case) -> tuple[BFP, ...]:
        """Smaller mantissas, of values before keys; four blocks or more a head of 64."""
        return tuple(cls(k, v, block=16) for k, v in ((8, 8), (8, 4), (4, 4)))

    def of(self, model: Any, state: Mapping[int, Order] | None = None) -> BFP:
        """With the order of the model's key channels. state: another order, by layer."""
        if not self.sort:
            return self
        from narrows.kv import _ksort

        made = copy(self)
        made._orders = _ksort.key_orders(model) if state is None else state
        made.order = hashlib.sha256(repr(sorted(made._orders.items())).encode()).hexdigest()[:16]
        return made

    def store(self, config: Any, layer: int = 0) -> Store:
        """A packed store; NarrowsError where the model's heads cannot be coded."""
        from narrows.kv.blockfloat import BlockFloat
        from narrows.kv.store_packed import PackedStore

        order = None
        if self.sort:
            if self._orders is None or layer not in self._orders:
                raise NarrowsError(
                    "bfp: to sort channels the model's weights are needed, which a cache alone "
                    "does not see; use BFP(...).of(model), or give sort=False"
                )
            order = self._orders[layer]
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        keys = BlockFloat(self.key_mantissa, "token", self.block, order)
        values = BlockFloat(self.value_mantissa, "channel", self.block)
        for codec in (keys, values):
            codec.check(size)
        return PackedStore(keys, values)

    def _element_bits(self) -> dict[str, float]:
        exponent = EXPONENT_BITS / self.block
        return {"key": self.key_mantissa + exponent, "value": self.value_mantissa + exponent}

    def _in_full(self, seen: np.ndarray) -> dict[str, np.ndarray]:
        return {"key": np.zeros_like(seen), "value": seen % self.block}

    def _check(self, head_dim: int) -> None:
        if head_dim % self.block:
            raise NarrowsError(
                f"bfp: blocks of {self.block} channels do not divide heads of {head_dim} channels; "
                "give a block that divides them"
            )


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
