"""BFP stores what exact fractions say, in any order of channels, and refuses what it cannot."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import narrows
from narrows.claims._bfp import SIZE, energy, equal_blocks, pattern, some_order, store_of
from narrows.claims._kivi import random_tokens
from narrows.core.bound import bound
from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.kv import attend_packed
from narrows.kv._ksort import key_orders, order_of
from narrows.kv.adapter import ATTENTION, KVCache, nbytes, stores
from narrows.kv.bfp import BFP
from narrows.kv.blockfloat import BlockFloat
from narrows.kv.kivi import KIVI
from narrows.kv.saved import restore, save
from narrows.kv.snapkv import SnapKV
from narrows.kv.stack import Stack
from narrows.kv.tier import Host
from narrows.machines.load import load
from narrows.trace.llm import llm
from tests.cpu.kv.tiny import left_padded, llama, prompt

SMALL = BFP(block=8)
"""For heads of 16 channels."""


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [1, 2, 32])
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_numbers_are_those_of_exact_fractions(bits, size, axis):
    same, total = equal_blocks(bits, size, axis, count=32)
    assert same == total


def test_coding_what_came_back_changes_nothing():
    for codec in (BlockFloat(4, "token", 16, some_order()), BlockFloat(8, "channel", 16)):
        once = codec.pack(random_tokens(64)).unpack()
        assert torch.equal(codec.pack(once).unpack(), once)


def test_half_precision_is_coded_as_it_is():
    x = random_tokens(32).half()
    codec = BlockFloat(8, "token", 32)
    assert all(
        torch.equal(a, b)
        for a, b in zip(codec.pack(x).parts, codec.pack(x.float()).parts, strict=True)
    )


@pytest.mark.parametrize("order", [None, some_order()])
def test_what_comes_back_is_in_the_order_it_came(order):
    keys = random_tokens(40, 3)
    codec = BlockFloat(8, "token", 32, order)
    packed = codec.pack(keys)
    # within half a step of the largest of all: channels were not mixed up
    assert (packed.unpack() - keys).abs().max() <= keys.abs().max() / 2**6
    queries = torch.randn(3, 2, 5, SIZE, generator=torch.Generator().manual_seed(1))
    expected = queries @ packed.unpack().transpose(2, 3)
    torch.testing.assert_close(codec.scores(queries, packed), expected, rtol=1e-4, atol=1e-3)


def test_an_order_is_of_pairs_the_largest_first():
    weight, _ = pattern(3)
    for head, order in enumerate(order_of(weight, SIZE)):
        assert sorted(order) == list(range(SIZE))
        first, second = np.array(order)[0::2], np.array(order)[1::2]
        assert (second == first + SIZE // 2).all()
        norms = weight[head * SIZE : (head + 1) * SIZE].double().square().sum(1)
        joint = norms[first] + norms[second]
        assert (joint.diff() <= 0).all()
    bias = torch.zeros(2 * SIZE)
    bias[[5, SIZE + 40]] = 100.0
    told = order_of(weight, SIZE, bias)
    assert (told[0][0], told[1][0]) == (5, 8)


def test_large_channels_hurt_others_less_sorted():
    weight, keys = pattern(7)
    order = order_of(weight, SIZE)
    assert energy(keys, 32, order) < energy(keys, 32, None)
    assert energy(keys, SIZE, order) == energy(keys, SIZE, None)


def test_an_order_alone_changes_no_logits():
    """Where a block is a head, sorted and unsorted caches hold the same numbers."""
    model, ids, new = llama(), prompt(2, 70), prompt(2, 3, seed=5)
    told = []
    for technique in (BFP(block=16), BFP(block=16, sort=False)):
        with technique.apply(model) as applied, torch.inference_mode():
            model(ids)
            told.append(model(new, past_key_values=applied.cache).logits)
            held = stores(applied.cache)[1].codecs[0].order
            assert (held is not None) == technique.sort
    torch.testing.assert_close(*told, rtol=1e-4, atol=1e-4)
    assert SMALL._orders is None  # what a model told stays with its copy


def by_hand(queries, keys, values, mask, scaling):
    group = queries.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    scores = queries.double() @ keys.transpose(2, 3) * scaling
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values).float()


@pytest.mark.parametrize(("tokens", "new"), [(700, 1), (31, 1), (32, 3), (1, 1), (2100, 2)])
def test_attention_is_that_of_what_is_stored(tokens, new):
    store = store_of(BFP(), {0: some_order()})
    keys, values = random_tokens(tokens + new, 2), random_tokens(tokens + new, 2, seed=1)
    valid = torch.arange(tokens + new) >= torch.tensor([[0], [min(tokens // 2, 300)]])
    store.fill(keys[:, :, :tokens], values[:, :, :tokens], None, valid[:, :tokens])
    store.append(keys[:, :, tokens:], values[:, :, tokens:])
    query = torch.randn(2, 6, new, SIZE, generator=torch.Generator().manual_seed(0))
    place = torch.arange(tokens, tokens + new)[:, None]
    mask = valid[:, None, None] & (torch.arange(tokens + new) <= place)
    expected = by_hand(query, store.keys, store.values, mask, 0.125)
    torch.testing.assert_close(store.attend(query, mask, 0.125), expected, rtol=1e-5, atol=1e-5)


def test_keys_are_packed_at_once_and_values_by_the_block():
    store = store_of(BFP(sort=False))
    x = random_tokens(100)
    store.fill(x[:, :, :70], x[:, :, :70], None, None)
    assert [b.tokens for b in store.bodies] == [70, 64]
    for i in range(70, 100):
        store.append(x[:, :, i : i + 1], x[:, :, i : i + 1])
        store.settle()
        assert [b.tokens for b in store.bodies] == [i + 1, (i + 1) // 32 * 32]
    packed = 2 * SIZE * (100 + 96) * 4.25 / 8
    assert store.nbytes() == packed + 2 * SIZE * 4 * 4
    whole = store_of(BFP(sort=False))
    whole.fill(x, x, None, None)
    assert torch.equal(whole.keys, store.keys)
    assert torch.equal(whole.values, store.values)


def test_padding_does_not_widen_blocks():
    x = random_tokens(64)
    padded = torch.cat([torch.full((1, 2, 16, SIZE), 1e9), x], 2)
    store = store_of(BFP(sort=False))
    store.fill(padded, padded, None, torch.arange(80)[None] >= 16)
    error = (store.values[:, :, 16:] - x).abs().max()
    assert error <= x.abs().max() / 4


def test_prefill_is_exact_and_generate_runs_on():
    model = llama()
    ids, mask = left_padded([prompt(1, 120)[0], prompt(1, 70)[0]])
    dense = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
    with torch.inference_mode():
        expected = model(ids, attention_mask=mask).logits
        with SMALL.apply(model):
            found = model(ids, attention_mask=mask).logits
    assert torch.equal(found[mask.bool()], expected[mask.bool()])
    with BFP(8, 8, block=2).apply(model) as applied:
        told = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
        assert applied.nbytes() < 2 * 3 * 2 * 2 * 150 * 16 * 2
    assert told.shape == dense.shape
    assert (told == dense).float().mean() > 0.8
    assert model.config._attn_implementation == "sdpa"


def test_bfloat16_and_beams():
    model = llama().to(torch.bfloat16)
    with SMALL.apply(model):
        told = model.generate(prompt(2, 90), max_new_tokens=20, do_sample=False, num_beams=2)
    assert told.shape == (2, 110)


@pytest.mark.parametrize("tier", [None, Host()])
def test_it_stores_what_another_chooses(tier):
    model, ids = llama(), prompt(2, 200)
    stack = Stack(SnapKV(capacity=96), SMALL.of(model), tier)
    with stack.apply(model) as applied, torch.inference_mode():
        model(ids)
        assert stores(applied.cache)[0].held == 96
        both = applied.nbytes()
        assert model(ids[:, :1], past_key_values=applied.cache).logits.isfinite().all()
    with SMALL.apply(model) as applied, torch.inference_mode():
        model(ids)
        assert both < applied.nbytes()
    with pytest.raises(NarrowsError, match="of\\(model\\)"):
        Stack(SnapKV(capacity=96), SMALL).store(model.config)


def test_a_saved_cache_goes_on_under_the_same_order_only(tmp_path):
    model, ids, new = llama(), prompt(2, 75), prompt(2, 3, seed=9)
    model.set_attn_implementation(ATTENTION)
    policy, path = SMALL.of(model), tmp_path / "prompt.cache"
    with torch.inference_mode():
        cache = KVCache(model.config, policy)
        model(ids, past_key_values=cache)
        save(cache, path, model, policy)
        again = restore(path, model, policy)
        told = [model(new, past_key_values=c).logits for c in (cache, again)]
    assert torch.equal(*told)
    assert nbytes(cache) == nbytes(again)
    for other in (SMALL.of(llama(seed=1)), BFP(block=8, sort=False)):
        with pytest.raises(NarrowsError, match="another technique"):
            restore(path, model, other)


def test_what_cannot_work_is_refused():
    model = llama()
    for bad, told in (
        ({"key_mantissa": 3}, "key_mantissa must be"), ({"value_mantissa": "4"}, "value_mantissa"),
        ({"key_mantissa": True}, "key_mantissa must be"), ({"block": 0}, "block must be"),
        ({"sort": 1}, "sort must be"),
    ):  # fmt: skip
        with pytest.raises(NarrowsError, match=told):
            BFP(**bad)
    with pytest.raises(NarrowsError, match="do not divide heads of 16"), BFP().apply(model):
        pass
    with pytest.raises(NarrowsError, match="model's weights are needed"):
        SMALL.cache(model.config)
    with pytest.raises(NarrowsError, match="transformers model"), SMALL.apply(object()):
        pass
    with pytest.raises(NarrowsError, match="no k_proj"):
        key_orders(torch.nn.Linear(2, 2))
    codec = BlockFloat(4, "token", 32)
    for wrong in (float("inf"), float("nan")):
        with pytest.raises(NarrowsError, match="infinite or not a number"):
            codec.pack(torch.full((1, 1, 1, SIZE), wrong))
    with pytest.raises(NarrowsError, match="another model"):
        BlockFloat(4, "token", 32, some_order(3)).pack(random_tokens(1))
    with pytest.raises(NarrowsError, match="do not fill blocks"):
        BlockFloat(4, "channel", 32).pack(random_tokens(31))
    with pytest.raises(NarrowsError, match="matters only where"):
        BlockFloat(4, "channel", 32, some_order())


def case(model="llama-2-7b", prompt=8192, generate=256, batch=1, **options) -> Case:
    return Case(llm(model, prompt, generate, batch, "fp16", **options), load("a100-80"))


def test_predicted_bytes_are_those_of_a_store():
    before = case(prompt=300, generate=100)
    after = before.with_(BFP())
    bits = {"key": 0.0, "value": 0.0}
    for seen in range(300, 400):
        for what, full in (("key", 0), ("value", seen % 32)):
            bits[what] += (16 * full + 4.25 * (seen - full)) / 100
    for what, mean in bits.items():
        held = {p: after.workload.tensors[f"kv.{p}.{what}"] for p in ("prompt", "new")}
        read = 300 * held["prompt"].codec.bits + np.arange(100).mean() * held["new"].codec.bits
        assert read == pytest.approx(mean, rel=0.01)


def test_a_prediction_composes_and_is_counted_once():
    before = case(batch=16)
    after = before.with_(BFP())
    a, b = bound(before).phase("decode"), bound(after).phase("decode")
    assert 2 < a.seconds / b.seconds < 16 / 4.25
    assert after.with_(BFP()).workload is after.workload
    assert "packs the cache" in BFP().why(before)
    assert "nothing changes" in BFP().why(after)
    both = before.with_(SnapKV(1024), BFP()).workload.bytes("kv")
    assert both < min(before.with_(t).workload.bytes("kv") for t in (SnapKV(1024), BFP()))
    fewer = before.with_(KIVI()).workload.bytes("kv")
    assert before.with_(KIVI(), BFP()).workload.bytes("kv") <= fewer * 1.0001
    together = case(prompt=np.array([64, 8192]), generate=np.array([10, 0])).with_(BFP())
    kv = np.broadcast_to(together.workload.bytes("kv"), 2)
    for i, (p, g) in enumerate(((64, 10), (8192, 0))):
        assert kv[i] == pytest.approx(case(prompt=p, generate=g).with_(BFP()).workload.bytes("kv"))


def test_cases_it_cannot_help_say_so():
    with pytest.raises(NarrowsError, match="softcap"):
        case("gemma-2-9b").with_(BFP())
    train = Case(llm("llama-2-7b", 512, 0, 1, "bf16", train=True), load("a100-80"))
    with pytest.raises(NarrowsError, match="no key-value cache"):
        train.with_(BFP())
    with pytest.raises(NarrowsError, match="do not divide heads of 128"):
        case().with_(BFP(block=96))


def test_find_ranks_it():
    asked = narrows.case("llama-2-7b", "a100-80", prompt=8192, generate=256, batch=8)
    assert "bfp" in [option.key for option in narrows.find(asked)]


@pytest.mark.parametrize("settings", [(4, 4, 16), (8, 4, 8), (2, 8, 16)])
@pytest.mark.parametrize("order", [None, some_order()])
def test_one_pass_of_the_loops_is_the_merge_of_the_parts(settings, order):
    technique = BFP(*settings, sort=order is not None)
    store = store_of(technique, None if order is None else {0: order})
    keys = random_tokens(331)
    store.fill(keys[:, :, :300], keys[:, :, :300].flip(2), None, None)
    for at in range(300, 331):
        store.append(keys[:, :, at : at + 1], keys[:, :, at - 1 : at])
        queries = torch.randn(1, keys.shape[1], 2, SIZE)
        visible = torch.rand(1, 1, 2, store.held) > 0.3
        bias = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
        tails = store.tails[0].view, store.tails[1].view
        one = store.segment.fused(queries, tails, bias, 0.125)
        if one is None:
            pytest.skip("no C compiler here")
        torch.testing.assert_close(one, store._merged(queries, bias, 0.125))
        by_blocks = attend_packed.blocks(
            queries, store.bodies[0].packed, store.bodies[1].packed, store.segment.tokens,
            bias[..., : store.segment.tokens], 0.125,
        )  # fmt: skip
        looped = attend_packed.packed(
            queries, store.bodies[0].packed, store.bodies[1].packed, store.segment.tokens,
            bias[..., : store.segment.tokens], 0.125,
        )  # fmt: skip
        for mine, plain in zip(looped, by_blocks, strict=True):
            torch.testing.assert_close(mine, plain)
        store.settle()
