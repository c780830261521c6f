"""The fastest within limits of quality: the bound ranks, the reference model judges.

All single techniques are priced and read a little; those that are plainly outside the limits are
dropped, the others are paired. What is left is judged thoroughly in the order of its predicted
speed until the first single technique and the first stack are shown to be within.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from narrows.core.case import Case
from narrows.measure.timing import Progress
from narrows.relieve.judge import FULL, SCREEN, Effort, Judge
from narrows.relieve.proof import part
from narrows.relieve.stacks import Priced, pairs, priced, singles
from narrows.report.model import Interval

PATIENCE = 6
"""Thorough judgements spent on single techniques, and on stacks, before the search gives up."""

SAME = 0.02
"""Predicted speeds so near each other count as equal; the smaller cache is then the better one."""


@dataclass(frozen=True)
class Judged:
    """A candidate and what it costs. costs: by metric, a share of dense quality with its interval.

    verdict: within (shown), outside (shown), undecided (the interval holds the limit), unread
    (faster ones were within already, or it was not asked). thorough: not only screened.
    """

    priced: Priced
    costs: Mapping[str, Interval]
    verdict: str
    thorough: bool


@dataclass(frozen=True)
class Found:
    """Everything a search looked at. best: the fastest within limits, single or stack, if any.

    single, stack: the fastest of each kind that is within. left: what was not tried, and why.
    """

    dense: Priced
    judged: tuple[Judged, ...]
    limits: Mapping[str, float]
    single: Judged | None
    stack: Judged | None
    left: Mapping[str, str]

    @property
    def best(self) -> Judged | None:
        """The faster of the two; between equals the one that holds less."""
        known = [j for j in (self.single, self.stack) if j is not None]
        return min(known, key=lambda j: _order(j.priced), default=None)


def search(
    case: Case,
    judge: Judge,
    limits: Mapping[str, float],
    progress: Progress | None = None,
    efforts: tuple[Effort, Effort] = (SCREEN, FULL),
) -> Found:
    """Search stacks of codec, policy and settings for a case that generates from a prompt.

    limits: by metric of judge.METRICS, fractions. efforts: what is read to screen, and to judge.
    """
    alone, left = singles(case, judge.model)
    told: dict[str, Judged] = {}

    def read(some: Iterable[Priced], thorough: bool, at: Progress | None) -> list[Judged]:
        asked = {p.name: p for p in some}
        policies = {n: p.technique for n, p in asked.items() if p.technique is not None}
        costs = judge.costs(policies, efforts[thorough], at) if policies else {}
        made = [
            Judged(p, costs[name], verdict(costs[name], limits), thorough)
            for name, p in asked.items()
        ]
        told.update((j.priced.name, j) for j in made)
        return made

    passed = [
        j.priced for j in read(alone, False, part(progress, 0.0, 0.25)) if j.verdict != "outside"
    ]
    stacked = pairs(case, judge.model, passed)
    hopeful = [
        j.priced for j in read(stacked, False, part(progress, 0.25, 0.5)) if j.verdict != "outside"
    ]
    within: list[Judged | None] = []
    for kind, (low, high) in ((passed, (0.5, 0.75)), (hopeful, (0.75, 1.0))):
        found = None
        asked = sorted(kind, key=_order)[:PATIENCE]
        for i, candidate in enumerate(asked):
            step = (high - low) / len(asked)
            (judged,) = read(
                [candidate], True, part(progress, low + i * step, low + (i + 1) * step)
            )
            if judged.verdict == "within":
                found = judged
                break
        within.append(found)
    return Found(priced(case), tuple(told.values()), dict(limits), within[0], within[1], left)


def _order(candidate: Priced) -> tuple[float, float]:
    """Faster first, in steps of SAME; then smaller."""
    from math import floor, log

    return floor(log(candidate.seconds) / SAME), candidate.bytes


def verdict(costs: Mapping[str, Interval], limits: Mapping[str, float]) -> str:
    """Whether the costs are shown to be within all limits, shown to be outside one, or neither."""
    if any(costs[name].low > limit for name, limit in limits.items()):
        return "outside"
    if all(costs[name].high <= limit for name, limit in limits.items()):
        return "within"
    return "undecided"
