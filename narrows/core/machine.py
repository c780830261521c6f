"""A machine: data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from narrows.core.calibration import Calibration
from narrows.core.errors import NarrowsError, unknown
from narrows.core.resource import Kind, Link, Resource

FALLBACK: Mapping[str, tuple[str, ...]] = {
    "bf16": ("fp16", "tf32", "fp32"),
    "fp16": ("bf16", "tf32", "fp32"),
    "tf32": ("fp32",),
    "fp8": ("bf16", "fp16", "fp32"),
    "int8": ("fp8", "bf16", "fp16", "fp32"),
    "int4": ("int8", "fp8", "bf16", "fp16", "fp32"),
    "fp64": (),
    "fp32": ("fp64",),
}
"""Where a precision runs on a machine that has no unit for it: the next one that holds it."""


@dataclass(frozen=True)
class Machine:
    """Named resources, links, and how they were calibrated.

    resources: by name. Rates `compute.<precision>` (flop/s) and one `byte/s` rate for every
    memory level; levels `<memory>.capacity` (byte) and `power` (watt).
    tiers: where the tier of a tensor lives here: `device` names the main memory (a rate of
    `resources`); `host`, `drive` and others name a rate or a link.
    caches: rates of faster memories in front of the main one, smallest first; each has a
    `<name>.capacity` level. Empty where no bandwidth is published: then all is main memory.
    units: processing units that work on tiles in parallel (multiprocessors, cores), 0 unknown.
    pricer: `module:Class` for machines that no roofline describes, imported when first asked.
    """

    name: str
    title: str
    kind: str
    resources: Mapping[str, Resource]
    tiers: Mapping[str, str]
    links: Mapping[str, Link] = field(default_factory=dict[str, Link])
    caches: tuple[str, ...] = ()
    units: int = 0
    calibrations: Mapping[str, Calibration] = field(default_factory=dict[str, Calibration])
    year: int = 0
    source: str = ""
    note: str = ""
    pricer: str | None = None

    def __post_init__(self) -> None:
        if "device" not in self.tiers:
            raise NarrowsError(f"machine {self.name!r}: tiers must say where 'device' memory is")
        for tier, target in self.tiers.items():
            if target not in self.resources and target not in self.links:
                raise NarrowsError(
                    f"machine {self.name!r}: tier {tier!r} names {target!r}, "
                    "which is neither a resource nor a link of it"
                )
        for cache in self.caches:
            if cache not in self.resources or f"{cache}.capacity" not in self.resources:
                raise NarrowsError(
                    f"machine {self.name!r}: cache {cache!r} needs a rate and a '.capacity' level"
                )
        if not any(name.startswith("compute.") for name in self.resources):
            raise NarrowsError(f"machine {self.name!r}: no 'compute.<precision>' rate")

    @property
    def memory(self) -> str:
        """Name of the main memory: the rate that tier `device` stands for."""
        return self.tiers["device"]

    def compute(self, precision: str) -> Resource:
        """The flop rate that runs a precision here, the nearest one that can hold it otherwise."""
        for name in (precision, *FALLBACK.get(precision, ("fp32",))):
            found = self.resources.get(f"compute.{name}")
            if found is not None:
                return found
        have = [n.removeprefix("compute.") for n in self.resources if n.startswith("compute.")]
        raise NarrowsError(
            f"machine {self.name!r} has no unit for {precision}; it computes in {', '.join(have)}"
        )

    def bandwidth(self, name: str) -> float:
        """Bytes per second of a memory level, a tier or a link, by its name."""
        name = self.tiers.get(name, name)
        if name in self.links:
            return self.links[name].bandwidth
        found = self.resources.get(name)
        if found is None or found.kind is not Kind.RATE:
            raise unknown("memory level or link", name, [*self.resources, *self.links, *self.tiers])
        return found.capacity

    def capacity(self, name: str) -> float | None:
        """Bytes that fit into a memory level or tier, None where it is not known."""
        found = self.resources.get(f"{self.tiers.get(name, name)}.capacity")
        return None if found is None else found.capacity

    @property
    def watts(self) -> float | None:
        """Power drawn at full load, None where it is not known."""
        found = self.resources.get("power")
        return None if found is None else found.capacity

    def calibrated(self, *calibrations: Calibration) -> Machine:
        """This machine with further calibrations, which replace those of the same op class."""
        return replace(self, calibrations={**self.calibrations, **{c.op: c for c in calibrations}})
