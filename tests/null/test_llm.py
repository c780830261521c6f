"""The closed form against figures worked out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from narrows.core.errors import NarrowsError
from narrows.core.fusion import fuse
from narrows.core.workload import Workload
from narrows.trace.config import TransformerConfig, published, shape, shapes
from narrows.trace.llm import llm

PARAMETERS = {
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400, "mistral-7b": 7_241_732_096, "mixtral-8x7b": 46_702_792_704,
    "qwen2-7b": 7_615_616_512, "qwen3-8b": 8_190_735_360, "qwen3-30b-a3b": 30_532_122_624,
    "gemma-2b": 2_506_172_416, "gemma-7b": 8_537_680_896, "gemma-2-9b": 9_241_705_984,
    "falcon-7b": 6_921_720_704, "falcon-40b": 41_303_293_952, "opt-125m": 125_239_296,
    "opt-13b": 12_853_473_280, "gpt2": 124_439_808, "gpt2-xl": 1_557_611_200,
    "phi-2": 2_779_683_840, "phi-3-mini": 3_821_079_552, "pythia-6.9b": 6_857_302_016,
    "tinyllama-1.1b": 1_100_048_384, "yi-34b": 34_388_917_248, "gpt-neox-20b": 20_554_567_680,
}  # fmt: skip
"""As the model cards and `num_parameters()` of the published checkpoints give them."""

KV_BYTES = {
    "llama-2-7b": 2 * 32 * 32 * 128 * 2, "llama-3-8b": 2 * 32 * 8 * 128 * 2,
    "falcon-7b": 2 * 32 * 1 * 64 * 2, "gemma-2b": 2 * 18 * 1 * 256 * 2,
    "mixtral-8x7b": 2 * 32 * 8 * 128 * 2, "gpt2": 2 * 12 * 12 * 64 * 2,
}  # fmt: skip


def small(**changes: object) -> TransformerConfig:
    """A Llama of 3 layers with grouped queries and untied embeddings."""
    fields: dict[str, object] = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 100,
        "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 160,
    }  # fmt: skip
    return TransformerConfig.from_json({**fields, **changes}, "small")


def moved(workload: Workload, phase: str, *roles: str) -> np.ndarray:
    """Bytes that a phase moves of tensors of some roles (all roles when none is given)."""
    found = workload.phase(phase)
    total = np.zeros(())
    for op in found.ops:
        for use in (*op.reads, *op.writes):
            tensor = workload.tensors[use.tensor]
            if not roles or tensor.role in roles:
                total = total + op.repeat * tensor.bytes(use.at)
    return total * found.steps


def products(workload: Workload, phase: str) -> float:
    """Operations of the products with weights."""
    return sum(
        float(op.repeat * workload.op_flops(op))
        for op in workload.phase(phase).ops
        if op.kind == "matmul" and not op.group.startswith("attention")
    )  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str):
    assert shape(name).parameters == PARAMETERS[name]


def test_the_catalogue_is_large_and_says_where_it_is_from():
    assert len(shapes()) >= 40
    for name in shapes():
        assert published(name)["source"]
        assert llm(name, 8, 2).flops("decode") > 2 * 2 * shape(name).hidden


@pytest.mark.parametrize("name", KV_BYTES)
def test_cache_bytes_of_a_token(name: str):
    workload = llm(name, 100, 20, 3)
    assert workload.bytes("kv") == KV_BYTES[name] * 120 * 3
    assert {t.name for t in workload.role("kv")} == {
        "kv.prompt.key", "kv.prompt.value", "kv.new.key", "kv.new.value"
    }  # fmt: skip


def test_llama_2_7b_keeps_524288_bytes_a_token():
    assert KV_BYTES["llama-2-7b"] == 524_288
    assert llm("llama-2-7b", 1, 0).bytes("kv") == 524_288
    assert llm("llama-2-7b", 1, 0, kv_dtype="int8").bytes("kv") == 262_144


def test_prefill_operations_by_hand():
    layers, hidden, ffn, vocab, heads, dim = 32, 4096, 11008, 32000, 32, 128
    prompt, batch = 1000, 4
    workload = llm("llama-2-7b", prompt, 0, batch)
    block = 4 * hidden * hidden + 3 * hidden * ffn
    by_hand = 2 * batch * (prompt * layers * block + vocab * hidden)
    assert products(workload, "prefill") == by_hand
    flash = fuse(workload, ("flash", "compiled")).phase("prefill")
    attention = [op for op in flash.ops if op.kind == "attention_prefill"]
    assert len(attention) == 1
    assert attention[0].repeat == layers
    seen = batch * heads * sum(range(1, prompt + 1))
    # two products, and scale, mask and softmax of the scores
    assert attention[0].flops == pytest.approx(seen * (4 * dim + 7), rel=1e-12)
    eager = [op for op in workload.phase("prefill").ops if op.name in ("scores", "weighted")]
    assert sum(op.flops for op in eager) == 4 * batch * heads * dim * prompt**2


def test_attention_in_a_window_by_hand():
    config = small(model_type="mistral", sliding_window=5)
    fused = fuse(llm(config, 12, 0, 2), ("flash",))
    attention = next(o for o in fused.phase("prefill").ops if o.kind == "attention_prefill")
    seen = 2 * 8 * sum(min(i, 5) for i in range(1, 13))
    assert attention.flops == pytest.approx(seen * (4 * 8 + 7), rel=1e-12)


@pytest.mark.parametrize(
    ("prompt", "generate", "window"),
    [*itertools.product((1, 7, 30), (1, 2, 9, 40), (0, 4, 16, 64)), (0, 12, 0), (0, 12, 5)],
)
def test_decode_is_the_sum_of_its_steps(prompt: int, generate: int, window: int):
    config = small(model_type="mistral", sliding_window=window) if window else small()
    whole = llm(config, prompt, generate, 2)
    plain = (4 * 8 + 6) * 2 * 8 * 3  # of a key and query: products, scale and softmax
    kv_bytes = 2 * 2 * 2 * 8 * 2 * 3  # keys and values of a token, 2 sequences, 3 layers
    attended = sum(
        min(window, prompt + i) if window else prompt + i for i in range(1, generate + 1)
    )
    fused = fuse(whole, ("flash",))
    attention = next(o for o in fused.phase("decode").ops if o.kind == "attention_decode")
    flops = generate * attention.repeat * fused.op_flops(attention)
    assert flops == pytest.approx(plain * attended, rel=1e-12)
    assert moved(fused, "decode", "kv") == pytest.approx(
        kv_bytes * (attended + generate), rel=1e-12
    )


def test_decode_reads_every_weight_once_a_step():
    workload = llm("llama-3-8b", 500, 10, 1)
    rows = shape("llama-3-8b").hidden * 2  # one row of the embedding instead of all
    weights = float(workload.bytes("weight")) - float(workload.tensors["embed"].bytes())
    assert moved(workload, "decode", "weight") == pytest.approx(10 * (weights + rows), rel=1e-12)
    step = 2 * (8_030_261_248 - 128256 * 4096 - 65 * 4096)  # neither table nor norms multiply
    assert products(workload, "decode") == pytest.approx(step, rel=1e-12)


def test_what_a_technique_drops_is_neither_read_nor_used():
    full = fuse(llm("llama-3-8b", 4096, 1, 8), ("flash",))
    kept = full.with_tensors(
        full.tensors[n].keep(token=512) for n in ("kv.prompt.key", "kv.prompt.value")
    )
    short = fuse(llm("llama-3-8b", 512, 1, 8), ("flash",))
    assert kept.bytes("kv") == short.bytes("kv")
    assert moved(kept, "decode", "kv") == moved(short, "decode", "kv")
    for name in ("kv.prompt.key", "kv.prompt.value"):
        assert moved(kept, "prefill", "kv") == moved(short, "prefill", "kv"), name
    # what the softmax does is not governed by the cache
    lost = (4096 - 512) * 8 * 32 * 32 * 4 * 128
    assert full.flops("decode") - kept.flops("decode") == pytest.approx(lost, rel=1e-12)
    assert full.flops("prefill") == kept.flops("prefill")


@pytest.mark.parametrize("name", ["llama-3-8b", "mixtral-8x7b", "gemma-2-9b", "phi-2", "opt-30b"])
def test_arrays_are_many_scalars(name: str):
    prompts = np.array([1.0, 100.0, 5000.0, 9000.0])
    generated = np.array([300.0, 1.0, 5000.0, 7.0])
    batches = np.array([1.0, 2.0, 64.0, 3.0])
    many = fuse(llm(name, prompts, generated, batches), ("flash", "compiled"))
    for i, case in enumerate(zip(prompts, generated, batches, strict=True)):
        one = fuse(llm(name, *case), ("flash", "compiled"))
        for phase in ("prefill", "decode"):
            assert many.flops(phase)[i] == pytest.approx(one.flops(phase), rel=1e-12)
            assert moved(many, phase)[i] == pytest.approx(moved(one, phase), rel=1e-12)
        assert many.bytes("kv")[i] == pytest.approx(one.bytes("kv"), rel=1e-12)


def test_experts():
    one = llm("mixtral-8x7b", 0, 1, 1)
    expert = 3 * 4096 * 14336 * 2
    read = [moved_of(one, "decode", f"experts.{n}") for n in ("gate_up", "down")]
    assert sum(read) == pytest.approx(32 * 2 * expert, rel=1e-12)
    many = llm("mixtral-8x7b", 4096, 0, 8)
    read = [moved_of(many, "prefill", f"experts.{n}") for n in ("gate_up", "down")]
    assert sum(read) == pytest.approx(32 * 8 * expert, rel=1e-6)
    flops = [op for op in many.phase("prefill").ops if op.name.startswith("experts.")]
    products = sum(op.repeat * many.op_flops(op) for op in flops if op.kind == "matmul")
    assert products == pytest.approx(2 * 2 * 3 * 4096 * 14336 * 4096 * 8 * 32, rel=1e-12)


def moved_of(workload: Workload, phase: str, tensor: str) -> float:
    return sum(
        float(op.repeat * workload.tensors[u.tensor].bytes(u.at))
        for op in workload.phase(phase).ops for u in op.reads if u.tensor == tensor
    )  # fmt: skip


def test_tensor_parallel_halves_what_is_split():
    whole, half = llm("llama-2-70b", 100, 10, 2), llm("llama-2-70b", 100, 10, 2, tp=2)
    norms = (2 * 80 + 1) * 8192 * 2
    assert 2 * half.bytes("weight") == whole.bytes("weight") + norms
    assert 2 * half.bytes("kv") == whole.bytes("kv")
    assert 2 * products(half, "prefill") == products(whole, "prefill")
    sums = [op for op in half.phase("decode").ops if op.kind == "all_reduce"]
    assert sum(op.repeat for op in sums) == 2 * 80 + 1
    message = half.tensors[sums[-1].reads[0].tensor]
    assert message.bytes() == 2 * 8192 * 2
    # 16 devices share 8 heads of keys: each holds a copy of one
    assert llm("llama-2-70b", 100, 0, 2, tp=16).bytes("kv") == whole.bytes("kv") * 100 / 110 / 8


def test_a_training_step_does_three_times_the_products():
    config = small()
    forward = 2 * 2 * 50 * (config.parameters - 100 * 64 - 7 * 64)  # 2 sequences of 50 tokens
    step = llm(config, 50, 0, 2, train=True)
    assert products(step, "training step") == pytest.approx(3 * forward, rel=1e-12)
    assert step.bytes("gradient") == 2 * config.parameters
    assert step.bytes("state") == 12 * config.parameters
    assert llm(config, 50, 0, 2, dtype="fp32", train=True).bytes("state") == 8 * config.parameters
    written = {u.tensor for op in step.phases[0].ops for u in op.writes}
    assert set(step.tensors) >= written
    assert {t.name for t in step.role("gradient")} <= written
    updates = [op for op in step.phases[0].ops if op.kind == "optimizer"]
    assert sum(op.repeat * op.flops for op in updates) == 12 * config.parameters


def test_flash_saves_no_scores():
    step = llm(small(), 50, 0, 2, train=True)
    fused = fuse(step, ("flash",))
    scores = 2 * 8 * 50 * 50 * (4 + 2) * 3  # weights in fp32 and again in bf16, 3 layers
    assert step.bytes("saved") - fused.bytes("saved") == scores
    wide = fuse(llm(small(head_dim=128), 50, 0, 2, train=True), ("flash",))
    ahead, back = (op for op in wide.phases[0].ops if op.kind == "attention_prefill")
    assert back.name == "attention_prefill_backward"
    assert back.flops / ahead.flops == pytest.approx(2.5, rel=0.02)


def test_phases_follow_the_request():
    assert [p.name for p in llm("gpt2", 10, 0).phases] == ["prefill"]
    assert [p.name for p in llm("gpt2", 0, 10).phases] == ["decode"]
    assert [p.name for p in llm("gpt2", 10, 10).phases] == ["prefill", "decode"]
    assert [p.name for p in llm("gpt2", 10, 0, train=True).phases] == ["training step"]
    assert llm("gpt2", 10, 7).phase("decode").steps == 7


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"tp": 3}, "does not divide the 32 attention heads"),
        ({"batch": 0}, "at least 1"),
        ({"batch": 1.5}, "whole numbers"),
        ({"prompt": -1}, "whole numbers"),
        ({"prompt": float("nan")}, "whole numbers"),
        ({"prompt": "long"}, "must be a number"),
        ({"prompt": 0, "generate": 0}, "nothing to do"),
        ({"dtype": "bf17"}, "bf16"),
        ({"config": "llama-2-7"}, "did you mean llama-2-7b"),
        ({"config": "nowhere/config.json"}, "no model configuration"),
        ({"config": {"hidden_size": 8}}, "'model_type' is missing"),
        ({"config": {"model_type": "llama"}}, "'hidden_size' is missing"),
        ({"config": {"model_type": "mamba"}}, "no closed form"),
        ({"prompt": 0, "train": True}, "at least one token"),
    ],
)
def test_what_is_refused(given: dict[str, object], says: str):
    request = {"config": "llama-2-7b", "prompt": 10, "generate": 10, **given}
    with pytest.raises(NarrowsError, match=says):
        llm(**request)  # type: ignore[arg-type]
