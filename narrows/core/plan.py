"""How a workload is run: data only, no field belongs to one technique."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from narrows.core.errors import unknown

FUSIONS = ("flash", "compiled")
"""`flash`: attention keeps its scores on chip. `compiled`: pointwise chains are one kernel."""


@dataclass(frozen=True)
class Plan:
    """Placement and schedule.

    fusion: which intermediates never reach memory (see FUSIONS); empty for eager execution.
    parallel: degrees by name, `tp`, `pp`, `dp`, `ep`, `cp`; 1 where not named.
    policies: a slot (`evict`, `admit`, `batch`, `place`, ...) to (key, parameters).
    """

    fusion: tuple[str, ...] = ()
    parallel: Mapping[str, int] = field(default_factory=dict[str, int])
    policies: Mapping[str, tuple[str, Mapping[str, Any]]] = field(
        default_factory=dict[str, tuple[str, Mapping[str, Any]]]
    )

    def __post_init__(self) -> None:
        for name in self.fusion:
            if name not in FUSIONS:
                raise unknown("fusion", name, FUSIONS)

    def with_policy(self, slot: str, key: str, **parameters: Any) -> Plan:
        """This plan with one slot filled."""
        return replace(self, policies={**self.policies, slot: (key, parameters)})
