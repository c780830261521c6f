"""SnapKV keeps what a slow written-out SnapKV keeps, at its positions, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from narrows.claims._snapkv import by_definition
from narrows.core.errors import NarrowsError
from narrows.kv import select_torch
from narrows.kv._base import Prompt
from narrows.kv.adapter import ATTENTION, KVCache, nbytes, stores
from narrows.kv.snapkv import SnapKV
from tests.cpu.kv.tiny import left_padded, llama, prompt, seeing_only


def random_prompt(heads=8, kv_heads=2, tokens=150, rows=(150, 150), seed=0) -> Prompt:
    """Peaked attention over random keys; rows shorter than `tokens` are padded on the left."""
    made = torch.Generator().manual_seed(seed)
    queries = torch.randn(len(rows), heads, tokens, 16, generator=made)
    keys = torch.randn(len(rows), kv_heads, tokens, 16, generator=made)
    valid = None
    if min(rows) < tokens:
        valid = torch.arange(tokens) >= tokens - torch.tensor(rows)[:, None]
    return Prompt(0, 2 * queries, keys, keys, valid, 0.25)


def expected(given: Prompt, technique: SnapKV, rows) -> list[list[list[int]]]:
    """The written-out choice for every row alone, as columns of the padded prompt."""
    tokens = given.keys.shape[2]
    found = []
    for i, n in enumerate(rows):
        alone = slice(tokens - n, tokens)
        chosen = by_definition(
            given.queries[i, :, alone].double().numpy(),
            given.keys[i, :, alone].double().numpy(), given.scaling, technique,
        )  # fmt: skip
        found.append([[j + tokens - n for j in head] for head in chosen])
    return found


def kept(columns: torch.Tensor) -> list[list[list[int]]]:
    return [[[c for c in head if c >= 0] for head in row] for row in columns.tolist()]


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("kernel", [1, 5, 7])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (6, 1)])
def test_the_same_tokens_as_the_slow_choice(pool, kernel, heads, kv_heads):
    given = random_prompt(heads, kv_heads)
    technique = SnapKV(capacity=48, window=16, kernel=kernel, pool=pool)
    columns = technique.on_prefill_end(given)
    assert columns.shape == (2, kv_heads, 48)
    assert kept(columns) == expected(given, technique, (150, 150))
    assert columns[0, 0].tolist() != columns[1, 0].tolist()  # the rows really differ


@pytest.mark.parametrize("rows", [(150, 97), (150, 60, 40, 10), (150, 48)])
@pytest.mark.parametrize("ratio", [None, 0.6])
def test_a_padded_row_keeps_what_it_keeps_alone(rows, ratio):
    given = random_prompt(rows=rows)
    technique = SnapKV(capacity=48, window=16, ratio=ratio)
    assert kept(technique.on_prefill_end(given)) == expected(given, technique, rows)


MUTANTS: dict[str, Callable[[Prompt, SnapKV], tuple[Prompt, SnapKV]]] = {
    "votes of the first tokens": lambda p, t: (replace(p, queries=p.queries.flip(2)), t),
    "no pooling": lambda p, t: (p, SnapKV(t.capacity, t.window, 1)),
    "one query too few": lambda p, t: (
        replace(p, queries=torch.cat([p.queries[:, :, :-1], 0 * p.queries[:, :, -1:]], 2)), t),
    "scores not scaled": lambda p, t: (replace(p, scaling=1.0), t),
    "queries of another head": lambda p, t: (replace(p, queries=p.queries.roll(1, 1)), t),
    "max over the window's pool": lambda p, t: (p, SnapKV(t.capacity, t.window, t.kernel, "max")),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_vote_is_noticed(mutant):
    given, technique = random_prompt(), SnapKV(capacity=48, window=16)
    broken, changed = MUTANTS[mutant](given, technique)
    assert kept(changed.on_prefill_end(broken)) != expected(given, technique, (150, 150))


def test_a_vote_that_may_look_ahead_is_noticed(monkeypatch):
    """Without the causal mask inside the window the weights of earlier tokens change."""
    given, technique = random_prompt(), SnapKV(capacity=48, window=16)
    monkeypatch.setattr(torch.Tensor, "masked_fill_", lambda self, mask, value: self)
    columns = technique.on_prefill_end(given)
    monkeypatch.undo()
    assert kept(columns) != expected(given, technique, (150, 150))


def test_votes_are_not_asked_for_when_nothing_is_dropped(monkeypatch):
    def never(*_):
        raise AssertionError("the prompt fits")

    monkeypatch.setattr(select_torch, "window_votes", never)
    given = random_prompt(rows=(150, 90))
    assert SnapKV(capacity=150).on_prefill_end(given) is None
    assert SnapKV(capacity=33, ratio=0.0).on_prefill_end(given) is None


@pytest.mark.parametrize("capacity", [64, 65, 200])
def test_logits_are_bit_identical_when_the_prompt_fits(capacity):
    model, ids = llama(), prompt(2, 64)
    model.set_attn_implementation(ATTENTION)
    with torch.inference_mode():
        dense, snap = KVCache(model.config), SnapKV(capacity).cache(model.config)
        for given in (ids, ids[:, :1], ids[:, 1:2]):
            a = model(given, past_key_values=dense).logits
            assert torch.equal(a, model(given, past_key_values=snap).logits)


@pytest.mark.parametrize("rows", [(120, 120), (120, 75, 40)])
def test_decode_is_dense_attention_to_what_is_kept(rows):
    """Prompt, decode loop and a second turn against plain attention with the drops masked."""
    model = llama()
    ids, mask = left_padded([prompt(1, n, seed=n + i)[0] for i, n in enumerate(rows)])
    width, padding = max(rows), torch.tensor([max(rows) - n for n in rows])
    extra = prompt(len(rows), 9, seed=9)
    found = []
    with SnapKV(capacity=50).apply(model) as applied, torch.inference_mode():
        cache = None
        for new in (ids, extra[:, :1], extra[:, 1:2], extra[:, 2:8], extra[:, 8:]):
            seen = 0 if cache is None else cache.get_seq_length()
            whole = torch.cat([mask, torch.ones(len(rows), seen + new.shape[1] - width)], 1) \
                if seen else mask  # fmt: skip
            place = whole.cumsum(-1)[:, -new.shape[1] :].long() - 1
            found.append(applied.model(
                new, attention_mask=whole, position_ids=place.clamp(min=0), past_key_values=cache,
            ).logits)  # fmt: skip
            cache = applied.cache
        columns = [
            s.positions()[:, :, :50].where(s.positions()[:, :, :50] < 0, s.positions()[:, :, :50]
                                           + padding[:, None, None])
            for s in stores(cache)
        ]  # fmt: skip
        assert all((c >= 0).any() and c.max() < width for c in columns)
    with seeing_only(model, lambda layer: columns[layer], width), torch.inference_mode():
        whole = torch.cat([mask, torch.ones_like(extra)], 1)
        place = (whole.cumsum(-1) - 1).clamp(min=0)
        both = torch.cat([ids, extra], 1)
        reference = model(both, attention_mask=whole, position_ids=place, use_cache=False).logits
    real = mask.bool()
    torch.testing.assert_close(found[0][real], reference[:, :width][real], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.cat(found[1:], 1), reference[:, width:], rtol=1e-3, atol=1e-3)
    with torch.inference_mode():
        dense = model(both, attention_mask=whole, position_ids=place, use_cache=False).logits
    assert (dense[:, width:] - reference[:, width:]).abs().max() > 0.1  # the drops matter here


def test_a_hand_written_loop_counts_on():
    """Positions come from get_seq_length(), so no position_ids are needed after the drop."""
    model, ids = llama(), prompt(1, 120)
    with SnapKV(capacity=50).apply(model) as applied, torch.inference_mode():
        generated = applied.model.generate(ids, max_new_tokens=12, do_sample=False)
        seen: list[int] = []
        model.model.rotary_emb.register_forward_hook(
            lambda module, args, kwargs, out: seen.extend(
                (kwargs["position_ids"] if "position_ids" in kwargs else args[1])[0].tolist()
            ),
            with_kwargs=True,
        )
        out = model(ids)
        said = [out.logits[:, -1:].argmax(-1)]
        for step in range(11):
            assert out.past_key_values.get_seq_length() == 120 + step
            out = model(said[-1], past_key_values=out.past_key_values)
            said.append(out.logits[:, -1:].argmax(-1))
    assert seen == list(range(131))
    assert torch.equal(torch.cat(said, 1), generated[:, 120:])


def test_storage_is_the_capacity_exactly():
    model, ids = llama(), prompt(2, 120)
    token = 2 * 3 * 2 * 2 * 16 * 4  # keys and values, layers, rows, KV heads, channels, fp32
    with SnapKV(capacity=50).apply(model) as applied, torch.inference_mode():
        model(ids)
        cache = applied.cache
        assert applied.nbytes() == nbytes(cache) == 50 * token
        allocated = sum(
            t.untyped_storage().nbytes() for s in stores(cache) for t in (s.keys, s.values)
        )
        assert allocated < 1.1 * (50 + 64) * token  # nothing of the whole prompt is referenced
        model(ids[:, :1], past_key_values=cache)
        assert nbytes(cache) == 51 * token
    positions = stores(cache)[1].positions()
    assert positions.shape == (2, 2, 51)
    assert (positions.diff(dim=-1) > 0).all()
    assert positions[0, 0, -33:].tolist() == list(range(88, 121))


def test_prefill_is_exact():
    model, ids = llama(), prompt(2, 120)
    with torch.inference_mode():
        expected_logits = model(ids).logits
        with SnapKV(capacity=50).apply(model):
            assert torch.equal(model(ids).logits, expected_logits)


def test_bfloat16():
    model = llama().to(torch.bfloat16)
    ids, mask = left_padded([prompt(1, 120)[0], prompt(1, 70)[0]])
    with SnapKV(capacity=50).apply(model) as applied:
        out = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        assert out.shape == (2, 125)
        assert stores(applied.cache)[0].keys.dtype == torch.bfloat16
        assert applied.nbytes() == 2 * 3 * 2 * 2 * 16 * 2 * (50 + 4)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}])
def test_beams_carry_their_caches(options):
    model, ids = llama(), prompt(1, 120)
    with SnapKV(capacity=119).apply(model) as applied:
        out = model.generate(ids, max_new_tokens=8, do_sample=False, **options)
        assert stores(applied.cache)[0].columns is not None
    assert out.shape[1] == 128


def test_ratio_drops_a_share_of_every_prompt():
    model = llama()
    with SnapKV(ratio=0.75).apply(model) as applied, torch.inference_mode():
        for n, held in ((400, 100), (200, 50), (100, 33), (20, 20)):
            model(prompt(1, n))
            assert {s.held for s in stores(applied.cache)} == {held}
        ids, mask = left_padded([prompt(1, 400)[0], prompt(1, 300)[0]])
        model(ids, attention_mask=mask)
        assert [(s.positions() >= 0).sum(-1)[:, 0].tolist() for s in stores(applied.cache)] == [
            [100, 75]
        ] * 3


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"capacity": 32}, "capacity must exceed the window of 32"),
        ({"capacity": 5, "window": 8}, "capacity must exceed"),
        ({"kernel": 4}, "odd"),
        ({"kernel": 0}, "odd"),
        ({"window": 0}, "window must be at least 1"),
        ({"pool": "mean"}, "avg or max"),
        ({"ratio": 1.0}, "ratio must lie"),
        ({"ratio": -0.1}, "ratio must lie"),
        ({"capacity": "many"}, "whole number"),
        ({"window": 2.5}, "whole number"),
        ({"ratio": "half"}, "ratio must lie"),
    ],
)
def test_bad_settings_are_refused(bad, told):
    with pytest.raises(NarrowsError, match=told):
        SnapKV(**bad)
