"""One transformer block: attention over a cache of keys and values, then the MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from narrows.core.tensor import Codec, Number, Tensor
from narrows.core.workload import Use
from narrows.trace.blocks import SOFTMAX_FLOPS, Axes, Builder, Note, causal_sum
from narrows.trace.config import TransformerConfig
from narrows.trace.weights import kv_heads_per_device


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens of one forward pass.

    before: tokens cached when it starts. tokens: that pass through it at once, in each of
    `batch` sequences. steps: how many such passes follow each other, each one token longer.
    """

    phase: str
    before: Number
    tokens: Number
    batch: Number
    steps: Number = 1.0

    @classmethod
    def prefill(cls, prompt: Number, batch: Number, phase: str = "prefill") -> Span:
        """A whole prompt at once."""
        return cls(phase, 0.0, prompt, batch)

    @classmethod
    def decode(cls, prompt: Number, generate: Number, batch: Number) -> Span:
        """One token at a time, `generate` times."""
        return cls("decode", prompt, 1.0, batch, generate)

    @property
    def decoding(self) -> bool:
        """Whether queries come one at a time and read keys from the cache."""
        return self.phase == "decode"

    def new_keys(self, window: int) -> Number:
        """Mean over the steps of the keys a query sees that were made in earlier steps."""
        return causal_sum(0.0, self.steps, window) / np.maximum(self.steps, 1)

    def old_keys(self, window: int) -> Number:
        """Mean over the steps of the keys of the prompt that a query sees."""
        seen = causal_sum(self.before, self.steps, window) / np.maximum(self.steps, 1)
        return seen - self.new_keys(window)


@dataclass(frozen=True)
class Cache:
    """The cached keys and values: of the prompt and of new tokens, which techniques treat apart.

    Layers with a window keep no more tokens than it; where only some layers have one, theirs
    are tensors of their own (`.local`).
    """

    tensors: Mapping[str, Tensor]
    mixed: bool

    @classmethod
    def of(
        cls, config: TransformerConfig, prompt: Number, generate: Number, batch: Number,
        dtype: str, tp: int,
    ) -> Cache:  # fmt: skip
        """Axes layer, batch, head, token, channel."""
        local = config.windowed_layers
        mixed = 0 < local < config.layers
        found: dict[str, Tensor] = {}
        for count, windowed in ((config.layers - local, False), (local, True)):
            for part, tokens in (("prompt", prompt), ("new", generate)):
                for what in ("key", "value") if count else ():
                    name = f"kv.{part}.{what}{'.local' if windowed and mixed else ''}"
                    axes: dict[str, Number] = {
                        "layer": count, "batch": batch, "head": kv_heads_per_device(config, tp),
                        "token": np.minimum(tokens, config.window) if windowed else tokens,
                        "channel": config.head_dim,
                    }  # fmt: skip
                    found[name] = Tensor(name, "kv", axes, Codec.of(dtype))
        return cls(found, mixed)

    def name(self, part: str, what: str, windowed: bool) -> str:
        """The tensor of `prompt` or `new` keys or values that a layer uses."""
        return f"kv.{part}.{what}{'.local' if windowed and self.mixed else ''}"


def layer(
    b: Builder, config: TransformerConfig, hidden: str, table: tuple[str, str] | None,
    cache: Cache | None, span: Span, windowed: bool, sparse: bool, tp: int,
) -> str:  # fmt: skip
    """Add one block; returns the hidden state after it."""
    before = b.norm(config.norm, "attention_norm", hidden)
    second = before
    if config.parallel and config.norms == 2:
        second = b.norm(config.norm, "mlp_norm", hidden)
    mixed = attention(b, config, before, table, cache, span, windowed, tp)
    if config.parallel:
        made = mlp(b, config, second, sparse, tp)
        both = b.add("parallel.add", made, mixed, "parallel")
        b.reduce_over(both, tp, "all_reduce")
        return b.add("residual.add", both, hidden, "hidden")
    b.reduce_over(mixed, tp, "attention.all_reduce")
    if config.norms == 4:
        mixed = b.norm(config.norm, "attention_post_norm", mixed)
    hidden = b.add("attention.add", hidden, mixed, "attended")
    before = b.norm(config.norm, "mlp_norm", hidden)
    made = mlp(b, config, before, sparse, tp)
    b.reduce_over(made, tp, "mlp.all_reduce")
    if config.norms == 4:
        made = b.norm(config.norm, "mlp_post_norm", made)
    return b.add("mlp.add", hidden, made, "hidden")


