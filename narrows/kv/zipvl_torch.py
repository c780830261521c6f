"""ZipVL at work: which tokens of a prompt are important, and attention among them alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from narrows.kv._base import Prompt

PRIME = 1000003
"""Keeps the random probes of layers and lengths apart."""


class Chooser:
    """Chooses the important tokens of each row of a batch; shared by all layers of its caches.

    tau: share of the accumulated score that the important tokens hold. recent, random: probe
    queries, the last of a row and some of the others. pending: what a layer's prompt chose, until
    its store is filled. ratios: by layer, the mean share of important tokens in the latest prompt.
    """

    def __init__(self, tau: float, recent: int, random: int, seed: int = 0) -> None:
        self.tau, self.recent, self.random, self.seed = tau, recent, random, seed
        self.pending: dict[int, list[torch.Tensor]] = {}
        self.ratios: dict[int, float] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Chooser:
        return self  # copies of a cache go on with the same rule

    def count(self, accumulated: torch.Tensor) -> int:
        """Important tokens: the fewest whose accumulated scores hold tau of the sum."""
        if self.tau == 1:
            return len(accumulated)
        held = accumulated.double().sort(descending=True).values.cumsum(0)
        enough = int((held < self.tau * held[-1]).sum()) + 1
        return min(enough, len(accumulated))

    def choose(self, prompt: Prompt) -> list[torch.Tensor]:
        """Which columns of each row are important, (tokens,) bool; padding never is.

        Queries may be the last ones only (a prompt in chunks): probes are taken among them. The
        last token is always important, since the answer is read from it.
        """
        tokens = prompt.keys.shape[2]
        found: list[torch.Tensor] = []
        for row in range(prompt.keys.shape[0]):
            first = 0 if prompt.valid is None else int(prompt.valid[row].int().argmax())
            keys = prompt.keys[row, :, first:]
            asked = prompt.queries[row, :, -min(keys.shape[1], prompt.queries.shape[2]) :]
            chosen = torch.zeros(tokens, dtype=torch.bool, device=keys.device)
            if self.tau == 1:
                chosen[first:] = True
            else:
                accumulated, normalised = self.scores(asked, keys, prompt.scaling, prompt.layer)
                normalised[-1] = torch.inf
                best = normalised.sort(descending=True, stable=True).indices
                chosen[first + best[: self.count(accumulated)]] = True
            found.append(chosen)
        return found

    def read(self, prompt: Prompt) -> list[torch.Tensor]:
        """`choose`, remembered for the store of the layer and for the report."""
        chosen = self.pending[prompt.layer] = self.choose(prompt)
        tokens = prompt.keys.shape[2]
        valid = [tokens] * len(chosen) if prompt.valid is None else prompt.valid.sum(1).tolist()
        shares = [int(c.sum()) / n for c, n in zip(chosen, valid, strict=True)]
        self.ratios[prompt.layer] = sum(shares) / len(shares)
        return chosen

    def probes(self, queries: int, layer: int) -> torch.Tensor:
        """Which of the last `queries` tokens are probes, ascending; padding plays no part."""
        recent = torch.arange(max(queries - self.recent, 0), queries)
        earlier = queries - len(recent)
        made = torch.Generator().manual_seed((self.seed * PRIME + layer) * PRIME + queries)
        some = torch.randperm(earlier, generator=made)[: self.random]
        return torch.cat([some.sort().values, recent])

    def scores(
        self, queries: torch.Tensor, keys: torch.Tensor, scaling: float, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Accumulated and normalised scores of one row's tokens, (tokens,) fp32, mean over heads.

        queries: (heads, queries, head_dim) of the last tokens; keys: (kv_heads, tokens, head_dim).
        The normalised score divides by how many probes see a token: early ones are seen by more.
        """
        (heads, asked, size), (kv_heads, tokens) = queries.shape, keys.shape[:2]
        probes = self.probes(asked, layer).to(keys.device)
        place = probes + tokens - asked
        hidden = torch.arange(tokens, device=keys.device) > place[:, None]
        rows = queries[:, probes].reshape(kv_heads, -1, size)
        accumulated = keys.new_zeros(tokens, dtype=torch.float32)
        for head in range(kv_heads):  # the scores of one KV head are in memory at a time
            each = (rows[head] @ keys[head].T).float().view(-1, len(probes), tokens) * scaling
            each.masked_fill_(hidden, -torch.inf)
            accumulated += each.softmax(-1).sum((0, 1))
        accumulated /= heads
        return accumulated, accumulated / (~hidden).sum(0)


def attend_among(prompt: Prompt, chosen: Sequence[torch.Tensor]) -> torch.Tensor:
    """Causal attention of the chosen tokens among themselves; zero for the others.

    Returns (batch, heads, tokens, head_dim).
    """
    group = prompt.queries.shape[1] // prompt.keys.shape[1]
    shape = (*prompt.queries.shape[:3], prompt.values.shape[3])
    out = prompt.queries.new_zeros(shape)
    for row, mask in enumerate(chosen):
        at = mask.nonzero()[:, 0]
        q, k, v = (x[row : row + 1].index_select(2, at)
                   for x in (prompt.queries, prompt.keys, prompt.values))  # fmt: skip
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        made = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=prompt.scaling)
        out[row].index_copy_(1, at, made[0])
    return out
