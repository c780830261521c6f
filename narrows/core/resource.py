"""What a machine has: rates, levels, channels and links."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import isfinite

from narrows.core.errors import NarrowsError


class Kind(StrEnum):
    """The three laws a resource can follow.

    RATE: demands add up and take seconds (flop/s, byte/s, op/s).
    LEVEL: the live peak fits or does not (bytes held, watts, slots).
    CHANNEL: bits per symbol; along a path the least one rules (data-processing inequality).
    """

    RATE = "rate"
    LEVEL = "level"
    CHANNEL = "channel"


@dataclass(frozen=True, slots=True)
class Resource:
    """One capacity of a machine.

    name: dotted and lower-case: `compute.bf16`, `hbm`, `hbm.capacity`, `power`.
    capacity: in SI units (`flop/s`, `byte/s`, `byte`, `watt`, `bit`); finite and positive,
    a channel's may be zero: a dead layer passes nothing.
    source: where the figure is from: a datasheet, a paper, or "measured <date>".
    """

    name: str
    kind: Kind
    capacity: float
    unit: str
    source: str = ""

    def __post_init__(self) -> None:
        dead = self.kind is Kind.CHANNEL and self.capacity == 0
        if not (isfinite(self.capacity) and (self.capacity > 0 or dead)):
            raise NarrowsError(
                f"resource {self.name!r}: capacity must be finite and above zero, "
                f"not {self.capacity!r}"
            )


@dataclass(frozen=True, slots=True)
class Link:
    """A connection to other machines or to a slower tier, by direction.

    bandwidth: bytes per second in one direction. latency: seconds for an empty message.
    peers: how many ends it joins, this one included. topology: `point`, `all-to-all`, `ring`,
    `tree`, `torus`, `shared`.
    """

    name: str
    bandwidth: float
    latency: float = 0.0
    peers: int = 2
    topology: str = "point"
    source: str = ""

    def __post_init__(self) -> None:
        if not (isfinite(self.bandwidth) and self.bandwidth > 0):
            raise NarrowsError(
                f"link {self.name!r}: bandwidth must be above zero, not {self.bandwidth!r}"
            )
        if not (isfinite(self.latency) and self.latency >= 0) or self.peers < 2:
            raise NarrowsError(f"link {self.name!r}: latency must be >= 0 and peers >= 2")
