"""Where and how a traced algorithm runs: executors, arrays placed by them, and back ends."""

from __future__ import annotations

import ctypes
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np

from narrows.chips import _stream_c
from narrows.chips._stream_expression import Expression, lower, text
from narrows.core.errors import NarrowsError, unknown
from narrows.measure import probes

Call = Callable[[], object]
HUGE = 2 * 1024 * 1024
SKEW = 1024
"""Bytes by which arrays start apart, so that their elements do not meet in one cache set."""


@dataclass(frozen=True)
class Executor:
    """Which processors compute, each its own block of the elements: `cpu:0-3`, `cpu`, `cuda:0`.

    `cpu` alone is every processor that the process may use.
    """

    where: str = "cpu"

    def __post_init__(self) -> None:
        if self.device == "cuda":
            return
        allowed = _allowed()
        refused = [c for c in self.cpus if c not in allowed]
        if not self.cpus or refused:
            raise NarrowsError(
                f"executor {self.where!r}: give `cpu`, `cpu:FIRST-LAST` or `cuda:INDEX`; "
                f"this process may use the processors {', '.join(map(str, allowed))}"
            )

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        kind = self.where.partition(":")[0]
        if kind not in ("cpu", "cuda"):
            raise unknown("executor", self.where, ["cpu", "cpu:0-1", "cuda:0"])
        return kind

    @property
    def cpus(self) -> tuple[int, ...]:
        """Numbers of the processors, in the order of their blocks."""
        listed = self.where.partition(":")[2]
        if not listed:
            return _allowed()
        found: list[int] = []
        with suppress(ValueError):
            for part in listed.split(","):
                first, _, last = part.partition("-")
                found.extend(range(int(first), int(last or first) + 1))
        return tuple(found)

    @property
    def threads(self) -> int:
        """How many blocks compute at once; 1 on a GPU, which splits the work itself."""
        return len(self.cpus) if self.device == "cpu" else 1

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the calling thread, and those it starts, on these processors."""
        if self.device != "cpu" or not hasattr(os, "sched_setaffinity"):
            yield
            return
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.cpus)
        try:
            if _stream_c.available() is not None:
                _stream_c.bind(self.threads, self.cpus, each=True)
            yield
        finally:
            os.sched_setaffinity(0, before)
            if _stream_c.available() is not None:
                _stream_c.bind(self.threads, sorted(before), each=False)


def _allowed() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def untouched(elements: int, number: int) -> np.ndarray:
    """Float64 array (elements,) in pages that nobody has written yet, huge ones where allowed.

    number: of the array among those used together; staggers where it starts.
    """
    size = 8 * elements + HUGE + SKEW * 64
    # private, because shared pages, the default, cannot be huge
    private = (
        {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    )
    room = mmap.mmap(-1, size, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            room.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(room, np.uint8)
    start = -raw.ctypes.data % HUGE + SKEW * (number % 64)
    return raw[start : start + 8 * elements].view(np.float64)


class Backend(ABC):
    """A way to run an expression over arrays. why: what it costs by construction, in words."""

    name: ClassVar[str]
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    parallel: ClassVar[bool] = True

    def missing(self) -> str:
        """Why it cannot run here, empty where it can."""
        return ""

    def empty(self, elements: int, number: int, on: Executor) -> Any:
        """An array that is placed where its first writer runs."""
        if on.device == "cuda":
            import torch

            return torch.empty(elements, dtype=torch.float64, device=on.where)
        return untouched(elements, number)

    def moved(self, expression: Expression) -> int:
        """Arrays that cross main memory, as STREAM counts them; a fused loop moves each once."""
        return len(_arguments(expression)) + 1

    def passes(self, expression: Expression) -> int:
        """Operations it needs for an element, one after another through memory or a cache."""
        return 1

    @abstractmethod
    def bind(self, expression: Expression, arrays: Sequence[Any], out: Any, on: Executor) -> Call:
        """A call that computes `out` from `arrays`, everything prepared that can be."""


def _arguments(expression: Expression | None) -> set[int]:
    if expression is None:
        return set()
    if expression.op == "arg":
        return {int(expression.value)}
    return _arguments(expression.left) | _arguments(expression.right)


def aliased(arrays: Sequence[Any], out: Any) -> bool:
    """Whether the result is one of the arguments. Raises where they overlap in part."""
    same = False
    for one in arrays:
        if one is out:
            same = True
        elif isinstance(one, np.ndarray) and np.may_share_memory(one, out):
            if one.ctypes.data != out.ctypes.data:
                raise NarrowsError("transform: `out` overlaps an argument in part; give another")
            same = True
    return same


class C(Backend):
    """A fused OpenMP loop in C, compiled when it is first needed."""

    name = "c"
    streaming: ClassVar[bool] = False

    def missing(self) -> str:
        return "" if _stream_c.available() else "no C compiler with OpenMP"

    def bind(self, expression: Expression, arrays: Sequence[Any], out: Any, on: Executor) -> Call:
        same = aliased(arrays, out)
        # a store past the caches must be aligned
        fits = all(x.ctypes.data % 32 == 0 for x in (*arrays, out))
        stream = self.streaming and fits and not same
        made = _stream_c.library(_stream_c.source(expression, len(arrays), same, stream))
        return c_call(made.kernel, on.threads, (out, *arrays))


class CStreaming(C):
    """The same loop with stores that bypass the caches.

    Plain stores where an array does not start on 32 bytes, or the result is an argument as well.
    """

    name = "c-streaming"
    streaming = True

    def missing(self) -> str:
        return super().missing() or ("" if _stream_c.streams() else "no AVX")


def c_call(function: Any, threads: int, arrays: Sequence[np.ndarray]) -> Call:
    """A C function of (n, threads, arrays...) with its arguments made ready."""
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in arrays]
    ready = (ctypes.c_long(arrays[0].size), ctypes.c_int(threads), *pointers)
    function.restype = None

    def call(keep: Sequence[np.ndarray] = tuple(arrays)) -> None:
        function(*ready)

    return call


class Numba(Backend):
    """A fused parallel loop compiled by numba."""

    name = "numba"

    def missing(self) -> str:
        return "" if find_spec("numba") else "numba is not installed"

    def bind(self, expression: Expression, arrays: Sequence[Any], out: Any, on: Executor) -> Call:
        import numba

        # numba counts the processors once; a smaller count given by the environment stays
        try:
            numba.set_num_threads(on.threads)
        except ValueError as error:
            raise NarrowsError(
                f"numba cannot use {on.threads} threads ({error}); set NUMBA_NUM_THREADS before "
                "Python starts"
            ) from None
        numbers: list[float] = []
        element = text(expression, numbers=numbers)
        kernel = _numba_kernel(element, len(arrays), len(numbers))

        def call() -> None:
            numba.set_num_threads(on.threads)
            kernel(out, *arrays, *numbers)

        return call


@cache
def _numba_kernel(element: str, arguments: int, numbers: int) -> Callable[..., None]:
    import numba

    names = "".join(f", p{k}" for k in range(arguments))
    names += "".join(f", k{k}" for k in range(numbers))
    code = f"def kernel(out{names}):\n for i in prange(out.size):\n  out[i] = {element}\n"
    room: dict[str, Any] = {"prange": numba.prange}
    exec(code, room)  # of an expression that was traced: operators and numbers only
    return numba.njit(parallel=True, fastmath={"contract"})(room["kernel"])


class Numpy(Backend):
    """Passes over blocks that stay in the second-level cache; scratch is a block as well."""

    name = "numpy"
    parallel = False

    def passes(self, expression: Expression) -> int:
        return len(lower(expression))

    def bind(self, expression: Expression, arrays: Sequence[Any], out: Any, on: Executor) -> Call:
        passes = lower(expression)
        scratch = 1 + max((p.to for p in passes), default=-1)
        block = max(cache_bytes() // 2 // (8 * (len(arrays) + 1 + scratch)), 64)
        rooms = [np.zeros(block) for _ in range(scratch)]
        steps: list[tuple[Any, tuple[Any, ...]]] = []
        for start in range(0, out.size, block):
            part = slice(start, min(start + block, out.size))
            width = part.stop - part.start
            held = {"arg": [x[part] for x in arrays], "scratch": [r[:width] for r in rooms]}
            for p in passes:
                to = out[part] if p.to < 0 else held["scratch"][p.to]
                values = [
                    number if kind == "const" else held[kind][int(number)]
                    for kind, number in (p.left, *((p.right,) if p.right else ()))
                ]
                if p.op == "copy":
                    steps.append((np.copyto, (to, *values)))
                else:
                    steps.append((getattr(np, p.op), (*values, to)))

        def call() -> None:
            for function, operands in steps:
                function(*operands)

        return call


class NumpyNaive(Backend):
    """Whole-array numpy that makes a new array for every operation: what not to do."""

    name = "numpy-naive"
    parallel = False

    def moved(self, expression: Expression) -> int:
        return sum(p.arrays for p in lower(expression) if p.op != "copy") + 2

    def bind(self, expression: Expression, arrays: Sequence[Any], out: Any, on: Executor) -> Call:
        def call() -> None:
            np.copyto(out, evaluate(expression, arrays))

        return call


def evaluate(expression: Expression, arrays: Sequence[Any]) -> Any:
    """The expression by the operators of whatever the arrays are."""
    if expression.op == "arg":
        return arrays[int(expression.value)]
    if expression.op == "const":
        return expression.value
    left, right = (evaluate(side, arrays) for side in expression.sides)
    match expression.op:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case _:
            return left / right


def cache_bytes() -> int:
    """Bytes of one core's second-level cache, 1 MiB where it is not told."""
    found = [c.size for c in probes.caches(1) if c.name == "l2"]
    return found[0] if found else probes.MB


