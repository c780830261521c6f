"""Measured profiles: kernels that ran, their work and their seconds, whatever layout they are in.

A layout is told by its columns. What cannot be right is refused by file, line and reason, never
averaged: times that are no numbers, precisions not declared, rows faster than the machine's own
rates allow, and files whose times are in another unit than they say.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from narrows.core.errors import NarrowsError
from narrows.core.machine import Machine
from narrows.core.price import TRAFFIC
from narrows.core.tensor import BITS
from narrows.measure.layouts import mha, plain, table, vidur
from narrows.measure.layouts.rows import SIZES, Rows

LAYOUTS = (plain, vidur, mha)

ALLOWED = 0.02
"""Share by which a row may beat the limit: rates of datasheets are rounded."""

TOO_FAST, TOO_SLOW = 1 / 50, 100.0
"""Median of measured seconds over the limit outside of which a file is in another unit."""

SHORTEST = 2e-6, 20e-6
"""Seconds that even an empty kernel may take, added to the limit before the two above."""

NOT_KERNELS = {
    "prompt_time": "times of whole requests (prompt_time, token_time)",
    "ttft_ms": "times of whole requests (ttft_ms)",
    "silicon_ttft_ms": "times of whole deployments (silicon_ttft_ms)",
}
"""Columns of files that measure something else than kernels."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that is not believed. row: the line of the file, its header being line 1."""

    file: str
    row: int
    reason: str


