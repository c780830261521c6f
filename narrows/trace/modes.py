"""What stands between torch and the kernels while a trace runs (needs torch)."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from narrows.trace import aten
from narrows.trace.recorder import Recorder, key_of, tensors_in

VALUE = "narrows_value"
"""Attribute of a meta tensor that holds what it is for real."""

SMALL = 1 << 16
"""Elements up to which constants are followed by value."""

MADE = frozenset({
    torch.ops.aten.arange.default, torch.ops.aten.arange.start, torch.ops.aten.arange.start_step,
    torch.ops.aten.ones.default, torch.ops.aten.zeros.default, torch.ops.aten.full.default,
    torch.ops.aten.scalar_tensor.default,
})  # fmt: skip
"""Calls that make constants."""


class Dispatch(TorchDispatchMode):
    """Runs every operator on meta tensors and records it.

    Code asks for the values of positions and masks that it made itself, so small constants, and
    what follows from them alone, are computed for real beside; values of inputs and weights are
    never known.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.unknown: set[int] = set()
        """Storages that were changed by something of unknown value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tensors_in((args, kwargs))
        real = [t for t in leaves if t.device.type != "meta"]
        known = self._constant(func, args, kwargs) if func in MADE else self._value(
            func, leaves, args, kwargs)  # fmt: skip
        if func is torch.ops.aten._local_scalar_dense.default and known is not None:
            return known
        if real and len(real) < len(leaves):
            args, kwargs = tree_map(self.recorder.meta, (args, kwargs))
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            if isinstance(known, torch.Tensor):
                setattr(out, VALUE, known)
            elif func._schema.is_mutable:
                self.unknown.add(key_of(out))
        self.recorder.call(func, args, kwargs, out)
        return out

    def _constant(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A small constant for real, where the call makes one on the meta device."""
        device = kwargs.get("device")
        sizes = args[0] if args and isinstance(args[0], list | tuple) else args[:2]
        small = all(isinstance(n, int | float) and n <= SMALL for n in sizes)
        if device is None or torch.device(device).type != "meta" or not small:
            return None
        return func(*args, **{**kwargs, "device": "cpu"})

    def _value(self, func: Any, leaves: list[torch.Tensor], args: Any, kwargs: Any) -> Any:
        """What a call gives for real, None where some value is not known or it is large."""
        swap: dict[int, torch.Tensor] = {}
        for leaf in leaves:
            value = getattr(leaf, VALUE, None)
            if leaf.device.type != "meta" and not isinstance(leaf, torch.nn.Parameter):
                value = leaf
            if value is None or leaf.numel() > SMALL or key_of(leaf) in self.unknown:
                return None
            swap[id(leaf)] = value
        if not swap or all(swap[id(t)] is t for t in leaves):
            return None
        args, kwargs = tree_map(lambda x: swap.get(id(x), x), (args, dict(kwargs)))
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class _Attention(torch.autograd.Function):
    """Scaled dot-product attention as the one fused kernel that runs on real devices."""

    @staticmethod
    def forward(
        ctx: Any, recorder: Recorder, causal: bool, mask: Any, q: Any, k: Any, v: Any
    ) -> torch.Tensor:
        # Real kernels lay their output out as the queries are.
        same = v.shape[-1] == q.shape[-1]
        out = torch.empty_like(q) if same else q.new_empty((*q.shape[:-1], v.shape[-1]))
        stats = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.recorder, ctx.causal = recorder, causal
        ctx.save_for_backward(q, k, v, out, stats, *([] if mask is None else [mask]))
        keep = any(ctx.needs_input_grad)
        reads = [q, k, v] if mask is None else [q, k, v, mask]
        _attention(recorder, "attention", causal, q, k, v, reads, [out, stats] if keep else [out])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, stats, *mask = ctx.saved_tensors
        made = [torch.empty_like(t) for t in (q, k, v)]
        reads = [grads[0], q, k, v, out, stats, *mask]
        # Five products for the two of the forward pass: scores are made again (Dao 2023, B.2).
        _attention(ctx.recorder, "attention_backward", ctx.causal, q, k, v, reads, made, 2.5)
        return (None, None, None, *made)


def visible(queries: int, keys: int, causal: bool) -> float:
    """Scores that a mask leaves to a square of queries and keys, aligned at the upper left."""
    if not causal:
        return float(queries * keys)
    full = min(queries, keys)
    return full * (full + 1) / 2 + (queries - full) * keys


def _attention(
    recorder: Recorder, name: str, causal: bool, q: Any, k: Any, v: Any, reads: list[Any],
    writes: list[Any], times: float = 1.0,
) -> None:  # fmt: skip
    batch, heads, queries, dim = (*([1] * (4 - q.dim())), *q.shape)[-4:]
    kv_heads, keys = (k.shape[-3] if k.dim() > 2 else 1), k.shape[-2]
    seen = batch * heads * visible(queries, keys, causal)
    kind = "attention_prefill" if queries > 1 else "attention_decode"
    for i, tensor in enumerate(writes):
        recorder.know(tensor, recorder.label(f"{name}.stats" if i else name), "activation")
    uses = [recorder.use(t)[0] for t in reads]
    extra = (aten.SOFTMAX + 1 + causal) * seen
    products = 2.0 * seen * (dim + v.shape[-1])
    rate: dict[str, float] = {}
    caches = [recorder.held[key_of(t)].role == "kv" for t in (k, v)]
    if queries == 1 and all(caches) and times == 1:
        share = 2.0 * heads / kv_heads
        rate = {recorder.use(t)[0].tensor: share for t in (k, v)}
        products = 0.0
    shape = {
        "m": queries, "n": keys, "k": dim, "batch": batch * heads, "q": queries, "kv": keys,
        "heads": heads, "kv_heads": kv_heads, "channel": dim,
    }  # fmt: skip
    recorder.add(
        name, kind, uses, [recorder.use(t)[0] for t in writes], flops=times * (products + extra),
        per_element=rate, precision=aten.precision("matmul", q.dtype), shape=shape,
    )  # fmt: skip


class Functions(TorchFunctionMode):
    """Keeps attention whole: on the meta device torch would take it apart."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        tensors = [self.recorder.meta(given[n]) for n in names[:3]]
        mask = self.recorder.meta(given.get("attn_mask"))
        return _Attention.apply(self.recorder, bool(given.get("is_causal")), mask, *tensors)
