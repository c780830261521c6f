"""Prefill and decode of real model code, with both kinds of cache."""

from __future__ import annotations

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from narrows.core.errors import NarrowsError
from narrows.core.workload import Workload
from narrows.trace.config import published
from narrows.trace.generation import meta_model, trace_generation
from narrows.trace.llm import llm

TINY = {
    **published("llama-2-7b"), "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
}  # fmt: skip


def moved(workload: Workload, phase: str, role: str) -> float:
    found = workload.phase(phase)
    return float(found.steps) * sum(
        float(op.repeat * workload.tensors[u.tensor].bytes(u.at))
        for op in found.ops for u in (*op.reads, *op.writes)
        if workload.tensors[u.tensor].role == role
    )  # fmt: skip


@pytest.mark.parametrize("generate", [1, 2, 7, 8])
@pytest.mark.parametrize("prompt", [0, 1, 20])
def test_cache_traffic_is_exact(prompt: int, generate: int):
    found = trace_generation(TINY, prompt, generate, 3)
    token = 2 * 3 * 2 * 16 * 2 * 3  # keys and values, batch, heads, channels, bytes, layers
    attended = sum(prompt + i for i in range(1, generate + 1))
    assert moved(found, "decode", "kv") == pytest.approx(token * (attended + generate))
    assert found.bytes("kv") == token * (prompt + generate)
    assert found.phase("decode").steps == generate


def test_a_growing_cache_copies_all_of_itself():
    token = 2 * 3 * 2 * 16 * 2 * 3
    found = trace_generation(TINY, 20, 8, 3, cache="dynamic")
    attended = sum(20 + i for i in range(1, 9))
    # attention reads it; concatenation reads what was there before and writes all
    assert moved(found, "decode", "kv") == pytest.approx(token * (3 * attended - 8))
    static = trace_generation(TINY, 20, 8, 3)
    assert found.flops("decode") == static.flops("decode")


def test_techniques_rewrite_traced_caches_too():
    found = trace_generation(TINY, 1000, 1, 2)
    kept = found.with_tensors(
        found.tensors[n].keep(token=100) for n in ("kv.prompt.key", "kv.prompt.value")
    )
    lost = 900 * 4 * 2 * 16 * 2 * 2 * 3  # tokens, heads, batch, channels, two products of two
    assert found.flops("decode") - kept.flops("decode") == pytest.approx(lost)
    assert kept.bytes("kv") == found.bytes("kv") * 101 / 1001


def test_facts_and_names():
    found = trace_generation(TINY, 10, 4, 2)
    closed = llm({k: v for k, v in TINY.items() if k != "source"}, 10, 4, 2)
    for fact in ("prompt", "generate", "batch", "layers", "heads", "kv_heads", "head_dim",
                 "hidden", "window", "vocab", "parameters", "devices", "dtype"):  # fmt: skip
        assert found.facts[fact] == closed.facts[fact], fact
    assert {t.name for t in found.role("kv")} == {t.name for t in closed.role("kv")}
    for name in (t.name for t in closed.role("kv")):
        assert found.tensors[name].axes == closed.tensors[name].axes


def test_each_op_is_a_kernel_that_torch_launches():
    """The decode step of a traced model against the calls of a real one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    fields = {k: v for k, v in TINY.items() if k not in ("source", "model_type")}
    config = AutoConfig.for_model("llama", **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    traced = trace_generation(model, 12, 1, 2, cache="dynamic")
    launched: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            ins = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves(args)
                   if isinstance(t, torch.Tensor)}  # fmt: skip
            first = out[0] if isinstance(out, tuple) else out
            if isinstance(first, torch.Tensor) and first.untyped_storage()._cdata not in ins:
                launched.append(func._schema.name)
            return out

    cache = DynamicCache(config=config)
    prompt, token = torch.zeros((2, 12), dtype=torch.long), torch.zeros((2, 1), dtype=torch.long)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        with Count():
            model(token, past_key_values=cache)
    launched = [n for n in launched if n not in ("aten::empty", "aten::lift_fresh")]
    assert sum(op.repeat for op in traced.phase("decode").ops) == len(launched)


def test_a_model_with_weights_is_traced_as_it_is():
    model = meta_model(TINY, "fp16")
    found = trace_generation(model, 4, 2)
    assert found.facts["dtype"] == "fp16"
    assert found.name == "llama"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"cache": "paged"}, "static or dynamic"),
        ({"dtype": "int4"}, "cannot be traced"),
        ({"prompt": 0, "generate": 0}, "not both 0"),
        ({"source": {"model_type": "none"}}, "transformers has no model"),
        ({"source": "llama-2-7c"}, "did you mean"),
    ],
)
def test_what_is_refused(given: dict[str, object], says: str):
    with pytest.raises(NarrowsError, match=says):
        trace_generation(**{"source": TINY, "prompt": 4, "generate": 2, **given})  # type: ignore
