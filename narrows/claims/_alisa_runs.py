"""Three phases really executed: a host behind a rate, steps timed one by one, beside their model.

The model is a random Llama whose heads each have keys of their own: states are half as large as
keys and values then, so that making tokens again is worth something.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from time import perf_counter
from typing import Any

import numpy as np
import torch

from narrows.kv._phases import Costs, Phases, best, plans, window
from narrows.kv.adapter import ATTENTION, hidden_states, stores
from narrows.kv.alisa import ALISA
from narrows.kv.tier import Host

PROMPT, GENERATE, BATCH = 256, 96, 4
LAYERS, HEADS, SIZE = 4, 8, 32
TECHNIQUE = ALISA(0.8, kv_bits=None)


@cache
def model() -> Any:
    """See above."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=HEADS * SIZE, intermediate_size=512, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=SIZE, initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = LlamaForCausalLM(config).eval()
    made.set_attn_implementation(ATTENTION)
    return made


@dataclass(frozen=True)
class Ran:
    """Seconds of each step, bytes that crossed the link in each, and where the choices lay.

    ages: share of the dynamic tokens among the oldest 0 ... 1 of those that are not recent.
    """

    seconds: np.ndarray
    moved: np.ndarray
    ages: np.ndarray


def replaced(plan: Phases | None, rate: float) -> ALISA:
    """TECHNIQUE with a plan, its host behind a rate."""
    settings = TECHNIQUE.sparsity, TECHNIQUE.split, TECHNIQUE.kv_bits
    return ALISA(*settings, plan=plan, host=Host(rate))


def run(plan: Phases | None, rate: float, seed: int = 0) -> Ran:
    """Read a prompt of random tokens, then write GENERATE more, one by one."""
    technique = replaced(plan, rate).of(model())
    host = technique.host
    assert host is not None
    ids = torch.randint(
        1, 512, (BATCH, PROMPT + GENERATE), generator=torch.Generator().manual_seed(seed)
    )
    cache_ = technique.cache(model().config)
    hooks = hidden_states(model()) if technique.needs_hidden else []
    points, seconds, moved = np.linspace(0, 1, 17), [], []
    counts = np.zeros(16)
    try:
        with torch.inference_mode():
            model()(ids[:, :PROMPT], past_key_values=cache_, logits_to_keep=1)
            for i in range(PROMPT, PROMPT + GENERATE):
                begin, before = perf_counter(), host.traffic.bytes
                model()(ids[:, i : i + 1], past_key_values=cache_)
                seconds.append(perf_counter() - begin)
                moved.append(host.traffic.bytes - before)
                older = i + 1 - int(window(i + 1, technique.sparsity, technique.split)[1])
                for store in stores(cache_):
                    slots = store.chosen[:, 0].numpy()  # type: ignore[attr-defined]
                    counts += np.histogram(slots[slots < older] / older, points)[0]
    finally:
        for hook in hooks:
            hook.remove()
    ages = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
    return Ran(np.array(seconds), np.array(moved), ages)


@cache
def apart(rate: float, count: int = 10) -> tuple[float, float]:
    """Seconds that fetching a token and making it again take more than one on the device.

    Of all rows and layers; timed alone, on the store of one layer, `count` tokens a row at a time.
    """
    plan = Phases(0.6, 0.5, 0, 0, PROMPT, GENERATE)
    technique = replaced(plan, rate).of(model())
    made = technique.cache(model().config)
    hooks = hidden_states(model())
    try:
        with torch.inference_mode():
            model()(torch.randint(1, 512, (BATCH, PROMPT)), past_key_values=made)
    finally:
        for hook in hooks:
            hook.remove()
    store: Any = stores(made)[0]
    begins = {"again": 0, "far": store.dropped, "near": store.away}
    spent: dict[str, list[float]] = {name: [] for name in begins}
    with torch.inference_mode():
        for _ in range(50):
            for name, begin in begins.items():
                slots = torch.arange(begin, begin + 5 * count, 5).expand(BATCH, 1, -1)
                start = perf_counter()
                store.take(slots)
                spent[name].append(perf_counter() - start)
    each = {name: float(np.median(x)) * LAYERS / count for name, x in spent.items()}
    return each["far"] - each["near"], each["again"] - each["near"]