def attention(
    b: Builder, config: TransformerConfig, source: str, table: tuple[str, str] | None,
    cache: Cache | None, span: Span, windowed: bool, tp: int,
) -> str:  # fmt: skip
    """Projections, positions, cache, scores and the output projection."""
    heads, kv_heads = config.heads / tp, kv_heads_per_device(config, tp)
    q, k, v = _project(b, config, source, heads, kv_heads)
    if config.qk_norm:
        q, k = b.norm(config.norm, "q_norm", q), b.norm(config.norm, "k_norm", k)
    if config.query_scale:
        q = b.map("q.scale", "pointwise", [q], b.like(q, "q.scaled"))
    if table is not None:
        q = b.rotate(q, table, config.rotary, "q_rope")
        k = b.rotate(k, table, config.rotary, "k_rope")
    if cache is not None:
        part = "new" if span.decoding else "prompt"
        for what, fresh in (("key", k), ("value", v)):
            target = cache.name(part, what, windowed)
            b.run(f"kv.write {what}", "copy", [fresh],
                  [Use(target, {"token": 1.0} if span.decoding else {})])  # fmt: skip
    window = config.window if windowed else 0
    if span.decoding and cache is not None:
        keys, values = (_cached(cache, what, span, windowed, window) for what in ("key", "value"))
        context = span.old_keys(window) + span.new_keys(window)
        fraction: Number = 1.0
    else:
        keys, values, context = [Use(k)], [Use(v)], span.tokens
        fraction = causal_sum(0.0, span.tokens, window) / np.maximum(span.tokens, 1) ** 2
    b.group = f"attention_{'decode' if span.decoding else 'prefill'}:{b.prefix}"
    out = _scores(b, config, q, keys, values, context, fraction, heads, kv_heads)
    b.group = ""
    return b.linear("o", out, {"channel": config.hidden})


def _project(
    b: Builder, config: TransformerConfig, source: str, heads: Number, kv_heads: Number
) -> tuple[str, str, str]:
    """Queries, keys and values."""
    shape: Axes = {"head": kv_heads, "channel": config.head_dim}
    parts: dict[str, Axes] = {"q": {**shape, "head": heads}, "k": shape, "v": shape}
    if config.fused_qkv:
        q, k, v = b.split("qkv", source, parts)
    else:
        q, k, v = (b.linear(name, source, axes) for name, axes in parts.items())
    return q, k, v


def _cached(cache: Cache, what: str, span: Span, windowed: bool, window: int) -> list[Use]:
    """The reads of cached keys or values by one query of every head."""
    return [
        Use(cache.name("prompt", what, windowed), {"layer": 1, "token": span.old_keys(window)}),
        Use(cache.name("new", what, windowed), {"layer": 1, "token": span.new_keys(window)}),
    ]


def _scores(
    b: Builder, config: TransformerConfig, q: str, keys: list[Use], values: list[Use],
    context: Number, fraction: Number, heads: Number, kv_heads: Number,
) -> str:  # fmt: skip
    """Attention of `q` over keys and values, unfused: scores go to memory and come back.

    Queries of one group share their keys without copies. Unfused kernels do the whole square of
    scores; `fraction` (shape `causal`) is what a fused kernel cannot skip.
    """
    dim, rows = config.head_dim, b.rows(q)
    tokens = b.tensors[q].axes["token"]
    decoding = b.group.startswith("attention_decode")
    shape = {
        "batch": rows / tokens * heads, "q": tokens, "kv": context, "heads": heads,
        "kv_heads": kv_heads, "channel": dim, "causal": fraction,
    }  # fmt: skip

    def product(name: str, source: str, held: list[Use], out: str, n: Number, k: Number) -> None:
        # Decoding, the cache governs the work: what a technique drops is neither read nor used.
        rate = {u.tensor: 2.0 * tokens * heads / kv_heads for u in held}
        flops = 2.0 * rows * heads * context * dim
        b.run(
            name, "matmul", [source, *held], [out], 0.0 if decoding else flops,
            rate if decoding else {}, {**shape, "m": tokens, "n": n, "k": k}, b.precision,
            Note((source, *(u.tensor for u in held))),
        )  # fmt: skip

    scores = b.make("scores", {"head": heads, "key": context})
    product("scores", q, keys, scores, context, dim)
    last = b.map("scores.scale", "pointwise", [scores], b.like(scores, "scores.scaled"))
    if config.softcap:
        steps = [b.like(scores, f"scores.{s}") for s in ("divided", "tanh", "capped")]
        b.map("scores.divide", "pointwise", [last], steps[0])
        b.map("scores.tanh", "pointwise", [steps[0]], steps[1], saves=[steps[1]])
        last = b.map("scores.cap", "pointwise", [steps[1]], steps[2])
    if not decoding:
        masked = b.like(scores, "scores.masked")
        last = b.map("scores.mask", "pointwise", [last], masked, passes=True)
    if b.narrow:
        wide = b.like(scores, "scores.wide", format=b.wide)
        last = b.map("scores.widen", "copy", [last], wide, 0.0)
    weights = b.like(last, "weights")
    last = b.map("softmax", "softmax", [last], weights, SOFTMAX_FLOPS, saves=[weights])
    if b.narrow:
        narrow = b.like(scores, "weights.narrow")
        last = b.map("weights.narrow", "copy", [last], narrow, 0.0)
    out = b.like(q, "mixed")
    product("weighted", last, values, out, dim, context)
    return b.map("mixed.merge", "copy", [out], b.like(out, "merged"), 0.0)


