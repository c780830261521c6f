"""Constants fitted to measured profiles, and how far predictions are from measured rows.

Rows are priced by `core.price`, the function that `bound` uses, so what is fitted is what is used
and what is validated. At most three constants an op class are fitted (see core.law), to the
median-like mean of |log(predicted / measured)|, which a few odd rows do not sway; a time that was
rounded to a large part of itself counts less. Part of the shapes is kept away from the fit, and
the error of a calibration is that on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from narrows.core import law
from narrows.core.calibration import Calibration, Error
from narrows.core.errors import NarrowsError
from narrows.core.machine import Machine
from narrows.core.price import TRAFFIC, calibration_of, class_of, price
from narrows.core.tensor import Codec, Tensor
from narrows.core.workload import Op, Phase, Use, Workload
from narrows.measure.layouts.rows import Rows
from narrows.measure.profiles import Profile, Refused

Progress = Callable[[float, str], None]

LEAST_SHAPES = 8
"""Different shapes an op class needs before three constants are fitted to it."""

MOST_ROWS = 6000
"""More rows than this do not move three constants; a part drawn with the seed is fitted."""

ROUNDING = 0.05
"""Relative rounding of a measured time at which its row counts half in a fit."""

WORTH = 0.9
"""Tiles are taken where they bring the misfit below this share of the plain law's."""

HALF_WIDTH = frozenset({"fp16", "bf16"})
"""Precisions that run at one rate on all machines, and are one op class."""

TILES: Mapping[str, tuple[tuple[tuple[int, int], ...], ...]] = {
    "matmul": (law.GEMM_TILES,),
    "attention_prefill": tuple((tile,) for tile in law.FLASH_TILES),
    "attention_decode": (law.DECODE_TILES,),
}
"""Sets of tiles to choose from, by op class."""


def op_of(rows: Rows) -> Op:
    """The op that rows of one class are runs of; its figures are columns over the rows."""
    kind, precision = str(rows.kind[0]), str(rows.precision[0])
    return Op(
        str(rows.item[0]) or kind, kind, (Use("moved"),), flops=rows.flops, precision=precision,
        shape=rows.shape(),
    )  # fmt: skip


def workload(rows: Rows) -> Workload:
    """Rows that are priced alike as one op, every row a case."""
    moved = Tensor("moved", "activation", {"byte": rows.bytes}, Codec.of("int8"))
    return Workload("profile", {"moved": moved}, (Phase("measured", (op_of(rows),)),))


def alike(rows: Rows) -> list[np.ndarray]:
    """Indices of the rows that are priced alike: one kind, precision, name and set of sizes."""
    vector = (rows.kind == "matmul") & (rows.m <= 1)
    shaped = (rows.m > 0) & (rows.n > 0) & (rows.k > 0)
    words = (rows.kind, rows.precision, rows.item, vector, shaped)
    codes = [np.unique(w.astype(str), return_inverse=True)[1].reshape(-1) for w in words]
    _, group = np.unique(np.stack(codes, axis=1), axis=0, return_inverse=True)
    group = group.reshape(-1)
    return [np.flatnonzero(group == g) for g in range(int(group.max(initial=-1)) + 1)]


def class_name(op: Op) -> str:
    """Name of the calibration that measured rows of an op are fitted to."""
    function = f"{op.kind}.{op.precision}.function"
    if function in class_of(op):
        return function
    whole = op.precision in HALF_WIDTH or op.kind in TRAFFIC
    return op.kind if whole else f"{op.kind}.{op.precision}"


def class_names(rows: Rows) -> np.ndarray:
    """The class of every row."""
    names = np.full(len(rows), "", object)
    for mine in alike(rows):
        names[mine] = class_name(op_of(rows.take(mine[:1])))
    return names


def predicted(rows: Rows, machine: Machine) -> np.ndarray:
    """Seconds that the machine is predicted to take for every row."""
    seconds = np.zeros(len(rows))
    for mine in alike(rows):
        found = price(workload(rows.take(mine)), machine)[0].seconds[0]
        seconds[mine] = np.broadcast_to(found, (len(mine),))
    return seconds


def _free(kind: str, tiled: bool, rows: Rows) -> tuple[str, ...]:
    """The constants that act on a class, three at most."""
    if kind in TRAFFIC:
        return ("memory", "fixed", "step") if len(np.unique(rows.peers)) > 1 else (
            "memory", "fixed")  # fmt: skip
    if kind == "attention_prefill" and tiled:
        return ("compute", "fixed", "step")
    if kind == "attention_decode":
        return ("memory", "fixed", "step") if tiled else ("memory", "fixed")
    work = (("compute", rows.flops), ("memory", rows.bytes))
    return (*(name for name, amount in work if (amount > 0).any()), "fixed")


