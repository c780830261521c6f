"""A computational drive as a machine, and what SparF reads of it: shares of pages, in expectation.

No torch. Figures of hardware that no catalogue file holds are here, each with its source.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import inf, isfinite
from typing import Any

import numpy as np

from narrows.core.errors import NarrowsError
from narrows.core.machine import Machine
from narrows.core.resource import Kind, Link, Resource
from narrows.core.tensor import Number, Tensor
from narrows.core.workload import Op, Phase, Use, Workload
from narrows.kv._coded import PARTS, Shares

FLASH, PROGRAM, ENGINE, LINK = "csd.flash", "csd.program", "compute.drive", "csd.link"
"""Names of its resources; the precision of what its engine computes is `drive`."""


@dataclass(frozen=True, slots=True)
class CSD:
    """A computational storage drive: the paper's where its figures are known.

    channels, channel_rate: flash channels, bytes a second of each (8 of 1.4 GB/s in the paper).
    page: bytes that flash reads at once (4 to 16 KB in the paper). read_seconds: of one page in
    its array; planes: pages that a channel's dies read at the same time (typical of TLC flash:
    45 us, 8 dies of 2 planes; the paper's are not known). program: bytes a second that flash takes
    (drives of that class write 2 to 3 GB/s). engine: flop/s of attention in the drive (an
    assumption: a small FPGA, some hundred multipliers at 200 MHz). link: bytes a second to the
    host (PCIe 3 x4 after its protocol). capacity: bytes (a drive of 2 TB). strip: channels of
    keys that share a page of their copy by channel.
    """

    channels: int = 8
    channel_rate: float = 1.4e9
    page: int = 4096
    read_seconds: float = 45e-6
    planes: int = 16
    program: float = 2e9
    engine: float = 100e9
    link: float = 3.3e9
    capacity: float = 2e12
    strip: int = 2

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            endless = value == inf and field.name in ("channel_rate", "link", "engine")
            if not number or not (value > 0 and (isfinite(value) or endless)):
                raise NarrowsError(f"a drive's {field.name} must be above zero, not {value!r}")
            if field.type == "int" and value != int(value):
                raise NarrowsError(f"a drive's {field.name} must be a whole number, not {value!r}")

    @property
    def internal(self) -> float:
        """Bytes a second that flash gives: its channels, or its arrays where those are slower."""
        return self.channels * min(self.channel_rate, self.planes * self.page / self.read_seconds)

    def beside(self, machine: Machine, drives: int) -> Machine:
        """A machine with so many of these drives, which work at the same time."""
        told = f"{drives} computational drives, {type(self).__name__} in kv/_instinfer.py"
        rates = {FLASH: self.internal, PROGRAM: self.program, ENGINE: self.engine}
        resources = {
            n: Resource(n, Kind.RATE, drives * x, "flop/s" if n == ENGINE else "byte/s", told)
            for n, x in rates.items()
        }
        resources[f"{FLASH}.capacity"] = Resource(
            f"{FLASH}.capacity", Kind.LEVEL, drives * self.capacity, "byte", told
        )
        link = Link(LINK, drives * self.link, source=told)
        return replace(
            machine,
            resources={**machine.resources, **resources},
            links={**machine.links, LINK: link},
            tiers={**machine.tiers, FLASH: FLASH, PROGRAM: PROGRAM, LINK: LINK},
        )


def touched(chosen: float, of: float, together: float) -> float:
    """Share of pages with at least one of `chosen` things among `of`, `together` to a page.

    The things lie anywhere: the expectation of drawing without putting back.
    """
    if chosen >= of:
        return 1.0
    together = min(together, of)
    missed = 1.0
    for i in range(int(together)):
        missed *= max(of - chosen - i, 0) / (of - i)
    rest = together - int(together)
    if rest:
        missed *= (max(of - chosen - int(together), 0) / (of - int(together))) ** rest
    return 1.0 - missed


def per_page(page: int, width: Any, bits: Number) -> float:
    """Vectors of so many numbers in a page; at least one."""
    return max(1.0, float(page // (float(width) * float(np.max(bits)) / 8)))


CLUSTERED = 0.73
"""Chosen tokens lie together: m of a page miss as m ** CLUSTERED that lie anywhere would.

