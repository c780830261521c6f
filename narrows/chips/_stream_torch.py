"""The torch back ends: compiled to one fused kernel, and eager with `out=`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from narrows.chips._stream_backends import Backend, Call, Executor
from narrows.chips._stream_expression import Expression, lower, text


class _Torch(Backend):
    devices = ("cpu", "cuda")

    def missing(self) -> str:
        return "" if find_spec("torch") else "torch is not installed"


def _tensors(arrays: Sequence[Any], on: Executor) -> list[Any]:
    import torch

    if on.device == "cpu" and torch.get_num_threads() != on.threads:
        torch.set_num_threads(on.threads)
    return [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in arrays]


class TorchCompiled(_Torch):
    """`torch.compile` of the expression and the copy into the result: one kernel of either."""

    name = "torch-compiled"

    def bind(self, expression: Expression, arrays: Sequence[Any], out: Any, on: Executor) -> Call:

        result, *inputs = _tensors((out, *arrays), on)

        if expression.op == "const":
            return lambda: result.fill_(expression.value)
        # a code object for each expression and length: compiled code is kept by code object, and
        # one that served many would be given up after a few
        kernel = _compiled(text(expression, "p{}"), len(arrays), result.numel(), on.where)

        def call() -> None:
            kernel(result, *inputs)

        call()  # compiles; what it writes is what will be written
        return call


@cache
def _compiled(element: str, arguments: int, elements: int, where: str) -> Callable[..., None]:
    import torch

    names = "".join(f", p{k}" for k in range(arguments))
    room: dict[str, Any] = {}
    exec(f"def kernel(result{names}):\n result.copy_({element})\n", room)  # traced: operators only
    return torch.compile(room["kernel"], dynamic=False, fullgraph=True)


class TorchEager(_Torch):
    """One torch operation after another, each into an array that is already there."""

    name = "torch-eager"

    def moved(self, expression: Expression) -> int:
        return sum(p.arrays for p in lower(expression, axpy=True))

    def bind(self, expression: Expression, arrays: Sequence[Any], out: Any, on: Executor) -> Call:
        import torch

        result, *inputs = _tensors((out, *arrays), on)
        passes = lower(expression, axpy=True)
        rooms = [torch.empty_like(result) for _ in range(1 + max(p.to for p in passes))]
        steps: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        for p in passes:
            to = result if p.to < 0 else rooms[p.to]
            values = [
                {"arg": inputs, "scratch": rooms}[kind][int(number)] if kind != "const" else number
                for kind, number in (p.left, *((p.right,) if p.right else ()))
            ]
            if p.op == "copy":
                write = to.copy_ if p.left[0] != "const" else to.fill_
                steps.append((write, (values[0],), {}))
            elif p.op == "axpy":
                steps.append((torch.add, (*values,), {"alpha": p.factor, "out": to}))
            else:
                if not isinstance(values[0], torch.Tensor):
                    # torch's `out=` takes a number on the right only
                    values[0] = torch.tensor(values[0], dtype=result.dtype, device=result.device)
                steps.append((getattr(torch, p.op), (*values,), {"out": to}))

        def call() -> None:
            for function, operands, more in steps:
                function(*operands, **more)

        return call
