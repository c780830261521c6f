"""Traced and closed form of every shipped dense model, after identical fusion."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from narrows.core.fusion import fuse
from narrows.core.workload import Workload
from narrows.trace.config import TransformerConfig, published, shape, shapes
from narrows.trace.generation import meta_model, trace_generation
from narrows.trace.llm import llm
from narrows.trace.module import trace

FUSION = ("flash", "compiled")

POINTWISE = {"softmax", "norm", "pointwise", "rope", "reduce", "copy"}

LAYERS = ("num_hidden_layers", "n_layer")

# transformers keeps the keys of Falcon's newer blocks once for each query head, so its cache is
# that much larger than the architecture needs; the closed form counts what it needs.
REPEATED = {"falcon-40b": 128 / 8, "falcon-180b": 232 / 8}

DENSE = [name for name in shapes() if not shape(name).experts]
SPARSE = [name for name in shapes() if shape(name).experts]


def cut(name: str, layers: int = 2) -> dict[str, object]:
    """A published configuration with fewer layers."""
    fields = dict(published(name))
    for key in LAYERS:
        if key in fields:
            fields[key] = layers
    return fields


def moved(workload: Workload, phase: str, kinds: set[str] | None = None, role: str = "") -> float:
    """Bytes that a phase moves, of some op classes or one role of tensors."""
    found = workload.phase(phase)
    return float(found.steps) * sum(
        float(op.repeat * workload.tensors[use.tensor].bytes(use.at))
        for op in found.ops if kinds is None or op.kind in kinds
        for use in (*op.reads, *op.writes) if not role or workload.tensors[use.tensor].role == role
    )  # fmt: skip


def agree(traced: Workload, closed: Workload, repeated: float = 1.0, weights: bool = True) -> None:
    """Within 1 % in operations, weight bytes and cache bytes; 10 % in pointwise bytes."""
    assert traced.bytes("weight") == pytest.approx(closed.bytes("weight"), rel=0.001)
    assert traced.bytes("kv") == pytest.approx(repeated * closed.bytes("kv"), rel=0.001)
    for phase in ("prefill", "decode"):
        assert traced.flops(phase) == pytest.approx(closed.flops(phase), rel=0.01)
        if weights:
            found, expected = (moved(w, phase, role="weight") for w in (traced, closed))
            assert found == pytest.approx(expected, rel=0.01)
        found, expected = (moved(w, phase, role="kv") for w in (traced, closed))
        assert found == pytest.approx(repeated * expected, rel=0.01)
        if repeated == 1:
            found, expected = (moved(w, phase, POINTWISE) for w in (traced, closed))
            assert found == pytest.approx(expected, rel=0.10)


@pytest.mark.parametrize("name", DENSE)
def test_dense(name: str):
    fields = cut(name)
    traced = fuse(trace_generation(fields, 512, 64, 2), FUSION)
    closed = fuse(llm(fields, 512, 64, 2), FUSION)
    agree(traced, closed, REPEATED.get(name, 1.0))


@pytest.mark.parametrize("name", ["llama-3-8b", "gpt2", "phi-2", "gemma-7b"])
def test_attention_written_out(name: str):
    fields = cut(name)
    traced = fuse(trace_generation(fields, 300, 40, 3, attention="eager"), FUSION)
    closed = fuse(llm(fields, 300, 40, 3), FUSION)
    agree(traced, closed)
    eager = trace_generation(fields, 300, 40, 3, attention="eager")
    # unfused, both do the whole square of scores
    assert eager.flops("prefill") == pytest.approx(llm(fields, 300, 40, 3).flops("prefill"), 0.01)


@pytest.mark.parametrize(
    ("name", "prompt"), [("mistral-7b", 6000), ("gemma-2-9b", 6000), ("phi-3-mini", 3000)]
)
def test_prompts_longer_than_the_window(name: str, prompt: int):
    fields = cut(name)
    traced = fuse(trace_generation(fields, prompt, 200, 1), FUSION)
    closed = fuse(llm(fields, prompt, 200, 1), FUSION)
    agree(traced, closed)


@pytest.mark.parametrize("name", SPARSE)
def test_mixtures_do_the_same_operations(name: str):
    fields = cut(name)
    traced, closed = trace_generation(fields, 256, 16, 2), llm(fields, 256, 16, 2)
    assert traced.bytes("weight") == closed.bytes("weight")
    for phase in ("prefill", "decode"):
        found, expected = (fuse(w, FUSION).flops(phase) for w in (traced, closed))
        assert found == pytest.approx(expected, rel=0.01)
        # a trace does not know which experts are chosen: it reads all of them
        assert moved(traced, phase, role="weight") >= 0.999 * moved(closed, phase, role="weight")


def test_dtype_and_batch():
    fields = cut("llama-2-7b")
    for dtype in ("fp32", "fp16"):
        traced = fuse(trace_generation(fields, 64, 9, 16, dtype=dtype), FUSION)
        closed = fuse(llm(fields, 64, 9, 16, dtype=dtype), FUSION)
        agree(traced, closed)
        assert traced.facts["dtype"] == dtype


def test_seventy_billion_parameters_in_seconds():
    started = time.process_time()
    traced = trace_generation("llama-3-70b", 2048, 128, 4)
    assert time.process_time() - started < 30
    assert traced.facts["parameters"] == 70_553_706_496
    agree(fuse(traced, FUSION), fuse(llm("llama-3-70b", 2048, 128, 4), FUSION))
    assert len(traced.phase("decode").ops) < 100  # eighty layers, folded into one
    assert sum(op.repeat for op in traced.phase("decode").ops) > 3000


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_step(dtype: str):
    fields = cut("llama-3.2-1b", 3)
    model = meta_model(fields, dtype)
    import torch

    ids = torch.zeros((2, 256), dtype=torch.long, device="meta")
    traced = trace(model, {"input_ids": ids, "labels": ids, "use_cache": False}, training=True)
    closed = llm(fields, 256, 0, 2, dtype=dtype, train=True)
    flash = [fuse(w, ("flash",)) for w in (traced, closed)]
    for role in ("weight", "gradient", "state", "saved"):
        found, expected = (float(w.bytes(role)) for w in flash)
        assert found == pytest.approx(expected, rel=0.01), role
    phase = "training step"
    assert flash[0].flops(phase) == pytest.approx(flash[1].flops(phase), rel=0.01)
    found, expected = (moved(w, phase) for w in flash)
    assert found == pytest.approx(expected, rel=0.10)


@pytest.mark.parametrize("name", shapes())
def test_transformers_writes_what_publishers_do(name: str):
    """Shape and parameters of a configuration that went through transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {k: v for k, v in published(name).items() if k not in ("source", "model_type")}
    config = AutoConfig.for_model(published(name)["model_type"], **fields)
    read = TransformerConfig.from_json(config.to_dict(), name)
    assert replace(read, max_positions=0) == replace(shape(name), max_positions=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == shape(name).parameters
