"""The four roles of a published system, one verb each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Protocol

from narrows.core.case import Case


class Change(StrEnum):
    """How a technique changes its target.

    WRAP: a cache, hook, optimiser or schedule, fully undone on exit. REWRITE: a changed copy of
    the weights. REBUILD: another architecture, trained or converted.
    """

    WRAP = "wrap"
    REWRITE = "rewrite"
    REBUILD = "rebuild"


@dataclass(frozen=True, slots=True)
class Price:
    """What a gain costs, in words a user can weigh: quality at risk, training, memory."""

    quality: str = "none"
    training: str = "none"
    memory: str = "none"


@dataclass(frozen=True, slots=True)
class Reading:
    """What an instrument read: value and interval in `unit`, and the estimator's ceiling."""

    value: float
    unit: str
    interval: tuple[float, float]
    ceiling: float | None = None
    facts: dict[str, Any] = field(default_factory=dict[str, Any])


class Applied(Protocol):
    """A technique at work: `.model` is what to run inside the context."""

    model: Any


class Method(ABC):
    """One published system; the constructor takes the paper's hyper-parameters.

    key: its name everywhere. paper: arXiv id or reference. relieves: the resource it widens.
    """

    key: ClassVar[str]
    paper: ClassVar[str]
    relieves: ClassVar[str]


class Technique(Method):
    """Widens a narrow point: rewrites a case (predict) and a target (apply)."""

    change: ClassVar[Change]
    price: ClassVar[Price] = Price()

    @abstractmethod
    def predict(self, case: Case) -> Case:
        """The case as this technique would run it; the same case where it does nothing."""

    @classmethod
    @abstractmethod
    def variants(cls, case: Case) -> tuple[Technique, ...]:
        """The settings worth asking about for a case, the paper's defaults first."""

    @abstractmethod
    def why(self, case: Case) -> str:
        """One sentence: what it would do to this case, or why it would not help."""

    @abstractmethod
    def apply(self, target: Any, state: Any = None) -> AbstractContextManager[Applied]:
        """The technique on a real model; `state` is what a fit gave, where one is needed."""


class Instrument(Method):
    """Measures a narrow point."""

    @abstractmethod
    def measure(self, target: Any) -> Reading:
        """Read the target."""


class Simulator(Method):
    """Stands in for a machine that is not here."""

    @abstractmethod
    def run(self, scenario: Any) -> Any:
        """Play a scenario: events, counters and a timeline."""


class Searcher(Method):
    """Chooses among others; the budget counts unique evaluations."""

    @abstractmethod
    def search(self, space: Any, objective: Any, budget: int) -> Any:
        """Search a space for the best by an objective."""
