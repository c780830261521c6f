"""Tokens away from the device, that come in order, go in order, and are fetched one by one."""

from __future__ import annotations

import torch

from narrows.kv.tier import Room, Tier

PIECES, LEAST = 4, 256
"""Pieces that the tokens of a plan are kept in, and the least tokens of one."""


class Pieces:
    """One layer's tokens in rooms of a tier, each of `size` slots of all rows and heads.

    Nothing is copied when more come or when the oldest go, and what is fetched is exactly what
    was chosen, however unlike rows and heads choose. group: tokens that move together.
    """

    def __init__(self, tier: Tier, group: int, expected: int) -> None:
        self.tier, self.group = tier, group
        self.size = max(expected // PIECES, LEAST) // group * group or group
        self.rooms: list[Room | None] = []
        self.heads = (0, 0)

    def send(self, fresh: torch.Tensor, begin: int) -> None:
        """Write tokens (batch, kv_heads, n, width) from slot `begin` on."""
        self.heads = fresh.shape[0], fresh.shape[1]
        end, count = begin + fresh.shape[2], fresh.shape[0] * fresh.shape[1]
        for piece in range(begin // self.size, -(-end // self.size)):
            while len(self.rooms) <= piece:
                gone = (len(self.rooms) + 1) * self.size <= begin
                shape = 1, 1, count * self.size, fresh.shape[3]
                self.rooms.append(
                    None if gone else self.tier.room(shape, fresh.dtype, fresh.device)
                )
            room = self.rooms[piece]
            assert room is not None
            first, last = max(begin, piece * self.size), min(end, (piece + 1) * self.size)
            some = fresh[:, :, first - begin : last - begin].permute(2, 0, 1, 3)
            room.write(first % self.size * count, some.flatten(0, 2)[None, None])

    def take(self, heads: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Tokens of any heads, (n, width). heads: row * kv_heads + head; slots: as many."""
        count = self.heads[0] * self.heads[1]
        at = slots % self.size * count + heads
        first, last = (int(x) // self.size for x in (slots.min(), slots.max()))
        found: torch.Tensor | None = None
        for piece in range(first, last + 1):
            room = self.rooms[piece]
            assert room is not None
            if first == last:
                return room.take(at[None, None])[0, 0]
            mine = slots // self.size == piece
            if bool(mine.any()):
                some = room.take(at[mine][None, None])[0, 0]
                if found is None:
                    found = some.new_empty((len(slots), some.shape[1]))
                found[mine] = some
        assert found is not None
        return found

    def read(self, begin: int, end: int) -> torch.Tensor:
        """All tokens of these slots, (batch, kv_heads, n, width)."""
        parts = [
            room.read(0, room.shape[2]).reshape(self.size, *self.heads, -1).permute(1, 2, 0, 3)
            for room in self.rooms if room is not None
        ]  # fmt: skip
        before = sum(room is None for room in self.rooms) * self.size
        return torch.cat(parts, 2)[:, :, begin - before : end - before]

    def forget(self, end: int) -> None:
        """Free what lies wholly before slot `end`."""
        for piece in range(min(end // self.size, len(self.rooms))):
            self.rooms[piece] = None

    def selected(self, rows: torch.Tensor, begin: int, end: int) -> Pieces:
        """The same slots of these rows of the batch."""
        made = Pieces(self.tier, self.group, self.size * PIECES)
        if end > begin:
            made.send(self.read(begin, end).index_select(0, rows), begin)
        return made

    def nbytes(self, begin: int, end: int) -> int:
        """Bytes of the tokens from slot `begin` to `end`."""
        room = next((x for x in self.rooms if x is not None), None)
        return 0 if room is None else room.nbytes() // self.size * (end - begin)

    def reserved_bytes(self) -> int:
        """Bytes allocated."""
        return sum(room.nbytes() for room in self.rooms if room is not None)
