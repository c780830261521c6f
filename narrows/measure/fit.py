"""Three constants an op class from timed micro-workloads, by search over a grid.

The law has kinks (maxima, caches, woken threads), so it is not differentiated: every point of a
grid over (compute, memory, fixed) is priced at once, the best is refined on finer grids. What is
minimised is the mean of |log(predicted / measured)|, which no outlier governs. The error that a
calibration carries is leave-one-out: each row predicted by the constants of all the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from narrows.core import caches
from narrows.core.calibration import Calibration, Error
from narrows.core.machine import Machine
from narrows.core.price import DISPATCH, class_of, price
from narrows.core.workload import Op, Workload

LEAST_ROWS = 4
"""Fewer rows than this cannot tell three constants apart."""

COARSE, FINE, ROUNDS, SHRINK = 13, 7, 6, 0.45
"""Points along each constant of the first grid and of the finer ones, how many of these follow,
and how much narrower each is than the one before."""


@dataclass(frozen=True)
class Sample:
    """A workload and what it took. seconds: of one run of all its phases.

    role: `class` rows are fitted, `alone` and `split` lie on either side of the grain of one
    core, `whole` are models.
    """

    name: str
    workload: Workload
    seconds: float
    role: str = "class"


@dataclass(frozen=True)
class Parts:
    """A sample's ops of one class, uncalibrated: (ops,) seconds of arithmetic, of memory, and
    of waking and mapping; `repeat` times each. rest: seconds of its ops of other classes."""

    compute: np.ndarray
    memory: np.ndarray
    other: np.ndarray
    staged: np.ndarray
    repeat: np.ndarray
    rest: float


def key_of(op: Op) -> str:
    """The class an op is fitted in: fp32 stands for its kind, the others have keys of their own."""
    special = class_of(op)[0]
    return op.kind if special == f"{op.kind}.fp32" else special


SIMPLE = ("pointwise", "copy", "reduce", "gather", "norm", "softmax")
"""Kinds fitted first: rows of the others hold ops of these beside their own."""


def keys(samples: Sequence[Sample]) -> list[str]:
    """All classes that samples have ops of, simple ones first."""
    rows = [s for s in samples if s.role == "class"]
    found = dict.fromkeys(key_of(o) for s in rows for p in s.workload.phases for o in p.ops)
    order = {kind: i for i, kind in enumerate(SIMPLE)}
    return sorted(found, key=lambda key: order.get(key.partition(".")[0], len(order)))


def parts(sample: Sample, key: str, machine: Machine) -> Parts:
    """What the law needs to know of a sample to fit one class of it."""
    bare = replace(machine, calibrations={})
    along = {*machine.caches, machine.memory}
    table: list[tuple[float, float, float, bool, float]] = []
    rest = 0.0
    for priced, known in zip(
        price(sample.workload, bare), price(sample.workload, machine), strict=True
    ):
        for i, op in enumerate(priced.phase.ops):
            repeat = float(priced.repeat[i])
            if key_of(op) != key:
                rest += repeat * float(known.seconds[i])
                continue
            sums = {"compute": 0.0, "memory": 0.0, "other": 0.0}
            for name, term in priced.terms.items():
                where = "compute" if name.startswith("compute.") else "memory"
                if name in (DISPATCH, caches.FAULTS) or (where == "memory" and name not in along):
                    where = "other"
                if where == "memory" and not machine.caches:
                    sums[where] = max(sums[where], float(term[i]))
                else:
                    sums[where] += float(term[i])
            staged = bool(machine.caches) and op.kind in caches.STAGED
            table.append((sums["compute"], sums["memory"], sums["other"], staged, repeat))
    columns = np.array(table, float).reshape(-1, 5).T
    return Parts(columns[0], columns[1], columns[2], columns[3] > 0, columns[4], rest)


def predicted(rows: Sequence[Parts], constants: np.ndarray) -> np.ndarray:
    """Seconds (rows, points) for points (points, 3) of compute, memory and fixed."""
    compute, memory, fixed = (constants[:, j, None] for j in range(3))
    out = np.empty((len(rows), len(constants)))
    for r, row in enumerate(rows):
        a, b = row.compute / compute, row.memory / memory
        seconds = np.where(row.staged, a + b, np.maximum(a, b)) + fixed + row.other
        out[r] = seconds @ row.repeat + row.rest
    return out


def _grid(middle: np.ndarray, width: np.ndarray, held: np.ndarray, steps: int) -> np.ndarray:
    """Points around `middle` in log space, (points, 3); a held axis is not searched."""
    axes = [
        np.array([m]) if h else m * np.exp(np.linspace(-w, w, steps))
        for m, w, h in zip(middle, width, held, strict=True)
    ]
    mesh = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    return np.column_stack([np.clip(mesh[:, :2], 1e-4, 1.0), mesh[:, 2]])


def search(rows: Sequence[Parts], measured: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Constants (3,) that fit all rows best, and those (rows, 3) that fit all but each one."""
    held = np.array([
        all(not row.compute.any() for row in rows), all(not row.memory.any() for row in rows), False
    ])  # fmt: skip
    middle = np.where(held, 1.0, [0.05, 0.05, float(measured.min()) / 30])
    width = np.array([3.0, 3.0, 3.5])

    def miss(points: np.ndarray) -> np.ndarray:
        return np.abs(np.log(predicted(rows, points) / measured[:, None]))

    def refined(best: np.ndarray, keep: np.ndarray) -> np.ndarray:
        around = width / COARSE * 2
        for _ in range(ROUNDS):
            points = _grid(best, around, held, FINE)
            best = points[int(np.argmin(keep @ miss(points)))]
            around = around * SHRINK
        return best

    points = _grid(middle, width, held, COARSE)
    coarse = miss(points)
    everything = np.ones(len(rows))
    whole = refined(points[int(np.argmin(everything @ coarse))], everything)
    left: list[np.ndarray] = []
    for keep in everything - np.eye(len(rows)):
        left.append(refined(points[int(np.argmin(keep @ coarse))], keep))
    return whole, np.stack(left)


