"""A hierarchy of set-associative caches, played address by address: what is to be recovered.

Each level keeps the least recently used lines out (LRU). A load asks the levels in turn and fills
all that missed; levels are neither inclusive nor exclusive. It costs the latency of the level
that answers, so that the mean over a lap is exact, not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from narrows.core.errors import NarrowsError


@dataclass(frozen=True, slots=True)
class CacheLevel:
    """One cache. size, line: bytes. ways: lines a set holds. latency: cycles of a load."""

    size: int
    ways: int
    line: int
    latency: float

    def __post_init__(self) -> None:
        if min(self.size, self.ways, self.line) < 1 or self.size % (self.ways * self.line):
            raise NarrowsError(
                f"a cache of {self.size} bytes cannot be cut into sets of {self.ways} lines of "
                f"{self.line} bytes; size must be a multiple of ways x line"
            )

    @property
    def sets(self) -> int:
        """Number of sets."""
        return self.size // (self.ways * self.line)


class CacheSimulator:
    """A probe (see _cache_inference) whose parameters are known.

    levels: nearest first, one line size. memory: cycles of a load that no level holds.
    """

    granule = 8

    def __init__(self, levels: tuple[CacheLevel, ...], memory: float) -> None:
        if not levels:
            raise NarrowsError("a simulated hierarchy needs at least one cache")
        if len({level.line for level in levels}) > 1:
            raise NarrowsError("a simulated hierarchy has one line size: that of every level")
        costs = [level.latency for level in levels] + [memory]
        if sorted(set(costs)) != costs:
            raise NarrowsError(f"latencies must rise from level to level, not {costs}")
        self.levels = levels
        self.memory = memory

    def latency(self, offsets: np.ndarray) -> float:
        """Mean cycles of a load when `offsets` (bytes) are visited in turn, lap after lap.

        The laps before the last one only fill the caches: first touches do not count. Under LRU
        a cyclic visit is steady after as many laps as there are levels.
        """
        state: list[dict[int, dict[int, None]]] = [{} for _ in self.levels]
        visited = [int(x) for x in offsets]
        total = 0.0
        for _ in range(len(self.levels) + 1):
            total = sum(self._load(address, state) for address in visited)
        return total / len(visited)

    def _load(self, address: int, state: list[dict[int, dict[int, None]]]) -> float:
        cost, found = self.memory, False
        for level, sets in zip(self.levels, state, strict=True):
            line = address // level.line
            held = sets.setdefault(line % level.sets, {})
            if line in held:
                del held[line]  # put back below as the most recent one
                cost, found = level.latency, True
            elif len(held) == level.ways:
                del held[next(iter(held))]
            held[line] = None
            if found:
                break
        return cost
