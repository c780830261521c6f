"""SnapKV: keep the prompt tokens that the end of the prompt looks at (arXiv 2404.14469).

Narrow point: every decoded token reads the whole cache of the prompt, so memory bandwidth (and
capacity, which caps the batch) limits decode once the prompt is long.

Mechanism. When a layer has read the prompt, the queries of its last `window` tokens attend to
all keys (softmax in fp32, causal); the weights of each earlier token are summed over the window:
its votes. Votes are pooled along tokens (`kernel`), so that the neighbours of a peak stay with
it, and averaged over the queries that share a KV head. Every KV head keeps its `capacity -
window` best tokens and the window, at their original positions; prefill itself is exact.

It hurts when a later question needs what was dropped (the votes know only the question that
stands in the window), when an answer is longer than the pooling reaches beyond the token that is
looked at, and where text merely goes on, which leans on recent tokens. It does nothing for a
prompt no longer than `capacity`, nor for prefill.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.core.method import Price
from narrows.core.tensor import Codec, Number, Tensor
from narrows.core.workload import Op, Phase, Use, Workload
from narrows.kv._base import KVTechnique, Prompt
from narrows.kv._coded import cached

if TYPE_CHECKING:
    import torch

KEYS, VALUES = "kv.prompt.key", "kv.prompt.value"
"""The tensors it rewrites: the prompt's cache, axes layer, batch, head, token, channel."""


