"""A claim: one published figure, and the function that produces ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from narrows.core.errors import NarrowsError

HOW = ("measured", "exact", "modelled")


@dataclass(frozen=True)
class Claim:
    """One figure of a paper (or of the card's "works when"), checked by a function.

    expected: the published value, or an interval (low, high). tolerance: fraction around a
    single value. compute: returns our figure in `unit`; the expected value never enters it.
    how: `measured` (here), `exact` (arithmetic or equality) or `modelled` (calibrated bound of
    the paper's machine). cost: seconds it takes, roughly. control: what must fail when the
    mechanism is broken. version: raised when the check changes.
    """

    name: str
    expected: float | tuple[float, float]
    unit: str
    setting: str
    source: str
    how: str
    compute: Callable[[], float]
    tolerance: float = 0.0
    cost: float = 1.0
    control: str = ""
    version: int = 1

    def __post_init__(self) -> None:
        if self.how not in HOW:
            raise NarrowsError(f"claim {self.name!r}: how must be one of {', '.join(HOW)}")

    @property
    def interval(self) -> tuple[float, float]:
        """Lowest and highest figure that counts as reproduced."""
        if isinstance(self.expected, tuple):
            return self.expected
        slack = abs(self.expected) * self.tolerance
        return self.expected - slack, self.expected + slack

    def holds(self, figure: float) -> bool:
        """Whether a figure of ours reproduces the paper's."""
        low, high = self.interval
        return low <= figure <= high


def claim(
    *, expected: float | tuple[float, float], unit: str, setting: str, source: str, how: str,
    tolerance: float = 0.0, cost: float = 1.0, control: str = "", version: int = 1,
) -> Callable[[Callable[[], float]], Claim]:  # fmt: skip
    """Decorate a function that returns our figure; its name names the claim."""

    def make(compute: Callable[[], float]) -> Claim:
        return Claim(
            compute.__name__, expected, unit, setting, source, how, compute,
            tolerance, cost, control, version,
        )  # fmt: skip

    return make
