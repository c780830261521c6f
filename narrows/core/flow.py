"""Bits through a path of channels: the third law, beside rates and levels.

A channel passes at most so many bits a symbol, and no later step can bring back what an earlier
one dropped (data-processing inequality): along a path the least channel rules. Seconds have no
part in it; what does not fit is answered late or wrong, not slowly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import fsum, isfinite
from typing import TYPE_CHECKING

from narrows.core.errors import NarrowsError, unknown
from narrows.core.resource import Kind, Resource
from narrows.core.tensor import Tensor

if TYPE_CHECKING:
    from narrows.core.machine import Machine
    from narrows.core.workload import Workload


@dataclass(frozen=True, slots=True)
class Flow:
    """What a task must learn of each symbol, and the channels that stand in between.

    need: bits a symbol that must arrive (the entropy of the target, or of the source).
    through: names along the path, in order: tensors of the workload, channels of the machine, or
    entries of `channels`. channels: channels that belong to the model and not to the machine: a
    layer as an instrument read it, a codebook. axis: the axis of the tensors that counts symbols
    (`token`, `sample`); a tensor without it holds one symbol. law: probabilities of the source's
    symbols where they are known; they sum to 1.
    """

    name: str
    need: float
    through: tuple[str, ...]
    channels: Mapping[str, Resource] = field(default_factory=dict[str, Resource])
    axis: str = "token"
    law: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not (isfinite(self.need) and self.need >= 0):
            raise NarrowsError(f"flow {self.name!r}: need must be >= 0 bits, not {self.need!r}")
        if not self.through:
            raise NarrowsError(f"flow {self.name!r}: a path has at least one channel or tensor")
        for name, channel in self.channels.items():
            if channel.kind is not Kind.CHANNEL:
                raise NarrowsError(
                    f"flow {self.name!r}: {name!r} is a {channel.kind}, not a channel"
                )
        if self.law and (min(self.law) < 0 or abs(fsum(self.law) - 1.0) > 1e-9):
            raise NarrowsError(
                f"flow {self.name!r}: law must be probabilities that sum to 1; "
                f"these sum to {fsum(self.law):.12g}"
            )


@dataclass(frozen=True, slots=True)
class ChannelRow:
    """The narrowest channel of one flow. need, have: bits a symbol.

    passes: what is left of the source after each name of the path, never more than before it.
    """

    flow: str
    resource: str
    need: float
    have: float
    passes: Mapping[str, float]
    unit: str = "bit"

    @property
    def fits(self) -> bool:
        """Whether all that is needed can arrive."""
        return self.need <= self.have * (1 + 1e-12)


def stored_bits(tensor: Tensor, axis: str) -> float:
    """Payload bits a tensor holds of one symbol: it cannot pass more."""
    at = {axis: 1.0} if axis in tensor.axes else None
    return float(tensor.elements(at)) * tensor.codec.bits


def narrowest(path: Mapping[str, float]) -> tuple[str, float]:
    """Name and bits of the least channel of a path, the earliest of equal ones."""
    name = min(path, key=lambda n: path[n])
    return name, path[name]


def rows(workload: Workload, machine: Machine) -> tuple[ChannelRow, ...]:
    """The narrowest channel of every flow of a workload on a machine.

    Raises NarrowsError for a name on a path that is neither a tensor nor a channel.
    """
    found: list[ChannelRow] = []
    for flow in workload.flows:
        path: dict[str, float] = {}
        for name in flow.through:
            here: list[float] = []
            if name in workload.tensors:
                here.append(stored_bits(workload.tensors[name], flow.axis))
            resource = flow.channels.get(name, machine.resources.get(name))
            if resource is not None and resource.kind is Kind.CHANNEL:
                here.append(resource.capacity)
            if not here:
                known = [*workload.tensors, *flow.channels]
                known += [n for n, r in machine.resources.items() if r.kind is Kind.CHANNEL]
                raise unknown(f"tensor or channel (on the path of {flow.name!r})", name, known)
            path[name] = min(here)
        least, have = narrowest(path)
        passes: dict[str, float] = {}
        left = float("inf")
        for name, bits in path.items():
            left = min(left, bits)
            passes[name] = left
        found.append(ChannelRow(flow.name, least, flow.need, have, passes))
    return tuple(found)