@cache
def known(rate: float) -> Costs:
    """What a schedule needs, measured apart from what it is to predict.

    Steps on the device from runs that leave everything there (a straight line through them);
    where choices lie from another text; the link and recomputing timed alone.
    """
    steps = np.arange(GENERATE)
    alone = np.median([run(None, rate).seconds for _ in range(3)], axis=0)
    fetch, again = apart(rate)
    width = HEADS * SIZE
    token = LAYERS * BATCH * 2.0 * width * 4
    return Costs(
        PROMPT, np.polyval(np.polyfit(steps, alone, 1), steps), token_bytes=token,
        state_bytes=LAYERS * BATCH * width * 4.0, link=token / fetch, recompute=again, room=np.inf,
        ages=tuple(run(None, rate, seed=1).ages), sparsity=TECHNIQUE.sparsity,
        split=TECHNIQUE.split,
    )  # fmt: skip


@dataclass(frozen=True)
class Beside:
    """Measured seconds over the model's by phase, one ratio a round, and bytes over the model's.

    bare: medians over what the steps take with all on the device, nothing added.
    """

    ratios: Mapping[str, np.ndarray]
    moved: float
    bare: Mapping[str, float]

    def spread(self) -> float:
        """The widest interquartile range of a phase's ratios, over their median."""
        low, high = np.quantile(np.stack(list(self.ratios.values())), (0.25, 0.75), axis=1)
        return float(((high - low) / np.array([np.median(r) for r in self.ratios.values()])).max())


@cache
def beside_model(plan: Phases, rate: float, rounds: int = 7) -> Beside:
    """A plan's run and one that leaves all on the device take turns; the model adds to the latter.

    What is loaded for a step is loaded at the end of the one before, so that phases begin there.
    """
    told = known(rate).terms(plan)
    extra = told["fetch"] + told["recompute"]
    extra[:-1] += told["states"][1:]
    phases = {"I": (0, plan.p1 - 1), "II": (plan.p1 - 1, plan.p2 - 1), "III": (plan.p2 - 1, None)}
    ratios: dict[str, list[float]] = {name: [] for name in phases}
    bare: dict[str, list[float]] = {name: [] for name in phases}
    moved = 0.0
    for i in range(rounds):
        order = (None, plan) if i % 2 else (plan, None)
        ran = {p is None: run(p, rate) for p in order}
        moved = float(ran[False].moved.sum())
        for name, (begin, end) in phases.items():
            spent = ran[False].seconds[begin:end].sum()
            alone = ran[True].seconds[begin:end].sum()
            bare[name].append(float(spent / alone))
            ratios[name].append(float(spent / (alone + extra[begin:end].sum())))
    return Beside(
        {n: np.array(r) for n, r in ratios.items()},
        moved / float((told["fetch"] + told["states"]).sum() * known(rate).link),
        {n: float(np.median(r)) for n, r in bare.items()},
    )


@dataclass(frozen=True)
class Swept:
    """Every plan of a small grid that fits, executed: seconds of all steps, and the chosen one."""

    seconds: Mapping[Phases, np.ndarray]
    chosen: Phases


@cache
def swept(rate: float, share: float, rounds: int = 2) -> Swept:
    """Plans of a grid under room for `share` of all tokens, all run in turn, `rounds` times."""
    costs = replace(known(rate), room=share * (PROMPT + GENERATE) * known(rate).token_bytes)
    shares, starts = (0.0, 0.25, 0.5, 0.75), 2
    rows, told = plans(costs, shares, starts)
    fits = [
        Phases(float(a), float(b), int(p1), int(p2), PROMPT, GENERATE)
        for a, b, p1, p2 in rows[np.isfinite(told)]
    ]
    chosen = best(costs, shares, starts).plan
    # plans that place tokens alike are one
    unlike: dict[bytes, Phases] = {}
    for plan in [chosen, *fits]:
        terms = costs.terms(plan)
        unlike.setdefault(terms["fetch"].tobytes() + terms["recompute"].tobytes(), plan)
    seconds: dict[Phases, list[float]] = {plan: [] for plan in unlike.values()}
    for i in range(rounds):
        every = list(seconds)
        for plan in every if i % 2 else reversed(every):
            seconds[plan].append(float(run(plan, rate).seconds.sum()))
    return Swept({p: np.array(s) for p, s in seconds.items()}, chosen)
