"""MatryoshkaKV: fewer channels of the cache, in a trained orthogonal basis (arXiv 2410.14731).

Narrow point: every decoded token reads the whole cache, so memory bandwidth limits decode, and
the bytes of the cache cap the batch. Techniques that drop tokens or bits leave its channels.

Mechanism. Each layer and KV head has orthogonal bases and means for its keys (positions applied)
and its values; the cache holds the first r of d channels of `(x - mean) U`. Queries are turned
once and multiply r channels; mixed values are turned back. All queries of a group share the basis
of their KV head. Bases start as principal axes and are trained on the frozen model with ranks
drawn at random, so that one basis serves every rank: the first channels matter most, as dolls sit
in dolls. Ranks are uneven: from all channels on, the entry (layer, head, keys or values) whose
next eighth costs the logits least is lowered, until the mean is the budget. They are stored
uneven too, side by side. Prefill attends what it computed; the cache alone is projected.

It hurts where keys or values fill all their channels, below a quarter of them in any model, on
text unlike what bases were trained on, and where decode is not limited by the cache: turning a
query, and each new token, costs a product with U. Prefill gains nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.core.method import Price
from narrows.core.workload import Op, Phase
from narrows.kv._base import KVTechnique, Prompt
from narrows.kv._coded import PARTS, cached, in_full

if TYPE_CHECKING:
    import torch

    from narrows.kv.matryoshkakv_torch import Projection
    from narrows.kv.store_torch import Store

SHIPPED = Path(__file__).parent / "weights" / "matryoshkakv-recall-lm.safetensors"


class MatryoshkaKV(KVTechnique):
    """Keeps a share of the channels of the cache of every layer that attends to all tokens.

    budget: mean share of channels kept, `share` of keys and values over layers and heads.
    adaptive: ranks by the greedy order of the fit; False: the same rank everywhere. recent: last
    tokens kept in full.
    """

    key = "matryoshkakv"
    paper = "arXiv:2410.14731"
    relieves = "memory bandwidth"
    stepwise = True
    price = Price(
        quality="what keys and values hold outside of the kept channels is lost",
        memory="two matrices of head_dim squared for each layer and KV head",
    )

    def __init__(self, budget: float = 0.4, adaptive: bool = True, recent: int = 0) -> None:
        number = isinstance(budget, int | float | np.floating) and not isinstance(budget, bool)
        if not number or not 0 < budget <= 1:
            raise NarrowsError(
                f"matryoshkakv: budget is the share of channels kept, above 0 and at most 1, not "
                f"{budget!r}"
            )
        if not isinstance(adaptive, bool):
            raise NarrowsError(f"matryoshkakv: adaptive must be True or False, not {adaptive!r}")
        if not isinstance(recent, int | np.integer) or isinstance(recent, bool) or recent < 0:
            raise NarrowsError(
                f"matryoshkakv: recent must be a whole number of tokens from 0 up, not {recent!r}"
            )
        # `budget` is what a policy is asked for tokens
        self.share, self.adaptive, self.recent = float(budget), adaptive, int(recent)
        self.trained = ""  # a digest of the projection, so that saved caches tell them apart
        self._projection: Projection | None = None

    @classmethod
    def variants(cls, case: Case) -> tuple[MatryoshkaKV, ...]:
        """The default, 60 % less; and half, which hurts less."""
        return cls(), cls(0.5)

    @classmethod
    def ladder(cls, case: Case) -> tuple[MatryoshkaKV, ...]:
        """Fewer channels, down to the quarter that the paper calls extreme."""
        return tuple(cls(share) for share in (0.75, 0.5, 0.4, 0.25))

    def of(self, model: Any, state: Projection | None = None) -> MatryoshkaKV:
        """With a projection. state: what `fit` gave; None: its own, or recall-lm's shipped one."""
        from narrows.kv import matryoshkakv_torch

        made = copy(self)
        found = self._projection if state is None else state
        if found is None:
            found = matryoshkakv_torch.load(SHIPPED, model)
        made._projection, made.trained = found, found.digest
        return made

    def fit(self, target: Any, data: Any, seed: int = 0) -> Any:
        """A projection for a model, and the order of its ranks.

        data: its tokenizer and a text of tokens, (tokenizer, int64). The recipe is in
        matryoshkakv_train; it takes minutes for recall-lm.
        """
        from narrows.kv.matryoshkakv_train import ordered, train

        tokenizer, text = data
        made = train(target, tokenizer, text, seed=seed)
        return ordered(target, tokenizer, text, made, seed)

    def on_prefill_end(self, prompt: Prompt) -> torch.Tensor | None:
        """Nothing is dropped."""
        return None

    def store(self, config: Any, layer: int = 0) -> Store:
        """A packed store of few channels; NarrowsError where there is no projection for it."""
        from narrows.kv.lowrank import LowRank
        from narrows.kv.store_packed import PackedStore

        made = self._projection
        if made is None:
            raise NarrowsError(
                "matryoshkakv: bases are trained for a model, and there are none yet; use "
                "MatryoshkaKV(...).of(model), or of(model, state) with what fit gave"
            )
        if layer >= len(made.mean):
            raise NarrowsError(
                f"matryoshkakv: there are bases for {len(made.mean)} layers, none for layer "
                f"{layer}; fit them on this model"
            )
        ranks = made.allocate(self.share) if self.adaptive else made.uniform(self.share)
        codecs = [LowRank(made.basis[layer, i], made.mean[layer, i], ranks[layer][i])
                  for i in (0, 1)]  # fmt: skip
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for codec in codecs:
            codec.check(size)
        return PackedStore(*codecs, residual=self.recent)

    def predict(self, case: Case) -> Case:
        """The case with fewer channels of the cache, and the products that turn what goes there.

        Facts may be arrays. The same case where a former step left no more channels than these.
        """
        facts, work = cached(case, self.key, "project"), case.workload
        size = int(facts["head_dim"])
        prompt = work.tensors["kv.prompt.key"].extent("token")
        full = in_full(
            prompt, facts["generate"],
            lambda seen: {what: self._in_full(seen, what) for what in ("key", "value")},
        )  # fmt: skip
        kept = {}
        for part in PARTS:
            for what in ("key", "value"):
                tensor = work.tensors.get(f"kv.{part}.{what}")
                if tensor is not None:
                    share = full[part, what]
                    channels = size * (self.share * (1 - share) + share)
                    if bool(np.any(np.asarray(tensor.extent("channel")) > channels)):
                        kept[tensor.name] = tensor.keep(channel=channels)
        if not kept:
            return case
        before = work.tensors["kv.prompt.key"].extent("channel")
        ratio = kept["kv.prompt.key"].extent("channel") / before if "kv.prompt.key" in kept else 1.0
        heads = facts["heads"] / facts.get("devices", 1)

        def change(phase: Phase, op: Op) -> tuple[Op, ...]:
            return _turning(phase, op, kept, size, self.share, heads, ratio)

        work = work.with_tensors(kept.values()).map_ops(change)
        chosen = {"budget": self.share, "adaptive": self.adaptive, "recent": self.recent}
        plan = case.plan.with_policy("project", self.key, **chosen)
        return replace(case, workload=work, plan=plan)

    def why(self, case: Case) -> str:
        """One sentence with the bytes saved and what decode is spared."""
        facts = cached(case, self.key, "project")
        before, after = (float(np.max(c.workload.bytes("kv"))) for c in (case, self.predict(case)))
        if after >= before:
            return "the cache has as few channels already, or too few tokens: nothing changes"
        told = f"keeps {self.share:.0%} of channels: {before / 1e9:.3g} to {after / 1e9:.3g} GB"
        if float(np.max(facts["generate"])) < 1:
            return f"{told}; nothing is decoded, so only memory is saved"
        weights = float(np.max(case.workload.bytes("weight")))
        spared = (before - after) / (before + weights)
        return f"{told}, sparing each decode step {spared:.0%} of its bytes; prefill stays whole"

    def _in_full(self, seen: np.ndarray, what: str) -> np.ndarray:
        """Recent tokens in full: keys leave by the block, values one by one."""
        if not self.recent:
            return np.zeros_like(seen)
        return seen % self.recent if what == "key" else np.minimum(seen, self.recent)


def _turning(
    phase: Phase, op: Op, kept: Mapping[str, Any], size: int, share: float, heads: Any,
    ratio: Any,
) -> tuple[Op, ...]:  # fmt: skip
    """An op over fewer channels, and what turns new tokens and queries costs."""
    if any(u.tensor in kept for u in op.writes):
        # a product of d with r channels: 2 r operations an element of what comes in
        turned = {op.reads[0].tensor: 2.0 * size * share}
        return (replace(op, kind="pointwise", per_element={**op.per_element, **turned}),)
    read = [u.tensor for u in op.reads if u.tensor in kept]
    if not read or phase.name != "decode":
        return (op,)
    # m x n x k of a product: channels are its k with keys, its n with values
    shape = {n: x * ratio if n in ("n", "k") and np.array_equal(x, size) else x
             for n, x in op.shape.items()}  # fmt: skip
    batch = kept[read[0]].extent("batch")
    turned = 2.0 * size * size * share * heads * batch
    parts = len({name.split(".")[-1] for name in read})  # queries, mixed values, or both
    return (replace(op, shape=shape, flops=op.flops + turned * parts),)
