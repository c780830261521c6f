"""What the claims of Locret share: written-out references, the candidates, and what is measured."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from narrows.claims._snapkv import random_model, reference, unseen
from narrows.core.claim import Inconclusive
from narrows.core.errors import NarrowsError
from narrows.kv._base import Policy, Prompt
from narrows.kv.baselines import KeyNorm, RandomEviction, WindowOnly
from narrows.kv.locret import Locret
from narrows.kv.snapkv import SnapKV

if TYPE_CHECKING:
    import torch

    from narrows.kv.locret_torch import Heads
    from narrows.kv.locret_train import Sample
    from narrows.kv.store_torch import Store

TOKENS, BUDGET, CHUNK, LOCAL = 2048, 256, 128, 32
ANSWERS = 24
HELD_OUT = 99
"""Seed of prompts on which heads are compared with labels; training draws from others."""


class Chunked(Policy):
    """A policy that chooses at the end of a prompt, made to choose after every chunk.

    It sees what is held and the queries of the chunk: all there is when a prompt comes in chunks.
    """

    chunk = CHUNK

    def __init__(self, inner: Policy) -> None:
        self.inner = inner

    def on_prefill_chunk(self, chunk: Prompt, store: Store) -> torch.Tensor | None:
        """See Policy."""
        from dataclasses import replace

        keys, values = store.keys, store.values
        assert keys is not None
        assert values is not None
        return self.inner.on_prefill_end(replace(chunk, keys=keys, values=values, start=0))

    def on_prefill_end(self, prompt: Prompt) -> None:
        """Chosen already."""


class ChunkVotes(Policy):
    """H2O when a prompt comes in chunks: votes of each chunk's queries, summed as tokens stay."""

    chunk = CHUNK

    def __init__(self, capacity: int, window: int) -> None:
        self.capacity, self.window = capacity, window
        self.votes: dict[int, torch.Tensor] = {}

    def on_prefill_chunk(self, chunk: Prompt, store: Store) -> torch.Tensor | None:
        """See Policy."""
        import torch

        from narrows.kv.locret_torch import best

        keys = store.keys
        assert keys is not None
        batch, kv_heads, held, size = keys.shape
        new = chunk.queries.shape[2]
        asked = chunk.queries.float().reshape(batch, kv_heads, -1, new, size)
        scores = asked @ keys.float()[:, :, None].transpose(3, 4) * chunk.scaling
        place = torch.arange(held)
        scores = scores.masked_fill(place > torch.arange(held - new, held)[:, None], -torch.inf)
        votes = scores.softmax(-1).sum(3).mean(2)
        if chunk.start:
            before = self.votes[chunk.layer]
            votes[..., : before.shape[2]] += before
        slots = best(votes, torch.ones_like(votes, dtype=torch.bool), self.window, self.capacity)
        self.votes[chunk.layer] = votes if slots is None else votes.gather(2, slots)
        return slots

    def on_prefill_end(self, prompt: Prompt) -> None:
        """Chosen already."""


class LargeKeyNorm(Policy):
    """KeyNorm the other way round: keys of large norm stay.

    Which sign is the better rule depends on the model, and a rule worse than chance is no control.
    """

    def __init__(self, capacity: int, window: int) -> None:
        self.capacity, self.window = capacity, window

    def on_prefill_end(self, prompt: Prompt) -> torch.Tensor | None:
        """See Policy."""
        import torch

        from narrows.kv.locret_torch import best

        norm = prompt.keys.float().norm(dim=-1)
        return best(norm, torch.ones_like(norm, dtype=torch.bool), self.window, self.capacity)


