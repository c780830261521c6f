"""A case: a workload, how it is run, and the machine it runs on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from narrows.core.machine import Machine
from narrows.core.plan import Plan
from narrows.core.workload import Workload

if TYPE_CHECKING:
    from narrows.core.bound import Bound
    from narrows.core.method import Technique


@dataclass(frozen=True)
class Case:
    """What a user asks about. A technique is a rewrite of one."""

    workload: Workload
    machine: Machine
    plan: Plan = field(default_factory=Plan)

    def bound(self) -> Bound:
        """The narrowest resource of every phase, and the distance from its limit."""
        from narrows.core.bound import bound

        return bound(self)

    def find(self, **options: Any) -> Any:
        """Registered techniques ranked by what they would gain here (see narrows.find)."""
        from narrows.door import find

        return find(self, **options)

    def with_(self, *techniques: Technique) -> Case:
        """This case as the techniques rewrite it, in the order given."""
        case = self
        for technique in techniques:
            case = technique.predict(case)
        return case

    def on(self, machine: Machine) -> Case:
        """The same work on another machine."""
        return replace(self, machine=machine)
