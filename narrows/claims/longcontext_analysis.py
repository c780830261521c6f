"""Fu 2024 (arXiv 2405.08944, version 1): its figures counted again, and what it left out.

The four figures are from a secondary page (argminai, on 2405.08944v1), which gives them without
units of context (50K, 4K) or the formulas; the abstract, the formula of the context switch and the
sentence on tensor parallelism are the paper's own. The rest of its text, with the session's rounds,
reading times and its tables for MoE and attention types, could not be read here, so those settings
are ours (LongContextAnalysis) and no claim rests on them. 50K is taken as 50,000 and 4K as 4,096.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

from narrows import index
from narrows.core.bound import bound
from narrows.core.case import Case
from narrows.core.claim import Figure, Inconclusive, claim
from narrows.core.errors import NarrowsError
from narrows.core.method import Technique
from narrows.machines.load import load
from narrows.serving import fu2024, longcontext_analysis
from narrows.serving.compress import compress
from narrows.serving.long_load import Load
from narrows.serving.longcontext_analysis import LongContext, LongContextAnalysis
from narrows.trace.config import TransformerConfig
from narrows.trace.llm import llm

CARD = "systems/serving.md, card longcontext_analysis"
PAGE = "argminai on arXiv 2405.08944v1"
SETTING = "Yi-34B bf16 on one A100-80 at 312e12 flop/s, 2e12 B/s, 80 GiB, PCIe 20e9 B/s"
PAPER_DEFAULTS = {"generate": 250}
LONG, SHORT = 50_000, 4_096
YI, A100 = fu2024.YI_34B, fu2024.A100
HERE = (512, 1024, 2048, 4096, 8192)
WORST_CALIBRATION = 0.5
"""p90 error of the machine's own calibration above which nothing can be held against it."""


@contextmanager
def mutant() -> Iterator[str]:
    """Weights take no memory: the figure of users held must notice."""
    sound = longcontext_analysis._concurrency

    def broken(one: Any, machine: Any) -> int:
        phases = tuple(
            replace(p, levels=tuple(
                replace(r, need=r.need - r.parts["weight"], parts={**r.parts, "weight": 0.0})
                if "weight" in r.parts else r for r in p.levels
            )) for p in one.phases
        )  # fmt: skip
        return sound(replace(one, phases=phases), machine)

    longcontext_analysis._concurrency = broken
    try:
        yield users_at_50k.name
    finally:
        longcontext_analysis._concurrency = sound


def _peak(tokens: int, **changes: Any) -> LongContext:
    """The four figures of the running example, counted exactly at the paper's rates."""
    machine = fu2024.as_assumed(load("a100-80"))
    return LongContextAnalysis().analyse(Load("yi-34b", machine, tokens, **changes))


# --- prefill -------------------------------------------------------------------------------------


@claim(
    expected=14.1, tolerance=0.03, unit="s", how="exact", source=PAGE,
    setting=f"{SETTING}, prompt of 50,000, the paper's arithmetic (attention L*S*d a token)",
    control="with both products counted it is 17.8 (see details)",
)  # fmt: skip
def prefill_50k_as_printed() -> Figure:
    """S * (2 P + L * S * d) / flops with P = 34e9."""
    return Figure(
        fu2024.prefill_seconds(YI, A100, LONG),
        details={
            "both products counted": fu2024.prefill_seconds(YI, A100, LONG, attention=2),
            "50K as 49,152": fu2024.prefill_seconds(YI, A100, 48 * 1024),
        },
    )


@claim(
    expected=0.89, tolerance=0.03, unit="s", how="exact", source=PAGE,
    setting=f"{SETTING}, prompt of 4,096, the paper's arithmetic",
)  # fmt: skip
def prefill_4k_as_printed() -> Figure:
    """Nearest with 4K as 4,000 tokens, or with attention left out."""
    return Figure(
        fu2024.prefill_seconds(YI, A100, SHORT),
        details={
            "4K as 4,000": fu2024.prefill_seconds(YI, A100, 4000),
            "no attention": fu2024.prefill_seconds(YI, A100, SHORT, attention=0),
        },
    )


