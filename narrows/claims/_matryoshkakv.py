"""What the claims of MatryoshkaKV share: the shipped projection, candidates, random settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch

from narrows.claims._snapkv import random_model, reference, unseen
from narrows.kv.lowrank import LowRank
from narrows.kv.matryoshkakv import SHIPPED, MatryoshkaKV
from narrows.kv.matryoshkakv_torch import Projection, cayley, load
from narrows.kv.store_packed import PackedStore

SIZE = 64
"""Channels of a head, recall-lm's."""

WINDOWS, CONTEXT, SCORED = 16, 1024, 64
"""Windows of unseen text, tokens before, and tokens read one by one through each cache."""


@cache
def trained() -> Projection:
    """The projection that is shipped."""
    return load(SHIPPED, reference()[0])


@cache
def axes() -> Projection:
    """Principal axes alone, of the text that training began from (Eigen Attention's bases)."""
    from narrows.kv.locret_train import text_of
    from narrows.kv.matryoshkakv_train import begun

    model, tokenizer = reference()
    return begun(model, tokenizer, text_of(tokenizer))


def random_projection(layers: int, heads: int, size: int, seed: int = 0) -> Projection:
    """Any orthogonal bases and means."""
    made = torch.Generator().manual_seed(seed)
    free = torch.randn(layers, 2, heads, size, size, generator=made, dtype=torch.float64)
    mean = torch.randn(layers, 2, heads, size, generator=made)
    return Projection(cayley(free).float(), mean, torch.empty(0, dtype=torch.int64))


def random_codec(ranks: Sequence[int], size: int = SIZE, seed: int = 0) -> LowRank:
    """A codec of random bases."""
    made = random_projection(1, len(ranks), size, seed)
    return LowRank(made.basis[0, 0], made.mean[0, 0], tuple(ranks))


def store_of(ranks: Sequence[int], recent: int = 0) -> PackedStore:
    """A store of random bases, these ranks of keys and of values."""
    return PackedStore(random_codec(ranks), random_codec(ranks, seed=1), recent)


def full_rank_error() -> tuple[float, float]:
    """Largest difference of logits at full rank from a plain cache, and at half; random model."""
    from narrows.kv.reading import through

    model = random_model()
    made = random_projection(3, 2, 16)
    some = {
        "dense": None,
        "full": MatryoshkaKV(1.0, adaptive=False, recent=8).of(model, made),
        "half": MatryoshkaKV(0.5, adaptive=False).of(model, made),
    }
    ids = torch.randint(2, 128, (2, 60), generator=torch.Generator().manual_seed(1))
    told = through(model, some, ids[:, :40], ids[:, 40:])
    full, half = (float((told[n] - told["dense"]).abs().max()) for n in ("full", "half"))
    return full, half


def candidates() -> dict[str, Any]:
    """Trained and principal axes at equal ranks, and trained ones with the greedy ranks."""
    model = reference()[0]
    made: dict[str, Any] = {"dense": None}
    for share in (0.5, 0.375):
        made[f"trained {share:g}"] = MatryoshkaKV(share, adaptive=False).of(model, trained())
        made[f"axes {share:g}"] = MatryoshkaKV(share, adaptive=False).of(model, axes())
        made[f"adaptive {share:g}"] = MatryoshkaKV(share).of(model, trained())
    # the order of one basis with the axes of another: what training adds at the ranks in use
    ordered = replace(axes(), order=trained().order)
    made["adaptive axes 0.375"] = MatryoshkaKV(0.375).of(model, ordered)
    return made


@cache
def divergences() -> Mapping[str, tuple[float, float]]:
    """Mean divergence of the logits from the dense cache's, and mean loss, by candidate."""
    from narrows.kv.reading import through

    text, length = unseen(), CONTEXT + SCORED + 1
    starts = np.linspace(0, len(text) - length, WINDOWS).astype(int)
    rows = torch.from_numpy(np.stack([text[s : s + length] for s in starts]).astype(np.int64))
    some = candidates()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in some}
    for part in rows.split(8):
        told = through(reference()[0], some, part[:, :CONTEXT], part[:, CONTEXT:-1])
        # the first scored token is predicted by prefill itself
        dense = told["dense"][:, 1:].float().log_softmax(-1)
        for name, logits in told.items():
            given = logits[:, 1:].float().log_softmax(-1)
            off = (dense.exp() * (dense - given)).sum(-1).mean()
            lost = -given.gather(2, part[:, CONTEXT + 1 :, None]).mean()
            found[name].append((float(off), float(lost)))
    return {n: (float(np.mean([a for a, _ in x])), float(np.mean([b for _, b in x])))
            for n, x in found.items()}  # fmt: skip


@cache
def needles(answers: int = 96) -> Mapping[str, Any]:
    """Shares of right answers, one needle of 3 tokens in 2,048, at 40 % of the channels."""
    from narrows.kv import quality
    from narrows.models.recall_lm import tasks

    model, tokenizer = reference()
    some = {
        "dense": None,
        "adaptive": MatryoshkaKV().of(model, trained()),
        "uniform": MatryoshkaKV(adaptive=False).of(model, trained()),
        "axes": MatryoshkaKV(adaptive=False).of(model, axes()),
    }
    alphabet, rng = tasks.Alphabet.of(tokenizer), np.random.default_rng(95)
    batch = tasks.pairs(rng, alphabet, unseen(), 2048, answers, 1, value_tokens=3)
    # the question comes after the text was projected: with it in prefill, its answer's first
    # token would come from the exact attention of the prompt
    return quality.right(model, some, batch, asked_later=True)
