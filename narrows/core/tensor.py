"""Tensors whose bytes are derived from axes, what is kept of them, and their codec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from narrows.core.errors import NarrowsError, unknown

Number = float | np.ndarray
"""A figure of one case, or an array of it over many cases (all arrays of one sweep broadcast)."""

BITS: Mapping[str, float] = {
    "fp64": 64, "fp32": 32, "tf32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8,
    "int4": 4, "int32": 32, "int64": 64, "bool": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Codec:
    """How one element is stored: payload bits, and overhead bits shared by a group of elements.

    bits: payload bits of an element. group: elements that share the overhead, 0 for none.
    overhead_bits: scale, minimum, exponent or index bits of a group.
    """

    name: str
    bits: float
    group: int = 0
    overhead_bits: float = 0.0

    @property
    def bits_per_element(self) -> float:
        """Payload and share of the overhead."""
        return self.bits + (self.overhead_bits / self.group if self.group else 0.0)

    @classmethod
    def of(cls, dtype: str) -> Codec:
        """The plain codec of a number format such as `bf16`."""
        if dtype not in BITS:
            raise unknown("number format", dtype, BITS)
        return cls(dtype, BITS[dtype])


@dataclass(frozen=True, slots=True)
class Tensor:
    """Named axes, the extent kept on each, a codec and a tier.

    role: `weight`, `activation`, `kv`, `state`, `gradient`, `saved`, `input` or `output`.
    axes: full extents by name, in the field's words (layer, batch, head, token, channel, ...).
    kept: extents that a technique has reduced; an axis that is not named is kept whole.
    tier: `device` (main memory), `host`, `drive`, ...: resolved by the machine.
    """

    name: str
    role: str
    axes: Mapping[str, Number]
    codec: Codec
    kept: Mapping[str, Number] = field(default_factory=dict[str, Number])
    tier: str = "device"

    def extent(self, axis: str) -> Number:
        """What is stored along one axis."""
        if axis not in self.axes:
            raise unknown(f"axis of {self.name}", axis, self.axes)
        full = self.axes[axis]
        return np.minimum(full, self.kept[axis]) if axis in self.kept else full

    def elements(self, at: Mapping[str, Number] | None = None) -> Number:
        """Stored elements; `at` narrows single axes to what one op touches of them."""
        total: Number = 1.0
        for axis in self.axes:
            extent = self.extent(axis)
            if at and axis in at:
                extent = np.minimum(extent, at[axis])
            total = total * extent
        return total

    def bytes(self, at: Mapping[str, Number] | None = None) -> Number:
        """Stored bytes, overhead of the codec included."""
        return self.elements(at) * (self.codec.bits_per_element / 8)

    def keep(self, **extents: Number) -> Tensor:
        """This tensor with less kept on some axes; never more than a former step left."""
        for axis in extents:
            if axis not in self.axes:
                raise unknown(f"axis of {self.name}", axis, self.axes)
        kept = {a: np.minimum(self.extent(a), n) for a, n in extents.items()}
        return replace(self, kept={**self.kept, **kept})

    def with_(self, **changes: Any) -> Tensor:
        """This tensor with another codec or tier."""
        if not changes.keys() <= {"codec", "tier"}:
            raise NarrowsError(
                "a tensor may change its codec and its tier; extents go through keep()"
            )
        return replace(self, **changes)