@claim(
    expected=1.0, tolerance=0.15, unit="L*S*d operations a token", how="exact", source=CARD,
    setting="the published 14.1 s at 50K and 0.89 s at 4K solved for what attention is charged",
    control="exact causal counting charges 2",
)  # fmt: skip
def attention_charged() -> Figure:
    """Two equations, two unknowns; details: the other readings of 50K and 4K, and P."""
    found, parameters = fu2024.attention_coefficient(YI, A100, (LONG, 14.1), (SHORT, 0.89))
    others = {
        f"{s} and {z}": fu2024.attention_coefficient(YI, A100, (s, 14.1), (z, 0.89))[0]
        for s, z in ((50_000, 4_000), (48 * 1024, 4_096))
    }
    ends = sorted((found, *others.values()))
    return Figure(found, (ends[0], ends[-1]), details={**others, "parameters": parameters})


def _counted(tokens: int) -> Figure:
    """Operations of the closed form over the machine's rate; the whole step beside it."""
    machine = fu2024.as_assumed(load("a100-80"))
    asked = Load("yi-34b", machine, tokens)
    phase = bound(asked.case(1, 250)).phase("prefill")
    real = LongContextAnalysis().analyse(replace(asked, machine="a100-80"), peak=False)
    return Figure(
        phase.flops / machine.compute("bf16").capacity,
        details={
            "with norms, positions and activations through memory": phase.limit_seconds,
            "as A100-80 is calibrated": real.prefill_s,
        },
    )


@claim(
    expected=17.8, tolerance=0.03, unit="s", how="exact", source=CARD,
    setting=f"{SETTING}, prompt of 50,000, exact causal counting (2*L*S*d a token)",
    control="the paper's arithmetic gives 14.3",
)  # fmt: skip
def prefill_50k_counted() -> Figure:
    """Logits of the last token only, embedding looked up: a little less than 2 P a token."""
    return _counted(LONG)


@claim(
    expected=0.94, tolerance=0.03, unit="s", how="exact", source=CARD,
    setting=f"{SETTING}, prompt of 4,096, exact causal counting",
)  # fmt: skip
def prefill_4k_counted() -> Figure:
    """As prefill_50k_counted."""
    return _counted(SHORT)


# --- decode --------------------------------------------------------------------------------------


def _decoded(tokens: int) -> Figure:
    datasheet = LongContextAnalysis().analyse(Load("yi-34b", "a100-80", tokens))
    real = LongContextAnalysis().analyse(Load("yi-34b", "a100-80", tokens), peak=False)
    return Figure(
        _peak(tokens).decode_s,
        details={
            "the paper's arithmetic": fu2024.decode_seconds(YI, A100, tokens),
            "at the datasheet's 2.039e12 B/s": datasheet.decode_s,
            "as A100-80 is calibrated": real.decode_s,
        },
    )


@claim(
    expected=9.8, tolerance=0.03, unit="s", how="exact", source=PAGE,
    setting=f"{SETTING}, 250 tokens after a prompt of 50,000",
)  # fmt: skip
def decode_50k() -> Figure:
    """Weights read (all but the embedding), the growing cache, at every token."""
    return _decoded(LONG)


@claim(
    expected=8.5, tolerance=0.03, unit="s", how="exact", source=PAGE,
    setting=f"{SETTING}, 250 tokens after a prompt of 4,096",
)  # fmt: skip
def decode_4k() -> Figure:
    """As decode_50k."""
    return _decoded(SHORT)


@claim(
    expected=1.0, tolerance=0.01, unit="of the extra decode seconds", how="exact",
    source="abstract: all additional costs, compared to 4K context, trace back to the KV cache",
    setting=f"{SETTING}, decode of 250 tokens after 50,000 against after 4,096",
)  # fmt: skip
def extra_decode_is_the_cache() -> float:
    """Seconds to read the bytes that the longer cache has more, over the seconds it costs more."""
    long, short = _peak(LONG), _peak(SHORT)
    read = 250 * (long.kv_bytes - short.kv_bytes) / A100.bandwidth
    return read / (long.decode_s - short.decode_s)


