"""What a cache forgets: recall and perplexity of the reference model through it.

All candidates get the same prompts and spend the same share of the cache. Prefill is exact
whatever is kept, so a prompt is read once and every candidate takes what it keeps from that one
reading; answers are then judged through each cache. Haystacks are given, or sampled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Share of right answers where all `count` pairs of a prompt are asked after it.

    Each question goes through a copy of the cache as the prompt left it, so `prompts` readings
    give `prompts * count` answers. What votes with the question cannot know it here. Questions of
    one prompt share its text: the interval (95 %, Wilson) takes them as independent, which they
    are not quite. Returns a Share by candidate.
    """
    import torch

    from narrows.kv.adapter import copied
    from narrows.models.recall_lm import tasks
    from narrows.models.recall_lm.evaluate import Share

    alphabet, rng = tasks.Alphabet.of(tokenizer), np.random.default_rng(seed)
    batch = tasks.pairs(
        rng, alphabet, haystack, tokens, prompts * count, count, value_tokens, asked=count
    )
    ids, answers = (torch.from_numpy(x) for x in (batch.ids, batch.answers))
    right_ones = dict.fromkeys(policies, 0)
    with _reading(model, policies.values()):
        for at in range(0, prompts, ROWS):
            if progress:
                progress(at / prompts, f"prompt {at} of {prompts}")
            rows = torch.arange(at, min(at + ROWS, prompts)) * count
            read = prompts_read(model, policies, ids[rows, : tokens - QUESTION])
            for i in range(count):
                expected = answers[rows + i]
                rest = torch.cat([ids[rows + i, tokens - QUESTION :], expected[:, :-1]], 1)
                for name, (cache, _) in read.items():
                    logits = continued(model, policies[name], copied(cache), rest)
                    said = logits[:, -expected.shape[1] :].argmax(-1)
                    right_ones[name] += int((said == expected).all(1).sum())
    return {name: Share.of(n, prompts * count) for name, n in right_ones.items()}


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

    with _reading(model, policies.values()):
        read = prompts_read(model, policies, prompt)
        return {
            name: torch.cat([first, continued(model, policies[name], cache, rest)], 1)
            for name, (cache, first) in read.items()
        }


def prompts_read(
    model: Any, policies: Mapping[str, Policy | None], prompt: torch.Tensor
) -> dict[str, tuple[Any, torch.Tensor]]:
    """Each policy's cache after the prompt, and logits of its last token, (rows, 1, vocabulary).

    Policies that let prefill be read entirely and choose at its end share one reading.
    """
    from narrows.kv.adapter import KVCache, stores
    from narrows.kv.chunked import prefill

    caches = {name: KVCache(model.config, policy) for name, policy in policies.items()}
    made: dict[str, tuple[Any, torch.Tensor]] = {}
    shared: dict[str, Policy | None] = {}
    for name, policy in policies.items():
        if policy is not None and policy.chunk:
            told = prefill(model, prompt, caches[name], policy.chunk)
            made[name] = caches[name], told.unsqueeze(1)
        elif policy is not None and type(policy).attend_prompt is not Policy.attend_prompt:
            told = model(prompt, past_key_values=caches[name], use_cache=True, logits_to_keep=1)
            made[name] = caches[name], told.logits
        else:
            shared[name] = policy
    if shared:
        every = _Every(shared, {name: stores(caches[name]) for name in shared})
        whole = KVCache(model.config, every)
        first = model(prompt, past_key_values=whole, use_cache=True, logits_to_keep=1).logits
        made |= {name: (caches[name], first) for name in shared}
    return {name: made[name] for name in policies}


def continued(model: Any, policy: Policy | None, cache: Any, rest: torch.Tensor) -> torch.Tensor:
    """Logits after each token of `rest` (rows, tokens), read through the cache."""
    import torch

    if not rest.shape[1]:
        return torch.empty(len(rest), 0, model.config.vocab_size, dtype=model.dtype)
    at_once = 1 if policy is not None and policy.stepwise else rest.shape[1]
    made = [
        model(part, past_key_values=cache, use_cache=True).logits for part in rest.split(at_once, 1)
    ]
    return torch.cat(made, 1)


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
def _reading(model: Any, policies: Iterable[Policy | None] = ()) -> Iterator[None]:
    """The model with the attention that reads our caches, without gradients."""
    import torch

    from narrows.kv.adapter import ATTENTION, hidden_states

    before = model.config._attn_implementation
    hooks = []
    try:
        model.set_attn_implementation(ATTENTION)
        if any(policy is not None and policy.needs_hidden for policy in policies):
            hooks = hidden_states(model)
        with torch.inference_mode():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)
