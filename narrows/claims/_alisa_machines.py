"""ALISA, FlexGen and vLLM on the paper's machines, as far as bytes and rates tell them apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from narrows.core.case import Case
from narrows.core.claim import Inconclusive
from narrows.core.errors import NarrowsError
from narrows.core.fusion import fuse
from narrows.core.machine import Machine
from narrows.core.plan import Plan
from narrows.core.price import price
from narrows.kv.alisa import ALISA, schedule
from narrows.machines.load import load
from narrows.trace.llm import llm

IN, OUT = 128, 512
"""Tokens read and written (Alpaca, as the paper's throughput runs are remembered)."""

PAIRS = (("opt-6.7b", "v100-16"), ("opt-13b", "v100-32"), ("opt-30b", "h100-80"))
"""Models, each with the memory that the paper gives it (from memory)."""

BATCHES = (4, 8, 16, 32, 64)


def paper_machine(name: str) -> Machine:
    """A V100 with 16 or 32 GB behind 12 GB/s of PCIe 3, or an H100 behind 24 GB/s of PCIe 4."""
    machine = load("h100-pcie" if name.startswith("h100") else "v100-32")
    memory = machine.resources["hbm.capacity"]
    held = replace(memory, capacity=float(name.split("-")[1]) * 1e9)
    link = replace(machine.links["pcie"], bandwidth=24e9 if name.startswith("h100") else 12e9)
    return replace(
        machine, resources={**machine.resources, "hbm.capacity": held},
        links={**machine.links, "pcie": link},
    )  # fmt: skip


@dataclass(frozen=True)
class Served:
    """Tokens a second of one batch, and the shares of it that did not stay on the device."""

    rate: float
    note: str = ""


@cache
def dense_steps(model: str, where: str, batch: int) -> np.ndarray:
    """Seconds of a dense decode step that sees IN + 1 ... IN + OUT tokens."""
    lengths = IN + np.arange(OUT)
    work = fuse(llm(model, lengths, 1, batch, "fp16"), ("flash", "compiled"))
    priced = price(work, paper_machine(where))
    return np.broadcast_to(next(p for p in priced if p.phase.name == "decode").total_seconds, OUT)


@cache
def paper_case(model: str, where: str, batch: int) -> Case:
    """The paper's load as a case."""
    work = llm(model, IN, OUT, batch, "fp16")
    return Case(work, paper_machine(where), Plan(("flash", "compiled")))


def room_of(case: Case) -> float:
    """Bytes left for the cache: nine tenths of the memory less the weights."""
    memory = case.machine.capacity("device")
    assert memory is not None
    return 0.9 * memory - float(case.workload.bytes("weight"))


def alisa_served(model: str, where: str, batch: int, technique: ALISA) -> Served:
    """By the plan that schedule() chooses; fetching and computing do not overlap."""
    case = paper_case(model, where, batch)
    chosen = schedule(case, technique)
    before = case.with_(technique).bound().phase("prefill").seconds
    plan = chosen.plan
    note = f"alpha {plan.alpha:.2f}, beta {plan.beta:.2f}, p1 {plan.p1}, p2 {plan.p2}"
    return Served(batch * OUT / (before + chosen.seconds), note)


def flexgen_served(model: str, where: str, batch: int, rate: float | None = None) -> Served:
    """A fixed share of the cache on the host, by heads, all of which crosses the link each step.

    The share is what the longest cache needs; loading overlaps with computing entirely. rate:
    bytes a second at which the host's share is attended, None: the link's.
    """
    case = paper_case(model, where, batch)
    held = float(case.workload.bytes("kv"))
    share = max(0.0, 1 - room_of(case) / held)
    moved = held * (IN + np.arange(OUT)) / (IN + OUT) * share
    steps = np.maximum(
        dense_steps(model, where, batch), moved / (rate or case.machine.bandwidth("host"))
    )
    before = case.bound().phase("prefill").seconds
    return Served(batch * OUT / (before + float(steps.sum())), f"{share:.0%} on the host")


def vllm_served(model: str, where: str, batch: int) -> Served:
    """Pages on the device; sequences that do not fit wait, or are swapped out when pages end.

    The latest sequence is swapped out first, and comes back before a new one begins.
    """
    case = paper_case(model, where, batch)
    token = float(case.workload.bytes("kv")) / batch / (IN + OUT)
    pages, link = room_of(case) / token, case.machine.bandwidth("host")
    prefill = case.bound().phase("prefill").seconds / batch
    waiting, done, spent, swaps = batch, 0, 0.0, 0
    running: list[int] = []
    out: list[int] = []
    while done < batch:
        while out and sum(running) + out[-1] + len(running) + 1 <= pages:
            running.append(out.pop())
            spent += running[-1] * token / link
        while not out and waiting and sum(running) + IN + len(running) + 1 <= pages:
            waiting -= 1
            running.append(IN)
            spent += prefill
        while running and sum(running) + len(running) > pages:
            out.append(running.pop())
            spent, swaps = spent + out[-1] * token / link, swaps + 1
        if not running:
            raise Inconclusive(f"{model} on {where}: not even one sequence fits")
        mean = int(np.mean(running))
        spent += float(dense_steps(model, where, len(running))[mean - IN])
        running = [n + 1 for n in running]
        done += sum(n == IN + OUT for n in running)
        running = [n for n in running if n < IN + OUT]
    return Served(batch * OUT / spent, f"{swaps} swapped out")


@cache
def served() -> Mapping[tuple[str, int], Mapping[str, Served]]:
    """All systems by model and batch; batches that ALISA cannot place at all are left out."""
    found: dict[tuple[str, int], Mapping[str, Served]] = {}
    for model, where in PAIRS:
        for batch in BATCHES:
            try:
                ours = alisa_served(model, where, batch, ALISA())
            except NarrowsError:
                continue
            found[model, batch] = {
                "alisa": ours, "flexgen": flexgen_served(model, where, batch),
                "vllm": vllm_served(model, where, batch),
            }  # fmt: skip
    return found


HOST_MEMORY = 60e9
"""Bytes a second that a host's processor attends at: two sockets of the V100's time, half used."""


@cache
def served_over_host_attention() -> Mapping[tuple[str, int], float]:
    """ALISA over a FlexGen whose host attends to its own share instead of sending it."""
    found: dict[tuple[str, int], float] = {}
    for (model, batch), told in served().items():
        where = dict(PAIRS)[model]
        found[model, batch] = (
            told["alisa"].rate / flexgen_served(model, where, batch, HOST_MEMORY).rate
        )
    return found