# --- concurrency and switching -------------------------------------------------------------------


@claim(
    expected=12.3e9, tolerance=0.005, unit="byte", how="exact", source=CARD,
    setting="keys and values of 50,000 tokens of Yi-34B, bf16",
)  # fmt: skip
def cache_at_50k() -> Figure:
    """2 * 60 * 8 * 128 * 50,000 * 2: the paper's 11 GB is this in gibibytes."""
    found = float(llm("yi-34b", LONG, 0).bytes("kv"))
    return Figure(found, details={"GiB": found / 2**30})


@claim(
    expected=1.0, unit="users", how="exact", source=PAGE, control="mutant(): weights left out",
    setting=f"{SETTING}, prompts of 50,000",
)  # fmt: skip
def users_at_50k() -> Figure:
    """With 80e9 bytes instead of 80 GiB nobody fits; neither does the prompt in one piece."""
    told = _peak(LONG)
    small = fu2024.as_assumed(load("a100-80"), replace(A100, capacity=80e9))
    tight = LongContextAnalysis().analyse(Load("yi-34b", small, LONG))
    return Figure(
        float(told.concurrency),
        details={
            "the paper's arithmetic": fu2024.concurrency(YI, A100, LONG),
            "of 80e9 bytes": tight.concurrency,
            "prefill in one piece fits": str(told.prefill_fits),
        },
    )


@claim(
    expected=20.0, tolerance=0.1, unit="users", how="exact", source=PAGE,
    setting=f"{SETTING}, prompts of 4,096",
    explained="about 20 is a round figure of a secondary page; (80 GiB - 68e9) over a cache of "
    "4,096 tokens is 17.8, and the 250 tokens of an answer cost one user more",
)  # fmt: skip
def users_at_4k() -> Figure:
    """Weights of 34.39e9 parameters, caches with the answer, and what decoding needs."""
    return Figure(
        float(_peak(SHORT).concurrency),
        details={"the paper's arithmetic": fu2024.concurrency(YI, A100, SHORT)},
    )


@claim(
    expected=1.0, tolerance=0.01, unit="of (KV + KV) / PCIe", how="exact",
    source="text: context switching overhead = (user 1's KV + user 2's KV) / PCIe bandwidth",
    setting=f"{SETTING}, users with 50,000 tokens, priced as two transfers through the host link",
)  # fmt: skip
def switch_at_50k() -> Figure:
    """Ours moves the answer's tokens too. A duplex link could take half of it."""
    told = _peak(LONG)
    printed = fu2024.switch_seconds(YI, A100, LONG)
    return Figure(
        told.switch_s / printed, details={"s": told.switch_s, "narrowest": told.narrowest["switch"]}
    )


# --- what acts on the four figures ---------------------------------------------------------------


@claim(
    expected=1.0, tolerance=0.05, unit="users a device, from 4 to 8 over from 2 to 4", how="exact",
    source="text: 2, 4 and 8 devices introduce more HBM, thus linearly increasing concurrency",
    setting=f"{SETTING} each, tensor parallel, prompts of 50,000",
)  # fmt: skip
def users_grow_linearly_with_devices() -> Figure:
    """A straight line, but not through zero: the weights are paid once, so 8 hold 50, not 8."""
    held = {tp: float(_peak(LONG, tp=tp).concurrency) for tp in (1, 2, 4, 8)}
    slope = ((held[8] - held[4]) / 4) / ((held[4] - held[2]) / 2)
    return Figure(slope, details={f"tp {tp}": users for tp, users in held.items()})


@claim(
    expected=(0.0, 0.05), unit="of the seconds", how="modelled",
    source="text: tensor parallelism speeds inference up with negligible communication",
    setting="Yi-34B bf16 on 8 A100-80 as calibrated, prefill of 50,000 tokens, all-reduce",
    explained="by bytes alone the all-reduces of prefill are a sixth of its least time on 8 "
    "devices, and the cost of starting two a layer rules decode; the paper counts neither",
)  # fmt: skip
def tensor_parallelism_talks_for_free() -> Figure:
    """Share of prefill; details: of decode, and of prefill's least time at datasheet rates."""
    found = bound(Load("yi-34b", "a100-80", LONG, tp=8).case(1, 250))
    shares: dict[str, float] = {}
    for phase in found.phases:
        talk = [r for r in phase.rows if r.op == "all_reduce"]
        shares[phase.name] = sum(r.share for r in talk)
        shares[f"{phase.name}, at the peak"] = sum(r.limit for r in talk) / phase.limit_seconds
    return Figure(shares.pop("prefill"), details={**shares})


