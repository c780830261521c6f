"""Claims of STREAM by one portable program.

Paper: Lin and others, "Closing the Performance Gap with Modern C++" (arXiv:2206.06302), which
writes STREAM once with executors and compares it with native OpenMP and CUDA. Its machines (two
Xeon sockets, GPUs) are not here: what is checked is its statement, the ratio to a native loop
that runs in turn with ours. Figures in GB/s of its machines are not reproduced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np

from narrows.chips import _stream_backends
from narrows.chips._stream_table import AGAIN, NATIVE, PLACES, Table
from narrows.chips.stream_portability import StreamPortability
from narrows.core.claim import Figure, Inconclusive, claim
from narrows.measure.timing import Ratio

PAPER_DEFAULTS = {"times": 10, "scalar": 3.0}
"""STREAM's own: ten rounds of which the first is dropped, and its scalar."""

PAPER = "arXiv:2206.06302, abstract"
ROUNDS = 32
LARGE = 1 << 22
"""Elements of 32 MiB arrays: what malloc always takes fresh from the system, so that a hidden
temporary of torch, which Python does not trace, shows as new pages."""
TRACED = 1 << 20
"""Elements where Python traces every temporary."""
NULL = 0.05
"""Two equal programs may seem this far apart; beyond it the machine is too restless to tell."""


def _quick() -> list[str]:
    """Back ends that run here and need no long compilation, without the negative control."""
    slow = ("torch-compiled", "numpy-naive")
    known = _stream_backends.backends().items()
    return [name for name, one in known if name not in slow and not one.missing()]


