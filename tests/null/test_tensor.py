"""Bytes follow from axes, what is kept, and the codec; rewrites compose without double count."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.core.errors import NarrowsError
from narrows.core.tensor import Codec, Tensor

KV = Tensor(
    "kv", "kv", {"layer": 32, "head": 8, "token": 4096, "channel": 128}, Codec.of("bf16")
)  # fmt: skip


def test_bytes_of_a_plain_tensor():
    assert KV.bytes() == 32 * 8 * 4096 * 128 * 2


def test_two_techniques_on_different_axes_multiply():
    fewer = KV.keep(token=1024)
    smaller = fewer.with_(codec=Codec("kivi2", 2, group=32, overhead_bits=32))
    assert fewer.bytes() == KV.bytes() / 4
    assert smaller.bytes() == KV.bytes() / 4 * (2 + 32 / 32) / 16


def test_keeping_more_than_is_left_keeps_what_is_left():
    assert KV.keep(token=1024).keep(token=2048).bytes() == KV.bytes() / 4
    assert KV.keep(token=10**9).bytes() == KV.bytes()


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=5))
def test_keep_is_the_least_of_all_steps_in_any_order(extents: list[int]):
    forward, backward = KV, KV
    for n in extents:
        forward = forward.keep(token=n)
    for n in reversed(extents):
        backward = backward.keep(token=n)
    assert forward.bytes() == backward.bytes() == KV.keep(token=min(extents)).bytes()


def test_touching_a_part():
    assert KV.bytes({"layer": 1}) == KV.bytes() / 32
    assert KV.keep(token=100).elements({"token": 4000}) == KV.keep(token=100).elements()


def test_extents_may_be_arrays_over_cases():
    sweep = Tensor("t", "kv", {"token": np.array([10.0, 20.0]), "channel": 4}, Codec.of("fp32"))
    assert sweep.bytes().tolist() == [160, 320]
    assert sweep.keep(token=15).bytes().tolist() == [160, 240]


def test_bytes_cannot_be_assigned_and_axes_cannot_be_invented():
    with pytest.raises(NarrowsError, match="codec and its tier"):
        KV.with_(axes={})
    with pytest.raises(NarrowsError, match="tokne"):
        KV.keep(tokne=5)
    with pytest.raises(NarrowsError, match="number format"):
        Codec.of("bf17")
