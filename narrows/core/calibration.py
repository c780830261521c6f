"""How a machine was measured to run against its datasheet, one op class at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np

from narrows.core.errors import NarrowsError

Values = Sequence[float] | np.ndarray

UNCALIBRATED_P90 = 0.8
"""p90 error granted to a datasheet roofline: it was 32-77 % optimistic on measured GPU profiles."""


@dataclass(frozen=True, slots=True)
class Error:
    """Absolute relative error of predictions, as fractions: |predicted / measured - 1|."""

    median: float
    mean: float
    p90: float
    n: int

    @classmethod
    def of(
        cls, predicted: Sequence[float] | np.ndarray, measured: Sequence[float] | np.ndarray
    ) -> Error:
        """The error of predicted against measured values (same shape, measured above zero)."""
        ape = np.abs(np.asarray(predicted, float) / np.asarray(measured, float) - 1.0)
        if ape.size == 0:
            raise NarrowsError("no rows to take an error of")
        return cls(
            float(np.median(ape)), float(ape.mean()), float(np.quantile(ape, 0.9)), int(ape.size)
        )


@dataclass(frozen=True, slots=True)
class Calibration:
    """At most three fitted constants for one op class on one machine; law.py says how they act.

    compute, memory: fractions of the datasheet rate really reached, in (0, 1].
    fixed: seconds of launch, dispatch or start-up a call, >= 0.
    step: seconds of every pass over a block of attention, or of every hop of a collective, >= 0;
    fitted in the place of a constant that does not act there.
    tiles: (rows, columns) of the output blocks a processing unit can make at a time; empty where
    tiles are not modelled. Tiles and units are facts of kernel and chip, not fitted constants.
    n: rows fitted on. error: on rows that were not fitted on, None when there were none.
    """

    op: str
    compute: float = 1.0
    memory: float = 1.0
    fixed: float = 0.0
    tiles: tuple[tuple[int, int], ...] = ()
    n: int = 0
    source: str = ""
    era: str = ""
    error: Error | None = None
    step: float = 0.0

    def __post_init__(self) -> None:
        for name in ("compute", "memory"):
            value = getattr(self, name)
            if not 0.0 < value <= 1.0:
                raise NarrowsError(
                    f"calibration of {self.op!r}: {name} must lie in (0, 1], not {value!r}"
                    " (nothing runs faster than its datasheet)"
                )
        if not (isfinite(self.fixed) and self.fixed >= 0):
            raise NarrowsError(f"calibration of {self.op!r}: fixed must be >= 0 seconds")
        if not (isfinite(self.step) and self.step >= 0):
            raise NarrowsError(f"calibration of {self.op!r}: step must be >= 0 seconds")
        if any(rows < 1 or columns < 1 for rows, columns in self.tiles):
            raise NarrowsError(f"calibration of {self.op!r}: tiles have a row and a column")
