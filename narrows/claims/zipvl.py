"""ZipVL (arXiv 2410.08584): what its paper and its card say, and what comes out here.

The paper's models see images; none of them belongs here. Quality figures are of recall-lm, a text
model, as a named substitute: they test the mechanism, not vision. Speed and memory of LongVA-7B
are modelled from the shape of its language model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from narrows.claims._snapkv import random_model
from narrows.claims._zipvl import (
    answers,
    by_definition,
    fixed,
    overlap,
    random_prompt,
    ratios_of,
    store_of,
)
from narrows.core.case import Case
from narrows.core.claim import Figure, Inconclusive, claim
from narrows.core.plan import Plan
from narrows.kv.zipvl import ZipVL
from narrows.machines.load import load
from narrows.trace.llm import llm

ABSTRACT = "abstract"
CARD = "systems/kv_cache.md, card zipvl, works when"
PAPER_DEFAULTS = {"tau": 0.975, "bits": (4, 2), "probes": (64, 64), "refresh": 100}
"""Section of experiments, as the card has it; the number of probes is as remembered."""

FRAMES = 128 * 144
"""Tokens of 128 frames in LongVA: 144 each."""


@contextmanager
def mutant() -> Iterator[str]:
    """Tokens chosen by accumulated instead of normalised scores; the claim that must notice."""
    from narrows.kv.zipvl_torch import Chooser

    sound = Chooser.scores

    def broken(self: Any, *given: Any) -> Any:
        accumulated, _ = sound(self, *given)
        return accumulated, accumulated.clone()

    Chooser.scores = broken  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield tokens_chosen_are_those_of_the_definition.name
    finally:
        Chooser.scores = sound


# --- exact ---------------------------------------------------------------------------------------

TAUS = (0.5, 0.9, 0.96, 0.975, 0.999)


@claim(
    expected=1.0, unit="share of tokens", how="exact", cost=2.0, needs=("torch",),
    source="Algorithm 1 of the paper: the fewest by accumulated, the best by normalised scores",
    setting="random peaked attention, 8 heads over 2 KV heads, 2 prompts each of 40 and 200 "
    "tokens, five values of tau; the last token is always taken",
    control="mutant(): chosen by accumulated scores",
)  # fmt: skip
def tokens_chosen_are_those_of_the_definition() -> float:
    """Share of the tokens that are important by definition which are found so."""
    same = total = 0
    for tau in TAUS:
        technique = ZipVL(tau, probes=(16, 16))
        for tokens in (40, 200):
            asked = random_prompt(tokens)
            for row, mask in enumerate(technique.chooser.choose(asked)):
                wanted, _ = by_definition(asked, row, technique)
                same += int(mask[wanted].sum())
                total += len(wanted)
    return same / total


@claim(
    expected=0.0, unit="tokens", how="exact", cost=2.0, needs=("torch",), source=CARD,
    setting="as tokens_chosen_are_those_of_the_definition: numbers found by trying 1, 2, 3, ...",
)  # fmt: skip
def count_beside_brute_force() -> Figure:
    """Largest difference in the number of important tokens."""
    worst, counts = 0, []
    for tau in TAUS:
        technique = ZipVL(tau, probes=(16, 16))
        for tokens in (40, 200):
            asked = random_prompt(tokens)
            for row, mask in enumerate(technique.chooser.choose(asked)):
                count = by_definition(asked, row, technique)[1]
                worst = max(worst, abs(int(mask.sum()) - count))
                counts.append(count / tokens)
    return Figure(float(worst), details={"least ratio": min(counts), "largest": max(counts)})


@claim(
    expected=0.0, unit="largest difference of logits", how="exact", cost=2.0, needs=("torch",),
    source=CARD, setting="random Llama, 2 x 200 tokens, tau 1 against the dense cache",
    control="tau 0.9 gives another figure (details)",
)  # fmt: skip
def prefill_at_tau_one() -> Figure:
    """Bit-identical: every token is important, so prefill attention is left alone."""
    import torch

    model = random_model()
    ids = torch.randint(1, 128, (2, 200), generator=torch.Generator().manual_seed(0))
    found: list[float] = []
    with torch.inference_mode():
        dense = model(ids).logits
        for tau in (1.0, 0.9):
            with ZipVL(tau, probes=(16, 16)).apply(model):
                found.append(float((model(ids).logits - dense).abs().max()))
    return Figure(found[0], details={"tau 0.9": found[1]})


@claim(
    expected=(0.0, 1e-5), unit="largest difference", how="exact", cost=3.0, needs=("torch",),
    source="house rule: attention over codes equals attention over what they stand for",
    setting="2 rows of 1,300 tokens packed and 9 new ones, 8 heads over 2 KV heads of 64",
    control="against the tokens before rounding the difference is above 0.01 (details)",
)  # fmt: skip
def packed_attention_beside_unpacked() -> Figure:
    """Runs of 4 and 2 bits and the new tokens, merged, against unpacking all of them in fp64."""
    import torch

    store = store_of(ZipVL(probes=(16, 16)), 64)
    asked, more = random_prompt(1300, size=64), random_prompt(9, size=64, seed=1)
    store.chooser.read(asked)
    store.fill(asked.keys, asked.values, None, None)
    store.append(more.keys, more.values)
    query = more.queries[:, :, -1:] / 4

    def attended(k: Any, v: Any) -> Any:
        k, v = (x.double().repeat_interleave(4, 1) for x in (k, v))
        return ((query.double() @ k.transpose(2, 3)) / 8).softmax(-1) @ v

    found = store.attend(query, None, None)
    whole = (torch.cat([a, b], 2) for a, b in
             ((asked.keys, more.keys), (asked.values, more.values)))  # fmt: skip
    error = float((found - attended(store.keys, store.values)).abs().max())
    return Figure(error, details={"to unrounded": float((found - attended(*whole)).abs().max())})


@claim(
    expected=4.98, tolerance=0.01, unit="times less than fp16", how="exact", cost=5.0,
    needs=("torch",), source="cache compression of 4 and 2 bits at a ratio of 60 %, table of "
    "ZipCache (arXiv 2405.14256), whose quantiser this is; as remembered",
    setting="bytes counted from live storage: 8,192 tokens, 8 KV heads of 128, 60 % important",
    control="one scale a head and token instead of one for all heads gives 4.78 (details)",
)  # fmt: skip
def cache_compression_at_60_percent() -> Figure:
    """Codes, scales, factors and the byte that tells kinds apart, against 16 bits an element."""
    import torch

    technique = fixed(0.6)
    store = store_of(technique, 128)
    keys = torch.randn(1, 8, 8192, 128, generator=torch.Generator().manual_seed(0))
    important = torch.arange(8192) % 5 < 3
    store.chooser.pending[0] = [important]
    store.fill(keys, keys, None, None)
    full = 2 * keys.numel() * 2
    more = full / (store.nbytes() + 8192 * 7 * 4)
    return Figure(full / store.nbytes(), details={"one scale a head and token": more})


@claim(
    expected=1.0, tolerance=0.01, unit="counted over predicted", how="exact", cost=5.0,
    needs=("torch",), source=CARD + ": attention FLOPs for a given ratio",
    setting="products of attention among the tokens chosen, 4,096 tokens, shares 0.48 and 0.9, "
    "probes counted in both; Llama-2-7B's heads",
)  # fmt: skip
def attention_operations() -> Figure:
    """Pairs of query and key that attention visits, against what `predict` says of the share.

    The paper's -77.0 % at 64 frames of LongVA names no ratio; details give the share at which
    these counters say so, probes included.
    """
    case = Case(llm("llama-2-7b", 4096, 0, 1, "fp16"), load("a100-80"), Plan(("flash",)))
    worst = 1.0
    for share in (0.48, 0.9):
        chosen = round(share * 4096)
        pairs = chosen * (chosen + 1) / 2
        counted = 32 * 32 * 128 * (4.0 * pairs + 2.0 * 128 * 4096)
        ratio = counted / _products(case.with_(ZipVL(share=share)))
        worst = ratio if abs(ratio - 1) > abs(worst - 1) else worst
    frames = Case(llm("qwen2-7b", FRAMES // 2, 0, 1, "fp16"), load("a100-80"))
    shares = np.linspace(0.3, 0.7, 401)
    dense = _products(frames)
    probes = _products(frames.with_(ZipVL(share=0.5))) - 0.25 * dense
    cut = 1 - shares**2 - probes / dense
    return Figure(worst, details={"share at -77.0 %": float(shares[np.argmin(abs(cut - 0.77))])})


def _products(case: Case) -> float:
    """Operations of attention's matrix products in prefill, visible pairs only, and of probes."""
    names = ("scores", "weighted", "zipvl.scores")
    ops = (op for op in case.workload.phase("prefill").ops if op.name in names)
    return float(sum(np.sum(op.flops * op.repeat * op.shape.get("causal", 1.0)) for op in ops))


