"""What a store is made of: bodies of packed tokens, recent tokens in full, and their attention."""

from __future__ import annotations

import torch

from narrows.kv.attend_packed import BLOCK, Partial, fused, merge, packed
from narrows.kv.codec import Codec, Packed
from narrows.kv.tier import Device, Room, Tier

ROOM = 64
"""Tokens of spare room at least."""


class Body:
    """Packed keys or values of one layer in rooms of a tier, which grow by half."""

    def __init__(self, codec: Codec, tier: Tier | None = None) -> None:
        self.codec = codec
        self.tier = tier or Device()
        self.tokens = 0
        self._size = 0
        self._rooms: tuple[Room, ...] = ()

    def append(self, fresh: Packed) -> None:
        """Add whole blocks of tokens behind the others; on a fault the body is as it was."""
        end = self.tokens + fresh.tokens
        rooms = self._grown(fresh, end) if end > self._size else self._rooms
        for room, part, per in zip(rooms, fresh.parts, self.codec.per, strict=True):
            room.write(self.tokens // per, part)
        self._rooms, self.tokens = rooms, end
        self._size = rooms[0].shape[2] * self.codec.per[0]

    def _grown(self, like: Packed, end: int) -> tuple[Room, ...]:
        """Larger rooms with what is held."""
        block = self.codec.block
        size = -(-(end + max(ROOM, self.tokens // 2)) // block) * block
        rooms = tuple(
            self.tier.room((p.shape[0], p.shape[1], size // per, p.shape[3]), p.dtype, p.device)
            for p, per in zip(like.parts, self.codec.per, strict=True)
        )
        if self.tokens:
            for old, new, per in zip(self._rooms, rooms, self.codec.per, strict=True):
                new.write(0, old.read(0, self.tokens // per))
        return rooms

    def span(self, begin: int, end: int) -> Packed:
        """Tokens `begin` to `end`, both at edges of blocks: views on the device, else loaded."""
        return Packed(
            self.codec,
            tuple(
                room.read(begin // per, end // per)
                for room, per in zip(self._rooms, self.codec.per, strict=True)
            ),
        )

    def take(self, index: torch.Tensor) -> Packed:
        """Chosen tokens, index (batch, kv_heads, k), of a codec that packs tokens singly."""
        if self.codec.block > 1:
            return self.packed.take(index)  # which says why it cannot
        return Packed(self.codec, tuple(room.take(index) for room in self._rooms))

    @property
    def packed(self) -> Packed:
        """All that is held."""
        return self.span(0, self.tokens)

    def nbytes(self) -> int:
        """Bytes held: codes and what they need to be read."""
        return sum(
            room.shape[0] * room.shape[1] * (self.tokens // per) * room.shape[3]
            * room.dtype.itemsize
            for room, per in zip(self._rooms, self.codec.per, strict=True)
        ) if self.tokens else 0  # fmt: skip

    def reserved_bytes(self) -> int:
        """Bytes allocated."""
        return sum(room.nbytes() for room in self._rooms)

    def select(self, rows: torch.Tensor) -> None:
        """Take or reorder rows of the batch."""
        self._rooms = tuple(room.select(rows) for room in self._rooms)


class Tail:
    """Tokens in full precision: they join at the end of a buffer and leave at its front."""

    def __init__(self, room: int) -> None:
        self.room = room or ROOM
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

    def leave(self, count: int) -> None:
        """The oldest tokens go; the buffer that a prompt came in goes with the last of them."""
        self.begin += count
        assert self.buffer is not None
        if self.buffer.shape[2] > 2 * (self.tokens + self.room):
            self.replace(self.view.clone())

    def replace(self, fresh: torch.Tensor) -> None:
        """Hold these tokens instead."""
        self.buffer, self.begin, self.end = None, 0, 0
        self.append(fresh)

    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.buffer is None else self.view.numel() * self.buffer.element_size()

    def reserved_bytes(self) -> int:
        """Bytes allocated."""
        return 0 if self.buffer is None else self.buffer.numel() * self.buffer.element_size()

    def select(self, rows: torch.Tensor) -> None:
        """Take or reorder rows of the batch."""
        if self.buffer is not None:
            self.buffer = self.buffer.index_select(0, rows)


class Segment:
    """Keys and values of the same tokens; of one there may be some more than of the other."""

    def __init__(self, keys: Body, values: Body) -> None:
        self.keys, self.values = keys, values

    @property
    def tokens(self) -> int:
        """Tokens of which both are here."""
        return min(self.keys.tokens, self.values.tokens)

    def attend(
        self, queries: torch.Tensor, bias: torch.Tensor | None, scaling: float,
        tokens: int | None = None,
    ) -> Partial:  # fmt: skip
        """Attention over the first `tokens` as they lie; see attend_packed.packed."""
        tokens = self.tokens if tokens is None else tokens
        bodies = self.keys, self.values
        if all(isinstance(body.tier, Device) for body in bodies):
            keys, values = self.keys.packed, self.values.packed
            return packed(queries, keys, values, tokens, bias, scaling)
        # block by block: never more than a block of a far tier lies on the device
        block = max(body.codec.block for body in bodies)
        step = max(BLOCK // block, 1) * block
        parts: list[Partial] = []
        for begin in range(0, tokens, step):
            end = min(begin + step, tokens)
            keys, values = (
                body.span(begin, -(-end // body.codec.block) * body.codec.block) for body in bodies
            )
            some = None if bias is None else bias[..., begin:end]
            parts.append(packed(queries, keys, values, end - begin, some, scaling))
        return merge(parts)

    def fused(
        self, queries: torch.Tensor, recent: tuple[torch.Tensor, torch.Tensor],
        bias: torch.Tensor | None, scaling: float,
    ) -> torch.Tensor | None:  # fmt: skip
        """Attention over this and the recent tokens behind it; see attend_packed.fused."""
        if not all(isinstance(body.tier, Device) for body in (self.keys, self.values)):
            return None
        return fused(queries, self.keys.packed, self.values.packed, recent, bias, scaling)

    def nbytes(self) -> int:
        """Bytes held."""
        return self.keys.nbytes() + self.values.nbytes()

    def select(self, rows: torch.Tensor) -> None:
        """Take or reorder rows of the batch."""
        self.keys.select(rows)
        self.values.select(rows)
