"""Any codec, tier and policy attend as unpacked; caches are copied, saved and restored."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from narrows.core.errors import NarrowsError
from narrows.kv import tier as tiers
from narrows.kv.adapter import ATTENTION, KVCache, copied, nbytes, stores
from narrows.kv.baselines import HeavyHitters, WindowOnly
from narrows.kv.chunked import prefill
from narrows.kv.codec import Affine, Codec, Dense
from narrows.kv.kivi import KIVI
from narrows.kv.saved import restore, save
from narrows.kv.select_torch import all_votes
from narrows.kv.snapkv import SnapKV
from narrows.kv.stack import Stack
from narrows.kv.store_packed import PackedStore
from narrows.kv.store_torch import Store, attend
from tests.cpu.kv.tiny import left_padded, llama, prompt

SMALL = KIVI(group_size=16, residual_length=32)
CODECS: list[tuple[Codec, Codec, int]] = [
    (Dense(), Dense(), 0),
    (Dense(torch.float16), Dense(torch.float16), 8),
    (Affine(2, "channel", 16), Affine(2, "token", 16), 32),
    (Affine(8, "token", 16), Affine(4, "channel", 8), 16),
    (Affine(4, "token", 16), Affine(4, "token", 16), 0),
    (Dense(), Affine(4, "channel", 8), 0),
    (Affine(4, "channel", 8), Dense(), 0),
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def places(folder):
    return {"device": tiers.Device(), "host": tiers.Host(), "drive": tiers.Drive(folder)}


@pytest.mark.parametrize("place", ["device", "host", "drive"])
@pytest.mark.parametrize(("keys", "values", "residual"), CODECS)
def test_any_codec_in_any_tier_attends_as_unpacked(tmp_path, place, keys, values, residual):
    store = PackedStore(keys, values, residual, places(tmp_path)[place])
    columns = torch.arange(3, 150).expand(2, 2, -1)
    store.fill(random(2, 2, 150, 16), random(2, 2, 150, 16, seed=1), columns, None)
    for step in range(40):
        store.append(random(2, 2, 1, 16, seed=step), random(2, 2, 1, 16, seed=step + 50))
        asked = random(2, 4, 1, 16, seed=step + 99)
        found = store.attend(asked, None, None)
        whole = attend(asked, store.keys, store.values, None, None)
        assert (found - whole).abs().max() < 1e-5
        store.settle()
    assert store.held == 147 + 40
    assert sum(store.tiers().values()) == store.nbytes()
    assert store.tiers()[place] > 0
    assert torch.equal(store.positions()[0, 0], torch.arange(3, 190))


def test_far_tiers_count_what_moves(tmp_path):
    for name, tier in places(tmp_path).items():
        store = PackedStore(Dense(), Dense(), 0, tier)
        store.fill(random(1, 2, 256, 16), random(1, 2, 256, 16), None, None)
        tier.traffic.bytes = 0
        store.attend(random(1, 2, 1, 16), None, None)
        wanted = 0 if name == "device" else 2 * 2 * 256 * 16 * 4
        assert tier.traffic.bytes == wanted  # 16 KiB a head: whole pages


def test_a_rate_is_kept():
    tier = tiers.Host(rate=1e6)
    room = tier.room((1, 1, 64, 64), torch.float32, torch.device("cpu"))
    room.read(0, 64)
    assert tier.traffic.seconds >= 64 * 64 * 4 / 1e6


def test_a_drive_reads_whole_pages_and_leaves_nothing(tmp_path):
    tier = tiers.Drive(tmp_path)
    room = tier.room((1, 2, 100, 3), torch.float32, torch.device("cpu"))
    x = random(1, 2, 100, 3)
    room.write(0, x)
    assert not list(tmp_path.iterdir())
    assert torch.equal(room.read(7, 9), x[:, :, 7:9])
    assert tier.traffic.bytes == 2 * 4096
    index = torch.tensor([[[99, 0], [5, 5]]])
    assert torch.equal(room.take(index), x.gather(2, index.unsqueeze(-1).expand(1, 2, 2, 3)))
    assert torch.equal(room.select(torch.tensor([0, 0])).read(0, 100), torch.cat([x, x]))


def test_a_full_drive_leaves_the_cache_as_it_was(tmp_path, monkeypatch):
    store = PackedStore(Affine(4, "token", 16), Dense(), 0, tiers.Drive(tmp_path))
    store.fill(random(1, 2, 64, 16), random(1, 2, 64, 16), None, None)
    asked = random(1, 2, 1, 16)
    before = store.attend(asked, None, None)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    store.append(random(1, 2, 200, 16), random(1, 2, 200, 16))
    with pytest.raises(NarrowsError, match="the drive is full"):
        store.settle()
    assert store.held == 264
    store.crop(200)
    assert torch.equal(store.attend(asked, None, None), before)


def test_a_drive_that_fails_mid_decode_says_so(tmp_path, monkeypatch):
    store = PackedStore(Dense(), Dense(), 0, tiers.Drive(tmp_path))
    store.fill(random(1, 2, 64, 16), random(1, 2, 64, 16), None, None)

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", broken)
        with pytest.raises(NarrowsError, match=r"reading from .* failed"):
            store.attend(random(1, 2, 1, 16), None, None)
    assert store.attend(random(1, 2, 1, 16), None, None).isfinite().all()


@pytest.mark.parametrize("bad", [-1.0, 0.0])
def test_bad_settings_of_tiers(bad, tmp_path):
    with pytest.raises(NarrowsError, match="above 0"):
        tiers.Host(rate=bad)
    with pytest.raises(NarrowsError, match="multiples of 4096"):
        tiers.Drive(tmp_path, page=1000)
    with pytest.raises(NarrowsError, match="no file can be made"):
        tiers.Drive(tmp_path / "none").room((1, 1, 1, 1), torch.float32, torch.device("cpu"))
    with pytest.raises(NarrowsError, match="not a whole number of the groups"):
        PackedStore(Affine(2, "channel", 32), Dense(), 16)


def test_a_stack_evicts_then_codes(tmp_path):
    model, ids = llama(), prompt(2, 300)
    stack = Stack(SnapKV(capacity=128), SMALL, tiers.Drive(tmp_path))
    assert stack.key == "snapkv+kivi"
    alone = {}
    for name, technique in (("snapkv", SnapKV(capacity=128)), ("kivi", SMALL), ("both", stack)):
        with torch.inference_mode(), technique.apply(model) as applied:
            model(ids)
            alone[name] = applied.nbytes()
            held = stores(applied.cache)[0]
            assert held.held == (300 if name == "kivi" else 128)
            out = model.generate(ids, max_new_tokens=40, do_sample=False)
        assert out.shape == (2, 340)
    assert alone["both"] < min(alone["snapkv"], alone["kivi"])
    assert held.tiers()["drive"] > held.tiers()["device"] / 2


def test_a_stack_refuses_what_does_not_fit():
    with pytest.raises(NarrowsError, match="not a technique that stores"):
        Stack(SnapKV(), SnapKV())
    with pytest.raises(NarrowsError, match="store of its own"):
        Stack(SMALL, SMALL)


@pytest.mark.parametrize("chunk", [7, 64, 299, 300, 1000])
@pytest.mark.parametrize("policy", [None, SMALL, SnapKV(capacity=96)])
def test_prefill_in_chunks_is_prefill(chunk, policy):
    model, ids = llama(), prompt(2, 300)
    model.set_attn_implementation(ATTENTION)
    if chunk < 32 and isinstance(policy, SnapKV):
        pytest.skip("its window is longer than a chunk")
    whole, parts = KVCache(model.config, policy), KVCache(model.config, policy)
    with torch.inference_mode():
        expected = model(ids, past_key_values=whole, logits_to_keep=1).logits[:, -1]
        if chunk == 7 or (chunk == 299 and isinstance(policy, SnapKV)):
            chunk = 50  # the last chunk must hold the window
        found = prefill(model, ids, parts, chunk)
        assert (found - expected).abs().max() < 1e-4
        for one, other in zip(stores(whole), stores(parts), strict=True):
            assert one.held == other.held
            assert torch.equal(one.positions(), other.positions())
            assert (one.keys - other.keys).abs().max() < 2e-1
        assert nbytes(whole) == nbytes(parts)


def test_chunks_of_a_padded_batch_are_those_of_each_row():
    model = llama()
    rows = [prompt(1, n, seed=n)[0] for n in (200, 260)]
    ids, mask = left_padded(rows)
    model.set_attn_implementation(ATTENTION)
    cache = KVCache(model.config)
    found = prefill(model, ids, cache, 64, attention_mask=mask)
    for i, row in enumerate(rows):
        alone = prefill(model, row[None], KVCache(model.config), 64)
        assert (found[i] - alone[0]).abs().max() < 1e-4
    with pytest.raises(NarrowsError, match="more padding than a chunk"):
        prefill(model, ids, KVCache(model.config), 60, attention_mask=mask)
    with pytest.raises(NarrowsError, match="holds tokens already"):
        prefill(model, ids, cache, 64, attention_mask=mask)


class Chunked(WindowOnly):
    """Reads 50 tokens at a time, keeping no more than the capacity."""

    chunk = 50

    def on_prefill_chunk(self, chunk, store):
        keys = store.keys
        if keys.shape[2] <= self.capacity:
            return None
        recent = torch.arange(keys.shape[2] - self.capacity, keys.shape[2])
        return recent.expand(*keys.shape[:2], -1)

    def on_prefill_end(self, prompt):
        return None


def test_a_policy_that_chunks_is_obeyed_by_generate():
    from narrows.kv.adapter import wrap

    model, ids = llama(), prompt(2, 330)
    with torch.inference_mode(), wrap(model, Chunked(100)) as applied:
        out = model.generate(ids, max_new_tokens=5, do_sample=False)
        assert out.shape == (2, 335)
        (held,) = {s.held for s in stores(applied.cache)}
        assert held == 100 + 4
        assert stores(applied.cache)[0].positions()[0, 0, 0] == 230
        assert stores(applied.cache)[0].reserved_bytes() < 2 * 2 * 2 * 200 * 16 * 4
    with torch.inference_mode():
        assert model(ids).logits.shape[1] == 330


def test_tokens_kept_ragged_are_attended_as_masked():
    keys, values = random(2, 2, 100, 16), random(2, 2, 100, 16, seed=1)
    columns = torch.arange(100).expand(2, 2, -1).clone()
    columns[0, 0, :90], columns[1, 1, :50], columns[1, 0] = -1, -1, -1
    store = Store()
    store.fill(keys, values, columns, None)
    assert store.nbytes() == 2 * (10 + 100 + 0 + 50) * 16 * 4
    store.append(random(2, 2, 3, 16, seed=2), random(2, 2, 3, 16, seed=3))
    asked = random(2, 4, 3, 16, seed=4)
    found = store.attend(asked, None, None)
    sees = torch.ones(2, 2, 3, 103, dtype=torch.bool).tril(100)
    sees[..., :100] &= (columns >= 0)[:, :, None]
    expected = attend(asked, store.keys, store.values, sees, None)
    assert (found - expected).abs().max() < 1e-5
    store.rows(torch.tensor([1, 0, 1]))
    again = store.attend(asked[[1, 0, 1]], None, None)
    assert (again - expected[[1, 0, 1]]).abs().max() < 1e-5


def test_votes_of_all_queries_are_column_sums():
    from narrows.kv._base import Prompt

    valid = torch.arange(40) >= torch.tensor([[0], [9]])
    queries, keys = random(2, 4, 40, 16), random(2, 2, 40, 16, seed=1)
    made = Prompt(0, queries, keys, keys, valid, 0.25)
    scores = queries @ keys.repeat_interleave(2, 1).transpose(2, 3) * 0.25
    sees = torch.ones(40, 40, dtype=torch.bool).tril() & valid[:, None, None]
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1).nan_to_num()
    expected = weights.sum(2).view(2, 2, 2, 40).mean(2)
    assert (all_votes(made, rows=16) - expected).abs().max() < 1e-5
    kept = HeavyHitters(12, 4).on_prefill_end(made)
    assert kept.shape == (2, 2, 12)


@pytest.mark.parametrize("policy", [None, SMALL, SnapKV(capacity=96)])
def test_a_copy_goes_on_on_its_own(policy):
    model, ids = llama(), prompt(2, 200)
    model.set_attn_implementation(ATTENTION)
    with torch.inference_mode():
        cache = KVCache(model.config, policy)
        model(ids, past_key_values=cache)
        before, new = nbytes(cache), prompt(2, 40, seed=9)
        other = copied(cache)
        first = model(new, past_key_values=other).logits
        assert nbytes(cache) == before < nbytes(other)
        assert torch.equal(model(new, past_key_values=cache).logits, first)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "policy", [None, SMALL, SnapKV(capacity=96), Stack(SnapKV(capacity=96), SMALL)]
)
def test_a_saved_cache_goes_on_as_if_nothing_was(tmp_path, policy, padded):
    model = llama()
    rows = [prompt(1, n, seed=n)[0] for n in ((150, 200) if padded else (200, 200))]
    ids, mask = left_padded(rows)
    model.set_attn_implementation(ATTENTION)
    path = tmp_path / "prompt.cache"
    with torch.inference_mode():
        cache = KVCache(model.config, policy)
        model(ids, past_key_values=cache, attention_mask=mask)
        save(cache, path, model, policy)
        again = restore(path, model, policy)
        new = prompt(2, 5, seed=9)
        both = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], 1)
        told = [model(new, past_key_values=c, attention_mask=both).logits for c in (cache, again)]
    assert torch.equal(*told)
    assert nbytes(cache) == nbytes(again)


def test_a_file_that_does_not_belong_is_refused(tmp_path):
    model, path = llama(), tmp_path / "prompt.cache"
    model.set_attn_implementation(ATTENTION)
    with torch.inference_mode():
        cache = KVCache(model.config, SMALL)
        model(prompt(1, 50), past_key_values=cache)
    save(cache, path, model, SMALL)
    with pytest.raises(NarrowsError, match="another model"):
        restore(path, llama(seed=1), SMALL)
    with pytest.raises(NarrowsError, match="another technique or other settings"):
        restore(path, model, KIVI(4, 4, 16, 32))
    with pytest.raises(NarrowsError, match="no saved cache"):
        restore(tmp_path / "none", model, SMALL)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(NarrowsError, match="cut short"):
        restore(path, model, SMALL)
    path.write_bytes(whole.replace(b"narrows-cache-1", b"narrows-cache-9"))
    with pytest.raises(NarrowsError, match="read the prompt again"):
        restore(path, model, SMALL)
    with pytest.raises(NarrowsError, match="could not be written"):
        save(cache, tmp_path / "no" / "folder", model, SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prompt.cache"]
