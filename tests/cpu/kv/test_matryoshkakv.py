"""MatryoshkaKV: channels kept, ranks of heads, stores of them, training, and what it predicts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import narrows
from narrows.claims._matryoshkakv import random_codec, random_projection, store_of
from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.kv.adapter import nbytes, stores
from narrows.kv.kivi import KIVI
from narrows.kv.lowrank import LowRank
from narrows.kv.matryoshkakv import MatryoshkaKV
from narrows.kv.matryoshkakv_torch import Projection, cayley, load, principal, save
from narrows.kv.saved import restore
from narrows.kv.saved import save as save_cache
from narrows.kv.snapkv import SnapKV
from narrows.kv.stack import Stack
from narrows.machines.load import load as load_machine
from narrows.trace.llm import llm
from tests.cpu.kv.tiny import left_padded, llama, prompt


def projection(seed: int = 0) -> Projection:
    """For tiny's Llama, with an order that begins with the first entries."""
    made = random_projection(3, 2, 16, seed)
    entries = torch.arange(made.mean[..., 0].numel()).repeat(7)
    return Projection(made.basis, made.mean, entries)


def continued(model, technique, ids, mask=None, more=6):
    with technique.apply(model, projection()) as applied, torch.inference_mode():
        options = {"do_sample": False, "max_new_tokens": more, "output_logits": True}
        told = applied.model.generate(
            ids, attention_mask=torch.ones_like(ids) if mask is None else mask,
            return_dict_in_generate=True, **options,
        )  # fmt: skip
        return torch.stack(told.logits, 1), applied.cache


# --- the codec -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(16, 16), (1, 64), (24, 40)])
def test_scores_and_mix_are_those_of_unpacked_tokens(ranks):
    codec = random_codec(ranks)
    made = torch.Generator().manual_seed(3)
    x, queries = (torch.randn(3, 2, n, 64, generator=made) for n in (50, 4))
    held = codec.pack(x)
    assert held.parts[0].shape == (3, 1, 50, sum(ranks))
    assert torch.allclose(codec.scores(queries, held), queries @ held.unpack().mT, atol=1e-4)
    weights = torch.rand(3, 2, 4, 50, generator=made)
    assert torch.allclose(codec.mix(weights, held), weights @ held.unpack(), atol=1e-4)


def test_an_all_hidden_row_mixes_to_nothing():
    codec = random_codec((8, 8))
    held = codec.pack(torch.randn(1, 2, 5, 64))
    assert not codec.mix(torch.zeros(1, 2, 1, 5), held).any()


