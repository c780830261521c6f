"""A claim: one published figure, and the function that produces ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from narrows.core.errors import NarrowsError

HOW = ("measured", "exact", "modelled")
NEEDS = ("gpu", "data", "torch", "peer")


class Inconclusive(Exception):  # noqa: N818 - a verdict, not an error
    """Raised by a claim's function when nothing can be told: why, and what would tell."""


@dataclass(frozen=True, slots=True)
class Figure:
    """Our figure: value, its 95 % interval over seeds or repeats, and details worth keeping.

    predicted: what the bound said before the measurement, where it said something.
    """

    value: float
    interval: tuple[float, float] | None = None
    predicted: float | None = None
    details: dict[str, float | str] = field(default_factory=dict[str, float | str])


@dataclass(frozen=True)
class Claim:
    """One figure of a paper (or of a card's "works when"), checked by a function.

    expected: the published value, or an interval (low, high); infinities are allowed in it.
    tolerance: fraction around a single value. compute: returns our figure in `unit`; the expected
    value never enters it. how: `measured` (here), `exact` (arithmetic or equality) or `modelled`
    (calibrated bound of the paper's machine). cost: seconds it takes, roughly. control: what must
    fail when the mechanism is broken. needs: of NEEDS; what is missing makes it wait, not fail.
    explained: why the published figure does not come out, where that is understood; such a claim
    counts as not reproduced, and as an alarm when it passes. version: raised with the check.
    """

    name: str
    expected: float | tuple[float, float]
    unit: str
    setting: str
    source: str
    how: str
    compute: Callable[[], float | Figure]
    tolerance: float = 0.0
    cost: float = 1.0
    control: str = ""
    needs: tuple[str, ...] = ()
    explained: str = ""
    version: int = 1

    def __post_init__(self) -> None:
        if self.how not in HOW:
            raise NarrowsError(f"claim {self.name!r}: how must be one of {', '.join(HOW)}")
        for need in self.needs:
            if need not in NEEDS:
                raise NarrowsError(f"claim {self.name!r}: needs must be of {', '.join(NEEDS)}")

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

    def figure(self) -> Figure:
        """Run the check."""
        found = self.compute()
        return found if isinstance(found, Figure) else Figure(float(found))


def claim(
    *,
    expected: float | tuple[float, float],
    unit: str,
    setting: str,
    source: str,
    how: str,
    tolerance: float = 0.0,
    cost: float = 1.0,
    control: str = "",
    needs: tuple[str, ...] = (),
    explained: str = "",
    version: int = 1,
) -> Callable[[Callable[[], float | Figure]], Claim]:
    """Decorate a function that returns our figure; its name names the claim."""

    def make(compute: Callable[[], float | Figure]) -> Claim:
        return Claim(
            compute.__name__, expected, unit, setting, source, how, compute,
            tolerance, cost, control, needs, explained, version,
        )  # fmt: skip

    return make
