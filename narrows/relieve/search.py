"""The fastest within limits of quality: the bound ranks, the reference model judges.

All single techniques are priced and read a little; those that are plainly outside a limit are
dropped, and not read for what else is limited; the others are paired. Then the fastest few of each
kind are read further, together, for they share the reading of prompts: one that is shown to be
outside is dropped, and so is one that is slower than one shown to be within. What is decided is
read no further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor, log
from typing import Any, Protocol

from narrows.core.case import Case
from narrows.kv._base import KVTechnique
from narrows.measure.timing import Progress
from narrows.relieve.judge import LOOKS, Effort
from narrows.relieve.proof import part
from narrows.relieve.stacks import Priced, pairs, priced, singles
from narrows.report.model import Interval

TOGETHER = 3
"""Candidates of a kind that are read further at a time."""

PATIENCE = 6
"""Of each kind: candidates that are read further before the search gives up on it, and stacks
that passed the screening before no more are screened."""

SCREENED = 24
"""Stacks that are screened at most."""

SAME = 0.02
"""Predicted speeds so near each other count as equal; the smaller cache is then the better one."""


class Judges(Protocol):
    """What a search asks of a Judge."""

    @property
    def model(self) -> Any: ...

    def costs(
        self,
        candidates: Mapping[str, KVTechnique],
        effort: Effort,
        limits: Mapping[str, float],
        progress: Progress | None = None,
    ) -> dict[str, dict[str, Interval]]: ...


@dataclass(frozen=True)
class Judged:
    """A candidate and what it costs. costs: by metric, a share of dense quality with its interval.

    verdict: within (shown), outside (shown), undecided (the interval holds the limit).
    thorough: not only screened.
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


Look = Callable[[Iterable[Priced], int, "Progress | None"], list[Judged]]


def search(
    case: Case,
    judge: Judges,
    limits: Mapping[str, float],
    progress: Progress | None = None,
    looks: Sequence[Effort] = LOOKS,
    models: Iterable[Any] = (),
) -> Found:
    """Search stacks of codec, policy and settings for a case that generates from a prompt.

    limits: by metric of judge.METRICS, fractions. looks: what is read to screen, and further.
    models: those that candidates must be able to run on beside the judge's.
    """
    ran = (judge.model, *models)
    alone, left = singles(case, *ran)
    told: dict[str, Judged] = {}

    def look(some: Iterable[Priced], at: int, shown: Progress | None) -> list[Judged]:
        asked = {p.name: p for p in some}
        policies = {n: p.technique for n, p in asked.items() if p.technique is not None}
        costs = judge.costs(policies, looks[at], limits, shown) if policies else {}
        made = [
            Judged(p, costs[name], verdict(costs[name], limits), at > 0)
            for name, p in asked.items()
        ]
        told.update((j.priced.name, j) for j in made)
        return made

    passed = [j for j in look(alone, 0, part(progress, 0.0, 0.2)) if j.verdict != "outside"]
    stacked = pairs(case, (j.priced for j in passed), *ran)
    # costs of parts often add up: stacks that would be within if they did come first
    lost = {j.priced.name: j.costs for j in passed}
    stacked.sort(key=lambda p: (_far(p, lost, limits), _order(p)))
    hopeful: list[Judged] = []
    asked = stacked[:SCREENED]
    for at in range(0, len(asked), PATIENCE):
        share = part(
            progress, 0.2 + 0.3 * at / len(asked), 0.2 + 0.3 * (at + PATIENCE) / len(asked)
        )
        hopeful += [j for j in look(asked[at : at + PATIENCE], 0, share) if j.verdict != "outside"]
        if len(hopeful) >= PATIENCE:
            break
    single, stack = _race((passed, hopeful), look, len(looks), part(progress, 0.5, 1.0))
    for p in stacked:
        if p.name not in told:
            left[p.name] = "not read: stacks that promised more were enough"
    return Found(priced(case), tuple(told.values()), dict(limits), single, stack, left)


def _far(stack: Priced, lost: Mapping[str, Mapping[str, Interval]], limits: Any) -> bool:
    """Whether a stack would be outside some limit if what its parts lose added up."""
    parts = [costs for name, costs in lost.items() if name in stack.name.split("+")]
    return any(sum(max(0.0, c[m].value) for c in parts) > limit for m, limit in limits.items())


def _race(
    kinds: Sequence[list[Judged]], look: Look, looks: int, progress: Progress | None
) -> list[Judged | None]:
    """The fastest of each kind that is shown to be within; kinds are read together."""
    queues = [sorted(kind, key=lambda j: _order(j.priced))[:PATIENCE] for kind in kinds]
    within: list[Judged | None] = [None] * len(queues)
    rounds = range(0, PATIENCE, TOGETHER)
    for start in rounds:
        # a kind that has its fastest is done: who comes later in its queue is slower
        alive = [
            [] if within[i] is not None else queue[start : start + TOGETHER]
            for i, queue in enumerate(queues)
        ]
        for at in range(1, looks):
            alive = [_undecided(group) for group in alive]
            asked = [j.priced for group in alive for j in group]
            if not asked:
                break
            begin = (start / TOGETHER + (at - 1) / (looks - 1)) / len(rounds)
            end = (start / TOGETHER + at / (looks - 1)) / len(rounds)
            made = {j.priced.name: j for j in look(asked, at, part(progress, begin, end))}
            alive = [[made.get(j.priced.name, j) for j in group] for group in alive]
            for i, group in enumerate(alive):
                best = next((j for j in group if j.verdict == "within"), None)
                within[i] = best if best is not None else within[i]
    return within


def _undecided(group: list[Judged]) -> list[Judged]:
    """Those that may still turn out to be the fastest within. group: fastest first."""
    left: list[Judged] = []
    for judged in group:
        if judged.thorough and judged.verdict == "within":
            break  # who comes after it is slower
        if judged.verdict != "outside":
            left.append(judged)
    return left


def _order(candidate: Priced) -> tuple[float, float]:
    """Faster first, in steps of SAME; then smaller."""
    return floor(log(candidate.seconds) / SAME), candidate.bytes


def verdict(costs: Mapping[str, Interval], limits: Mapping[str, float]) -> str:
    """Whether the costs are shown to be within all limits, shown to be outside one, or neither.

    costs: of all that is limited, or of less where that shows it to be outside.
    """
    if any(found.low > limits[name] for name, found in costs.items()):
        return "outside"
    if all(name in costs and costs[name].high <= limit for name, limit in limits.items()):
        return "within"
    return "undecided"
