"""Profiles as microsoft/vidur records them: operators, attention, collectives; milliseconds.

The profiler runs 16-bit models (it casts to fp16), so rows are fp16 unless a column `precision`
or `dtype` says otherwise. Times are `time_stats.<operator>.median`, rounded to a microsecond.
"""

from __future__ import annotations

import numpy as np

from narrows.core.errors import NarrowsError
from narrows.measure.layouts import work
from narrows.measure.layouts.rows import Rows, spelt, width
from narrows.measure.layouts.table import Table

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")
MILLI = 1e-3
RESOLUTION = 1e-6


def _column(operator: str) -> str:
    return f"time_stats.{operator}.median"


def matches(columns: set[str]) -> bool:
    """Whether a header is of this layout."""
    return any(c.startswith("time_stats.") and c.endswith(".median") for c in columns)


def _precision(table: Table) -> np.ndarray:
    for name in ("precision", "dtype"):
        if name in table.columns:
            return spelt(table.words(name))
    return np.full(len(table), "fp16", object)


def read(table: Table) -> tuple[Rows, dict[int, str]]:
    """Rows of a file, and the lines that are refused whatever the machine, with the reason."""
    columns = table.columns.keys()
    if any(_column(c) in columns for c in COLLECTIVES):
        return _collectives(table)
    if _column("attn_decode") in columns or _column("attn_prefill") in columns:
        return _attention(table), {}
    return _operators(table), {}


def _operators(table: Table) -> Rows:
    table.need("n_head", "n_kv_head", "n_embd", "n_expanded_embd", "num_tokens",
               "num_tensor_parallel_workers", "use_gated_mlp")  # fmt: skip
    heads, kv_heads, hidden, inner, tokens, tp = (
        table.numbers(c) for c in ("n_head", "n_kv_head", "n_embd", "n_expanded_embd",
                                   "num_tokens", "num_tensor_parallel_workers")
    )  # fmt: skip
    gated = np.isin(table.words("use_gated_mlp"), ("true", "1", "1.0", "yes"))
    with np.errstate(all="ignore"):
        dim = hidden / heads
        mine, groups = work.heads_of(heads, tp), work.heads_of(kv_heads, tp)
    precision = _precision(table)
    size = width(precision)
    products = {
        "attn_pre_proj": ((mine + 2 * groups) * dim, hidden),
        "attn_post_proj": (hidden, mine * dim),
        "mlp_up_proj": (np.where(gated, 2.0, 1.0) * inner / tp, hidden),
        "mlp_down_proj": (hidden, inner / tp),
    }
    # One norm a layer means attention and MLP run side by side, and two sums at the end.
    sums = 3.0 if _column("post_attention_layernorm") in table.columns else 6.0
    passed = {
        "input_layernorm": ("norm", 2 * hidden),
        "post_attention_layernorm": ("norm", 2 * hidden),
        "attn_rope": ("rope", 2 * (mine + groups) * dim),
        "mlp_act": ("pointwise", np.where(gated, 3.0, 2.0) * inner / tp),
        "add": ("pointwise", sums * hidden),
        "emb": ("gather", 2 * hidden),
    }
    parts: list[Rows] = []
    for name, (n, k) in products.items():
        if _column(name) in table.columns:
            flops, moved = work.product(tokens, n, k, size)
            shape = {"m": tokens, "n": n, "k": k, "batch": 1.0}
            parts.append(_rows(table, name, "matmul", precision, flops, moved, shape))
    for name, (kind, elements) in passed.items():
        if _column(name) in table.columns:
            item = name if name != "mlp_act" else np.where(gated, "mlp_act.silu", "mlp_act.gelu")
            moved = tokens * elements * size
            parts.append(_rows(table, name, kind, precision, 0.0, moved, {}, item))
    if not parts:
        raise NarrowsError(f"{table.path}: none of its time_stats columns is an operator known "
                           "here; see docs/profile-format.md")  # fmt: skip
    return Rows.joined(parts)


def _rows(
    table: Table, name: str, kind: str, precision: np.ndarray, flops: np.ndarray | float,
    moved: np.ndarray | float, shape: dict[str, np.ndarray | float],
    item: np.ndarray | str = "",
) -> Rows:  # fmt: skip
    """The rows of one operator; what follows the last dot of `item` tells its class apart."""
    return Rows.of(
        kind, precision, table.numbers(_column(name)) * MILLI, table.lines, flops, moved,
        RESOLUTION, name if isinstance(item, str) else item, shape,
    )  # fmt: skip


def _attention(table: Table) -> Rows:
    table.need("n_embd", "n_q_head", "n_kv_head", "num_tensor_parallel_workers", "batch_size",
               "prefill_chunk_size", "kv_cache_size", "is_prefill")  # fmt: skip
    hidden, heads, kv_heads, tp, batch, chunk, past = (
        table.numbers(c) for c in ("n_embd", "n_q_head", "n_kv_head",
                                   "num_tensor_parallel_workers", "batch_size",
                                   "prefill_chunk_size", "kv_cache_size")
    )  # fmt: skip
    precision = _precision(table)
    with np.errstate(all="ignore"):
        dim = hidden / heads
        mine = batch * work.heads_of(heads, tp)
        groups = batch * work.heads_of(kv_heads, tp)
    filling = np.isin(table.words("is_prefill"), ("true", "1", "1.0"))
    parts: list[Rows] = []
    for name, kind, chosen, queries in (
        ("attn_prefill", "attention_prefill", filling, chunk),
        ("attn_decode", "attention_decode", ~filling, np.ones(len(table))),
    ):
        if _column(name) not in table.columns or not chosen.any():
            continue
        keys = past + queries
        flops, moved = work.attention(queries, keys, dim, mine, groups, width(precision))
        shape = {"m": queries, "n": keys, "k": dim, "batch": mine, "groups": groups}
        parts.append(_rows(table, name, kind, precision, flops, moved, shape).take(chosen))
    return Rows.joined(parts)


def _collectives(table: Table) -> tuple[Rows, dict[int, str]]:
    table.need("num_workers", "size", "devices_per_node")
    workers, local = table.numbers("num_workers"), table.numbers("devices_per_node")
    parts = [
        Rows.of(
            kind, _precision(table), table.numbers(_column(kind)) * MILLI, table.lines, 0.0,
            table.numbers("size"), RESOLUTION, kind, {"peers": workers},
        )
        for kind in COLLECTIVES
        if _column(kind) in table.columns
    ]  # fmt: skip
    refused: dict[int, str] = {}
    pairs = "pairwise" in table.path.name or "pair" in table.path.name.split("-")
    for line, ranks, inside in zip(table.lines, workers, local, strict=True):
        if ranks > inside:
            refused[int(line)] = (
                f"{ranks:g} workers, {inside:g} a node, talk over a network between nodes, which "
                "no link of the machine stands for; keep the rows within one node"
            )
        elif pairs and ranks > 2:
            refused[int(line)] = (
                f"the file is of devices linked in pairs, so {ranks:g} workers also talk over the "
                "host, which the link of the machine's peers is not; keep the rows of 2 workers"
            )
    return Rows.joined(parts), refused
