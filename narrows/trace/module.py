"""Any torch module or callable as a workload, traced on meta tensors (needs torch).

Nothing is computed and no weight is allocated: every operator only works out shapes. Each kernel
that an eager run would launch becomes one op; views are none. Attention through
`scaled_dot_product_attention` is one op, as on real devices; attention written out is marked, so
that the plan's `flash` fusion merges it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_map

from narrows.core.errors import NarrowsError
from narrows.core.tensor import Codec, Tensor
from narrows.core.workload import Op, Phase, Use, Workload
from narrows.trace.fold import fold
from narrows.trace.modes import Dispatch, Functions
from narrows.trace.patterns import mark_attention
from narrows.trace.recorder import Recorder, follow, key_of, tensors_in

ADAMW_FLOPS = 12.0
"""Operations of AdamW for one parameter: two moments, two corrections, root, decay, step."""


def trace(
    target: torch.nn.Module | Callable[..., Any],
    inputs: Any = (),
    *,
    training: bool = False,
    name: str = "",
    folded: bool = True,
    facts: Mapping[str, Any] | None = None,
) -> Workload:
    """The workload of one call of a module or callable.

    inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword
    arguments; their values are never looked at. training: forward, backward (from the output's
    `loss`, or its first floating-point tensor) and AdamW, in one phase `training step`, with
    tensors kept for the backward pass in role `saved`; otherwise one phase `forward`.
    folded: repeated layers become one block that runs so many times.
    Raises NarrowsError where the code looks at the values of tensors, or fails on these inputs.
    """
    recorder = Recorder()
    module = target if isinstance(target, torch.nn.Module) else None
    with ExitStack() as stack:
        call = prepare(recorder, target, training, stack)
        args, kwargs = _arguments(recorder, inputs)
        run(recorder, call, args, kwargs, training)
    tensors, ops = _finish(recorder) if training else (recorder.tensors(), recorder.ops)
    phase = Phase("training step" if training else "forward", tuple(ops))
    windows = causal_modules(module) if module is not None and not training else {}
    return workload_of(
        name or type(target).__name__, tensors, (phase,), facts or {}, folded, windows
    )


def workload_of(
    name: str, tensors: Mapping[str, Tensor], phases: tuple[Phase, ...], facts: Mapping[str, Any],
    folded: bool, windows: Mapping[str, int],
) -> Workload:  # fmt: skip
    """A workload from recorded phases: attention marked, unused tensors left out, folded."""
    used = {u.tensor for p in phases for op in p.ops for u in (*op.reads, *op.writes)}
    kept = {n: t for n, t in tensors.items() if n in used or t.role in ("weight", "state", "kv")}
    weights = [t for t in kept.values() if t.role == "weight"]
    known = {
        "model": name, "parameters": int(sum(float(t.elements()) for t in weights)), "devices": 1,
        "dtype": max(weights, key=lambda t: float(t.bytes())).codec.name if weights else "",
    }  # fmt: skip
    made = Workload(name, kept, phases, {**known, **facts})
    made = mark_attention(made, windows)
    return fold(made) if folded else made


def prepare(
    recorder: Recorder, target: Any, training: bool, stack: ExitStack
) -> Callable[..., Any]:
    """What to call: the module over meta copies of its weights, which the recorder knows."""
    if not isinstance(target, torch.nn.Module):
        if not callable(target):
            raise NarrowsError(f"a module or a callable can be traced, not {type(target).__name__}")
        return target
    was = target.training
    target.train(training)
    stack.callback(target.train, was)
    stack.callback(follow(recorder, target))
    weights = dict(target.named_parameters())
    buffers = dict(target.named_buffers())
    copies: dict[str, torch.Tensor] = {}
    for kind, tensors in (("weight", weights), ("state", buffers)):
        for key, tensor in tensors.items():
            copy = tensor
            if tensor.device.type != "meta":
                copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype,
                                           device="meta")  # fmt: skip
                if kind == "weight":
                    copy = torch.nn.Parameter(copy, tensor.requires_grad)
                copies[key] = copy
            recorder.know(copy, key, kind)
    recorder.parameters = {k: copies.get(k, w) for k, w in weights.items()}
    if not copies:
        return target
    return lambda *a, **k: torch.func.functional_call(target, copies, a, k)


def _arguments(recorder: Recorder, inputs: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Positional and keyword arguments, their tensors on the meta device and named."""
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    args: Any = () if isinstance(inputs, Mapping) else tuple(inputs)
    kwargs: Any = dict(inputs) if isinstance(inputs, Mapping) else {}

    def place(label: str, value: Any) -> Any:
        def one(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            made = leaf if leaf.device.type == "meta" else torch.empty_strided(
                leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")  # fmt: skip
            recorder.know(made, label, "input")
            return made

        return tree_map(one, value)

    return (
        tuple(place(f"input{i}", a) for i, a in enumerate(args)),
        {k: place(k, v) for k, v in kwargs.items()},
    )


def run(
    recorder: Recorder, call: Callable[..., Any], args: Any, kwargs: Any, training: bool
) -> Any:
    """The call itself, and its backward pass."""

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        recorder.saved[key_of(tensor)] = None
        return tensor

    try:
        with Functions(recorder), Dispatch(recorder):
            if not training:
                with torch.no_grad():
                    out = call(*args, **kwargs)
            else:
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                    out = call(*args, **kwargs)
                recorder.stage = "backward"
                _backward(out)
    except NarrowsError:
        raise
    except (NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        place = recorder.path[-1] if recorder.path and recorder.path[-1] else "the call"
        first = (str(error).strip().splitlines() or [""])[0][:200]
        raise NarrowsError(
            f"tracing on meta tensors failed in {place!r} ({type(error).__name__}: {first}); "
            "check the inputs, and that the code does not look at the values of tensors"
        ) from error
    for leaf in tensors_in(out):
        held = recorder.held.get(key_of(leaf))
        if held is not None and held.role == "activation" and key_of(leaf) not in recorder.saved:
            held.role = "output"
    return out


def _backward(out: Any) -> None:
    loss = getattr(out, "loss", None)
    if loss is None and isinstance(out, Mapping):
        loss = out.get("loss")
    if loss is None:
        loss = next((t for t in tensors_in(out) if t.requires_grad), None)
    if loss is None:
        raise NarrowsError("training: no output depends on a trainable weight")
    loss.backward(None if loss.dim() == 0 else torch.empty_like(loss))


def causal_modules(module: torch.nn.Module, windows: Sequence[int] = ()) -> dict[str, int]:
    """Modules that say their attention is causal, by path, with their sliding window or 0.

    windows: by number of the layer, where they are known better than from the modules.
    """
    found: dict[str, int] = {}
    for path, child in module.named_modules():
        if getattr(child, "is_causal", False) is not True:
            continue
        index = getattr(child, "layer_idx", None)
        if isinstance(index, int) and index < len(windows):
            found[path] = windows[index]
        else:
            found[path] = int(getattr(child, "sliding_window", 0) or 0)
    return found


def _finish(recorder: Recorder) -> tuple[dict[str, Tensor], list[Op]]:
    """Tensors and ops of a training step: gradients named, one AdamW op for each weight."""
    states: dict[str, Tensor] = {}
    renamed: dict[str, str] = {}
    steps: list[Op] = []
    for name, weight in recorder.parameters.items():
        if weight.grad is None:
            continue
        held = recorder.held[key_of(weight)]
        gradient = recorder.know(weight.grad, f"{name}.grad", "gradient")
        renamed[gradient.name] = gradient.name = f"{name}.grad"
        gradient.role, gradient.axes = "gradient", held.axes if (
            gradient.shape == held.shape) else gradient.axes  # fmt: skip
        weight.grad = None
        axes = dict(zip(held.axes, map(float, held.shape), strict=True))
        wanted = ["exp_avg", "exp_avg_sq"] + (["master"] if held.dtype.itemsize < 4 else [])
        made = [Tensor(f"{name}.{s}", "state", axes, Codec.of("fp32")) for s in wanted]
        states.update({t.name: t for t in made})
        own = tuple(Use(t.name) for t in made)
        steps.append(Op(
            f"optimizer.{name}", "optimizer", (Use(held.name), Use(gradient.name), *own),
            (Use(held.name), *own), flops=ADAMW_FLOPS * held.numel,
        ))  # fmt: skip
    return {**recorder.tensors(), **states}, [*_with_names(recorder.ops, renamed), *steps]


def _with_names(ops: Sequence[Op], renamed: Mapping[str, str]) -> list[Op]:
    """Ops whose uses follow tensors to their new names."""

    def follow_(uses: tuple[Use, ...]) -> tuple[Use, ...]:
        return tuple(replace(u, tensor=renamed.get(u.tensor, u.tensor)) for u in uses)

    return [
        replace(op, reads=follow_(op.reads), writes=follow_(op.writes))
        if any(u.tensor in renamed for u in (*op.reads, *op.writes)) else op
        for op in ops
    ]  # fmt: skip
