"""Seconds of functions, measured against each other: A B A B ..., ratios with their spread.

A lone figure on a shared machine says little: clocks and neighbours drift by tens of percent
within a minute. So candidates take turns, every round gives one ratio between any two of them,
and what is reported is the median ratio with its quartiles. Where the quartiles or the 95 %
interval of the median cover 1, the verdict is `inconclusive`.

    timings = interleave({"dense": run_dense, "snapkv": run_snapkv}, repeats=31)
    timings.ratio("snapkv", to="dense")      # Ratio(median=0.61, low=0.59, high=0.63, ...)
    timings.verdict("snapkv", than="dense")  # "faster"

Only numpy is needed; torch is imported when a CUDA device is named.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, comb
from time import perf_counter

import numpy as np

from narrows.core.errors import NarrowsError, unknown

Progress = Callable[[float, str], None]
"""Told how far a long task is: a fraction from 0 to 1, and what is being done."""

QUIET_SPREAD = 0.10
"""A row whose ratios spread (interquartile range over median) less than this counts as quiet."""


def passive_openmp() -> bool:
    """Ask OpenMP to sleep while it waits; True where it will, or does, obey.

    The runtime reads the variable when it is loaded, so this must run before torch is imported.
    Spinning threads cost a hundredfold where other processes share the cores.
    """
    already = os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
    if not already and sys.modules.get("torch") is None:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        return True
    return already


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, once a round. seconds: (repeats,). inner: calls a round averages."""

    name: str
    seconds: np.ndarray
    inner: int

    @property
    def median(self) -> float:
        """Seconds of a call in the middle round."""
        return float(np.median(self.seconds))

    @property
    def best(self) -> float:
        """Seconds of a call in the fastest round: the least disturbed one."""
        return float(self.seconds.min())

    @property
    def spread(self) -> float:
        """Interquartile range over the median, a fraction."""
        low, high = np.quantile(self.seconds, (0.25, 0.75))
        return float((high - low) / self.median)


@dataclass(frozen=True)
class Ratio:
    """Seconds of one candidate over another's, round by round.

    median: of the rounds' ratios. low, high: 95 % interval of that median (order statistics, no
    distribution assumed). quartiles: of the ratios. spread: interquartile range over median.
    """

    median: float
    low: float
    high: float
    quartiles: tuple[float, float]
    repeats: int

    @property
    def spread(self) -> float:
        """Interquartile range over the median, a fraction."""
        return (self.quartiles[1] - self.quartiles[0]) / self.median

    @property
    def quiet(self) -> bool:
        """Whether the spread is small enough to be relied on (below QUIET_SPREAD)."""
        return self.spread < QUIET_SPREAD

    @property
    def verdict(self) -> str:
        """`faster`, `slower`, or `inconclusive` where interval or quartiles cover 1."""
        if max(self.high, self.quartiles[1]) < 1.0:
            return "faster"
        if min(self.low, self.quartiles[0]) > 1.0:
            return "slower"
        return "inconclusive"

    @classmethod
    def of(cls, ratios: np.ndarray) -> Ratio:
        """From the ratios of single rounds, shape (repeats,)."""
        ordered = np.sort(np.asarray(ratios, float))
        n = ordered.size
        rank = median_rank(n)
        low, high = np.quantile(ordered, (0.25, 0.75))
        return cls(
            float(np.median(ordered)), float(ordered[rank]), float(ordered[n - 1 - rank]),
            (float(low), float(high)), n,
        )  # fmt: skip


