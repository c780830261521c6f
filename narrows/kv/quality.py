"""What a cache forgets: recall and perplexity of the reference model through it.

All candidates get the same prompts and spend the same share of the cache. Prefill is exact
whatever is kept, so a prompt is read once and every candidate takes what it keeps from that one
reading; answers are then judged through each cache. Haystacks are given, or sampled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from narrows.core.errors import NarrowsError
from narrows.kv._base import Policy
from narrows.kv.reading import continued, prompts_read, questions_read, reading, through
from narrows.measure.timing import Progress

TOKENS = 2048
"""Length of the prompts that quality figures are taken at."""

QUESTION = 4
"""Tokens of a question: the mark that opens it, a key of two, the mark that asks."""

ROWS = 8
"""Prompts read at a time."""


def sampled_text(
    model: Any, tokens: int, seed: int = 0, length: int = 256, progress: Progress | None = None
) -> np.ndarray:
    """A haystack without a corpus: tokens sampled from the model at temperature 1, int64.

    It is made of pieces of `length` tokens, one after the other.
    """
    import torch

    from narrows.kv.adapter import KVCache

    rows = -(-tokens // length)
    rng = torch.Generator().manual_seed(seed)
    new = torch.randint(1, model.config.vocab_size, (rows, 1), generator=rng)
    made: list[torch.Tensor] = []
    with reading(model):
        cache = KVCache(model.config)
        for i in range(length):
            if progress and i % 16 == 0:
                progress(i / length, f"writing text, token {i} of {length}")
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


def asked(
    model: Any,
    tokenizer: Any,
    policies: Mapping[str, Policy | None],
    haystack: np.ndarray,
    prompts: int = 128,
    tokens: int = TOKENS,
    count: int = 16,
    value_tokens: int = 2,
    seed: int = 0,
    seen: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Share of right answers where all `count` pairs of a prompt are asked; see answered.

    Questions of one prompt share its text: the interval (95 %, Wilson) takes them as independent,
    which they are not quite. Returns a Share by candidate.
    """
    from narrows.models.recall_lm.evaluate import Share

    told = answered(
        model, tokenizer, policies, haystack, prompts, tokens, count, value_tokens, seed, seen,
        progress,
    )  # fmt: skip
    return {name: Share.of(int(found.sum()), found.size) for name, found in told.items()}


def answered(
    model: Any,
    tokenizer: Any,
    policies: Mapping[str, Policy | None],
    haystack: np.ndarray,
    prompts: int = 128,
    tokens: int = TOKENS,
    count: int = 16,
    value_tokens: int = 2,
    seed: int = 0,
    seen: bool = False,
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """Which answers are right, (prompts, count) bool by candidate: every pair of a prompt asked.

    seen: whether the question ends the prompt, so that what votes with it knows it; otherwise the
    cache is compressed before, and each question goes through a copy of it. The text is read once
    for all its questions, so `prompts` readings give `prompts * count` answers.
    """
    import torch

    from narrows.kv.adapter import copied
    from narrows.models.recall_lm import tasks

    alphabet, rng = tasks.Alphabet.of(tokenizer), np.random.default_rng(seed)
    batch = tasks.pairs(
        rng, alphabet, haystack, tokens, prompts * count, count, value_tokens, asked=count
    )
    ids, answers = (torch.from_numpy(x) for x in (batch.ids, batch.answers))
    cut = tokens - QUESTION
    right_ones = {name: np.zeros((prompts, count), bool) for name in policies}
    with reading(model, policies.values()):
        for at in range(0, prompts, ROWS):
            if progress:
                progress(at / prompts, f"prompt {at} of {prompts}")
            end = min(at + ROWS, prompts)
            rows = torch.arange(at, end) * count
            text, every = ids[rows, :cut], range(count)
            if seen:
                told = questions_read(model, policies, text, (ids[rows + i, cut:] for i in every))
            else:
                read = prompts_read(model, policies, text)
                told = ({n: (copied(c), None) for n, (c, _) in read.items()} for _ in every)
            for i, caches in enumerate(told):
                expected = answers[rows + i]
                rest = expected[:, :-1]
                if not seen:
                    rest = torch.cat([ids[rows + i, cut:], rest], 1)
                for name, (cache, first) in caches.items():
                    logits = continued(model, policies[name], cache, rest)
                    if first is not None:
                        logits = torch.cat([first, logits], 1)
                    said = logits[:, -expected.shape[1] :].argmax(-1)
                    right_ones[name][at:end, i] = (said == expected).all(1).numpy()
    return right_ones


def agreement(
    model: Any,
    policies: Mapping[str, Policy | None],
    ids: np.ndarray,
    context: int = TOKENS,
    scored: int = 64,
    windows: int = 32,
) -> dict[str, Any]:
    """Share of next tokens, greedily chosen, that are those of the dense cache.

    Teacher-forced: all read the same `scored` tokens after the same context. Returns a Share by
    candidate, over windows * scored tokens; windows as in perplexity.
    """
    import torch

    from narrows.models.recall_lm.evaluate import Share

    length = context + scored
    starts = np.linspace(0, len(ids) - length, windows).astype(int)
    rows = torch.from_numpy(np.stack([ids[s : s + length] for s in starts]).astype(np.int64))
    same = dict.fromkeys(policies, 0)
    every = {**policies, "": None}
    for some in rows.split(ROWS):
        told = through(model, every, some[:, :context], some[:, context:])
        dense = told[""][:, 1:].argmax(-1)
        for name in policies:
            same[name] += int((told[name][:, 1:].argmax(-1) == dense).sum())
    return {name: Share.of(n, windows * scored) for name, n in same.items()}


def perplexity(
    model: Any,
    policies: Mapping[str, Policy | None],
    ids: np.ndarray,
    context: int = TOKENS,
    scored: int = 64,
    windows: int = 128,
    progress: Progress | None = None,
) -> dict[str, float]:
    """exp of the mean loss of tokens read through each cache; see losses."""
    told = losses(model, policies, ids, context, scored, windows, progress)
    return {name: float(np.exp(found.mean())) for name, found in told.items()}


def losses(
    model: Any,
    policies: Mapping[str, Policy | None],
    ids: np.ndarray,
    context: int = TOKENS,
    scored: int = 64,
    windows: int = 128,
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """Mean loss (nats) of `scored` tokens after a `context` that went through each cache.

    ids: text, int64; the windows are spread evenly over it. The first scored token is predicted
    by prefill itself and does not count. Returns (windows,) by candidate, of the same windows.
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
    found = {name: np.empty(windows) for name in policies}
    for at in range(0, windows, ROWS):
        if progress:
            progress(at / windows, f"window {at} of {windows}")
        some = rows[at : at + ROWS]
        rest = some[:, context:-1]
        for name, logits in through(model, policies, some[:, :context], rest).items():
            given = logits[:, 1:].float().transpose(1, 2)
            each = F.cross_entropy(given, some[:, context + 1 :], reduction="none")
            found[name][at : at + ROWS] = each.mean(1).numpy()
    return found