def ours() -> Locret:
    """The paper's proportions at a budget of 256: chunks of half of it, stabilizers 5/12."""
    return Locret(BUDGET, CHUNK, BUDGET * 5 // 12, LOCAL)


@cache
def heads() -> Heads:
    """The shipped heads."""
    from narrows.kv.locret import SHIPPED
    from narrows.kv.locret_torch import load

    try:
        return load(SHIPPED, reference()[0])
    except NarrowsError as error:
        raise Inconclusive(str(error)) from error


def candidates() -> dict[str, Policy | None]:
    """Ways to read 2,048 tokens 128 at a time and never keep more than 256."""
    from narrows.kv.locret_torch import fresh

    model = reference()[0]
    return {
        "dense": None,
        "locret": ours().of(model, heads()),
        "untrained heads": ours().of(model, fresh(model, 128, seed=5)),
        "snapkv in chunks": Chunked(SnapKV(BUDGET, LOCAL)),
        "h2o in chunks": ChunkVotes(BUDGET, LOCAL),
        "window in chunks": Chunked(WindowOnly(BUDGET, LOCAL)),
        "random in chunks": Chunked(RandomEviction(BUDGET, LOCAL)),
        "small key norm in chunks": Chunked(KeyNorm(BUDGET, LOCAL)),
        "large key norm in chunks": Chunked(LargeKeyNorm(BUDGET, LOCAL)),
    }


TASKS = {"needle": (1, 3), "pairs": (16, 2)}


@cache
def recalled(task: str) -> Mapping[str, Any]:
    """Shares of right answers at 2,048 tokens, by candidate; the question ends the prompt."""
    from narrows.kv import quality
    from narrows.models.recall_lm import tasks

    model, tokenizer = reference()
    count, size = TASKS[task]
    alphabet, rng = tasks.Alphabet.of(tokenizer), np.random.default_rng(17)
    batch = tasks.pairs(rng, alphabet, unseen(), TOKENS, ANSWERS, count, value_tokens=size)
    return quality.right(model, candidates(), batch)


RULES = (
    "heads", "small key norm", "large key norm", "the last tokens",
    "the answers' own queries and keys before positions",
)  # fmt: skip


@cache
def overlaps(shuffled: bool = False) -> Mapping[str, tuple[float, ...]]:
    """Mean share of the labels' top 10 % that rules find, on held-out prompts, by layer.

    Each value is in the order of RULES. shuffled: the text's tokens in another order for the heads,
    so that what they know of a place alone remains.
    """
    import torch

    from narrows.kv.locret_train import observed, sample

    model, tokenizer = reference()
    rng, every = np.random.default_rng(HELD_OUT), heads()
    found: dict[str, list[list[float]]] = {}
    for count, size in ((1, 3), (16, 2), (4, 3), (16, 2)):
        given = sample(rng, tokenizer, unseen(), TOKENS, count, size)
        for seen, wanted in observed(model, given):
            assert seen.hidden is not None
            with torch.inference_mode():
                scores = every.score(seen.layer, seen.module, seen.hidden[:, : given.text])
            if shuffled:
                scores = scores[..., torch.from_numpy(rng.permutation(given.text))]
            norm = seen.keys[:, :, : given.text].float().norm(dim=-1)
            place = torch.arange(given.text).float().expand_as(scores)
            rules = (scores, -norm, norm, place, unplaced(seen, given))
            row = [top_share(x, wanted) for x in rules]
            found.setdefault(f"layer {seen.layer}", []).append(row)
    return {
        n: tuple(float(x) for x in np.mean(rows, 0)) for n, rows in found.items()
    }  # fmt: skip


def unplaced(seen: Prompt, given: Sample) -> torch.Tensor:
    """Labels from queries and keys before positions: what is left of them without a place."""
    import torch

    from narrows.kv.locret_torch import labels

    assert seen.hidden is not None
    size = seen.keys.shape[-1]
    with torch.inference_mode():
        queries, keys = (
            projection(seen.hidden[:, rows]).unflatten(-1, (-1, size)).transpose(1, 2)
            for projection, rows in (
                (seen.module.q_proj, given.rows), (seen.module.k_proj, slice(given.text)),
            )
        )  # fmt: skip
        return labels(queries, keys, seen.scaling)


def top_share(scores: torch.Tensor, wanted: torch.Tensor, share: float = 0.1) -> float:
    """Share of the tokens with the highest labels that are among the highest scores."""
    count = int(scores.shape[-1] * share)
    a, b = (x.topk(count, -1).indices for x in (scores, wanted))
    return float((a[..., :, None] == b[..., None, :]).any(-1).float().mean())


def slow_labels(queries: np.ndarray, keys: np.ndarray, scaling: float) -> np.ndarray:
    """labels of one prompt, written out: (kv_heads, tokens)."""
    heads_, rows, _ = queries.shape
    kv_heads, tokens, _ = keys.shape
    told = np.full((kv_heads, tokens), -np.inf)
    for h in range(heads_):
        kv = h // (heads_ // kv_heads)
        for r in range(rows):
            for t in range(tokens):
                told[kv, t] = max(told[kv, t], scaling * float(queries[h, r] @ keys[kv, t]))
    return told


def slow_choice(scores: np.ndarray, technique: Locret, lengths: list[int]) -> list[int]:
    """Positions one KV head keeps of a prompt with these scores, chunk by chunk, written out."""
    held: list[int] = []
    for i, end in enumerate(np.cumsum(lengths)):
        held += range(int(end) - lengths[i], int(end))
        last = i == len(lengths) - 1
        forced = set(held[-(technique.local if last else technique.stabilizers) :])
        order = sorted(held, key=lambda p: (p not in forced, -scores[p], p))
        held = sorted(order[: technique.capacity])
    return held


def random_setting(budget: int = 64, chunk: int = 48) -> tuple[Any, Any, Locret, torch.Tensor]:
    """A small random model, heads of random weights, and a prompt of two rows, 300 tokens."""
    import torch

    from narrows.kv.locret_torch import fresh

    model = random_model()
    made = fresh(model, width=16, seed=1)
    ids = torch.randint(2, 128, (2, 300), generator=torch.Generator().manual_seed(0))
    return model, made, Locret(budget, chunk, 24, 10).of(model, made), ids
