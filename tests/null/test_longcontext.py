"""Four figures of long contexts against hand counting, with torch not installed."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest

from narrows.core.bound import bound
from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.core.plan import Plan
from narrows.kv.snapkv import SnapKV
from narrows.machines.load import load
from narrows.serving import fu2024
from narrows.serving.compress import Kept, compress
from narrows.serving.long_load import Load, with_switch
from narrows.serving.longcontext_analysis import LongContextAnalysis, longcontext
from narrows.trace.llm import llm

MACHINE = fu2024.as_assumed(load("a100-80"))
TOKEN = 2 * 32 * 8 * 128 * 2  # llama-3-8b: keys and values, layers, heads, channels, bf16
PROMPT = ("kv.prompt.key", "kv.prompt.value")


def asked(**changes) -> Load:
    return replace(Load("llama-3-8b", MACHINE, 32768), **changes)


def four(**changes):
    return LongContextAnalysis().analyse(asked(**changes))


def test_the_four_figures_by_hand():
    told = four()
    weights = float(llm("llama-3-8b", 1, 0).bytes("weight"))
    kv = TOKEN * (32768 + 250)
    assert told.kv_bytes == kv
    assert told.concurrency == int((80 * 2**30 - weights) // kv)
    assert told.switch_s == pytest.approx(2 * kv / 20e9)
    embed = 128256 * 4096 * 2
    read = 250 * (weights - embed + TOKEN * (32768 + 125.5)) / 2e12
    assert told.decode_s == pytest.approx(read, rel=2e-3)
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    keys = 32769 / 2
    flops = 32768 * (2 * 32 * layer + 4 * 32 * 4096 * keys)
    assert told.prefill_s == pytest.approx(flops / 312e12, rel=0.06)
    assert told.prefill_s > flops / 312e12
    assert told.narrowest == {
        "concurrency": "hbm.capacity", "prefill": "compute.bf16", "decode": "hbm",
        "switch": "pcie",
    }  # fmt: skip


def test_as_many_as_are_held_fit_and_one_more_does_not():
    held = four().concurrency
    for users, fits in ((held, True), (held + 1, False)):
        assert bound(asked().case(users, 250)).phase("decode").fits is fits


def test_sessions_follow_users_until_the_machine_is_busy():
    analysis = LongContextAnalysis(rounds=3, reading=30.0)
    told = {n: analysis.analyse(asked(users=n)) for n in (1, 2, 8, 64, 640)}
    one = told[1]
    alone = one.prefill_s + 3 * (one.decode_s + 30)
    assert one.sessions_per_hour == pytest.approx(3600 / alone)
    assert one.sessions_per_hour < told[2].sessions_per_hour <= 2 * one.sessions_per_hour
    crowd = told[640]
    held = crowd.concurrency
    assert held < 64
    together = bound(asked().case(held, 250)).phase("decode").limit_seconds
    busy = one.prefill_s + 3 * (together / held + one.switch_s)
    assert crowd.sessions_per_hour == pytest.approx(3600 / busy)
    assert told[64].sessions_per_hour <= crowd.sessions_per_hour


def test_nobody_fits_nobody_is_served():
    told = LongContextAnalysis().analyse(Load("llama-3-70b", MACHINE, 4096))
    assert told.concurrency == 0
    assert told.sessions_per_hour == 0


def test_no_host_no_switch():
    tiers = {n: t for n, t in MACHINE.tiers.items() if n != "host"}
    told = four(machine=replace(MACHINE, tiers=tiers), users=500)
    assert told.switch_s == inf
    assert told.sessions_per_hour == pytest.approx(
        four(machine=replace(MACHINE, tiers=tiers), users=told.concurrency).sessions_per_hour
    )


def test_transfers_are_not_fused_away():
    case = asked().case(1, 250)
    moved = replace(case, workload=with_switch(case.workload))
    phase = bound(moved).phase("switch")
    assert phase.bytes["pcie"] == 2 * TOKEN * (32768 + 250)
    assert bound(moved).phase("decode").levels == bound(case).phase("decode").levels


def test_calibrated_is_slower_and_has_an_error():
    real = LongContextAnalysis().analyse(asked(machine="a100-80"), peak=False)
    peak = LongContextAnalysis().analyse(asked(machine="a100-80"))
    assert real.prefill_s > peak.prefill_s
    assert real.decode_s > peak.decode_s
    assert real.error is not None
    assert peak.error is None


def test_a_reading_has_its_interval_and_ceiling():
    for machine in ("a100-80", MACHINE):
        read = LongContextAnalysis().measure(("llama-3-8b", machine, 32768, 20))
        low, high = read.interval
        assert low < read.value <= high <= read.ceiling == read.facts["peak"].sessions_per_hour
    assert low == pytest.approx(0.2 * read.value)  # a datasheet bound grants itself 80 %
    with pytest.raises(NarrowsError, match="takes a Load"):
        LongContextAnalysis().measure("llama-3-8b")


def test_the_front_function():
    assert longcontext("llama-3-8b", MACHINE, 32768, 3) == four(users=3)


# --- compression ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "stored", "read"),
    [
        (Kept(layer=0.25), 0.25, 1.0),  # shared layers are stored once and read by each
        (Kept(head=0.5), 0.5, 0.5),
        (Kept(token=0.25), 0.25, 0.25),
        (Kept(hidden=0.5), 0.5, 0.5),
        (Kept(bits=4), 0.25, 0.25),
        (Kept(layer=0.5, head=0.5, token=0.5, hidden=0.5, bits=8), 1 / 32, 1 / 16),
    ],
)
def test_each_axis_by_hand(kept: Kept, stored: float, read: float):
    work = llm("llama-3-8b", 32768, 250)
    less = compress(work, kept.layer, kept.head, kept.token, kept.hidden, kept.bits)
    whole = TOKEN * 32768
    assert sum(less.tensors[n].bytes() for n in PROMPT) == pytest.approx(whole * stored)

    def moved(w):
        [op] = [o for o in bound(Case(w, MACHINE, Plan(("flash",)))).phase("decode").rows
                if o.op == "attention_decode" and o.resource == "hbm"]  # fmt: skip
        return op.need

    # queries and outputs move as well, a little; the answer keeps its tokens
    assert moved(less) / moved(work) == pytest.approx(read, rel=0.02)
    before, after = four(), four(kept=kept)
    assert after.switch_s == pytest.approx(before.switch_s * stored, rel=0.03)
    assert after.concurrency >= before.concurrency / stored * 0.9
    assert after.prefill_s == pytest.approx(before.prefill_s, rel=1e-3)


@pytest.mark.parametrize("fusion", [(), ("flash",), ("flash", "compiled")])
def test_scores_follow_a_cache_of_fewer_keys(fusion):
    """A prompt of which a quarter is kept decodes as a prompt of that length."""
    long, short = llm("llama-3-8b", 4096, 1), llm("llama-3-8b", 1024, 1)
    cut = bound(Case(compress(long, token=0.25), MACHINE, Plan(fusion))).phase("decode")
    plain = bound(Case(short, MACHINE, Plan(fusion))).phase("decode")
    assert cut.flops == pytest.approx(plain.flops)
    assert cut.bytes["hbm"] == pytest.approx(plain.bytes["hbm"])
    assert cut.seconds == pytest.approx(plain.seconds)


def test_shared_layers_are_written_once():
    def written(work):
        return sum(
            o.repeat * sum(w.tensors[u.tensor].bytes(u.at) for u in o.writes)
            for w in [work] for o in w.phase("prefill").ops if o.name.startswith("kv.write")
        )  # fmt: skip

    work = llm("llama-3-8b", 1024, 1)
    assert written(work) == TOKEN * 1024
    assert written(compress(work, layer=0.25)) == TOKEN * 1024 / 4


def test_a_technique_and_a_share_compose():
    base = four(techniques=(SnapKV(4096),))
    both = four(techniques=(SnapKV(4096),), kept=Kept(head=0.5))
    assert base.kv_bytes == TOKEN * (4096 + 250)
    assert both.kv_bytes == base.kv_bytes / 2
    again = four(techniques=(SnapKV(4096), SnapKV(4096)))
    assert again.kv_bytes == base.kv_bytes
    assert again.decode_s == pytest.approx(base.decode_s)


def test_nothing_kept_less_changes_nothing():
    work = llm("llama-3-8b", 1024, 1)
    assert compress(work) is work
    for bad in ({"head": 0.0}, {"token": 1.5}, {"layer": -1.0}, {"bits": 0.0}):
        with pytest.raises(NarrowsError, match="compress"):
            compress(work, **bad)
    with pytest.raises(NarrowsError, match="no key-value cache"):
        compress(replace(work, tensors={n: t for n, t in work.tensors.items() if t.role != "kv"},
                         phases=()), head=0.5)  # fmt: skip


# --- comparisons ---------------------------------------------------------------------------------


def test_what_acts_on_the_four_figures():
    told = LongContextAnalysis().effects(asked(users=4))
    base = told["base"]
    assert told["multi-head"].kv_bytes == 4 * base.kv_bytes
    assert told["multi-query"].kv_bytes == base.kv_bytes / 8
    assert told["multi-head"].concurrency < base.concurrency < told["multi-query"].concurrency
    assert told["tp 2"].switch_s == pytest.approx(base.switch_s / 2)
    assert told["tp 2"].concurrency > 2 * base.concurrency  # the weights are split, too
    assert base.prefill_s / 2 < told["tp 2"].prefill_s < base.prefill_s
    experts = told["mixture of experts"]
    assert experts.kv_bytes == base.kv_bytes
    assert experts.concurrency == pytest.approx(base.concurrency, abs=1)
    assert experts.decode_s < base.decode_s
    assert experts.prefill_s < base.prefill_s


def test_techniques_stand_beside_dense_with_their_reasons():
    told = LongContextAnalysis().compare(asked(model="mistral-7b"), {"snapkv": SnapKV()})
    assert set(told) == {"dense", "snapkv"}
    gemma = LongContextAnalysis().compare(asked(model="gemma-2-9b"), {"snapkv": SnapKV()})
    assert "softcap" in str(gemma["snapkv"])


def test_attention_is_solved_back_from_two_times():
    for c in (1.0, 2.0):
        times = [
            (s, fu2024.prefill_seconds(fu2024.YI_34B, fu2024.A100, s, c)) for s in (50000, 4096)
        ]
        found, parameters = fu2024.attention_coefficient(fu2024.YI_34B, fu2024.A100, *times)
        assert found == pytest.approx(c)
        assert parameters == pytest.approx(34e9)


@pytest.mark.parametrize("bad", [{"users": 0}, {"tokens": 0}])
def test_loads_that_make_no_sense(bad):
    with pytest.raises(NarrowsError, match="at least 1"):
        asked(**bad)
    with pytest.raises(NarrowsError, match="rounds"):
        LongContextAnalysis(rounds=0)
