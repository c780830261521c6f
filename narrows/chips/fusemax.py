"""FuseMax: attention on a spatial array, as a cascade of Einsums in one pass over the keys.

Narrow point: on an attention accelerator the softmax runs on a narrow row of vector units and
starves the square of multiply-add units; and what is kept of the scores grows with the sequence
until it spills to main memory.

Mechanism:
1. Attention is written as a cascade of extended Einsums; the passes over the keys follow from
   its dependencies: three for softmax as it is written, one with running maximum and sums.
2. One pass means that what must be kept does not depend on the number of keys.
3. Exponentials become six multiply-adds, so that most of the softmax can run on the square.
4. The division is left to the end: one for every output instead of one for every score.
5. The schedule interleaves chunks of keys so that both arrays are busy all the time.

Paper: Nayak, Wu, Odemuyiwa, Pellauer, Emer, Fletcher, "FuseMax: Leveraging Extended Einsums to
Optimize Attention Accelerator Design", MICRO 2024, arXiv:2406.10491.

When it hurts: short sequences leave the 1D array with the division (utilisation of the square
falls to 0.89 at 1K tokens); and heads much narrower than the array make the softmax, not the
products, the work that counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import fsum
from typing import ClassVar

from narrows.chips import _baselines, _fused
from narrows.chips._array import FLAT_ENERGY, FUSEMAX_ENERGY, SHAPES, Array, Part, Shape, shape_of
from narrows.chips._baselines import Dataflow
from narrows.chips._cascades import attention
from narrows.core.errors import NarrowsError, unknown
from narrows.core.method import Simulator

DESIGNS = ("unfused", "flat", "cascade", "arch", "binding")
"""The paper's five, each adding one idea: FLAT's array without fusion; FLAT; the one-pass cascade
on FLAT's elements; elements that can do the softmax; and the interleaved schedule (FuseMax)."""

__all__ = ["DESIGNS", "SHAPES", "Dataflow", "FuseMax", "Run", "Scenario", "Shape"]


@dataclass(frozen=True, slots=True)
class Scenario:
    """What to run: a network (one of SHAPES, or a Shape), its tokens, and a design.

    layers: what of it: `attention`, or `linear` for the products around it. flow: FLAT's
    dataflow; its own published choice where it is None.
    """

    network: str | Shape
    tokens: int
    design: str = "binding"
    layers: str = "attention"
    flow: Dataflow | None = None

    def __post_init__(self) -> None:
        if self.design not in DESIGNS:
            raise unknown("design", self.design, DESIGNS)
        if self.layers not in ("attention", "linear"):
            raise unknown("kind of layers", self.layers, ("attention", "linear"))
        if self.tokens < 1:
            raise NarrowsError(f"tokens must be at least 1, not {self.tokens}")


@dataclass(frozen=True)
class Run:
    """What one layer takes on the array.

    seconds: latency. bytes: moved to and from main memory. wide, narrow: utilisation of the 2D
    and of the 1D array, fractions. shares: of the latency, by Einsum on the 2D array. memory:
    seconds that main memory alone would take. joules: by kind (dram, buffer, registers, row,
    compute). parts: every Einsum.
    """

    seconds: float
    bytes: float
    wide: float
    narrow: float
    memory: float
    shares: Mapping[str, float]
    joules: Mapping[str, float]
    parts: Mapping[str, Part]

    @property
    def energy(self) -> float:
        """Joules altogether."""
        return fsum(self.joules.values())


