"""Transfers of attention: programs in an enforced memory, closed forms, bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.attention._lru import lru_words
from narrows.attention.attention_io import AttentionIO, CapacityExceeded, TwoLevelMemory
from narrows.claims import attention_io as claims
from narrows.core.claim import Claim
from narrows.core.errors import NarrowsError
from narrows.core.traffic import (
    PROGRAMS,
    Attention,
    best_program,
    least_bytes,
    least_memory,
    least_words,
)

CLAIMS = [c for c in vars(claims).values() if isinstance(c, Claim)]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.name)
def test_claim_holds(claim: Claim):
    assert claim.holds(claim.figure().value)


def test_the_mutant_is_noticed():
    with claims.mutant() as name:
        found = next(c for c in CLAIMS if c.name == name)
        assert not found.holds(found.figure().value)
    assert found.holds(found.figure().value)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 14), st.integers(1, 14), st.integers(1, 5), st.integers(1, 5),
    st.integers(7, 200), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_any_shape_in_any_memory(n: int, m: int, dk: int, dv: int, memory: int, seed: int):
    rng = np.random.default_rng(seed)
    q, k, v = rng.normal(size=(n, dk)), rng.normal(size=(m, dk)), rng.normal(size=(m, dv))
    scores = q @ k.T / np.sqrt(dk)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    expected = weights / weights.sum(axis=1, keepdims=True) @ v
    ran = AttentionIO(memory).run(q, k, v)
    np.testing.assert_allclose(ran.output, expected, atol=1e-10)
    assert ran.peak == ran.program.resident <= memory
    assert least_words(Attention(n, m, dk, dv), memory) <= ran.words == ran.program.words


def test_the_memory_refuses_counts_and_forgets():
    memory = TwoLevelMemory(10, {"X": np.arange(12.0), "Y": np.zeros(3)})
    with memory.load("X", slice(0, 8)) as tile:
        assert memory.resident == 8
        with pytest.raises(CapacityExceeded, match="3 more words do not fit: 8 of 10"):
            memory.space(3).__enter__()
        kept = tile
        memory.store("Y", tile[:3], slice(0, 3))
        with pytest.raises(NarrowsError, match="never given back"):
            memory.result("Y")
        with pytest.raises(NarrowsError, match="does not fit"):
            memory.store("Y", tile[:2], slice(0, 3))
    assert np.isnan(kept).all()
    assert (memory.loads, memory.stores, memory.words, memory.peak) == (8, 3, 11, 8)
    assert memory.result("Y").tolist() == [0.0, 1.0, 2.0]


def test_a_larger_memory_holds_everything_and_moves_the_floor():
    a = Attention(100, 100, 8, 8)
    assert best_program(a, 10**6).words == a.floor == 100 * 2 * 16
    assert least_words(a, 10**6) == a.floor


def test_the_bound_for_numbers_worked_by_hand():
    # Segments of T = M: at most (2M)^2/(4d) + M^1.5 products, so M (ceil(2 N^2 d / that) - 1).
    n, d, memory = 1024, 64, 4096
    by_hand = memory * (np.ceil(2 * n * n * d / ((2 * memory) ** 2 / (4 * d) + memory**1.5)) - 1)
    assert by_hand <= least_words(Attention(n, n, d, d), memory) <= 1.3 * by_hand


def test_a_causal_mask_and_grouped_heads_lower_the_bound():
    full = Attention(4096, 4096, 64, 64)
    causal = Attention(4096, 4096, 64, 64, pairs=4096 * 4097 / 2)
    assert 0.45 < float(least_words(causal, 512) / least_words(full, 512)) < 0.55
    apart = 4 * least_words(Attention(512, 512, 64, 64), 10**5)
    shared = least_words(Attention(4 * 512, 512, 64, 64), 10**5)
    assert shared < apart


def test_least_bytes_broadcasts_over_cases():
    n = np.array([1024.0, 4096.0, 16384.0])
    found = least_bytes(Attention(n, n, 64.0, 64.0), 8192.0, 2.0, count=3)
    assert found.shape == (3,)
    single = least_words(Attention(4096, 4096, 64, 64), 4096)
    assert found[1] == pytest.approx(3 * 2 * float(single))


def test_the_smallest_memory_for_a_budget():
    a = Attention(256, 256, 16, 16)
    memory = least_memory(a, 3 * a.floor)
    assert best_program(a, memory).words <= 3 * a.floor < best_program(a, memory - 1).words
    with pytest.raises(NarrowsError, match="no memory brings"):
        least_memory(a, a.floor - 1)


def test_readings_and_refusals():
    reading = AttentionIO(4096).measure(Attention(1024, 1024, 64, 64))
    low, high = reading.interval
    assert low <= reading.value == high
    assert reading.facts["flops_per_word"] == pytest.approx(4 * 1024**2 * 64 / reading.value)
    with pytest.raises(NarrowsError, match="at least 7 words"):
        AttentionIO(6).measure(Attention(4, 4, 2, 2))
    with pytest.raises(NarrowsError, match="does not run in 40 words"):
        AttentionIO(40, "flash").measure(Attention(4, 4, 64, 64))
    with pytest.raises(NarrowsError, match="did you mean flash"):
        AttentionIO(40, "flsh")
    with pytest.raises(NarrowsError, match="takes q"):
        AttentionIO().run(np.zeros((2, 3)), np.zeros((2, 4)), np.zeros((2, 3)))


def test_least_recently_used_words_leave():
    reads = [("X", i % 3, 0, False) for i in range(9)]
    assert lru_words(reads, 3) == 3
    assert lru_words(reads, 2) == 9
    writes = [("O", i, 0, True) for i in range(4)]
    assert lru_words(writes, 2) == 4


def test_no_program_without_its_minimum():
    a = Attention(3, 3, 2, 2)
    assert all(make(a, 6) is None for make in PROGRAMS.values())
    assert best_program(a, 7).words >= a.floor
