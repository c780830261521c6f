"""What one layer holds when most of it is packed: a segment of codes, and a recent part in full.

Keys and values may be in codecs of their own, and their segment in another tier. Keys gather in
full precision until there are `residual` of them, which are then packed at once; the most recent
`residual` values stay in full, the oldest leave when more come (KIVI, arXiv 2402.02750, section
3.3). With a residual of 0 everything is packed as soon as it fills a block of its codec. What is
packed is never unpacked to be packed again. New tokens see each other and the recent part in
full: packing happens when a step has been attended (`settle`).
"""

from __future__ import annotations

from typing import Any

import torch

from narrows.core.errors import NarrowsError
from narrows.kv.attend_packed import dense, merge
from narrows.kv.body import Body, Segment, Tail
from narrows.kv.codec import Codec, Packed
from narrows.kv.store_torch import Store, as_bias
from narrows.kv.tier import Device, Tier


class PackedStore(Store):
    """A Store whose older tokens are codes, in some tier.

    keys, values: codecs. residual: tokens in full precision, as told above; a multiple of the
    blocks of both codecs. tier: where packed tokens lie.
    """

    def __init__(
        self, keys: Codec, values: Codec, residual: int = 0, tier: Tier | None = None
    ) -> None:
        for codec in (keys, values):
            if residual % codec.block:
                raise NarrowsError(
                    f"{residual} recent tokens are not a whole number of the groups of "
                    f"{codec.block} tokens that are packed together"
                )
        self.codecs = keys, values
        self.residual = residual
        self.tier = tier or Device()
        super().__init__()

    def clear(self) -> None:
        """Forget everything."""
        super().clear()
        self.bodies = Body(self.codecs[0], self.tier), Body(self.codecs[1], self.tier)
        self.segment = Segment(*self.bodies)
        self.tails = Tail(self.residual), Tail(self.residual)

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys held, unpacked for inspection: a copy, large; None while empty."""
        return self._whole(0)

    @property
    def values(self) -> torch.Tensor | None:
        """The values held, unpacked for inspection: a copy, large; None while empty."""
        return self._whole(1)

    def _whole(self, which: int) -> torch.Tensor | None:
        body, tail = self.bodies[which], self.tails[which]
        if tail.buffer is None:
            return None
        if not body.tokens:
            return tail.view
        return torch.cat([body.packed.unpack().to(tail.view.dtype), tail.view], 2)

    def fill(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        columns: torch.Tensor | None,
        valid: torch.Tensor | None,
    ) -> None:
        """See Store. Padding takes the place of a row's first token: it must not widen groups."""
        for codec, x in zip(self.codecs, (keys, values), strict=True):
            codec.check(x.shape[3])
        if valid is not None:
            first = valid.int().argmax(1)[:, None, None, None]
            hidden = ~valid[:, None, :, None]
            keys, values = (
                torch.where(hidden, x.gather(2, first.expand(-1, x.shape[1], 1, x.shape[3])), x)
                for x in (keys, values)
            )
        super().fill(keys, values, columns, valid)
        self.settle()

    def _write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        for tail, fresh in zip(self.tails, (keys, values), strict=True):
            tail.append(fresh)
        self._keys, self._values = self.tails[0].buffer, self.tails[1].buffer
        self.held += keys.shape[2]

    def _replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self.bodies[0].tokens or self.bodies[1].tokens:
            raise NarrowsError("tokens that are packed already are not chosen from; choose earlier")
        self.tails = Tail(self.residual), Tail(self.residual)
        self.held = 0
        self._write(keys, values)

    def due(self) -> tuple[int, int]:
        """Keys and values that are to be packed now, the oldest of the recent ones."""
        (keys, values), (key_tail, value_tail) = self.codecs, self.tails
        every = self.residual or keys.block
        leaving = max(value_tail.tokens - self.residual, 0)
        return key_tail.tokens // every * every, leaving // values.block * values.block

    def settle(self) -> None:
        """Pack what has left the recent part: whole blocks."""
        for body, tail, due in zip(self.bodies, self.tails, self.due(), strict=True):
            if due:
                body.append(body.codec.pack(tail.view[:, :, :due]))
                tail.leave(due)
        self._keys, self._values = self.tails[0].buffer, self.tails[1].buffer

    def attend(
        self, queries: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
    ) -> torch.Tensor:
        """See Store: the packed part as it lies, the recent one in full, merged."""
        if not self.held:
            raise NarrowsError("the cache is empty: there is nothing to attend to")
        batch, heads, tokens, size = queries.shape
        kv_heads = self.tails[0].view.shape[1]
        scale = size**-0.5 if scaling is None else scaling
        # a GPU multiplies in the model's own precision, the loops of a processor in fp32
        asked = (queries if queries.is_cuda else queries.float()).reshape(batch, kv_heads, -1, size)
        bias = as_bias(self.mask(mask, tokens), kv_heads, heads // kv_heads, tokens)
        out = None
        if self.segment.tokens:
            tails = self.tails[0].view, self.tails[1].view
            out = self.segment.fused(asked, tails, bias, scale)
        if out is None:
            out = self._merged(asked, bias, scale)
        return out.to(queries.dtype).reshape(batch, heads, tokens, out.shape[3])

    def _merged(
        self, queries: torch.Tensor, bias: torch.Tensor | None, scaling: float
    ) -> torch.Tensor:
        """The packed part and the recent one each by itself, then merged."""
        old = self.segment.tokens
        parts = []
        if old:
            early = None if bias is None else bias[..., :old]
            parts.append(self.segment.attend(queries, early, scaling, old))
        if old < self.held:
            late = None if bias is None else bias[..., old:]
            recent = [self._recent(i, old) for i in (0, 1)]
            parts.append(dense(queries, recent[0], recent[1], late, scaling))
        return merge(parts)[0]

    def _recent(self, which: int, old: int) -> torch.Tensor:
        """Keys or values from token `old` on; some may be packed while their partners are not."""
        body, tail = self.bodies[which], self.tails[which].view.float()
        if body.tokens == old:
            return tail
        block = body.codec.block
        some = body.span(old // block * block, body.tokens).unpack()
        return torch.cat([some[:, :, old % block :], tail], 2)

    def nbytes(self) -> int:
        """Bytes held: codes, scales, minima, and the recent part (spare room not counted)."""
        return self.segment.nbytes() + sum(tail.nbytes() for tail in self.tails)

    def tiers(self) -> dict[str, int]:
        """See Store."""
        told = {"device": sum(tail.nbytes() for tail in self.tails)}
        told[self.tier.name] = told.get(self.tier.name, 0) + self.segment.nbytes()
        return told

    def reserved_bytes(self) -> int:
        """Bytes really allocated: spare room and column numbers included."""
        columns = 0 if self.columns is None else self.columns.numel() * self.columns.element_size()
        return columns + sum(x.reserved_bytes() for x in (*self.bodies, *self.tails))

    def crop(self, tokens: int) -> None:
        """Take back the last `tokens`, of those that are still in full precision."""
        free = min(tail.tokens for tail in self.tails)
        if tokens > free:
            raise NarrowsError(
                f"{tokens} tokens were to be taken back, but only {free} are not packed yet; "
                "start a new cache instead"
            )
        super().crop(tokens)
        for tail in self.tails:
            tail.end -= tokens

    def rows(self, index: torch.Tensor) -> None:
        """Take (also several times) or reorder rows of the batch."""
        if self._keys is None:
            return
        index = index.to(self._device)
        for part in (self.segment, *self.tails):
            part.select(index)
        self._keys, self._values = self.tails[0].buffer, self.tails[1].buffer
        self._rows(index)

    def state(self) -> dict[str, Any]:
        """See Store."""
        told: dict[str, Any] = {"seen": self.seen, "held": self.held}
        for name, body, tail in zip(("key", "value"), self.bodies, self.tails, strict=True):
            if tail.buffer is not None:
                told[f"{name}.tail"] = tail.view
            if body.tokens:
                told |= {f"{name}.part{i}": p for i, p in enumerate(body.packed.parts)}
        return told | self._told()

    def restore(self, state: dict[str, Any]) -> None:
        """See Store."""
        self.clear()
        for name, body, tail in zip(("key", "value"), self.bodies, self.tails, strict=True):
            parts = [state[f"{name}.part{i}"] for i in range(len(body.codec.per))
                     if f"{name}.part{i}" in state]  # fmt: skip
            if parts:
                body.append(Packed(body.codec, tuple(parts)))
            if f"{name}.tail" in state:
                tail.append(state[f"{name}.tail"])
        self._keys, self._values = self.tails[0].buffer, self.tails[1].buffer
        self._know(state)
