"""What one layer holds: keys and values in place, where each came from, and attention over them.

Nothing is concatenated: new tokens are written into spare room at the end of a buffer, and the
room doubles when it is used up. All tokens of this store are one segment; packed ones are in
store_packed.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from narrows.core.errors import NarrowsError

ROOM = 64
"""Tokens of spare room behind a fresh prompt."""


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

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys held, a view; None while empty."""
        return None if self._keys is None else self._keys[:, :, : self.held]

    @property
    def values(self) -> torch.Tensor | None:
        """The values held, a view; None while empty."""
        return None if self._values is None else self._values[:, :, : self.held]

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
        index = columns.clamp(min=0).unsqueeze(-1)
        self._write(
            keys.gather(2, index.expand(*columns.shape, keys.shape[3])),
            values.gather(2, index.expand(*columns.shape, values.shape[3])),
        )

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens that follow what was seen, in place."""
        self._write(keys, values)
        self.seen += keys.shape[2]

    def _write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        end = self.held + keys.shape[2]
        if self._keys is None or self._values is None or end > self._keys.shape[2]:
            self._keys = self._grown(self._keys, keys, end + self._room)
            self._values = self._grown(self._values, values, end + self._room)
            self._room *= 2
        self._keys[:, :, self.held : end] = keys
        self._values[:, :, self.held : end] = values
        self.held = end

    def _grown(self, old: torch.Tensor | None, new: torch.Tensor, size: int) -> torch.Tensor:
        buffer = new.new_empty((*new.shape[:2], size, new.shape[3]))
        if old is not None:
            buffer[:, :, : self.held] = old[:, :, : self.held]
        return buffer

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
        keys, values = self._keys[:, :, : self.held], self._values[:, :, : self.held]
        return attend(queries, keys, values, self.mask(mask, queries.shape[2]), scaling)

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
        kept = 0 if self.columns is None else self.columns.shape[2]
        new = torch.arange(self.seen - (self.held - kept), self.seen, device=self._device)
        columns = new.expand(batch, heads, -1)
        if self.columns is not None:
            columns = torch.cat([self.columns.long(), columns], -1)
        if self._first is None:
            return columns
        return (columns - self._first[:, None, None]).clamp(min=-1)

    def nbytes(self) -> int:
        """Bytes of the keys and values held (spare room and column numbers not counted)."""
        if self._keys is None or self._values is None:
            return 0
        return sum(
            t[:, :, : self.held].numel() * t.element_size() for t in (self._keys, self._values)
        )

    def reserved_bytes(self) -> int:
        """Bytes really allocated: spare room and column numbers included."""
        held = [t for t in (self._keys, self._values, self.columns) if t is not None]
        return sum(t.numel() * t.element_size() for t in held)

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
        if self.columns is not None:
            self.columns = self.columns.index_select(0, index)
        if self._first is not None:
            self._first = self._first.index_select(0, index)


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
