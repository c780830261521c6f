"""SnapKV of a case, with torch not installed: bytes, seconds, and when it does nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from narrows.core.bound import bound
from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.core.plan import Plan
from narrows.core.price import price
from narrows.core.workload import Workload
from narrows.kv.snapkv import KEYS, VALUES, SnapKV
from narrows.machines.load import load
from narrows.trace.llm import llm, resolve


def case(model="llama-2-7b", prompt=16384, generate=128, batch=2, fusion=("flash",)) -> Case:
    return Case(llm(model, prompt, generate, batch), load("a100-80"), Plan(fusion))


def cache_bytes(work: Workload) -> float:
    return work.tensors[KEYS].bytes() + work.tensors[VALUES].bytes()


def test_the_cache_shrinks_to_the_capacity_exactly():
    before = case()
    after = before.with_(SnapKV())
    token = 2 * 32 * 2 * 32 * 128 * 2  # keys and values, layers, batch, heads, channels, bf16
    assert cache_bytes(before.workload) == 16384 * token
    assert cache_bytes(after.workload) == 2048 * token
    assert after.plan.policies["evict"][0] == "snapkv"


@pytest.mark.parametrize("fusion", [(), ("flash",), ("flash", "compiled")])
def test_decode_reads_and_computes_less_by_what_was_dropped(fusion):
    before = case(fusion=fusion)
    a = bound(before).phase("decode")
    b = bound(before.with_(SnapKV())).phase("decode")
    dropped = 16384 - 2048
    token = 2 * 32 * 2 * 32 * 128 * 2
    least = 128 * dropped * token
    if "flash" in fusion:
        assert a.bytes["hbm"] - b.bytes["hbm"] == pytest.approx(least)
    else:
        assert a.bytes["hbm"] - b.bytes["hbm"] > least  # the scores went to memory as well
    # scores and sums: 2 products of 2 operations a channel; softmax and scale: 6 a score
    each = 128 * dropped * 32 * 2 * 32
    assert a.flops - b.flops == pytest.approx(each * (4 * 128 + 6))
    for row in bound(before.with_(SnapKV())).phase("decode").rows:
        assert row.have > 0


def test_prefill_pays_for_the_selection_and_gains_nothing():
    before = case()
    a = bound(before).phase("prefill")
    b = bound(before.with_(SnapKV())).phase("prefill")
    votes = 2.0 * 32 * 2 * 32 * 32 * 16384 * 128  # one product of the window's queries
    assert b.flops - a.flops >= votes
    assert b.flops - a.flops < 1.1 * votes
    assert b.seconds == pytest.approx(a.seconds, rel=0.01)


@pytest.mark.parametrize("prompt", [0, 1, 33, 2047, 2048])
def test_a_prompt_that_fits_is_the_same_case(prompt):
    given = case(prompt=prompt)
    if prompt:
        assert SnapKV().predict(given) is given
        assert "nothing is dropped" in SnapKV().why(given)


def test_compute_bound_prefill_shows_no_gain():
    given = case("llama-3-8b", prompt=8192, generate=1, batch=8)
    after = given.with_(SnapKV())
    assert bound(given).seconds / bound(after).seconds == pytest.approx(1.0, abs=0.005)
    assert bound(after).phase("prefill").narrowest.startswith("compute")
    assert "prefill stays whole" in SnapKV().why(given)


def test_nothing_decoded_is_said():
    assert "only memory is saved" in SnapKV().why(case(generate=0))


def test_it_makes_a_long_prompt_fit():
    given = case("llama-3-8b", prompt=131072, batch=4)
    assert bound(given).fits is False
    assert bound(given.with_(SnapKV())).fits is True


def test_a_sweep_is_the_single_cases():
    prompts = np.array([1024, 2048, 2049, 4096, 65536])
    sweep = case("llama-3-8b", prompt=prompts).with_(SnapKV())
    phases = price(sweep.workload, sweep.machine)
    for i, prompt in enumerate(prompts):
        one = case("llama-3-8b", prompt=int(prompt)).with_(SnapKV())
        for a, b in zip(phases, price(one.workload, one.machine), strict=True):
            assert a.total_seconds[i] == pytest.approx(float(b.total_seconds), rel=1e-3)
            assert a.total_flops[i] == pytest.approx(float(b.total_flops), rel=1e-9)


def test_ratio_keeps_a_share_and_at_least_the_window():
    technique = SnapKV(ratio=0.75)
    assert technique.budget(16384) == 4096
    assert list(technique.budget(np.array([20, 40, 100, 400]))) == [20, 33, 33, 100]
    after = case(prompt=1000).with_(technique)
    assert after.workload.tensors[KEYS].extent("token") == 250
    assert after.plan.policies["evict"][1]["ratio"] == 0.75


@pytest.mark.parametrize("fusion", [(), ("flash",)])
def test_twice_drops_no_more_than_the_smaller(fusion):
    given = case(fusion=fusion)
    once = given.with_(SnapKV(1024))
    for order in ((4096, 1024), (1024, 4096)):
        twice = given.with_(*(SnapKV(n) for n in order))
        assert twice.workload.tensors[KEYS].extent("token") == 1024
        a, b = (bound(c).phase("decode") for c in (twice, once))
        assert a.seconds == pytest.approx(b.seconds)
        assert a.flops == pytest.approx(b.flops)


def test_variants_start_with_the_default():
    assert [v.capacity for v in SnapKV.variants(case())] == [2048]
    assert [v.capacity for v in SnapKV.variants(case(prompt=4096))] == [2048, 512]
    assert [v.capacity for v in SnapKV.variants(case(prompt=2048))] == [2048]


def test_why_gives_tokens_and_bytes():
    told = SnapKV().why(case())
    assert "keeps 2048 of 16384" in told
    assert "17.2 to 2.15 GB" in told


def test_what_has_no_such_cache_is_refused():
    training = Case(llm("llama-3-8b", 2048, 0, 1, train=True), load("a100-80"))
    with pytest.raises(NarrowsError, match="no key-value cache"):
        SnapKV().predict(training)


def test_layers_with_a_window_are_left_alone():
    mixed = replace(resolve("gemma-2-9b"), softcap=False)
    given = case(mixed, prompt=8192)
    after = given.with_(SnapKV())
    local = f"{KEYS}.local"
    assert after.workload.tensors[local].bytes() == given.workload.tensors[local].bytes()
    assert after.workload.tensors[KEYS].extent("token") == 2048
    scores = [t for n, t in after.workload.tensors.items() if n.startswith("decode.")
              and n.endswith("local.scores")]  # fmt: skip
    assert scores
    assert all("key" not in t.kept for t in scores)


@pytest.mark.parametrize(
    ("model", "told"), [("mistral-7b", "sliding window of 4096"), ("gemma-2-9b", "softcap")]
)
def test_models_it_cannot_run_on_are_refused(model, told):
    with pytest.raises(NarrowsError, match=told):
        SnapKV().predict(case(model))