@dataclass
class _Fit:
    """The search of one op class with one set of tiles; constants on unbounded scales."""

    start: Calibration
    free: tuple[str, ...]
    rows: Rows
    machine: Machine

    def __post_init__(self) -> None:
        self.parts = [(i, workload(self.rows.take(i))) for i in alike(self.rows)]
        self.least = float(np.min(self.rows.seconds))
        weight = 1.0 / (1.0 + self.rows.resolution / self.rows.seconds / ROUNDING)
        self.weight = weight / weight.mean()

    def constants(self, x: np.ndarray) -> Calibration:
        """Rates in (0, 1) by the logistic function, seconds by the exponential."""
        values = {
            name: float(1 / (1 + np.exp(-v))) if name in ("compute", "memory") else float(np.exp(v))
            for name, v in zip(self.free, x, strict=True)
        }
        rates = {n: min(max(v, 1e-6), 1.0) for n, v in values.items() if n in ("compute", "memory")}
        return replace(self.start, **{**values, **rates})

    def misfit(self, x: np.ndarray) -> np.ndarray:
        """Weighted log(predicted / measured) of every row."""
        return self.misfit_of(self.constants(x))

    def misfit_of(self, calibration: Calibration) -> np.ndarray:
        """Weighted log(predicted / measured) of every row."""
        machine = replace(self.machine, calibrations={self.start.op: calibration})
        seconds = np.zeros(len(self.rows))
        for mine, work in self.parts:
            seconds[mine] = price(work, machine)[0].seconds[0]
        return self.weight * np.log(seconds / self.rows.seconds)

    def run(self) -> tuple[float, Calibration]:
        """Mean of |misfit| and the constants that bring it about, from several starts."""
        from scipy.optimize import least_squares, minimize

        best: tuple[float, np.ndarray] | None = None
        for rate, share in ((1.0, 0.5), (2.0, 0.1)):
            scale = {"compute": rate, "memory": rate + 0.5, "fixed": np.log(self.least * share),
                     "step": np.log(self.least * share / 5)}  # fmt: skip
            x = np.array([scale[name] for name in self.free])
            low = np.array([-9.0 if n in ("compute", "memory") else -30.0 for n in self.free])
            high = np.array([12.0 if n in ("compute", "memory") else 7.0 for n in self.free])
            found = least_squares(
                self.misfit, x, bounds=(low, high), loss="soft_l1", f_scale=0.05, max_nfev=40
            )
            loss = float(np.abs(found.fun).mean())
            if best is None or loss < best[0]:
                best = loss, found.x
        assert best is not None
        polished = minimize(
            lambda x: float(np.abs(self.misfit(x)).mean()), best[1], method="Nelder-Mead",
            options={"maxfev": 250, "xatol": 1e-3, "fatol": 1e-6},
        )  # fmt: skip
        loss, x = min(best, (float(polished.fun), polished.x), key=lambda found: found[0])
        return loss, self._cleaned(self.constants(x), loss)

    def _cleaned(self, found: Calibration, loss: float) -> Calibration:
        """Constants that do not act at their neutral value; figures no finer than they are."""
        for name in self.free:
            neutral = replace(found, **{name: 1.0 if name in ("compute", "memory") else 0.0})
            if float(np.abs(self.misfit_of(neutral)).mean()) <= loss + 1e-6:
                found = neutral
        return replace(found, **{n: float(f"{getattr(found, n):.4g}") for n in self.free})


def _fit_class(name: str, rows: Rows, machine: Machine, seed: int, tiled: bool) -> Calibration:
    kind = str(rows.kind[0])
    shapes = len(np.unique(rows.same()))
    if shapes < LEAST_SHAPES:
        raise NarrowsError(
            f"op class {name!r} has {shapes} different shapes to fit to, and {LEAST_SHAPES} are "
            "needed; measure more of it or leave its rows out"
        )
    if len(rows) > MOST_ROWS:
        rows = rows.take(np.sort(np.random.default_rng(seed).permutation(len(rows))[:MOST_ROWS]))
    plain = _Fit(Calibration(name), _free(kind, False, rows), rows, machine).run()
    best, least = plain, plain[0] * WORTH
    for tiles in TILES.get(kind, ()) if tiled and machine.units else ():
        start = Calibration(name, tiles=tiles)
        found = _Fit(start, _free(kind, True, rows), rows, machine).run()
        if found[0] < least:
            best, least = found, found[0]
    return best[1]


def split(rows: Rows, share: float, seed: int) -> np.ndarray:
    """Mask of the rows to fit on: `share` of the different shapes of every op class.

    Rows of one shape are all on one side.
    """
    if not 0.0 < share <= 1.0:
        raise NarrowsError(f"the share to fit on must lie in (0, 1], not {share!r}")
    chosen = np.zeros(len(rows), bool)
    for kind in np.unique(rows.kind.astype(str)):
        mine = np.flatnonzero(rows.kind == kind)
        shape = rows.take(mine).same()
        count = int(shape.max()) + 1
        take = np.random.default_rng(seed).permutation(count)[: max(1, round(share * count))]
        chosen[mine] = np.isin(shape, take)
    return chosen


