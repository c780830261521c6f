"""KIVI stores what a slow written-out KIVI stores, attends to just that, says what it cannot."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

import narrows
from narrows.claims._kivi import SIZE, equal_parts, histories, random_tokens, store_of
from narrows.core.bound import bound
from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.kv import attend_packed, pack_affine, quality
from narrows.kv.adapter import nbytes, stores
from narrows.kv.kivi import KIVI
from narrows.kv.snapkv import SnapKV
from narrows.kv.store_packed import PackedStore
from narrows.machines.load import load
from narrows.trace.llm import llm
from tests.cpu.kv.tiny import left_padded, llama, prompt

SMALL = KIVI(group_size=16, residual_length=32)
"""For heads of 16 channels."""


@pytest.mark.parametrize("bits", [(2, 2), (4, 1), (8, 4)])
@pytest.mark.parametrize(("group", "residual"), [(16, 16), (16, 32), (1, 3), (8, 8)])
def test_what_is_stored_is_the_definition_at_every_boundary(bits, group, residual):
    for store, keys, values in histories(KIVI(*bits, group, residual)):
        same, total = equal_parts(store, keys, values)
        assert same == total
        held = keys.shape[2]
        assert store.held == store.seen == held
        assert store.bodies[0].tokens == held // residual * residual
        assert store.bodies[1].tokens == max(held - residual, 0)


def by_hand(queries, keys, values, mask, scaling):
    group = queries.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    scores = queries.double() @ keys.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ values).float()


@pytest.mark.parametrize("few", [0, 16])
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("bits", [(2, 2), (4, 2), (1, 8)])
@pytest.mark.parametrize(("tokens", "new"), [(700, 1), (127, 1), (128, 3), (1, 1), (4200, 2)])
def test_attention_is_that_of_what_is_stored(monkeypatch, few, threads, bits, tokens, new):
    monkeypatch.setattr(attend_packed, "FEW", few)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    store = store_of(KIVI(*bits))
    keys, values = random_tokens(tokens + new, 2), random_tokens(tokens + new, 2, seed=1)
    padded = min(tokens // 2, 300)
    valid = torch.arange(tokens + new) >= torch.tensor([[0], [padded]])
    store.fill(keys[:, :, :tokens], values[:, :, :tokens], None, valid[:, :tokens])
    store.append(keys[:, :, tokens:], values[:, :, tokens:])
    query = torch.randn(2, 6, new, SIZE, generator=torch.Generator().manual_seed(0))
    place = torch.arange(tokens, tokens + new)[:, None]
    mask = valid[:, None, None] & (torch.arange(tokens + new) <= place)
    expected = by_hand(query, store.keys, store.values, mask, 0.125)
    for given in (mask, torch.zeros(mask.shape).masked_fill(~mask, torch.finfo().min)):
        found = store.attend(query, given, 0.125)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    each = mask.expand(2, 6, -1, -1).clone()
    each[:, 1::2, :, 5:9] &= tokens < 9
    expected = by_hand(query, store.keys, store.values, each, 0.125)
    torch.testing.assert_close(store.attend(query, each, 0.125), expected, rtol=1e-5, atol=1e-5)


def test_the_compiled_loops_are_what_runs():
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here: decode goes block by block through torch")
    store = store_of(KIVI())
    assert attend_packed.compiled(SIZE, 2, *store.codecs) is not None


def test_without_a_compiler_the_answer_is_the_same(monkeypatch):
    monkeypatch.setattr(attend_packed, "compiled", lambda *sizes: None)
    monkeypatch.setattr(pack_affine, "compiled", lambda *sizes: None)
    store = store_of(KIVI())
    keys = random_tokens(600)
    store.fill(keys, keys.flip(2), None, None)
    query = torch.randn(1, 4, 1, SIZE)
    expected = by_hand(query, store.keys, store.values, None, 0.125)
    torch.testing.assert_close(store.attend(query, None, 0.125), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("settings", [(2, 2, 32, 128), (4, 2, 16, 32), (1, 8, 8, 8)])
def test_one_pass_over_packed_and_recent_is_the_merge_of_the_two(monkeypatch, threads, settings):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(attend_packed, "ALONE", 0)
    store = store_of(KIVI(*settings))
    keys = random_tokens(417)
    store.fill(keys[:, :, :300], keys[:, :, :300].flip(2), None, None)
    more_keys_packed = False
    for at in range(300, 417):
        more_keys_packed |= store.bodies[0].tokens > store.bodies[1].tokens
        store.append(keys[:, :, at : at + 1], keys[:, :, at - 1 : at])
        if at % 13 == 0:
            queries = torch.randn(1, keys.shape[1], 2, SIZE)
            visible = torch.rand(1, 1, 2, store.held) > 0.3
            bias = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
            tails = store.tails[0].view, store.tails[1].view
            one = store.segment.fused(queries, tails, bias, 0.125)
            torch.testing.assert_close(one, store._merged(queries, bias, 0.125))
        store.settle()
    assert more_keys_packed


def test_a_wholly_hidden_body_weighs_nothing():
    store = store_of(KIVI())
    keys = random_tokens(400)
    store.fill(keys, keys.flip(2), None, None)
    mask = torch.arange(400)[None, None, None] >= 390
    query = torch.randn(1, 2, 1, SIZE)
    expected = by_hand(query, store.keys, store.values, mask, 0.125)
    torch.testing.assert_close(store.attend(query, mask, 0.125), expected, rtol=1e-5, atol=1e-5)


def test_bytes_are_codes_scales_and_residual():
    model, ids = llama(), prompt(2, 100)
    heads = 3 * 2 * 2  # layers, rows, KV heads
    with SMALL.apply(model) as applied, torch.inference_mode():
        model(ids)
        # 96 keys and 68 values in 2 bits with 32 of scales a group of 16; 4 and 32 in fp32
        packed = heads * (96 + 68) * 16 * (2 + 32 / 16) / 8
        assert applied.nbytes() == packed + heads * (4 + 32) * 16 * 4
        reserved = sum(s.reserved_bytes() for s in stores(applied.cache))
        assert reserved < 2.5 * applied.nbytes()  # nothing of the whole prompt is referenced
        for _ in range(40):
            model(ids[:, :1], past_key_values=applied.cache)
        store = stores(applied.cache)[0]
        assert (store.bodies[0].tokens, store.bodies[1].tokens) == (128, 108)


def test_prefill_is_exact_and_generate_runs_on():
    model = llama()
    ids, mask = left_padded([prompt(1, 120)[0], prompt(1, 70)[0]])
    with torch.inference_mode():
        expected = model(ids, attention_mask=mask).logits
        with SMALL.apply(model):
            assert torch.equal(model(ids, attention_mask=mask).logits[mask.bool()],
                               expected[mask.bool()])  # fmt: skip
    with KIVI(8, 8, 1, 32).apply(model):  # groups of one: as good as exact
        told = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
    dense = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
    assert torch.equal(told, dense)
    with SMALL.apply(model):
        rough = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
    assert rough.shape == dense.shape
    assert not torch.equal(rough, dense)  # two bits of noise are not nothing


def test_padding_does_not_widen_groups():
    keys = random_tokens(64)
    padded = torch.cat([torch.full((1, 2, 64, SIZE), 1e9), keys], 2)
    store = store_of(KIVI(residual_length=32))
    store.fill(padded, padded, None, torch.arange(128)[None] >= 64)
    alone = store_of(KIVI(residual_length=32))
    alone.fill(keys, keys, None, None)
    assert torch.equal(store.keys[:, :, 64:], alone.keys)
    assert store.positions()[0, 0, 62:66].tolist() == [-1, -1, 0, 1]


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 3}])
def test_beams_carry_their_caches(options):
    model, ids = llama(), prompt(1, 120)
    with KIVI(8, 8, 1, 32).apply(model):
        told = model.generate(ids, max_new_tokens=20, do_sample=False, **options)
    assert torch.equal(told, model.generate(ids, max_new_tokens=20, do_sample=False, **options))


def test_bfloat16():
    model = llama().to(torch.bfloat16)
    with SMALL.apply(model) as applied:
        assert model.generate(prompt(2, 90), max_new_tokens=40, do_sample=False).shape == (2, 130)
        assert stores(applied.cache)[0].tails[0].view.dtype == torch.bfloat16


def test_crop_takes_back_what_is_not_packed():
    model, ids = llama(), prompt(1, 70)
    with SMALL.apply(model) as applied, torch.inference_mode():
        model(ids[:, :20])  # all in full precision: nothing of the step is lost
        cache = applied.cache
        first = model(ids[:, :1], past_key_values=cache).logits
        cache.crop(-1)
        assert cache.get_seq_length() == 20
        torch.testing.assert_close(model(ids[:, :1], past_key_values=cache).logits, first)
        model(ids)
        cache = applied.cache
        cache.crop(-1)
        assert cache.get_seq_length() == 69
        with pytest.raises(NarrowsError, match="only 5 are not packed"):
            cache.crop(-6)
        assert cache.get_seq_length() == 69
        assert model(ids[:, :1], past_key_values=cache).logits.isfinite().all()


def test_a_policy_may_choose_what_is_packed():
    """Columns kept by another policy: the store packs them, at their positions."""
    store = PackedStore(*store_of(KIVI()).codecs, residual=128)
    keys = random_tokens(500)
    columns = torch.arange(0, 500, 2).expand(1, 2, -1)
    store.fill(keys, keys, columns, None)
    assert store.held == 250
    assert torch.equal(store.positions(), columns)
    whole = store_of(KIVI())
    whole.fill(keys[:, :, ::2], keys[:, :, ::2], None, None)
    assert torch.equal(store.keys, whole.keys)


def test_quality_reads_token_by_token():
    model, ids, rest = llama(), prompt(2, 120), prompt(2, 9, seed=4)
    told = quality.through(model, {"dense": None, "kivi": SMALL}, ids, rest)
    with SMALL.apply(model) as applied, torch.inference_mode():
        model(ids)
        steps = [model(rest[:, i : i + 1], past_key_values=applied.cache).logits for i in range(9)]
    torch.testing.assert_close(told["kivi"][:, 1:], torch.cat(steps, 1), rtol=1e-3, atol=1e-3)
    assert (told["kivi"] - told["dense"]).abs().max() > 0.01


def test_what_cannot_work_is_refused():
    model = llama()
    with pytest.raises(NarrowsError, match="do not divide heads of 16"), KIVI().apply(model):
        pass
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(NarrowsError, match="do not divide heads of 16"):
        KIVI().cache(model.config)
    for bad, told in (
        ({"key_bits": 3}, "key_bits must be"), ({"value_bits": "2"}, "value_bits must be"),
        ({"key_bits": True}, "key_bits must be"), ({"group_size": 0}, "group_size must be"),
        ({"residual_length": 100}, "multiple of the group_size"),
        ({"residual_length": 0}, "residual_length must be"),
    ):  # fmt: skip
        with pytest.raises(NarrowsError, match=told):
            KIVI(**bad)


def case(model="llama-2-7b", prompt=8192, generate=256, batch=1, **options) -> Case:
    return Case(llm(model, prompt, generate, batch, "fp16", **options), load("a100-80"))


def test_predicted_bytes_are_those_of_a_store():
    """One layer and head by hand: the mean over steps of what the store would hold."""
    before = case(prompt=300, generate=100)
    after = before.with_(KIVI())
    bits = {"key": [], "value": []}
    for seen in range(300, 400):
        for what, full in (("key", seen % 128), ("value", min(seen, 128))):
            bits[what].append(16 * full + 3 * (seen - full))
    for what, each in bits.items():
        held = {p: after.workload.tensors[f"kv.{p}.{what}"] for p in ("prompt", "new")}
        read = 300 * held["prompt"].codec.bits + np.arange(100).mean() * held["new"].codec.bits
        assert read == pytest.approx(np.mean(each), rel=0.01)


def test_a_sweep_is_the_single_cases():
    together = case(prompt=np.array([64, 500, 8192]), generate=np.array([10, 300, 0])).with_(KIVI())
    kv = np.broadcast_to(together.workload.bytes("kv"), 3)
    for i, (p, g) in enumerate(((64, 10), (500, 300), (8192, 0))):
        alone = case(prompt=p, generate=g).with_(KIVI()).workload.bytes("kv")
        assert kv[i] == pytest.approx(alone)


def test_decode_gains_what_the_bytes_say():
    before = case(batch=16)
    after = before.with_(KIVI())
    a, b = bound(before).phase("decode"), bound(after).phase("decode")
    assert 2 < a.seconds / b.seconds < 16 / 3
    assert b.flops > a.flops
    assert after.with_(KIVI()).workload is after.workload
    assert "packs the cache" in KIVI().why(before)
    assert "nothing changes" in KIVI().why(after)
    both = before.with_(SnapKV(1024), KIVI()).workload.bytes("kv")
    assert both < min(before.with_(t).workload.bytes("kv") for t in (SnapKV(1024), KIVI()))


def test_cases_it_cannot_help_say_so():
    with pytest.raises(NarrowsError, match="softcap"):
        case("gemma-2-9b").with_(KIVI())
    train = Case(llm("llama-2-7b", 512, 0, 1, "bf16", train=True), load("a100-80"))
    with pytest.raises(NarrowsError, match="no key-value cache"):
        train.with_(KIVI())


def test_find_ranks_it():
    asked = narrows.case("llama-2-7b", "a100-80", prompt=8192, generate=256, batch=8)
    keys = [option.key for option in narrows.find(asked)]
    assert "kivi" in keys
    assert nbytes(KIVI(group_size=16, residual_length=16).cache(llama().config)) == 0
