"""What a roofline shows: a mark for each op class, a roof for each rate, the axes around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from narrows.core.bound import Bound, Row
from narrows.core.calibration import Calibration
from narrows.core.machine import Machine
from narrows.report import units, words


@dataclass(frozen=True, slots=True)
class Point:
    """One op class of one phase. flops, bytes, seconds: of all steps of the phase."""

    phase: str
    op: str
    flops: float
    bytes: float
    seconds: float
    narrowest: str

    @property
    def intensity(self) -> float:
        """Operations for each byte moved; 0 for pure movement, infinite for pure arithmetic."""
        return self.flops / self.bytes if self.bytes else inf

    @property
    def speed(self) -> float:
        """Operations a second."""
        return self.flops / self.seconds if self.seconds else 0.0


def points(bound: Bound) -> list[Point]:
    """Every op class of every phase, in order."""
    found: list[Point] = []
    for phase in bound.phases:
        for op in dict.fromkeys(row.op for row in phase.rows):
            rows = [row for row in phase.rows if row.op == op]
            found.append(
                Point(
                    phase.name, op,
                    sum(r.need for r in rows if r.unit == "flop"),
                    sum(r.need for r in rows if r.unit == "byte"),
                    sum(r.seconds for r in rows),
                    max(rows, key=lambda r: r.seconds).resource,
                )
            )  # fmt: skip
    return found


@dataclass(frozen=True, slots=True)
class Roof:
    """A line no run can cross: `flat` at operations a second, else bytes a second as a slope.

    used: whether the case spends seconds under it, or a hundredth of its work on it.
    """

    name: str
    rate: float
    flat: bool
    used: bool


def _rows(bound: Bound) -> list[Row]:
    return [row for phase in bound.phases for row in phase.rows]


def _used(rows: Sequence[Row]) -> set[str]:
    """Resources that some seconds hang on, or that carry a hundredth of all work of their kind."""
    total: dict[str, float] = {}
    for row in rows:
        total[row.unit] = total.get(row.unit, 0.0) + row.need
    need: dict[tuple[str, str], float] = {}
    for row in rows:
        key = (row.resource, row.unit)
        need[key] = need.get(key, 0.0) + row.need
    heavy = {name for (name, unit), value in need.items() if value >= 0.01 * total[unit]}
    return heavy | {row.resource for row in rows if row.seconds > 0}


def roofs(machine: Machine, bound: Bound) -> list[Roof]:
    """Compute roofs by precision (equal ones as one), then memories, caches and links in use."""
    rows = _rows(bound)
    used = _used(rows)
    found: list[Roof] = []
    for name, held in machine.resources.items():
        if not name.startswith("compute."):
            continue
        label, mine = name.removeprefix("compute."), name in used
        twin = next((r for r in found if abs(r.rate / held.capacity - 1) < 0.02), None)
        if twin is not None:
            found.remove(twin)
            label, mine = f"{twin.name}, {label}", mine or twin.used
        found.append(Roof(label, held.capacity, True, mine))
    paths = [*machine.caches, machine.memory, *(r.resource for r in rows if r.unit == "byte")]
    slopes = [Roof(n, machine.bandwidth(n), False, n in used) for n in dict.fromkeys(paths)]
    return [*found, *slopes]


def calibrated(machine: Machine, bound: Bound) -> tuple[list[Roof], str]:
    """The used compute rate and the main memory as they were measured to be reached, in words.

    Each op class has constants of its own; shown are the best of the op class that spends most
    seconds under the roof. Empty without calibration.
    """
    found: list[Roof] = []
    told: list[str] = []
    for flat in (True, False):
        seconds: dict[tuple[str, str], float] = {}
        have: dict[str, float] = {}
        for row in _rows(bound):
            mine = row.resource.startswith("compute.") if flat else row.resource == machine.memory
            if mine and _constants(machine, row.op, row.resource):
                key = (row.op, row.resource)
                seconds[key] = seconds.get(key, 0.0) + row.seconds
                have[row.resource] = row.have
        if not seconds or max(seconds.values()) <= 0:
            continue
        op, name = max(seconds, key=lambda key: (seconds[key], key))
        known = _constants(machine, op, name)
        part = max(c.compute if flat else c.memory for c in known)
        found.append(Roof(name, have[name] * part, flat, True))
        told.append(f"{words.op(op)} reaches {units.percent(part)} of {words.short(name)}")
    return found, ", ".join(told)


def _constants(machine: Machine, op: str, resource: str) -> list[Calibration]:
    """Calibrations that an op class may have run by: of the precision, where that is known."""
    stem, _, precision = resource.partition(".")
    start = f"{op}.{precision}" if stem == "compute" else f"{op}."
    special = [c for name, c in machine.calibrations.items() if name.startswith(start)]
    plain = machine.calibrations.get(op)
    return special or ([plain] if plain is not None else [])


@dataclass(frozen=True, slots=True)
class Frame:
    """Limits of the axes: operations a byte, operations a second."""

    left: float
    right: float
    bottom: float
    top: float

    def place(self, mark: Point) -> tuple[float, float]:
        """Where a mark is drawn: at its place, or on the edge where a logarithm has none."""
        x = min(max(mark.intensity, self.left * 1.35), self.right / 1.35)
        y = min(max(mark.speed, self.bottom * 1.35), self.top)
        return x, y


def frame(marks: Sequence[Point], lines: Sequence[Roof]) -> Frame:
    """Axes that hold every mark, and the ridge of the roofs that are used."""
    flat = [r.rate for r in lines if r.flat and r.used] or [r.rate for r in lines if r.flat]
    slopes = [r.rate for r in lines if not r.flat]
    ridge = max(flat) / min([r.rate for r in lines if not r.flat and r.used] or slopes)
    xs = [p.intensity for p in marks if 0 < p.intensity < inf]
    ys = [p.speed for p in marks if p.speed > 0]
    left = min([*xs, ridge / 30]) / 2.2
    right = max([*xs, ridge]) * 6
    # Room below for the marks that have no arithmetic, above for the legend.
    return Frame(left, right, min([*ys, max(flat) / 1e3]) / 5, max(flat) * 3)
