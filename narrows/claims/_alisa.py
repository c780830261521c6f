"""What the claims of ALISA share: its definition written out, and other rules to choose by."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch

from narrows.claims._snapkv import reference, unseen
from narrows.kv._base import Prompt
from narrows.kv._lately import ONE, PLACES, History
from narrows.kv.alisa import ALISA
from narrows.kv.alisa_torch import SparseStore
from narrows.kv.store_torch import Store

CONTEXT, SCORED = 2048, 64
"""Tokens of a window: read, and then scored one by one."""


class AllTime(History):
    """Sums over all steps, those of the whole prompt included (H2O, arXiv 2306.14048)."""

    def begin(self, rows: torch.Tensor, keep: np.ndarray) -> None:
        """See History."""
        super().begin(rows[:, :, -1:], np.ones_like(keep))
        self._reserve(rows.shape[3], rows[:, :, 0])
        assert self.sums is not None
        self.sums[..., : rows.shape[3]] = rows.sum(2, dtype=torch.int64)

    def push(self, slots: torch.Tensor, weights: torch.Tensor, keep: np.ndarray) -> None:
        """See History: nothing leaves."""
        self.keep = keep - 1
        super().push(slots, weights, keep)


class Strided(History):
    """Tokens at even distances: first the multiples of large powers of two."""

    def ranks(self, tokens: int) -> torch.Tensor:
        """See History."""
        slot = torch.arange(tokens)
        zeros = torch.zeros_like(slot)
        for power in range(1, PLACES):
            zeros += slot % (1 << power) == 0
        assert self.sums is not None
        return ((zeros << PLACES) + slot).expand(*self.sums.shape[:2], -1)


class Ruled(ALISA):
    """ALISA with another rule for its dynamic half."""

    def __init__(self, rule: type[History], sparsity: float = 0.8, kv_bits: int | None = None):
        super().__init__(sparsity, kv_bits=kv_bits)
        self.rule = rule

    def store(self, config: Any, layer: int = 0) -> Store:
        """See Policy."""
        made = super().store(config, layer)
        assert isinstance(made, SparseStore)
        made.rule = self.rule
        made.clear()
        return made

    def on_prefill_end(self, prompt: Prompt) -> torch.Tensor | None:
        """See Policy; sums over all steps need all rows of the prompt."""
        if self.rule is not AllTime or self._handover is None:
            return super().on_prefill_end(prompt)
        self._handover.give(prompt, prompt.queries.shape[2])
        return None


class Foreseeing(SparseStore):
    """Chooses by the current row, which needs all keys: what the best choice would give."""

    def _step(
        self, queries: torch.Tensor, mask: torch.Tensor | None, scaling: float, visible: int
    ) -> torch.Tensor:
        self.asked = queries.float() * scaling
        return super()._step(queries, mask, scaling, visible)

    def choose(self, visible: int) -> torch.Tensor:
        """See SparseStore."""
        keys = self._whole()[..., : self.width].float()
        batch, kv_heads = keys.shape[:2]
        asked = self.asked.reshape(batch, kv_heads, -1, keys.shape[3])
        weights = (asked @ keys.transpose(2, 3)).softmax(-1).mean((1, 2))
        count = int(self._sizes(visible)[0].max())
        return weights.topk(count).indices.sort(-1).values[:, None]


class Oracle(ALISA):
    """A fifth of the tokens, chosen by the current row: no technique, a bound of them."""

    def store(self, config: Any, layer: int = 0) -> Store:
        """See Policy."""
        return Foreseeing(layer, self.sparsity, self.split)


def candidates() -> dict[str, Any]:
    """Ways to attend to a fifth of the tokens, and to all."""
    return {
        "dense": None, "alisa": ALISA(), "alisa in full precision": ALISA(kv_bits=None),
        "local window": ALISA(split=1.0, kv_bits=None), "strided": Ruled(Strided),
        "by the current row": Oracle(),
    }  # fmt: skip


@cache
def losses(windows: int = 16) -> Mapping[str, np.ndarray]:
    """Mean loss of 64 tokens after 2,048 of unseen text, by candidate and window."""
    from narrows.kv import quality

    return quality.losses(reference()[0], candidates(), unseen(), CONTEXT, SCORED, windows)


def shifted(windows: int, before: int = 1536) -> np.ndarray:
    """Windows of two texts: `before` tokens of one, then another goes on to the end."""
    text, length = unseen(), CONTEXT + SCORED + 1
    starts = np.linspace(0, len(text) - length, 2 * windows).astype(int)
    made = [
        np.concatenate([text[a : a + before], text[b : b + length - before]])
        for a, b in zip(starts[:windows], starts[windows:], strict=True)
    ]
    # losses() takes windows at even distances of a text: exactly these
    return np.concatenate(made)


@cache
def shifted_losses(windows: int = 24) -> Mapping[str, np.ndarray]:
    """As losses, after a shift of topic 512 tokens before."""
    from narrows.kv import quality

    some = {"dense": None, "alisa": ALISA(kv_bits=None), "all-time sum": Ruled(AllTime)}
    return quality.losses(reference()[0], some, shifted(windows), CONTEXT, SCORED, windows)


@cache
def recalled() -> Mapping[str, Any]:
    """Shares of right answers at 2,048 tokens, by candidate, the question ending the prompt."""
    from narrows.kv import quality

    some = {
        "dense": None, "alisa": ALISA(), "local window": ALISA(split=1.0, kv_bits=None),
        "all-time sum": Ruled(AllTime),
    }  # fmt: skip
    return quality.asked(*reference(), some, unseen(), 8, CONTEXT, 16, 2, 5, seen=True)


def paired(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Perplexity over another's of the same windows, and its 95 % interval (bootstrap)."""
    differences = ours - theirs
    drawn = np.random.default_rng(0).integers(0, len(ours), (2000, len(ours)))
    low, high = np.quantile(differences[drawn].mean(1), (0.025, 0.975))
    return tuple(float(np.exp(x)) for x in (differences.mean(), low, high))  # type: ignore


def by_definition(
    queries: np.ndarray, keys: np.ndarray, prompt: int, scaling: float, technique: ALISA
) -> list[list[int]]:
    """Tokens attended by each step after a prompt of one sequence: the mechanism written out.

    queries: (heads, tokens, head_dim), keys: (kv_heads, tokens, head_dim), of prompt and steps.
    """
    (heads, tokens, _), kv_heads = queries.shape, keys.shape[0]
    history: list[dict[int, int]] = []

    def attended(step: int, chosen: list[int]) -> dict[int, int]:
        total = np.zeros(len(chosen))
        for head in range(heads):
            scores = keys[head * kv_heads // heads, chosen] @ queries[head, step] * scaling
            weights = np.exp(scores - scores.max())
            total += weights / weights.sum()
        return dict(zip(chosen, np.rint(total / heads * ONE).astype(int), strict=True))

    for step in range(prompt):
        history.append(attended(step, list(range(step + 1))))
    found: list[list[int]] = []
    for step in range(prompt, tokens):
        seen = step + 1
        count = int(np.ceil(round(seen * (1 - technique.sparsity), 6)))
        recent = int(np.ceil(round(count * technique.split, 6)))
        older = range(seen - recent)
        sums = {i: sum(row.get(i, 0) for row in history[-recent:]) for i in older}
        best = sorted(older, key=lambda i: (-sums[i], -i))[: count - recent]
        chosen = sorted(best) + list(range(seen - recent, seen))
        found.append(chosen)
        history.append(attended(step, chosen))
    return found
