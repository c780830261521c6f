"""The dissection: its inference against known caches, its refusals, and its GPU kernels' sums."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

from narrows.chips import _cache_inference as inference
from narrows.chips import _gemm_model, _gpu_probes, _minplus, _pchase
from narrows.chips._settle import disagreement, settle
from narrows.chips.hopper import CacheLevel, CacheSimulator, Hopper, NoisyRun, compare
from narrows.core.errors import NarrowsError
from narrows.core.method import Reading
from narrows.machines.load import dumps, load, loads

ONE = CacheSimulator((CacheLevel(4096, 4, 64, 4.0),), 50.0)


def test_a_lap_that_fits_costs_hits_and_one_line_more_costs_its_set():
    fits, over = (np.arange(n) * 64 for n in (64, 65))
    assert ONE.latency(fits) == 4.0
    assert ONE.latency(over) == pytest.approx((60 * 4 + 5 * 50) / 65)


def test_least_recently_used_goes_first():
    # three lines of a two-way set, one of them touched between the others: it alone stays
    two = CacheSimulator((CacheLevel(128, 2, 64, 1.0),), 10.0)
    # 128 throws out 64, which throws out 128: in the steady lap both loads of 0 are hits
    assert two.latency(np.array([0, 64, 0, 128])) == (1 + 10 + 1 + 10) / 4


@pytest.mark.parametrize(("size", "ways", "line"), [(3072, 3, 64), (16384, 16, 128), (2048, 1, 32)])
def test_a_cache_is_recovered(size: int, ways: int, line: int):
    probe = CacheSimulator((CacheLevel(size, ways, line, 7.0),), 70.0)
    first, last = Hopper("cpu").levels(probe, 512, 1 << 17)
    assert (first.size, first.ways, first.line) == (size, ways, line)
    assert (first.latency, last.latency) == (7.0, 70.0)


def test_ways_hidden_by_an_inner_level_are_seen():
    levels = (CacheLevel(2048, 8, 64, 3.0), CacheLevel(65536, 2, 64, 12.0))
    found = Hopper("cpu").levels(CacheSimulator(levels, 80.0), 512, 1 << 18)
    assert [f.ways for f in found] == [8, 2, 0]


def test_noise_needs_a_tolerance_and_gets_along_with_one():
    class Noisy:
        granule = 8
        rng = np.random.default_rng(1)

        def latency(self, offsets: np.ndarray) -> float:
            return ONE.latency(offsets) * self.rng.uniform(0.98, 1.02)

    with pytest.raises(NarrowsError, match="no level between"):
        inference.levels(Noisy(), 512, 1 << 15)
    found = inference.levels(Noisy(), 512, 1 << 15, tolerance=0.1)
    assert found[0].size == pytest.approx(4096, rel=0.05)
    assert found[-1].latency == pytest.approx(50, rel=0.03)


def test_measuring_a_probe_gives_its_levels():
    reading = Hopper("cpu").measure(ONE)
    assert (reading.value, reading.unit) == (4.0, "cycle")
    assert [level["size"] for level in reading.facts["levels"]] == [4096, 0]


def test_impossible_caches_are_refused():
    with pytest.raises(NarrowsError, match="cannot be cut"):
        CacheLevel(1000, 3, 64, 1.0)
    with pytest.raises(NarrowsError, match="must rise"):
        CacheSimulator((CacheLevel(4096, 4, 64, 40.0),), 4.0)
    with pytest.raises(NarrowsError, match="at least one"):
        CacheSimulator((), 4.0)


def test_a_chase_visits_every_offset_once_a_lap():
    order = inference.shuffled(40, 64)
    assert sorted(order) == list(range(0, 40 * 64, 64))
    words = np.zeros(40 * 8, np.uint64)
    words[order // 8] = np.roll(order, -1) // 8
    at, seen = int(order[0]) // 8, []
    for _ in range(40):
        seen.append(at)
        at = int(_pchase.loops().chase(words, at, 1))
    assert at == order[0] // 8
    assert sorted(seen) == [8 * i for i in range(40)]


def test_the_clock_is_the_chain_it_says():
    x = 5
    for i in range(7):
        x = ((x + i) ^ 0x9E3779B97F4A7C15) % 2**64
    assert int(_pchase.loops().clock(5, 7)) == x


def test_bad_offsets_are_refused():
    with pytest.raises(NarrowsError, match="multiples of 8"):
        _pchase.Chaser().cycles(np.array([0, 12]))


def test_settling():
    quiet = np.array([[10.0, 10.1, 9.9], [10.2, 10.0, 10.4]])
    found = settle(quiet, "byte/s", "how", scale=20.0, inverse=True)
    assert found.interval[0] <= found.value <= found.interval[1]
    assert found.value == pytest.approx(2.0, rel=0.02)
    assert found.facts["method"] == "how"
    assert disagreement(quiet) == pytest.approx(0.02)
    with pytest.raises(NoisyRun, match="disagree by 30%"):
        settle(quiet * np.array([[1.0], [1.3 / 1.02]]), "byte/s", "how")
    with pytest.raises(NarrowsError, match="cannot be checked"):
        settle(quiet[:1], "byte/s", "how")


def test_a_nan_is_not_published():
    with pytest.raises(NoisyRun):
        settle(np.full((2, 2), np.nan), "byte/s", "how")


def made() -> Hopper:
    return Hopper("cpu")


def reading(value: float, unit: str) -> Reading:
    return Reading(value, unit, (0.9 * value, 1.1 * value), None, {"method": "by hand"})


def test_a_machine_says_what_was_measured_and_compares():
    machine = made()._machine(
        {"read.dram": reading(1e10, "byte/s"), "compute.fp32": reading(1e11, "flop/s"),
         "minplus.fp32": reading(5e10, "op/s"), "latency.l1": reading(5, "cycle")}, "dram",
    )  # fmt: skip
    assert machine.resources["minplus.fp32"].unit == "op/s"
    assert "9e+10 to 1.1e+11 flop/s, by hand" in machine.resources["compute.fp32"].source
    assert not any("latency" in name for name in machine.resources)
    rows = {row.name: row for row in compare(machine, load("h100-pcie"))}
    assert set(rows) == {"dram", "compute.fp32"}
    assert rows["dram"].ratio == pytest.approx(1e10 / 2e12)
    assert "by hand" in str(rows["dram"])


def test_unmeasured_rows_are_left_out_and_unmeasured_machines_refused():
    machine = made()._machine(
        {"read.dram": reading(1e10, "byte/s"), "compute.fp32": reading(1e11, "flop/s")}, "dram"
    )
    listed = replace(machine.resources["dram"], source="datasheet")
    partly = replace(machine, resources={**machine.resources, "dram": listed})
    assert [row.name for row in compare(partly, load("a100-40"))] == ["compute.fp32"]
    with pytest.raises(NarrowsError, match="no measured figure"):
        compare(load("a100-40"), load("h100-pcie"))
    with pytest.raises(NarrowsError, match="published one"):
        compare(machine, machine)


def test_readings_of_this_processor():
    chip = Hopper("cpu", repeats=2, rounds=3)
    try:
        found = chip.dissect(["latency.l1", "minplus.fp32"])
    except NoisyRun as why:
        pytest.skip(str(why))
    assert set(found.readings) | set(found.refused) == {
        "read.dram", "compute.fp32", "latency.l1", "minplus.fp32",
    }  # fmt: skip
    for one in found.readings.values():
        assert 0 < one.interval[0] <= one.value <= one.interval[1]
        assert one.facts["disagreement"] <= chip.limit
    assert loads(dumps(found.machine), "itself") == found.machine


def test_bad_questions_are_refused():
    with pytest.raises(NarrowsError, match="quantity"):
        Hopper("cpu").measure("latency.l9")
    with pytest.raises(NarrowsError, match="backend"):
        Hopper("rocm")
    with pytest.raises(NarrowsError, match="two repeats"):
        Hopper(repeats=1)
    with pytest.raises(NarrowsError, match="limit"):
        Hopper(limit=1.5)
    with pytest.raises(NarrowsError, match="sweep"):
        Hopper("cpu").sweep("colour", [1])


def test_a_sweep_gives_a_reading_for_each_size():
    try:
        rows = Hopper("cpu", repeats=2, rounds=3).sweep("latency", [2048, 8192])
    except NoisyRun as why:
        pytest.skip(str(why))
    assert [size for size, _ in rows] == [2048, 8192]
    assert all(r.value > 2 for _, r in rows)


def test_without_a_gpu_it_says_so():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(NarrowsError, match="CUDA GPU"):
        Hopper().measure("compute.bf16")


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("kitten", "sitting", 3), ("", "ab", 2), ("x", "x", 0)]
)
def test_edit_distance(a: str, b: str, distance: int):
    x, y = (np.array([ord(c) for c in word], np.int64) for word in (a, b))
    row = np.zeros(len(y) + 1, np.int64)
    assert _minplus.kernels().edit_distance(x, y, row) == distance


def test_capacity_of_a_cache_from_random_reads():
    sizes = 4e6 * 2.0 ** np.arange(0, 7, 0.25)
    missed = np.maximum(0, 1 - 50e6 / sizes)
    cost = 1e-13 * (1 - missed) + 2.5e-13 * missed
    noisy = cost * np.random.default_rng(0).normal(1, 0.02, len(cost))
    size, near, far = _gpu_probes.capacity(sizes, noisy)
    assert size == pytest.approx(50e6, rel=0.1)
    assert (near, far) == (pytest.approx(1e-13, rel=0.05), pytest.approx(2.5e-13, rel=0.05))
    with pytest.raises(NarrowsError, match="no cache"):
        _gpu_probes.capacity(sizes, np.full(len(sizes), 1e-13))


def test_crossover():
    sizes = np.array([1024, 2048, 4096])
    assert _gpu_probes.crossover(sizes, np.array([2.0, 0.5, 0.4])) == pytest.approx(1024 * 2**0.5)
    assert _gpu_probes.crossover(sizes, np.array([0.9, 0.5, 0.4])) == 1024
    assert _gpu_probes.crossover(sizes, np.array([2.0, 1.5, 1.4])) is None


def test_the_modelled_layer_casts():
    plain, cast = (_gemm_model.layer(64, "fp8", c) for c in (False, True))
    assert len(plain.phases[0].ops) == 1
    assert len(cast.phases[0].ops) == 3
    assert plain.bytes("activation") == 64 * 64


KERNELS = """
import numpy as np, torch
from narrows.chips import _gpu_kernels as k
from narrows.chips._cache_inference import shuffled
order = shuffled(50, 2)
host = np.zeros(int(order.max()) + 1, np.int64)
host[order] = np.roll(order, -1)
out = torch.empty(1, dtype=torch.int64)
k.chase[(1,)](torch.from_numpy(host), out, int(order[0]), 10)
assert out.item() == order[11]
words = torch.arange(1000, dtype=torch.int32)
sums = torch.zeros(4, dtype=torch.int32)
k.read_all[(4,)](words, sums, 1000, BLOCK=64, PASSES=4)
assert int(sums.sum()) == 499500
blocks = torch.ones(100 * 64)
out = torch.empty(4 * 64)
k.read_blocks[(4,)](blocks, out, 100, 7, BLOCK=64)
assert bool((out == 7).all())
a = torch.arange(1, 129, dtype=torch.int32)
out = torch.zeros_like(a)
k.minplus[(2,)](a, out, 5, BLOCK=64)
assert bool((out == 24 * a + 6).all())
k.multiply_add[(2,)](a, out, 1, BLOCK=64)
assert bool((out == (4 * a + 6) * a + 4 * (3 * a + 1000000)).all())
print("sums agree")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_gpu_kernels_compute_what_they_say():
    # a process of its own: triton decides at import whether it interprets
    done = subprocess.run(
        [sys.executable, "-c", KERNELS], env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "sums agree" in done.stdout, done.stderr[-2000:]