def mlp(b: Builder, config: TransformerConfig, source: str, sparse: bool, tp: int) -> str:
    """The MLP of a block; `sparse` for a mixture of experts."""
    if sparse:
        return _experts(b, config, source, tp)
    inner: Axes = {"channel": config.ffn / tp}
    if not config.gated:
        up = b.activate(config.activation, b.linear("up", source, inner))
    elif config.fused_gate_up:
        gate, up = b.split("gate_up", source, {"gate": inner, "up": inner})
        up = _gated(b, config, gate, up, "gated")
    else:
        gate = b.linear("gate", source, inner)
        up = _gated(b, config, gate, b.linear("up", source, inner), "gated")
    return b.linear("down", up, {"channel": config.hidden})


def _gated(b: Builder, config: TransformerConfig, gate: str, up: str, name: str) -> str:
    """The activated gate times what it lets through."""
    gate = b.activate(config.activation, gate)
    return b.map(name, "pointwise", [gate, up], b.like(up, name), saves=[gate, up])


def _experts(b: Builder, config: TransformerConfig, source: str, tp: int) -> str:
    """A mixture of experts: every token takes `experts_per_token` of them.

    Routing is taken as even and independent, so `rows` tokens touch
    experts * (1 - (1 - chosen / experts) ** rows) different ones.
    """
    experts, chosen, inner = config.experts, config.experts_per_token, config.expert_ffn / tp
    rows = b.batch * b.tokens
    touched = experts * (1.0 - (1.0 - chosen / experts) ** rows)
    routed = b.linear("router", source, {"expert": experts})
    odds = b.like(routed, "router.weights")
    b.map("router.softmax", "softmax", [routed], odds, SOFTMAX_FLOPS, saves=[odds])
    top = b.make("router.top", {"choice": chosen})
    b.run("router.topk", "reduce", [odds], [top], rows * experts)
    taken = b.make("dispatched", {"choice": chosen, "channel": config.hidden})
    b.run("dispatch", "gather", [source, top], [taken])

    def product(name: str, fed: str, outs: list[str]) -> None:
        weight = b.tensors[name]
        b.run(
            name, "matmul", [fed, Use(name, {"layer": 1, "expert": touched})], outs,
            per_element={name: 2.0 * rows * chosen / touched}, precision=b.precision,
            shape={"m": rows * chosen / touched, "n": weight.extent("out"),
                   "k": weight.extent("in"), "batch": touched}, note=Note((fed,)),
        )  # fmt: skip

    wide: Axes = {"choice": chosen, "channel": inner}
    gate, up = b.make("experts.gate", wide), b.make("experts.up", wide)
    product("experts.gate_up", taken, [gate, up])
    gated = _gated(b, config, gate, up, "experts.gated")
    made = b.make("experts.down", {"choice": chosen, "channel": config.hidden})
    product("experts.down", gated, [made])
    weighed = b.like(made, "experts.weighed")
    b.map("experts.weigh", "pointwise", [made, top], weighed, saves=[made, top])
    out = b.make("experts.out", {"channel": config.hidden})
    b.run("experts.combine", "reduce", [weighed], [out], rows * chosen * config.hidden)
    if not config.shared_ffn:
        return out
    share: Axes = {"channel": config.shared_ffn / tp}
    gate = b.linear("shared.gate", source, share)
    up = _gated(b, config, gate, b.linear("shared.up", source, share), "shared.gated")
    shared = b.linear("shared.down", up, {"channel": config.hidden})
    part = b.linear("shared.router", source, {"channel": 1})
    part = b.map("shared.sigmoid", "pointwise", [part], b.like(part, "shared.share"))
    weighed = b.like(shared, "shared.weighed")
    b.map("shared.weigh", "pointwise", [shared, part], weighed, saves=[shared, part])
    return b.add("shared.add", out, weighed, "experts.total")
