"""What a loop nest moves between the levels of a spatial array.

The accounting is Timeloop's (Parashar et al. 2019, section V): a tile stays where it is while
only ranks it does not vary along are iterated directly outside of it, and is moved anew
otherwise; an operand that several processing elements need is read once (multicast), and what
they add up is written once (spatial reduction).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

LEVELS = ("dram", "buffer", "row", "pe")
"""Outermost first: main memory, the global buffer, the registers of the 1D array that feed the
columns of the 2D one, and the registers of a single processing element."""

Loops = Mapping[str, int]
"""Factor of every rank at one level, innermost first."""


@dataclass(frozen=True, slots=True)
class Moves:
    """Words at one level for one tensor: read for the level inside, written by the level outside
    (fills) and by the level inside (updates). At `pe` they are those of one processing element."""

    reads: int = 0
    fills: int = 0
    updates: int = 0


@dataclass(frozen=True)
class Nest:
    """Temporal loops of every level, innermost first, and the ranks spread over the array.

    An absent level has no loops.
    """

    temporal: Mapping[str, Loops]
    spatial: Loops

    @property
    def cycles(self) -> int:
        """Steps of the nest, one for every point of its temporal loops."""
        return prod(f for loops in self.temporal.values() for f in loops.values())

    @property
    def elements(self) -> int:
        """Processing elements that work at the same time."""
        return prod(self.spatial.values())

    @property
    def points(self) -> int:
        """Points of the iteration space."""
        return self.cycles * self.elements

    def _outside(self, level: int) -> list[tuple[str, int]]:
        """Loops outside of a level's tile, innermost first."""
        inward = reversed(LEVELS[:level])
        return [item for name in inward for item in self.temporal.get(name, {}).items()]

    def _rounds(self, ranks: Sequence[str], level: int) -> int:
        """How often a tile at a level is moved anew."""
        loops = self._outside(level)
        while loops and (loops[0][1] == 1 or loops[0][0] not in ranks):
            loops.pop(0)
        return prod(f for _, f in loops)

    def _words(self, ranks: Sequence[str], level: int, whole: bool) -> int:
        """Words of a tensor in a tile at a level; of all processing elements when `whole`."""
        inside = [(r, f) for n in LEVELS[level:] for r, f in self.temporal.get(n, {}).items()]
        if whole:
            inside += self.spatial.items()
        return prod(f for r, f in inside if r in ranks)

    def moves(self, ranks: Sequence[str], keep: Sequence[str], output: bool) -> dict[str, Moves]:
        """Words moved at every level that keeps a tensor.

        ranks: those it varies along. keep: levels that hold it, outermost first. output: whether
        it is written (partial sums come back, the first time they need not).
        """
        found: dict[str, Moves] = {}
        returned = 0
        for i, name in enumerate(keep):
            inner = LEVELS.index(keep[i + 1]) if i + 1 < len(keep) else None
            whole = name != "pe"
            if inner is None:
                sent = self.cycles * (self._words(ranks, len(LEVELS), whole))
            else:
                sent = self._rounds(ranks, inner) * self._words(ranks, inner, whole)
            here = LEVELS.index(name)
            if output:
                partition = self._words(ranks, 0, whole)
                found[name] = Moves(sent - partition, returned, sent)
                returned = sent - partition
            else:
                outer = next((n for n in reversed(keep[:i])), None)
                fills = 0
                if outer is not None:
                    fills = self._rounds(ranks, here) * self._words(ranks, here, whole)
                found[name] = Moves(sent, fills, 0)
        return found
