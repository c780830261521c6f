"""The closed form of decoder-only transformers: prefill, decode and the training step.

Multi-head, grouped and multi-query attention, sliding windows, plain and gated MLPs, mixtures of
experts, tied and untied embeddings, tensor parallelism. No torch. Lengths and batches may be
arrays: one call then holds thousands of cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from narrows.core.errors import NarrowsError
from narrows.core.tensor import Codec, Number, Tensor
from narrows.core.workload import Phase, Use, Workload
from narrows.trace.blocks import Builder, Note
from narrows.trace.config import TransformerConfig, shape
from narrows.trace.layers import Cache, Span, layer
from narrows.trace.weights import weight_tensors


def llm(
    config: TransformerConfig | str | Path | Mapping[str, Any],
    prompt: Any,
    generate: Any,
    batch: Any = 1,
    dtype: str = "bf16",
    kv_dtype: str | None = None,
    tp: int = 1,
    train: bool = False,
) -> Workload:
    """The workload of a transformer that reads `prompt` tokens and writes `generate` more.

    config: a TransformerConfig, a catalogue name (`llama-3-8b`), a config.json or its fields.
    prompt, generate, batch: whole numbers, or arrays of them that broadcast (one value a case).
    dtype: number format of weights and products; activations are 16 bit or wider. kv_dtype: of
    the cached keys and values (dtype when None). tp: tensor-parallel devices; all figures are
    those of one. train: one training step over `batch` sequences of `prompt` tokens instead.

    Phases: `prefill` (none where prompt is 0), whose logits are of the last position only, and
    `decode` (none where generate is 0) with one step for each generated token; step i attends
    prompt + i keys, and extents hold the exact mean over the steps, so totals are exact. Or
    `training step`.
    Raises NarrowsError on an unknown model, lengths below zero, a batch below one, or a tp that
    does not divide the heads.
    """
    config = resolve(config)
    prompt, generate = _counts("prompt", prompt), _counts("generate", generate)
    batch = _counts("batch", batch)
    if np.any(np.asarray(batch) < 1):
        raise NarrowsError("batch must be at least 1")
    weights = weight_tensors(config, dtype, tp)
    facts: dict[str, Any] = {
        "model": config.name, "config": config, "prompt": prompt, "generate": generate,
        "batch": batch, "layers": config.layers, "heads": config.heads,
        "kv_heads": config.kv_heads, "head_dim": config.head_dim, "hidden": config.hidden,
        "window": config.window, "vocab": config.vocab, "parameters": config.parameters,
        "devices": tp, "dtype": dtype, "kv_dtype": kv_dtype or dtype, "train": train,
    }  # fmt: skip
    if train:
        from narrows.trace.training import training_step

        if not np.all(np.asarray(prompt) > 0):
            raise NarrowsError("a training step needs a prompt of at least one token")
        return training_step(config, weights, prompt, batch, dtype, tp, facts)
    if not np.any(np.asarray(prompt) > 0) and not np.any(np.asarray(generate) > 0):
        raise NarrowsError("nothing to do: give a prompt or tokens to generate above zero")
    tensors: dict[str, Tensor] = {**weights}
    cache = Cache.of(config, prompt, generate, batch, kv_dtype or _activation(dtype), tp)
    tensors.update(cache.tensors)
    phases: list[Phase] = []
    if np.any(np.asarray(prompt) > 0):
        made = forward(config, tensors, cache, Span.prefill(prompt, batch), dtype, tp, last=True)
        tensors.update(made.tensors)
        phases.append(Phase("prefill", tuple(made.ops)))
    if np.any(np.asarray(generate) > 0):
        span = Span.decode(prompt, generate, batch)
        made = forward(config, tensors, cache, span, dtype, tp, last=True)
        tensors.update(made.tensors)
        phases.append(Phase("decode", tuple(made.ops), steps=generate))
    return Workload(config.name, tensors, tuple(phases), facts)


def resolve(config: TransformerConfig | str | Path | Mapping[str, Any]) -> TransformerConfig:
    """A configuration from itself, a catalogue name, a path, or the fields of a config.json."""
    if isinstance(config, TransformerConfig):
        return config
    if isinstance(config, str) and not Path(config).exists() and not config.endswith(".json"):
        return shape(config)
    return TransformerConfig.from_json(config)


def _activation(dtype: str) -> str:
    return dtype if dtype in ("fp64", "fp32", "bf16", "fp16") else "bf16"


def _counts(name: str, value: Any) -> Number:
    """A count or an array of counts; whole, finite and not below zero."""
    try:
        array = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise NarrowsError(f"{name} must be a number or an array, not {value!r}") from None
    if not np.all(np.isfinite(array)) or np.any(array < 0) or np.any(array != np.floor(array)):
        raise NarrowsError(f"{name} must be whole numbers from 0 up, not {value!r}")
    return float(array) if array.ndim == 0 else array


def forward(
    config: TransformerConfig, tensors: Mapping[str, Tensor], cache: Cache | None, span: Span,
    dtype: str, tp: int, last: bool,
) -> Builder:  # fmt: skip
    """One forward pass over a span of tokens; `last` computes the logits of one position."""
    b = Builder(span.phase, tensors, span.batch, span.tokens, dtype)
    hidden = _embed(b, config, tp)
    table = None
    if config.positions == "rotary":
        table = b.rotary_table(config.head_dim * config.rotary)
    makes = [(sparse, windowed) for sparse in (False, True) for windowed in (False, True)
             if _count(config, sparse, windowed)]  # fmt: skip
    for sparse, windowed in makes:
        b.repeat = _count(config, sparse, windowed)
        words = ("sparse." if sparse else "plain.", "local." if windowed else "")
        b.prefix = "".join(words) if len(makes) > 1 else ""
        hidden = layer(b, config, hidden, table, cache, span, windowed, sparse, tp)
    b.repeat, b.prefix = 1, ""
    if config.final_norm:
        hidden = b.norm(config.norm, "final_norm", hidden)
    _head(b, config, hidden, tp, last)
    return b


def _count(config: TransformerConfig, sparse: bool, windowed: bool) -> float:
    """Layers of one make; windows are spread evenly over plain and expert layers."""
    of_mlp = config.layers - config.dense_layers if sparse else config.dense_layers
    if not config.experts:
        of_mlp = 0 if sparse else config.layers
    of_window = config.windowed_layers if windowed else config.layers - config.windowed_layers
    return of_mlp * of_window / config.layers


def _embed(b: Builder, config: TransformerConfig, tp: int) -> str:
    ids = f"{b.phase}.ids"
    b.tensors[ids] = Tensor(ids, "input", {"batch": b.batch, "token": b.tokens}, Codec.of("int64"))
    width = config.embed_dim or config.hidden
    rows = b.batch * b.tokens
    hidden = b.make("embedded", {"channel": width})
    b.run("embed", "gather", [ids, Use("embed", {"vocab": rows / tp})], [hidden])
    if config.embed_dim:
        hidden = b.linear("project_in", hidden, {"channel": config.hidden})
    b.reduce_over(hidden, tp, "embed.all_reduce")
    if config.embed_scale:
        hidden = b.map("embed.scale", "pointwise", [hidden], b.like(hidden, "embed.scaled"))
    if config.positions == "learned":
        table = b.make("positions", {"channel": config.hidden})
        b.run("positions", "gather", [Use("positions", {"token": rows})], [table])
        hidden = b.add("positions.add", hidden, table, "positioned")
    return hidden


def _head(b: Builder, config: TransformerConfig, hidden: str, tp: int, last: bool) -> None:
    """Logits; of the last position of every sequence only, where `last`."""
    weight = "embed" if config.tied else "lm_head"
    count: Number = 1.0 if last else b.tokens
    if config.embed_dim:
        hidden = b.linear("project_out", hidden, {"channel": config.embed_dim})
    out = b.make("logits", {"token": count, "vocab": config.vocab / tp})
    rows = b.batch * count
    bias = ["lm_head.bias"] if config.head_bias else []
    b.run(
        "lm_head", "matmul", [Use(hidden, {"token": count}), weight, *bias], [out],
        per_element={weight: 2.0 * rows}, precision=b.precision, note=Note((hidden,)),
        shape={"m": rows, "n": config.vocab / tp, "k": config.embed_dim or config.hidden},
    )  # fmt: skip
    if config.softcap:
        for step in ("divide", "tanh", "multiply"):
            made = b.like(out, f"logits.{step}")
            saves = [made] if step == "tanh" else []
            out = b.map(f"softcap.{step}", "pointwise", [out], made, saves=saves)
    if tp > 1:
        # The message of a gather is what it gathers: all parts together.
        out = b.like(out, "logits.gathered", {"vocab": config.vocab})
        b.run("logits.all_gather", "all_gather", [out], [out], shape={"peers": tp})
    b.tensors[out] = replace(b.tensors[out], role="output")