def median_rank(n: int, level: float = 0.95) -> int:
    """Rank r (from 0) so that the r-th smallest and largest of n enclose the median at `level`.

    The count of samples below the median is binomial(n, 1/2); 0 (the extremes) where n is too
    small for the level (below 6 for 95 %).
    """
    tail, rank = 0.0, 0
    for k in range(n // 2):
        tail += comb(n, k) / 2.0**n
        if 2.0 * tail > 1.0 - level:
            break
        rank = k
    return rank


@dataclass(frozen=True)
class Timings:
    """What `interleave` measured, by candidate."""

    rows: Mapping[str, Timing]

    def __getitem__(self, name: str) -> Timing:
        if name not in self.rows:
            raise unknown("timed candidate", name, self.rows)
        return self.rows[name]

    def ratio(self, name: str, to: str) -> Ratio:
        """Seconds of `name` over seconds of `to`, from rounds that ran side by side."""
        return Ratio.of(self[name].seconds / self[to].seconds)

    def speedup(self, name: str, over: str) -> Ratio:
        """How many times faster `name` is than `over`: the inverse of their ratio."""
        return Ratio.of(self[over].seconds / self[name].seconds)

    def verdict(self, name: str, than: str) -> str:
        """`faster`, `slower` or `inconclusive`."""
        return self.ratio(name, than).verdict


class Clock:
    """Seconds of `inner` calls on the processor that the function keeps busy.

    `cpu` and whatever has no clock of its own is read from the wall; `cuda` from events on the
    device's stream, so that queued kernels are counted and the host's waiting is not.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._torch = None
        if device.startswith("cuda"):
            import torch

            if not torch.cuda.is_available():
                raise NarrowsError(f"device {device!r} was asked for, but torch sees no CUDA GPU")
            self._torch = torch

    def read(self, call: Callable[[], object], inner: int) -> float:
        """Seconds of one call, the mean of `inner` in a row."""
        if self._torch is None:
            begin = perf_counter()
            for _ in range(inner):
                call()
            return (perf_counter() - begin) / inner
        cuda = self._torch.cuda
        start, stop = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        cuda.synchronize()
        start.record()
        for _ in range(inner):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3 / inner


def inner_calls(clock: Clock, call: Callable[[], object], min_seconds: float) -> int:
    """How many calls in a row last `min_seconds`; found by doubling, which also warms up."""
    inner = 1
    while True:
        took = clock.read(call, inner) * inner
        if took >= min_seconds:
            return inner
        grow = 2.0 if took <= 0 else min(max(1.2 * min_seconds / took, 1.2), 8.0)
        inner = ceil(inner * grow)


def best(
    call: Callable[[], object], seconds: float = 0.1, device: str = "cpu", least: int = 3
) -> float:
    """Seconds of one call in the fastest of the rounds that fit into `seconds`, `least` at least.

    For rates that are limits: what was reached once can be reached. Not for comparisons.
    """
    clock = Clock(device)
    inner = inner_calls(clock, call, min(1e-3, seconds / 10))
    end = perf_counter() + seconds
    found = [clock.read(call, inner)]
    while len(found) < least or perf_counter() < end:
        found.append(clock.read(call, inner))
    return min(found)


def part(calls: int, turn: int, turns: int) -> int:
    """How many of a round's calls fall to one of its turns: spread evenly, a lone one amid."""
    if calls < turns:
        return int(any((2 * j + 1) * turns // (2 * calls) == turn for j in range(calls)))
    return (turn + 1) * calls // turns - turn * calls // turns


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    repeats: int = 31,
    min_seconds: float = 1e-3,
    device: str = "cpu",
    warmup: int = 2,
    progress: Progress | None = None,
    turns: int = 1,
) -> Timings:
    """Time candidates in turn: every round runs each of them once, in alternating order.

    min_seconds: shortest time a round spends on a candidate; quick calls are repeated within it.
    turns: into how many a round divides those repeated calls, A B A B, so that what slows the
    machine for a moment slows all candidates alike.
    warmup: calls of each before anything is read. The garbage collector is held off in between.
    Raises NarrowsError for no candidates or repeats below 1.
    """
    if not candidates:
        raise NarrowsError("nothing to time: give at least one candidate")
    if repeats < 1:
        raise NarrowsError(f"repeats must be at least 1, not {repeats}")
    clock = Clock(device)
    names = list(candidates)
    for name in names:
        for _ in range(warmup):
            candidates[name]()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        inner = {name: inner_calls(clock, candidates[name], min_seconds) for name in names}
        seconds = {name: np.empty(repeats) for name in names}
        for i in range(repeats):
            spent = dict.fromkeys(names, 0.0)
            for turn in range(turns):
                for name in names if (i + turn) % 2 == 0 else reversed(names):
                    calls = part(inner[name], turn, turns)
                    if calls:
                        spent[name] += clock.read(candidates[name], calls) * calls
            for name in names:
                seconds[name][i] = spent[name] / inner[name]
            if progress is not None:
                progress((i + 1) / repeats, f"round {i + 1} of {repeats}")
    finally:
        if collecting:
            gc.enable()
    return Timings({name: Timing(name, seconds[name], inner[name]) for name in names})
