"""The training step in closed form: forward, loss, backward and AdamW.

The backward pass is derived from the forward ops by the rules of automatic differentiation, one
kernel for each that eager autograd launches: a product gives two products of the same size, a
pointwise kernel one for each differentiable input, a sum passes its gradient on, a tensor with
several readers adds up what they send. Saved activations are what those kernels read again; with
the plan's `flash` fusion the scores are not among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from narrows.core.tensor import Codec, Number, Tensor
from narrows.core.workload import Op, Phase, Use, Workload
from narrows.trace.blocks import SIXTEEN, Builder, Note
from narrows.trace.config import TransformerConfig
from narrows.trace.layers import Span

PHASE = "training step"

RECOMPUTE = 1.25
"""Products of a fused attention backward to those of an eager one: five to four, because the
scores are made again (Dao 2023, "FlashAttention-2", section 3.1.2)."""

ADAMW_FLOPS = 12.0
"""Operations of AdamW for one parameter: two moments, two corrections, root, decay, step."""

STATES = ("exp_avg", "exp_avg_sq", "master")
"""Kept in fp32 by AdamW; `master` copies of the weights where these have 16 bits."""


def training_step(
    config: TransformerConfig, weights: Mapping[str, Tensor], tokens: Number, batch: Number,
    dtype: str, tp: int, facts: Mapping[str, Any],
) -> Workload:  # fmt: skip
    """One step over `batch` sequences of `tokens` tokens; see llm() for the rest."""
    from narrows.trace.llm import forward

    b = forward(config, weights, None, Span.prefill(tokens, batch, PHASE), dtype, tp, last=False)
    _loss(b, config, tp)
    step = _Backward(b)
    ops = [*b.ops, *step.run()]
    tensors = {**b.tensors, **step.tensors, **_states(weights, dtype)}
    ops += [_adamw(weight, tensors) for weight in weights.values()]
    layered = {name for name, t in tensors.items() if "layer" in t.axes}
    ops = [_in_layer(op, layered) for op in ops]
    return Workload(config.name, tensors, (Phase(PHASE, tuple(ops)),), facts)


def _loss(b: Builder, config: TransformerConfig, tp: int) -> None:
    """Cross-entropy of all positions in fp32."""
    logits = b.ops[-1].writes[0].tensor
    b.tensors[logits] = replace(b.tensors[logits], role="activation")
    if b.narrow:
        logits = b.map(
            "loss.widen", "copy", [logits], b.like(logits, "loss.logits", format=b.wide), 0.0
        )
    likely = b.like(logits, "loss.log_softmax")
    b.map("loss.log_softmax", "softmax", [logits], likely, 5.0, saves=[likely])
    loss = b.make("loss", {"batch": 1, "token": 1}, b.wide)
    b.run("loss.nll", "reduce", [likely], [loss], b.batch * b.tokens, note=Note((likely,)))


class _Backward:
    """Walks the forward ops from last to first and emits what autograd would launch."""

    def __init__(self, b: Builder) -> None:
        self.b = b
        self.tensors: dict[str, Tensor] = {}
        self.ops: list[Op] = []
        self.grads: dict[str, str] = {}
        for name, layers in b.saved.items():
            held = b.tensors[name]
            axes = {"layer": layers, **held.axes} if layers != 1 else held.axes
            self.tensors[name] = replace(held, role="saved", axes=axes)

    def run(self) -> list[Op]:
        """All backward ops, in order."""
        for op, note in zip(reversed(self.b.ops), reversed(self.b.notes), strict=True):
            out = op.writes[0].tensor
            if out not in self.grads and op.name != "loss.nll":
                for use in op.writes[1:]:
                    if use.tensor in self.grads:
                        out = use.tensor
            if out not in self.grads:
                if op.name != "loss.nll":
                    continue
                self.grads[out] = self._new(out)
            self._of(op, note, self.grads[out])
        self._tied()
        return self.ops

    def _of(self, op: Op, note: Note, grad: str) -> None:
        weights = [u for u in op.reads if self.b.tensors[u.tensor].role == "weight"]
        inputs = [u for u in op.reads if self.b.tensors[u.tensor].role == "activation"
                  and u.tensor not in self.b.shared]  # fmt: skip
        if op.kind in ("all_reduce", "all_gather"):
            self._emit(op, "backward", [Use(grad)], [Use(grad)], kind=op.kind, shape=op.shape)
        elif op.kind == "matmul":
            self._product(op, note, grad, inputs, weights)
        elif note.passes:
            for use in inputs:
                self._send(op, use, grad)
        elif op.kind == "gather" and weights:
            for use in weights:
                self._emit(op, use.tensor, [Use(grad)], [self._weight(use.tensor)], kind="gather")
        else:
            self._pointwise(op, note, grad, inputs, weights)

    def _product(
        self, op: Op, note: Note, grad: str, inputs: list[Use], weights: list[Use]
    ) -> None:
        """Two products of the size of the forward one, and the sum for a bias."""
        outs = [Use(self.grads.get(u.tensor, grad)) for u in op.writes]
        for use in weights:
            rate = op.per_element.get(use.tensor)
            if rate is None:
                self._emit(op, "bias", outs, [self._weight(use.tensor)], kind="reduce",
                           flops=self._size(outs))  # fmt: skip
                continue
            flops = rate * self.b.tensors[use.tensor].elements(use.at)
            self._emit(op, "weight", [*outs, inputs[0]], [self._weight(use.tensor, use.at)],
                       flops=flops, shape=_turned(op.shape, "weight"))  # fmt: skip
            for source in inputs:
                made = self._new(source.tensor)
                self._emit(op, "input", [*outs, use], [Use(made)], per_element={use.tensor: rate},
                           shape=_turned(op.shape, "input"))  # fmt: skip
                self._send(op, source, made)
        if weights:
            return
        shape = dict(op.shape)
        if "causal" in shape:
            shape["causal"] = shape["causal"] * RECOMPUTE
        for i, source in enumerate(inputs):
            made = self._new(source.tensor)
            other = inputs[1 - i] if len(inputs) == 2 else source
            self._emit(op, f"input{i}", [*outs, other], [Use(made)], flops=op.flops, shape=shape)
            self._send(op, source, made)

    def _pointwise(
        self, op: Op, note: Note, grad: str, inputs: list[Use], weights: list[Use]
    ) -> None:
        """One kernel for each differentiable input; one kernel and a sum for a weight."""
        saved = [Use(n) for n in note.saves]
        whole = op.kind == "norm"  # a layer norm's backward is one kernel for all of them
        for use in () if whole else weights:
            made = self._new(op.writes[0].tensor)
            self._emit(op, "weight", [Use(grad), *saved], [Use(made)], kind="pointwise")
            self._emit(op, "weight.sum", [Use(made)], [self._weight(use.tensor)], kind="reduce")
        for use in inputs:
            made = self._new(use.tensor, use.at)
            others = [u for u in op.reads if u.tensor != use.tensor] if len(op.reads) > 1 else []
            reads = [Use(grad), *(saved if len(inputs) == 1 or whole else others)]
            if weights and not whole:
                reads = [Use(grad), *(Use(w.tensor, w.at) for w in weights)]
            writes = [Use(made), *(self._weight(w.tensor) for w in weights)] if whole else [
                Use(made)]  # fmt: skip
            last = op.name.rsplit(".", 1)[-1]
            self._emit(op, f"{last}_backward", reads, writes)
            for extra in range(note.extra):
                self._emit(op, f"extra{extra}", [Use(made)], [Use(made)])
            self._send(op, use, made)

    # -- gradients ---------------------------------------------------------------------------

    def _send(self, op: Op, use: Use, grad: str) -> None:
        """Let a gradient reach a tensor: the first is taken, later ones are added."""
        if any(axis != "layer" for axis in use.at):
            whole = self._new(use.tensor)
            self._emit(op, "slice", [Use(grad)], [Use(whole)], kind="copy")
            grad = whole
        known = self.grads.get(use.tensor)
        if known is None:
            self.grads[use.tensor] = grad
            return
        made = self._new(use.tensor)
        self._emit(op, "accumulate", [Use(known), Use(grad)], [Use(made)], kind="pointwise")
        self.grads[use.tensor] = made

    def _new(self, of: str, at: Mapping[str, Number] | None = None) -> str:
        held = self.b.tensors[of]
        name = f"{of}.gradient"
        count = 1
        while name in self.tensors:
            count += 1
            name = f"{of}.gradient{count}"
        axes = {a: (at or {}).get(a, n) for a, n in held.axes.items()}
        self.tensors[name] = Tensor(name, "activation", axes, held.codec)
        return name

    def _weight(self, name: str, at: Mapping[str, Number] | None = None) -> Use:
        held = self.b.tensors[name]
        made = f"{name}.gradient"
        self.tensors.setdefault(made, replace(held, name=made, role="gradient"))
        return Use(made, at or {})

    def _tied(self) -> None:
        """A weight used twice in a step (tied embeddings) adds up its two gradients."""
        seen: dict[str, Op] = {}
        for op in list(self.ops):
            for use in op.writes:
                held = self.tensors.get(use.tensor)
                if held is None or held.role != "gradient" or "layer" in held.axes:
                    continue
                if use.tensor in seen:
                    both = [use, use]
                    self._emit(op, "accumulate", both, [use], kind="pointwise")
                seen[use.tensor] = op

    def _size(self, uses: Iterable[Use]) -> Number:
        held = {**self.b.tensors, **self.tensors}
        return sum((held[u.tensor].elements(u.at) for u in uses), start=0.0)

    def _emit(
        self, op: Op, what: str, reads: list[Use], writes: list[Use], kind: str = "",
        flops: Number | None = None, per_element: Mapping[str, Number] | None = None,
        shape: Mapping[str, Number] | None = None,
    ) -> None:  # fmt: skip
        kind = kind or op.kind
        count = 0.0 if kind in ("copy", "gather", "matmul") else self._size(writes[:1])
        if kind == "reduce":
            count = self._size(reads[:1])
        self.ops.append(Op(
            f"backward.{op.name}.{what}", kind, tuple(reads), tuple(writes),
            count if flops is None else flops, per_element or {},
            op.precision if kind == "matmul" else "fp32", op.repeat, shape or {},
            f"{op.group}backward",
        ))  # fmt: skip


def _turned(shape: Mapping[str, Number], what: str) -> dict[str, Number]:
    """Sizes of the product for a weight's or an input's gradient."""
    m, n, k = shape["m"], shape["n"], shape["k"]
    turned = {"m": n, "n": k, "k": m} if what == "weight" else {"m": m, "n": k, "k": n}
    return {**shape, **turned}


def _states(weights: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Moments, and master copies of 16-bit weights."""
    wide = dtype in SIXTEEN and dtype not in ("bf16", "fp16")
    kept = STATES[:2] if wide else STATES
    made = [
        replace(w, name=f"{w.name}.{s}", role="state", codec=Codec.of("fp32"))
        for w in weights.values() for s in kept
    ]  # fmt: skip
    return {t.name: t for t in made}


def _adamw(weight: Tensor, tensors: Mapping[str, Tensor]) -> Op:
    """One fused kernel for each weight of each layer."""
    own = [Use(f"{weight.name}.{s}") for s in STATES if f"{weight.name}.{s}" in tensors]
    uses = (Use(weight.name), *own)
    layers = weight.axes.get("layer", 1)
    return Op(
        f"optimizer.{weight.name}", "optimizer", (*uses, Use(f"{weight.name}.gradient")), uses,
        flops=ADAMW_FLOPS * weight.elements({"layer": 1}), repeat=layers,
    )  # fmt: skip


def _in_layer(op: Op, layered: set[str]) -> Op:
    """The op with every use of a tensor of many layers held to one of them."""

    def one(use: Use) -> Use:
        return replace(use, at={"layer": 1, **use.at}) if use.tensor in layered else use

    return replace(op, reads=tuple(map(one, op.reads)), writes=tuple(map(one, op.writes)))
