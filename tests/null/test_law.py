"""The law of tiles, waves, blocks and hops: by hand, and what must hold for every shape."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.core import law
from narrows.core.calibration import Calibration
from narrows.core.errors import NarrowsError
from narrows.core.law import run

UNITS = 100
PEAK = 1e14
RATE = 1e12
SIZES = st.floats(1, 1e5).map(np.ceil)


def product(m, n, k, tiles=law.GEMM_TILES, compute=1.0, memory=1.0, fixed=0.0):
    shape = {"m": m, "n": n, "k": k, "batch": 1.0}
    flops, moved = 2.0 * m * n * k, 2.0 * (m * k + k * n + m * n)
    calibration = Calibration("matmul", compute, memory, fixed, tiles)
    ran = run("matmul", flops / PEAK, moved / RATE, shape, calibration, UNITS, flops, RATE)
    return ran, np.maximum(flops / PEAK, moved / RATE)


def test_without_tiles_it_is_the_roofline():
    ran, _ = product(512.0, 512.0, 4096.0, tiles=(), compute=0.5, memory=0.25, fixed=1e-6)
    assert ran.compute == pytest.approx(2 * 512 * 512 * 4096 / PEAK / 0.5)
    assert ran.memory == pytest.approx(2 * (2 * 512 * 4096 + 512 * 512) / RATE / 0.25)
    assert ran.seconds == pytest.approx(max(ran.compute, ran.memory) + 1e-6)


def test_a_wave_more_costs_a_whole_wave():
    one = ((128, 128),)
    full, _ = product(128.0 * 10, 128.0 * 10, 192.0, tiles=one)  # 100 tiles, 100 units, k too
    over, _ = product(128.0 * 10 + 1, 128.0 * 10, 192.0, tiles=one)  # short to split; 110 tiles
    twice, _ = product(128.0 * 20, 128.0 * 10, 192.0, tiles=one)  # 200 tiles
    assert over.compute / full.compute > 1.6
    assert 0.8 * twice.compute < over.compute < twice.compute


def test_few_tiles_are_split_along_k():
    ran, _ = product(64.0, 1024.0, 16384.0, tiles=((64, 64),))  # 16 tiles
    whole = 2 * 64 * 1024 * 16384 / PEAK * (UNITS / 16)
    assert ran.compute < 0.5 * whole


@given(SIZES, SIZES, SIZES, st.floats(0.05, 1), st.floats(0.05, 1))
@settings(deadline=None, max_examples=200)
def test_no_product_beats_the_limit(m, n, k, compute, memory):
    ran, limit = product(m, n, k, compute=compute, memory=memory)
    assert ran.seconds >= limit * (1 - 1e-12)
    assert ran.seconds >= max(ran.compute, ran.memory) * (1 - 1e-9)
    assert np.isfinite(ran.seconds)


@given(SIZES, SIZES, st.integers(1, 512), st.floats(0.05, 1), st.booleans())
@settings(deadline=None, max_examples=200)
def test_no_attention_beats_the_limit(queries, past, heads, rate, decoding):
    kind = "attention_decode" if decoding else "attention_prefill"
    m = 1.0 if decoding else queries
    n = past + m
    flops = 4.0 * heads * 128 * (m * past + m * (m + 1) / 2)
    moved = 4.0 * heads * 128 * (m + n)
    shape = {"m": m, "n": n, "k": 128.0, "batch": float(heads)}
    tiles = law.DECODE_TILES if decoding else ((64, 128),)
    c = Calibration(kind, rate, rate, 1e-6, tiles, step=1e-6)
    ran = run(kind, flops / PEAK, moved / RATE, shape, c, UNITS, flops, RATE)
    assert ran.seconds >= max(flops / PEAK, moved / RATE)
    assert np.isfinite(ran.seconds)


def test_a_kernel_of_whole_tiles_does_the_masked_half_too():
    shape = {"m": 6400.0, "n": 6400.0, "k": 128.0, "batch": 32.0}
    flops = 4 * 32 * 128 * 6400 * 6401 / 2
    plain = run("attention_prefill", flops / PEAK, 0.0, shape, Calibration(""), UNITS, flops)
    whole = run("attention_prefill", flops / PEAK, 0.0, shape,
                Calibration("", tiles=((64, 128),)), UNITS, flops)  # fmt: skip
    assert whole.seconds == pytest.approx(2 * plain.seconds, rel=0.01)
    narrow = run("attention_prefill", flops / 50 / PEAK, 0.0, shape,
                 Calibration("", tiles=((64, 128),)), UNITS, flops / 50)  # fmt: skip
    assert narrow.seconds <= 2.1 * plain.seconds / 50  # a window is skipped, not walked


def test_decode_waits_for_the_last_wave():
    def seconds(groups):
        shape = {"m": 1.0, "n": 4096.0, "k": 128.0, "batch": groups}
        moved = groups * 4 * 4096 * 128.0
        c = Calibration("", memory=0.9, tiles=law.DECODE_TILES)
        return run("attention_decode", 0.0, moved / RATE, shape, c, UNITS).seconds / moved

    assert seconds(UNITS * 2 + 1.0) > 1.2 * seconds(UNITS * 2.0)


def test_groups_come_from_heads_that_share_keys():
    c = Calibration("", tiles=law.DECODE_TILES, step=1e-6)
    of = {"m": 1.0, "n": 512.0, "k": 64.0, "batch": 640.0}
    told = run("attention_decode", 0.0, 1e-4, {**of, "groups": 80.0}, c, UNITS)
    derived = run("attention_decode", 0.0, 1e-4, {**of, "heads": 64.0, "kv_heads": 8.0}, c, UNITS)
    assert told.seconds == pytest.approx(derived.seconds)


def test_a_ring_pays_for_its_hops():
    c = Calibration("all_reduce", fixed=1e-5, step=1e-6)
    for peers in (2, 8):
        ran = run("all_reduce", 0.0, 1e-3, {"peers": peers}, c, UNITS)
        assert ran.seconds == pytest.approx(1e-3 + 1e-5 + 2 * (peers - 1) * 1e-6)


def test_many_shapes_at_once_are_the_single_ones():
    m = np.array([1.0, 63.0, 64.0, 129.0, 4096.0])[:, None]
    n = np.array([512.0, 11008.0])[None]
    together, _ = product(m, n, 4096.0)
    for i, j in np.ndindex(5, 2):
        alone, _ = product(m[i, 0], n[0, j], 4096.0)
        assert together.seconds[i, j] == pytest.approx(float(alone.seconds))


def test_constants_out_of_range_are_refused():
    for wrong in ({"step": -1.0}, {"step": float("inf")}, {"tiles": ((0, 64),)}):
        with pytest.raises(NarrowsError):
            Calibration("matmul", **wrong)
