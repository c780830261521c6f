"""What STREAM measured: rows, the arrays they ran on, what was allocated, why one is slower."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from narrows.chips import _stream_c
from narrows.chips._stream_backends import Backend, Call, Executor, backends, c_call, plan
from narrows.chips._stream_expression import Expression
from narrows.core.errors import NarrowsError
from narrows.measure import probes
from narrows.measure.timing import Ratio, Timings

BYTES = {"copy": 16, "scale": 16, "add": 24, "triad": 24}
"""Bytes that STREAM counts for an element of each kernel."""
PLACES = {"copy": ("c", "a"), "scale": ("b", "c"), "add": ("c", "a", "b"), "triad": ("a", "b", "c")}
"""The result of each kernel, then its arguments."""
FIRST = {"a": 1.0, "b": 2.0, "c": 0.0}
NATIVE = "native"
AGAIN = "native-again"
"""The native loop once more on arrays of its own: how far two equal programs seem apart."""
TOLERATED = 4096
"""Traced bytes a call may use for its own small objects: a page, whatever the arrays' size."""


@dataclass(frozen=True)
class Row:
    """One back end at one kernel. bandwidth: byte/s, median. best: of the fastest round.

    speed: native seconds over its seconds, None without a native loop. faults: pages touched for
    the first time in a call. traced: bytes that Python allocated in a call at its peak. cause:
    of a speed below 0.95, in words.
    """

    backend: str
    kernel: str
    bandwidth: float
    interval: tuple[float, float]
    best: float
    speed: Ratio | None
    faults: int
    traced: int
    cause: str


@dataclass(frozen=True)
class Table:
    """All rows. missing: back ends that did not run, and why."""

    rows: tuple[Row, ...]
    elements: int
    threads: int
    missing: Mapping[str, str]
    timings: Mapping[str, Timings]

    def row(self, backend: str, kernel: str) -> Row:
        """One row. Raises NarrowsError where that back end did not run."""
        for row in self.rows:
            if (row.backend, row.kernel) == (backend, kernel):
                return row
        why = self.missing.get(backend, "it was not asked for")
        raise NarrowsError(f"no row of {backend!r} at {kernel!r}: {why}")

    def fastest(self, kernel: str) -> Row:
        """The fastest portable row of a kernel."""
        rows = [r for r in self.rows if r.kernel == kernel and r.backend not in (NATIVE, AGAIN)]
        return max(rows, key=lambda r: r.bandwidth)


class Arrays:
    """a, b, c of one back end, and its four calls."""

    def __init__(
        self,
        kernels: Mapping[str, Callable[..., Any]],
        scalar: float,
        backend: Backend | None,
        elements: int,
        on: Executor,
    ) -> None:
        source = backend or backends()["c"]
        self.held = {name: source.empty(elements, k, on) for k, name in enumerate("abc")}
        self.calls: dict[str, Call] = {}
        if backend is None:
            loops = _stream_c.native(scalar)
            c_call(loops.stream_init, on.threads, list(self.held.values()))()
        else:
            for name, value in FIRST.items():
                out = self.held[name]
                plan(lambda v=value: v, out=out, on=on, backend=backend.name)()
        for kernel, names in PLACES.items():
            out, *inputs = (self.held[n] for n in names)
            if backend is None:
                loop = getattr(_stream_c.native(scalar), f"stream_{kernel}")
                self.calls[kernel] = c_call(loop, on.threads, (out, *inputs))
            else:
                fn = kernels[kernel]
                self.calls[kernel] = plan(fn, *inputs, out=out, on=on, backend=backend.name)

    def reset(self) -> None:
        """Back to STREAM's first values (compiling may have run a kernel)."""
        for name, value in FIRST.items():
            self.held[name][:] = value


def cause(
    backend: Backend, expression: Expression, use: tuple[int, int], speed: Ratio, on: Executor
) -> str:
    """Why a back end is slower than native, from what was counted; the heaviest first."""
    moved, least = backend.moved(expression), Backend.moved(backend, expression)
    passes = backend.passes(expression)
    causes = [
        (use[0] > 0, f"touches {use[0]} new pages a call"),
        (use[1] > TOLERATED, f"allocates {use[1] / 2**20:.0f} MiB a call"),
        (moved > least, f"moves {moved} arrays where {least} would do"),
        (passes > 1, f"{passes} passes over each block in cache"),
        (not backend.parallel and on.threads > 1, f"one thread of {on.threads}"),
    ]
    told = [text for holds, text in causes if holds]
    if told:
        return "; ".join(told)
    if speed.high >= 1.0:
        return "none: the interval holds 1, the difference is noise of this run"
    return "unexplained: one fused pass on all threads without new pages, as native"


def past_caches(timings: Mapping[str, Timings]) -> bool:
    """Whether native copy already stores past the caches, as memcpy may: then a loop that does
    so for certain gains at scale and nothing at copy. False where none such ran beside it."""
    sure = "c-streaming"
    if sure not in timings["copy"].rows:
        return False
    copy, scale = (timings[k].speedup(sure, over=NATIVE).median for k in ("copy", "scale"))
    return copy < 1.1 and scale > 1.2


def allocated(call: Call, rounds: int = 3) -> tuple[int, int]:
    """(minor page faults, traced bytes at the peak) of a call: the least of a few."""
    import resource  # not on Windows

    call()
    faults: list[int] = []
    traced: list[int] = []
    for _ in range(rounds):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        tracemalloc.start()
        try:
            base = tracemalloc.get_traced_memory()[0]
            call()
            traced.append(tracemalloc.get_traced_memory()[1] - base)
        finally:
            tracemalloc.stop()
    return min(faults), min(traced)


def room(on: Executor, elements: int, sets: int) -> None:
    needed = 3 * 8 * elements * sets
    available = probes.memory_available() if on.device == "cpu" else None
    if available is not None and needed > 0.8 * available:
        raise NarrowsError(
            f"stream_portability: {sets} sets of three arrays need {needed / 2**30:.1f} GiB and "
            f"{available / 2**30:.1f} GiB are free; name fewer back ends or give `elements`"
        )
