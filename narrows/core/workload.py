"""Work: phases of ops over tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from narrows.core.errors import NarrowsError, unknown
from narrows.core.flow import Flow
from narrows.core.tensor import Number, Tensor

KINDS = (
    "matmul", "conv", "attention_prefill", "attention_decode", "softmax", "norm", "pointwise",
    "rope", "reduce", "gather", "copy", "optimizer", "all_reduce", "all_gather",
    "reduce_scatter", "all_to_all", "send_recv",
)  # fmt: skip
"""Op classes: what is calibrated together. The field's usual names."""

FUSIBLE = frozenset({"softmax", "norm", "pointwise", "rope", "reduce", "copy"})
"""Op classes a compiler can run in one pass with their neighbours."""

PERSISTENT = frozenset({"weight", "kv", "state", "gradient", "saved", "input"})
"""Roles that stay in memory for a whole phase; the others live from first write to last read."""


@dataclass(frozen=True, slots=True)
class Use:
    """What one op touches of a tensor: all that is kept, or less along the axes named in `at`.

    part: where that piece lies, as (first, last, period) in elements, known from traces only:
    every `period` elements, those from `first` to `last`. It tells pieces of equal size apart
    (queries, keys and values of one product); bytes follow from `at` alone.
    """

    tensor: str
    at: Mapping[str, Number] = field(default_factory=dict[str, Number])
    part: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class Op:
    """One kernel's worth of work.

    flops: operations that no tensor extent governs. per_element: operations for every element
    that the op touches of a tensor it reads (a product does 2 x rows for each weight), so
    that a rewrite of the tensor changes bytes and flops together.
    precision: the number format of the arithmetic. repeat: how often a phase step runs it.
    shape: sizes the pricing of tiles needs (`m`, `n`, `k`, `batch`). group: ops that one fused
    kernel may replace (see fusion.py); empty for none.
    """

    name: str
    kind: str
    reads: tuple[Use, ...] = ()
    writes: tuple[Use, ...] = ()
    flops: Number = 0.0
    per_element: Mapping[str, Number] = field(default_factory=dict[str, Number])
    precision: str = "fp32"
    repeat: Number = 1.0
    shape: Mapping[str, Number] = field(default_factory=dict[str, Number])
    group: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("op class", self.kind, KINDS)


@dataclass(frozen=True, slots=True)
class Phase:
    """Ops that run in order, `steps` times over: `prefill`, `decode`, `training step`, ..."""

    name: str
    ops: tuple[Op, ...]
    steps: Number = 1.0


@dataclass(frozen=True)
class Workload:
    """A graph of ops over tensors.

    tensors: by name. phases: in the order they run. facts: what the closed form or the trace
    knows of the load and techniques ask for (`prompt`, `generate`, `batch`, `layers`, ...).
    arrivals: the requests, where the load is traffic. flows: what must get through which channels.
    """

    name: str
    tensors: Mapping[str, Tensor]
    phases: tuple[Phase, ...]
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    arrivals: Any = None
    flows: tuple[Flow, ...] = ()

    def __post_init__(self) -> None:
        for phase in self.phases:
            for op in phase.ops:
                for use in (*op.reads, *op.writes):
                    if use.tensor not in self.tensors:
                        raise NarrowsError(
                            f"workload {self.name!r}: op {op.name!r} uses {use.tensor!r}, "
                            "which is not among its tensors"
                        )

    @classmethod
    def of(cls, module: Any, inputs: Any = (), training: bool = False) -> Workload:
        """The workload of a torch module or callable, traced without weights or compute.

        See narrows.trace.module.trace, which also takes a name and further facts.
        """
        # The one import of the rest in core/, and a lazy one: the issue names this entry, and
        # core must load where torch is not installed.
        from narrows.trace.module import trace

        return trace(module, inputs, training=training)

    def phase(self, name: str) -> Phase:
        """A phase by its name."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise unknown("phase", name, [p.name for p in self.phases])

    def role(self, *roles: str) -> list[Tensor]:
        """The tensors that play one of these roles."""
        return [t for t in self.tensors.values() if t.role in roles]

    def bytes(self, *roles: str) -> Number:
        """Bytes stored by all tensors of these roles."""
        return sum((t.bytes() for t in self.role(*roles)), start=0.0)

    def op_flops(self, op: Op) -> Number:
        """Operations of one run of an op."""
        total: Number = op.flops
        for use in op.reads:
            rate = op.per_element.get(use.tensor)
            if rate is not None:
                total = total + rate * self.tensors[use.tensor].elements(use.at)
        return total

    def flops(self, phase: str) -> Number:
        """Operations of a whole phase, all its steps."""
        found = self.phase(phase)
        return found.steps * sum((o.repeat * self.op_flops(o) for o in found.ops), start=0.0)

    def with_tensors(self, tensors: Iterable[Tensor]) -> Workload:
        """This workload with tensors replaced or added, by name."""
        return replace(self, tensors={**self.tensors, **{t.name: t for t in tensors}})

    def map_ops(self, change: Callable[[Phase, Op], Iterable[Op]]) -> Workload:
        """This workload with every op replaced by what `change` gives for it."""
        phases = tuple(
            replace(p, ops=tuple(new for op in p.ops for new in change(p, op))) for p in self.phases
        )
        return replace(self, phases=phases)