def fit(
    profile: Profile, machine: Machine, *, share: float = 0.8, seed: int = 0,
    unseen: Profile | None = None, era: str = "", tiled: bool = True,
    progress: Progress | None = None,
) -> Machine:  # fmt: skip
    """The machine calibrated to a profile, one calibration an op class it has rows of.

    share: of the different shapes that are fitted on; the error of a calibration is that on the
    rest, or on `unseen` where given (rows of other models, say). era: of which time the kernels
    are. tiled: whether the law of tiles and waves may be chosen. Raises NarrowsError for a class
    with too few shapes, and where scipy is not installed.
    """
    try:
        import scipy.optimize  # noqa: F401
    except ImportError:
        raise NarrowsError("calibrating needs scipy: pip install 'narrows[fit]'") from None
    rows = profile.rows
    chosen = split(rows, share, seed)
    names = class_names(rows)
    wanted = list(dict.fromkeys(names.tolist()))
    other = (unseen or profile).rows
    theirs = names if unseen is None else class_names(other)
    for i, name in enumerate(wanted):
        if progress:
            progress(i / len(wanted), f"fitting {name}")
        fitted = rows.take(chosen & (names == name))
        found = _fit_class(name, fitted, machine, seed, tiled)
        found = replace(found, n=len(fitted), source=profile.source, era=era)
        machine = machine.calibrated(found)
        rest = other.take((theirs == name) & (~chosen if unseen is None else True))
        if len(rest):
            found = replace(found, error=_short(Error.of(predicted(rest, machine), rest.seconds)))
            machine = machine.calibrated(found)
        for twin in _twins(name, wanted):
            machine = machine.calibrated(replace(found, op=twin))
    if progress:
        progress(1.0, "fitted")
    return machine


def _short(error: Error) -> Error:
    median, mean, p90 = (float(f"{v:.3g}") for v in (error.median, error.mean, error.p90))
    return Error(median, mean, p90, error.n)


def _twins(name: str, fitted: list[str]) -> list[str]:
    """The same class in the other 16-bit precision, unless it is fitted itself."""
    parts = name.split(".")
    if len(parts) < 3 or parts[1] not in HALF_WIDTH:
        return []
    others = (".".join([parts[0], p, *parts[2:]]) for p in sorted(HALF_WIDTH - {parts[1]}))
    return [twin for twin in others if twin not in fitted]


@dataclass(frozen=True, slots=True)
class Check:
    """Predictions beside measured rows of one op class, or of all.

    error: of the machine as it is. naive: of its datasheet rates alone. bias: median of
    predicted / measured - 1. calibrated: whether a calibration was used.
    """

    name: str
    error: Error
    naive: Error
    bias: float
    calibrated: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain figures, errors as fractions."""
        return {
            "n": self.error.n, "median_ape": self.error.median, "mean_ape": self.error.mean,
            "p90_ape": self.error.p90, "bias": self.bias, "calibrated": self.calibrated,
            "naive": {"median_ape": self.naive.median, "mean_ape": self.naive.mean,
                      "p90_ape": self.naive.p90},
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Validation:
    """How far a machine's predictions are from a profile."""

    machine: str
    files: tuple[str, ...]
    total: Check
    classes: tuple[Check, ...]
    refused: tuple[Refused, ...]

    def as_dict(self) -> dict[str, Any]:
        """`n, median_ape, mean_ape, p90_ape, refused[]`, the datasheet's errors, and by class."""
        return {
            "machine": self.machine, "files": list(self.files), **self.total.as_dict(),
            "by_class": {c.name: c.as_dict() for c in self.classes},
            "refused": [{"file": r.file, "row": r.row, "reason": r.reason} for r in self.refused],
        }  # fmt: skip


def validate(profile: Profile, machine: Machine) -> Validation:
    """Errors of the machine's predictions on a profile, with those of its datasheet beside."""
    rows = profile.rows
    ours, naive = predicted(rows, machine), predicted(rows, replace(machine, calibrations={}))

    def check(name: str, mine: np.ndarray) -> Check:
        measured = rows.seconds[mine]
        known = calibration_of(op_of(rows.take(mine[:1])), machine) is not None
        bias = float(np.median(ours[mine] / measured - 1))
        ape, datasheet = Error.of(ours[mine], measured), Error.of(naive[mine], measured)
        return Check(name, ape, datasheet, bias, known)

    names = class_names(rows)
    parts = tuple(check(str(n), np.flatnonzero(names == n)) for n in dict.fromkeys(names.tolist()))
    whole = check("all", np.arange(len(rows)))
    total = replace(whole, calibrated=all(p.calibrated for p in parts))
    return Validation(machine.name, profile.files, total, parts, profile.refused)
