"""What lately was looked at: weights of the last steps, their sums, and how they reach a store."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from narrows.kv._base import Prompt

ONE = 1 << 24
"""What a weight of 1 is in the history: whole numbers, so that what leaves a sum takes away
exactly what it brought."""

PLACES = 21
"""Bits of a rank that hold the slot: of equal sums the most recent token is chosen."""


class History:
    """Weights of the last steps, and their sums by token: what ranks the tokens.

    A step's weights are (batch, heads, k) of the slots it attended; heads is 1 where all share
    their tokens (a mean over heads), or the KV heads where each keeps its own. Each row sums as
    many steps as it is told to keep.
    """

    def __init__(self) -> None:
        self.sums: torch.Tensor | None = None
        self.rows: deque[tuple[torch.Tensor | None, torch.Tensor]] = deque()
        self.keep = np.zeros((0, 0), np.int64)

    def begin(self, rows: torch.Tensor, keep: np.ndarray) -> None:
        """Start with the last steps of a prompt, (batch, heads, steps, tokens) int32."""
        self.rows = deque((None, row) for row in rows.unbind(2))
        self.sum(keep)

    def sum(self, keep: np.ndarray) -> None:
        """Sum the last `keep` steps of each row, (batch, heads), afresh."""
        self.keep, self.sums = keep, None
        least = int(keep.max(initial=0))
        while len(self.rows) > least:
            self.rows.popleft()
        for i, entry in enumerate(reversed(self.rows)):
            self._add(entry, self._where(keep > i))

    def push(self, slots: torch.Tensor, weights: torch.Tensor, keep: np.ndarray) -> None:
        """Add a step, and let those go that are older than the last `keep`."""
        slots, weights = slots.int(), (weights * ONE).round_().int()
        weights = weights.masked_fill_(slots < 0, 0)
        if self.keep.shape != keep.shape:
            self.keep = np.zeros_like(keep)
        self.rows.append((slots, weights))
        self._add(self.rows[-1])
        leaving = keep == self.keep
        for size in np.unique(keep[leaving]):
            if len(self.rows) > size:
                entry = self.rows[-1 - int(size)]
                self._add(entry, self._where(leaving & (keep == size)), -1)
        self.keep = keep
        while len(self.rows) > int(keep.max()):
            self.rows.popleft()

    def ranks(self, tokens: int) -> torch.Tensor:
        """What the first `tokens` slots are chosen by, (batch, heads, tokens) int64, all unlike."""
        assert self.sums is not None
        self._reserve(tokens)
        place = torch.arange(tokens, device=self.sums.device)
        return (self.sums[..., :tokens] << PLACES) + place

    def crop(self, steps: int, keep: np.ndarray) -> None:
        """Take back the last steps. Those that had left before are not there again."""
        for _ in range(min(steps, len(self.rows))):
            self.rows.pop()
        self.sum(keep)

    def select(self, index: torch.Tensor) -> None:
        """Rows of the batch in another order."""
        self.keep = self.keep[index.cpu().numpy()] if self.keep.size else self.keep
        if self.sums is not None:
            self.sums = self.sums.index_select(0, index)
        self.rows = deque(
            (None if slots is None else slots.index_select(0, index), x.index_select(0, index))
            for slots, x in self.rows
        )

    def dense(self, tokens: int) -> torch.Tensor | None:
        """All steps, (batch, heads, steps, tokens) int32; None: none."""
        if not self.rows:
            return None
        batch, heads = self.rows[0][1].shape[:2]
        made = self.rows[0][1].new_zeros((batch, heads, len(self.rows), tokens))
        for i, (slots, weights) in enumerate(self.rows):
            if slots is None:
                made[:, :, i, : weights.shape[2]] = weights
            else:
                made[:, :, i].scatter_add_(2, slots.long().clamp(min=0), weights)
        return made

    def nbytes(self) -> int:
        """Bytes of the steps and their sums."""
        held = [x for row in self.rows for x in row] + [self.sums]
        return sum(x.numel() * x.element_size() for x in held if x is not None)

    def _add(
        self, entry: tuple[torch.Tensor | None, torch.Tensor], where: Any = None, sign: int = 1
    ) -> None:
        slots, weights = entry
        most = weights.shape[2] if slots is None else int(slots.max()) + 1
        self._reserve(most, weights)
        assert self.sums is not None
        found = weights.long() * sign
        if where is not None:
            found = found * where.to(found.device)
        if slots is None:
            self.sums[..., : weights.shape[2]] += found
        else:
            self.sums.scatter_add_(2, slots.long().clamp(min=0), found)

    def _reserve(self, tokens: int, like: torch.Tensor | None = None) -> None:
        if self.sums is None:
            assert like is not None
            self.sums = like.new_zeros((*like.shape[:2], tokens * 5 // 4 + 64), dtype=torch.int64)
        elif tokens > self.sums.shape[2]:
            more = tokens * 5 // 4 + 64 - self.sums.shape[2]
            self.sums = torch.nn.functional.pad(self.sums, (0, more))

    @staticmethod
    def _where(mask: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(mask.astype(np.int64))[..., None]


def prompt_rows(
    queries: torch.Tensor, keys: torch.Tensor, scaling: float, valid: torch.Tensor | None,
    count: int,
) -> torch.Tensor:  # fmt: skip
    """Weights of the last `count` queries over all keys, a mean over heads, in parts of ONE.

    queries: (batch, heads, tokens, head_dim), the last ones of keys (batch, kv_heads, all,
    head_dim). valid: (batch, all) bool or None. Returns (batch, 1, count, all) int32.
    """
    batch, heads, _, size = queries.shape
    kv_heads, tokens = keys.shape[1:3]
    group, last = heads // kv_heads, queries[:, :, queries.shape[2] - count :].float() * scaling
    place = torch.arange(tokens, device=keys.device)
    seen = place <= place[tokens - count :, None]
    made = torch.zeros((batch, 1, count, tokens), dtype=torch.int32, device=keys.device)
    for b in range(batch):  # a row and KV head at a time: scores of all would be large
        sees = seen if valid is None else seen & valid[b]
        total = torch.zeros((count, tokens), device=keys.device)
        for h in range(kv_heads):
            asked = last[b, h * group : (h + 1) * group].reshape(-1, size)
            scores = (asked @ keys[b, h].float().T).view(group, count, tokens)
            scores = scores.masked_fill_(~sees, -torch.inf).softmax(-1)
            total += scores.nan_to_num_().sum(0)
        made[b, 0] = (total * (ONE / heads)).round_().int()
    return made


@dataclass(slots=True)
class Handed:
    """What a policy saw of a prompt, for the store that is filled with the same keys next."""

    keys: torch.Tensor
    rows: torch.Tensor
    hidden: torch.Tensor | None


class Handover:
    """Between a policy and its stores: the latest prompt of each layer."""

    def __init__(self) -> None:
        self.layers: dict[int, Handed] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Handover:
        return self

    def give(self, prompt: Prompt, count: int) -> None:
        """Remember the weights of the last `count` queries, and the states."""
        rows = prompt_rows(prompt.queries, prompt.keys, prompt.scaling, prompt.valid, count)
        self.layers[prompt.layer] = Handed(prompt.keys, rows, prompt.hidden)

    def take(self, layer: int, keys: torch.Tensor) -> Handed | None:
        """What was seen of these very keys; None where another policy chose from them."""
        found = self.layers.pop(layer, None)
        return found if found is not None and found.keys is keys else None
