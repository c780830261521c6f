"""What a report is made of: plain data, filled by the job, read by html.py and text.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from narrows.core.bound import Bound
from narrows.core.machine import Machine
from narrows.core.method import Price


class Option(Protocol):
    """One technique asked about a case (what narrows.find gives).

    gain: old over new seconds of the whole request. settings: as `--with` takes them.
    """

    @property
    def key(self) -> str: ...
    @property
    def settings(self) -> str: ...
    @property
    def gain(self) -> float: ...
    @property
    def seconds(self) -> float: ...
    @property
    def price(self) -> Price: ...
    @property
    def reason(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Interval:
    """A measured value with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def around_one(self) -> bool:
        """Whether the interval holds 1: no gain and no loss can be told."""
        return self.low <= 1.0 <= self.high


@dataclass(frozen=True, slots=True)
class Quality:
    """One figure of quality, with and without the technique.

    unit: `fraction` (shown in per cent) or a name such as `perplexity`. better: `higher` or
    `lower`. baselines: other ways to spend the same bytes, by name.
    """

    name: str
    dense: Interval
    technique: Interval
    unit: str = "fraction"
    better: str = "higher"
    baselines: Mapping[str, Interval] = field(default_factory=dict[str, Interval])


@dataclass(frozen=True, slots=True)
class Proof:
    """A technique measured here beside its prediction.

    phase: what was timed. dense_seconds, technique_seconds: of one step of it, medians.
    spread: of the interleaved ratios, as a fraction. dense_bytes, technique_bytes: what the
    technique shrinks (the cache, the weights), None where it shrinks nothing. peers: seconds of
    a step of others in the same run, by name.
    """

    key: str
    phase: str
    predicted_gain: float
    measured_gain: Interval
    dense_seconds: float
    technique_seconds: float
    spread: float
    repeats: int
    settings: str = ""
    dense_bytes: float | None = None
    technique_bytes: float | None = None
    quality: tuple[Quality, ...] = ()
    peers: Mapping[str, float] = field(default_factory=dict[str, float])
    note: str = ""

    @property
    def error(self) -> float:
        """How far the prediction is above (or below) the measured gain, as a fraction."""
        return self.predicted_gain / self.measured_gain.value - 1.0

    @property
    def conclusive(self) -> bool:
        """Whether the spread leaves a gain or a loss to speak of."""
        return not self.measured_gain.around_one


@dataclass(frozen=True, slots=True)
class Candidate:
    """One technique or stack of a search. name: as `--with` takes it.

    bytes: of the cache, predicted. seconds: of a decode step, predicted; speed: tokens a second of
    all requests. costs: shares of dense quality lost, by measure; empty where none was read.
    verdict: within, outside, undecided, dense. thorough: whether the costs rest on the full
    reading.
    """

    name: str
    stacked: bool
    bytes: float
    seconds: float
    speed: float
    costs: Mapping[str, Interval]
    verdict: str
    thorough: bool = False


@dataclass(frozen=True)
class Frontier:
    """A search of stacks within limits of quality.

    limits: by measure, shares of dense quality. measures: what each means. candidates: the dense
    cache first. best: name of what was chosen; single, stack: of the fastest within of each kind;
    all empty where there is none. told: what came of it, in sentences. judged: by what. error: p90
    of the predicted seconds, None where nothing is calibrated. left: what was not read, and why.
    most: tokens a second with next to nothing in the cache, which no cache can pass.
    """

    limits: Mapping[str, float]
    measures: Mapping[str, str]
    candidates: tuple[Candidate, ...]
    best: str = ""
    single: str = ""
    stack: str = ""
    told: tuple[str, ...] = ()
    judged: str = ""
    error: float | None = None
    left: Mapping[str, str] = field(default_factory=dict[str, str])
    most: float | None = None

    def of(self, name: str) -> Candidate:
        """A candidate by its name."""
        return next(c for c in self.candidates if c.name == name)


@dataclass(frozen=True)
class Report:
    """A whole job: what limits this case, what would widen it, and the proof.

    facts: what was asked (model, prompt, batch, ...), in words. after: the bound of the case as
    `technique` rewrites it. notes: what a reader should know of this run (how quiet the machine
    was, what could not be measured). commands: what to type to get it again. date: ISO.
    """

    title: str
    machine: Machine
    bound: Bound
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    options: Sequence[Option] = ()
    technique: str = ""
    after: Bound | None = None
    proof: Proof | None = None
    frontier: Frontier | None = None
    notes: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    date: str = ""
