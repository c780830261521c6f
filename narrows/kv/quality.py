"""What a cache forgets: recall and perplexity of the reference model through it.

All candidates get the same prompts and spend the same share of the cache. Prefill is exact
whatever is kept, so a prompt is read once and every candidate takes what it keeps from that one
reading; answers are then judged through each cache. Haystacks are given, or sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from narrows.core.errors import NarrowsError
from narrows.kv._base import Policy, Prompt
from narrows.measure.timing import Progress

if TYPE_CHECKING:
    import torch

TOKENS = 2048
"""Length of the prompts that quality figures are taken at."""

QUESTION = 4
"""Tokens of a question: the mark that opens it, a key of two, the mark that asks."""

ROWS = 8
"""Prompts read at a time."""


def sampled_text(model: Any, tokens: int, seed: int = 0) -> np.ndarray:
    """A haystack without a corpus: tokens sampled from the model at temperature 1, int64."""
    import torch

    from narrows.kv.adapter import KVCache

    rows = -(-tokens // 256)
    rng = torch.Generator().manual_seed(seed)
    new = torch.randint(1, model.config.vocab_size, (rows, 1), generator=rng)
    made: list[torch.Tensor] = []
    with _reading(model):
        cache = KVCache(model.config)
        for _ in range(256):
            logits = model(new, past_key_values=cache, use_cache=True).logits[:, -1].float()
            new = torch.multinomial(logits.softmax(-1), 1, generator=rng)
            made.append(new)
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

    policies: by candidate's name, None for the dense cache. haystack: token ids, int64. Prompts
    of `tokens` tokens end with the question. The first token of an answer comes from prefill, as
    in real use; the others through the cache. Values of several lengths tell what pooling is for:
    the end of a prompt looks at the first token of an answer, not yet at those that follow it.
    """
    from narrows.models.recall_lm import tasks

    alphabet = tasks.Alphabet.of(tokenizer)
    rng = np.random.default_rng(seed)
    kinds = {"a needle of 3 tokens": (1, 3), "16 pairs of 2 tokens": (16, 2),
             "a needle of 6 tokens": (1, 6)}  # fmt: skip
    batches = {
        task: tasks.pairs(rng, alphabet, haystack, tokens, answers, count, size)
        for task, (count, size) in kinds.items()
    }
    told: dict[str, dict[str, Any]] = {}
    for i, (task, batch) in enumerate(batches.items()):

        def part(done: float, what: str, i: int = i, task: str = task) -> None:
            if progress:
                progress((i + done) / len(batches), f"recall of {task}, {what}")

        told[task] = right(model, policies, batch, progress=part)
    return told


def right(
    model: Any,
    policies: Mapping[str, Policy | None],
    batch: Any,
    asked_later: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Share of a batch's prompts answered wholly right, by candidate.

    batch: a recall_lm.tasks.Batch. asked_later: the text is compressed before the question is
    seen, which then comes through the cache too: what a technique that votes with the question
    cannot know. A greedy answer is wholly right exactly when each of its tokens is the arg-max
    after the right ones before it, so answers are judged in one pass.
    """
    import torch

    from narrows.models.recall_lm.evaluate import Share

    count = dict.fromkeys(policies, 0)
    total = len(batch.ids)
    ids, answers = torch.from_numpy(batch.ids), torch.from_numpy(batch.answers)
    cut = ids.shape[1] - (QUESTION if asked_later else 0)
    for at in range(0, total, ROWS):
        if progress:
            progress(at / total, f"answer {at} of {total}")
        rows, expected = ids[at : at + ROWS], answers[at : at + ROWS]
        rest = torch.cat([rows[:, cut:], expected[:, :-1]], 1)
        for name, logits in through(model, policies, rows[:, :cut], rest).items():
            said = logits[:, -expected.shape[1] :].argmax(-1)
            count[name] += int((said == expected).all(1).sum())
    return {name: Share.of(n, total) for name, n in count.items()}


def perplexity(
    model: Any,
    policies: Mapping[str, Policy | None],
    ids: np.ndarray,
    context: int = TOKENS,
    scored: int = 64,
    windows: int = 128,
    progress: Progress | None = None,
) -> dict[str, float]:
    """exp of the mean loss of `scored` tokens after a `context` that went through each cache.

    ids: text, int64; the windows are spread evenly over it. The first scored token is predicted
    by prefill itself and does not count.
    """
    import torch
    import torch.nn.functional as F

    length = context + scored + 1
    if len(ids) < length + windows:
        raise NarrowsError(
            f"a text of {len(ids)} tokens is too short for {windows} windows of {length}"
        )
    starts = np.linspace(0, len(ids) - length, windows).astype(int)
    rows = torch.from_numpy(np.stack([ids[s : s + length] for s in starts]).astype(np.int64))
    loss = dict.fromkeys(policies, 0.0)
    for at in range(0, windows, ROWS):
        if progress:
            progress(at / windows, f"window {at} of {windows}")
        some = rows[at : at + ROWS]
        rest = some[:, context:-1]
        for name, logits in through(model, policies, some[:, :context], rest).items():
            given = logits[:, 1:].float().transpose(1, 2)
            loss[name] += float(F.cross_entropy(given, some[:, context + 1 :], reduction="sum"))
    return {name: float(np.exp(total / (windows * scored))) for name, total in loss.items()}


def through(
    model: Any, policies: Mapping[str, Policy | None], prompt: torch.Tensor, rest: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Logits after the prompt, and after each token of `rest` read through each cache.

    prompt, rest: (rows, tokens) ids. Returns (rows, 1 + rest, vocabulary) by candidate.
    """
    import torch

    from narrows.kv.adapter import KVCache, stores

    with _reading(model):
        caches = {name: KVCache(model.config, policy) for name, policy in policies.items()}
        every = _Every(policies, {name: stores(cache) for name, cache in caches.items()})
        whole = KVCache(model.config, every)
        first = model(prompt, past_key_values=whole, use_cache=True, logits_to_keep=1).logits
        del whole
        if not rest.shape[1]:
            return {name: first for name in policies}  # noqa: C420 - typed by its value

        def read(name: str) -> torch.Tensor:
            policy = policies[name]
            at_once = 1 if policy is not None and policy.stepwise else rest.shape[1]
            made = [
                model(part, past_key_values=caches[name], use_cache=True).logits
                for part in rest.split(at_once, 1)
            ]
            return torch.cat([first, *made], 1)

        return {name: read(name) for name in policies}


class _Every(Policy):
    """Lets several policies choose from one prefill, each for a cache of its own."""

    def __init__(self, policies: Mapping[str, Policy | None], stores: Mapping[str, Any]) -> None:
        self.policies, self.stores = policies, stores

    def on_prefill_end(self, prompt: Prompt) -> torch.Tensor | None:
        """Fill each policy's store of this layer; the prefilled cache itself is thrown away."""
        for name, policy in self.policies.items():
            columns = None if policy is None else policy.on_prefill_end(prompt)
            self.stores[name][prompt.layer].fill(prompt.keys, prompt.values, columns, prompt.valid)
        return None


@contextmanager
def _reading(model: Any) -> Iterator[None]:
    """The model with the attention that reads our caches, without gradients."""
    import torch

    from narrows.kv.adapter import ATTENTION

    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        with torch.inference_mode():
            yield
    finally:
        model.set_attn_implementation(before)
