"""Users with long prompts on one machine, as cases; and what moves when they take turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.core.machine import Machine
from narrows.core.method import Technique
from narrows.core.plan import Plan
from narrows.core.workload import Op, Phase, Use, Workload
from narrows.machines.load import load as load_machine
from narrows.serving.compress import Kept, compress
from narrows.trace.config import TransformerConfig
from narrows.trace.llm import llm


@dataclass(frozen=True)
class Load:
    """Users with prompts of `tokens` on one machine (or `tp` of them), and what is done about it.

    model: as for llm(). machine: a Machine or a catalogue name. techniques: rewrites of the case,
    in order. kept: what is kept of the cache besides (see compress.Kept).
    """

    model: TransformerConfig | str | Path | Mapping[str, Any]
    machine: Machine | str
    tokens: int
    users: int = 1
    techniques: tuple[Technique, ...] = ()
    kept: Kept = field(default_factory=Kept)
    tp: int = 1
    dtype: str = "bf16"
    kv_dtype: str | None = None
    fusion: tuple[str, ...] = ("flash", "compiled")

    def __post_init__(self) -> None:
        if self.users < 1 or self.tokens < 1:
            raise NarrowsError(
                f"longcontext: users and tokens must be at least 1, not {self.users} and "
                f"{self.tokens}"
            )

    def case(self, batch: int, generate: int) -> Case:
        """The case of `batch` of these users at once, techniques and compression applied."""
        machine = self.machine
        machine = machine if isinstance(machine, Machine) else load_machine(machine)
        work = llm(self.model, self.tokens, generate, batch, self.dtype, self.kv_dtype, self.tp)
        case = Case(work, machine, Plan(self.fusion, {"tp": self.tp})).with_(*self.techniques)
        kept = self.kept
        return replace(case, workload=compress(
            case.workload, kept.layer, kept.head, kept.token, kept.hidden, kept.bits
        ))  # fmt: skip


def with_switch(work: Workload) -> Workload:
    """The workload with a phase `switch`: its caches leave for the host, as large ones return."""
    caches = work.role("kv")
    away = [replace(t, name=f"host.{t.name}", role="activation", tier="host") for t in caches]
    # a group each: transfers are never fused into the copy of a copy
    ops = [
        Op(
            f"swap {way} {here.name}",
            "copy",
            (Use(a.name),),
            (Use(b.name),),
            group=f"{way} {a.name}",
        )
        for way in ("out", "in")
        for here, there in zip(caches, away, strict=True)
        for a, b in [(here, there) if way == "out" else (there, here)]
    ]
    work = work.with_tensors(away)
    return replace(work, phases=(*work.phases, Phase("switch", tuple(ops))))
