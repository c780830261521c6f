"""Votes for prompt tokens, and the choice among them under a budget, with padding."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from narrows.kv._base import Prompt


def window_votes(prompt: Prompt, window: int, kernel: int, pool: str) -> torch.Tensor:
    """How much the last `window` queries look at each earlier token, pooled along tokens.

    Returns (batch, kv_heads, tokens - window) fp32. Causal attention of the window's queries over
    the whole prompt, softmax in fp32, summed over the window, pooled (kernel, stride 1) so that
    the neighbours of a peak survive with it, averaged over the queries that share a KV head.
    """
    queries, keys = prompt.queries[:, :, -window:], prompt.keys
    batch, heads, _, size = queries.shape
    kv_heads, tokens = keys.shape[1], keys.shape[2]
    row = torch.arange(tokens - window, tokens, device=keys.device)
    hidden = torch.arange(tokens, device=keys.device) > row[:, None]
    votes = keys.new_empty((batch, heads, tokens - window), dtype=torch.float32)
    # row by row: the scores of a whole batch of long prompts would be the peak of memory
    for i in range(batch):
        grouped = queries[i].reshape(kv_heads, -1, size)
        scores = (grouped @ keys[i].transpose(1, 2)).float() * prompt.scaling
        scores = scores.view(heads, window, tokens)
        unseen = hidden if prompt.valid is None else hidden | ~prompt.valid[i]
        scores.masked_fill_(unseen, torch.finfo(scores.dtype).min)
        votes[i] = scores.softmax(-1)[..., : tokens - window].sum(1)
    pooling = F.avg_pool1d if pool == "avg" else F.max_pool1d
    pooled = pooling(votes, kernel, stride=1, padding=kernel // 2)
    return pooled.view(batch, kv_heads, -1, tokens - window).mean(2)


def all_votes(prompt: Prompt, rows: int = 256) -> torch.Tensor:
    """How much all queries look at each token, (batch, kv_heads, tokens) fp32.

    Causal softmax in fp32, summed over the queries, averaged over those that share a KV head.
    rows: queries whose scores are in memory at a time.
    """
    keys = prompt.keys.float()
    batch, kv_heads, tokens, size = keys.shape
    queries = prompt.queries.float().reshape(batch, kv_heads, -1, tokens, size)
    column = torch.arange(tokens, device=keys.device)
    votes = keys.new_zeros((batch, kv_heads, tokens))
    for i in range(batch):
        for begin in range(0, tokens, rows):
            some = queries[i, :, :, begin : begin + rows]
            scores = some @ keys[i].transpose(1, 2)[:, None] * prompt.scaling
            row = column[begin : begin + rows, None]
            unseen = column > row if prompt.valid is None else (column > row) | ~prompt.valid[i]
            scores.masked_fill_(unseen, torch.finfo(scores.dtype).min)
            weights = scores.softmax(-1)
            if prompt.valid is not None:
                weights = weights * prompt.valid[i, begin : begin + rows, None]
            votes[i] += weights.sum(2).mean(1)
    return votes


def lengths(prompt: Prompt) -> list[int]:
    """Tokens of each row, padding not counted."""
    batch, tokens = prompt.keys.shape[0], prompt.keys.shape[2]
    if prompt.valid is None:
        return [tokens] * batch
    return [int(n) for n in prompt.valid.sum(1)]


def top(
    prompt: Prompt, window: int, budgets: list[int], score: Callable[[], torch.Tensor]
) -> torch.Tensor | None:
    """Columns of the best-scored tokens and of the last `window`, `budgets` of them a row.

    score: gives (batch, kv_heads, tokens - window); called only if a row exceeds its budget.
    Returns (batch, kv_heads, kept) int64 ascending, -1 in front where a row keeps fewer; None
    where every row keeps all it has. Padding is never kept.
    """
    rows = lengths(prompt)
    budgets = [min(budget, row) for budget, row in zip(budgets, rows, strict=True)]
    if budgets == rows:
        return None
    batch, kv_heads, tokens = prompt.keys.shape[:3]
    device = prompt.keys.device
    scores = score()
    recent = torch.arange(tokens - window, tokens, device=device).expand(batch, kv_heads, -1)
    if prompt.valid is None:
        best = _best(scores, budgets[0] - window)
        return torch.cat([best.sort(-1).values, recent], -1)
    valid = prompt.valid[:, None]
    scores = scores.masked_fill(~valid[..., : tokens - window], -torch.inf)
    in_window = prompt.valid[:, tokens - window :].sum(1)
    take = torch.tensor(budgets, device=device) - in_window
    best = _best(scores, int(take.max()))
    rank = torch.arange(best.shape[-1], device=device)
    best = best.masked_fill(rank >= take[:, None, None], -1)
    recent = recent.masked_fill(~valid[..., tokens - window :], -1)
    return torch.cat([best, recent], -1).sort(-1).values


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the highest scores, best first; of equal ones the earlier token.

    Max pooling makes neighbours equal, and `topk` breaks ties as it likes, so that padding could
    change the choice.
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
