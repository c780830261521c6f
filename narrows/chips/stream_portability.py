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

from collections.abc import Callable, Mapping
from typing import Any

from narrows.chips import _stream_c
from narrows.chips._stream_backends import Executor, backends, choose, transform
from narrows.chips._stream_expression import trace
from narrows.chips._stream_table import (
    AGAIN,
    BYTES,
    FIRST,
    NATIVE,
    PLACES,
    Arrays,
    Row,
    Table,
    allocated,
    cause,
    past_caches,
    room,
)
from narrows.core.errors import NarrowsError
from narrows.core.method import Instrument, Reading
from narrows.measure import probes
from narrows.measure.timing import Progress, Ratio, Timings, interleave

__all__ = ["Executor", "Row", "StreamPortability", "Table", "transform"]


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
            arrays = Arrays(self.kernels, self.scalar, native, self._elements(on), on)
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
            arrays = Arrays(self.kernels, self.scalar, choose(backend, on), self._elements(on), on)
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
        room(on, elements, len(chosen) + 2 * native)
        timings: dict[str, Timings] = {}
        with on.held():
            names = (NATIVE, AGAIN) if native else ()
            sets = {name: Arrays(self.kernels, self.scalar, None, elements, on) for name in names}
            sets |= {b.name: Arrays(self.kernels, self.scalar, b, elements, on) for b in chosen}
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
        told = ""
        if speed is not None and name in backends() and speed.median < 0.95:
            expression = trace(self.kernels[kernel], len(PLACES[kernel]) - 1)
            told = cause(backends()[name], expression, use, speed, on)
            if kernel == "copy" and past_caches(timings):
                told += "; native copy stores past the caches"
        return Row(name, kernel, rate.median, (rate.low, rate.high),
                   counted / found[name].best, speed, use[0], use[1], told)  # fmt: skip

    def _elements(self, on: Executor) -> int:
        if self.elements is not None:
            return self.elements
        if on.device == "cuda":
            import torch

            return 4 * torch.cuda.get_device_properties(on.where).L2_cache_size // 8
        listed = probes.caches(on.threads)
        return 4 * max([c.size for c in listed], default=32 * probes.MB) // 8
