"""Long contexts as four bounds: users held, prompt read, answer written, users swapped.

Narrow point: the key-value cache of a long prompt. Its bytes cap how many users a memory holds
(capacity), are read for every token (bandwidth) and are moved whenever one user makes room for
another (link); the prompt that makes them takes operations that grow with its square (compute).

Mechanism. Four figures of one session, all from the closed form and the machine's own rates:
concurrency, the users whose caches fit beside the weights; prefill, the seconds of one prompt;
decode, the seconds of an answer of `generate` tokens; switch, the seconds to move one user's cache
to the host and another's back. A session is a prefill and `rounds` of decode, switch and reading.

Paper: Fu 2024, "Challenges in Deploying Long-Context Transformers: A Theoretical Peak Performance
Analysis" (arXiv 2405.08944). Its figures are at datasheet rates: `peak`. What a calibrated machine
reaches stands beside it. Its own arithmetic, which differs from exact counting, is in fu2024.py.

It misleads where it is taken for a simulation: queues, chunked prompts, paging and transfers that
hide behind work are not in it; sessions an hour are an upper bound for users who never collide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import floor, inf
from typing import Any

from narrows.core.bound import Bound, PhaseBound, bound
from narrows.core.calibration import UNCALIBRATED_P90
from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.core.machine import Machine
from narrows.core.method import Instrument, Reading, Technique
from narrows.serving.long_load import Load, with_switch
from narrows.trace.config import TransformerConfig
from narrows.trace.llm import resolve


@dataclass(frozen=True)
class LongContext:
    """The four figures of a load, and what follows from them.

    concurrency: users the memory holds. prefill_s, decode_s, switch_s: seconds of one user alone
    (switch_s is infinite where the machine has no slower memory). sessions_per_hour: of all
    users. kv_bytes: of one user's session, a device. narrowest: the resource that bounds each
    figure. prefill_fits: whether the prompt's activations fit too, read in one piece. error: p90
    of the calibration, None at peak rates.
    """

    concurrency: int
    prefill_s: float
    decode_s: float
    switch_s: float
    sessions_per_hour: float
    kv_bytes: float
    narrowest: Mapping[str, str]
    prefill_fits: bool | None
    error: float | None


class LongContextAnalysis(Instrument):
    """Reads what long contexts cost a machine.

    generate: tokens of one answer. rounds: questions of a session. reading: seconds a user reads
    an answer while the machine serves others.
    """

    key = "longcontext_analysis"
    paper = "arXiv:2405.08944"
    relieves = "memory capacity"

    def __init__(self, generate: int = 250, rounds: int = 5, reading: float = 60.0) -> None:
        if generate < 1 or rounds < 1 or reading < 0:
            raise NarrowsError(
                "longcontext_analysis: generate and rounds must be at least 1 and reading not "
                f"below 0 seconds, not {generate}, {rounds} and {reading}"
            )
        self.generate, self.rounds, self.reading = generate, rounds, float(reading)

    def measure(self, target: Any) -> Reading:
        """Sessions an hour: calibrated, its error as interval, the peak as ceiling.

        target: a Load, or (model, machine, tokens, users). `facts` hold both LongContexts.
        """
        load = _load(target)
        bounds = self._bounds(load)
        peak, real = self._view(load, bounds, True), self._view(load, bounds, False)
        error = UNCALIBRATED_P90 if real.error is None else real.error
        top, value = peak.sessions_per_hour, min(real.sessions_per_hour, peak.sessions_per_hour)
        interval = max(value * (1 - error), 0.0), min(value * (1 + error), top)
        facts = {"peak": peak, "calibrated": real, "trust": bounds[0].trust}
        return Reading(value, "session/h", interval, top, facts)

    def analyse(self, load: Load, peak: bool = True) -> LongContext:
        """The four figures of a load, at datasheet rates (`peak`) or as calibrated."""
        return self._view(load, self._bounds(load), peak)

    def compare(
        self, load: Load, techniques: Mapping[str, Technique]
    ) -> dict[str, LongContext | str]:
        """The four figures of a load as it is (`dense`) and with each technique alone.

        Where a technique cannot be asked about this load, its reason stands in its place.
        """
        found: dict[str, LongContext | str] = {"dense": self.analyse(load)}
        for name, technique in techniques.items():
            try:
                told = self.analyse(replace(load, techniques=(*load.techniques, technique)))
            except NarrowsError as error:
                told = str(error)
            found[name] = told
        return found

    def effects(self, load: Load) -> dict[str, LongContext]:
        """The four figures under tensor parallelism, another attention, a mixture of experts.

        The mixture has as many weights: 8 experts of an eighth of the MLP, 2 for each token.
        """
        config = resolve(load.model)
        asked = {"base": load}
        for tp in (2, 4, 8):
            if config.heads % tp == 0:
                asked[f"tp {tp}"] = replace(load, tp=tp)
        for name, heads in (("multi-head", config.heads), ("multi-query", 1)):
            asked[name] = replace(load, model=replace(config, kv_heads=heads))
        if config.gated and not config.experts and config.ffn % 8 == 0:
            mixed = replace(config, experts=8, experts_per_token=2, expert_ffn=config.ffn // 8)
            asked["mixture of experts"] = replace(load, model=mixed)
        return {name: self.analyse(one) for name, one in asked.items()}

    def _bounds(self, load: Load) -> tuple[Bound, Bound, Case]:
        """Of one user, with the switch as a phase; of as many as share a decode step; the case."""
        case = load.case(1, self.generate)
        swaps = "host" in case.machine.tiers
        one = bound(replace(case, workload=with_switch(case.workload)) if swaps else case)
        together = max(min(load.users, _concurrency(one, case.machine)), 1)
        many = bound(load.case(together, self.generate)) if together > 1 else one
        return one, many, case

    def _view(self, load: Load, bounds: tuple[Bound, Bound, Case], peak: bool) -> LongContext:
        one, many, case = bounds
        held = _concurrency(one, case.machine)
        phases = {p.name: p for p in one.phases}
        prefill, decode = (_seconds(phases[name], peak) for name in ("prefill", "decode"))
        switch = _seconds(phases["switch"], peak) if "switch" in phases else inf
        together = max(min(load.users, held), 1)
        # without a memory to swap to, whoever does not fit waits
        users = load.users if switch < inf else together
        moved = switch if users > held else 0.0
        written = _seconds(many.phase("decode"), peak)
        alone = prefill + self.rounds * (written + moved + self.reading)
        busy = prefill + self.rounds * (written / together + moved)
        rate = min(users / alone, 1 / busy) if held else 0.0
        narrowest = {"concurrency": f"{case.machine.memory}.capacity",
                     **{name: p.narrowest for name, p in phases.items()}}  # fmt: skip
        errors = [p.error for p in one.phases if p.error is not None]
        return LongContext(
            held, prefill, decode, switch, 3600 * rate, float(case.workload.bytes("kv")),
            narrowest, phases["prefill"].fits, None if peak else max(errors, default=None),
        )  # fmt: skip


def longcontext(
    model: TransformerConfig | str | Mapping[str, Any], machine: Machine | str,
    tokens: int, users: int = 1, *, peak: bool = True,
) -> LongContext:  # fmt: skip
    """The four figures of `users` with prompts of `tokens`, at the paper's settings."""
    return LongContextAnalysis().analyse(Load(model, machine, tokens, users), peak)


def _seconds(phase: PhaseBound, peak: bool) -> float:
    return phase.limit_seconds if peak else phase.seconds


def _concurrency(one: Bound, machine: Machine) -> int:
    """Users whose cache and activations fit beside the weights while all decode."""
    level = next(r for r in one.phase("decode").levels if r.resource == machine.memory)
    if level.have is None:
        raise NarrowsError(
            f"machine {machine.name!r} does not say how much its {machine.memory} holds "
            f"({machine.memory}.capacity), so users cannot be counted"
        )
    shared = level.parts.get("weight", 0.0)
    return max(floor((level.have - shared) / (level.need - shared)), 0)


def _load(target: Any) -> Load:
    if isinstance(target, Load):
        return target
    if isinstance(target, tuple) and len(target) == 4:
        return Load(*target)
    raise NarrowsError(
        "longcontext_analysis: measure takes a Load or (model, machine, tokens, users); it was "
        f"given {type(target).__name__}"
    )
