"""The store, the seam to transformers, and that both are invisible when nothing is dropped."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, StaticCache

from narrows.core.errors import NarrowsError
from narrows.kv.adapter import ATTENTION, KVCache, KVLayer, nbytes, stores, wrap
from narrows.kv.baselines import KeyNorm, RandomEviction, WindowOnly
from narrows.kv.store_torch import ROOM, Store, attend
from tests.cpu.kv.tiny import left_padded, llama, prompt


def tokens_of(n: int, batch: int = 2, heads: int = 2, size: int = 8, seed: int = 0):
    made = torch.Generator().manual_seed(seed)
    shape = (batch, heads, n, size)
    return torch.randn(shape, generator=made), torch.randn(shape, generator=made)


def grown_by_hand(columns, held, n):
    """Columns a store with `columns` kept of n and then appended to `held` must report."""
    extra = torch.arange(n, n + held - columns.shape[2]).expand(*columns.shape[:2], -1)
    return torch.cat([columns, extra], -1)


def test_tokens_are_written_in_place_and_room_doubles():
    keys, values = tokens_of(10)
    more = tokens_of(4 * ROOM, seed=1)
    store = Store()
    store.fill(keys, values, None, None)
    address, copies = store.keys.data_ptr(), 0
    for i in range(4 * ROOM):
        store.append(more[0][:, :, i : i + 1], more[1][:, :, i : i + 1])
        copies += store.keys.data_ptr() != address
        address = store.keys.data_ptr()
        assert store.keys.untyped_storage().nbytes() < 2 * store.keys[..., :1, :].nbytes * (
            store.held + 2 * ROOM
        )
    assert copies == 2  # at 64 and at 64 + 128 new tokens
    assert torch.equal(store.keys, torch.cat([keys, more[0]], 2))
    assert torch.equal(store.values, torch.cat([values, more[1]], 2))
    assert store.nbytes() == 2 * 2 * 2 * (10 + 4 * ROOM) * 8 * 4


def test_evicted_tokens_are_gone_and_positions_stay():
    keys, values = tokens_of(10)
    columns = torch.tensor([[[0, 3, 9], [1, 2, 9]], [[-1, 8, 9], [4, 8, 9]]])
    store = Store()
    store.fill(keys, values, columns, None)
    assert store.held == 3
    assert store.seen == 10
    assert store.nbytes() == 2 * 11 * 8 * 4  # the empty slot takes none
    # the eleven, room for 64 new tokens, and the columns of twelve slots
    assert store.reserved_bytes() == 2 * (11 + 4 * 64) * 8 * 4 + 12 * 4
    assert torch.equal(store.keys[0, 1], keys[0, 1, [1, 2, 9]])
    assert torch.equal(store.values[1, 0, 1:], values[1, 0, [8, 9]])
    store.append(*tokens_of(2, seed=3))
    assert torch.equal(store.positions(), grown_by_hand(columns, 5, 10))


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("evicted", [False, True])
@pytest.mark.parametrize("given", ["nothing", "bool", "additive"])
def test_attention_over_a_store_is_masked_attention_over_all(queries, evicted, given):
    n, heads = 10, 6
    keys, values = tokens_of(n + queries)
    columns = torch.tensor([[[0, 3, 9], [1, 2, 9]], [[-1, 8, 9], [4, 8, 9]]]) if evicted else None
    store = Store()
    store.fill(keys[:, :, :n], values[:, :, :n], columns, None)
    store.append(keys[:, :, n:], values[:, :, n:])
    query = torch.randn(2, heads, queries, 8)
    place = torch.arange(n, n + queries)[:, None]
    sees = (torch.arange(n + queries) <= place).expand(2, 1, -1, -1).clone()
    mask = None
    if given != "nothing":
        sees[1, :, :, 8] = False
        mask = sees
    if given == "additive":
        mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    allowed = sees.expand(2, heads, -1, -1).clone()
    if columns is not None:
        kept = torch.zeros(2, 2, n + queries, dtype=torch.bool)
        kept[..., n:] = True
        for b in range(2):
            for h in range(2):
                kept[b, h, columns[b, h][columns[b, h] >= 0]] = True
        allowed &= kept.repeat_interleave(3, 1)[:, :, None]
    scores = query @ keys.repeat_interleave(3, 1).transpose(2, 3) * 0.5
    expected = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    expected = expected @ values.repeat_interleave(3, 1)
    torch.testing.assert_close(store.attend(query, mask, 0.5), expected)


def test_attend_takes_a_mask_for_each_query_head():
    keys, values = tokens_of(7)
    query, sees = torch.randn(2, 4, 2, 8), torch.rand(2, 4, 2, 7) > 0.3
    sees[..., 0] = True
    scores = query @ keys.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    expected = scores.masked_fill(~sees, -torch.inf).softmax(-1) @ values.repeat_interleave(2, 1)
    torch.testing.assert_close(attend(query, keys, values, sees, 0.3), expected)


def test_crop_takes_back_new_tokens_only():
    store = Store()
    keys, values = tokens_of(10)
    store.fill(keys, values, torch.arange(5, 10).expand(2, 2, -1), None)
    store.append(*tokens_of(4, seed=2))
    store.crop(3)
    assert (store.held, store.seen) == (6, 11)
    with pytest.raises(NarrowsError, match="only 1 came after"):
        store.crop(2)


def test_dense_cache_gives_the_logits_of_transformers_own():
    model, ids = llama(), prompt(2, 50)
    own = DynamicCache(config=model.config)
    with torch.inference_mode():
        expected = [model(ids, past_key_values=own).logits]
        for step in range(5):
            expected.append(model(ids[:, step : step + 1], past_key_values=own).logits)
        model.set_attn_implementation(ATTENTION)
        cache = KVCache(model.config)
        assert torch.equal(model(ids, past_key_values=cache).logits, expected[0])
        for step in range(5):
            found = model(ids[:, step : step + 1], past_key_values=cache).logits
            torch.testing.assert_close(found, expected[step + 1], rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 55
    assert nbytes(cache) == sum(k.nbytes + v.nbytes for k, v, *_ in own)
    with torch.inference_mode():
        plain = model(ids, past_key_values=DynamicCache(config=model.config)).logits
    assert torch.equal(plain, expected[0])  # other caches go through our attention unharmed


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_generate_is_the_same_when_nothing_is_dropped(options):
    model = llama()
    ids, mask = left_padded([prompt(1, 40)[0], prompt(1, 57, seed=5)[0]])
    run = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, **options}
    torch.manual_seed(7)
    expected = model.generate(ids, **run)
    torch.manual_seed(7)
    with wrap(model, RandomEviction(200)) as applied:
        assert torch.equal(applied.model.generate(ids, **run), expected)


def test_a_second_turn_sees_the_first():
    model, ids = llama(), prompt(1, 90)
    with wrap(model, RandomEviction(200)) as applied, torch.inference_mode():
        whole = applied.model(ids).logits[:, -1]
        model(ids[:, :60])
        cache = applied.cache
        turn = model(ids[:, 60:], past_key_values=cache).logits[:, -1]
        assert cache.get_seq_length() == 90
    torch.testing.assert_close(turn, whole, rtol=1e-4, atol=1e-4)


def test_crop_rolls_a_cache_back():
    model, ids = llama(), prompt(1, 40)
    with wrap(model, WindowOnly(38)) as applied, torch.inference_mode():
        model(ids)
        cache = applied.cache
        first = model(ids[:, :1], past_key_values=cache).logits
        cache.crop(-1)
        assert cache.get_seq_length() == 40
        assert torch.equal(model(ids[:, :1], past_key_values=cache).logits, first)


def test_layers_with_a_sliding_window_stay_transformers_own():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    ids = prompt(1, 60)
    expected = model.generate(ids, max_new_tokens=10, do_sample=False)
    with wrap(model, RandomEviction(100)) as applied:
        found = model.generate(ids, max_new_tokens=10, do_sample=False)
        assert [isinstance(layer, KVLayer) for layer in applied.cache.layers] == [0, 0, 1]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("policy", [RandomEviction(40), WindowOnly(40), KeyNorm(40)])
def test_baselines_fill_the_same_budget(policy):
    model = llama()
    ids, mask = left_padded([prompt(1, 90)[0], prompt(1, 60, seed=5)[0], prompt(1, 20)[0]])
    with wrap(model, policy) as applied, torch.inference_mode():
        model(ids, attention_mask=mask)
        for store in stores(applied.cache):
            positions = store.positions()
            assert positions.shape == (3, 2, 40)
            assert (positions >= 0).sum(-1).unique(dim=1).tolist() == [[40], [40], [20]]
            assert torch.equal(positions[0, 0, -32:], torch.arange(58, 90))
            if isinstance(policy, WindowOnly):
                assert positions[1, 1].tolist() == [0, 1, 2, 3, *range(24, 60)]
    alone = wrap(model, policy)
    with alone as applied, torch.inference_mode():
        model(ids[:1])
        if isinstance(policy, RandomEviction):
            other = [s.positions()[0, 0, :8].tolist() for s in stores(applied.cache)]
            assert other[0] != other[1]  # not one draw for all layers


def test_a_wrap_is_undone_whatever_happens():
    model = llama()
    before = dict(model.state_dict())
    with wrap(model, WindowOnly(40)):
        assert model.config._attn_implementation == ATTENTION

    def fails() -> None:
        with wrap(model, WindowOnly(40)):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fails()
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.set_attn_implementation("eager")
    with wrap(model, WindowOnly(40)):
        pass
    assert model.config._attn_implementation == "eager"


def test_the_callers_own_cache_is_taken_over():
    model, ids = llama(), prompt(1, 60)
    mine = DynamicCache(config=model.config)
    with wrap(model, WindowOnly(40)) as applied, torch.inference_mode():
        model(ids, None, None, mine)
        assert applied.cache is mine
        assert [s.held for s in stores(mine)] == [40] * 3
        assert mine.get_seq_length() == 60
        used = nbytes(mine)
        model(ids, use_cache=False)
        assert nbytes(mine) == used


def test_what_cannot_work_is_refused_in_one_sentence():
    model, ids = llama(), prompt(2, 60)
    with pytest.raises(NarrowsError, match="set_attn_implementation"), torch.inference_mode():
        model(ids, past_key_values=KVCache(model.config))
    with (
        pytest.raises(NarrowsError, match="not a Linear"),
        wrap(torch.nn.Linear(2, 2), WindowOnly(40)),
    ):
        pass
    with wrap(model, WindowOnly(40)), torch.inference_mode():
        with pytest.raises(NarrowsError, match="at work"), wrap(model, WindowOnly(40)):
            pass
        static = StaticCache(config=model.config, max_cache_len=80)
        with pytest.raises(NarrowsError, match="brings its own"):
            model(ids, past_key_values=static)
        mask = torch.ones_like(ids)
        mask[1, -3:] = 0
        with pytest.raises(NarrowsError, match="pad on the left"):
            model(ids, attention_mask=mask)
    with pytest.raises(NarrowsError, match="capacity"):
        RandomEviction(32)
