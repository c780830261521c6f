"""The layout of this project: one row a measured kernel, described in docs/profile-format.md."""

from __future__ import annotations

import numpy as np

from narrows.core.errors import NarrowsError, unknown
from narrows.core.workload import KINDS
from narrows.measure.layouts import work
from narrows.measure.layouts.rows import SIZES, Rows, spelt, width
from narrows.measure.layouts.table import Table
from narrows.measure.layouts.work import Figures

TIMES = {"seconds": 1.0, "milliseconds": 1e-3, "microseconds": 1e-6, "nanoseconds": 1e-9}
"""Columns that may hold the time, and their seconds."""

COLUMNS = ("op", "precision", *SIZES, "flops", "bytes", *TIMES, "name")

SHAPES = {
    "matmul": ("m", "n", "k"),
    "attention_prefill": ("m", "n", "k", "batch"),
    "attention_decode": ("n", "k", "batch"),
}
"""Sizes from which the work of an op class follows."""


def matches(columns: set[str]) -> bool:
    """Whether a header is of this layout."""
    return "op" in columns and bool(columns & TIMES.keys())


def read(table: Table) -> tuple[Rows, dict[int, str]]:
    """Rows of a file, and the lines that are refused whatever the machine, with the reason."""
    for name in table.columns:
        if name and name not in COLUMNS:
            raise NarrowsError(f"{table.path}: {unknown('column', name, COLUMNS)}")
    times = [t for t in TIMES if t in table.columns]
    if len(times) > 1:
        raise NarrowsError(f"{table.path}: {' and '.join(times)} both give the time; keep one")
    kinds, precision = table.words("op"), spelt(table.words("precision"))
    shaped, decoding = np.isin(kinds, tuple(SHAPES)), kinds == "attention_decode"
    sizes = {s: _or(table, s, 0.0) for s in ("n", "k", "peers")}
    sizes["m"] = _or(table, "m", np.where(decoding, 1.0, 0.0))
    sizes["batch"] = _or(table, "batch", np.where(shaped, 1.0, 0.0))
    grouped = np.where(shaped & (kinds != "matmul"), sizes["batch"], 0.0)
    sizes["groups"] = _or(table, "groups", grouped)
    refused: dict[int, str] = {}
    for line in table.lines[~np.isin(kinds, KINDS)]:
        kind = str(kinds[table.lines == line][0])
        refused[int(line)] = str(unknown("op class", kind, KINDS))
    flops, moved = np.zeros(len(table)), np.zeros(len(table))
    for kind, wanted in SHAPES.items():
        rows = (kinds == kind) & np.all([sizes[s] > 0 for s in wanted], axis=0)
        found = _work(kind, {s: v[rows] for s, v in sizes.items()}, width(precision[rows]))
        flops[rows], moved[rows] = found
    short = (kinds == "attention_prefill") & (sizes["n"] < sizes["m"])
    for line in table.lines[short]:
        refused[int(line)] = "n counts the keys that the last query sees, so it is at least m"
    flops, moved = _or(table, "flops", flops), _or(table, "bytes", moved)
    sane = np.all([np.isfinite(v) & (v >= 0) for v in sizes.values()], axis=0)
    empty = sane & (flops == 0) & (moved == 0)
    for line, kind in zip(table.lines[empty], kinds[empty], strict=True):
        told = ", ".join(SHAPES.get(str(kind), ()))
        refused.setdefault(int(line), f"no work: give {told and told + ', or '}flops and bytes")
    seconds = table.numbers(times[0]) * TIMES[times[0]]
    names = table.words("name") if "name" in table.columns else kinds
    return Rows.of(kinds, precision, seconds, table.lines, flops, moved, 0.0, names, sizes), refused


def _or(table: Table, name: str, default: np.ndarray | float) -> np.ndarray:
    """A column of numbers; `default` where a cell is empty or the column is not there."""
    otherwise = np.broadcast_to(np.asarray(default, float), (len(table),))
    if name not in table.columns:
        return otherwise.copy()
    blank = np.array([not v.strip() for v in table.columns[name]])
    return np.where(blank, otherwise, table.numbers(name))


def _work(kind: str, size: dict[str, np.ndarray], width: np.ndarray) -> tuple[Figures, Figures]:
    if kind == "matmul":
        return work.product(size["m"], size["n"], size["k"], width, size["batch"])
    queries = 1.0 if kind == "attention_decode" else size["m"]
    return work.attention(queries, size["n"], size["k"], size["batch"], size["groups"], width)
