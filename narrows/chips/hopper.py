"""Dissecting a chip: what its memory levels, arithmetic units and copy engines really deliver.

Narrow point: none of its own; it finds the true capacities that every bound rests on, which
datasheets round, leave out (latencies, caches) or promise for conditions nobody runs.

Mechanism:
1. Latency: each load's address is the value loaded before it, in random order over a footprint;
   sweeps of footprint and stride give sizes, lines and ways of caches (P-chase).
2. Throughput of each level by reads over a footprint that fits it, or fits nothing.
3. Products in every precision, random operands, from small sides to large: where FP8 pays.
4. Minimum-plus, the operation of dynamic programming, is a resource of its own (DPX).
5. A reading is an interval with its method; repeats that disagree are refused, not averaged.

Paper: Luo, Fan, Li, Du, Wang, Chu, "Benchmarking and Dissecting the Nvidia Hopper GPU
Architecture", IPDPS 2024, arXiv:2402.13499.

When it hurts: on a shared machine it refuses more than it publishes. Single instructions (wgmma
shapes, TMA, distributed shared memory) need hand-written PTX and are not read here: a product
says what the library made of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, ClassVar

from narrows.chips import _cpu_probes, _quantities
from narrows.chips._cache_inference import Found, Probe, dissect
from narrows.chips._cache_simulator import CacheLevel, CacheSimulator
from narrows.chips._compare import MEASURED, Comparison, Dissection, compare
from narrows.chips._settle import LIMIT, NoisyRun
from narrows.core.errors import NarrowsError, unknown
from narrows.core.machine import Machine
from narrows.core.method import Instrument, Reading
from narrows.core.resource import Kind, Resource
from narrows.measure import probes

BACKENDS = ("cuda", "cpu")

__all__ = [
    "CacheLevel", "CacheSimulator", "Comparison", "Dissection", "Found", "Hopper", "NoisyRun",
    "Probe", "compare",
]  # fmt: skip


class Hopper(Instrument):
    """Reads a chip by micro-benchmarks.

    backend: `cuda`, the paper's, or `cpu` for the same questions to this processor. repeats: runs
    that must agree. rounds: samples of each. limit: fraction by which the medians of repeats may
    differ before a reading is refused.
    """

    key: ClassVar[str] = "hopper"
    paper: ClassVar[str] = "arXiv:2402.13499"
    relieves: ClassVar[str] = "compute"

    def __init__(
        self, backend: str = "cuda", repeats: int = 3, rounds: int = 5, limit: float = LIMIT
    ) -> None:
        if backend not in BACKENDS:
            raise unknown("backend", backend, BACKENDS)
        if repeats < 2 or rounds < 1:
            raise NarrowsError("hopper: at least two repeats, which must agree, and one round each")
        if not 0 < limit < 1:
            raise NarrowsError(f"hopper: limit is a fraction between 0 and 1, not {limit!r}")
        self.backend = backend
        self.repeats = repeats
        self.rounds = rounds
        self.limit = limit

    @property
    def quantities(self) -> tuple[str, ...]:
        """Names that `measure` takes: `latency.l2`, `read.hbm`, `compute.fp8`, `copy.h2d`, ..."""
        return _quantities.names(self.backend)

    def measure(self, target: str | Probe) -> Reading:
        """A quantity by its name; or a probe's nearest latency, with all levels in `facts`.

        Raises NoisyRun where repeats disagree by more than `limit`, NarrowsError where there is
        no such GPU, unit or library.
        """
        if isinstance(target, str):
            return _quantities.read(self.backend, target, self.repeats, self.rounds, self.limit)
        found = self.levels(target)
        nearest = found[0].latency
        facts: dict[str, Any] = {"method": "P-chase", "levels": tuple(asdict(f) for f in found)}
        return Reading(nearest, "cycle", (nearest, nearest), None, facts)

    def levels(
        self, probe: Probe, smallest: int = 1024, largest: int = 1 << 18, stride: int = 0,
        tolerance: float = 1e-9,
    ) -> tuple[Found, ...]:  # fmt: skip
        """Size, latency, line and ways of each level that a probe shows between two footprints.

        stride: bytes of a line, looked for where 0. tolerance: noise of latencies, a fraction.
        """
        return dissect(probe, smallest, largest, stride, tolerance)

    def sweep(self, op: str, sizes: Iterable[int]) -> list[tuple[int, Reading]]:
        """One operation (`latency`, `read`, `compute.bf16`, ...) over footprints or sides."""
        return [
            (size, _quantities.at(self.backend, op, size, self.repeats, self.rounds, self.limit))
            for size in sizes
        ]

    def dissect(self, quantities: Iterable[str] = ()) -> Dissection:
        """All quantities (or those named, with the rate of main memory and fp32), as a machine.

        What is refused as noise, or does not exist here, is told with its reason. Raises NoisyRun
        where main memory or every product is among it: that would be no machine.
        """
        memory = _cpu_probes.MAIN if self.backend == "cpu" else "hbm"
        needed = (f"read.{memory}", "compute.fp32")
        wanted = list(dict.fromkeys([*needed, *quantities] if quantities else self.quantities))
        readings: dict[str, Reading] = {}
        refused: dict[str, str] = {}
        for name in wanted:
            try:
                readings[name] = self.measure(name)
            except NarrowsError as error:
                refused[name] = str(error)
        missing = [name for name in needed if name not in readings]
        if missing:
            raise NoisyRun(f"no machine without {missing[0]}: {refused[missing[0]]}")
        return Dissection(self._machine(readings, memory), readings, refused)

    def _machine(self, readings: dict[str, Reading], memory: str) -> Machine:
        now = f"{datetime.now(UTC):%Y-%m-%dT%H:%MZ}"
        resources: dict[str, Resource] = {}
        for name, reading in readings.items():
            what, _, of = name.partition(".")
            low, high = reading.interval
            value, source = reading.value, f"{reading.facts['method']}"
            unit, kind = reading.unit, Kind.RATE
            if what == "read":
                name = of
            elif what == "size":
                name, kind = f"{of}.capacity", Kind.LEVEL
            elif what in ("latency", "crossover"):
                continue  # neither a rate nor a level: it stays among the readings
            told = f"{MEASURED} {now}: {low:.4g} to {high:.4g} {unit}, {source}"
            resources[name] = Resource(name, kind, value, unit, told)
        caches: tuple[str, ...] = ()
        title = probes.processor()
        if self.backend == "cpu":
            for cache in probes.caches(1):
                if cache.name in resources:
                    name = f"{cache.name}.capacity"
                    told = "listed by the system, not measured"
                    resources[name] = Resource(name, Kind.LEVEL, float(cache.size), "byte", told)
        else:
            import torch

            title = torch.cuda.get_device_name()
        caches = tuple(
            n for n in ("l1", "l2", "l3") if n in resources and f"{n}.capacity" in resources
        )
        return Machine(
            name="dissected", title=title, kind="cpu" if self.backend == "cpu" else "gpu",
            resources=resources, tiers={"device": memory}, caches=caches, units=0,
            year=datetime.now(UTC).year, source=f"{MEASURED} {now}",
        )  # fmt: skip
