"""Records what torch would launch while a module runs on meta tensors (needs torch)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

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


def key_of(tensor: torch.Tensor) -> int:
    """What tells one storage from another: views share it."""
    return tensor.untyped_storage()._cdata


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors of a nested value."""
    return [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]


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
        key = key_of(tensor)
        found = self.held.get(key)
        if found is not None:
            return found
        storage = tensor.untyped_storage()
        whole = storage.nbytes() // max(tensor.element_size(), 1)
        base = tensor
        if aten.touched(tensor) != whole and tensor._base is not None:
            base = tensor._base
        shape, stride = tuple(map(int, base.shape)), tuple(map(int, base.stride()))
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
        key = key_of(value)
        known = self._moved.get(id(value))
        if known is not None:
            return known
        made = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device="meta",
            requires_grad=value.requires_grad and value.is_leaf,
        )  # fmt: skip
        role = "weight" if isinstance(value, torch.nn.Parameter) else "input"
        entry = self.held.get(key) or self.know(value, f"constant{len(self._moved)}", role)
        self.held[key_of(made)] = entry
        self._alive += [value, made]
        self._moved[id(value)] = made
        return made

    def use(self, tensor: torch.Tensor) -> tuple[Use, int]:
        """What a call touches through a view, and how many elements that is."""
        role = "weight" if isinstance(tensor, torch.nn.Parameter) else "input"
        held = self.know(tensor, f"constant{len(self.held)}", role)
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
            first = int(view.storage_offset()) % row
            inner = [(int(n), int(s)) for n, s in zip(view.shape, view.stride(), strict=True)
                     if 0 < s < row]  # fmt: skip
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
        group = "backward" if self.stage == "backward" else ""
        self.ops.append(
            Op(self.label(name), kind, tuple(reads), tuple(writes), group=group, **given)
        )

    def label(self, name: str) -> str:
        """A name with the stage and the module that runs, or that ran in the forward pass."""
        node = torch._C._current_autograd_node()
        if node is not None:
            place = self.places.get(node._sequence_nr(), "")
        else:
            place = self.path[-1] if self.path else ""
            self.places[torch.autograd._get_sequence_nr() - 1] = place  # pyright: ignore
        return ".".join(filter(None, (self.stage, place, name)))

    def call(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Record a call of an aten operator, unless it is a view or launches nothing."""
        base = func._schema.name.split("::")[-1]
        ins = tensors_in((args, kwargs))
        changed = [t for t in self._changed(func, args, kwargs) if t.numel()]
        known = {key_of(t) for t in ins}
        fresh = [t for t in tensors_in(out) if key_of(t) not in known and t.numel()]
        if base in aten.FREE or not (fresh or changed):
            return
        same = {id(t) for t in changed}
        unread = same if base in aten.OVERWRITE else set[int]()
        read = [t for t in ins if id(t) not in unread and t.numel()]
        for tensor in (*fresh, *changed):
            self.know(tensor, self.label(base.strip("_")), "activation")
        reads = [self.use(t) for t in read]
        writes = [self.use(t) for t in (*fresh, *changed)]
        if base in aten.PARTIAL and reads:
            reads[0] = self._portion(read[0], sum(n for _, n in writes))
        if base in aten.SCATTER and changed:
            given = [n for (_, n), t in zip(reads, read, strict=True)
                     if id(t) not in same and t.dtype == changed[0].dtype]  # fmt: skip
            count = max(given, default=changed[0].numel())
            writes = [self._portion(t, min(count, t.numel())) for t in changed]
            reads = [self._portion(t, min(count, n)) if id(t) in same else (u, n)
                     for t, (u, n) in zip(read, reads, strict=True)]  # fmt: skip
        self._kernel(func, base, args, kwargs, out, read, reads, writes)

    def _kernel(
        self, func: Any, base: str, args: Any, kwargs: Any, out: Any, read: list[torch.Tensor],
        reads: list[tuple[Use, int]], writes: list[tuple[Use, int]],
    ) -> None:  # fmt: skip
        """Count one kernel's work and record it."""
        kind = aten.kind_of(base)
        count, total = sum(n for _, n in reads), sum(n for _, n in writes)
        flops = aten.flops(func._overloadpacket, kind, args, kwargs, out, count, total)
        rate: dict[str, float] = {}
        if flops and kind in ("matmul", "conv"):
            for (use, size), tensor in zip(reads, read, strict=True):
                if tensor.dim() > 1 and self.held[key_of(tensor)].role == "weight":
                    rate, flops = {use.tensor: flops / size}, 0.0
                    break
        dtype = read[-1].dtype if read else torch.float32
        self.add(
            base, kind, [u for u, _ in reads], [u for u, _ in writes], flops=flops,
            per_element=rate, precision=aten.precision(kind, dtype),
            shape=aten.product_shape(kind, args, out),
        )  # fmt: skip

    def _portion(self, tensor: torch.Tensor, count: int) -> tuple[Use, int]:
        """A use of so many elements of a tensor, along its first axis."""
        held = self.know(tensor, f"constant{len(self.held)}", "input")
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
            found += tensors_in(value)
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
