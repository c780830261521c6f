"""What a layer holds under ZipVL: important tokens in more bits, the others in fewer.

Keys are coded by channel, values by token once every channel was divided by the square root of
its largest magnitude ("channel-separable token-wise", ZipCache, arXiv 2405.14256); a token's
scale is shared by all KV heads. Each row of a batch chose for itself, so a row has runs of its
own. Runs are attended as they lie and merged with the new tokens, which stay in full precision
until there are `refresh` of them. What is packed is never unpacked to be packed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from narrows.core.errors import NarrowsError
from narrows.kv._base import Prompt
from narrows.kv.attend_packed import FEW, Partial, compiled, dense, merge, packed
from narrows.kv.body import Tail
from narrows.kv.codec import Affine, Packed, fold, unfold
from narrows.kv.store_torch import Store, as_bias
from narrows.kv.zipvl_torch import Chooser

KEY_GROUP = 1024
"""Tokens of a run that share the scale of a key channel. The paper shares one over all; a bound
lets the loops over codes keep a block on the stack, for 0.03 bits an element."""

OTHER, IMPORTANT = 1, 2
"""What a slot's token is; 0: padding."""


@dataclass(frozen=True, slots=True)
class Keys(Affine):
    """Affine by channel whose last group may be short."""

    def pack(self, x: torch.Tensor) -> Packed:
        """See Codec."""
        tokens = x.shape[2]
        short = -tokens % self.group
        # repeating a token moves neither the least nor the largest
        filled = torch.cat([x, x[:, :, -1:].expand(-1, -1, short, -1)], 2) if short else x
        codes, scale, low = Affine.pack(self, filled).parts
        return Packed(self, (codes[:, :, :tokens].clone() if short else codes, scale, low))

    def unpack(self, packed: Packed) -> torch.Tensor:
        """See Codec."""
        codes, scale, low = packed.parts
        short = -codes.shape[2] % self.group
        filled = torch.nn.functional.pad(codes, (0, 0, 0, short))
        whole = Affine.unpack(self, Packed(self, (filled, scale, low)))
        return whole[:, :, : codes.shape[2]]


def pack_values(x: torch.Tensor, bits: int) -> tuple[Packed, torch.Tensor]:
    """Codes of (1, kv_heads, tokens, head_dim), and what each channel was divided by.

    Scale and minimum of a token are one number for all heads, seen by each (stride 0).
    """
    kv_heads, _, size = x.shape[1:]
    x = x.float()
    factor = x.abs().amax(2, keepdim=True).sqrt().half()
    factor = torch.where(factor > 0, factor, torch.ones_like(factor))
    merged = (x / factor.float()).transpose(1, 2).flatten(2).unsqueeze(1)
    codes, scale, low = Affine(bits, "token", kv_heads * size).pack(merged).parts
    # bytes of all heads together lie in planes of that width: lay them out head by head
    plain = unfold(codes, bits)[:, 0].unflatten(2, (kv_heads, size)).transpose(1, 2)
    each = fold(plain.contiguous(), bits)
    shared = (t.expand(-1, kv_heads, -1, -1) for t in (scale, low))
    return Packed(Affine(bits, "token", size), (each, *shared)), factor


