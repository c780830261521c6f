"""The sentences that the terminal and the HTML file share."""

from __future__ import annotations

import re

from narrows.core.bound import Bound, PhaseBound
from narrows.core.caches import FAULTS
from narrows.core.machine import Machine
from narrows.core.price import DISPATCH
from narrows.report import units
from narrows.report.model import Candidate, Frontier, Interval, Option, Proof, Quality, Report

MEMORIES = ("hbm", "gddr", "dram", "ddr", "sram", "memory", "flash")


def op(kind: str) -> str:
    """An op class as people say it: attention_decode is attention."""
    return re.sub(r"^attention_\w+$", "attention", kind).replace("_", "-")


def op_class(kind: str) -> str:
    """An op class where no phase stands beside it: attention (decode), matmul fp32 vector."""
    stem, *rest = kind.split(".")
    plain = re.sub(r"^attention_(\w+)$", r"attention (\1)", stem).replace("_", "-")
    return " ".join([plain, *rest])


def resource(name: str, machine: Machine | None = None) -> str:
    """A resource with the kind of narrow point it is: `memory bandwidth (hbm)`."""
    if name.startswith("compute."):
        return f"compute ({name.removeprefix('compute.')})"
    if name == DISPATCH:
        return "dispatch (the fixed cost of calls)"
    if name == FAULTS:
        return "page faults (mapping new memory)"
    if machine is not None and name in machine.links:
        return f"link ({name})"
    if re.fullmatch(r"l\d\w*", name) or (machine is not None and name in machine.caches):
        return f"cache bandwidth ({name})"
    if any(name.startswith(memory) for memory in MEMORIES):
        return f"memory bandwidth ({name})"
    return name


def group(kind: str) -> str:
    """The heading of a colour: what sort of resource it stands for."""
    return {"compute": "compute", "memory": "memory bandwidth", "dispatch": "fixed costs",
            "link": "link"}[kind]  # fmt: skip


def short(name: str) -> str:
    """A resource in one word or two, for tables."""
    return name.removeprefix("compute.")


def share(bound: Bound, name: str) -> float:
    """Fraction of all seconds in which a resource is the narrowest."""
    spent = sum(p.seconds * p.share.get(name, 0.0) for p in bound.phases)
    return spent / bound.seconds if bound.seconds else 0.0


def error(bound: Bound) -> float | None:
    """The largest p90 error of the phases, None where nothing was calibrated."""
    known = [p.error for p in bound.phases if p.error is not None]
    return max(known) if known else None


def calibrated(bound: Bound) -> bool:
    """Whether a prediction says more than the limit does."""
    return bound.seconds > 1.001 * bound.limit_seconds


def measured(bound: Bound) -> float | None:
    """Measured seconds of the whole request, None where only a part of it was measured."""
    known = [p.measured_seconds for p in bound.phases if p.measured_seconds is not None]
    if len(known) == len(bound.phases):
        return sum(known)
    return bound.measured_seconds if not known else None


def distance(bound: Bound) -> float:
    """How many times longer than its limit the request takes, measured where it was."""
    taken = measured(bound) or bound.seconds
    return taken / bound.limit_seconds if bound.limit_seconds else float("inf")


def trust(bound: Bound) -> str:
    """The error of every figure of a bound, as a clause."""
    worst = error(bound)
    if worst is None:
        return bound.trust
    return f"p90 error {units.percent(worst)} on rows the calibration was not fitted on"


def limits(bound: Bound, machine: Machine | None = None) -> str:
    """What limits the request, and for how much of it."""
    name = bound.narrowest
    told = resource(name, machine)
    return (
        f"{told[0].upper()}{told[1:]} is the narrowest point: it sets "
        f"{units.percent(share(bound, name))} of the {units.seconds(bound.seconds)} "
        f"that {bound.workload} takes on {bound.machine}."
    )


def headroom(bound: Bound) -> str:
    """How far the physical limit is, and how far this can be believed."""
    taken = measured(bound)
    away = f"{units.times(distance(bound))} the physical limit of "
    away += units.seconds(bound.limit_seconds)
    if taken is None and not calibrated(bound):
        return f"That is its physical limit; nothing is calibrated here: {bound.trust}."
    if taken is None:
        return f"Predicted, it takes {away} ({trust(bound)})."
    return (
        f"Measured, it takes {units.seconds(taken)}, {away}; the prediction is "
        f"{missed(bound.seconds / taken - 1)} ({trust(bound)})."
    )


def missed(error: float) -> str:
    """A signed error as people say it: 12 % too high."""
    return f"{units.percent(abs(error))} too {'high' if error > 0 else 'low'}"


def fits(bound: Bound) -> str:
    """Whether it fits the memories, and which is fullest."""
    tightest = fullest(bound)
    if bound.fits is None or tightest is None:
        return "Whether it fits is not known: a capacity is missing."
    phase, name, fraction = tightest
    if bound.fits:
        return f"It fits: {name} is {units.percent(fraction)} full in {phase.name}."
    return f"It does not fit: {name} would need {units.times(fraction)} of what it has."