# --- quality of the reference model --------------------------------------------------------------


@claim(
    expected=(0.9, 1.0), unit="share of tokens", how="measured", cost=40.0, source=CARD,
    needs=("torch", "data"), setting="recall-lm, three prompts of 1,024 tokens of unseen text, all "
    "layers: what 128 probes choose of what all queries would",
)  # fmt: skip
def probes_beside_all_queries() -> float:
    """Overlap of the chosen tokens; attention stays exact so that both see the same."""
    return overlap()


def _points(name: str, over: str) -> Figure:
    told, ratios = answers()
    rights = {n: x.mean() for n, x in told.items()}
    if rights["dense"] < 0.5:
        raise Inconclusive(f"the model itself recalls only {rights['dense']:.0%}")
    by_prompt = (told[name].astype(float) - told[over]).mean(1)
    gain, error = float(by_prompt.mean()), float(by_prompt.std(ddof=1) / len(by_prompt) ** 0.5)
    details: dict[str, float | str] = {n: f"{x:.1%}" for n, x in rights.items()}
    details["ratios by layer"] = ", ".join(f"{r:.2f}" for r in ratios.values())
    return Figure(gain, (gain - 2 * error, gain + 2 * error), details=details)


@claim(
    expected=(-0.005, 1.0), unit="of answers, over dense", how="measured", cost=150.0, source=CARD,
    needs=("torch", "data"), setting="recall-lm, a text model, in place of a vision model: 16 "
    "pairs in 1,024 tokens, all asked after the text, 256 answers; tau 0.975",
    control="tau 1 with the same bits, and the same tau with 8 bits (details)",
    explained="sparse prefill costs the answers, not the codes: they stay lost with 8 bits and "
    "return with tau 1 (details). recall-lm has four layers, and a token left out in one of them "
    "likely misses the key it follows, which the question needs later; the paper's models have "
    "tens of layers and images that repeat themselves",
)  # fmt: skip
def recall_beside_dense() -> Figure:
    """Right answers, less those of the dense cache, of the same prompts."""
    return _points("zipvl", "dense")