@claim(
    expected=1 / 16, unit="of the prompt's cache", how="exact",
    source="text: compression by layer, head, token and hidden dimension",
    setting="half of the layers, heads, tokens and channels each: four axes of one tensor",
)  # fmt: skip
def four_compressions_multiply() -> float:
    """Different axes compose; nothing is counted twice."""
    work = llm("yi-34b", LONG, 250)
    less = compress(work, layer=0.5, head=0.5, token=0.5, hidden=0.5)
    prompt = ("kv.prompt.key", "kv.prompt.value")
    before, after = (sum(float(w.tensors[n].bytes()) for n in prompt) for w in (work, less))
    return after / before


@claim(
    expected=(1.0, float("inf")), unit="times fewer bytes to swap", how="modelled", cost=5.0,
    source=f"{CARD}, works when (c)",
    setting=f"{SETTING}, prompts of 50,000, 20 users; every technique of kv, own settings, that "
    "leaves the cache on the device: one in drives is not switched at all",
)  # fmt: skip
def kv_techniques_through_the_four_figures() -> Figure:
    """The least gain in switching among them; details: all four figures of each."""
    machine = fu2024.as_assumed(load("a100-80"))
    asked = Load("yi-34b", machine, LONG, 20)
    case = asked.case(1, 250)
    techniques: dict[str, Technique] = {}
    for entry in index.built("technique"):
        if entry.folder == "kv":
            method: Any = index.load(entry.key)
            for i, one in enumerate(method.variants(case)):
                techniques[entry.key if not i else f"{entry.key}, variant {i + 1}"] = one
    told = LongContextAnalysis().compare(asked, techniques)
    dense = told.pop("dense")
    assert isinstance(dense, LongContext)
    gains = [
        dense.switch_s / t.switch_s for name, t in told.items()
        if isinstance(t, LongContext) and _on_device(case.with_(techniques[name]))
    ]  # fmt: skip
    if not gains:
        raise Inconclusive("no technique in kv could be asked")
    rows = {name: t if isinstance(t, str) else _row(t) for name, t in told.items()}
    return Figure(min(gains), details={"dense": _row(dense), **rows})


def _on_device(case: Case) -> bool:
    return all(t.tier == "device" for t in case.workload.role("kv"))


def _row(told: LongContext) -> str:
    return (
        f"{told.concurrency} users, prefill {told.prefill_s:.4g} s, decode {told.decode_s:.4g} s, "
        f"switch {told.switch_s:.3g} s, {told.sessions_per_hour:.4g} sessions/h"
    )


# --- a small model here --------------------------------------------------------------------------


