"""InstInfer: drives answer what attention over their tokens is, count what moves, fail whole."""

from __future__ import annotations

import gc
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

import narrows
from narrows.claims._instinfer import sparq, stream_of
from narrows.core.bound import bound
from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.kv import instinfer_engine, quality, saved
from narrows.kv._instinfer import CSD, touched
from narrows.kv.adapter import copied, stores
from narrows.kv.instinfer import InstInfer, mended
from narrows.kv.instinfer_flash import Flash, Full
from narrows.kv.instinfer_torch import InStorageStore
from narrows.kv.kivi import KIVI
from narrows.kv.snapkv import SnapKV
from narrows.kv.stack import Stack
from narrows.machines.load import load
from narrows.trace.config import shape
from narrows.trace.llm import llm
from tests.cpu.kv.tiny import left_padded, llama, prompt

DENSE = InstInfer(1, drives=2)


@pytest.fixture(scope="module", autouse=True)
def _drives_end():
    yield
    for drive in DENSE._running:
        drive.close()


def gone(pid: int) -> bool:
    for _ in range(1000):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def ended(*techniques: InstInfer) -> None:
    for technique in techniques:
        for drive in technique._running:
            drive.close()


# --- the engine, in this process -----------------------------------------------------------------


def numbers(tokens, size=32, group=3, seed=0):
    rng = np.random.default_rng(seed)
    made = rng.normal(size=(2, tokens, size)).astype(np.float32)
    return rng.normal(size=(group, size)).astype(np.float32), *made


@pytest.mark.parametrize("strip", [1, 2, 3, 32])
@pytest.mark.parametrize("page", [4, 96, 512, 4096, 16384])
def test_pages_change_what_is_read_and_not_the_answer(page, strip):
    queries, keys, values = numbers(150)
    expected = sparq(queries, keys, values, 0.2, 5, 20)
    for begun in (1, 64, 150):
        stream = stream_of(keys, values, page, begun, strip)
        found = instinfer_engine.sparf(stream, queries, 0.2, 5, 20)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert stream.count == 150
        np.testing.assert_array_equal(stream.keys.span(0), keys)
        full = instinfer_engine.sparf(stream, queries, 0.2, 32, 150)
        np.testing.assert_allclose(full, instinfer_engine.dense(stream, queries, 0.2), atol=1e-5)


def test_an_element_a_page_reads_nothing_in_vain_and_larger_ones_do():
    queries, keys, values = numbers(300)
    wasted = {}
    for page in (4, 4096):
        stream = stream_of(keys, values, page, 300, strip=1)
        wear = stream.flash.wear
        wear.read = wear.asked = 0
        instinfer_engine.sparf(stream, queries, 0.2, 4, 30)
        wasted[page] = wear.read * page - wear.asked
        assert wear.asked <= wear.read * page
    assert wasted[4] == 0
    assert wasted[4096] > 0


def test_whole_pages_read_no_more_than_their_share():
    queries, keys, values = numbers(1024)
    stream = stream_of(keys, values, 512, 1024)
    wear = stream.flash.wear
    wear.read = 0
    instinfer_engine.sparf(stream, queries, 0.2, 32, 128, pages=True)
    by_channel = 1024 * 32 * 4 // 512
    assert wear.read == by_channel + 2 * 128 // stream.keys.per
    everything = instinfer_engine.sparf(stream, queries, 0.2, 32, 1024, pages=True)
    np.testing.assert_allclose(everything, instinfer_engine.dense(stream, queries, 0.2), atol=1e-5)


@pytest.mark.parametrize("cut", [0, 1, 15, 16, 99, 100, 101])
def test_truncated_and_grown_again_is_the_same_as_never_cut(cut):
    queries, keys, values = numbers(120)
    stream = stream_of(keys, values, 512, 100)
    other = stream.copy()
    stream.truncate(cut)
    stream.flash.reserve(stream.pages(120 - cut))
    stream.append(keys[cut:], values[cut:])
    for made in (stream, other):
        np.testing.assert_array_equal(made.values.span(0), values)
        np.testing.assert_allclose(made.total, values.sum(0), rtol=1e-5, atol=1e-4)
        found = instinfer_engine.sparf(made, queries, 0.2, 8, 30)
        np.testing.assert_allclose(found, sparq(queries, keys, values, 0.2, 8, 30), atol=1e-5)
    stream.free()
    np.testing.assert_array_equal(other.keys.span(0), keys)
    other.free()
    assert stream.flash.used == 0


