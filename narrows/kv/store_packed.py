"""What one layer holds when most of it is packed: a body of codes, and a recent part in full.

Two bodies and two residuals lie side by side, as KIVI has it (arXiv 2402.02750, section 3.3):
keys gather in full precision until there are `residual` of them, which are then packed at once;
the most recent `residual` values stay in full, the oldest leaves when one more comes. What is
packed is never unpacked to be packed again. New tokens see each other and the residual in full:
packing happens when a step has been attended (`settle`).
"""

from __future__ import annotations

import torch

from narrows.core.errors import NarrowsError
from narrows.kv.attend_packed import dense, merge, packed
from narrows.kv.codec import Affine, Packed
from narrows.kv.store_torch import ROOM, Store


class Body:
    """Packed tokens of one layer in buffers with room, (batch, kv_heads, tokens, ...)."""

    def __init__(self, codec: Affine) -> None:
        self.codec = codec
        self.tokens = 0
        self._room: Packed | None = None

    def append(self, fresh: Packed) -> None:
        """Add tokens behind the others; along `channel`, whole groups."""
        end = self.tokens + fresh.codes.shape[2]
        if self._room is None or end > self._room.codes.shape[2]:
            self._grow(fresh, end)
        assert self._room is not None
        for room, part in zip(self._room.span(self.tokens, end).parts, fresh.parts, strict=True):
            room.copy_(part)
        self.tokens = end

    def _grow(self, like: Packed, end: int) -> None:
        """Room for half as much again; what is held moves."""
        per = self.codec.group if self.codec.axis == "channel" else 1
        size = -(-(end + max(ROOM, self.tokens // 2)) // per) * per
        each = (size, size // per, size // per)
        made = [
            p.new_empty((*p.shape[:2], n, p.shape[3]))
            for p, n in zip(like.parts, each, strict=True)
        ]
        room = Packed(self.codec, *made)
        if self._room is not None:
            held = self.packed.parts
            for to, part in zip(room.span(0, self.tokens).parts, held, strict=True):
                to.copy_(part)
        self._room = room

    @property
    def packed(self) -> Packed:
        """What is held, as views."""
        assert self._room is not None
        return self._room.span(0, self.tokens)

    def nbytes(self) -> int:
        """Bytes of codes, scales and minima."""
        return self.packed.nbytes() if self.tokens else 0

    def reserved_bytes(self) -> int:
        """Bytes allocated."""
        return 0 if self._room is None else self._room.nbytes()

    def rows(self, index: torch.Tensor) -> None:
        """Take or reorder rows of the batch."""
        if self._room is not None:
            self._room = Packed(self.codec, *(p.index_select(0, index) for p in self._room.parts))


class Tail:
    """Tokens in full precision: they join at the end of a buffer and leave at its front."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.buffer: torch.Tensor | None = None
        self.begin = self.end = 0

    @property
    def view(self) -> torch.Tensor:
        """What is held, (batch, kv_heads, tokens, head_dim)."""
        assert self.buffer is not None
        return self.buffer[:, :, self.begin : self.end]

    @property
    def tokens(self) -> int:
        """How many are held."""
        return self.end - self.begin

    def append(self, fresh: torch.Tensor) -> None:
        """Add tokens."""
        count = fresh.shape[2]
        if self.buffer is None or self.end + count > self.buffer.shape[2]:
            held = self.tokens
            made = fresh.new_empty((*fresh.shape[:2], held + count + self.room, fresh.shape[3]))
            if held:
                made[:, :, :held] = self.view
            self.buffer, self.begin, self.end = made, 0, held
        self.buffer[:, :, self.end : self.end + count] = fresh
        self.end += count

    def take(self, count: int) -> torch.Tensor:
        """The oldest tokens, which leave; a view that lasts until the next append."""
        taken = self.view[:, :, :count]
        self.begin += count
        return taken

    def rows(self, index: torch.Tensor) -> None:
        """Take or reorder rows of the batch."""
        if self.buffer is not None:
            self.buffer = self.buffer.index_select(0, index)


class PackedStore(Store):
    """A Store whose older tokens are codes.

    keys, values: codecs. residual: tokens in full precision, as told above; a multiple of the
    group of keys.
    """

    def __init__(self, keys: Affine, values: Affine, residual: int) -> None:
        self.codecs = keys, values
        self.residual = residual
        super().__init__()

    def clear(self) -> None:
        """Forget everything."""
        super().clear()
        self.bodies = Body(self.codecs[0]), Body(self.codecs[1])
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
        """Called by fill and append: tokens join the residuals."""
        for tail, fresh in zip(self.tails, (keys, values), strict=True):
            tail.append(fresh)
        self._keys, self._values = self.tails[0].buffer, self.tails[1].buffer
        self.held += keys.shape[2]

    def settle(self) -> None:
        """Pack what has left the residuals: whole blocks of keys, single values."""
        keys, values = self.tails
        blocks = keys.tokens // self.residual * self.residual
        for i, due in enumerate((blocks, values.tokens - self.residual)):
            if due > 0:
                self.bodies[i].append(self.codecs[i].pack(self.tails[i].view[:, :, :due]))
                self.tails[i].take(due)
                self._shrink(i)

    def _shrink(self, which: int) -> None:
        """Let go of the buffer that a prompt came in, once it is mostly packed."""
        tail = self.tails[which]
        assert tail.buffer is not None
        if tail.buffer.shape[2] > 2 * (tail.tokens + self.residual):
            kept = tail.view.clone()
            tail.buffer, tail.begin, tail.end = None, 0, 0
            tail.append(kept)
            self._keys, self._values = self.tails[0].buffer, self.tails[1].buffer

    def attend(
        self, queries: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
    ) -> torch.Tensor:
        """See Store: the packed part as it lies, the recent one in full, merged."""
        if not self.held:
            raise NarrowsError("the cache is empty: there is nothing to attend to")
        batch, heads, tokens, size = queries.shape
        (keys, values), (key_tail, value_tail) = self.bodies, self.tails
        kv_heads = key_tail.view.shape[1]
        scale = size**-0.5 if scaling is None else scaling
        asked = queries.float().reshape(batch, kv_heads, -1, size)
        bias = self._bias(self.mask(mask, tokens), kv_heads, heads // kv_heads, tokens)
        old = values.tokens
        recent = key_tail.view.float()
        if keys.tokens > old:  # packed keys whose values are still in full: below `residual`
            per = keys.codec.group
            some = keys.packed.span(old // per * per, keys.tokens).unpack()
            recent = torch.cat([some[:, :, old % per :], recent], 2)
        late = None if bias is None else bias[..., old:]
        parts = [dense(asked, recent, value_tail.view, late, scale)]
        if old:
            early = None if bias is None else bias[..., :old]
            parts.insert(0, packed(asked, keys.packed, values.packed, old, early, scale))
        out = merge(parts)[0].to(queries.dtype)
        return out.reshape(batch, heads, tokens, out.shape[3])

    def _bias(
        self, mask: torch.Tensor | None, kv_heads: int, group: int, tokens: int
    ) -> torch.Tensor | None:
        """The mask as numbers to add, one row for each query that shares a KV head, or one."""
        if mask is None:
            return None
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
        if mask.shape[1] == kv_heads * group and group > 1:
            return mask.float().reshape(mask.shape[0], kv_heads, group * tokens, -1)
        if tokens > 1:
            shape = (*mask.shape[:2], group, *mask.shape[2:])
            mask = mask[:, :, None].expand(shape).flatten(2, 3)
        return mask.float()

    def nbytes(self) -> int:
        """Bytes held: codes, scales, minima, and the residuals (spare room not counted)."""
        full = sum(
            t.view.numel() * t.view.element_size() for t in self.tails if t.buffer is not None
        )
        return full + sum(body.nbytes() for body in self.bodies)

    def reserved_bytes(self) -> int:
        """Bytes really allocated: spare room and column numbers included."""
        held = [t for t in (self._keys, self._values, self.columns) if t is not None]
        full = sum(t.numel() * t.element_size() for t in held)
        return full + sum(body.reserved_bytes() for body in self.bodies)

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
        for part in (*self.bodies, *self.tails):
            part.rows(index)
        self._keys, self._values = self.tails[0].buffer, self.tails[1].buffer
        for name in ("columns", "_first"):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, held.index_select(0, index))