def _small(hidden: int = 256, layers: int = 4) -> tuple[Any, TransformerConfig]:
    """A random Llama with grouped queries, fp32, and its configuration for the closed form."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from narrows.kv.adapter import ATTENTION

    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=hidden // 4,
        max_position_embeddings=16384,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation(ATTENTION)
    return model, TransformerConfig.from_json(config.to_dict(), "small")


def _read(model: Any, tokens: int) -> Any:
    """A cache in place with a prompt of so many tokens in it."""
    import torch

    from narrows.kv.adapter import KVCache
    from narrows.measure.generation import prompts

    held = KVCache(model.config)
    with torch.inference_mode():
        ids = prompts(model.config.vocab_size, 1, tokens)
        model(ids, past_key_values=held, use_cache=True, logits_to_keep=1)
    return held


@claim(
    expected=1.0, unit="measured over derived", how="measured", cost=15.0, needs=("torch",),
    source=f"{CARD}, works when (b)",
    setting="keys and values held for 512 to 8,192 tokens of a small Llama, fp32",
)  # fmt: skip
def cache_bytes_here() -> Figure:
    """Elements in the live tensors times their size; the worst of the lengths."""
    from narrows.kv.adapter import nbytes

    model, config = _small(hidden=64, layers=2)
    found: dict[str, float | str] = {}
    worst = 1.0
    for tokens in HERE:
        derived = float(llm(config, tokens, 0, dtype="fp32").bytes("kv"))
        ratio = nbytes(_read(model, tokens)) / derived
        found[f"{tokens} tokens"] = ratio
        worst = max(worst, ratio, key=lambda r: abs(r - 1))
    return Figure(worst, details=found)


@cache
def _bounds_here() -> dict[int, dict[str, float]]:
    """Predicted seconds of prefill and of one decode step on this machine, by tokens."""
    from narrows import door
    from narrows.core.plan import Plan

    try:
        machine = door.machine("here")
    except NarrowsError as error:
        raise Inconclusive(str(error)) from error
    _, config = _small()
    found: dict[int, dict[str, float]] = {}
    for tokens in HERE:
        told = bound(Case(llm(config, tokens, 1, dtype="fp32"), machine, Plan(("flash",))))
        worst = max(1.0 if p.error is None else p.error for p in told.phases)
        if worst > WORST_CALIBRATION:
            raise Inconclusive(
                f"this machine's calibration errs by {worst:.0%} (p90): it was busy when it was "
                "measured; run narrows machine --fresh when it is quiet"
            )
        found[tokens] = {p.name: p.seconds for p in told.phases}
    return found


def _growth(phase: str, calls: dict[int, Callable[[], object]], repeats: int) -> Figure:
    """How far measured growth over the shortest length is from the derived, at worst."""
    from narrows.measure.timing import interleave

    told = _bounds_here()
    timings = interleave({str(n): call for n, call in calls.items()}, repeats, warmup=1)
    first = str(HERE[0])
    details: dict[str, float | str] = {}
    worst, ends = 1.0, (1.0, 1.0)
    for tokens in HERE[1:]:
        got = timings.ratio(str(tokens), to=first)
        if not got.quiet:
            raise Inconclusive(f"the machine is not quiet: ratios spread {got.spread:.0%}")
        hoped = told[tokens][phase] / told[HERE[0]][phase]
        details[f"{tokens} tokens"] = f"{got.median:.3g} times, derived {hoped:.3g}"
        if abs(got.median / hoped - 1) >= abs(worst - 1):
            worst, ends = got.median / hoped, (got.low / hoped, got.high / hoped)
    for tokens in HERE:
        share = timings[str(tokens)].median / told[tokens][phase]
        details[f"{tokens} tokens, measured over derived seconds"] = share
    return Figure(worst, ends, 1.0, details)


@claim(
    expected=(0.8, 1.2), unit="measured over derived growth", how="measured", cost=180.0,
    needs=("torch",), source=f"{CARD}, works when (b)",
    setting="prefill of 1,024 to 8,192 tokens over 512, 4 layers of 256 channels, fp32, here",
)  # fmt: skip
def prefill_growth_here() -> Figure:
    """Both sides as ratios to the shortest prompt, rounds interleaved; the worst length."""
    model, _ = _small()
    calls = {n: (lambda n=n: _read(model, n)) for n in HERE}
    return _growth("prefill", calls, repeats=9)


@claim(
    expected=(0.8, 1.2), unit="measured over derived growth", how="measured", cost=60.0,
    needs=("torch",), source=f"{CARD}, works when (b)",
    setting="a decode step after 1,024 to 8,192 tokens over one after 512, as prefill_growth_here",
)  # fmt: skip
def decode_growth_here() -> Figure:
    """Caches in place; every step makes its cache a token longer."""
    import torch

    model, _ = _small()
    token = torch.ones(1, 1, dtype=torch.int64)
    caches = {n: _read(model, n) for n in HERE}

    def step(tokens: int) -> object:
        with torch.inference_mode():
            return model(token, past_key_values=caches[tokens], use_cache=True)

    return _growth("decode", {n: (lambda n=n: step(n)) for n in HERE}, repeats=31)