@dataclass(slots=True)
class Run:
    """Tokens of one row in so many bits. factor: of value channels, (1, kv_heads, 1, head_dim)."""

    keys: Packed
    values: Packed
    factor: torch.Tensor

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor, bits: int) -> Run:
        """Code (1, kv_heads, tokens, head_dim)."""
        return cls(Keys(bits, "channel", KEY_GROUP).pack(keys), *pack_values(values, bits))

    def attend(self, queries: torch.Tensor, bias: torch.Tensor | None, scaling: float) -> Partial:
        """Attention over codes; shapes as in attend_packed.packed."""
        tokens = self.keys.tokens
        few = queries.device.type == "cpu" and queries.shape[2] <= FEW
        if few and compiled(queries.shape[3], queries.shape[2], self.keys.codec, self.values.codec):
            out, total = packed(queries, self.keys, self.values, tokens, bias, scaling)
            return out * self.factor.float(), total
        parts = [self._block(queries, i, bias, scaling) for i in range(0, tokens, KEY_GROUP)]
        out, total = merge(parts)
        return out * self.factor.float(), total

    def _block(
        self, queries: torch.Tensor, begin: int, bias: torch.Tensor | None, scaling: float
    ) -> Partial:
        """Attention over one group of tokens, unpacked."""
        end, group = begin + KEY_GROUP, begin // KEY_GROUP
        codes, scale, low = self.keys.parts
        at = slice(group, group + 1)
        some = (codes[:, :, begin:end], scale[:, :, at], low[:, :, at])
        keys = Packed(self.keys.codec, some).unpack()
        parts = tuple(t[:, :, begin:end] for t in self.values.parts)
        values = Packed(self.values.codec, parts).unpack()
        return dense(queries, keys, values, None if bias is None else bias[..., begin:end], scaling)

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that the codes stand for."""
        return self.keys.unpack(), self.values.unpack() * self.factor.float()

    def stored(self) -> tuple[torch.Tensor, ...]:
        """All that is stored, shared scales once."""
        codes, scale, low = self.values.parts
        return *self.keys.parts, codes, scale[:, :1], low[:, :1], self.factor

    @classmethod
    def from_stored(cls, parts: list[torch.Tensor], bits: int) -> Run:
        """The run that told these."""
        heads, size = parts[6].shape[1], parts[6].shape[3]
        scale, low = (t.expand(-1, heads, -1, -1) for t in parts[4:6])
        return cls(
            Packed(Keys(bits, "channel", KEY_GROUP), tuple(parts[:3])),
            Packed(Affine(bits, "token", size), (parts[3], scale, low)), parts[6],
        )  # fmt: skip


@dataclass(slots=True)
class Piece:
    """Consecutive slots of one row, packed at once. kinds: of each slot, (slots,) uint8."""

    start: int
    kinds: torch.Tensor
    runs: dict[int, Run]

    def slots(self, kind: int) -> torch.Tensor:
        """Where tokens of this kind are."""
        return self.start + (self.kinds == kind).nonzero()[:, 0]

    def nbytes(self) -> int:
        """Codes, scales, factors, and which token is of which kind."""
        return sum(t.nbytes for run in self.runs.values() for t in run.stored()) + self.kinds.nbytes


class ZipStore(Store):
    """A Store of runs, and of new tokens in full precision.

    chooser: says what is important; what it did not choose from (a prompt that another policy
    cut) is important as a whole. bits: of important and other tokens. refresh: new tokens that
    are packed at once; their queries are held until then, because the choice needs them.
    """

    def __init__(
        self, chooser: Chooser, bits: tuple[int, int], refresh: int, layer: int = 0
    ) -> None:
        self.chooser, self.refresh, self.layer = chooser, refresh, layer
        self.bits = {IMPORTANT: bits[0], OTHER: bits[1]}
        super().__init__()

    def clear(self) -> None:
        """Forget everything."""
        super().clear()
        self.pieces: list[list[Piece]] = []  # by row
        self.packed_slots = 0
        self._renew()

    def _renew(self) -> None:
        self.tails = Tail(self.refresh), Tail(self.refresh)
        self.asked = Tail(self.refresh)
        self.read = False
        self.scaling = 1.0

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys held, unpacked for inspection, zero on padding; None while empty."""
        return self._whole(0)

    @property
    def values(self) -> torch.Tensor | None:
        """The values held, as keys."""
        return self._whole(1)

    def _whole(self, which: int) -> torch.Tensor | None:
        if self.tails[which].buffer is None:
            return None
        recent = self.tails[which].view
        out = recent.new_zeros((*recent.shape[:2], self.packed_slots, recent.shape[3]))
        for row, pieces in enumerate(self.pieces):
            for piece in pieces:
                for kind, run in piece.runs.items():
                    out[row][:, piece.slots(kind)] = run.unpack()[which][0].to(out.dtype)
        return torch.cat([out, recent], 2)

    def fill(
        self, keys: torch.Tensor, values: torch.Tensor, columns: torch.Tensor | None,
        valid: torch.Tensor | None,
    ) -> None:  # fmt: skip
        """See Store. All of the prompt is packed."""
        super().fill(keys, values, columns, valid)
        self.settle()

    def _write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        for tail, fresh in zip(self.tails, (keys, values), strict=True):
            tail.append(fresh)
        self._keys, self._values = self.tails[0].buffer, self.tails[1].buffer
        self.held += keys.shape[2]

    def _replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self.pieces:
            raise NarrowsError("tokens that are packed already are not chosen from; choose earlier")
        self._renew()
        self.held = 0
        self._write(keys, values)

    def settle(self) -> None:
        """Pack a prompt that has ended, or `refresh` new tokens."""
        if not self.read:
            alive = (self.positions() >= 0).any(1)
            chosen = self.chooser.pending.pop(self.layer, None)
            fits = chosen is not None and all(len(c) == self.held for c in chosen)
            self._pack(self.held, chosen if fits and chosen is not None else list(alive), alive)
            self.read = True
            return
        while self.tails[0].tokens >= self.refresh and self.asked.tokens >= self.refresh:
            keys = self.tails[0].view[:, :, : self.refresh]
            queries = self.asked.view[:, :, : self.refresh]
            step = Prompt(self.layer, queries, keys, keys, None, self.scaling)
            alive = torch.ones(keys.shape[0], self.refresh, dtype=torch.bool, device=keys.device)
            self._pack(self.refresh, self.chooser.choose(step), alive)
            self.asked.leave(self.refresh)

    def _pack(self, count: int, chosen: list[torch.Tensor], alive: torch.Tensor) -> None:
        """The oldest `count` tokens in full, into runs."""
        keys, values = (tail.view[:, :, :count] for tail in self.tails)
        self.pieces = self.pieces or [[] for _ in range(keys.shape[0])]
        for row, important in enumerate(chosen):
            kinds = alive[row].to(torch.uint8)
            kinds[important & alive[row]] = IMPORTANT
            runs: dict[int, Run] = {}
            for kind, bits in self.bits.items():
                at = (kinds == kind).nonzero()[:, 0]
                if len(at):
                    some = [x[row : row + 1].index_select(2, at) for x in (keys, values)]
                    runs[kind] = Run.of(some[0], some[1], bits)
            self.pieces[row].append(Piece(self.packed_slots, kinds, runs))
        self.packed_slots += count
        for tail in self.tails:
            tail.leave(count)
        self._keys, self._values = self.tails[0].buffer, self.tails[1].buffer

    def attend(
        self, queries: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
    ) -> torch.Tensor:
        """See Store: every run as it lies, new tokens in full, merged."""
        if not self.held:
            raise NarrowsError("the cache is empty: there is nothing to attend to")
        batch, heads, tokens, size = queries.shape
        recent = [tail.view for tail in self.tails]
        kv_heads = recent[0].shape[1]
        scale = self.scaling = size**-0.5 if scaling is None else scaling
        if self.read:
            self.asked.append(queries)
        rows = queries.float().reshape(batch, kv_heads, -1, size)
        bias = as_bias(self.mask(mask, tokens), kv_heads, heads // kv_heads, tokens)
        made = []
        for row in range(batch):
            asked = rows[row : row + 1]
            mine = None if bias is None else bias[row : row + 1] if len(bias) > 1 else bias
            parts: list[Partial] = []
            for piece in self.pieces[row] if self.pieces else ():
                for kind, run in piece.runs.items():
                    some = None if mine is None else mine[..., piece.slots(kind)]
                    parts.append(run.attend(asked, some, scale))
            if recent[0].shape[2]:
                late = None if mine is None else mine[..., self.packed_slots :]
                parts.append(dense(asked, recent[0][row : row + 1].float(),
                                   recent[1][row : row + 1].float(), late, scale))  # fmt: skip
            made.append(merge(parts)[0])
        out = torch.cat(made).to(queries.dtype)
        return out.reshape(batch, heads, tokens, out.shape[3])

    def nbytes(self) -> int:
        """Bytes held: runs, new tokens, and the queries that wait for the next choice."""
        packed = sum(piece.nbytes() for pieces in self.pieces for piece in pieces)
        return packed + sum(t.nbytes() for t in (*self.tails, self.asked) if t.buffer is not None)

    def reserved_bytes(self) -> int:
        """Bytes really allocated: spare room and column numbers included."""
        columns = 0 if self.columns is None else self.columns.nbytes
        tails = (*self.tails, self.asked)
        packed = sum(piece.nbytes() for pieces in self.pieces for piece in pieces)
        return columns + packed + sum(t.reserved_bytes() for t in tails if t.buffer is not None)

    def crop(self, tokens: int) -> None:
        """Take back the last `tokens`, of those that are still in full precision."""
        free = self.tails[0].tokens
        if tokens > free:
            raise NarrowsError(
                f"{tokens} tokens were to be taken back, but only {free} are not packed yet; "
                "start a new cache instead"
            )
        super().crop(tokens)
        for tail in (*self.tails, self.asked):
            tail.end -= min(tokens, tail.tokens)

    def rows(self, index: torch.Tensor) -> None:
        """Take (also several times) or reorder rows of the batch; packed rows are shared."""
        if self._keys is None:
            return
        index = index.to(self._device)
        for tail in (*self.tails, self.asked):
            if tail.buffer is not None:
                tail.select(index)
        if self.pieces:
            self.pieces = [list(self.pieces[i]) for i in index.tolist()]
        self._keys, self._values = self.tails[0].buffer, self.tails[1].buffer
        self._rows(index)

    def state(self) -> dict[str, Any]:
        """See Store."""
        told: dict[str, Any] = {"seen": self.seen, "held": self.held, "read": int(self.read)}
        for name, tail in zip(("key", "value", "asked"), (*self.tails, self.asked), strict=True):
            if tail.buffer is not None:
                told[f"{name}.tail"] = tail.view
        told["rows"] = len(self.pieces)
        for row, pieces in enumerate(self.pieces):
            for i, piece in enumerate(pieces):
                told[f"piece.{row}.{i}.kinds"] = piece.kinds
                for kind, run in piece.runs.items():
                    for j, part in enumerate(run.stored()):
                        told[f"piece.{row}.{i}.{kind}.{j}"] = part
        return told | self._told()

    def restore(self, state: dict[str, Any]) -> None:
        """See Store."""
        self.clear()
        for name, tail in zip(("key", "value", "asked"), (*self.tails, self.asked), strict=True):
            if f"{name}.tail" in state:
                tail.append(state[f"{name}.tail"])
        for row in range(state["rows"]):
            self.pieces.append([])
            start = 0
            while (name := f"piece.{row}.{len(self.pieces[row])}") + ".kinds" in state:
                kinds = state[f"{name}.kinds"]
                runs = {
                    kind: Run.from_stored([state[f"{name}.{kind}.{j}"] for j in range(7)], bits)
                    for kind, bits in self.bits.items() if f"{name}.{kind}.0" in state
                }  # fmt: skip
                self.pieces[row].append(Piece(start, kinds, runs))
                start += len(kinds)
            self.packed_slots = start
        self.read = bool(state["read"])
        self._keys, self._values = self.tails[0].buffer, self.tails[1].buffer
        self._know(state)
