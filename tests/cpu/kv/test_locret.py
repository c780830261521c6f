"""Locret keeps what a written-out Locret keeps, chunk by chunk, and never holds more."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import narrows
from narrows.claims._locret import LargeKeyNorm, slow_choice, slow_labels, unplaced
from narrows.core.errors import NarrowsError
from narrows.kv import locret_torch, saved
from narrows.kv._base import Prompt
from narrows.kv.adapter import ATTENTION, KVCache, hidden_states, stores
from narrows.kv.bfp import BFP
from narrows.kv.chunked import prefill
from narrows.kv.locret import Locret
from narrows.kv.locret_torch import Heads, best, fresh, labels, loss
from narrows.kv.stack import Stack
from tests.cpu.kv.tiny import left_padded, llama, prompt


def fitted(model, budget=64, chunk=48, stabilizers=24, local=10) -> Locret:
    return Locret(budget, chunk, stabilizers, local).of(model, fresh(model, 16, seed=1))


@pytest.fixture
def listened(monkeypatch):
    """Every score that heads gave, by layer, in the order of chunks."""
    told: dict[int, list[torch.Tensor]] = {}
    sound = Heads.score

    def score(self, layer, module, hidden):
        found = sound(self, layer, module, hidden)
        told.setdefault(layer, []).append(found)
        return found

    monkeypatch.setattr(Heads, "score", score)
    return told


@pytest.mark.parametrize("tokens", [47, 48, 64, 65, 100, 290])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_the_same_tokens_as_the_slow_choice(tokens, kv_heads, listened):
    model = llama(2, 8, kv_heads)
    technique = fitted(model)
    with technique.apply(model) as applied, torch.inference_mode():
        model(prompt(2, tokens))
        positions = [s.positions() for s in stores(applied.cache)]
    for layer, chunks in listened.items():
        scores, lengths = torch.cat(chunks, 2), [c.shape[2] for c in chunks]
        assert scores.shape == (2, kv_heads, tokens)
        for row in range(2):
            for head in range(kv_heads):
                wanted = slow_choice(scores[row, head].numpy(), technique, lengths)
                assert positions[layer][row, head].tolist() == wanted


def test_labels_are_the_slow_ones():
    made = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(1, h, n, 8, generator=made) for h, n in ((6, 3), (2, 20)))
    wanted = slow_labels(queries[0].double().numpy(), keys[0].double().numpy(), 0.3)
    assert np.allclose(labels(queries, keys, 0.3)[0], wanted, atol=1e-5)


def test_labels_without_positions_are_those_of_a_token_at_its_query():
    from narrows.kv.locret_train import Sample, observed

    model, ids = llama(2, 8, 2), prompt(1, 40)
    model.set_attn_implementation(ATTENTION)
    given = Sample(ids, 30, torch.tensor([12]))
    with torch.inference_mode():
        for seen, wanted in observed(model, given):
            told = unplaced(seen, given)
            assert told.shape == wanted.shape
            torch.testing.assert_close(told[..., 12], wanted[..., 12], rtol=1e-4, atol=1e-4)
            assert not torch.allclose(told, wanted, atol=1e-3)


def test_large_key_norms_and_the_last_tokens_stay():
    keys = torch.tensor([1.0, 9, 2, 8, 3, 0, 0])[None, None, :, None]
    seen = Prompt(0, keys, keys, keys, None, 1.0)
    slots = LargeKeyNorm(4, 2).on_prefill_end(seen)
    assert slots is not None
    assert slots.tolist() == [[[1, 3, 5, 6]]]
    assert LargeKeyNorm(7, 2).on_prefill_end(seen) is None


def test_the_loss_smooths():
    flat, rough = torch.zeros(1, 1, 4), torch.tensor([[[0.0, 2.0, 0.0, 2.0]]])
    assert loss(flat, flat) == 0
    assert float(loss(rough, rough)) == pytest.approx(0.0025 * 4)


def test_a_score_never_changes_and_is_made_once(listened):
    model = llama()
    with fitted(model).apply(model) as applied, torch.inference_mode():
        model(prompt(1, 290))
        model(prompt(1, 1), past_key_values=applied.cache)
    assert all(sum(c.shape[2] for c in chunks) == 290 for chunks in listened.values())


@pytest.mark.parametrize("chunk", [16, 48, 500])
def test_nothing_changes_when_the_budget_holds_the_prompt(chunk):
    model, ids, more = llama(), prompt(2, 200), prompt(2, 5, seed=3)
    technique = fitted(model, budget=200, chunk=chunk)
    with torch.inference_mode():
        dense = model(torch.cat([ids, more], 1)).logits[:, 199:]
        with technique.apply(model) as applied:
            first = model(ids).logits[:, -1:]
            rest = model(more, past_key_values=applied.cache).logits
    torch.testing.assert_close(torch.cat([first, rest], 1), dense, rtol=1e-3, atol=1e-3)


def test_no_more_than_budget_and_chunk_is_ever_held(monkeypatch):
    from narrows.kv.store_torch import Store

    most, sound = [], Store.append
    monkeypatch.setattr(
        Store, "append", lambda self, *args: (sound(self, *args), most.append(self.held))
    )
    model = llama()
    with fitted(model).apply(model), torch.inference_mode():
        model(prompt(1, 400))
    assert max(most) == 64 + 48


def test_the_last_tokens_stay():
    model = llama()
    with fitted(model, local=20).apply(model) as applied, torch.inference_mode():
        model(prompt(2, 289))  # the last chunk holds a single token
        for store in stores(applied.cache):
            assert (store.positions()[..., -20:] == torch.arange(269, 289)).all()
            assert store.held == 64


def test_padded_rows_keep_what_they_keep_alone():
    """Chunks fall alike where the padding is a whole number of none: one row is not padded."""
    model = llama()
    long, short = prompt(1, 96)[0], prompt(1, 66, seed=4)[0]
    ids, mask = left_padded([long, short])
    technique = fitted(model, budget=50, chunk=48, stabilizers=12, local=8)
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    with technique.apply(model) as applied, torch.inference_mode():
        model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False)
        together = [s.positions() for s in stores(applied.cache)]
        model(long[None])
        alone = [s.positions() for s in stores(applied.cache)]
    assert place.max() == 95
    for both, one in zip(together, alone, strict=True):
        assert torch.equal(both[:1], one)
        assert both[1].max() == 65
        assert (both[1] >= 0).sum(-1).tolist() == [50, 50]


def test_a_short_row_keeps_all_it_has():
    scores = torch.zeros(2, 1, 10)
    real = torch.arange(10) >= torch.tensor([0, 7])[:, None, None]
    slots = best(scores, real, forced=2, budget=5)
    assert slots.tolist() == [[[0, 1, 2, 8, 9]], [[-1, -1, 7, 8, 9]]]
    assert best(scores, real, 2, 10) is None


def test_generate_counts_on_and_composes_with_a_codec():
    model, ids = llama(), prompt(2, 150)
    made = fresh(model, 16, seed=1)
    both = Stack(Locret(64, 48, 24, 10), BFP(8, 8, 16, sort=False))
    with both.apply(model, {"locret": made}) as applied:
        out = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert out.shape == (2, 154)
        assert {s.held for s in stores(applied.cache)} == {64 + 3}
        assert applied.cache.get_seq_length() == 153
        packed = applied.nbytes()
    with Locret(64, 48, 24, 10).apply(model, made) as applied:
        model.generate(ids, max_new_tokens=4, do_sample=False)
        assert packed < applied.nbytes()


def test_a_cache_is_saved_and_goes_on(tmp_path):
    model, ids, more = llama(), prompt(1, 150), prompt(1, 3, seed=5)
    technique = fitted(model)
    with technique.apply(model) as applied, torch.inference_mode():
        model(ids)
        saved.save(applied.cache, tmp_path / "cache", model, technique)
        wanted = model(more, past_key_values=applied.cache).logits
        back = saved.restore(tmp_path / "cache", model, technique)
        assert torch.equal(model(more, past_key_values=back).logits, wanted)
    other = technique.of(model, fresh(model, 16, seed=2))
    with pytest.raises(NarrowsError, match="another technique or other settings"):
        saved.restore(tmp_path / "cache", model, other)


def test_a_prompt_read_at_once_is_cut_at_its_end():
    model, ids = llama(), prompt(1, 150)
    model.set_attn_implementation(ATTENTION)
    technique = fitted(model)
    hooks = hidden_states(model)
    try:
        with torch.inference_mode():
            cache = technique.cache(model.config)
            model(ids, past_key_values=cache)
            assert {s.held for s in stores(cache)} == {64}
    finally:
        for hook in hooks:
            hook.remove()
    with pytest.raises(NarrowsError, match="was not seen"), torch.inference_mode():
        prefill(model, ids, KVCache(model.config, technique), 48)


def test_heads_travel_in_a_file_and_know_their_model(tmp_path):
    model = llama()
    made = fresh(model, 16)
    locret_torch.save(made, tmp_path / "heads", model)
    back = locret_torch.load(tmp_path / "heads", model)
    assert all(
        torch.equal(a.half().float(), b) for a, b in zip(made.first, back.first, strict=True)
    )
    with pytest.raises(NarrowsError, match="locret_train"):
        locret_torch.load(tmp_path / "heads", llama(seed=1))
    with pytest.raises(NarrowsError, match="no retaining heads"):
        locret_torch.load(tmp_path / "none", model)
    (tmp_path / "cut").write_bytes((tmp_path / "heads").read_bytes()[:40])
    with pytest.raises(NarrowsError, match="not a whole file"):
        locret_torch.load(tmp_path / "cut", model)


def test_unfitted_it_says_what_to_do():
    model = llama()
    with pytest.raises(NarrowsError, match="of\\(model"):
        Locret().cache(model.config)
    with pytest.raises(NarrowsError, match="locret_train"), Locret().apply(model):
        pass


def test_training_learns_and_goes_on_where_it_was(tmp_path):
    from narrows.kv.locret_train import train
    from narrows.models import recall_lm

    model, tokenizer = recall_lm.load()
    text = np.random.default_rng(0).integers(1, 1024, 4000)
    told: list[float] = []
    import narrows.kv.locret_train as recipe

    lengths, recipe.LENGTHS = recipe.LENGTHS, (192,)
    try:
        whole = train(model, tokenizer, text, 16, 16, tell=lambda _, value: told.append(value))
        part = tmp_path / "part"
        with pytest.raises(KeyboardInterrupt):
            train(model, tokenizer, text, 16, 16, resume=part, every=5, tell=_stop_after(12))
        resumed = train(model, tokenizer, text, 16, 16, resume=part, every=5)
    finally:
        recipe.LENGTHS = lengths
    assert np.mean(told[-4:]) < 0.9 * np.mean(told[:4])
    assert whole.digest == resumed.digest


def _stop_after(last):
    def tell(step, _):
        if step == last:
            raise KeyboardInterrupt

    return tell


def test_predictions_follow_the_budget():
    case = narrows.case("llama-3-8b", "rtx-4090", prompt=65536, generate=16)
    technique = Locret()
    after = technique.predict(case)
    assert after.workload.tensors["kv.prompt.key"].extent("token") == 6000
    assert after.bound().phase("prefill").fits
    assert not case.bound().phase("prefill").fits
    assert technique.predict(after) is after
    short = narrows.case("llama-3-8b", "rtx-4090", prompt=6000, generate=16)
    assert technique.predict(short) is short


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"capacity": 2500}, "local <= stabilizers < capacity"),
        ({"local": 3000}, "local <= stabilizers < capacity"),
        ({"chunk": 0}, "chunk must be a whole number"),
        ({"capacity": "all"}, "capacity must be a whole number"),
        ({"stabilizers": True}, "stabilizers must be a whole number"),
        ({"local": 1.5}, "local must be a whole number"),
    ],
)
def test_bad_settings_are_refused(bad, told):
    with pytest.raises(NarrowsError, match=told):
        Locret(**bad)
