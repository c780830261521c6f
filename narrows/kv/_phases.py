"""Three phases of a cache that outgrows the device, and the choice of their parameters by a grid.

Phase I: all tokens lie on the device. Phase II, from step p1: the oldest `alpha` of them lie on
the host, and those that a step chooses are fetched. Phase III, from step p2: the oldest `beta` of
the host's are deleted and made again from the states that came into attention, which then lie on
the device. Steps are decode steps, from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.core.tensor import Number

if TYPE_CHECKING:
    from narrows.kv.alisa import ALISA

SHARES = tuple(float(x) for x in np.linspace(0, 1, 21))
"""Values of alpha and beta that are tried."""

STARTS = 64
"""Values of p1 and p2 that are tried, spread evenly over the steps; all of fewer steps."""

EVEN = (0.0, 1.0)
"""Dynamic tokens come evenly from all ages; see Costs.ages."""


def window(tokens: Any, sparsity: float, split: float) -> tuple[Any, Any]:
    """Tokens attended of so many, and how many of them are the most recent ones.

    Whole numbers or arrays of them; at least the newest token is attended.
    """
    tokens = np.asarray(tokens)
    least = np.minimum(tokens, 1)
    chosen = np.maximum(np.ceil(tokens * (1 - sparsity) - 1e-9), least)
    recent = np.clip(np.ceil(chosen * split - 1e-9), least, chosen)
    return chosen.astype(np.int64), recent.astype(np.int64)


@dataclass(frozen=True, slots=True)
class Phases:
    """Which tokens lie where. alpha, beta: shares, see above. p1, p2: decode steps.

    prompt, generate: tokens read and written, which the steps count from and to.
    """

    alpha: float
    beta: float
    p1: int
    p2: int
    prompt: int
    generate: int

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise NarrowsError(
                    f"alisa: {name} is a share of tokens from 0 to 1, not {getattr(self, name)!r}"
                )
        if not 0 <= self.p1 <= self.p2:
            raise NarrowsError(
                f"alisa: phases begin in order, at steps 0 <= p1 <= p2, not {self.p1} and {self.p2}"
            )
        if self.prompt < 0 or self.generate < 0:
            raise NarrowsError("alisa: a plan is for a prompt and an answer of no less than 0")

    def phase(self, seen: Any) -> Any:
        """1, 2 or 3 of the step that follows so many tokens."""
        step = np.asarray(seen) - self.prompt
        return 1 + (step >= self.p1) + (step >= self.p2)

    def place(self, seen: Any, recent: Any) -> tuple[Any, Any]:
        """Tokens dropped, and tokens not on the device (those included), of so many seen.

        The oldest come first; `recent` ones never leave. Of the prompt only: a token is dropped
        where its state was saved, and the states of a prompt are.
        """
        seen, phase = np.asarray(seen), self.phase(seen)
        away = np.minimum(np.floor(self.alpha * seen + 1e-9), np.maximum(seen - recent, 0))
        away = np.where(phase > 1, away, 0).astype(np.int64)
        dropped = np.minimum(np.floor(self.beta * away + 1e-9), self.prompt)
        return np.where(phase > 2, dropped, 0).astype(np.int64), away

    @property
    def saved(self) -> int:
        """Tokens whose states are needed at some time."""
        if self.p2 >= self.generate:
            return 0
        away = np.floor(self.alpha * (self.prompt + self.generate) + 1e-9)
        return int(min(np.floor(self.beta * away + 1e-9), self.prompt))


@dataclass(frozen=True)
class Costs:
    """What a schedule is chosen by.

    device: seconds of each decode step with all tokens on the device. token_bytes: of a token's
    keys and values over all layers and rows, as they cross the link. state_bytes: of the states
    of one token. link: bytes a second. recompute: seconds to make the keys and values of one
    token again, in all layers and rows. room: bytes of the device for keys, values and states;
    host_room: of the host, None where it is not known. ages: share of the dynamic tokens among
    the oldest 0 ... 1 of those that are not recent, at evenly spaced points (EVEN: none is
    preferred); a model that looks back far has more.
    """

    prompt: int
    device: np.ndarray
    token_bytes: float
    state_bytes: float
    link: float
    recompute: float
    room: float
    host_room: float | None = None
    ages: Sequence[float] = EVEN
    sparsity: float = 0.8
    split: float = 0.5

    @property
    def generate(self) -> int:
        """Decode steps."""
        return len(self.device)

    def terms(self, plan: Phases) -> dict[str, np.ndarray]:
        """Seconds of each step: on the device, fetching, recomputing, loading states.

        And what is held after it is set up: bytes on the `room` and the `host`.
        """
        seen = self.prompt + np.arange(self.generate)
        total, recent = window(seen + 1, self.sparsity, self.split)
        dropped, away = plan.place(seen, recent)
        older, dynamic = np.maximum(seen + 1 - recent, 1), total - recent
        cold, made = (dynamic * self._aged(x / older) for x in (away, dropped))
        loaded = np.diff(dropped, prepend=0)
        states = np.maximum(plan.saved - dropped, 0)
        return {
            "device": np.asarray(self.device, float),
            "fetch": (cold - made) * self.token_bytes / self.link,
            "recompute": made * self.recompute,
            "states": loaded * self.state_bytes / self.link,
            "room": (seen + 1 - away) * self.token_bytes + dropped * self.state_bytes,
            "host": (away - dropped) * self.token_bytes + states * self.state_bytes,
        }

    def steps(self, plan: Phases) -> np.ndarray:
        """Seconds of each step."""
        told = self.terms(plan)
        return told["device"] + told["fetch"] + told["recompute"] + told["states"]

    def fits(self, plan: Phases) -> bool:
        """Whether the plan stays within both memories at every step."""
        told = self.terms(plan)
        host = self.host_room is None or bool((told["host"] <= self.host_room).all())
        return bool((told["room"] <= self.room).all()) and host

    def _aged(self, share: np.ndarray) -> np.ndarray:
        return np.interp(share, np.linspace(0, 1, len(self.ages)), self.ages)

    @classmethod
    def of(
        cls, case: Case, technique: ALISA, room: float | None = None, ages: Sequence[float] = EVEN
    ) -> Costs:
        """From a case (scalars, not rewritten yet) and what its machine's bound says.

        room: bytes of the device for the cache; None: what weights leave of nine tenths of it.
        """
        from narrows.core.fusion import fuse
        from narrows.core.price import price
        from narrows.trace.llm import llm

        facts, machine = case.workload.facts, case.machine
        prompt, generate = (int(np.max(facts[n])) for n in ("prompt", "generate"))
        batch = int(np.max(facts["batch"]))
        if generate < 1:
            raise NarrowsError("alisa: nothing is decoded, so there is nothing to schedule")
        if "host" not in machine.tiers:
            raise NarrowsError(
                f"alisa: machine {machine.name} has no tier 'host' to keep tokens in; without one "
                "use ALISA() without a plan"
            )
        lengths = prompt + np.arange(generate)
        work = llm(
            facts["config"], lengths, 1, batch, facts["dtype"], facts["kv_dtype"],
            tp=facts["devices"],
        )  # fmt: skip
        full = case.workload.tensors["kv.prompt.key"].codec.bits_per_element
        bits = technique.element_bits or full
        there = technique.planned(None).predict(replace(case, workload=work))
        work = fuse(there.workload, case.plan.fusion)
        decode = next(p for p in price(work, machine) if p.phase.name == "decode")
        layers, width = float(facts["layers"]), float(facts["hidden"])
        channels = 2.0 * float(facts["kv_heads"]) * float(facts["head_dim"])
        shared = float(facts["devices"])
        rate = machine.compute(facts["dtype"]).capacity
        if room is None:
            have = machine.capacity("device")
            if have is None:
                raise NarrowsError(
                    f"alisa: the memory of {machine.name} is not known; give room=, in bytes"
                )
            room = 0.9 * have - float(np.max(case.workload.bytes("weight")))
        if room <= 0:
            raise NarrowsError(
                f"alisa: the weights of {case.workload.name} leave no room for a cache on "
                f"{machine.name}; take more devices or fewer bits"
            )
        return cls(
            prompt, np.broadcast_to(decode.total_seconds, generate),
            token_bytes=layers * batch * channels / shared * bits / 8,
            state_bytes=layers * batch * width * full / 8,
            link=machine.bandwidth("host"),
            recompute=layers * batch * 2.0 * width * channels / shared / rate,
            room=room, host_room=machine.capacity("host"), ages=ages,
            sparsity=technique.sparsity, split=technique.split,
        )  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """The best plan, the seconds of each of its steps, and how many plans it was chosen from."""

    plan: Phases
    steps: np.ndarray
    tried: int

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return float(self.steps.sum())


def plans(
    costs: Costs, shares: Sequence[float] = SHARES, starts: int = STARTS
) -> tuple[np.ndarray, np.ndarray]:
    """All plans of a grid, (n, 4) of alpha, beta, p1 and p2, and the seconds of each, (n,).

    Infinite where a memory is exceeded. A plan's steps are those of three plans that have one
    phase only, so sums over the steps of these give all pairs of p1 and p2 at once.
    """
    generate = costs.generate
    begins = np.unique(np.linspace(0, generate, min(starts, generate) + 1).astype(int))
    first, second = np.meshgrid(begins, begins, indexing="ij")
    ordered = first <= second
    first, second = first[ordered], second[ordered]
    never, prompt = generate, costs.prompt

    def ranges(plan: Phases) -> tuple[np.ndarray, np.ndarray]:
        """Sums up to each step of its seconds, and of the steps at which a memory overflows."""
        told = costs.terms(plan)
        over = told["room"] > costs.room
        if costs.host_room is not None:
            over |= told["host"] > costs.host_room
        spent = told["device"] + told["fetch"] + told["recompute"] + told["states"]
        return tuple(np.concatenate([[0], np.cumsum(x)]) for x in (spent, over))  # type: ignore

    def between(sums: tuple[np.ndarray, np.ndarray], begin: Any, end: Any) -> np.ndarray:
        total = sums[0][end] - sums[0][begin]
        return np.where(sums[1][end] > sums[1][begin], np.inf, total)

    rows: list[np.ndarray] = []
    seconds: list[np.ndarray] = []
    one = ranges(Phases(0.0, 0.0, never, never, prompt, generate))
    for alpha in shares:
        for beta in shares if alpha else (0.0,):
            # with a third phase to come, states wait on the host from the beginning
            late = Phases(alpha, beta, 0, never - 1 if beta else never, prompt, generate)
            last = Phases(alpha, beta, 0, 0, prompt, generate)
            waiting = late.saved * costs.state_bytes
            if costs.host_room is not None and waiting > costs.host_room:
                continue
            two, three = ranges(late), ranges(last)
            # the states that the first step of phase III loads at once
            loaded = np.append(np.cumsum(costs.terms(last)["states"]), 0.0)
            entry = np.where((second > 0) & (second < never), loaded[second - 1], 0.0)
            total = (
                between(one, 0, first) + between(two, first, second)
                + between(three, second, never) + entry
            )  # fmt: skip
            if beta:  # a third phase that never comes is beta = 0
                total = np.where(second == never, np.inf, total)
            shape = [np.full(len(first), x) for x in (alpha, beta)]
            rows.append(np.stack([*shape, first, second], 1))
            seconds.append(total)
    return np.concatenate(rows), np.concatenate(seconds)


def best(costs: Costs, shares: Sequence[float] = SHARES, starts: int = STARTS) -> Schedule:
    """The plan of the grid that takes least time; of equals the one that moves least and latest.

    Raises NarrowsError where no plan fits.
    """
    rows, seconds = plans(costs, shares, starts)
    if not np.isfinite(seconds).any():
        last = costs.prompt + costs.generate
        recent = int(window(last, costs.sparsity, costs.split)[1])
        raise NarrowsError(
            f"alisa: no plan fits: of {last} tokens the {recent} most recent alone take "
            f"{recent * costs.token_bytes:.3g} bytes of {costs.room:.3g} on the device, or the "
            "rest exceeds the host; take a smaller batch, a higher sparsity or fewer bits"
        )
    near = seconds <= seconds.min() * (1 + 1e-9)
    alpha, beta, p1, p2 = min(
        (tuple(r) for r in rows[near]), key=lambda r: (r[0], r[1], -r[2], -r[3])
    )
    plan = Phases(float(alpha), float(beta), int(p1), int(p2), costs.prompt, costs.generate)
    return Schedule(plan, costs.steps(plan), len(seconds))


def means(
    prompt: Number, generate: Number, sparsity: float, split: float, steps: int
) -> dict[str, Number]:
    """Means over decode steps: tokens attended of the prompt and of the new ones, and recent ones.

    Dynamic tokens are taken as spread evenly over those that are not recent. Arrays work.
    """
    prompt, generate = np.broadcast_arrays(np.asarray(prompt, float), np.asarray(generate, float))
    made = np.floor(np.linspace(0, 1, steps) * np.maximum(generate - 1, 0)[..., None])
    total, recent = window(prompt[..., None] + made, sparsity, split)
    near = np.minimum(recent, made)
    older = np.maximum(prompt[..., None] + made - recent, 1)
    new = near + (total - recent) * (made - near) / older
    told = {"new": new, "prompt": total - new, "recent": recent, "total": total}
    found = {name: x.mean(-1) for name, x in told.items()}
    return {name: float(x) if x.ndim == 0 else x for name, x in found.items()}
