"""ALISA attends to what its definition says, wherever tokens lie, and places them as planned."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import narrows
from narrows.core.bound import bound
from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.kv import saved
from narrows.kv._lately import ONE, History
from narrows.kv._phases import Costs, best, means, plans, window
from narrows.kv.adapter import ATTENTION, copied, hidden_states, nbytes, stores
from narrows.kv.alisa import ALISA, Phases, schedule
from narrows.kv.alisa_torch import SparseStore
from narrows.kv.chunked import prefill
from narrows.kv.snapkv import SnapKV
from narrows.kv.stack import Stack
from narrows.kv.tier import Drive, Host
from narrows.machines.load import load
from narrows.trace.llm import llm
from tests.cpu.kv.tiny import left_padded, llama, prompt

FULL = ALISA(0.7, kv_bits=None)
PLAN = Phases(0.5, 0.0, 4, 8, 60, 24)
DROPPING = Phases(0.5, 0.5, 4, 8, 60, 24)


def run(technique, rows=2, tokens=60, steps=24, at_once=1, padded=False, seed=1):
    """Logits of each of `steps` tokens after a prompt, and the cache."""
    model = llama()
    model.set_attn_implementation(ATTENTION)
    ids = prompt(rows, tokens + steps, seed)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :17] = 0
        ids[1, :17] = 0
    technique = technique.of(model)
    cache = technique.cache(model.config)
    if technique.needs_hidden:
        hidden_states(model)
    made = []
    with torch.inference_mode():
        model(ids[:, :tokens], past_key_values=cache, attention_mask=mask[:, :tokens])
        for i in range(tokens, tokens + steps, at_once):
            end = i + at_once
            made.append(
                model(ids[:, i:end], past_key_values=cache, attention_mask=mask[:, :end]).logits
            )
    return torch.cat(made, 1), cache


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", [None, 8])
def test_a_padded_row_is_as_if_alone(bits):
    technique = ALISA(0.7, kv_bits=bits, group_size=1)
    told, cache = run(technique, padded=True)
    model = llama()
    model.set_attn_implementation(ATTENTION)
    alone = technique.cache(model.config)
    ids = prompt(2, 84)[1:, 17:]
    with torch.inference_mode():
        model(ids[:, :43], past_key_values=alone)
        rows = [model(ids[:, i : i + 1], past_key_values=alone).logits for i in range(43, 67)]
    close(told[1:], torch.cat(rows, 1))
    for ours, theirs in zip(stores(cache), stores(alone), strict=True):
        chosen = ours.chosen[1, 0]
        assert (chosen[chosen >= 0] - 17).tolist() == theirs.chosen[0, 0].tolist()


def test_steps_read_together_choose_as_one_by_one():
    close(run(FULL, at_once=1)[0], run(FULL, at_once=6)[0])


def test_nothing_is_evicted_and_tokens_return():
    _, cache = run(FULL, steps=40)
    store = stores(cache)[1]
    assert store.held == store.seen == 100
    assert store.positions().shape[2] == 100
    _, again = run(FULL, steps=1)
    first = set(stores(again)[1].chosen[0, 0].tolist())
    last = store.chosen[0, 0]
    total, recent = window(100, 0.7, 0.5)
    assert len(last) == total
    assert last[-int(recent) :].tolist() == list(range(100 - int(recent), 100))
    older = {i for i in last.tolist() if i < 60 - int(window(60, 0.7, 0.5)[1])}
    assert older - first  # chosen now, and not when the prompt ended


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("tier", [Host, Drive])
def test_where_tokens_lie_changes_nothing(padded, bits, tier):
    plain = ALISA(0.7, kv_bits=bits, group_size=4)
    there = ALISA(0.7, kv_bits=bits, group_size=4, plan=PLAN, host=tier())
    told, cache = run(there, padded=padded)
    assert torch.equal(told, run(plain, padded=padded)[0])
    store = stores(cache)[0]
    assert store.away == 40 if bits else 42
    assert store.dropped == 0
    assert store.host.traffic.bytes > 0
    assert store.nbytes() == sum(store.tiers().values())
    assert set(store.tiers()) == {"device", tier.name}
    assert store.nbytes() == stores(run(plain, padded=padded)[1])[0].nbytes()


@pytest.mark.parametrize("padded", [False, True])
def test_dropped_tokens_are_made_again(padded):
    told, cache = run(ALISA(0.7, kv_bits=None, plan=DROPPING), padded=padded)
    plain, kept = run(FULL, padded=padded)
    close(told, plain)
    for store, own in zip(stores(cache), stores(kept), strict=True):
        assert (store.dropped, store.away) == (21, 42)
        row = 2 * 2 * 2 * 16 * 4  # rows, KV heads, keys and values, channels, bytes
        states = 2 * 64 * 4  # rows, width, bytes
        waiting = store.known - store.dropped
        assert store.tiers() == {"device": 42 * row + 21 * states,
                                 "host": 21 * row + waiting * states}  # fmt: skip
        begin = 17 if padded else 0
        torch.testing.assert_close(store.keys[1, :, begin:], own.keys[1, :, begin:],
                                   rtol=1e-5, atol=1e-5)  # fmt: skip


def test_what_crosses_the_link_is_what_was_chosen():
    technique = ALISA(0.7, kv_bits=None, plan=Phases(0.5, 0, 0, 99, 60, 24), host=Host())
    _, cache = run(technique, rows=3, steps=1)
    told = sum(
        int((s.chosen < 30).sum()) * 2 * 2 * 16 * 4
        for s in stores(cache)  # heads, K and V
    )
    assert technique.host.traffic.bytes == told > 0


def test_a_rate_is_kept():
    host = Host(1e6)
    run(ALISA(0.7, kv_bits=None, plan=PLAN, host=host), steps=12)
    assert host.traffic.seconds >= host.traffic.bytes / 1e6


def test_bytes_are_codes_scales_and_what_fills_no_group():
    _, cache = run(ALISA(0.8, group_size=16), steps=10)
    # 64 of 70 tokens in 8 bits with 32 of scales a group of 16, keys and values; 6 in fp32
    heads = 3 * 2 * 2
    assert nbytes(cache) == heads * 32 * (64 * (8 + 32 / 16) / 8 + 6 * 4)
    assert all(s.reserved_bytes() > s.nbytes() for s in stores(cache))


def test_prefill_is_exact_and_generate_runs_on():
    model = llama()
    ids, mask = left_padded([prompt(1, 80)[0], prompt(1, 50)[0]])
    with torch.inference_mode():
        expected = model(ids, attention_mask=mask).logits
        with ALISA().apply(model):
            told = model(ids, attention_mask=mask).logits
    assert torch.equal(told[mask.bool()], expected[mask.bool()])
    dense = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    with ALISA(0.0, kv_bits=None).apply(model):
        told = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert torch.equal(told, dense)
    plan = Phases(0.5, 0.5, 2, 6, 80, 20)
    with ALISA(0.5, kv_bits=None, plan=plan).apply(model) as applied:
        model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
        assert stores(applied.cache)[0].dropped > 0
    assert not model.model.layers[0].self_attn._forward_pre_hooks


def test_a_prompt_in_chunks_leaves_the_same_sums():
    model = llama()
    model.set_attn_implementation(ATTENTION)
    ids = prompt(2, 90)
    with torch.inference_mode():
        whole, parts = FULL.cache(model.config), FULL.cache(model.config)
        model(ids[:, :80], past_key_values=whole)
        prefill(model, ids[:, :80], parts, chunk=24)
        for i in range(80, 90):
            told = [model(ids[:, i : i + 1], past_key_values=c).logits for c in (whole, parts)]
            close(*told)
    assert stores(parts)[0].chosen.tolist() == stores(whole)[0].chosen.tolist()


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 3}])
@pytest.mark.parametrize("plan", [None, Phases(0.5, 0.5, 2, 6, 60, 16)])
def test_beams_carry_their_caches(options, plan):
    model, ids = llama(), prompt(1, 60)
    with ALISA(0.0, kv_bits=None, plan=plan).apply(model):
        told = model.generate(ids, max_new_tokens=16, do_sample=False, **options)
    assert torch.equal(told, model.generate(ids, max_new_tokens=16, do_sample=False, **options))


def test_rows_take_their_history_with_them():
    ids = prompt(2, 70)
    model = llama()
    model.set_attn_implementation(ATTENTION)
    technique = ALISA(0.7, plan=replace(PLAN, p1=0), group_size=4)
    with torch.inference_mode():
        cache = technique.cache(model.config)
        model(ids[:, :60], past_key_values=cache)
        swapped = copied(cache)
        swapped.reorder_cache(torch.tensor([1, 0]))
        for i in range(60, 70):
            told = model(ids[:, i : i + 1], past_key_values=cache).logits
            other = model(ids.flip(0)[:, i : i + 1], past_key_values=swapped).logits
            close(told, other.flip(0))


def test_saved_caches_go_on_alike(tmp_path):
    model = llama()
    model.set_attn_implementation(ATTENTION)
    ids = prompt(2, 80)
    for technique in (ALISA(0.7, group_size=4), ALISA(0.7, kv_bits=None, plan=DROPPING).of(model)):
        hooks = hidden_states(model) if technique.needs_hidden else []
        with torch.inference_mode():
            cache = technique.cache(model.config)
            model(ids[:, :60], past_key_values=cache)
            for i in range(60, 70):
                model(ids[:, i : i + 1], past_key_values=cache)
            saved.save(cache, tmp_path / "cache", model, technique)
            back = saved.restore(tmp_path / "cache", model, technique)
            assert nbytes(back) == nbytes(cache)
            for i in range(70, 80):
                told = [model(ids[:, i : i + 1], past_key_values=c).logits for c in (cache, back)]
                assert torch.equal(*told)
        for hook in hooks:
            hook.remove()
    with pytest.raises(NarrowsError, match="other settings"):
        saved.restore(tmp_path / "cache", model, FULL)


def test_another_policy_may_choose_what_is_attended_from():
    model, ids = llama(), prompt(2, 120)
    both = Stack(SnapKV(capacity=40, window=8), ALISA(0.5, group_size=4))
    with both.apply(model) as applied, torch.inference_mode():
        out = model(ids[:, :100])
        store = stores(applied.cache)[0]
        assert store.held == 40
        for i in range(100, 120):
            model(ids[:, i : i + 1], past_key_values=out.past_key_values)
            if i == 100:  # nothing is known of what was looked at: everything is attended
                assert store.chosen.shape[2] == 41
        assert store.chosen.shape == (2, 2, 30)  # each KV head has tokens of its own
    plain = SnapKV(capacity=40, window=8)
    with Stack(plain, ALISA(0.0, kv_bits=None)).apply(model):
        told = model.generate(ids, max_new_tokens=12, do_sample=False)
    with plain.apply(model):
        assert torch.equal(told, model.generate(ids, max_new_tokens=12, do_sample=False))


def test_crop_takes_back_what_is_in_full():
    _, cache = run(FULL, steps=5)
    cache.crop(-3)
    store = stores(cache)[0]
    assert store.held == store.seen == 62
    assert len(store.history.rows) <= int(window(63, 0.7, 0.5)[1])
    _, cache = run(ALISA(0.7, group_size=16), steps=5)
    with pytest.raises(NarrowsError, match="only 1 are not packed"):
        cache.crop(-2)


def test_bfloat16_and_one_token():
    model = llama().to(torch.bfloat16)
    for technique in (ALISA(), ALISA(0.5, kv_bits=None, plan=Phases(0.5, 0.5, 2, 4, 30, 12))):
        with technique.apply(model):
            assert model.generate(prompt(2, 30), max_new_tokens=12).shape == (2, 42)
            assert model.generate(prompt(1, 1), max_new_tokens=5).shape == (1, 6)


def test_sums_are_exact_whatever_comes_and_goes():
    rng = torch.Generator().manual_seed(0)
    history, kept = History(), []
    for n in range(1, 60):
        slots = torch.randperm(n, generator=rng)[: max(n // 2, 1)].sort().values
        weights = torch.rand(1, 1, len(slots), generator=rng)
        size = np.full((1, 1), int(window(n + 1, 0.5, 0.5)[1]))
        history.push(slots[None, None], weights, size)
        row = torch.zeros(60, dtype=torch.int64)
        row[slots] = (weights[0, 0] * ONE).round().long()
        kept.append(row)
        expected = torch.stack(kept[-int(size[0, 0]) :]).sum(0)
        assert torch.equal(history.ranks(60)[0, 0] >> 21, expected)


@pytest.mark.parametrize(("sparsity", "split"), [(0.8, 0.5), (0.0, 0.5), (0.3, 0.0), (0.5, 1.0)])
def test_windows_are_whole_tokens(sparsity, split):
    tokens = np.arange(400)
    total, recent = window(tokens, sparsity, split)
    assert (total[1:] >= 1).all()
    assert (recent[1:] >= 1).all()  # the newest token attends to itself
    assert (recent <= total).all()
    assert (total <= tokens).all()
    assert (np.diff(recent) <= 1).all()
    assert window(10, 0.7, 0.5)[0] == 3  # 10 * (1 - 0.7) is a little above 3 in floating point


# --- plans ----------------------------------------------------------------------------------------


def costs(**changes) -> Costs:
    steps = np.linspace(1.0, 1.5, 60)
    return replace(Costs(100, steps, 10.0, 6.0, 100.0, 0.03, 3000.0), **changes)


@pytest.mark.parametrize(("room", "host"), [(3000, None), (1200, None), (900, 900), (1500, 400)])
def test_the_grid_is_the_sum_of_its_steps(room, host):
    known = costs(room=room, host_room=host)
    rows, seconds = plans(known, (0.0, 0.25, 0.5, 0.9), 64)
    rng = np.random.default_rng(0)
    for i in rng.integers(0, len(rows), 300):
        alpha, beta, p1, p2 = rows[i]
        if beta and p2 == 60:
            assert np.isinf(seconds[i])  # the same as beta = 0
            continue
        plan = Phases(alpha, beta, int(p1), int(p2), 100, 60)
        expected = known.steps(plan).sum() if known.fits(plan) else np.inf
        assert seconds[i] == pytest.approx(expected)
    found = best(known, (0.0, 0.25, 0.5, 0.9))
    assert known.fits(found.plan)
    assert found.seconds == pytest.approx(seconds.min())


def test_a_plan_depends_on_what_is_dear():
    assert best(costs()).plan.alpha == 0  # all fits
    tight = costs(room=1200.0)
    fetch = best(replace(tight, link=1e6))
    assert fetch.plan.alpha > 0
    assert fetch.plan.beta == 0
    again = best(replace(tight, recompute=1e-6))
    assert again.plan.beta > 0  # a slow link and quick products
    large = best(replace(tight, recompute=1e-6, state_bytes=40.0))
    assert large.plan.beta < again.plan.beta  # states that are larger than keys and values
    with pytest.raises(NarrowsError, match="no plan fits"):
        best(costs(room=50.0))


def test_phases_place_the_oldest_first_and_keep_the_window():
    plan = Phases(0.9, 0.5, 4, 8, 60, 24)
    seen = np.arange(60, 84)
    _, recent = window(seen + 1, 0.2, 0.5)
    dropped, away = plan.place(seen, recent)
    assert plan.phase(seen).tolist() == [1] * 4 + [2] * 4 + [3] * 16
    assert (away[:4] == 0).all()
    assert (dropped[:8] == 0).all()
    assert (away[4:] > 0).all()
    assert (dropped[8:] > 0).all()
    assert (seen - away >= recent).all()
    assert (dropped <= away).all()
    assert (dropped <= 60).all()


def case(model="llama-2-7b", prompt=4096, generate=256, batch=1, machine="a100-80", **more) -> Case:
    return Case(llm(model, prompt, generate, batch, "fp16", **more), load(machine))


def test_schedule_asks_the_machine():
    asked = case(prompt=128, generate=128, batch=320, machine="v100-32")
    found = schedule(asked)
    assert found.plan.alpha > 0
    assert found.seconds == pytest.approx(found.steps.sum())
    assert len(found.steps) == 128
    ample = schedule(asked, room=1e12)
    assert ample.plan.alpha == 0
    assert ample.seconds < found.seconds
    assert ALISA.variants(asked)[0].plan is not None
    assert ALISA.variants(case())[0].plan is None
    with pytest.raises(NarrowsError, match="nothing is decoded"):
        schedule(case(generate=0))
    with pytest.raises(NarrowsError, match="leave no room"):
        schedule(case("llama-2-70b", machine="v100-32"))
    with pytest.raises(NarrowsError, match="no tier 'host'"):
        schedule(case(machine="epyc-7763"))


def test_predicted_bytes():
    before, after = case(batch=8), case(batch=8).with_(ALISA())
    full = 32 / (4096 + 128)  # mean share of tokens that wait for their group
    bits = 8.5 * (1 - full) + 16 * full
    held = before.workload.bytes("kv") * bits / 16
    assert after.workload.bytes("kv") == pytest.approx(held, rel=1e-3)
    a, b = bound(before).phase("decode"), bound(after).phase("decode")
    weights = float(before.workload.bytes("weight")) * 256
    spared = (b.bytes["hbm"] - weights) / (a.bytes["hbm"] - weights)
    assert 0.2 * bits / 16 < spared < 0.16  # and what the choice costs
    assert b.seconds < a.seconds
    assert bound(after).phase("prefill").seconds > bound(before).phase("prefill").seconds
    assert after.with_(ALISA()) is after
    same = case().with_(ALISA(0.0, kv_bits=None))
    assert same.workload.bytes("kv") == case().workload.bytes("kv")
    assert same.bound().seconds == case().bound().seconds
    both = before.with_(SnapKV(1024), ALISA()).workload.bytes("kv")
    assert both < min(before.with_(t).workload.bytes("kv") for t in (SnapKV(1024), ALISA()))


def test_a_plan_moves_bytes_to_the_host():
    asked = case(prompt=128, generate=128, batch=320, machine="v100-32")
    plain = asked.with_(ALISA())
    planned = asked.with_(ALISA(plan=schedule(asked).plan))
    assert planned.workload.bytes("kv") == pytest.approx(plain.workload.bytes("kv"), rel=1e-6)
    assert bound(plain).fits is False
    fits = {row.resource: row.fits for row in bound(planned).phase("decode").levels}
    assert fits["hbm"] is True
    assert bound(planned).phase("decode").bytes["pcie"] > 0
    dropping = asked.with_(ALISA(kv_bits=None, plan=Phases(0.8, 0.5, 0, 64, 128, 128)))
    assert dropping.workload.tensors["alisa.states"].bytes() > 0
    assert dropping.workload.bytes("kv") < asked.workload.bytes("kv")
    assert "made again" in ALISA(plan=Phases(0.8, 0.5, 0, 64, 128, 128)).why(asked)


def test_a_sweep_is_the_single_cases():
    lengths = ((64, 10), (500, 300), (4096, 0))
    together = case(prompt=np.array([p for p, _ in lengths]),
                    generate=np.array([g for _, g in lengths])).with_(ALISA())  # fmt: skip
    kv = np.broadcast_to(together.workload.bytes("kv"), 3)
    read = means(np.array([64, 500, 4096]), np.array([10, 300, 0]), 0.8, 0.5, 512)["total"]
    for i, (p, g) in enumerate(lengths):
        alone = case(prompt=p, generate=g).with_(ALISA()).workload
        assert kv[i] == pytest.approx(alone.bytes("kv"))
        assert read[i] == pytest.approx(means(p, g, 0.8, 0.5, 512)["total"])


def test_what_cannot_work_is_refused():
    for bad, told in (
        ({"sparsity": 1.0}, "sparsity is a share"), ({"sparsity": "0.8"}, "sparsity is a share"),
        ({"split": 1.1}, "split is a share"), ({"split": True}, "split is a share"),
        ({"kv_bits": 3}, "kv_bits must be"), ({"group_size": 0}, "group_size must be"),
        ({"plan": (0.5, 0.5)}, "a plan is Phases"),
    ):  # fmt: skip
        with pytest.raises(NarrowsError, match=told):
            ALISA(**bad)
    for bad in ((-0.1, 0, 0, 0, 1, 1), (0, 2, 0, 0, 1, 1), (0, 0, 3, 2, 1, 1), (0, 0, 0, 0, -1, 1)):
        with pytest.raises(NarrowsError, match="alisa"):
            Phases(*bad)
    with pytest.raises(NarrowsError, match=r"use ALISA\(...\).of\(model\)"):
        ALISA(plan=DROPPING).cache(llama().config)
    with pytest.raises(NarrowsError, match="projections of Linear are not known"):
        ALISA(plan=DROPPING).of(torch.nn.Linear(2, 2))
    with pytest.raises(NarrowsError, match="softcap"):
        case("gemma-2-9b").with_(ALISA())
    train = Case(llm("llama-2-7b", 512, 0, 1, "bf16", train=True), load("a100-80"))
    with pytest.raises(NarrowsError, match="no key-value cache"):
        train.with_(ALISA())
    with pytest.raises(NarrowsError, match="nothing to attend"):
        SparseStore(0, 0.8, 0.5).attend(torch.zeros(1, 1, 1, 4), None, None)


def test_keys_that_states_do_not_give_are_noticed():
    model = llama()
    technique = ALISA(0.7, kv_bits=None, plan=DROPPING)
    with technique.apply(model), torch.inference_mode(), \
            pytest.raises(NarrowsError, match="are not its own"):  # fmt: skip
        model(prompt(1, 60), position_ids=torch.arange(60)[None] + 9)


def test_find_ranks_it():
    asked = narrows.case("llama-2-7b", "a100-80", prompt=8192, generate=256, batch=8)
    assert "alisa" in [option.key for option in narrows.find(asked)]