def _pages(name: str) -> int:
    """New pages, and pages' worth of Python's memory, over the four kernels of a back end."""
    elements = LARGE if name.startswith("torch") else TRACED
    found = StreamPortability(elements=elements).allocations(name)
    return sum(faults + traced // 4096 for faults, traced in found.values())


@claim(
    expected=(0.0, 1e-8), unit="largest relative error",
    setting="a, b, c after 10 rounds, 100003 elements, every back end but compiled torch",
    source="card stream_portability, works when (a): STREAM's checksum", how="exact", cost=4.0,
)  # fmt: skip
def checksum() -> Figure:
    """Error against the recurrence of the three scalars."""
    found = {n: StreamPortability(elements=100_003).checksum(n) for n in [*_quick(), "numpy-naive"]}
    return Figure(max(found.values()), details=dict(found))


@claim(
    expected=0.0, unit="pages",
    setting="new pages and Python's allocations in a call, four kernels, arrays of 8 MiB, torch 32",
    source="card stream_portability, works when (a)", how="measured", cost=3.0,
    control="blocked numpy that makes temporaries instead",
)  # fmt: skip
def nothing_is_allocated() -> Figure:
    """Sum over back ends of page faults, and of traced bytes in whole pages."""
    found = {name: float(_pages(name)) for name in _quick()}
    return Figure(sum(found.values()), details=dict(found))


@claim(
    expected=(2048.0, float("inf")), unit="pages",
    setting="the same counters on numpy that makes a new array for every operation",
    source="card stream_portability: naive numpy as negative control", how="measured", cost=2.0,
)  # fmt: skip
def counters_see_temporaries() -> float:
    """Pages of naive numpy: at least one 8 MiB array is 2048 of them."""
    return float(_pages("numpy-naive"))


@claim(
    expected=(0.0, 1e-8), unit="largest relative error, plus pages",
    setting="compiled torch, checksum of 10 rounds and allocations, 32 MiB arrays",
    source="card stream_portability, works when (a)", how="exact", cost=60.0, needs=("torch",),
)  # fmt: skip
def compiled_torch_is_exact_and_allocates_nothing() -> Figure:
    """Error against the recurrence, and pages of a call."""
    error = StreamPortability(elements=LARGE).checksum("torch-compiled")
    pages = _pages("torch-compiled")
    return Figure(error + pages, details={"error": error, "pages": float(pages)})


@cache
def _table() -> Table:
    """All back ends and native in turn, arrays of four times the last-level cache."""
    table = StreamPortability(times=ROUNDS + 1).table("cpu")
    if NATIVE in table.missing:
        raise Inconclusive("no native loop to compare with; install gcc")
    return table


def _restless(table: Table) -> None:
    """Raise where two equal native programs seem to differ."""
    for kernel in PLACES:
        null = table.timings[kernel].speedup(AGAIN, over=NATIVE)
        if abs(null.median - 1.0) > NULL:
            raise Inconclusive(
                f"two equal native loops differ {null.median:.2f}-fold at {kernel}; "
                "run it where nothing else uses the memory"
            )


def _best_over_native(table: Table, leave_out: tuple[str, ...] = ()) -> Figure:
    """Least over kernels of the best back end's speed over native.

    The best is chosen in one half of the rounds and judged in the other, so that luck does not
    choose it.
    """
    details: dict[str, float | str] = {}
    found: list[Ratio] = []
    for kernel in PLACES:
        rows = table.timings[kernel].rows
        names = [n for n in rows if n not in (NATIVE, AGAIN, *leave_out)]
        best = min(names, key=lambda n: float(np.median((rows[n].seconds)[::2])))
        ratio = Ratio.of(rows[NATIVE].seconds[1::2] / rows[best].seconds[1::2])
        found.append(ratio)
        details[f"{kernel} best"] = best
        details[kernel] = ratio.median
        null = table.timings[kernel].speedup(AGAIN, over=NATIVE)
        details[f"{kernel} native again"] = null.median
        for name in names:
            row = table.row(name, kernel)
            details[f"{kernel} {name}"] = row.speed.median if row.speed else 0.0
            if row.cause:
                details[f"{kernel} {name} cause"] = row.cause
    least = min(found, key=lambda r: r.median)
    return Figure(least.median, (least.low, least.high), details=details)


@claim(
    expected=(0.95, float("inf")), unit="times native",
    setting="least over the four kernels, best back end with plain stores over C and OpenMP "
    "(-O3 -march=native), in turn, arrays of four times the last-level cache",
    source="card stream_portability, works when (b)", how="measured", cost=60.0,
    control="two equal native loops must not differ by more than 5 %",
)  # fmt: skip
def plain_stores_reach_native() -> Figure:
    """Speed of the best back end that stores as native does."""
    table = _table()
    _restless(table)
    return _best_over_native(table, ("c-streaming",))


@claim(
    expected=(1.0, float("inf")), unit="times native",
    setting="least over the four kernels, best of all back ends over native, in turn; on x86 that "
    "is the one that stores past the caches, which native C leaves to the compiler",
    source=f"{PAPER}: at least as good as native STREAM on all targets", how="measured", cost=60.0,
)  # fmt: skip
def at_least_as_good_as_native() -> Figure:
    """Speed of the best back end."""
    table = _table()
    _restless(table)
    return _best_over_native(table)


@claim(
    expected=(2.0, float("inf")), unit="times",
    setting="blocked numpy over naive numpy, least of scale, add, triad; copy has no temporary",
    source="card stream_portability, works when (b)", how="measured", cost=20.0,
)  # fmt: skip
def blocked_numpy_over_naive() -> Figure:
    """Speedup, and that of each kernel."""
    table = StreamPortability(times=ROUNDS // 2, names=("numpy", "numpy-naive")).table("cpu")
    found = {k: table.timings[k].speedup("numpy", over="numpy-naive") for k in PLACES}
    least = min((found[k] for k in ("scale", "add", "triad")), key=lambda r: r.median)
    details: dict[str, float | str] = {k: r.median for k, r in found.items()}
    return Figure(least.median, (least.low, least.high), details=details)


def _triad_on_the_gpu(name: str) -> Figure:
    """Share of an H200's published bandwidth, after the checksum."""
    import torch

    from narrows.machines.load import load

    card = torch.cuda.get_device_name(0)
    if "H200" not in card:
        raise Inconclusive(f"the GPU here is a {card}; the figure is of an H200")
    error = StreamPortability(elements=1 << 20).checksum(name, "cuda:0")
    if not error < 1e-8:
        raise ArithmeticError(f"the checksum is off by {error:g} on the GPU")
    table = StreamPortability(ROUNDS, elements=1 << 27, names=(name,)).table("cuda:0")
    top, peak = table.fastest("triad"), load("h200").bandwidth("device")
    details: dict[str, float | str] = {f"{r.kernel}, byte/s": r.bandwidth for r in table.rows}
    low, high = top.interval
    return Figure(top.bandwidth / peak, (low / peak, high / peak), details=details)


@claim(
    expected=(0.9, float("inf")), unit="of 4.8 TB/s",
    setting="triad on an H200, eager torch in one pass, 1 GiB arrays, checksum first",
    source="card stream_portability, works when (c)", how="measured", cost=5.0,
    needs=("gpu", "torch"),
)  # fmt: skip
def triad_of_an_h200() -> Figure:
    """Share of the published bandwidth."""
    return _triad_on_the_gpu("torch-eager")


@claim(
    expected=(0.9, float("inf")), unit="of 4.8 TB/s",
    setting="triad on an H200, compiled torch (Triton), 1 GiB arrays, checksum first",
    source="card stream_portability, works when (c)", how="measured", cost=60.0,
    needs=("gpu", "torch"),
)  # fmt: skip
def compiled_triad_of_an_h200() -> Figure:
    """Share of the published bandwidth."""
    return _triad_on_the_gpu("torch-compiled")


@contextmanager
def mutant() -> Iterator[str]:
    """Blocked numpy forgets its scratch and makes temporaries."""
    whole = _stream_backends.Numpy.bind
    _stream_backends.Numpy.bind = _stream_backends.NumpyNaive.bind  # pyright: ignore
    try:
        yield nothing_is_allocated.name
    finally:
        _stream_backends.Numpy.bind = whole
