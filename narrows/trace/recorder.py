"""Records what torch would launch while a module runs on meta tensors (needs torch)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from narrows.core.tensor import Tensor
from narrows.core.workload import Op, Use
from narrows.trace import aten


@dataclass(slots=True)
class Held:
    """One storage: what is known of the tensor that lives in it."""

    name: str
    role: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]
    storage: Any
    """Kept alive, so that no later tensor gets the same address."""

    @property
    def numel(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total


def axes_of(name: str, role: str, shape: Sequence[int]) -> tuple[str, ...]:
    """The field's words for the axes of a tensor, where its place tells them."""
    if role in ("weight", "gradient", "state"):
        words = {1: ("channel",), 2: ("out", "in"), 4: ("out", "in", "height", "width")}
        if len(shape) in words:
            return words[len(shape)]
    return tuple(f"d{i}" for i in range(len(shape)))


@dataclass
class Recorder:
    """Ops in the order they would be launched, over the storages they touch.

    saved: keys of storages that autograd keeps for the backward pass. path: modules that are
    running, innermost last. stage: put before the names of ops. parameters: the trainable
    weights as the run sees them. places: modules by autograd's number of the forward call.
    """

    held: dict[int, Held] = field(default_factory=dict[int, Held])
    ops: list[Op] = field(default_factory=list[Op])
    saved: dict[int, None] = field(default_factory=dict[int, None])
    path: list[str] = field(default_factory=list[str])
    stage: str = ""
    parameters: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    places: dict[int, str] = field(default_factory=dict[int, str])
    _names: dict[str, int] = field(default_factory=dict[str, int])
    _moved: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])
    _alive: list[Any] = field(default_factory=list[Any])

    # -- tensors -----------------------------------------------------------------------------

    def know(self, tensor: torch.Tensor, name: str, role: str, axes: tuple[str, ...] = ()) -> Held:
        """Register the storage of a tensor under a name, unless it is known."""
        key = tensor.untyped_storage()._cdata
        found = self.held.get(key)
        if found is not None:
            return found
        storage = tensor.untyped_storage()
        whole = storage.nbytes() // max(tensor.element_size(), 1)
        base = tensor
        if aten.touched(tensor) != whole and tensor._base is not None:
            base = tensor._base
        shape, stride = tuple(base.shape), tuple(base.stride())
        if aten.touched(base) != whole or 0 in stride:
            shape, stride = (whole,), (1,)
        words = axes if len(axes) == len(shape) else axes_of(name, role, shape)
        made = Held(self._unique(name), role, shape, words, tensor.dtype, stride, storage)
        self.held[key] = made
        return made

    def _unique(self, name: str) -> str:
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return f"{name}#{count}" if count else name

    def meta(self, value: Any) -> Any:
        """A tensor of the same shape on the meta device; anything else as it is."""
        if not isinstance(value, torch.Tensor) or value.device.type == "meta":
            return value
        key = value.untyped_storage()._cdata
        known = self._moved.get(id(value))
        if known is not None:
            return known
        made = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device="meta",
            requires_grad=value.requires_grad and value.is_leaf,
        )  # fmt: skip
        role = "weight" if isinstance(value, torch.nn.Parameter) else "input"
        entry = self.held.get(key) or self.know(value, f"constant{len(self._moved)}", role)
        self.held[made.untyped_storage()._cdata] = entry
        self._alive += [value, made]
        self._moved[id(value)] = made
        return made

    def use(self, tensor: torch.Tensor) -> tuple[Use, int]:
        """What a call touches through a view, and how many elements that is."""
        held = self.know(tensor, f"input{len(self.held)}",
                         "weight" if isinstance(tensor, torch.nn.Parameter) else "input")  # fmt: skip
        count = aten.touched(tensor)
        return self._piece(held, tensor, count), count

    @staticmethod
    def _piece(held: Held, view: torch.Tensor, count: int) -> Use:
        """The part of a storage that a view reaches: how much of which axes, and where."""
        whole = held.numel
        if count >= whole:
            return Use(held.name)
        row, part = 1, None
        for size in reversed(held.shape):
            row *= size
            first = view.storage_offset() % row
            inner = [(n, s) for n, s in zip(view.shape, view.stride(), strict=True) if 0 < s < row]
            last = first + sum((n - 1) * s for n, s in inner)
            reached = 1
            for n, _ in inner:
                reached *= n
            if last >= row:
                break
            if reached < row:
                part = (first, last, row)
                break
        if view.dim() == len(held.shape) and tuple(view.stride()) == held.stride:
            sizes = zip(held.axes, held.shape, view.shape, strict=True)
            at = {axis: float(n) for axis, full, n in sizes if n < full}
        else:
            axis = max(range(len(held.shape)), key=lambda i: held.shape[i])
            at = {held.axes[axis]: held.shape[axis] * count / whole}
        return Use(held.name, at, part)

    # -- ops ---------------------------------------------------------------------------------

    def add(
        self, name: str, kind: str, reads: Iterable[Use], writes: Iterable[Use], **given: Any
    ) -> None:
        """Record one kernel under the module that runs it."""
        self.ops.append(Op(self.label(name), kind, tuple(reads), tuple(writes), **given))

    def label(self, name: str) -> str:
        """A name with the stage and the module that runs, or that ran in the forward pass."""
        node = torch._C._current_autograd_node()
        if node is not None:
            place = self.places.get(node._sequence_nr(), "")
        else:
            place = self.path[-1] if self.path else ""
            self.places[torch.autograd._get_sequence_nr() - 1] = place
        return ".".join(filter(None, (self.stage, place, name)))

    def call(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Record a call of an aten operator, unless it is a view or launches nothing."""
        base = func._schema.name.split("::")[-1]
        outs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if base in aten.FREE or not outs and not func._schema.is_mutable:
            return
        ins = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        changed = self._changed(func, args, kwargs)
        keys = {t.untyped_storage()._cdata for t in ins}
        fresh = [t for t in outs if t.untyped_storage()._cdata not in keys]
        if not fresh and not changed:
            return
        overwritten = {id(t) for t in changed} if base in aten.OVERWRITE else set[int]()
        read = [t for t in ins if id(t) not in overwritten and t.numel()]
        written = [t for t in (*fresh, *changed) if t.numel()]
        if not written:
            return
        kind = aten.kind_of(base)
        reads = [self.use(t) for t in read]
        writes: list[tuple[Use, int]] = []
        for tensor in written:
            self.know(tensor, self.label(base.strip("_")), "activation")
            writes.append(self.use(tensor))
        total = sum(n for _, n in writes)
        if base in aten.PARTIAL and reads:
            reads[0] = self._portion(read[0], total)
        if base in aten.SCATTER and changed and len(read) > 0:
            values = max((n for (_, n), t in zip(reads, read, strict=True)
                          if t.is_floating_point() and id(t) not in overwritten), default=total)  # fmt: skip
            writes = [self._portion(t, min(values, n)) for t, (_, n) in
                      zip(written, writes, strict=True)]  # fmt: skip
            reads = [(u, n) if id(t) not in {id(c) for c in changed}
                     else self._portion(t, min(values, n))
                     for t, (u, n) in zip(read, reads, strict=True)]  # fmt: skip
        count = sum(n for _, n in reads)
        flops = aten.flops(func._overloadpacket, kind, args, kwargs, out, count, total)
        rate: dict[str, float] = {}
        weight = next((u for (u, n), t in zip(reads, read, strict=True)
                       if kind in ("matmul", "conv") and t.dim() > 1 and n
                       and self.held[t.untyped_storage()._cdata].role == "weight"), None)  # fmt: skip
        if weight is not None and flops:
            size = next(n for u, n in reads if u is weight)
            rate, flops = {weight.tensor: flops / size}, 0.0
        self.add(
            base, kind, [u for u, _ in reads], [u for u, _ in writes], flops=flops,
            per_element=rate, precision=aten.precision(kind, (read or written)[-1].dtype),
            shape=aten.product_shape(kind, args, out),
        )  # fmt: skip

    def _portion(self, tensor: torch.Tensor, count: int) -> tuple[Use, int]:
        """A use of so many elements of a tensor, along its first axis."""
        held = self.know(tensor, f"input{len(self.held)}", "input")
        if count >= held.numel:
            return Use(held.name), held.numel
        return Use(held.name, {held.axes[0]: held.shape[0] * count / held.numel}), count

    @staticmethod
    def _changed(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
        """Tensors that a call changes in place, by its schema."""
        found: list[torch.Tensor] = []
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All tensors seen, as narrows describes them."""
        made: dict[str, Tensor] = {}
        for key, held in self.held.items():
            role = held.role
            if role == "activation" and key in self.saved:
                role = "saved"
            axes = dict(zip(held.axes, map(float, held.shape), strict=True))
            made[held.name] = Tensor(held.name, role, axes or {"d0": 1.0}, aten.codec(held.dtype))
        return made


class Dispatch(TorchDispatchMode):
    """Runs every operator on meta tensors and records it."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        real = [t for t in leaves if t.device.type != "meta"]
        if real and len(real) < len(leaves):
            args, kwargs = tree_map(self.recorder.meta, (args, kwargs))
        known = self._values(func, leaves, args, kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and known is not None:
            return known
        out = func(*args, **kwargs)
        if isinstance(known, torch.Tensor) and isinstance(out, torch.Tensor):
            out.narrows_value = known
        self.recorder.call(func, args, kwargs, out)
        return out

    def _values(self, func: Any, leaves: list[Any], args: Any, kwargs: Any) -> Any:
        """What the call gives for real, where it is small and follows from constants alone.

        Code asks for values of positions and masks that it made itself; those of inputs and
        weights are never known.
        """
        if func in MADE:
            device = kwargs.get("device")
            size = args[0] if args and isinstance(args[0], list | tuple) else args[:2]
            if device is None or torch.device(device).type != "meta" or any(
                not isinstance(n, int | float) or n > SMALL for n in size):  # fmt: skip
                return None
            return func(*args, **{**kwargs, "device": "cpu"})
        values = [getattr(t, "narrows_value", None) for t in leaves]
        if not leaves or any(v is None for v in values) or max(t.numel() for t in leaves) > SMALL:
            return None
        swap = {id(t): v for t, v in zip(leaves, values, strict=True)}
        args, kwargs = tree_map(lambda x: swap.get(id(x), x), (args, dict(kwargs)))
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


SMALL = 1 << 16
"""Elements up to which constants are followed by value."""

MADE = frozenset({
    torch.ops.aten.arange.default, torch.ops.aten.arange.start, torch.ops.aten.arange.start_step,
    torch.ops.aten.ones.default, torch.ops.aten.zeros.default, torch.ops.aten.full.default,
    torch.ops.aten.scalar_tensor.default,
})  # fmt: skip
"""Calls that make constants."""


class _Attention(torch.autograd.Function):
    """Scaled dot-product attention as the one fused kernel that runs on real devices."""

    @staticmethod
    def forward(ctx: Any, recorder: Recorder, causal: bool, mask: Any, q: Any, k: Any, v: Any):  # noqa: ANN205
        out = torch.empty_like(q) if v.shape[-1] == q.shape[-1] else q.new_empty(
            (*q.shape[:-1], v.shape[-1]))  # fmt: skip
        stats = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.recorder, ctx.causal = recorder, causal
        ctx.save_for_backward(q, k, v, out, stats, *([] if mask is None else [mask]))
        keep = any(t.requires_grad for t in (q, k, v)) and torch.is_grad_enabled()
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
    caches = [recorder.held[t.untyped_storage()._cdata].role == "kv" for t in (k, v)]
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


def follow(recorder: Recorder, module: torch.nn.Module) -> Callable[[], None]:
    """Keep `recorder.path` at the module that runs; returns what undoes it."""
    hooks: list[Any] = []
    for name, child in module.named_modules():

        def enter(_module: Any, _args: Any, name: str = name) -> None:
            recorder.path.append(name)

        def leave(_module: Any, _args: Any, _out: Any) -> None:
            recorder.path.pop()

        hooks.append(child.register_forward_pre_hook(enter))
        hooks.append(child.register_forward_hook(leave, always_call=True))

    def undo() -> None:
        for hook in hooks:
            hook.remove()

    return undo
