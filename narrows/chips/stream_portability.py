"""STREAM by one portable program, beside the native one (Lin and others, arXiv:2206.06302).

Narrow point: main memory's bandwidth, and what an abstraction adds on top of it: hidden
temporaries, pages that are touched for the first time, passes that are not fused, idle cores.

Mechanism. The four kernels are written once, as functions of elements. An executor says where
they compute and in which blocks; arrays get their pages from the executor's own first write.
`transform` traces a function to one expression, which each back end turns into one fused loop or
into the fewest passes its library allows. All run in turn beside a hand-written C and OpenMP
loop. Counted are 16, 16, 24 and 24 bytes an element, on both sides.

It misleads where arrays fit a cache, where only one side bypasses the caches when it stores (the
count leaves out what is read before it is overwritten, up to a third), and where neighbours use
the same memory.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from narrows.chips import _stream_c
from narrows.chips._stream_backends import (
    Backend,
    Call,
    Executor,
    backends,
    c_call,
    choose,
    plan,
    transform,
)
from narrows.chips._stream_expression import Expression, trace
from narrows.core.errors import NarrowsError
from narrows.core.method import Instrument, Reading
from narrows.measure import probes
from narrows.measure.timing import Progress, Ratio, Timings, interleave

__all__ = ["Executor", "Row", "StreamPortability", "Table", "transform"]

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

    def __init__(self, owner: Any, backend: Backend | None, elements: int, on: Executor) -> None:
        source = backend or backends()["c"]
        self.held = {name: source.empty(elements, k, on) for k, name in enumerate("abc")}
        self.calls: dict[str, Call] = {}
        if backend is None:
            loops = _stream_c.native(owner.scalar)
            c_call(loops.stream_init, on.threads, list(self.held.values()))()
        else:
            for name, value in FIRST.items():
                out = self.held[name]
                plan(lambda v=value: v, out=out, on=on, backend=backend.name)()
        for kernel, names in PLACES.items():
            out, *inputs = (self.held[n] for n in names)
            if backend is None:
                loop = getattr(_stream_c.native(owner.scalar), f"stream_{kernel}")
                self.calls[kernel] = c_call(loop, on.threads, (out, *inputs))
            else:
                fn = owner.kernels[kernel]
                self.calls[kernel] = plan(fn, *inputs, out=out, on=on, backend=backend.name)

    def reset(self) -> None:
        """Back to STREAM's first values (compiling may have run a kernel)."""
        for name, value in FIRST.items():
            self.held[name][:] = value


