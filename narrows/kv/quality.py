"""What a cache forgets: recall and perplexity of the reference model through it.

All candidates get the same prompts and spend the same share of the cache. Prompts end with the
question; haystacks are sampled from the model itself, or are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from narrows.kv._base import Policy
from narrows.measure.timing import Progress

TOKENS = 2048
"""Length of the prompts that quality figures are taken at."""


def sampled_text(model: Any, tokens: int, seed: int = 0) -> np.ndarray:
    """A haystack without a corpus: tokens sampled from the model at temperature 1, int64."""
    import torch

    from narrows.kv.adapter import ATTENTION, KVCache

    rows = -(-tokens // 256)
    rng = torch.Generator().manual_seed(seed)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    cache = KVCache(model.config)
    new = torch.randint(1, model.config.vocab_size, (rows, 1), generator=rng)
    made: list[torch.Tensor] = []
    try:
        with torch.inference_mode():
            for _ in range(256):
                logits = model(new, past_key_values=cache, use_cache=True).logits[:, -1].float()
                new = torch.multinomial(logits.softmax(-1), 1, generator=rng)
                made.append(new)
    finally:
        model.set_attn_implementation(before)
    return torch.cat(made, 1).flatten()[:tokens].numpy()


def recall(
    model: Any,
    tokenizer: Any,
    policies: Mapping[str, Policy | None],
    haystack: np.ndarray,
    answers: int = 128,
    tokens: int = TOKENS,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Share of answers wholly right, with 95 % Wilson intervals: task -> candidate -> Share.

    policies: by candidate's name, None for the dense cache. haystack: token ids, int64.
    """
    from narrows.kv.adapter import ATTENTION, KVCache
    from narrows.models.recall_lm import evaluate, tasks

    alphabet = tasks.Alphabet.of(tokenizer)
    rng = np.random.default_rng(seed)
    batches = {
        "one needle": tasks.needle(rng, alphabet, haystack, tokens, answers),
        "16 pairs": tasks.pairs(rng, alphabet, haystack, tokens, answers, 16),
    }
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    told: dict[str, dict[str, Any]] = {}
    done, total = 0, len(batches) * len(policies)
    try:
        for task, batch in batches.items():
            told[task] = {}
            for name, policy in policies.items():
                if progress:
                    progress(done / total, f"recall of {task}, {name}")
                told[task][name] = evaluate.recall(
                    model, batch, lambda policy=policy: KVCache(model.config, policy), 8
                )
                done += 1
    finally:
        model.set_attn_implementation(before)
    return told