@dataclass(frozen=True)
class Profile:
    """Measured rows of one or more files, and what was refused of them."""

    rows: Rows
    files: tuple[str, ...]
    refused: tuple[Refused, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def only(self, *kinds: str) -> Profile:
        """The rows of some op classes."""
        return replace(self, rows=self.rows.take(np.isin(self.rows.kind, kinds)))

    def take(self, chosen: np.ndarray) -> Profile:
        """The rows of a mask or of indices."""
        return replace(self, rows=self.rows.take(chosen))

    @property
    def source(self) -> str:
        """The files by name, for the source of a calibration."""
        names = [Path(f).name for f in self.files]
        return ", ".join(names if len(names) <= 3 else [*names[:2], f"{len(names) - 2} more"])


def limits(rows: Rows, machine: Machine) -> tuple[np.ndarray, np.ndarray]:
    """Least seconds of every row by arithmetic and by bytes, at the machine's own rates.

    Bytes that fit a cache of known rate are taken to come from it. Raises NarrowsError for a
    precision or a link that the machine does not have.
    """
    compute, moved = np.zeros(len(rows)), np.zeros(len(rows))
    for precision in np.unique(rows.precision.astype(str)):
        mine = (rows.precision == precision) & (rows.flops > 0)
        if mine.any():
            compute[mine] = rows.flops[mine] / machine.compute(str(precision)).capacity
    linked = np.isin(rows.kind, tuple(TRAFFIC))
    for kind in np.unique(rows.kind[linked].astype(str)):
        mine = rows.kind == kind
        name = machine.tiers.get("peers")
        if name is None or name not in machine.links:
            raise NarrowsError(f"machine {machine.name!r} has no link to peers, which {kind} needs")
        sent = rows.bytes[mine] * TRAFFIC[str(kind)](rows.peers[mine])
        moved[mine] = sent / machine.links[name].bandwidth
    rate = np.full(len(rows), machine.bandwidth(machine.memory))
    for cache in machine.caches:
        fits = rows.bytes <= (machine.capacity(cache) or 0.0)
        rate = np.where(fits, np.maximum(rate, machine.bandwidth(cache)), rate)
    return compute, np.where(linked, moved, rows.bytes / rate)


def _layout(read: table.Table) -> tuple[Rows, dict[int, str]]:
    names = set(read.columns)
    for layout in LAYOUTS:
        if layout.matches(names):
            return layout.read(read)
    for column, what in NOT_KERNELS.items():
        if column in names:
            raise NarrowsError(
                f"{read.path}: holds {what}, not of single kernels, so no op class can be "
                "calibrated from it; give a profile of operators (docs/profile-format.md)"
            )
    raise NarrowsError(
        f"{read.path}: not a layout known here (columns {', '.join(list(read.columns)[:4])}, ...); "
        "the plain one has the columns op, precision, m, n, k and seconds "
        "(docs/profile-format.md)"
    )


class _Reasons:
    """Why rows are refused, the first reason counting."""

    def __init__(self, count: int) -> None:
        self.told = np.full(count, "", object)

    def add(self, rows: np.ndarray, reason: str | Sequence[str]) -> None:
        """Refuse the rows of a mask that are not refused yet."""
        fresh = rows & (self.told == "")
        if isinstance(reason, str):
            self.told[fresh] = reason
        else:
            self.told[fresh] = np.asarray(reason, object)[fresh]

    @property
    def free(self) -> np.ndarray:
        """Mask of the rows that stand."""
        return self.told == ""


def _plain_faults(rows: Rows, why: _Reasons) -> None:
    """Refuse what is wrong whatever the machine."""
    why.add(~np.isfinite(rows.seconds), "the time is not a number")
    why.add(rows.seconds <= 0, "the time is not above zero")
    undeclared = np.isin(rows.precision, ("", "nan", "none", "unknown"))
    why.add(undeclared, "precision not declared: say fp16, bf16, fp32, fp8, ... in the row")
    unknown = ~np.isin(rows.precision, tuple(BITS))
    why.add(unknown, [f"precision {p!r} is not known; known: {', '.join(BITS)}"
                      for p in rows.precision])  # fmt: skip
    for name in (*SIZES, "flops", "bytes"):
        values = getattr(rows, name)
        why.add(~np.isfinite(values), f"{name} is not a number")
        why.add(values < 0, f"{name} is below zero")
    why.add((rows.flops == 0) & (rows.bytes == 0), "no work: neither flops nor bytes")
    why.add(np.isin(rows.kind, tuple(TRAFFIC)) & ~(rows.peers >= 2), "peers must be 2 or more")
    why.add((rows.flops > 1e30) | (rows.bytes > 1e24), "more work than any kernel does")


def _wrong_unit(seconds: np.ndarray, limit: np.ndarray) -> str:
    """What a file's unit seems to be, empty where it is as it says."""
    short, long = SHORTEST
    if np.median(seconds / (limit + short)) < TOO_FAST:
        return ("wrong unit: the times of the file are about a thousandth of what the machine can "
                "do at best; it looks like milliseconds given as microseconds, or seconds given "
                "as milliseconds")  # fmt: skip
    if np.median(seconds / (limit + long)) > TOO_SLOW:
        return ("wrong unit: the times of the file are hundreds of times the limit; it looks like "
                "microseconds given as milliseconds, or milliseconds given as seconds")  # fmt: skip
    return ""


def _against(rows: Rows, machine: Machine, why: _Reasons) -> None:
    """Refuse what this machine cannot have measured."""
    for precision in np.unique(rows.precision[why.free].astype(str)):
        try:
            machine.compute(str(precision))
        except NarrowsError as error:
            why.add((rows.precision == precision) & (rows.flops > 0), str(error))
    linked = np.isin(rows.kind, tuple(TRAFFIC))
    name = machine.tiers.get("peers")
    link = machine.links.get(name) if name else None
    if link is None:
        why.add(linked, f"machine {machine.name!r} has no link to peers, which a collective needs")
    else:
        joined = f"more ranks than link {link.name!r} of {machine.name!r} joins ({link.peers})"
        why.add(linked & (rows.peers > link.peers), joined)
    standing = np.flatnonzero(why.free)
    if not len(standing):
        return
    rows = rows.take(standing)
    compute, moved = limits(rows, machine)
    limit = np.maximum(compute, moved)
    told = _wrong_unit(rows.seconds, limit)
    if told:
        marked = np.zeros(len(why.told), bool)
        marked[standing] = True
        why.add(marked, told)
        return
    fast = rows.seconds * (1 + ALLOWED) + rows.resolution < limit
    for i in np.flatnonzero(fast):
        arithmetic = compute[i] >= moved[i]
        what = "do the arithmetic" if arithmetic else "move the bytes (a cache may have held some)"
        unit = "; milliseconds given as microseconds?" if limit[i] > 50 * rows.seconds[i] else ""
        why.told[standing[i]] = (
            f"faster than the physical limit: {rows.item[i] or rows.kind[i]} took "
            f"{rows.seconds[i]:.3g} s, {machine.name} needs at least {limit[i]:.3g} s to {what}"
            f"{unit}"
        )


def _one(path: Path, machine: Machine | None) -> tuple[Rows, list[Refused]]:
    read = table.read(path)
    with np.errstate(all="ignore"):
        rows, refused = _layout(read)
        why = _Reasons(len(rows))
        for line, reason in refused.items():
            why.add(rows.line == line, reason)
        _plain_faults(rows, why)
        if machine is not None:
            _against(rows, machine, why)
    found = dict.fromkeys(
        (int(line), str(told)) for line, told in zip(rows.line, why.told, strict=True) if told
    )
    return rows.take(why.free), [Refused(str(path), line, told) for line, told in sorted(found)]


def read(paths: str | Path | Iterable[str | Path], machine: Machine | None = None) -> Profile:
    """The measured rows of one profile or several.

    machine: what they were measured on; rows it cannot have run that fast are refused. Raises
    NarrowsError for a file that is no profile, and when nothing of the files can be believed.
    """
    single = isinstance(paths, str | os.PathLike)
    files = [Path(p) for p in ([paths] if single else paths)]  # type: ignore[list-item]
    if not files:
        raise NarrowsError("no profile given; give at least one CSV file of measured kernels")
    parts: list[Rows] = []
    refused: list[Refused] = []
    for path in files:
        rows, told = _one(path, machine)
        parts.append(rows)
        refused.extend(told)
    rows = Rows.joined(parts)
    if not len(rows):
        first = refused[0] if refused else Refused(str(files[0]), 0, "there are none")
        raise NarrowsError(
            f"{first.file}: no row can be believed, {len(refused)} refused; line {first.row}: "
            f"{first.reason}"
        )
    return Profile(rows, tuple(str(f) for f in files), tuple(refused))
