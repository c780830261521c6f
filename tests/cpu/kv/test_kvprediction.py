"""KV prediction fills the model's cache, never runs the prompt, says what it cannot do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import narrows
from narrows import door
from narrows.claims._kvprediction import some_predictor, tokens_run
from narrows.core.bound import bound
from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.kv import kvprediction_torch as predicting
from narrows.kv import saved
from narrows.kv.adapter import KVCache, nbytes, stores
from narrows.kv.kivi import KIVI
from narrows.kv.kvprediction import KVPrediction
from narrows.kv.kvprediction_torch import KVPredictor, even, mapped, pruned, read
from narrows.kv.reading import reading
from narrows.kv.snapkv import SnapKV
from narrows.models import recall_lm
from narrows.trace.llm import llm
from tests.cpu.kv.tiny import left_padded, llama, prompt


def qwen():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.3,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    for layer in model.model.layers:  # so that a norm of keys left out would be seen
        torch.nn.init.normal_(layer.self_attn.k_norm.weight, 1.0, 0.5)
    return model


@pytest.mark.parametrize("make", [llama, lambda: llama(2, 4, 4), qwen])
@pytest.mark.parametrize("padded", [False, True])
def test_the_model_as_its_own_auxiliary_changes_nothing(make, padded):
    model = make()
    rows = [prompt(1, 40)[0], prompt(1, 17 if padded else 40, seed=5)[0]]
    ids, mask = left_padded(rows)
    given = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **given)
    with KVPrediction(1.0).apply(model, KVPredictor(model, model).identity()) as applied:
        assert torch.equal(applied.model.generate(ids, **given), expected)
        assert stores(applied.cache)[0].seen == 47
    assert torch.equal(model.generate(ids, **given), expected)


def test_beams_and_sampled_rows_start_from_one_prediction():
    model = llama()
    ids = prompt(1, 30)
    given = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    expected = model.generate(ids, **given)
    with KVPrediction(1.0).apply(model, KVPredictor(model, model).identity()) as applied:
        assert torch.equal(applied.model.generate(ids, **given), expected)


def test_the_cache_is_the_maps_of_what_the_auxiliary_caches():
    model, ids = llama(), prompt(2, 25)
    predictor = some_predictor(model, 2)
    with KVPrediction(2 / 3).apply(model, predictor) as applied, torch.no_grad():
        applied.model(ids, use_cache=True)
        held = stores(applied.cache)
    auxiliary = predictor.auxiliary
    with torch.no_grad():
        states = auxiliary.model(ids[:, :-1], output_hidden_states=True).hidden_states
    place = torch.arange(24, dtype=torch.float64)
    angle = place[:, None] * 10000.0 ** (-torch.arange(8) / 8)
    turn = torch.polar(torch.ones_like(angle), angle)
    assert predictor.layer_map == (0, 0, 1)
    for i, j in enumerate(predictor.layer_map):
        layer = auxiliary.model.layers[j]
        with torch.no_grad():
            normed = layer.input_layernorm(states[j])
            keys = predictor.keys[i](layer.self_attn.k_proj(normed))
            values = predictor.values[i](layer.self_attn.v_proj(normed))
        keys = keys.unflatten(2, (2, 16)).transpose(1, 2).double()
        both = torch.complex(keys[..., :8], keys[..., 8:]) * turn
        wanted = torch.cat([both.real, both.imag], -1).float()
        torch.testing.assert_close(held[i].keys[:, :, :24], wanted, rtol=1e-4, atol=1e-4)
        wanted = values.unflatten(2, (2, 16)).transpose(1, 2)
        torch.testing.assert_close(held[i].values[:, :, :24], wanted, rtol=1e-4, atol=1e-4)


def test_padding_changes_nothing_about_a_row():
    model, predictor = llama(), some_predictor(llama(), 2)
    short = prompt(1, 17, seed=5)
    ids, mask = left_padded([prompt(1, 40)[0], short[0]])
    given = {"max_new_tokens": 6, "do_sample": False}
    with KVPrediction(2 / 3).apply(model, predictor) as applied:
        alone = applied.model.generate(short, **given)[0, 17:]
        both = applied.model.generate(ids, attention_mask=mask, **given)[1, 40:]
    assert torch.equal(alone, both)


def test_the_model_runs_the_last_token_only_and_the_auxiliary_is_asked_once():
    model = llama()
    predictor = some_predictor(model, 2)
    with KVPrediction(2 / 3).apply(model, predictor) as applied:
        with tokens_run(model) as counts, tokens_run(predictor.auxiliary) as read_by:
            applied.model.generate(prompt(2, 50), max_new_tokens=5, do_sample=False)
        assert counts == [10, 10, 10]
        assert read_by == [98, 0]  # of the last block only keys and values
        with tokens_run(model) as counts:
            applied.model.generate(prompt(1, 1), max_new_tokens=3, do_sample=False)
        assert counts == [3, 3, 3]
        with torch.no_grad(), tokens_run(model) as counts:  # nothing is cached: nothing predicted
            applied.model(prompt(1, 9), use_cache=False)
        assert counts == [9, 9, 9]


def test_what_is_predicted_is_stored_by_a_codec_and_saved(tmp_path):
    model, ids = llama(), prompt(1, 64)
    technique = KVPrediction(1.0)
    identity = KVPredictor(model, model).identity()
    codec = KIVI(8, 8, group_size=16, residual_length=16)
    with codec.apply(model) as below, technique.apply(model, identity), torch.no_grad():
        below.model(ids, use_cache=True)
        cache = below.cache
    with reading(model):
        dense = KVCache(model.config, codec)
        model(ids, past_key_values=dense)
        for a, b in zip(stores(cache), stores(dense), strict=True):
            assert (a.seen, a.held) == (b.seen, b.held) == (64, 64)
            torch.testing.assert_close(a.keys, b.keys, rtol=0, atol=0.2)
        assert nbytes(cache) == nbytes(dense)
        saved.save(cache, tmp_path / "cache", model, codec)
        again = saved.restore(tmp_path / "cache", model, codec)
        next_ = prompt(1, 1, seed=3)
        first, second = (model(next_, past_key_values=c).logits for c in (cache, again))
    assert torch.equal(first, second)


def test_who_chooses_by_queries_is_refused_and_no_stack_is_made():
    model = llama()
    identity = KVPredictor(model, model).identity()
    with SnapKV(40, window=8).apply(model):  # noqa: SIM117 - the inner one must fail
        with pytest.raises(NarrowsError, match="does not read here"):
            with KVPrediction(1.0).apply(model, identity):
                pass
    with KVPrediction(1.0).apply(model, identity):  # noqa: SIM117
        with pytest.raises(NarrowsError, match="at work on this model already"):
            with KVPrediction(1.0).apply(model, identity):
                pass
    assert not model._forward_pre_hooks
    with pytest.raises(NarrowsError, match="not a technique of caches"):
        door.technique("kvprediction+kivi")


def test_bad_input_says_what_to_do():
    for bad in (0, -0.5, 1.5, True, "half", None):
        with pytest.raises(NarrowsError, match="share of the model's"):
            KVPrediction(bad)
        with pytest.raises(NarrowsError, match="share of the model's"):
            KVPrediction(0.5, bad)
    model = llama()
    with pytest.raises(NarrowsError, match="no predictor is shipped for this model"):
        KVPrediction().of(model)
    with pytest.raises(NarrowsError, match="asked for were"):
        KVPrediction(1.0).of(model, some_predictor(model, 2))
    with pytest.raises(NarrowsError, match="for a model of 3 layers"):
        KVPrediction(0.5).of(llama(4), some_predictor(model, 2))
    with pytest.raises(NarrowsError, match="layer_map"):
        KVPredictor(model, pruned(model, 2), (0, 1, 0))
    with pytest.raises(NarrowsError, match="deeper"):
        KVPredictor(pruned(model, 2), model)
    with pytest.raises(NarrowsError, match="knows how the keys"):
        predicting.blocks(torch.nn.Linear(2, 2))
    ids = prompt(1, 9)
    with KVPrediction(1.0).apply(model, KVPredictor(model, model).identity()) as applied:
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        with pytest.raises(NarrowsError, match="padded on the right"):
            applied.model(ids, attention_mask=mask, use_cache=True)
        with pytest.raises(NarrowsError, match="no loss"):
            applied.model(ids, labels=ids, use_cache=True)
        with pytest.raises(NarrowsError, match="inputs_embeds"):
            applied.model(inputs_embeds=torch.zeros(1, 9, 64), use_cache=True)


def test_maps_are_dealt_out_as_the_papers():
    assert even(28, 16) == (*(j for j in range(12) for _ in range(2)), 12, 13, 14, 15)
    for layers in range(1, 9):
        for small in range(1, layers + 1):
            made = mapped("even", layers, small)
            assert len(made) == layers
            assert set(made) == set(range(small))
            assert list(made) == sorted(made)


def test_a_pruned_copy_shares_what_it_may_and_no_more():
    model = llama()
    copy = pruned(model, 2)
    ids = prompt(1, 12)
    with torch.no_grad():
        for mine, theirs in zip(read(copy, ids), read(model, ids), strict=False):
            torch.testing.assert_close(mine, theirs)
        copy.model.layers[0].self_attn.k_proj.weight.zero_()
    assert bool(model.model.layers[0].self_attn.k_proj.weight.any())
    assert copy.model.layers[0].mlp is model.model.layers[0].mlp
    assert copy.lm_head is model.lm_head


@pytest.mark.parametrize("layers", [0.25, 0.5, 0.75])
def test_shipped_predictors_go_on_from_a_prompt(layers):
    model, _ = recall_lm.load()
    ids = torch.arange(1, 40)[None]
    with narrows.apply(model, f"kvprediction:layers={layers}") as applied:
        made = applied.model.generate(ids, max_new_tokens=4, do_sample=False)
    assert made.shape == (1, 43)


def test_a_predictor_is_kept_for_its_model_alone(tmp_path):
    model, file = llama(), tmp_path / "kept.safetensors"
    for layers in (1, 2):
        predicting.save(file, model, some_predictor(model, layers))
    again = predicting.load(file, model, 2)
    ids = prompt(1, 20)
    for mine, theirs in zip(again(ids), some_predictor(model, 2)(ids), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.3)
    with pytest.raises(NarrowsError, match=r"layers=0\.333333, 0\.666667 are"):
        predicting.load(file, model, 3)
    with pytest.raises(NarrowsError, match="no predictor is shipped"):
        predicting.load(file, llama(seed=1), 2)
    with pytest.raises(NarrowsError, match="no file of this model's"):
        predicting.save(file, llama(seed=1), some_predictor(llama(seed=1), 2))


def test_predict_cuts_prefill_and_leaves_decode_and_cache():
    case = narrows.case("llama-3-8b", "h100-sxm", prompt=4096, generate=64)
    less = 1.0
    for layers in (0.75, 0.5, 0.25):
        after = KVPrediction(layers).predict(case)
        share = after.workload.flops("prefill") / case.workload.flops("prefill")
        assert layers - 0.05 < share < less
        less = share
        assert after.workload.flops("decode") == case.workload.flops("decode")
        assert after.workload.bytes("kv") == case.workload.bytes("kv")
        assert after.workload.bytes("weight") > case.workload.bytes("weight")
        assert bound(after).phase("prefill").seconds < bound(case).phase("prefill").seconds
        assert KVPrediction(layers).predict(after) is after
        packed = after.with_(KIVI())
        assert packed.workload.bytes("kv") < after.workload.bytes("kv")
    narrow = KVPrediction(1.0, 0.5).predict(case).workload.flops("prefill")
    assert narrow < 0.35 * case.workload.flops("prefill")


def test_predict_takes_sweeps_and_says_what_it_cannot():
    prompts = np.array([64, 1024, 8192])
    one = narrows.case("llama-3-8b", "h100-sxm", prompt=1024, generate=8)
    many = Case(llm("llama-3-8b", prompts, 8), one.machine, one.plan)
    swept = KVPrediction().predict(many).workload.flops("prefill")
    assert swept[1] == pytest.approx(KVPrediction().predict(one).workload.flops("prefill"))
    short = narrows.case("llama-3-8b", "h100-sxm", prompt=1, generate=8)
    assert KVPrediction().predict(short) is short
    assert "no prompt" in KVPrediction().why(short)
    with pytest.raises(NarrowsError, match="compressed already"):
        KVPrediction().predict(one.with_(KIVI()))