def test_error_never_grows_with_rank():
    x = torch.randn(1, 2, 80, 64, generator=torch.Generator().manual_seed(4))
    errors = [float((random_codec((r, r)).pack(x).unpack() - x).norm()) for r in range(8, 65, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3


def test_principal_axes_hold_most_and_do_not_reflect():
    made = torch.Generator().manual_seed(5)
    x = torch.randn(2, 300, 16, generator=made) * torch.arange(16, 0, -1) + 3
    mean, basis = principal(x)
    assert torch.allclose(torch.linalg.det(basis), torch.ones(2), atol=1e-4)
    held = ((x - mean.unsqueeze(1)) @ basis).var(1)
    assert (held.diff(dim=-1) < 1e-3).all()
    turned = cayley(torch.randn(5, 16, 16, generator=made))
    assert torch.allclose(turned.mT @ turned, torch.eye(16).expand(5, -1, -1), atol=1e-5)


def test_half_precision_and_what_it_cannot_hold():
    codec = random_codec((16, 16))
    half = LowRank(codec.basis, codec.mean, codec.ranks, torch.float16)
    x = torch.randn(1, 2, 10, 64)
    assert half.pack(x).nbytes() == codec.pack(x).nbytes() // 2
    assert half.element_bits(64) == pytest.approx(4.0)
    assert torch.allclose(half.pack(x).unpack(), codec.pack(x).unpack(), atol=2e-2)
    with pytest.raises(NarrowsError, match="infinite"):
        half.pack(x * 1e6)


def test_bad_codecs_are_refused():
    for ranks in ((16,), (0, 16), (65, 16)):
        codec = random_codec((16, 16))
        with pytest.raises(NarrowsError, match="ranks"):
            LowRank(codec.basis, codec.mean, ranks).check(64)
    with pytest.raises(NarrowsError, match="64 channels"):
        random_codec((16, 16)).check(128)
    with pytest.raises(NarrowsError, match="KV heads"):
        random_codec((16, 16)).pack(torch.zeros(1, 4, 3, 64))


# --- ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.7, 0.5, 0.4, 0.125])
def test_ranks_meet_the_budget_and_are_nested(share):
    made = projection()
    ranks = np.array(made.allocate(share))
    assert ranks.mean() / 16 <= share + 1e-9
    assert ranks.mean() / 16 > share - 2 / ranks.size
    assert (np.array(made.allocate(min(1.0, share + 0.2))) >= ranks).all()
    assert set(np.array(made.uniform(share)).flat) == {max(1, int(share * 16))}


def test_budgets_that_cannot_be_met():
    with pytest.raises(NarrowsError, match="cannot be met"):
        projection().allocate(0.1)
    bare = random_projection(1, 2, 16)
    assert np.array(bare.allocate(1.0)).min() == 16
    with pytest.raises(NarrowsError, match="adaptive=False"):
        bare.allocate(0.5)


# --- the cache -----------------------------------------------------------------------------------


def test_full_rank_generates_as_before_with_padding():
    model = llama()
    ids, mask = left_padded([prompt(1, 40)[0], prompt(1, 23, 2)[0]])
    plain = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=6, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    for technique in (MatryoshkaKV(1.0), MatryoshkaKV(1.0, recent=5)):
        told, _ = continued(model, technique, ids, mask)
        assert torch.allclose(told, torch.stack(plain.logits, 1), atol=2e-3)


def test_padding_changes_nothing():
    model = llama()
    ids, mask = left_padded([prompt(1, 40)[0], prompt(1, 23, 2)[0]])
    both, _ = continued(model, MatryoshkaKV(0.5), ids, mask)
    alone, _ = continued(model, MatryoshkaKV(0.5), ids[1:, 17:])
    assert torch.allclose(both[1:], alone, atol=2e-3)


def test_a_cache_holds_what_the_ranks_say():
    made, ids = projection(), prompt(2, 30)
    for technique in (MatryoshkaKV(0.4), MatryoshkaKV(0.5, adaptive=False)):
        _, cache = continued(llama(), technique, ids, more=2)
        ranks = made.allocate(0.4) if technique.adaptive else made.uniform(0.5)
        assert nbytes(cache) == 4 * 2 * 31 * int(np.sum(ranks))
        for store, of in zip(stores(cache), ranks, strict=True):
            assert [b.packed.parts[0].shape[3] for b in store.bodies] == [sum(r) for r in of]


def test_rows_recent_tokens_and_taking_back():
    store = store_of((8, 24), recent=4)
    x = torch.randn(2, 2, 21, 64)
    store.fill(x, x, None, None)
    assert [t.tokens for t in store.tails] == [1, 4]
    query = torch.randn(2, 4, 1, 64)
    before = store.attend(query, None, None)
    store.rows(torch.tensor([1, 0]))
    assert torch.allclose(store.attend(query.flip(0), None, None), before.flip(0), atol=1e-5)
    store.crop(1)
    assert store.held == 20
    with pytest.raises(NarrowsError, match="not packed"):
        store.crop(3)


def test_with_snapkv_and_saved(tmp_path):
    model, ids = llama(), prompt(1, 60)
    stack = Stack(SnapKV(20, window=4), MatryoshkaKV(0.5))
    with stack.apply(model, {"matryoshkakv": projection()}) as applied, torch.inference_mode():
        applied.model(ids)
        assert nbytes(applied.cache) == 20 * 4 * int(np.sum(projection().allocate(0.5)))
        applied.model(ids[:, :1], past_key_values=applied.cache)

    technique = MatryoshkaKV(0.5).of(model, projection())
    with technique.apply(model) as applied, torch.inference_mode():
        applied.model(ids)
        save_cache(applied.cache, tmp_path / "a", model, technique)
        back = restore(tmp_path / "a", model, technique)
        told = applied.model(ids[:, :1], past_key_values=applied.cache).logits
        assert torch.equal(applied.model(ids[:, :1], past_key_values=back).logits, told)
    other = MatryoshkaKV(0.5).of(model, projection(1))
    with pytest.raises(NarrowsError, match="technique"):
        restore(tmp_path / "a", model, other)


# --- projections ---------------------------------------------------------------------------------


def test_files_belong_to_a_model(tmp_path):
    model, made = llama(), projection()
    save(made, tmp_path / "p", model)
    assert load(tmp_path / "p", model).digest == made.digest
    with pytest.raises(NarrowsError, match="trained for"):
        load(tmp_path / "p", llama(seed=1))
    with pytest.raises(NarrowsError, match="no projection at"):
        load(tmp_path / "q", model)
    (tmp_path / "p").write_bytes((tmp_path / "p").read_bytes()[:99])
    with pytest.raises(NarrowsError, match="not a whole file"):
        load(tmp_path / "p", model)
    with pytest.raises(NarrowsError, match="fit one"):
        MatryoshkaKV().of(model)
    with pytest.raises(NarrowsError, match="of\\(model\\)"):
        MatryoshkaKV().cache(model.config)
    short = Projection(made.basis[:1], made.mean[:1], made.order[:0])
    with pytest.raises(NarrowsError, match="none for layer 1"):
        MatryoshkaKV(1.0).of(model, short).cache(model.config)


def test_projected_at_full_rank_the_model_is_the_same():
    from narrows.kv.matryoshkakv_torch import spread
    from narrows.kv.matryoshkakv_train import changed, logits, projected, watched

    model, made, ids = llama(), projection(), prompt(1, 20)
    before = model.config._attn_implementation
    wanted, held = watched(model, ids)
    full = spread(made.uniform(1.0), 16)
    with torch.no_grad(), changed(model, projected(made.basis, made.mean, full, held)):
        assert torch.allclose(logits(model, ids), wanted, atol=2e-3)
    assert model.config._attn_implementation == before


# --- what it predicts ----------------------------------------------------------------------------


def test_predicted_bytes_are_the_share():
    case = narrows.case("llama-2-7b", "a100-80", prompt=1000, generate=100)
    kv = case.workload.bytes("kv")
    assert case.with_(MatryoshkaKV()).workload.bytes("kv") == pytest.approx(0.4 * kv)
    assert case.with_(MatryoshkaKV(1.0)).workload is case.workload
    recent = case.with_(MatryoshkaKV(recent=100)).workload.bytes("kv")
    assert 0.4 * kv < recent < 0.5 * kv
    twice = case.with_(MatryoshkaKV(), MatryoshkaKV(0.5))
    assert twice.workload.bytes("kv") == pytest.approx(0.4 * kv)
    both = case.with_(SnapKV(250), MatryoshkaKV()).workload.tensors["kv.prompt.key"].bytes()
    one = case.workload.tensors["kv.prompt.key"].bytes()
    assert both == pytest.approx(0.4 * 0.25 * one)
    assert case.with_(KIVI(), MatryoshkaKV()).workload.bytes("kv") < case.with_(
        KIVI()
    ).workload.bytes("kv")


def test_decode_gains_and_sweeps():
    case = narrows.case("llama-2-7b", "a100-80", prompt=8192, generate=256, batch=16)
    after = case.with_(MatryoshkaKV())
    a, b = (c.bound().phase("decode").seconds for c in (case, after))
    assert 1.2 < a / b < 2.5
    assert "keeps 40%" in MatryoshkaKV().why(case)
    assert "nothing changes" in MatryoshkaKV().why(after)


def test_a_sweep_is_the_single_cases():
    def case(p, g):
        work = llm("llama-2-7b", p, g, 4, "fp16")
        return Case(work, load_machine("a100-80")).with_(MatryoshkaKV(recent=32))

    kv = np.broadcast_to(case(np.array([64, 8192]), np.array([10, 0])).workload.bytes("kv"), 2)
    for i, (p, g) in enumerate(((64, 10), (8192, 0))):
        assert kv[i] == pytest.approx(case(p, g).workload.bytes("kv"))


@pytest.mark.parametrize(
    "given",
    [{"budget": 0}, {"budget": 1.5}, {"budget": "half"}, {"budget": True}, {"adaptive": 1},
     {"recent": -1}, {"recent": 2.5}],
)  # fmt: skip
def test_settings_are_checked(given):
    with pytest.raises(NarrowsError, match="matryoshkakv"):
        MatryoshkaKV(**given)


def test_a_layer_wider_than_the_basis_is_refused():
    made = MatryoshkaKV(0.5).of(llama(), projection())
    with pytest.raises(NarrowsError, match="heads of 32"):
        made.store(SimpleNamespace(head_dim=32))
