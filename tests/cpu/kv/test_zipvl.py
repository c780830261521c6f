"""ZipVL attends among the tokens its rule chooses, and stores all of them in the bits it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import narrows
from narrows.claims._zipvl import by_definition, random_prompt, store_of
from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.kv import quality
from narrows.kv.adapter import copied, nbytes, stores
from narrows.kv.chunked import prefill
from narrows.kv.saved import restore, save
from narrows.kv.snapkv import SnapKV
from narrows.kv.stack import Stack
from narrows.kv.zipvl import ZipVL
from narrows.kv.zipvl_store import KEY_GROUP, Keys, ZipStore, pack_values
from narrows.kv.zipvl_torch import attend_among
from narrows.machines.load import load
from narrows.trace.llm import llm
from tests.cpu.kv.tiny import left_padded, llama, prompt

SMALL = {"probes": (8, 8), "refresh": 10}


def by_hand(queries, keys, values, mask):
    group = queries.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    scores = queries.double() @ keys.transpose(2, 3) * queries.shape[3] ** -0.5
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values).float()


@pytest.mark.parametrize("tau", [0.3, 0.9, 0.975, 0.999])
@pytest.mark.parametrize("tokens", [1, 7, 16, 300])
def test_what_is_chosen_is_the_definition(tau, tokens):
    technique = ZipVL(tau, **SMALL)
    asked = random_prompt(tokens)
    chosen = technique.chooser.choose(asked)
    for row, mask in enumerate(chosen):
        expected, _ = by_definition(asked, row, technique)
        assert mask.nonzero()[:, 0].tolist() == expected
        assert mask[-1]


def test_a_padded_row_chooses_as_if_alone():
    technique = ZipVL(0.9, **SMALL)
    alone = random_prompt(120, rows=1)
    shape = (1, alone.keys.shape[1], 40, alone.keys.shape[3])
    more = torch.full(shape, 9.0)
    padded = type(alone)(
        0, torch.cat([more.repeat(1, 4, 1, 1), alone.queries], 2), torch.cat([more, alone.keys], 2),
        torch.cat([more, alone.values], 2), torch.arange(160)[None] >= 40, alone.scaling,
    )  # fmt: skip
    a, b = technique.chooser.choose(alone)[0], technique.chooser.choose(padded)[0]
    assert torch.equal(a, b[40:])
    assert not b[:40].any()


def test_attention_is_among_the_chosen_alone():
    asked = random_prompt(90)
    chosen = ZipVL(0.8, **SMALL).chooser.choose(asked)
    found = attend_among(asked, chosen)
    for row, mask in enumerate(chosen):
        sees = torch.ones(90, 90, dtype=torch.bool).tril() & mask
        sees[~mask, 0] = True
        expected = by_hand(*(x[row : row + 1] for x in (asked.queries, asked.keys, asked.values)),
                           sees)[0]  # fmt: skip
        expected[:, ~mask] = 0
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, KEY_GROUP - 1, KEY_GROUP, KEY_GROUP + 7])
@pytest.mark.parametrize("bits", [2, 4])
def test_codes_are_within_half_a_scale(tokens, bits):
    x = torch.randn(1, 2, tokens, 16, generator=torch.Generator().manual_seed(0))
    keys = Keys(bits, "channel", KEY_GROUP).pack(x)
    scale = keys.parts[1].float().repeat_interleave(KEY_GROUP, 2)[:, :, :tokens]
    assert keys.tokens == tokens
    assert ((keys.unpack() - x).abs() <= 0.501 * scale + 1e-6).all()
    values, factor = pack_values(x, bits)
    scale = values.parts[1].float() * factor.float()
    assert values.parts[1].stride(1) == 0  # one scale for all heads
    assert ((values.unpack() * factor.float() - x).abs() <= 0.501 * scale + 1e-6).all()


@pytest.mark.parametrize("new", [1, 40])
@pytest.mark.parametrize("padding", [0, 30])
def test_attention_is_that_of_what_is_stored(new, padding):
    store = store_of(ZipVL(0.9, **SMALL))
    asked = random_prompt(1300)
    valid = torch.arange(1300) >= torch.tensor([[0], [padding]])
    given = type(asked)(0, asked.queries, asked.keys, asked.values, valid, asked.scaling)
    store.chooser.read(given)
    store.fill(asked.keys, asked.values, None, valid)
    assert store.held == store.seen == 1300
    more = random_prompt(new, seed=3)
    store.append(more.keys, more.values)
    whole = torch.cat([valid, torch.ones(2, new, dtype=torch.bool)], 1)
    place = torch.arange(1300, 1300 + new)[:, None]
    mask = whole[:, None, None] & (torch.arange(1300 + new) <= place)
    expected = by_hand(more.queries, store.keys, store.values, mask)
    found = store.attend(more.queries, mask, None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if not padding:
        again = store.attend(more.queries, None, None)
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
    error = (store.keys[:, :, :1300] - asked.keys)[0].abs().max()
    assert 0.01 < error < 2


def test_important_tokens_are_nearer_than_the_others():
    store = store_of(ZipVL(0.9, **SMALL))
    asked = random_prompt(400)
    chosen = store.chooser.read(asked)
    store.fill(asked.keys, asked.values, None, None)
    error = (store.values - asked.values).pow(2).mean((1, 3))
    for row, mask in enumerate(chosen):
        assert error[row, mask].mean() < 0.2 * error[row, ~mask].mean()


def test_tau_of_one_leaves_prefill_as_it_is():
    model = llama()
    ids, mask = left_padded([prompt(1, 120)[0], prompt(1, 70)[0]])
    with torch.inference_mode():
        expected = model(ids, attention_mask=mask).logits
        with ZipVL(1.0, **SMALL).apply(model):
            found = model(ids, attention_mask=mask).logits
    assert torch.equal(found[mask.bool()], expected[mask.bool()])


def test_generate_packs_every_refresh_and_reports_ratios():
    model, technique = llama(), ZipVL(0.9, **SMALL)
    ids, mask = left_padded([prompt(1, 120)[0], prompt(1, 70)[0]])
    with technique.apply(model) as applied:
        told = model.generate(ids, attention_mask=mask, max_new_tokens=26, do_sample=False)
    assert told.shape == (2, 146)
    assert set(technique.ratios) == {0, 1, 2}
    assert all(0 < r < 1 for r in technique.ratios.values())
    assert len(set(technique.ratios.values())) > 1
    store = stores(applied.cache)[0]
    assert isinstance(store, ZipStore)
    # 25 tokens went through the cache: two times ten are packed, five wait with their queries
    assert [len(p) for p in store.pieces] == [3, 3]
    assert (store.tails[0].tokens, store.asked.tokens, store.packed_slots) == (5, 5, 140)
    assert store.positions()[1, 0, 48:52].tolist() == [-1, -1, 0, 1]


def test_bytes_are_counted_from_what_lies_there():
    technique = ZipVL(0.9, **SMALL)
    store = store_of(technique)
    asked = random_prompt(500, rows=1)
    chosen = int(store.chooser.read(asked)[0].sum())
    store.fill(asked.keys, asked.values, None, None)
    bits = technique.element_bits(500, chosen / 500, 2, 16)
    assert store.nbytes() == pytest.approx(500 * 2 * 16 * (bits["key"] + bits["value"]) / 8)
    assert store.reserved_bytes() < 1.5 * store.nbytes() + 4096
    assert sum(store.tiers().values()) == store.nbytes()


def test_a_cache_is_saved_copied_and_cropped(tmp_path):
    model, technique = llama(), ZipVL(0.9, **SMALL)
    ids, rest = prompt(2, 60), prompt(2, 14, seed=4)
    with technique.apply(model) as applied, torch.inference_mode():
        model(ids)
        for i in range(13):
            model(rest[:, i : i + 1], past_key_values=applied.cache)
        cache = applied.cache
        save(cache, tmp_path / "it", model, technique)
        other = restore(tmp_path / "it", model, technique)
        assert nbytes(other) == nbytes(cache)
        twin = copied(cache)
        last = rest[:, 13:]
        expected = model(last, past_key_values=cache).logits
        for held in (other, twin):
            assert torch.equal(model(last, past_key_values=held).logits, expected)
        cache.crop(-1)
        torch.testing.assert_close(model(last, past_key_values=cache).logits, expected)
        with pytest.raises(NarrowsError, match="only 4 are not packed"):
            cache.crop(-9)
        with pytest.raises(NarrowsError, match="another technique"):
            restore(tmp_path / "it", model, ZipVL(0.9, (8, 2), **SMALL))


def test_rows_are_taken_and_beams_run():
    model, technique = llama(), ZipVL(0.9, (8, 8), **SMALL)
    with technique.apply(model):
        told = model.generate(prompt(1, 60), max_new_tokens=25, do_sample=False, num_beams=3)
    assert told.shape[1] == 85


def test_a_prompt_in_chunks_is_packed_whole():
    model, technique = llama(), ZipVL(0.9, **SMALL)
    with technique.apply(model) as applied, torch.inference_mode():
        expected = prefill(model, prompt(2, 100), narrows_cache(model, None), 40)
        cache = narrows_cache(model, technique)
        found = prefill(model, prompt(2, 100), cache, 40)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        store = stores(cache)[0]
        assert store.held == 100
        assert store.tails[0].tokens == 0
        kinds = set(store.pieces[0][0].kinds.tolist())
        assert kinds == {1, 2}
        assert applied.model(prompt(2, 1), past_key_values=cache).logits.isfinite().all()


def narrows_cache(model, technique):
    from narrows.kv.adapter import KVCache

    return KVCache(model.config, technique)


def test_what_snapkv_keeps_is_important():
    model = llama()
    both = Stack(SnapKV(40, window=8), ZipVL(0.9, **SMALL))
    with both.apply(model) as applied:
        told = model.generate(prompt(2, 120), max_new_tokens=24, do_sample=False)
    assert told.shape == (2, 144)
    store = stores(applied.cache)[0]
    assert set(store.pieces[0][0].kinds.tolist()) == {2}
    assert store.held == 40 + 23
    assert len(store.pieces[0]) == 3


def test_quality_reads_it_alone():
    told = quality.through(
        llama(), {"dense": None, "zip": ZipVL(0.9, **SMALL)}, prompt(2, 60), prompt(2, 3, seed=4)
    )
    assert told["zip"].shape == told["dense"].shape
    assert (told["zip"] - told["dense"]).abs().max() > 0.01


def test_bfloat16():
    model = llama().to(torch.bfloat16)
    with ZipVL(0.9, **SMALL).apply(model):
        assert model.generate(prompt(2, 60), max_new_tokens=12, do_sample=False).shape == (2, 72)


def test_what_cannot_work_is_refused():
    for bad, told in (
        ({"tau": 0}, "tau must lie"), ({"tau": 1.1}, "tau must lie"), ({"tau": True}, "tau must"),
        ({"share": 0.0}, "share must lie"), ({"bits": (2, 4)}, "bits must be two"),
        ({"bits": (3, 2)}, "bits must be two"), ({"bits": 4}, "bits must be two"),
        ({"probes": (0, 64)}, "probes must be two"), ({"probes": (64,)}, "probes must be two"),
        ({"refresh": 0}, "refresh must be"), ({"seed": -1}, "seed must be"),
    ):  # fmt: skip
        with pytest.raises(NarrowsError, match=told):
            ZipVL(**bad)
    model = llama(heads=8)
    model.config.head_dim = 2
    with pytest.raises(NarrowsError, match="do not fill whole bytes"):
        ZipVL().cache(model.config)


def case(model="llama-2-7b", prompt=8192, generate=256, batch=1, **options) -> Case:
    return Case(llm(model, prompt, generate, batch, "fp16", **options), load("a100-80"))


def test_predict_cuts_prefill_and_bytes():
    before = case()
    after = before.with_(ZipVL())
    flops = [float(sum(np.sum(o.flops * o.repeat) for o in c.workload.phase("prefill").ops
                       if o.name in ("scores", "weighted"))) for c in (before, after)]  # fmt: skip
    assert flops[1] == pytest.approx(0.25 * flops[0])
    assert before.bound().phase("prefill").seconds > after.bound().phase("prefill").seconds
    packed = after.workload.tensors["kv.prompt.key"].codec.bits
    assert packed == pytest.approx(3.0, rel=0.02)
    assert after.with_(ZipVL()).workload is after.workload
    assert "nothing changes" in ZipVL().why(after)
    dense = before.with_(ZipVL(tau=1.0, share=1.0))
    assert [o.name for o in dense.workload.phase("prefill").ops if "zipvl" in o.name] == []


def test_a_sweep_is_the_single_cases():
    together = case(prompt=np.array([64, 500, 8192]), generate=np.array([10, 300, 0])).with_(
        ZipVL()
    )
    kv = np.broadcast_to(together.workload.bytes("kv"), 3)
    for i, (p, g) in enumerate(((64, 10), (500, 300), (8192, 0))):
        alone = case(prompt=p, generate=g).with_(ZipVL()).workload.bytes("kv")
        assert kv[i] == pytest.approx(alone)


def test_cases_it_cannot_help_say_so():
    with pytest.raises(NarrowsError, match=r"softcap|sliding window"):
        case("gemma-2-9b").with_(ZipVL())
    train = Case(llm("llama-2-7b", 512, 0, 1, "bf16", train=True), load("a100-80"))
    with pytest.raises(NarrowsError, match="no key-value cache"):
        train.with_(ZipVL())
    asked = narrows.case("llama-2-7b", "a100-80", prompt=8192, generate=256, batch=8)
    assert "zipvl" in [option.key for option in narrows.find(asked)]
