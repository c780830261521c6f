"""A fast memory of so many words, enforced: the only way to the numbers of a slow one.

Programs load tiles, compute on them and store them; every word that passes is counted, a tile
that no longer fits raises, and a tile that was given back holds only NaN. The operands and the
result of a single multiply-add are registers and are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from narrows.core.errors import NarrowsError

Array = np.ndarray[Any, np.dtype[np.float64]]
Where = tuple[slice | int, ...]


class CapacityExceeded(NarrowsError):  # noqa: N818 - what happened, in one word
    """More words than the fast memory holds."""


class Tile:
    """A tile of the fast memory while its `with` block lasts; NaN afterwards."""

    __slots__ = ("_array", "_loaded", "_memory")

    def __init__(self, memory: TwoLevelMemory, array: Array, loaded: bool = False) -> None:
        self._memory = memory
        self._array = array
        self._loaded = loaded

    def __enter__(self) -> Array:
        self._memory.take(self._array.size)
        if self._loaded:
            self._memory.loads += self._array.size
        return self._array

    def __exit__(self, *_: object) -> None:
        self._memory.take(-self._array.size)
        self._array.fill(np.nan)


class TwoLevelMemory:
    """capacity: words of the fast memory. slow: arrays by name; outputs are there already, zero.

    loads, stores: words moved so far. peak: most words that were resident at once.
    """

    def __init__(self, capacity: int, slow: Mapping[str, Array]) -> None:
        self.capacity = capacity
        self._slow = dict(slow)
        self.resident = self.peak = self.loads = self.stores = 0

    @property
    def words(self) -> int:
        """Words moved either way."""
        return self.loads + self.stores

    def take(self, words: int) -> None:
        """Occupy words (give them back, where negative); raises where they do not fit."""
        if self.resident + words > self.capacity:
            raise CapacityExceeded(
                f"{words} more words do not fit: {self.resident} of {self.capacity} are in use"
            )
        self.resident += words
        self.peak = max(self.peak, self.resident)

    def space(self, *shape: int) -> Tile:
        """Room for a tile, zeros, given back on exit."""
        return Tile(self, np.zeros(shape))

    def load(self, name: str, *where: slice | int) -> Tile:
        """A copy of part of a slow array, given back on exit; counted when it is entered."""
        return Tile(self, np.array(self._slow[name][where], dtype=float), loaded=True)

    def store(self, name: str, tile: Array, *where: slice | int) -> None:
        """Write a tile to part of a slow array."""
        if np.shape(self._slow[name][where]) != tile.shape:
            raise NarrowsError(f"a tile of shape {tile.shape} does not fit {name}{list(where)}")
        self.stores += tile.size
        self._slow[name][where] = tile

    def result(self, name: str) -> Array:
        """What the slow memory holds in the end; nothing may be resident any more."""
        if self.resident:
            raise NarrowsError(f"{self.resident} words were never given back")
        return self._slow[name]
