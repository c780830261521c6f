"""Sizes, lines, ways and latencies of caches, from nothing but latencies of dependent loads.

A probe is asked for the mean latency of a cyclic visit of byte offsets. What it costs to visit
growing footprints rises in steps; a step's height is the latency of a level, its edge the size.
Pairs of loads tell the line, and loads that meet in one set tell the ways. The same code reads a
simulator, where every answer is exact, and real chips, where latencies carry noise: `tolerance`
is the only difference.

Method: Saavedra and Smith 1995; fine-grained P-chase, Mei and Chu 2016 (arXiv:1509.02308).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np

from narrows.core.errors import NarrowsError


class Probe(Protocol):
    """Something that loads. granule: bytes to which offsets must be aligned."""

    granule: int

    def latency(self, offsets: np.ndarray) -> float:
        """Mean cost of a load when offsets (n,) are visited in turn again and again."""
        ...


@dataclass(frozen=True, slots=True)
class Found:
    """A level that was found. size, line: bytes, ways: lines a set; 0 where it cannot be told.

    bracket: the largest footprint seen to fit, and the smallest seen not to; size is the first.
    """

    latency: float
    size: int = 0
    bracket: tuple[int, int] = (0, 0)
    ways: int = 0
    line: int = 0


def shuffled(count: int, stride: int, seed: int = 0) -> np.ndarray:
    """`count` multiples of `stride` in an order that no prefetcher foresees: int64 (count,)."""
    return np.random.default_rng(seed).permutation(count).astype(np.int64) * stride


def footprint(probe: Probe, size: int, stride: int) -> float:
    """Latency over `size` bytes, one load every `stride` bytes."""
    return probe.latency(shuffled(max(size // stride, 1), stride))


def sizes(smallest: int, largest: int, stride: int, steps: int) -> list[int]:
    """Footprints in geometric steps, `steps` to the octave, whole strides each."""
    octaves = np.log2(largest / smallest)
    found = smallest * 2.0 ** np.linspace(0, octaves, int(np.ceil(octaves * steps)) + 1)
    return sorted({round(x / stride) * stride for x in found.tolist()})


def plateaus(curve: list[tuple[int, float]], tolerance: float, least: int) -> list[list[int]]:
    """Runs of indices over which latency stays within `tolerance` (a fraction), `least` long.

    Neighbours that differ by less than the tolerance are one level.
    """
    runs: list[list[int]] = []
    start = 0
    while start < len(curve):
        end, low, high = start, curve[start][1], curve[start][1]
        while end + 1 < len(curve):
            low, high = min(low, curve[end + 1][1]), max(high, curve[end + 1][1])
            if high > low * (1 + tolerance):
                break
            end += 1
        if end - start + 1 >= least:
            runs.append(list(range(start, end + 1)))
            start = end + 1
        else:
            start += 1
    return runs


def bisect(
    probe: Probe, fits: int, overflows: int, level: float, stride: int, tolerance: float
) -> tuple[int, int]:
    """The edge between a footprint that fits a level and one that does not, to one stride."""
    while overflows - fits > stride:
        middle = (fits + overflows) // (2 * stride) * stride
        if footprint(probe, middle, stride) <= level * (1 + tolerance):
            fits = middle
        else:
            overflows = middle
    return fits, overflows


def levels(
    probe: Probe, smallest: int, largest: int, stride: int = 64,
    tolerance: float = 1e-9, steps: int = 4, least: int = 3, exact: bool = True,
) -> tuple[Found, ...]:  # fmt: skip
    """The levels seen between two footprints, nearest first; the last one has no size.

    stride: bytes between loads, at most the line. steps: footprints an octave. least: of them
    that a level must span. exact: look for edges to one stride instead of one step.
    Raises NarrowsError where latency shows no level at all.
    """
    curve = [(s, footprint(probe, s, stride)) for s in sizes(smallest, largest, stride, steps)]
    runs = plateaus(curve, tolerance, least)
    if not runs:
        raise NarrowsError(
            f"no level between {smallest} and {largest} bytes: latency never stays within "
            f"{tolerance:g} over {least} footprints; widen the tolerance or the range"
        )
    found: list[Found] = []
    for i, run in enumerate(runs):
        level = float(np.median([curve[j][1] for j in run]))
        if i + 1 == len(runs):
            found.append(Found(level))
            continue
        fits, overflows = curve[run[-1]][0], curve[run[-1] + 1][0]
        if exact:
            fits, overflows = bisect(probe, fits, overflows, level, stride, tolerance)
        found.append(Found(level, fits, (fits, overflows)))
    return tuple(found)


def line_size(probe: Probe, largest: int, most: int = 512) -> int:
    """Bytes of a line of the nearest level, 0 where no distance up to `most` leaves it.

    Blocks of 2 x most bytes are visited at random, each at its start and then `distance` further:
    the second load is near only while both lie in one line. There are largest / 64 blocks, which
    must be more lines than the level holds.
    """
    starts = shuffled(largest // 64, 2 * most)
    near = probe.latency(np.zeros(1, np.int64))
    together = probe.latency(np.stack([starts, starts + probe.granule], axis=1).ravel())
    apart = 2 * together - near  # one load near, one as far as its block
    distance = 2 * probe.granule
    while distance <= most:
        visits = np.stack([starts, starts + distance], axis=1).ravel()
        if probe.latency(visits) > (together + apart) / 2:
            return distance
        distance *= 2
    return 0


def ways(
    probe: Probe, found: Found, beyond: float, inner: tuple[Found, ...] = (), most: int = 64
) -> int:
    """Lines a set of a level holds, 0 where up to `most` of them fit or it cannot be told.

    Addresses a cache's size apart meet in one set; one more than the ways, visited in turn,
    all miss. Inner levels with as many ways hide that: then each of the addresses is joined by
    lines that meet in the inner level's set and not in this one's, until the inner overflows.
    """
    alone = np.zeros(1, np.int64)
    found_alone = _overflow(probe, found, beyond, alone, most)
    if found_alone == 0 or found_alone > max((level.ways for level in inner), default=0):
        return found_alone
    nearest = inner[-1]
    if not nearest.ways:
        return 0
    joined = np.arange(nearest.ways + 1, dtype=np.int64) * (nearest.size // nearest.ways)
    return _overflow(probe, found, beyond, joined, most)


def _overflow(probe: Probe, found: Found, beyond: float, joined: np.ndarray, most: int) -> int:
    """How many addresses a level's size apart, each with its `joined` offsets, still fit."""
    rng = np.random.default_rng(0)
    for count in range(1, most + 2):
        column = np.arange(count, dtype=np.int64) * found.size
        visits = rng.permutation((column[:, None] + joined[None, :]).ravel())
        if probe.latency(visits) > (found.latency + beyond) / 2:
            return count - 1
    return 0


def dissect(
    probe: Probe, smallest: int, largest: int, stride: int = 0, tolerance: float = 1e-9,
    steps: int = 4, least: int = 3,
) -> tuple[Found, ...]:  # fmt: skip
    """All that can be told of every level: size, latency, ways, and the line they share.

    stride: the line, where it is known; it is looked for first where this is 0, as a shorter
    stride would find a line twice and blur every step. Raises NarrowsError where none is found.
    """
    line = stride or line_size(probe, largest)
    if not line:
        raise NarrowsError("no line was found: give its bytes as `stride`, or a larger footprint")
    seen = levels(probe, smallest, largest, line, tolerance, steps, least)
    told: list[Found] = []
    for level, after in pairwise(seen):
        held = ways(probe, level, after.latency, tuple(told))
        told.append(replace(level, line=line, ways=held))
    return (*told, seen[-1])
