"""KIVI: the cache in 2 bits, keys by channel and values by token (arXiv 2402.02750).

Narrow point: every decoded token reads the whole cache, so memory bandwidth limits decode, and
the bytes of the cache cap the batch.

Mechanism. Some channels of keys are large in every token, so keys share a minimum and a scale
along `group_size` tokens of one channel; values have no such channels and share theirs along
`group_size` channels of one token. Both are fp16, codes are packed. Keys (positions applied)
stay in full precision until there are `residual_length` of them, then the block is packed at
once; of values the most recent `residual_length` stay in full and the oldest is packed when one
more comes. Prefill attends what it computed; decode multiplies with the codes as they lie.

It hurts where keys of a channel vary within a group more than 2 bits can tell (small heads, no
large channels), in prompts of a few hundred tokens, most of which is residual, and wherever
decode is not limited by the cache: unpacking costs operations. Prefill gains nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.core.method import Price
from narrows.kv._coded import Coding

if TYPE_CHECKING:
    from narrows.kv.store_torch import Store

BITS = (1, 2, 4, 8)
SCALES_BITS = 32
"""Of a group: scale and minimum in fp16."""


class KIVI(Coding):
    """Packs the cache of every layer that attends to all tokens.

    key_bits, value_bits: of a code. group_size: tokens (keys) or channels (values) that share a
    scale; divides head_dim and residual_length. residual_length: recent tokens in full precision.
    """

    key = "kivi"
    paper = "arXiv:2402.02750"
    relieves = "memory bandwidth"
    settings = "key_bits", "value_bits", "group_size", "residual_length"
    price = Price(
        quality="keys and values are rounded to four levels a group: some perplexity",
        memory="recent tokens stay in full precision; a layer's prompt twice while it is packed",
    )

    def __init__(
        self,
        key_bits: int = 2,
        value_bits: int = 2,
        group_size: int = 32,
        residual_length: int = 128,
    ) -> None:
        for name, bits in (("key_bits", key_bits), ("value_bits", value_bits)):
            if not _whole(bits) or bits not in BITS:
                raise NarrowsError(f"kivi: {name} must be 1, 2, 4 or 8, not {bits!r}")
        for name, value in (("group_size", group_size), ("residual_length", residual_length)):
            if not _whole(value) or value < 1:
                raise NarrowsError(f"kivi: {name} must be a whole number from 1 up, not {value!r}")
        if residual_length % group_size:
            raise NarrowsError(
                f"kivi: residual_length must be a multiple of the group_size of {group_size}, "
                f"because keys are packed in whole groups; it is {residual_length}"
            )
        self.key_bits, self.value_bits = int(key_bits), int(value_bits)
        self.group_size, self.residual_length = int(group_size), int(residual_length)

    @classmethod
    def variants(cls, case: Case) -> tuple[KIVI, ...]:
        """The default; and 4 bits, which hurt less."""
        return cls(), cls(key_bits=4, value_bits=4)

    @classmethod
    def ladder(cls, case: Case) -> tuple[KIVI, ...]:
        """Fewer bits, of values before keys; a residual that does not outweigh what is packed."""
        bits = (8, 8), (4, 4), (4, 2), (2, 2)
        return tuple(cls(keys, values, residual_length=32) for keys, values in bits)

    def store(self, config: Any, layer: int = 0) -> Store:
        """A packed store; NarrowsError where the model's heads cannot be coded."""
        from narrows.kv.codec import Affine
        from narrows.kv.store_packed import PackedStore

        size = getattr(config, "head_dim", None)
        self._check(size or config.hidden_size // config.num_attention_heads)
        keys = Affine(self.key_bits, "channel", self.group_size)
        values = Affine(self.value_bits, "token", self.group_size)
        return PackedStore(keys, values, self.residual_length)

    def _check(self, head_dim: int) -> None:
        if head_dim % self.group_size:
            raise NarrowsError(
                f"kivi: groups of {self.group_size} channels do not divide heads of {head_dim} "
                "channels; give a group_size that divides them"
            )
        if head_dim * min(self.key_bits, self.value_bits) % 8:
            raise NarrowsError(
                f"kivi: heads of {head_dim} channels do not fill whole bytes at this many bits; "
                "give more bits"
            )

    def _element_bits(self) -> dict[str, float]:
        scales = SCALES_BITS / self.group_size
        return {"key": self.key_bits + scales, "value": self.value_bits + scales}

    def _in_full(self, seen: np.ndarray) -> dict[str, np.ndarray]:
        size = self.residual_length
        return {"key": seen % size, "value": np.minimum(seen, size)}


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