class StreamPortability(Instrument):
    """STREAM over portable back ends: bandwidth of main memory, and the loss of each of them.

    times: rounds, the first dropped. scalar: of scale and triad. elements: of each array, None
    for four times the last-level cache. names: back ends, empty for all that run here.
    """

    key = "stream_portability"
    paper = "arXiv:2206.06302"
    relieves = "memory bandwidth"

    def __init__(
        self, times: int = 10, scalar: float = 3.0, elements: int | None = None,
        names: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        if times < 2:
            raise NarrowsError(f"stream_portability: times must be 2 at least, not {times}")
        if elements is not None and elements < 1:
            raise NarrowsError(f"stream_portability: elements must be positive, not {elements}")
        self.times, self.scalar, self.elements, self.names = times, float(scalar), elements, names

    @property
    def kernels(self) -> dict[str, Callable[..., Any]]:
        """The one source of the four kernels: elements to an element."""
        s = self.scalar
        return {
            "copy": lambda a: a,
            "scale": lambda c: s * c,
            "add": lambda a, b: a + b,
            "triad": lambda b, c: b + s * c,
        }

    def measure(self, target: Any = "cpu") -> Reading:
        """Triad's bandwidth on an executor, byte/s: the best round of the fastest back end.

        target: an Executor or its name. The interval runs from the low end of the median's 95 %
        interval to the best round. facts: byte/s and causes by back end and kernel.
        """
        table = self.table(target)
        top = table.fastest("triad")
        facts = {
            "backend": top.backend,
            "rates": {f"{r.backend} {r.kernel}": r.best for r in table.rows},
            "speeds": {f"{r.backend} {r.kernel}": r.speed.median for r in table.rows if r.speed},
            "causes": {f"{r.backend} {r.kernel}": r.cause for r in table.rows if r.cause},
            "missing": dict(table.missing),
            "elements": table.elements,
        }
        return Reading(top.best, "byte/s", (top.interval[0], top.best), None, facts)

    def checksum(self, backend: str, on: Executor | str = "cpu", rounds: int = 10) -> float:
        """Largest relative error of a, b, c after `rounds` rounds, against the recurrence."""
        on = on if isinstance(on, Executor) else Executor(on)
        native = None if backend == NATIVE else choose(backend, on)
        with on.held():
            arrays = Arrays(self, native, self._elements(on), on)
            arrays.reset()
            wanted = dict(FIRST)
            for _ in range(rounds):
                for kernel, (out, *inputs) in PLACES.items():
                    arrays.calls[kernel]()
                    wanted[out] = self.kernels[kernel](*(wanted[n] for n in inputs))
            return max(
                float(abs(arrays.held[n] - wanted[n]).max()) / abs(wanted[n]) for n in wanted
            )

    def allocations(self, backend: str, on: Executor | str = "cpu") -> dict[str, tuple[int, int]]:
        """(first touches of pages, traced bytes at the peak) of a call, by kernel."""
        on = on if isinstance(on, Executor) else Executor(on)
        with on.held():
            arrays = Arrays(self, choose(backend, on), self._elements(on), on)
            return {kernel: allocated(call) for kernel, call in arrays.calls.items()}

    def table(self, target: Any = "cpu", progress: Progress | None = None) -> Table:
        """All back ends and the native loop in turn, kernel by kernel."""
        on = target if isinstance(target, Executor) else Executor(str(target))
        missing = {
            n: b.missing() or ("" if on.device in b.devices else f"cannot use {on.device}")
            for n, b in backends().items()
            if not self.names or n in self.names
        }
        chosen = [choose(n, on) for n in self.names or [n for n, why in missing.items() if not why]]
        elements = self._elements(on)
        native = on.device == "cpu" and _stream_c.available() is not None
        _room(on, elements, len(chosen) + 2 * native)
        timings: dict[str, Timings] = {}
        with on.held():
            names = (NATIVE, AGAIN) if native else ()
            sets = {name: Arrays(self, None, elements, on) for name in names}
            sets |= {b.name: Arrays(self, b, elements, on) for b in chosen}
            use: dict[tuple[str, str], tuple[int, int]] = {}
            for k, kernel in enumerate(PLACES):
                timings[kernel] = interleave(
                    {name: one.calls[kernel] for name, one in sets.items()}, self.times - 1,
                    device="cpu" if on.device == "cpu" else on.where, warmup=1,
                )  # fmt: skip
                for name, one in sets.items():
                    measured = on.device == "cpu"
                    use[name, kernel] = allocated(one.calls[kernel]) if measured else (0, 0)
                if progress is not None:
                    progress((k + 1) / len(PLACES), kernel)
        rows = [self._row(*key, timings, elements, used, on) for key, used in use.items()]
        told = {n: why for n, why in missing.items() if why}
        if not native:
            told[NATIVE] = "no C compiler with OpenMP, or not a CPU"
        return Table(tuple(rows), elements, on.threads, told, timings)

    def _row(
        self, name: str, kernel: str, timings: Mapping[str, Timings], elements: int,
        use: tuple[int, int], on: Executor,
    ) -> Row:  # fmt: skip
        found = timings[kernel]
        counted = float(BYTES[kernel] * elements)
        rate = Ratio.of(counted / found[name].seconds)
        speed = found.speedup(name, over=NATIVE) if NATIVE in found.rows else None
        cause = ""
        if speed is not None and name in backends() and speed.median < 0.95:
            expression = trace(self.kernels[kernel], len(PLACES[kernel]) - 1)
            cause = _cause(backends()[name], expression, use, speed, on)
            if kernel == "copy" and _past_caches(timings):
                cause += "; native copy became memcpy, which does not read what it overwrites"
        return Row(name, kernel, rate.median, (rate.low, rate.high),
                   counted / found[name].best, speed, use[0], use[1], cause)  # fmt: skip

    def _elements(self, on: Executor) -> int:
        if self.elements is not None:
            return self.elements
        if on.device == "cuda":
            import torch

            return 4 * torch.cuda.get_device_properties(on.where).L2_cache_size // 8
        listed = probes.caches(on.threads)
        return 4 * max([c.size for c in listed], default=32 * probes.MB) // 8


def _cause(
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


def _past_caches(timings: Mapping[str, Timings]) -> bool:
    """Whether native copy moves 2 arrays where native scale, of equal count, moves 3."""
    return timings["scale"][NATIVE].median > 1.25 * timings["copy"][NATIVE].median


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


def _room(on: Executor, elements: int, sets: int) -> None:
    needed = 3 * 8 * elements * sets
    available = probes.memory_available() if on.device == "cpu" else None
    if available is not None and needed > 0.8 * available:
        raise NarrowsError(
            f"stream_portability: {sets} sets of three arrays need {needed / 2**30:.1f} GiB and "
            f"{available / 2**30:.1f} GiB are free; name fewer back ends or give `elements`"
        )
