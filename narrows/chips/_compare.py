"""A measured machine beside a catalogue's. What was not measured is never printed as such."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from narrows.core.errors import NarrowsError
from narrows.core.machine import Machine
from narrows.core.method import Reading

MEASURED = "measured"
"""How the source of every figure begins that was measured."""


@dataclass(frozen=True)
class Dissection:
    """A machine and the readings it is made of. refused: what was not published, and why."""

    machine: Machine
    readings: Mapping[str, Reading]
    refused: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Comparison:
    """One resource both machines have. ratio: measured over catalogue."""

    name: str
    unit: str
    measured: float
    catalogue: float
    method: str

    @property
    def ratio(self) -> float:
        """Fraction of the catalogue's figure that was reached."""
        return self.measured / self.catalogue

    def __str__(self) -> str:
        return (
            f"{self.name}: measured {self.measured:.3g} {self.unit}, {self.ratio:.3g} of the "
            f"catalogue's {self.catalogue:.3g} ({self.method})"
        )


def compare(machine: Machine, catalogue: Machine) -> tuple[Comparison, ...]:
    """Measured over published, for each resource whose measurement the machine vouches for.

    Main memories are held against each other whatever they are called. Raises NarrowsError where
    nothing of `machine` was measured, or `catalogue` is itself a measurement.
    """
    if any(r.source.startswith(MEASURED) for r in catalogue.resources.values()):
        raise NarrowsError(f"machine {catalogue.name!r} is measured: compare with a published one")
    rows: list[Comparison] = []
    for name, mine in machine.resources.items():
        theirs = catalogue.resources.get(catalogue.memory if name == machine.memory else name)
        if theirs is None or not mine.source.startswith(MEASURED):
            continue
        if {mine.unit, theirs.unit} - {"flop/s", "op/s"} and mine.unit != theirs.unit:
            raise NarrowsError(f"{name}: {mine.unit} cannot be held against {theirs.unit}")
        rows.append(Comparison(name, mine.unit, mine.capacity, theirs.capacity, mine.source))
    if not rows:
        raise NarrowsError(
            f"machine {machine.name!r} has no measured figure that {catalogue.name!r} publishes; "
            "measure one with Hopper().dissect()"
        )
    return tuple(rows)
