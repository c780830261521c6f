"""From repeated samples to a figure that may be published, or a refusal."""

from __future__ import annotations

from typing import Any

import numpy as np

from narrows.core.errors import NarrowsError
from narrows.core.method import Reading
from narrows.measure.timing import Ratio

LIMIT = 0.15
"""Repeats whose medians differ by more than this fraction are not published."""


class NoisyRun(NarrowsError):  # noqa: N818 - a refusal, not a fault
    """The repeats contradict each other: nothing can be said."""


def disagreement(samples: np.ndarray) -> float:
    """How far the medians of repeats lie apart, over the smallest. samples: (repeats, rounds)."""
    medians = np.median(np.asarray(samples, float), axis=1)
    return float(medians.max() / medians.min() - 1.0)


def settle(
    samples: np.ndarray, unit: str, method: str, limit: float = LIMIT, scale: float = 1.0,
    inverse: bool = False, **facts: Any,
) -> Reading:  # fmt: skip
    """The median of all samples (repeats, rounds) with its 95 % interval, times `scale`.

    inverse: scale / sample, for rates from seconds. method: how it was read, kept in `facts`
    with the disagreement and the count. Raises NoisyRun where repeats differ by more than limit.
    """
    grid = np.atleast_2d(np.asarray(samples, float))
    if grid.shape[0] < 2:
        raise NarrowsError("one repeat cannot be checked: give at least two rows of samples")
    apart = disagreement(grid)
    if not apart <= limit:
        raise NoisyRun(
            f"{method}: repeats disagree by {apart:.0%}, more than {limit:.0%}; "
            "nothing is published, measure again on a quieter machine"
        )
    values = scale / grid if inverse else scale * grid
    middle = Ratio.of(values.ravel())
    told = {"method": method, "disagreement": apart, "samples": grid.size, **facts}
    return Reading(middle.median, unit, (middle.low, middle.high), None, told)