Read from recall-lm on unseen text (claim `pages_touched`): an eighth of 1,024 to 2,048 tokens.
"""


@dataclass(frozen=True, slots=True)
class Reads:
    """What a step reads of the cache, as shares of it.

    channels: of the keys in their copy by channel. tokens: of keys and values by token.
    """

    channels: float
    tokens: float


def reads(
    drive: CSD, size: int, bits: Number, r: int, share: float, pages: bool, clustered: float
) -> Reads:  # fmt: skip
    """Shares in whole pages; r channels of `size`, a share of the tokens; 1 / 1 where dense.

    clustered: 1 where tokens lie anywhere; see CLUSTERED.
    """
    if not r:
        return Reads(0.0, 1.0)
    strips = touched(r, size, drive.strip)
    together = 1.0 if pages else per_page(drive.page, size, bits) ** clustered
    many = 1e6
    return Reads(strips, touched(share * many, many, together))


def offloaded(work: Workload, found: Reads, r: int, share: float, young: Shares) -> Workload:
    """The workload with its cache in drives that attend it.

    young: share of tokens not in the copy by channel yet, by part. Serial: nothing overlaps.
    """
    parts = [p for p in PARTS if f"kv.{p}.key" in work.tensors]
    held = {f"kv.{p}.{w}" for p in parts for w in ("key", "value")}
    tensors = {n: work.tensors[n].with_(tier=FLASH) for n in held}
    for part in parts if r else ():
        keys = work.tensors[f"kv.{part}.key"]
        copy = Tensor(f"{keys.name}.channels", "kv", keys.axes, keys.codec, keys.kept, FLASH)
        tensors[copy.name] = copy.keep(token=copy.extent("token") * (1 - young[part, "key"]))
    made: dict[str, Tensor] = {}
    phases: list[Phase] = []
    for phase in work.phases:
        groups = {op.group for op in phase.ops if op.group and _reads(op) & held}
        done: set[str] = set()
        ops: list[Op] = []
        for op in phase.ops:
            written = {u.tensor for u in op.writes} & held
            if written:
                ops.append(_written(work, op, written.pop(), tensors, made, phase.name))
            elif op.group not in groups:
                ops.append(op)
            elif op.group not in done:
                done.add(op.group)
                group = [o for o in phase.ops if o.group == op.group]
                ops += _attended(work, group, found, (r, share), young, made)
        phases.append(replace(phase, ops=tuple(ops)))
    return replace(work, tensors={**work.tensors, **tensors, **made}, phases=tuple(phases))


def _reads(op: Op) -> set[str]:
    return {u.tensor for u in op.reads}


def _crossing(name: str, like: Tensor, elements: Number, tier: str) -> Tensor:
    return Tensor(name, "activation", {"element": elements}, like.codec, tier=tier)


def _written(
    work: Workload, op: Op, name: str, tensors: dict[str, Tensor], made: dict[str, Tensor],
    phase: str,
) -> Op:  # fmt: skip
    """New keys or values through the link into flash, keys twice; program time is what rules."""
    cache = work.tensors[name]
    at = next(u.at for u in op.writes if u.tensor == name)
    new = cache.elements({**at, "layer": 1})
    crossing = _crossing(f"instinfer.{name}.{phase}", cache, new, LINK)
    times = 1.0 + (f"{name}.channels" in tensors)
    programmed = _crossing(f"instinfer.{name}.{phase}.pages", cache, new * times, PROGRAM)
    made |= {t.name: t for t in (crossing, programmed)}
    return replace(op, kind="gather", reads=(*op.reads, Use(crossing.name)),
                   writes=(*op.writes, Use(programmed.name)))  # fmt: skip


def _attended(
    work: Workload, group: list[Op], found: Reads, sparf: tuple[int, float], young: Shares,
    made: dict[str, Tensor],
) -> list[Op]:  # fmt: skip
    """One layer's attention in the drives: queries go, two passes over pages, vectors return."""
    r, share = sparf
    inside = {u.tensor for op in group for u in op.writes}
    uses = [u for op in group for u in op.reads]
    outside = (u for u in uses if u.tensor not in inside)
    queries = next(u for u in outside if work.tensors[u.tensor].role != "kv")
    out = group[-1].writes[-1]
    asked = work.tensors[queries.tensor]
    told = work.tensors[out.tensor]
    crossing = [_crossing(f"instinfer.{group[0].group}.{n}", t, t.elements(), LINK)
                for n, t in (("asked", asked), ("told", told))]  # fmt: skip
    made |= {t.name: t for t in crossing}
    first: list[Use] = []
    second: list[Use] = []
    weighed: Number = 0.0
    for use in uses:
        if work.tensors[use.tensor].role != "kv":
            continue
        tensor = work.tensors[use.tensor]
        part, what = use.tensor.split(".")[1:3]
        tokens = use.at.get("token", tensor.extent("token"))
        heads = asked.elements() / tensor.extent("batch") / tensor.extent("channel")
        per_token = tensor.extent("batch") * heads
        fresh = young[part, "key"]
        if what == "value":
            second.append(Use(use.tensor, {**use.at, "token": tokens * found.tokens}))
            continue
        weighed = weighed + tokens * per_token
        if not r:
            second.append(use)
            continue
        size = tensor.extent("channel")
        first += [
            Use(f"{use.tensor}.channels",
                {**use.at, "token": tokens * (1 - fresh), "channel": size * found.channels}),
            Use(use.tensor, {**use.at, "token": tokens * fresh}),
        ]  # fmt: skip
        second.append(Use(use.tensor, {**use.at, "token": tokens * (1 - fresh) * found.tokens}))
    size = work.tensors[second[0].tensor].extent("channel")
    every = {"precision": "drive", "repeat": group[0].repeat, "kind": "gather"}
    send, answer = (Use(t.name) for t in crossing)
    ops = [replace(group[0], name="instinfer.ask", kind="gather", reads=(queries,), writes=(send,),
                   flops=0.0, per_element={}, shape={}, group="")]  # fmt: skip
    if r:
        ops.append(Op("instinfer.channels", reads=tuple(first), flops=2.0 * r * weighed, **every))
    ops.append(Op("instinfer.tokens", reads=tuple(second), flops=4.0 * share * size * weighed,
                  **every))  # fmt: skip
    ops.append(replace(ops[0], name="instinfer.tell", reads=(answer,), writes=(out,)))
    return ops