class SnapKV(KVTechnique):
    """Keeps `capacity` tokens of a prompt in every layer and KV head.

    capacity, window, kernel, pool: the official defaults. pool: `avg` or `max` (the paper's
    LongBench runs). ratio: fraction of every prompt to drop instead of a fixed capacity.
    """

    key = "snapkv"
    paper = "arXiv:2404.14469"
    relieves = "memory bandwidth"
    price = Price(
        quality="what the end of the prompt does not ask for is forgotten; later questions fail",
        memory="none: scores of the window, one layer and prompt at a time",
    )

    def __init__(
        self,
        capacity: int = 2048,
        window: int = 32,
        kernel: int = 5,
        pool: str = "avg",
        ratio: float | None = None,
    ) -> None:
        for name, value in (("capacity", capacity), ("window", window), ("kernel", kernel)):
            if not isinstance(value, int | np.integer) or isinstance(value, bool):
                raise NarrowsError(
                    f"snapkv: {name} must be a whole number of tokens, not {value!r}"
                )
        if window < 1:
            raise NarrowsError(f"snapkv: window must be at least 1 token, not {window!r}")
        if kernel < 1 or kernel % 2 == 0:
            raise NarrowsError(f"snapkv: kernel must be an odd number of tokens, not {kernel!r}")
        if pool not in ("avg", "max"):
            raise NarrowsError(f"snapkv: pool must be avg or max, not {pool!r}")
        if ratio is not None and not (isinstance(ratio, int | float) and 0 <= ratio < 1):
            raise NarrowsError(f"snapkv: ratio must lie in [0, 1), not {ratio!r}")
        if ratio is None and capacity <= window:
            raise NarrowsError(
                f"snapkv: capacity must exceed the window of {window} tokens, which is always "
                f"kept; it is {capacity!r}"
            )
        self.capacity, self.window, self.kernel = capacity, window, kernel
        self.pool, self.ratio = pool, ratio

    @classmethod
    def variants(cls, case: Case) -> tuple[SnapKV, ...]:
        """The default; and an eighth, of prompts that the default cuts at all."""
        default, prompt = cls(), int(np.max(case.workload.facts.get("prompt", 0)))
        if prompt <= default.capacity or prompt // 8 == default.capacity:
            return (default,)
        return (default, cls(capacity=prompt // 8))

    @classmethod
    def ladder(cls, case: Case) -> tuple[SnapKV, ...]:
        """Shares of any prompt, down to a sixteenth."""
        return tuple(cls(ratio=ratio) for ratio in (0.1, 0.25, 0.5, 0.75, 0.875, 0.9375))

    def budget(self, tokens: Number) -> Number:
        """Tokens kept of prompts of so many tokens."""
        if self.ratio is None:
            return np.minimum(tokens, self.capacity)
        kept = np.floor(np.asarray(tokens) * (1 - self.ratio))
        return np.minimum(tokens, np.maximum(kept, self.window + 1))

    def at(self, share: float) -> SnapKV:
        """The same votes, keeping this share of every prompt."""
        return SnapKV(self.capacity, self.window, self.kernel, self.pool, 1.0 - share)

    def on_prefill_end(self, prompt: Prompt) -> torch.Tensor | None:
        """Columns with the most votes, and the window; see Policy."""
        from narrows.kv.select_torch import lengths, top, window_votes

        budgets = [int(self.budget(n)) for n in lengths(prompt)]
        return top(
            prompt, self.window, budgets,
            lambda: window_votes(prompt, self.window, self.kernel, self.pool),
        )  # fmt: skip

    def predict(self, case: Case) -> Case:
        """The case with the prompt's cache cut to the budget, and the selection's cost in prefill.

        Facts and extents may be arrays over cases. The same case where no prompt is long enough.
        """
        prompt = cached(case, self.key, "cut")["prompt"]
        work = case.workload
        before = work.tensors[KEYS].extent("token")  # what a former step left of the prompt
        kept = np.minimum(self.budget(prompt), before)
        active = np.asarray(before > kept, float)
        if not active.any():
            return case
        fresh = _fresh(work)
        tensors, ops = self._selection(work, fresh[KEYS], kept, active)
        cut = _cut_decode(work, kept - before)

        def prefill(op: Op) -> tuple[Op, ...]:
            written = [u.tensor for u in op.writes if u.tensor in fresh]
            if not written:
                return (op,)
            # attention has the whole prompt at hand; only what is kept goes to the cache
            columns = Use("snapkv.columns", {"token": kept * active})
            reads = (Use(fresh[written[0]], {"token": kept}), columns)
            stored = replace(op, kind="gather", reads=reads)
            return (*ops, stored) if written[0] == KEYS else (stored,)

        def change(phase: Phase, op: Op) -> tuple[Op, ...]:
            return prefill(op) if phase.name == "prefill" else (cut.ops.get(id(op), op),)

        cache = [work.tensors[name].keep(token=kept) for name in (KEYS, VALUES)]
        work = work.with_tensors([*cache, *tensors, *cut.tensors]).map_ops(change)
        parameters = {"window": self.window, "kernel": self.kernel, "pool": self.pool}
        budget = {"capacity": self.capacity} if self.ratio is None else {"ratio": self.ratio}
        plan = case.plan.with_policy("evict", self.key, **budget, **parameters)
        return replace(case, workload=work, plan=plan)

    def why(self, case: Case) -> str:
        """One sentence with the tokens kept and the bytes that decode is spared."""
        facts = cached(case, self.key, "cut")
        prompt, generate = float(np.max(facts["prompt"])), float(np.max(facts["generate"]))
        kept = float(np.max(self.budget(prompt)))
        if kept >= prompt:
            limit = f"capacity of {self.capacity}" if self.ratio is None else f"ratio {self.ratio}"
            return f"a prompt of {prompt:.0f} tokens fits the {limit}: nothing is dropped"
        work = case.workload
        before = float(np.max(work.tensors[KEYS].bytes() + work.tensors[VALUES].bytes()))
        weights = float(np.max(work.bytes("weight")))
        saved = before * (1 - kept / prompt)
        told = (
            f"keeps {kept:.0f} of {prompt:.0f} prompt tokens, so the prompt's cache shrinks from "
            f"{before / 1e9:.3g} to {(before - saved) / 1e9:.3g} GB"
        )
        if generate < 1:
            return f"{told}; nothing is decoded, so only memory is saved, and prefill pays for it"
        return (
            f"{told}, sparing each decode step {saved / (before + weights):.0%} of its bytes; "
            "prefill stays whole and pays for the selection"
        )

    def _selection(
        self, work: Workload, keys: str, kept: Number, active: Number
    ) -> tuple[list[Tensor], tuple[Op, ...]]:
        """What choosing makes and runs in each layer; scores are of one prompt at a time.

        keys: the activation that holds the keys of the whole prompt. active: 1 where it runs.
        """
        facts, cache = work.facts, work.tensors[KEYS]
        prompt, size = facts["prompt"], facts["head_dim"]
        kv_heads, batch = cache.extent("head"), cache.extent("batch")
        heads = facts["heads"] / facts.get("devices", 1)
        layers = cache.extent("layer") * active
        fp32 = Codec.of("fp32")
        rows = {"head": heads, "query": self.window, "token": prompt}
        tokens = {"batch": batch, "head": heads, "token": prompt}
        made = [
            Tensor("snapkv.scores", "activation", rows, fp32),
            Tensor("snapkv.weights", "activation", rows, fp32),
            Tensor("snapkv.votes", "activation", tokens, fp32),
            Tensor("snapkv.pooled", "activation", {**tokens, "head": kv_heads}, fp32),
            Tensor("snapkv.columns", "activation", {**tokens, "head": kv_heads, "token": kept},
                   Codec.of("int64")),
        ]  # fmt: skip
        scores, weights, votes, pooled, columns = (Use(t.name) for t in made)
        one = {"batch": 1}
        flops = 2.0 * heads * self.window * prompt * size
        shape = {"m": self.window * heads / kv_heads, "n": prompt, "k": size, "batch": kv_heads}
        precision = facts.get("dtype", "fp32")
        each = layers * batch
        return made, (
            Op("snapkv.scores", "matmul", (Use(keys, one),), (scores,), flops,
               precision=precision, repeat=each, shape=shape),
            Op("snapkv.softmax", "softmax", (scores,), (weights,), 0.0, {scores.tensor: 5.0},
               repeat=each),
            Op("snapkv.vote", "reduce", (weights,), (Use(votes.tensor, one),), 0.0,
               {weights.tensor: 1.0}, repeat=each),
            Op("snapkv.pool", "pointwise", (votes,), (pooled,), 0.0,
               {votes.tensor: self.kernel + 1.0}, repeat=layers),
            Op("snapkv.top", "reduce", (pooled,), (columns,), 0.0, {pooled.tensor: 1.0},
               repeat=layers),
        )  # fmt: skip


def _fresh(work: Workload) -> dict[str, str]:
    """The activations that prefill writes into the prompt's cache, by cache tensor."""
    return {
        use.tensor: op.reads[0].tensor
        for phase in work.phases if phase.name == "prefill"
        for op in phase.ops for use in op.writes if use.tensor in (KEYS, VALUES)
    }  # fmt: skip


@dataclass(frozen=True)
class _Cut:
    """Decode over a shorter cache: changed ops by the id of the old one, changed activations."""

    ops: Mapping[int, Op]
    tensors: list[Tensor]


def _cut_decode(work: Workload, change: Number) -> _Cut:
    """Scores, and what is made of them, follow the keys: `change` (below zero) more of them."""
    found = {t.name: t for t in work.tensors.values() if "key" in t.axes}
    seen: set[str] = set()
    ops: dict[int, Op] = {}
    for op in (op for p in work.phases if p.name == "decode" for op in p.ops):
        reads = {u.tensor for u in op.reads}
        if not reads & (seen | {KEYS, VALUES}):
            continue
        seen |= {u.tensor for u in op.writes} & found.keys()
        old = op.shape.get("kv", next((found[r].extent("key") for r in reads & seen), None))
        if old is None:
            continue
        shape = {n: x + change if np.array_equal(x, old) and n in ("n", "k", "kv") else x
                 for n, x in op.shape.items()}  # fmt: skip
        ops[id(op)] = replace(op, shape=shape, flops=op.flops * (old + change) / old)
    return _Cut(ops, [found[n].keep(key=found[n].extent("key") + change) for n in seen])
