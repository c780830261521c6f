"""Tokens of which each row and head keeps its own number: one flat buffer, nothing filled up."""

from __future__ import annotations

import torch

from narrows.kv.attend_packed import Partial, dense


class Ragged:
    """Keys and values of chosen tokens, those of each row and head one behind the other.

    columns: (batch, kv_heads, widest) of what each head keeps, ascending, -1 in front where it
    keeps fewer. keys, values: (batch, kv_heads, tokens, head_dim) that the columns count.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, columns: torch.Tensor) -> None:
        self.widest = columns.shape[2]
        self.kept = (columns >= 0).sum(2)
        self.keys, self.values = (_chosen(x, columns) for x in (keys, values))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row's heads, row by row."""
        return self.kept.flatten().tolist()

    def attend(self, queries: torch.Tensor, bias: torch.Tensor | None, scaling: float) -> Partial:
        """Attention of the rows that share each head over what it keeps; see attend_packed.dense.

        bias: (batch or 1, kv_heads or 1, rows or 1, widest); a head's tokens are its last.
        """
        batch, heads, rows = queries.shape[:3]
        if bias is not None:
            bias = bias.expand(batch, heads, *bias.shape[2:])
        out = queries.new_empty((batch, heads, rows, self.values.shape[1]), dtype=torch.float32)
        total = queries.new_empty((batch, heads, rows), dtype=torch.float32)
        parts = zip(*(x.split(self.lengths) for x in (self.keys, self.values)), strict=True)
        for i, (key, value) in enumerate(parts):
            b, h = divmod(i, heads)
            if not len(key):
                out[b, h], total[b, h] = 0, -torch.inf
                continue
            some = None if bias is None else bias[b, h][None, None, :, self.widest - len(key) :]
            made = dense(
                queries[b, h][None, None], key[None, None], value[None, None], some, scaling
            )
            out[b, h], total[b, h] = made[0][0, 0], made[1][0, 0]
        return out, total

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """`keys` or `values` as (batch, kv_heads, widest, head_dim), zeros in front."""
        batch, heads = self.kept.shape
        made = x.new_zeros((batch, heads, self.widest, x.shape[1]))
        for i, part in enumerate(x.split(self.lengths)):
            if len(part):
                made[i // heads, i % heads, -len(part) :] = part
        return made

    def select(self, rows: torch.Tensor) -> None:
        """Take or reorder rows of the batch."""
        heads = self.kept.shape[1]
        order = [int(r) * heads + h for r in rows for h in range(heads)]
        for name in ("keys", "values"):
            parts = getattr(self, name).split(self.lengths)
            setattr(self, name, torch.cat([parts[i] for i in order]))
        self.kept = self.kept.index_select(0, rows)

    def nbytes(self) -> int:
        """Bytes held, all of them real tokens."""
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values))


def _chosen(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The kept tokens, flat, (all kept, head_dim)."""
    batch, heads = columns.shape[:2]
    return torch.cat(
        [x[b, h][columns[b, h][columns[b, h] >= 0]] for b in range(batch) for h in range(heads)]
    )