@cache
def backends() -> dict[str, Backend]:
    """All back ends by name, the native-like first."""
    from narrows.chips import _stream_torch

    made = (C(), CStreaming(), Numba(), _stream_torch.TorchCompiled(), _stream_torch.TorchEager(),
            Numpy(), NumpyNaive())  # fmt: skip
    return {one.name: one for one in made}


def transform(
    fn: Callable[..., Any], *arrays: Any, out: Any, on: Executor | str = "cpu", backend: str = ""
) -> Any:
    """out[i] = fn(*(x[i] for x in arrays)) for all i, as one fused kernel; returns `out`.

    arrays, out: float64, one axis, equal length: numpy arrays for `cpu`, torch tensors for
    `cuda`. backend: a name of `backends()`; empty: the first that runs there.
    """
    plan(fn, *arrays, out=out, on=on, backend=backend)()
    return out


def plan(
    fn: Callable[..., Any], *arrays: Any, out: Any, on: Executor | str = "cpu", backend: str = ""
) -> Call:
    """`transform` prepared: the call it would make, to be made many times."""
    from narrows.chips._stream_expression import trace

    on = on if isinstance(on, Executor) else Executor(on)
    for one in (*arrays, out):
        if "float64" not in str(getattr(one, "dtype", "")) or tuple(one.shape) != tuple(out.shape):
            raise NarrowsError(
                "transform: arrays and `out` must be float64 and of one length; got "
                f"{type(one).__name__} {getattr(one, 'dtype', '')} {getattr(one, 'shape', '')}"
            )
    aliased(arrays, out)  # raises where they overlap in part
    return choose(backend, on).bind(trace(fn, len(arrays)), arrays, out, on)


def choose(name: str, on: Executor) -> Backend:
    """A back end by name, or the first that runs on an executor."""
    known = backends()
    if name and name not in known:
        raise unknown("back end of stream_portability", name, known)
    for one in [known[name]] if name else known.values():
        why = one.missing() or ("" if on.device in one.devices else f"it cannot use {on.device}")
        if not why:
            return one
        if name:
            raise NarrowsError(f"back end {name!r} cannot run on {on.where}: {why}")
    raise NarrowsError(f"no back end can run on {on.where}")