@claim(
    expected=(0.0, 1.0), unit="of answers, over fixed", how="measured", cost=150.0, source=CARD,
    needs=("torch", "data"), setting="as recall_beside_dense: the same probes and scores at one "
    "share for all layers, the mean of the adaptive ones",
)  # fmt: skip
def recall_beside_a_fixed_ratio() -> Figure:
    """Right answers, less those at the fixed ratio."""
    return _points("zipvl", "fixed")


@claim(
    expected=(0.05, 1.0), unit="largest less least ratio", how="measured", cost=10.0, source=CARD,
    needs=("torch", "data"), setting="recall-lm, 1,024 tokens of unseen text, by layer",
)  # fmt: skip
def ratios_differ_by_layer() -> Figure:
    """How far the shares of important tokens are apart."""
    told = ratios_of("busy")
    details: dict[str, float | str] = {f"layer {i}": r for i, r in told.items()}
    return Figure(max(told.values()) - min(told.values()), details=details)


@claim(
    expected=(0.0, 0.95), unit="of the busy ratio", how="measured", cost=20.0, source=CARD,
    needs=("torch", "data"), setting="recall-lm, 1,024 tokens: eight tokens again and again (in "
    "place of a blank image) against text (a busy one), mean over layers",
    explained="not so here: the mean ratio does not fall. A blank patch that every query passes "
    "over has no counterpart in text, and repeated tokens likely share the attention between their "
    "copies instead of drawing less (not measured); the paper's finding needs a vision model",
)  # fmt: skip
def ratio_of_a_blank_prompt() -> Figure:
    """The share follows the input, where a fixed ratio would not."""
    blank, busy = (ratios_of(kind) for kind in ("blank", "busy"))
    means = [float(np.mean(list(told.values()))) for told in (blank, busy)]
    details: dict[str, float | str] = {"blank": means[0], "busy": means[1]}
    return Figure(means[0] / means[1], details=details)


# --- speed here ----------------------------------------------------------------------------------