def fullest(bound: Bound) -> tuple[PhaseBound, str, float] | None:
    """The memory that is fullest at the worst moment: phase, name, fraction of it."""
    known = [
        (phase, level.resource, level.need / level.have)
        for phase in bound.phases
        for level in phase.levels
        if level.have
    ]
    return max(known, key=lambda row: row[2]) if known else None


def best(options: tuple[Option, ...] | list[Option]) -> Option | None:
    """The technique with the largest predicted gain, None where none gains 1 % or more."""
    helping = [o for o in options if o.gain >= 1.01]
    return max(helping, key=lambda o: o.gain) if helping else None


def name(option: Option | Proof) -> str:
    """A technique with its settings, as `--with` takes it."""
    return f"{option.key}:{option.settings}" if option.settings else option.key


def widens(report: Report) -> str:
    """What would help most, predicted."""
    if not report.options:
        return ""
    top = best(list(report.options))
    if top is None:
        count = len(report.options)
        if count == 1:
            return f"{name(report.options[0])} does not help here."
        return f"None of the {count} techniques asked helps here."
    return (
        f"{name(top)} would widen it: the request {units.times(top.gain)} as fast, "
        f"{units.seconds(top.seconds)} (predicted)."
    )


def proves(proof: Proof) -> str:
    """What was measured, beside what was predicted."""
    gain = proof.measured_gain
    held = units.span(gain.low, gain.high)
    if not proof.conclusive:
        return (
            f"Inconclusive: {name(proof)} measured {units.times(gain.value)} in {proof.phase}, "
            f"95 % interval {held}, which holds 1; predicted {units.times(proof.predicted_gain)}."
        )
    return (
        f"Measured, {proof.phase} is {units.times(gain.value)} as fast with {name(proof)}, "
        f"95 % interval {held}; {units.times(proof.predicted_gain)} was predicted, "
        f"{missed(proof.error)}."
    )


def value(row: Quality, figure: Interval | float) -> str:
    """A figure of quality in its unit."""
    plain = figure.value if isinstance(figure, Interval) else figure
    return f"{plain * 100:.1f} %" if row.unit == "fraction" else units.figures(plain, 4)


def interval(row: Quality, figure: Interval) -> str:
    """A figure of quality with its interval."""
    if row.unit == "fraction":
        return f"{figure.value * 100:.1f} % [{figure.low * 100:.1f}, {figure.high * 100:.1f}]"
    low, high = units.figures(figure.low, 4), units.figures(figure.high, 4)
    return f"{value(row, figure)} [{low}, {high}]"


def costs(proof: Proof) -> str:
    """What quality it cost: the figure that lost most, so that a summary hides nothing."""
    if not proof.quality:
        return "Its quality was not measured."

    def loss(row: Quality) -> float:
        before, after = row.dense.value, row.technique.value
        lost = before - after if row.better == "higher" else after - before
        return lost / abs(before) if before else lost

    row = max(proof.quality, key=loss)
    told = f"{row.name[0].upper()}{row.name[1:]}"
    if len(proof.quality) > 1 and loss(row) > 0:
        told = f"Most was lost in {row.name}"
    return f"{told}: {value(row, row.dense)} before, {value(row, row.technique)} with it."


def cost(found: Interval) -> str:
    """A share of dense quality that is lost, with its interval, in per cent."""
    return f"{found.value * 100:+.2f} % [{found.low * 100:.2f}, {found.high * 100:.2f}]"


def shown_within(candidate: Candidate) -> bool:
    """Whether the further reading showed it: a screening alone does not settle that."""
    return candidate.verdict == "within" and candidate.thorough


def verdict(candidate: Candidate) -> str:
    """What is known of a candidate's quality, in a word or two."""
    if candidate.verdict in ("dense", "outside") or candidate.thorough:
        return candidate.verdict
    return "only screened"


def mark(found: Frontier, name: str) -> str:
    """What a candidate came to in a search: chosen, the best of its kind, or nothing."""
    told = [
        what
        for what, of in (("chosen", found.best), ("best single", found.single),
                         ("best stack", found.stack))
        if of == name
    ]  # fmt: skip
    return ", ".join(told)


def ranked(found: Frontier) -> list[Candidate]:
    """What a table shows of a search, most telling first.

    The best of each kind and the dense cache; then what is within, what is open, what is outside,
    the fastest of each first.
    """
    named = (found.best, found.single, found.stack)

    def rank(c: Candidate) -> tuple[int, float]:
        if c.verdict == "dense":
            return 0, c.seconds
        if c.name in named:
            return 1, c.seconds
        if shown_within(c):
            return 2, c.seconds
        return (4 if c.verdict == "outside" else 3), c.seconds

    return sorted(found.candidates, key=rank)


def asked(found: Frontier) -> str:
    """The limits of a search: ppl at most 1.0 %, recall at most 1.0 %."""
    return ", ".join(f"{name} at most {units.percent(v)}" for name, v in found.limits.items())


def searched(found: Frontier) -> str:
    """What a search did, and what its figures rest on."""
    tried = len(found.candidates) - 1
    error = "datasheet bounds" if found.error is None else f"p90 error {units.percent(found.error)}"
    return (
        f"{tried} caches read, {len(found.left)} left; bytes and speed are predicted ({error}), "
        f"costs are shares of dense quality lost, on {found.judged}, with intervals that hold 95 % "
        f"of the time over all looks."
    )
