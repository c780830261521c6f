"""Interleaved timing: rounds, order, intervals, verdicts, and what it leaves behind."""

from __future__ import annotations

import gc
from math import comb

import numpy as np
import pytest

from narrows.core.errors import NarrowsError
from narrows.measure.timing import Clock, Ratio, best, interleave, median_rank, part, passive_openmp


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch):
    """A clock whose readings are given by the candidates themselves: seconds of one call."""

    def read(self: Clock, call, inner: int) -> float:
        return float(np.mean([call() for _ in range(inner)]))

    monkeypatch.setattr(Clock, "read", read)


def test_candidates_take_turns_in_alternating_order(scripted):
    seen: list[str] = []

    def make(name: str):
        def call() -> float:
            seen.append(name)
            return 1.0

        return call

    interleave({"a": make("a"), "b": make("b")}, repeats=4, min_seconds=0.5, warmup=0)
    assert "".join(seen) == "ab" + "abba" * 2  # one call each to find how many fill a round


def test_a_round_may_alternate_in_turns(scripted):
    seen: list[str] = []

    def make(name: str, seconds: float):
        def call() -> float:
            seen.append(name)
            return seconds

        return call

    timings = interleave({"a": make("a", 1.0), "b": make("b", 9.0)}, repeats=1, min_seconds=4.0,
                         warmup=0, turns=4)  # fmt: skip
    assert timings["a"].inner >= 4
    assert timings["b"].inner == 1
    ran = "".join(seen[-timings["a"].inner - 1 :])
    assert 0 < ran.index("b") < len(ran) - 1
    assert timings["a"].median == 1.0
    assert timings["b"].median == 9.0


@pytest.mark.parametrize(
    ("calls", "turns"), [(1, 4), (2, 4), (3, 4), (4, 4), (7, 4), (9, 2), (5, 1)]
)
def test_turns_share_out_all_calls(calls: int, turns: int):
    parts = [part(calls, turn, turns) for turn in range(turns)]
    assert sum(parts) == calls
    assert max(parts) - min(parts) <= 1


def test_short_calls_are_repeated_until_a_round_is_long_enough(scripted):
    timings = interleave(
        {"short": lambda: 1e-4, "long": lambda: 1.0}, repeats=3, min_seconds=1e-2, warmup=0
    )
    assert timings["short"].inner >= 100
    assert timings["long"].inner == 1
    assert timings["short"].median == pytest.approx(1e-4)


def test_ratios_cancel_what_slows_a_whole_round(scripted):
    drift = iter(np.repeat(np.geomspace(1, 5, 40), 2))
    pace = {"now": 1.0}

    def call(cost: float):
        def run() -> float:
            pace["now"] = float(next(drift, 5.0))
            return cost * pace["now"]

        return run

    timings = interleave({"a": call(2.0), "b": call(1.0)}, repeats=31, min_seconds=0, warmup=0)
    assert timings["a"].spread > 0.5
    assert timings.ratio("a", to="b").median == pytest.approx(2.0, rel=0.1)
    assert timings.ratio("a", to="b").spread < 0.1
    assert timings.speedup("b", over="a").median == pytest.approx(2.0, rel=0.1)
    assert timings.verdict("b", than="a") == "faster"
    assert timings.verdict("a", than="b") == "slower"


def test_a_spread_that_covers_the_difference_is_inconclusive():
    rng = np.random.default_rng(0)
    assert Ratio.of(0.97 * rng.lognormal(0, 0.2, 31)).verdict == "inconclusive"
    assert Ratio.of(0.80 * rng.lognormal(0, 0.05, 31)).verdict == "faster"
    assert Ratio.of(np.array([0.9, 0.9, 0.9, 1.1, 0.9])).verdict == "inconclusive"


@pytest.mark.parametrize("n", [5, 6, 9, 31, 100])
def test_the_interval_of_the_median_holds_its_level(n: int):
    rank = median_rank(n)
    missed, narrower = (2 * sum(comb(n, k) for k in range(rank + i)) / 2**n for i in (1, 2))
    assert missed <= 0.05 or rank == 0
    assert narrower > 0.05


def test_the_interval_covers_the_median_as_often_as_it_says():
    rng = np.random.default_rng(1)
    found = [Ratio.of(rng.lognormal(0, 0.3, 31)) for _ in range(2000)]
    assert 0.94 < np.mean([r.low <= 1.0 <= r.high for r in found]) < 0.99


def test_the_collector_is_held_off_and_comes_back(scripted):
    states: list[bool] = []

    def call() -> float:
        states.append(gc.isenabled())
        return 1.0

    interleave({"a": call}, repeats=3, min_seconds=0, warmup=0)
    assert not any(states)
    assert gc.isenabled()


def test_an_interrupt_passes_through_and_leaves_the_collector_on():
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleave({"a": stop}, warmup=0)
    assert gc.isenabled()


def test_bad_calls_are_one_sentence():
    with pytest.raises(NarrowsError, match="nothing to time"):
        interleave({})
    with pytest.raises(NarrowsError, match="repeats"):
        interleave({"a": lambda: None}, repeats=0)
    with pytest.raises(NarrowsError, match="did you mean"):
        interleave({"dense": lambda: None}, repeats=1, min_seconds=0)["dens"]
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        with pytest.raises(NarrowsError, match="CUDA"):
            interleave({"a": lambda: None}, device="cuda")


def test_real_seconds_on_the_real_clock():
    small, large = np.ones(20_000), np.ones(2_000_000)
    timings = interleave(
        {"small": lambda: small.sum(), "large": lambda: large.sum()}, repeats=9, min_seconds=1e-4
    )
    assert timings.verdict("small", than="large") == "faster"
    assert timings["small"].best <= timings["small"].median
    assert best(lambda: small.sum(), 0.01) < timings["large"].median


def test_openmp_is_asked_in_time(monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setitem(sys.modules, "torch", object())
    assert passive_openmp() is False  # too late
    monkeypatch.setitem(sys.modules, "torch", None)
    assert passive_openmp() is True
    monkeypatch.setitem(sys.modules, "torch", object())
    assert passive_openmp() is True  # it was asked before