class FuseMax(Simulator):
    """The array of the paper: pe x pe multiply-add units, pe vector units, one buffer.

    buffer: bytes of the global buffer; FLAT and unfused attention have twice that, for the same
    area. bandwidth: bytes per second. clock: cycles per second. batch: sequences at a time.
    exp_macs: multiply-adds of an exponential on the 2D array's units.
    """

    key: ClassVar[str] = "fusemax"
    paper: ClassVar[str] = "arXiv:2406.10491"
    relieves: ClassVar[str] = "compute"

    def __init__(
        self,
        pe: int = 256,
        buffer: int = 16 * 2**20,
        bandwidth: float = 400 * 2**30,
        clock: float = 940e6,
        batch: int = 64,
        exp_macs: int = 6,
    ) -> None:
        self.array = Array(pe, buffer, bandwidth, clock)
        self.batch = batch
        self.exp_macs = exp_macs

    def run(self, scenario: Scenario) -> Run:
        """Latency, traffic, utilisation and energy of one layer of the network."""
        shape, tokens = shape_of(scenario.network), scenario.tokens
        baseline = replace(self.array, buffer=2 * self.array.buffer)
        fused = scenario.design in ("cascade", "arch", "binding")
        array = self.array if fused else baseline
        given = (array, shape, tokens, self.batch)
        if scenario.layers == "linear":
            found = _baselines.linear_parts(*given, FUSEMAX_ENERGY)
            return self._series(found, tuple((n,) for n in found))
        if scenario.design == "unfused":
            found = _baselines.unfused_parts(*given, FLAT_ENERGY)
            return self._series(found, (("QK",), ("AV",), ("M", "SN", "SD", "A")))
        if scenario.design == "flat":
            flow = scenario.flow or _baselines.flat_choice(shape, tokens)
            found = _baselines.flat_parts(flow, *given, FLAT_ENERGY)
            return self._finish(found, self._overlapped(found))
        one_pass = attention("one_pass")
        if scenario.design == "cascade":
            found = _fused.parts(one_pass, *given, _fused.FLAT_LAYOUT, FLAT_ENERGY)
            return self._finish(found, self._overlapped(found))
        layout = replace(_fused.FUSEMAX_LAYOUT, exp_macs=self.exp_macs)
        found = _fused.parts(one_pass, *given, layout, FUSEMAX_ENERGY)
        if scenario.design == "arch":
            # A column of the square passes its maxima on one by one before the row can go on.
            wait = found["LM"].cycles * array.pe
            return self._finish(found, _fused.waterfall(found, _fused.STALLING) + wait)
        return self._finish(found, _fused.waterfall(found, _fused.BINDING))

    def _overlapped(self, found: Mapping[str, Part]) -> float:
        """Cycles when both arrays run side by side without waiting for each other."""
        return max(
            fsum(p.cycles for p in found.values() if p.wide),
            fsum(p.cycles for p in found.values() if not p.wide),
        )

    def _finish(self, found: Mapping[str, Part], cycles: float) -> Run:
        """A run whose main memory works alongside everything else."""
        moved = fsum(p.bytes for p in found.values())
        memory = moved / self.array.bandwidth
        return self._report(found, max(cycles / self.array.clock, memory), moved)

    def _series(self, found: Mapping[str, Part], groups: tuple[tuple[str, ...], ...]) -> Run:
        """A run of groups one after the other, each limited by its arithmetic or its bytes."""
        seconds = fsum(
            max(
                fsum(found[n].cycles for n in names) / self.array.clock,
                fsum(found[n].bytes for n in names) / self.array.bandwidth,
            )
            for names in groups
        )
        return self._report(found, seconds, fsum(p.bytes for p in found.values()))

    def _report(self, found: Mapping[str, Part], seconds: float, moved: float) -> Run:
        whole = seconds * self.array.clock
        shares = {n: p.cycles * p.utilised / whole for n, p in found.items() if p.wide}
        kinds = {kind for p in found.values() for kind in p.joules}
        return Run(
            seconds,
            moved,
            fsum(shares.values()),
            fsum(p.cycles for p in found.values() if not p.wide) / whole,
            moved / self.array.bandwidth,
            shares,
            {k: fsum(p.joules.get(k, 0.0) for p in found.values()) for k in sorted(kinds)},
            found,
        )