def fit(samples: Sequence[Sample], key: str, machine: Machine, source: str, era: str
        ) -> Calibration | None:  # fmt: skip
    """The calibration of one class; None where there are too few rows of it."""
    mine = [
        s
        for s in samples
        if s.role == "class" and any(key_of(o) == key for p in s.workload.phases for o in p.ops)
    ]
    if len(mine) < LEAST_ROWS:
        return None
    rows = [parts(s, key, machine) for s in mine]
    measured = np.array([s.seconds for s in mine])
    whole, left = search(rows, measured)
    unseen = np.array([predicted([row], c[None])[0, 0] for row, c in zip(rows, left, strict=True)])
    return Calibration(
        key, float(whole[0]), float(whole[1]), float(whole[2]), n=len(mine), source=source,
        era=era, error=Error.of(unseen, measured),
    )  # fmt: skip


def wake(samples: Sequence[Sample]) -> float | None:
    """Seconds to wake all cores: what ops just above the grain took longer than just below."""
    alone = [s.seconds for s in samples if s.role == "alone"]
    split = [s.seconds for s in samples if s.role == "split"]
    if not alone:
        return None
    return float(np.median(np.array(split) - np.array(alone)))


def glue(samples: Sequence[Sample], machine: Machine) -> float:
    """Seconds a call that whole models take beyond their ops: what the interpreter does between.

    Negative where ops are quicker in a model than alone. The median over the models given.
    """
    left: list[float] = []
    for sample in samples:
        if sample.role == "whole":
            priced = price(sample.workload, machine)
            calls = sum(float(p.repeat.sum()) for p in priced)
            left.append((sample.seconds - sum(float(p.total_seconds) for p in priced)) / calls)
    return float(np.median(left)) if left else 0.0
