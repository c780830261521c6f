"""Reports to render: a whole one, and one with everything missing that may be missing."""

from __future__ import annotations

from dataclasses import dataclass, replace

from narrows.core.bound import Bound
from narrows.core.calibration import Calibration, Error
from narrows.core.case import Case
from narrows.core.machine import Machine
from narrows.core.method import Price
from narrows.core.plan import Plan
from narrows.machines.load import load
from narrows.report.model import Candidate, Frontier, Interval, Proof, Quality, Report
from narrows.trace.llm import llm
from tests.null import toys

NASTY = '<script>alert("1")</script> & [bold]x[/bold]'
"""What a user may name a thing; it must come out as text."""


PRICE = Price("some recall", "none", "2048 tokens")


@dataclass(frozen=True)
class Asked:
    """An option as the door gives it."""

    key: str
    gain: float
    seconds: float
    reason: str
    settings: str = ""
    price: Price = PRICE


def calibrated(machine: Machine) -> Machine:
    """With constants for what a transformer runs most."""
    error = Error(0.05, 0.07, 0.15, 1000)
    kinds = ("matmul", "attention_prefill", "attention_decode", "norm", "pointwise", "rope")
    return machine.calibrated(
        *(Calibration(k, 0.7, 0.8, 8e-6, n=50, error=error, source="test") for k in kinds)
    )


def case(machine: str = "h100-sxm", model: str = "llama-3-8b", prompt: int = 8192) -> Case:
    """A request of a catalogue model."""
    return Case(llm(model, prompt, 128, batch=8), load(machine), Plan(("flash", "compiled")))


def shorter(given: Case, tokens: int) -> Case:
    """The case with fewer cached tokens, as a technique would leave it."""
    kept = [t.keep(token=tokens) for t in given.workload.role("kv")]
    return replace(given, workload=given.workload.with_tensors(kept))


def run(found: Bound, slower: float = 1.1) -> Bound:
    """As if every phase had been measured."""
    phases = [replace(p, measured_seconds=p.seconds * slower) for p in found.phases]
    return replace(found, phases=tuple(phases))


def proof(low: float = 2.05, high: float = 2.19) -> Proof:
    """A measured gain with two figures of quality."""
    return Proof(
        key="snapkv", phase="decode", predicted_gain=2.31,
        measured_gain=Interval((low + high) / 2, low, high), dense_seconds=8.1e-3,
        technique_seconds=3.82e-3, spread=0.034, repeats=31, settings="capacity=1024",
        dense_bytes=1.72e9, technique_bytes=2.2e8,
        quality=(
            Quality(
                f"recall {NASTY}", Interval(0.982, 0.975, 0.987), Interval(0.971, 0.963, 0.978),
                baselines={"random": Interval(0.12, 0.1, 0.14)},
            ),
            Quality("perplexity", Interval(3.41, 3.38, 3.44), Interval(3.46, 3.43, 3.49),
                    "perplexity", "lower"),
        ),
        peers={"concatenating cache": 1.9e-2},
    )  # fmt: skip


def whole() -> Report:
    """Nothing missing, with a user's strings in every place that takes one."""
    given = case()
    given = replace(given, machine=calibrated(given.machine))
    named = replace(given.workload, name=NASTY)
    given = replace(given, workload=named, machine=replace(given.machine, title=f"H100 {NASTY}"))
    found, after = run(given.bound()), shorter(given, 1024).bound()
    options = (
        Asked("snapkv", found.seconds / after.seconds, after.seconds, f"keeps less {NASTY}", NASTY),
        Asked("gpipe", 1.0, found.seconds, "the model fits one device"),
    )
    return Report(
        title=f"What limits {NASTY}", machine=given.machine, bound=found,
        facts={"model": NASTY, "prompt": "8192 tokens"}, options=options, technique="snapkv",
        after=after, proof=proof(), notes=(f"busy: {NASTY}",),
        commands=(f"narrows relieve {NASTY}",), versions={"narrows": "0.1.0"},
        date="2026-01-01T00:00:00+00:00",
    )  # fmt: skip


def bare() -> Report:
    """A toy on a machine without calibration or capacity, and nothing asked or proven."""
    machine = toys.machine()
    known = {n: r for n, r in machine.resources.items() if n not in ("dram.capacity", "power")}
    machine = replace(machine, resources=known)
    return Report("A toy", machine, Case(toys.product(), machine).bound())


def frontier() -> Frontier:
    """A search of a dozen and a half caches: one single and one stack within, the rest not."""
    little, much = Interval(0.002, -0.001, 0.006), Interval(0.2, 0.15, 0.25)
    near = Interval(0.009, 0.001, 0.02)

    def made(name: str, held: float, cost: Interval, verdict: str, thorough: bool) -> Candidate:
        seconds = 2e-3 + held / 2e10
        costs = {"ppl": cost, "recall": little}
        return Candidate(name, "+" in name, held, seconds, 8 / seconds, costs, verdict, thorough)

    dense = Candidate("dense", False, 2.7e8, 2e-3 + 2.7e8 / 2e10, 515.0, {}, "dense", True)
    others = [
        made(f"snapkv:ratio=0.{i}", 2.7e8 * (1 - i / 10), much, "outside", False)
        for i in range(1, 10)
    ]
    stacks = [
        made(f"snapkv:ratio=0.{i}+kivi", 5e7 * (1 - i / 10), near, "undecided", i % 2 == 0)
        for i in range(1, 5)
    ]
    single = made("kivi:key_bits=8,value_bits=8", 7.7e7, little, "within", True)
    stack = made("snapkv:ratio=0.5+kivi:key_bits=8", 3.9e7, little, "within", True)
    return Frontier(
        limits={"ppl": 0.01, "recall": 0.01},
        measures={"ppl": f"perplexity {NASTY}", "recall": "x"},
        candidates=(dense, single, *others, *stacks, stack), best=stack.name, single=single.name,
        stack=stack.name, told=(f"The stack is best {NASTY}.",), judged="2,048 answers", error=0.1,
        left={"locret": f"train it {NASTY}"}, most=4000.0,
    )  # fmt: skip
