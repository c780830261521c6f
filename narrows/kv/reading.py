"""Prompts read once, whatever number of caches take from them what they keep.

Prefill is exact whatever is kept, so candidates share one reading; questions that follow the same
text share that too. Policies that change prefill itself read on their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from narrows.kv._base import Policy, Prompt
from narrows.kv.stack import Stack

if TYPE_CHECKING:
    import torch

    from narrows.kv.store_torch import Store


def through(
    model: Any, policies: Mapping[str, Policy | None], prompt: torch.Tensor, rest: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Logits after the prompt, and after each token of `rest` read through each cache.

    prompt, rest: (rows, tokens) ids. Returns (rows, 1 + rest, vocabulary) by candidate.
    """
    import torch

    with reading(model, policies.values()):
        read = prompts_read(model, policies, prompt)
        return {
            name: torch.cat([first, continued(model, policies[name], cache, rest)], 1)
            for name, (cache, first) in read.items()
        }


def alone(policy: Policy | None) -> bool:
    """Whether a policy changes how a prompt is read, so that it cannot share a reading."""
    if isinstance(policy, Stack):
        policy = policy.choose  # what stores tokens has no part in how a prompt is read
    if policy is None:
        return False
    return bool(policy.chunk) or type(policy).attend_prompt is not Policy.attend_prompt


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
        if not alone(policy):
            shared[name] = policy
        elif policy is not None and policy.chunk:
            told = prefill(model, prompt, caches[name], policy.chunk)
            made[name] = caches[name], told.unsqueeze(1)
        else:
            told = model(prompt, past_key_values=caches[name], use_cache=True, logits_to_keep=1)
            made[name] = caches[name], told.logits
    if shared:
        every = _Every(shared, {name: stores(caches[name]) for name in shared})
        whole = KVCache(model.config, every)
        first = model(prompt, past_key_values=whole, use_cache=True, logits_to_keep=1).logits
        made |= {name: (caches[name], first) for name in shared}
    return {name: made[name] for name in policies}


def questions_read(
    model: Any,
    policies: Mapping[str, Policy | None],
    text: torch.Tensor,
    questions: Iterable[torch.Tensor],
) -> Iterator[dict[str, tuple[Any, torch.Tensor]]]:
    """prompts_read for each question after the same text, which is read once.

    text: (rows, tokens); questions: each (rows, tokens). A policy sees text and question as one
    prompt: what it votes with may be the question.
    """
    from narrows.kv.adapter import KVCache, copied, stores
    from narrows.kv.chunked import in_chunks

    shared = {n: p for n, p in policies.items() if not alone(p)}
    others = {n: p for n, p in policies.items() if alone(p)}
    every = _Every(shared)
    begun = KVCache(model.config, every)
    with in_chunks(begun, last=False):
        model(text, past_key_values=begun, use_cache=True, logits_to_keep=1)
    for question in questions:
        caches = {name: KVCache(model.config, policy) for name, policy in shared.items()}
        every.stores = {name: stores(cache) for name, cache in caches.items()}
        cache = copied(begun)
        with in_chunks(cache, last=True):
            first = model(question, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        made = {name: (held, first) for name, held in caches.items()}
        if others:
            made |= prompts_read(model, others, _joined(text, question, 1))
        yield {name: made[name] for name in policies}


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

    def __init__(
        self, policies: Mapping[str, Policy | None], stores: Mapping[str, Any] | None = None
    ) -> None:
        self.policies, self.stores = policies, stores or {}
        self.begun: dict[int, Prompt] = {}

    def on_prefill_chunk(self, chunk: Prompt, store: Store) -> torch.Tensor | None:
        """Remember what the text looked at: the question is seen together with it."""
        if not chunk.last:
            self.begun[chunk.layer] = chunk
        return None

    def on_prefill_end(self, prompt: Prompt) -> torch.Tensor | None:
        """Fill each policy's store of this layer; the prefilled cache itself is thrown away."""
        before = self.begun.get(prompt.layer)
        if before is not None:
            hidden = before.hidden
            if hidden is not None and prompt.hidden is not None:
                hidden = _joined(hidden, prompt.hidden, 1)
            queries = _joined(before.queries, prompt.queries, 2)
            prompt = replace(prompt, queries=queries, hidden=hidden)
        for name, policy in self.policies.items():
            columns = None if policy is None else policy.on_prefill_end(prompt)
            self.stores[name][prompt.layer].fill(prompt.keys, prompt.values, columns, prompt.valid)
        return None


def _joined(first: torch.Tensor, then: torch.Tensor, dim: int) -> torch.Tensor:
    import torch

    return torch.cat([first, then], dim)


@contextmanager
def reading(model: Any, policies: Iterable[Policy | None] = ()) -> Iterator[None]:
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
