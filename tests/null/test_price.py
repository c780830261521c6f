"""The law, by hand: rates, levels, calibration, caches, links, and one call for many cases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from narrows.core.calibration import Calibration, Error
from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.core.price import price
from narrows.core.resource import Kind, Resource
from narrows.core.tensor import Tensor
from narrows.core.workload import Op, Phase, Use, Workload
from tests.null import toys


def test_memory_bound_and_compute_bound():
    small, large = toys.product(1.0), toys.product(1000.0)
    machine = toys.machine()
    assert price(small, machine)[0].total_seconds == pytest.approx(8.8)
    flops, moved = 2 * 1000 * 8 * 4, 64 + 16000 + 8000
    assert price(large, machine)[0].total_seconds == pytest.approx(max(flops / 100, moved / 10))


def test_one_call_prices_many_cases_like_single_calls():
    rows = np.array([1.0, 3.0, 64.0, 5000.0])
    together = price(toys.product(rows), toys.machine())[0]
    alone = [price(toys.product(r), toys.machine())[0].total_seconds for r in rows]
    assert together.total_seconds.tolist() == pytest.approx(alone)
    assert together.share()["dram"].shape == rows.shape


def test_calibration_slows_and_the_limit_stays():
    slow = toys.machine().calibrated(Calibration("matmul", compute=0.5, memory=0.5, fixed=3.0))
    priced = price(toys.product(), slow)[0]
    assert priced.total_seconds == pytest.approx(8.8 / 0.5 + 3.0)
    assert priced.total_limit == pytest.approx(8.8)
    assert priced.terms["dispatch"].sum() == pytest.approx(3.0)


def test_nothing_is_calibrated_to_beat_its_datasheet():
    for wrong in ({"compute": 1.2}, {"memory": 0.0}, {"fixed": -1.0}, {"fixed": float("nan")}):
        with pytest.raises(NarrowsError):
            Calibration("matmul", **wrong)


def test_predictions_never_beat_the_limit():
    rows = np.geomspace(1, 1e5, 50)
    machine = toys.machine(units=3).calibrated(
        Calibration("matmul", 0.9, 0.8, 0.01, tiles=((16, 4),))
    )
    priced = price(toys.product(rows), machine)[0]
    assert np.all(priced.seconds >= priced.limit)


def test_repeats_and_steps_multiply():
    once = toys.product(2.0)
    often = toys.product(2.0, layers=7.0)
    steps = replace(often, phases=(replace(often.phases[0], steps=3.0),))
    one = price(once, toys.machine())[0].total_seconds
    assert price(often, toys.machine())[0].total_seconds == pytest.approx(7 * one)
    assert price(steps, toys.machine())[0].total_seconds == pytest.approx(21 * one)


def all_reduce(peers: int) -> Workload:
    tensor = Tensor("x", "activation", {"token": 8}, toys.FP16)
    op = Op("sum", "all_reduce", (Use("x"),), (Use("x"),), shape={"peers": peers})
    return Workload("reduce", {"x": tensor}, (Phase("forward", (op,)),))


def test_all_reduce_sends_twice_the_message_less_one_share():
    priced = price(all_reduce(4), toys.machine())[0]
    assert priced.total_bytes()["wire"] == pytest.approx(16 * 2 * 3 / 4)
    assert priced.total_seconds == pytest.approx(24 / 2 + 0.5)  # 0.5 s latency
    assert priced.total_limit == pytest.approx(24 / 2)


def test_no_link_is_one_sentence():
    lonely = toys.machine(tiers={"device": "dram"}, links={})
    with pytest.raises(NarrowsError, match="no link"):
        price(all_reduce(2), lonely)


def test_a_missing_tier_is_one_sentence():
    work = toys.product()
    moved = work.with_tensors([work.tensors["w"].with_(tier="drive")])
    with pytest.raises(NarrowsError, match="drive"):
        price(moved, toys.machine())


def test_a_small_step_is_served_by_the_cache_and_a_large_one_is_not():
    cached = toys.machine(
        caches=("l2",),
        resources={
            **toys.machine().resources,
            "l2": Resource("l2", Kind.RATE, 1000.0, "byte/s"),
            "l2.capacity": Resource("l2.capacity", Kind.LEVEL, 500.0, "byte"),
        },
    )
    small = price(toys.product(1.0), cached)[0].total_bytes()
    large = price(toys.product(1000.0), cached)[0].total_bytes()
    assert small["l2"] > 0.9 * (64 + 16 + 8)
    assert large["dram"] > 0.9 * (64 + 16000 + 8000)


def test_rows_add_up_to_the_phase():
    phase = Case(toys.product(50.0, 3.0), toys.machine()).bound().phases[0]
    assert sum(r.seconds for r in phase.rows) == pytest.approx(phase.seconds)
    assert sum(phase.share.values()) == pytest.approx(1.0)
    assert phase.energy_joules == pytest.approx(5.0 * phase.seconds)


def test_what_does_not_fit_is_said():
    found = Case(toys.product(1.0, layers=100.0), toys.machine()).bound()
    assert found.fits is False
    level = found.phases[0].levels[0]
    assert level.need > level.have == 1000.0
    unknown = toys.machine(
        resources={k: v for k, v in toys.machine().resources.items() if k != "dram.capacity"}
    )
    assert Case(toys.product(), unknown).bound().fits is None


def test_the_error_is_that_of_the_calibration_and_absent_without_one():
    assert Case(toys.product(), toys.machine()).bound().phases[0].error is None
    error = Error(0.05, 0.06, 0.12, 40)
    known = toys.machine().calibrated(Calibration("matmul", 0.9, 0.9, 0.0, error=error))
    found = Case(toys.product(), known).bound()
    assert found.phases[0].error == pytest.approx(0.12)
    assert "12%" in found.trust


def test_error_of_predictions():
    error = Error.of([1.0, 2.2, 2.7], [1.0, 2.0, 3.0])
    assert (error.median, error.n) == (pytest.approx(0.1), 3)
    with pytest.raises(NarrowsError):
        Error.of([], [])