def test_full_flash_changes_nothing(tmp_path):
    flash = Flash(str(tmp_path), 4096, capacity=4 * 4096)
    with pytest.raises(Full):
        flash.reserve(5)
    flash.reserve(4)
    assert flash.used == 0
    assert not list(tmp_path.iterdir())


def test_a_folder_without_room_is_full_too(tmp_path):
    flash = Flash(str(tmp_path), 4096)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 * 4096, before[1]))
    try:
        with pytest.raises(Full, match="do not fit into the folder"):
            flash.reserve(101)
        flash.reserve(100)
        at = flash.write(np.full((100, 4096), 7, np.uint8))
        assert flash.read(at, 1, 0).min() == 7
        with pytest.raises(Full):
            flash.reserve(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_bf16_is_rounded_to_even():
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    bits = instinfer_engine.stored(x, np.dtype(np.uint16))
    expected = torch.from_numpy(x).bfloat16()
    np.testing.assert_array_equal(bits, expected.view(torch.int16).numpy().view(np.uint16))
    np.testing.assert_array_equal(instinfer_engine.numbers(bits), expected.float().numpy())


# --- a model's cache in drives -------------------------------------------------------------------


def test_dense_drives_generate_what_the_model_does():
    model = llama()
    ids, mask = left_padded([prompt(1, 60)[0], prompt(1, 33)[0]])
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    with DENSE.apply(model) as applied:
        told = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
        held = stores(applied.cache)[0]
    assert torch.equal(told, expected)
    tokens = (60 + 33 + 2 * 11) * 2  # two KV heads; the last token is not stored
    assert held.nbytes() == tokens * 2 * 16 * 4
    assert held.tiers() == {"drive": held.nbytes()}
    assert held.reserved_bytes() % DENSE.drive.page == 0
    assert held.positions()[1, 0, 26:29].tolist() == [-1, 0, 1]


def test_sparf_through_the_pipe_is_sparq():
    technique = InstInfer(r=4, k=9)
    with technique.apply(llama()) as applied, torch.inference_mode():
        applied.model(prompt(2, 80))
        store = stores(applied.cache)[1]
        new = [torch.randn(2, h, 1, 16, generator=torch.Generator().manual_seed(h)) for h in (8, 2)]
        store.append(new[1], new[1] * 2)
        found = store.attend(new[0], None, None)
        keys, values = store.keys.numpy(), store.values.numpy()
    for b in range(2):
        for h in range(2):
            own = slice(4 * h, 4 * h + 4)
            expected = sparq(new[0][b, own, 0].numpy(), keys[b, h], values[b, h], 0.25, 4, 9)
            np.testing.assert_allclose(found[b, own, 0], expected, atol=1e-5)
    ended(technique)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_as_it_is(dtype):
    store = DENSE.store(llama().config)
    keys = torch.randn(1, 2, 40, 16).to(dtype)
    store.fill(keys, keys.flip(2), None, None)
    assert torch.equal(store.keys, keys)
    store.append(keys[:, :, :1], keys[:, :, :1])
    found = store.attend(torch.ones(1, 8, 1, 16, dtype=dtype), None, None)
    assert found.dtype == dtype
    assert found.isfinite().all()
    with pytest.raises(NarrowsError, match=r"not torch\.float64"):
        store.fill(keys.double(), keys.double(), None, None)


def test_traffic_is_queries_tokens_and_answers_and_nothing_else():
    technique = InstInfer(drives=2)
    store = technique.store(llama().config)
    keys = torch.randn(3, 2, 500, 16)
    store.fill(keys, keys, None, None)
    drives = technique.running()
    filled = 2 * keys.nbytes + 4 * 3 * 2  # and the tokens of each stream
    assert sum(d.crossed.sent for d in drives) == filled
    store.append(keys[:, :, :1], keys[:, :, :1])
    store.attend(torch.randn(3, 8, 1, 16), None, None)
    assert sum(d.crossed.data for d in drives) - filled == 3 * 16 * 4 * (2 * 8 + 2 * 2)
    ended(technique)


def test_a_slow_link_is_slow_both_ways():
    technique = InstInfer(1, drive=CSD(link=2e6), throttled=True)
    store = technique.store(llama().config)
    keys = torch.randn(1, 2, 1000, 16)
    begin = time.perf_counter()
    store.fill(keys, keys, None, None)
    assert time.perf_counter() - begin >= 2 * keys.nbytes / 2e6
    begin = time.perf_counter()
    assert torch.equal(store.keys, keys)
    assert time.perf_counter() - begin >= 2 * keys.nbytes / 2e6
    ended(technique)


def test_flash_keeps_to_its_rate():
    technique = InstInfer(1, drive=CSD(channels=1, channel_rate=4e6, link=1e12), throttled=True)
    store = technique.store(llama().config)
    keys = torch.randn(1, 2, 1024, 16)
    store.fill(keys, keys, None, None)
    store.append(keys[:, :, :1], keys[:, :, :1])
    begin = time.perf_counter()
    store.attend(torch.randn(1, 8, 1, 16), None, None)
    assert time.perf_counter() - begin >= 2 * keys.nbytes / 4e6
    ended(technique)


def test_several_new_tokens_see_what_came_before_them():
    model, ids, rest = llama(), prompt(2, 70), prompt(2, 6, seed=4)
    told = {}
    for name, parts in (("at once", (rest,)), ("one by one", rest.split(1, 1))):
        with DENSE.apply(model) as applied, torch.inference_mode():
            model(ids)
            told[name] = torch.cat(
                [model(p, past_key_values=applied.cache).logits for p in parts], 1
            )
    torch.testing.assert_close(told["at once"], told["one by one"], rtol=1e-4, atol=1e-4)


def test_copies_rows_and_cuts_go_on_by_themselves():
    model, ids = llama(), prompt(2, 50)
    with DENSE.apply(model) as applied, torch.inference_mode():
        model(ids)
        cache = applied.cache
        other = copied(cache)
        first = model(ids[:, :3], past_key_values=cache).logits
        cache.crop(-3)
        assert cache.get_seq_length() == other.get_seq_length() == 50
        for again in (cache, other):
            torch.testing.assert_close(model(ids[:, :3], past_key_values=again).logits, first)
        cache.reorder_cache(torch.tensor([1, 0]))
        new = ids[:, 5:6]
        swapped = model(new.flip(0), past_key_values=cache).logits
        torch.testing.assert_close(swapped.flip(0), model(new, past_key_values=other).logits)
        cache.crop(-54)
        assert stores(cache)[0].keys.shape[2] == 0
        other.reset()
        assert other.get_seq_length() == 0


def test_beams():
    model, ids = llama(), prompt(1, 40)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    expected = model.generate(ids, **options)
    with DENSE.apply(model):
        assert torch.equal(model.generate(ids, **options), expected)


def test_saved_and_restored(tmp_path):
    model = llama()
    ids, mask = left_padded([prompt(1, 44)[0], prompt(1, 20)[0]])
    longer = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
    with DENSE.apply(model) as applied, torch.inference_mode():
        model(ids, attention_mask=mask)
        saved.save(applied.cache, tmp_path / "cache", model, DENSE)
        back = saved.restore(tmp_path / "cache", model, DENSE)
        told = [model(ids[:, :1], attention_mask=longer, past_key_values=c).logits
                for c in (back, applied.cache)]  # fmt: skip
    torch.testing.assert_close(told[0], told[1])


def test_what_a_policy_kept_is_what_a_drive_holds():
    model, ids = llama(), prompt(2, 120)
    plain, both = SnapKV(40, window=8), Stack(SnapKV(40, window=8), DENSE)
    rest = prompt(2, 5, seed=3)
    told = quality.through(model, {"snapkv": plain, "stacked": both}, ids, rest)
    torch.testing.assert_close(told["stacked"], told["snapkv"], rtol=1e-4, atol=1e-4)
    case_ = narrows.case("llama-2-7b", "a100-80", prompt=8192, generate=256)
    once = case_.with_(SnapKV(1024), InstInfer()).workload.bytes("kv")
    assert once < case_.with_(InstInfer()).workload.bytes("kv")


def test_heads_and_rows_of_unequal_length():
    store = DENSE.store(llama().config)
    keys, values = torch.randn(2, 2, 30, 16), torch.randn(2, 2, 30, 16)
    columns = torch.full((2, 2, 6), -1)
    for b, h, kept in ((0, 0, 6), (0, 1, 2), (1, 0, 4), (1, 1, 1)):
        columns[b, h, 6 - kept :] = torch.arange(kept) * 5
    store.fill(keys, values, columns, None)
    new = torch.randn(2, 2, 1, 16)
    store.append(new, new)
    found = store.attend(torch.ones(2, 8, 1, 16), None, None)
    for b in range(2):
        for h in range(2):
            own = columns[b, h][columns[b, h] >= 0]
            k, v = (torch.cat([x[b, h, own], new[b, h]]) for x in (keys, values))
            expected = (k.sum(1) * 0.25).softmax(0) @ v
            torch.testing.assert_close(found[b, 4 * h, 0], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(store.keys[1, 1, :5], torch.zeros(5, 16))
    twin = deepcopy(store)
    store.clear()
    assert twin.held == 7
    assert torch.equal(twin.keys[0, 1, 4:6], keys[0, 1, columns[0, 1, 4:]])
    with pytest.raises(NarrowsError, match="not chosen from again"):
        twin.keep(columns)


# --- faults --------------------------------------------------------------------------------------


def test_a_full_drive_leaves_the_cache_as_it_was():
    # three layers, two heads; by token: a page of keys and one of values every 64 tokens
    technique = InstInfer(1, drive=CSD(capacity=(3 * 2 * 2 + 3) * 4096))
    model, ids = llama(), prompt(1, 64)
    with technique.apply(model) as applied, torch.inference_mode():
        model(ids)
        cache = applied.cache
        rest = prompt(1, 64, seed=3)
        model(rest[:, :63], past_key_values=cache)
        before = [(s.keys, s.values) for s in stores(cache)]
        with pytest.raises(NarrowsError, match="the drive is full"):
            model(rest[:, 63:], past_key_values=cache)
        assert mended(cache) == 127
        for store, (keys, values) in zip(stores(cache), before, strict=True):
            assert torch.equal(store.keys, keys)
            assert torch.equal(store.values, values)
        cache.crop(-10)
        found = model(rest[:, 53:60], past_key_values=cache).logits
        whole = model(torch.cat([ids, rest[:, :60]], 1), use_cache=False).logits
        torch.testing.assert_close(found, whole[:, -7:], rtol=1e-4, atol=1e-4)
        with pytest.raises(NarrowsError, match="the drive is full"):
            model(prompt(2, 200))  # a prompt that does not fit
        assert stores(applied.cache)[0].seen == 0
    ended(technique)


def test_of_two_drives_one_full_both_stay_as_they_were():
    technique = InstInfer(1, drives=2)
    store = technique.store(llama().config)
    keys = torch.randn(1, 2, 63, 16)
    store.fill(keys, keys, None, None)
    small = InstInfer(1, drive=CSD(capacity=4096))
    tight = InStorageStore([technique.running()[0], small.running()[0]])
    tight.fill(keys, keys, None, None)
    tight.append(keys[:, :, :1], keys[:, :, :1])
    with pytest.raises(NarrowsError, match="the drive is full"):
        tight.attend(torch.randn(1, 8, 1, 16), None, None)
    assert (tight.seen, tight.held) == (63, 63)
    assert torch.equal(tight.keys, keys)
    ended(technique, small)


def test_a_killed_drive_says_so_and_a_new_cache_gets_a_new_one():
    technique, model, ids = InstInfer(1), llama(), prompt(1, 40)
    with technique.apply(model) as applied, torch.inference_mode():
        expected = model(ids).logits
        cache, pid = applied.cache, technique.running()[0].pid
        os.kill(pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(NarrowsError, match=r"process of the drive has ended.*new cache"):
                model(ids[:, :1], past_key_values=cache)
            assert cache.get_seq_length() == 40
        assert torch.equal(model(ids).logits, expected)
        assert technique.running()[0].pid != pid
        assert model(ids[:, :1], past_key_values=applied.cache).logits.isfinite().all()
    assert gone(pid)
    ended(technique)


def test_nothing_is_left_when_nobody_holds_a_drive(tmp_path):
    technique = InstInfer(1, folder=str(tmp_path))
    store = technique.store(llama().config)
    keys = torch.randn(1, 2, 300, 16)
    store.fill(keys, keys, None, None)
    pid = technique.running()[0].pid
    del technique
    gc.collect()
    assert torch.equal(store.keys, keys)  # a store holds its drive
    assert not list(tmp_path.iterdir())  # the file has no name
    del store
    gc.collect()
    assert gone(pid)


def test_flash_of_a_forgotten_cache_is_used_again():
    technique = InstInfer(1)
    drive = technique.running()[0]
    keys = torch.randn(1, 2, 300, 16)
    used = []
    for _ in range(3):
        store = technique.store(llama().config)
        store.fill(keys, keys, None, None)
        used.append(drive.status()["pages_used"])
        del store
    assert used[0] > 0
    assert len(set(used)) == 1
    ended(technique)


@pytest.mark.parametrize("end", ["exit", "interrupt", "kill"])
def test_drives_end_with_the_program(end, tmp_path):
    code = (
        "import os, signal, sys, time\n"
        "from narrows.kv.instinfer_host import ComputationalDrive\n"
        "drive = ComputationalDrive(sys.argv[2])\n"
        "print(drive.pid, flush=True)\n"
        "time.sleep(0 if sys.argv[1] == 'exit' else 60)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code, end, str(tmp_path)], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, env=env) as host:  # fmt: skip
        assert host.stdout is not None
        pid = int(host.stdout.readline())
        if end != "exit":
            host.send_signal(signal.SIGINT if end == "interrupt" else signal.SIGKILL)
        host.wait(10)
    assert gone(pid)


def test_an_interrupted_command_is_not_trusted():
    technique = InstInfer(1)
    store = technique.store(llama().config)
    keys = torch.randn(1, 2, 30, 16)
    store.fill(keys, keys, None, None)
    drive = technique.running()[0]
    drive._waiting = True  # as Ctrl-C between a command and its answer leaves it
    with pytest.raises(NarrowsError, match="was interrupted"):
        store.pulled()
    assert not drive.alive


# --- bad input -----------------------------------------------------------------------------------


def test_masks_that_a_drive_cannot_follow():
    store = DENSE.store(llama().config)
    keys = torch.randn(1, 2, 30, 16)
    valid = torch.ones(1, 30, dtype=torch.bool)
    valid[0, 4] = False
    with pytest.raises(NarrowsError, match="padding lies between tokens"):
        store.fill(keys, keys, None, valid)
    store.fill(keys, keys, None, None)
    store.append(keys[:, :, :1], keys[:, :, :1])
    mask = torch.ones(1, 1, 1, 31, dtype=torch.bool)
    mask[..., 7] = False
    with pytest.raises(NarrowsError, match="hides tokens other than"):
        store.attend(torch.randn(1, 8, 1, 16), mask, None)
    assert store.seen == store.held == 30
    with pytest.raises(NarrowsError, match="added last"):
        store.attend(torch.randn(1, 8, 1, 16), None, None)
    with pytest.raises(NarrowsError, match="only 30"):
        store.crop(31)


@pytest.mark.parametrize(("bad", "told"), [
    ({"compression": 0.5}, "compression must be"), ({"compression": True}, "compression must be"),
    ({"compression": float("nan")}, "compression must be"), ({"r": 0}, "r must be"),
    ({"k": 1.5}, "k must be"), ({"drives": 0}, "drives must be"), ({"drives": None}, "drives must"),
    ({"drive": 3}, "must be a CSD"),
])  # fmt: skip
def test_bad_settings_are_refused(bad, told):
    with pytest.raises(NarrowsError, match=told):
        InstInfer(**bad)


@pytest.mark.parametrize("bad", [{"page": 0}, {"channels": 1.5}, {"link": -1}, {"page": True},
                                 {"capacity": float("inf")}, {"strip": "2"}])  # fmt: skip
def test_bad_drives_are_refused(bad):
    with pytest.raises(NarrowsError, match="a drive's"):
        CSD(**bad)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(NarrowsError, match="no drive can be made"):
        InstInfer(1, folder=str(tmp_path / "none")).store(llama().config)


def test_a_kivi_store_is_not_put_into_a_drive():
    with pytest.raises(NarrowsError, match="brings a store of its own"):
        Stack(KIVI(), InstInfer()).store(llama().config)


# --- the price -----------------------------------------------------------------------------------


def case(model="opt-13b", prompt=1024, generate=1024, batch=64, **options) -> Case:
    return Case(llm(model, prompt, generate, batch, "fp16", **options), load("a100-80"))


def test_expected_pages_are_those_of_draws():
    rng = np.random.default_rng(0)
    for chosen, of, together in ((16, 128, 2), (16, 128, 4), (100, 1000, 16)):
        drawn = [np.unique(rng.permutation(of)[:chosen] // together).size for _ in range(300)]
        found = touched(chosen, of, together) * np.ceil(of / together)
        assert found == pytest.approx(np.mean(drawn), rel=0.02)
    assert touched(5, 5, 2) == touched(9, 5, 1) == 1.0


def test_bytes_of_a_dense_step_are_the_cache_and_the_link_carries_activations():
    before = case()
    after = before.with_(InstInfer(1))
    assert after.workload.bytes("kv") == before.workload.bytes("kv")
    decode = bound(after).phase("decode")
    mean = 64 * 40 * 2 * 5120 * 2 * 1536.5
    assert decode.bytes["csd.flash"] / 1024 == pytest.approx(mean, rel=0.01)
    link = 64 * 40 * 4 * 5120 * 2
    assert decode.bytes["csd.link"] / 1024 == pytest.approx(link, rel=0.01)
    prefill = bound(after).phase("prefill")
    assert prefill.bytes["csd.link"] == pytest.approx(64 * 40 * 2 * 5120 * 2 * 1024)
    assert prefill.seconds > bound(before).phase("prefill").seconds


def test_sparf_reads_less_and_pages_less_still_and_keys_lie_twice():
    flash = {n: bound(case().with_(t)).phase("decode").bytes["csd.flash"] for n, t in (
        ("dense", InstInfer(1)), ("tokens", InstInfer()), ("pages", InstInfer(pages=True)),
        ("half", InstInfer(2)))}  # fmt: skip
    assert flash["pages"] < flash["tokens"] < flash["half"]
    assert flash["pages"] < flash["dense"]
    more = case().with_(InstInfer()).workload.bytes("kv") / case().workload.bytes("kv")
    assert 1.2 < more < 1.3  # keys are half of it, and the younger half of them lies once


def test_a_sweep_is_the_single_cases():
    lengths = (64, 500, 8192), (10, 300, 0)
    together = case(prompt=np.array(lengths[0]), generate=np.array(lengths[1]))
    kv = np.broadcast_to(together.with_(InstInfer()).workload.bytes("kv"), 3)
    for i, (p, g) in enumerate(zip(*lengths, strict=True)):
        alone = case(prompt=p, generate=g).with_(InstInfer()).workload.bytes("kv")
        assert kv[i] == pytest.approx(alone)


def test_more_drives_are_faster_and_twice_is_once():
    one, four = (case().with_(InstInfer(drives=n)) for n in (1, 4))
    assert 3 < bound(one).phase("decode").seconds / bound(four).phase("decode").seconds <= 4.001
    assert one.with_(InstInfer()) is one
    assert "nothing changes" in InstInfer().why(one)
    assert "but it fits" in InstInfer().why(case(batch=1))
    assert "the drives" in InstInfer().why(case(batch=256))
    assert "hardware of their own" in InstInfer().why(case(batch=256))


def test_cases_it_cannot_help_say_so():
    with pytest.raises(NarrowsError, match="softcap"):
        case("gemma-2-9b").with_(InstInfer())
    train = Case(llm("llama-2-7b", 512, 0, 1, "bf16", train=True), load("a100-80"))
    with pytest.raises(NarrowsError, match="no key-value cache"):
        train.with_(InstInfer())


def test_windowed_layers_stay_where_they_are():
    config = replace(shape("mistral-7b"), windowed_layers=16)
    after = case(config, prompt=8192, generate=256, batch=1).with_(InstInfer())
    local = [t for t in after.workload.role("kv") if t.name.endswith(".local")]
    assert local
    assert all(t.tier == "device" for t in local)
    assert bound(after).phase("decode").bytes["csd.flash"] > 0
    with pytest.raises(NarrowsError, match="has a sliding window"):
        case("mistral-7b", batch=1).with_(InstInfer())


def test_without_a_prompt():
    after = case(prompt=0, generate=64).with_(InstInfer())
    assert bound(after).phase("decode").bytes["csd.link"] > 0


def test_a_technique_travels_without_its_drives():
    technique = InstInfer(4)
    pid = technique.running()[0].pid
    told = pickle.loads(pickle.dumps(technique))
    assert (told.compression, told._running) == (4, ())
    ended(technique)
    assert gone(pid)
