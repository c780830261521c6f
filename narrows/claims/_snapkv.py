"""What the claims of SnapKV share: its definition written out, the model, the candidates."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from narrows.core.claim import Inconclusive
from narrows.kv.snapkv import SnapKV

NEEDLES, LATER = 512, 256
"""Answers of one needle, one prompt each; the question at the end, or after compression."""

PROMPTS = 128
"""Prompts of 16 pairs, all of which are asked: 2,048 answers, a quarter of them later."""


def by_definition(
    queries: np.ndarray, keys: np.ndarray, scaling: float, technique: SnapKV
) -> list[list[int]]:
    """Positions each KV head keeps of one prompt, ascending: the mechanism written out, float64.

    queries: (heads, tokens, head_dim), keys: (kv_heads, tokens, head_dim).
    """
    (heads, tokens, _), kv_heads = queries.shape, keys.shape[0]
    kept = int(technique.budget(tokens))
    if kept == tokens:
        return [list(range(tokens)) for _ in range(kv_heads)]
    group, half = heads // kv_heads, technique.kernel // 2
    prefix = tokens - technique.window
    pooled = np.zeros((heads, prefix))
    for head in range(heads):
        votes = np.zeros(prefix)
        for row in range(prefix, tokens):
            scores = keys[head // group, : row + 1] @ queries[head, row] * scaling
            weights = np.exp(scores - scores.max())
            votes += (weights / weights.sum())[:prefix]
        for i in range(prefix):
            near = votes[max(i - half, 0) : i + half + 1]
            pooled[head, i] = near.max() if technique.pool == "max" else (
                near.sum() / technique.kernel)  # fmt: skip
    chosen: list[list[int]] = []
    for head in range(kv_heads):
        mean = sum(pooled[head * group + i] for i in range(group)) / group
        best = np.argsort(-mean, kind="stable")[: kept - technique.window]
        chosen.append(sorted(int(i) for i in best) + list(range(prefix, tokens)))
    return chosen


def random_model() -> Any:
    """A small random Llama whose attention is peaked."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=2, head_dim=16, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@cache
def reference() -> tuple[Any, Any]:
    from narrows.models import recall_lm

    try:
        return recall_lm.load()
    except FileNotFoundError as error:
        raise Inconclusive(str(error)) from error


@cache
def unseen() -> np.ndarray:
    """Text the reference model was not trained on, as tokens."""
    from narrows.models.recall_lm import corpus

    tokenizer = reference()[1]
    texts = [np.array(tokenizer.encode(t), np.int64) for t in corpus.unseen().values()]
    return np.concatenate(texts)


def candidates() -> dict[str, Any]:
    """Ways to spend an eighth of the cache of 2,048 tokens."""
    from narrows.kv.baselines import KeyNorm, RandomEviction, WindowOnly

    kept = 2048 // 8
    return {
        "dense": None, "snapkv": SnapKV(kept), "not pooled": SnapKV(kept, kernel=1),
        "kernel 13": SnapKV(kept, kernel=13),
        "random": RandomEviction(kept), "window only": WindowOnly(kept), "key norm": KeyNorm(kept),
    }  # fmt: skip


TASKS = {"needle": (1, 3), "pairs": (16, 2), "long needle": (1, 6)}
"""Statements in a prompt, and tokens of a value."""


@cache
def recalled(task: str, later: bool = False) -> Mapping[str, Any]:
    """Shares of right answers at 2,048 tokens, by candidate."""
    return recalled_by(candidates(), task, 3, later)


def recalled_by(
    some: Mapping[str, Any], task: str, seed: int, later: bool = False
) -> Mapping[str, Any]:
    """Shares of right answers of any candidates; pairs share the reading of their text."""
    from narrows.kv import quality
    from narrows.models.recall_lm import tasks

    model, tokenizer = reference()
    count, size = TASKS[task]
    if count > 1:
        return quality.asked(
            model, tokenizer, some, unseen(), PROMPTS // 4 if later else PROMPTS, 2048, count, size,
            seed, seen=not later,
        )  # fmt: skip
    alphabet, rng = tasks.Alphabet.of(tokenizer), np.random.default_rng(seed)
    answers = LATER if later or task == "long needle" else NEEDLES
    batch = tasks.pairs(rng, alphabet, unseen(), 2048, answers, count, value_tokens=size)
    return quality.right(model, some, batch, asked_later=later)