@claim(
    expected=(2.5, float("inf")), unit="times faster", how="measured", cost=60.0,
    needs=("torch",), source=CARD,
    setting="one layer's prefill attention, 8,192 tokens, 4 heads over 2 KV heads of 64, fp32, "
    "45 % important, probes, sorts and gathers included, over torch's causal SDPA",
)  # fmt: skip
def prefill_attention_at_8k() -> Figure:
    """The share is set, so that the figure is of the mechanism and not of the random input."""
    import torch
    import torch.nn.functional as F

    from narrows.kv._base import Prompt
    from narrows.measure.timing import interleave

    made = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 8192, 64, generator=made)
    k, v = (torch.randn(1, 2, 8192, 64, generator=made) for _ in range(2))
    asked, technique = Prompt(0, q, k, v, None, 0.125), fixed(0.45)
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    with torch.inference_mode():
        timings = interleave({
            "dense": lambda: F.scaled_dot_product_attention(q, keys, values, is_causal=True),
            "zipvl": lambda: technique.attend_prompt(asked, None),
        })  # fmt: skip
    found = timings.speedup("zipvl", over="dense")
    if not found.quiet:
        raise Inconclusive(
            f"the machine is not quiet: ratios spread {found.spread:.0%} around {found.median:.2f}"
        )
    return Figure(found.median, (found.low, found.high), details={"ratio": technique.ratios[0]})


# --- the paper's machine -------------------------------------------------------------------------

SHARE = 0.465
"""Of tokens at LongVA: what the paper's -77.0 % of attention FLOPs at 64 frames amounts to, probes
included (attention_operations); the paper's ratios at 128 frames are not at hand."""


def _longva(tokens: int, plan: tuple[str, ...] = ("flash", "compiled")) -> Case:
    return Case(llm("qwen2-7b", tokens, 1, 1, "fp16"), load("a100-80"), Plan(plan))


def _prefill_gain(case: Case) -> float:
    ours = case.with_(ZipVL(share=SHARE))
    return case.bound().phase("prefill").seconds / ours.bound().phase("prefill").seconds


@claim(
    expected=2.6, tolerance=0.20, unit="times faster", how="modelled", cost=1.0, source=ABSTRACT,
    setting="prefill of LongVA-7B's language model (Qwen2-7B) fp16 on A100-80, 128 frames = 18,432 "
    "tokens, flash attention, 46.5 % important",
    explained="attention is under half of prefill at 18K tokens of a 7B model: projections and "
    "MLPs read every token, so attention at no cost at all would not give 2.6. The model "
    "reaches it between 65K and 131K tokens, and near it where scores are written to memory "
    "(details); the card's length of 18K may not be the abstract's",
)  # fmt: skip
def longva_prefill() -> Figure:
    """The whole of prefill, projections and MLPs included; details give other lengths."""
    details: dict[str, float | str] = {
        f"{n} tokens": _prefill_gain(_longva(n)) for n in (65536, 131072)
    }
    details["scores written to memory"] = _prefill_gain(_longva(FRAMES, ()))
    dense = _longva(FRAMES)
    ours = dense.with_(ZipVL(share=SHARE))
    details["attention's products alone"] = _products(dense) / _products(ours)
    return Figure(_prefill_gain(dense), details=details)


@claim(
    expected=0.5, tolerance=0.10, unit="of memory saved", how="modelled", cost=1.0,
    source=ABSTRACT, setting="as longva_prefill: weights and cache",
    explained="with 4 KV heads the cache of 18K tokens is a fifteenth of the weights. Of the cache "
    "alone more is saved than the paper says, and the half is reached by many sequences at once "
    "(details); what else the paper's figure of memory counts is not known here",
)  # fmt: skip
def longva_memory() -> Figure:
    """What is held after prefill; details give the cache alone and when it would halve."""

    def saved(tokens: int, batch: int = 1) -> float:
        case = Case(llm("qwen2-7b", tokens, 1, batch, "fp16"), load("a100-80"))
        ours = case.with_(ZipVL(share=SHARE))
        held = (float(c.workload.bytes("weight", "kv")) for c in (ours, case))
        return 1 - next(held) / next(held)

    case = _longva(FRAMES)
    less = (float(c.workload.bytes("kv")) for c in (case.with_(ZipVL(share=SHARE)), case))
    cache = 1 - next(less) / next(less)
    return Figure(saved(FRAMES), details={
        "of the cache alone": cache, "262,144 tokens": saved(262144),
        "18,432 tokens, 32 at once": saved(FRAMES, 32),
    })  # fmt: skip
