"""Latency tables of attention kernels, as inference-sim records them; microseconds.

Head counts are of the whole model; `tp` devices share them. Prefill is causal, one sequence.
"""

from __future__ import annotations

import numpy as np

from narrows.core.errors import NarrowsError
from narrows.measure.layouts import work
from narrows.measure.layouts.rows import Rows, spelt, width
from narrows.measure.layouts.table import Table

MICRO = 1e-6
RESOLUTION = 1e-9


def matches(columns: set[str]) -> bool:
    """Whether a header is of this layout."""
    return "latency_us" in columns and ("seq_len" in columns or "kv_len" in columns)


def read(table: Table) -> tuple[Rows, dict[int, str]]:
    """Rows of a file."""
    decoding = "kv_len" in table.columns
    if decoding and "seq_len" in table.columns:
        raise NarrowsError(f"{table.path}: has both 'kv_len' (decode) and 'seq_len' (prefill); "
                           "give them as two files")  # fmt: skip
    length = "kv_len" if decoding else "seq_len"
    table.need("n_q_heads", "n_kv_heads", "head_dim")
    tp = table.numbers("tp", 1.0)
    batch = table.numbers("batch_size", 1.0)
    dim, tokens = table.numbers("head_dim"), table.numbers(length)
    with np.errstate(all="ignore"):
        heads = batch * work.heads_of(table.numbers("n_q_heads"), tp)
        groups = batch * work.heads_of(table.numbers("n_kv_heads"), tp)
    precision = spelt(table.words("dtype"))
    stored = spelt(table.words("kv_dtype")) if "kv_dtype" in table.columns else precision
    queries = np.ones(len(table)) if decoding else tokens
    flops, moved = work.attention(queries, tokens, dim, heads, groups, width(precision))
    moved = moved + 2.0 * groups * tokens * dim * (width(stored) - width(precision))
    kind = "attention_decode" if decoding else "attention_prefill"
    shape = {"m": queries, "n": tokens, "k": dim, "batch": heads, "groups": groups}
    return Rows.of(
        kind, precision, table.numbers("latency_us") * MICRO, table.lines, flops, moved,
        RESOLUTION, kind, shape,
    ), {}  # fmt: skip
