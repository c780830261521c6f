"""What one layer holds: keys and values in place, where each came from, and attention over them.

Nothing is concatenated: new tokens are written into spare room at the end of a buffer, and the
room doubles when it is used up. Where rows or heads keep numbers of prompt tokens of their own,
those lie ragged (ragged.py) and only what follows is in the buffer. Packed tokens and other tiers
are in store_packed.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from narrows.core.errors import NarrowsError
from narrows.kv.attend_packed import dense, merge
from narrows.kv.ragged import Ragged

ROOM = 64
"""Tokens of spare room behind a fresh prompt."""

WASTE = 1 / 16
"""Share of empty slots from which a prompt is kept ragged; below it one product is faster."""


class Store:
    """Keys and values of one layer, (batch, kv_heads, held, head_dim).

    seen: tokens this layer was given, padding included: the column the next token gets.
    held: tokens stored. columns: (batch, kv_heads, kept) of what is kept of the prompt, ascending,
    -1 where a row keeps fewer; None while nothing was evicted (column i is slot i).
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.seen = 0
        self.held = 0
        self.columns: torch.Tensor | None = None
        self._holes = False
        self._room = ROOM
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None
        self._first: torch.Tensor | None = None
        self._ragged: Ragged | None = None

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys held, a view (of a ragged prompt a copy, zeros in empty slots); None: empty."""
        return self._shown(self._keys, "keys")

    @property
    def values(self) -> torch.Tensor | None:
        """The values held, as keys."""
        return self._shown(self._values, "values")

    def _shown(self, buffer: torch.Tensor | None, name: str) -> torch.Tensor | None:
        if buffer is None:
            return None
        own = buffer[:, :, : self._own]
        if self._ragged is None:
            return own
        return torch.cat([self._ragged.padded(getattr(self._ragged, name)), own], 2)

    @property
    def _own(self) -> int:
        """Tokens in the buffer: all that are held, but those of a ragged prompt."""
        return self.held - (0 if self._ragged is None else self._ragged.widest)

    def fill(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        columns: torch.Tensor | None,
        valid: torch.Tensor | None,
    ) -> None:
        """Start with a prompt, or with what `columns` keeps of it.

        keys, values: (batch, kv_heads, tokens, head_dim). valid: (batch, tokens) or None.
        """
        self.clear()
        self.seen = keys.shape[2]
        if valid is not None:
            self._first = valid.int().argmax(1)
        if columns is None:
            self._write(keys, values)
            return
        self.columns = columns.int()  # half the bookkeeping; widened when used
        self._holes = bool((columns < 0).any())
        if type(self) is Store and float((columns < 0).float().mean()) > WASTE:
            self._ragged = Ragged(keys, values, columns)
            self.held = self._ragged.widest
            self._write(keys[:, :, :0], values[:, :, :0])
            return
        index = columns.clamp(min=0).unsqueeze(-1)
        self._write(
            keys.gather(2, index.expand(*columns.shape, keys.shape[3])),
            values.gather(2, index.expand(*columns.shape, values.shape[3])),
        )

    def append(
        self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None
    ) -> None:
        """Add tokens that follow what was seen, in place.

        valid: (batch, tokens) where they are the first and some are padding.
        """
        if valid is not None:
            self._first = valid.int().argmax(1)
        self._write(keys, values)
        self.seen += keys.shape[2]

    def _write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        begin = self._own
        end = begin + keys.shape[2]
        if self._keys is None or self._values is None or end > self._keys.shape[2]:
            self._keys = self._grown(self._keys, keys, end + self._room)
            self._values = self._grown(self._values, values, end + self._room)
            self._room *= 2
        self._keys[:, :, begin:end] = keys
        self._values[:, :, begin:end] = values
        self.held += keys.shape[2]

    def _grown(self, old: torch.Tensor | None, new: torch.Tensor, size: int) -> torch.Tensor:
        buffer = new.new_empty((*new.shape[:2], size, new.shape[3]))
        if old is not None:
            buffer[:, :, : self._own] = old[:, :, : self._own]
        return buffer

    def keep(self, slots: torch.Tensor) -> None:
        """Throw away all held tokens but those of these slots, (batch, kv_heads, k) ascending.

        -1 in front where a row or head keeps fewer. Frees the memory of the others at once.
        """
        if self._ragged is not None:
            raise NarrowsError("what is kept ragged is not chosen from again; start a new cache")
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        columns = self._columns(*keys.shape[:2]).gather(2, slots.clamp(min=0))
        columns = columns.masked_fill(slots < 0, -1)
        index = slots.clamp(min=0).unsqueeze(-1)
        chosen = [x.gather(2, index.expand(*slots.shape, x.shape[3])) for x in (keys, values)]
        self._replace(chosen[0], chosen[1])
        self.columns, self._holes = columns.int(), bool((columns < 0).any())

    def _replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Hold these instead of all that is held."""
        self._keys = self._values = None
        self.held, self._room = 0, ROOM
        self._write(keys, values)

    def _columns(self, batch: int, heads: int) -> torch.Tensor:
        """The column of each held token, (batch, kv_heads, held) int64; -1 for an empty slot."""
        kept = 0 if self.columns is None else self.columns.shape[2]
        new = torch.arange(self.seen - (self.held - kept), self.seen, device=self._device)
        columns = new.expand(batch, heads, -1)
        return columns if self.columns is None else torch.cat([self.columns.long(), columns], -1)

    def settle(self) -> None:
        """Called when new tokens have been attended: what is to be stored otherwise, now is."""

    def attend(
        self, queries: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
    ) -> torch.Tensor:
        """Attention of the last tokens appended over all that is held; see attend.

        queries: (batch, heads, tokens, head_dim). mask: the model's, see mask.
        """
        if self._keys is None or self._values is None:
            raise NarrowsError("the cache is empty: there is nothing to attend to")
        keys, values = self._keys[:, :, : self._own], self._values[:, :, : self._own]
        mask = self.mask(mask, queries.shape[2])
        if self._ragged is None:
            return attend(queries, keys, values, mask, scaling)
        batch, heads, tokens, size = queries.shape
        kv_heads, widest = keys.shape[1], self._ragged.widest
        asked = queries.float().reshape(batch, kv_heads, -1, size)
        scale = size**-0.5 if scaling is None else scaling
        bias = as_bias(mask, kv_heads, heads // kv_heads, tokens)
        early, late = (None, None) if bias is None else (bias[..., :widest], bias[..., widest:])
        parts = [
            self._ragged.attend(asked, early, scale), dense(asked, keys, values, late, scale),
        ]  # fmt: skip
        out = merge(parts)[0].to(queries.dtype)
        return out.reshape(batch, heads, tokens, values.shape[3])

    def mask(self, given: torch.Tensor | None, queries: int) -> torch.Tensor | None:
        """The mask over what is held, for the last `queries` tokens; None where all is visible.

        given: the model's mask over all columns, (batch, 1 or heads, queries, seen), bool (True is
        visible) or additive; None where the model had nothing to mask.
        """
        if given is None and queries == 1 and not self._holes:
            return None
        if given is None:
            row = torch.arange(self.seen - queries, self.seen, device=self._device)
            given = torch.arange(self.seen, device=self._device) <= row[:, None]
            given = given[None, None]
        else:
            given = given[..., : self.seen]
        if self.columns is None:
            return given
        batch, heads, kept = self.columns.shape
        if given.shape[1] not in (1, heads):
            raise NarrowsError(
                f"the attention mask differs by query head ({given.shape[1]} of them), which a "
                "cache with evicted tokens cannot follow; give a mask with one head"
            )
        given = given.expand(batch, heads, *given.shape[2:])
        index = self.columns.long().clamp(min=0)[:, :, None].expand(batch, heads, queries, kept)
        old = given.gather(3, index)
        if self._holes:
            hidden = False if given.dtype == torch.bool else torch.finfo(given.dtype).min
            old = old.masked_fill((self.columns < 0)[:, :, None], hidden)
        new = given[..., self.seen - (self.held - kept) :]
        return torch.cat([old, new], -1)

    def valid(self) -> torch.Tensor | None:
        """Which held tokens are tokens, (batch, held), where some are padding; None: all are.

        Only while nothing was evicted, or every head keeps the same columns.
        """
        if self._first is None:
            return None
        return (self.positions() >= 0).any(1)

    @property
    def batch(self) -> int:
        """Rows of the batch; 0 while empty."""
        return 0 if self._keys is None else self._keys.shape[0]

    @property
    def _device(self) -> torch.device:
        assert self._keys is not None
        return self._keys.device

    def positions(self) -> torch.Tensor:
        """Where in its own row each held token stood, padding not counted; -1 for an empty slot.

        (batch, kv_heads, held) int64.
        """
        if self._keys is None:
            raise NarrowsError("the cache is empty: run a prompt before asking for positions")
        batch, heads = self._keys.shape[:2]
        columns = self._columns(batch, heads)
        if self._first is None:
            return columns
        return torch.where(columns < 0, columns, columns - self._first[:, None, None]).clamp(min=-1)

    def nbytes(self) -> int:
        """Bytes of the keys and values held (spare room and column numbers not counted)."""
        if self._keys is None or self._values is None:
            return 0
        ragged = 0 if self._ragged is None else self._ragged.nbytes()
        return ragged + sum(
            t[:, :, : self._own].numel() * t.element_size() for t in (self._keys, self._values)
        )

    def tiers(self) -> dict[str, int]:
        """Bytes held by the tier they lie in; their sum is nbytes()."""
        return {"device": self.nbytes()}

    def reserved_bytes(self) -> int:
        """Bytes really allocated: spare room and column numbers included."""
        held = [t for t in (self._keys, self._values, self.columns) if t is not None]
        ragged = 0 if self._ragged is None else self._ragged.nbytes()
        return ragged + sum(t.numel() * t.element_size() for t in held)

    def crop(self, tokens: int) -> None:
        """Take back the last `tokens`; those of an evicted prompt cannot be restored."""
        kept = 0 if self.columns is None else self.columns.shape[2]
        if tokens > self.held - kept:
            raise NarrowsError(
                f"{tokens} tokens were to be taken back, but only {self.held - kept} came after "
                "the prompt was compressed; start a new cache instead"
            )
        self.held -= tokens
        self.seen -= tokens

    def rows(self, index: torch.Tensor) -> None:
        """Take (also several times) or reorder rows of the batch."""
        if self._keys is None or self._values is None:
            return
        index = index.to(self._device)
        self._keys = self._keys.index_select(0, index)
        self._values = self._values.index_select(0, index)
        if self._ragged is not None:
            self._ragged.select(index)
        self._rows(index)

    def _rows(self, index: torch.Tensor) -> None:
        """What every store knows of its rows, in another order."""
        if self.columns is not None:
            self.columns = self.columns.index_select(0, index)
        if self._first is not None:
            self._first = self._first.index_select(0, index)

    def state(self) -> dict[str, Any]:
        """All that is held, as tensors and whole numbers by name; see saved.py."""
        told: dict[str, Any] = {"seen": self.seen, "held": self.held}
        if self._keys is not None and self._values is not None:
            told |= {
                "keys": self._keys[:, :, : self._own],
                "values": self._values[:, :, : self._own],
            }
        if self._ragged is not None:
            told |= {f"ragged.{n}": getattr(self._ragged, n) for n in ("keys", "values", "kept")}
        return told | self._told()

    def restore(self, state: dict[str, Any]) -> None:
        """Hold what another store of the same kind told."""
        self.clear()
        if "keys" in state:
            if "ragged.kept" in state:
                self._ragged = Ragged.__new__(Ragged)
                self._ragged.widest = state["held"] - state["keys"].shape[2]
                for name in ("keys", "values", "kept"):
                    setattr(self._ragged, name, state[f"ragged.{name}"])
                self.held = self._ragged.widest
            self._write(state["keys"], state["values"])
        self._know(state)

    def _told(self) -> dict[str, Any]:
        """Columns and padding, where there are any."""
        found = {"columns": self.columns, "first": self._first}
        return {name: x for name, x in found.items() if x is not None}

    def _know(self, state: dict[str, Any]) -> None:
        self.seen, self.held = state["seen"], state["held"]
        self.columns, self._first = state.get("columns"), state.get("first")
        self._holes = self.columns is not None and bool((self.columns < 0).any())


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """Attention of a few queries over a store, (batch, heads, tokens, head_dim).

    queries: (batch, heads, tokens, head_dim); keys, values: (batch, kv_heads, held, head_dim).
    mask: (batch or 1, kv_heads or 1, tokens, held), or with one row a query head, or None.
    The queries that share a KV head become rows of one product, so keys and values are read once
    and never repeated (grouped-query attention, arXiv 2305.13245).
    """
    batch, heads, tokens, size = queries.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    packed = queries.reshape(batch, kv_heads, group * tokens, size)
    if mask is not None and group * tokens > 1:
        if mask.shape[1] == heads:
            mask = mask.reshape(mask.shape[0], kv_heads, group * tokens, -1)
        elif tokens > 1:
            shape = (*mask.shape[:2], group, *mask.shape[2:])
            mask = mask[:, :, None].expand(shape).flatten(2, 3)
    out = F.scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, tokens, values.shape[3])


def as_bias(
    mask: torch.Tensor | None, kv_heads: int, group: int, tokens: int
) -> torch.Tensor | None:
    """A mask as numbers to add, one row for each query that shares a KV head, or one for all.

    mask: see attend. Returns (batch or 1, kv_heads or 1, group * tokens or 1, held) fp32.
    """
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
