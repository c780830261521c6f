"""ALISA (arXiv 2403.17312): what its paper and its card say, and what comes out here.

Quality figures are of recall-lm. Phases are executed on this machine, its host behind a rate that
is kept for real; the paper's machines are modelled by bytes and datasheet rates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from narrows.claims._alisa import by_definition, losses, paired, recalled, shifted_losses
from narrows.claims._snapkv import random_model
from narrows.core.claim import Figure, Inconclusive, claim
from narrows.kv._base import Prompt
from narrows.kv.alisa import ALISA, Phases

ABSTRACT = "abstract"
CARD = "systems/kv_cache.md, card alisa, works when"
PAPER_DEFAULTS = {"sparsity": 0.8, "split": 0.5, "kv_bits": 8}
"""The settings of the paper's throughput runs, as remembered; halves are in its algorithm."""

RATE = 2e7
"""Bytes a second of the link in executed runs: slow enough to weigh beside steps of this CPU."""


@contextmanager
def mutant() -> Iterator[str]:
    """Sums over all steps instead of the last ones; the claim that must notice."""
    from narrows.claims._alisa import AllTime
    from narrows.kv import alisa_torch

    sound = alisa_torch.SparseStore.clear

    def broken(self: Any) -> None:
        self.rule = AllTime
        sound(self)

    alisa_torch.SparseStore.clear = broken
    try:
        yield chosen_tokens_are_those_of_the_definition.name
    finally:
        alisa_torch.SparseStore.clear = sound


# --- exact ---------------------------------------------------------------------------------------


class _Config:
    head_dim = 16


@claim(
    expected=1.0, unit="share of steps", how="exact", cost=3.0, needs=("torch",), source=CARD,
    setting="8 query heads over 2 KV heads, prompts of 100 tokens and 60 steps at three settings, "
    "all chosen tokens of a step against the mechanism written out in float64",
    control="mutant(): sums over all steps",
)  # fmt: skip
def chosen_tokens_are_those_of_the_definition() -> Figure:
    """Share of steps that attend to exactly the tokens of the definition."""
    import torch

    made = torch.Generator().manual_seed(0)
    queries = 2 * torch.randn(1, 8, 160, 16, generator=made)
    keys = torch.randn(1, 2, 160, 16, generator=made)
    same = total = 0
    for sparsity, split in ((0.8, 0.5), (0.5, 0.3), (0.6, 1.0)):
        technique = ALISA(sparsity, split, None)
        store: Any = technique.store(_Config())
        first = keys[:, :, :100].clone()
        technique.on_prefill_end(Prompt(0, queries[:, :, :100], first, first, None, 0.25))
        store.fill(first, first, None, None)
        wanted = by_definition(
            queries[0].double().numpy(), keys[0].double().numpy(), 100, 0.25, technique
        )
        for i in range(100, 160):
            store.append(keys[:, :, i : i + 1], keys[:, :, i : i + 1])
            store.attend(queries[:, :, i : i + 1], None, 0.25)
            store.settle()
            same += store.chosen[0, 0].tolist() == wanted[i - 100]
            total += 1
    return Figure(same / total, details={"steps": total})


def _logits(technique: ALISA | None, steps: int = 24) -> Any:
    """Logits of a prompt of 2 x 70 tokens and of `steps` more, read one by one; and the cache."""
    import torch

    from narrows.kv.adapter import ATTENTION, KVCache, hidden_states

    model = random_model()
    model.set_attn_implementation(ATTENTION)
    ids = torch.randint(1, 128, (2, 70 + steps), generator=torch.Generator().manual_seed(0))
    technique = None if technique is None else technique.of(model)
    cache = KVCache(model.config, technique)
    if technique is not None and technique.needs_hidden:
        hidden_states(model)
    spans = ((0, 70), *((i, i + 1) for i in range(70, 70 + steps)))
    with torch.inference_mode():
        made = [model(ids[:, a:b], past_key_values=cache).logits for a, b in spans]
    return torch.cat(made, 1), cache


@claim(
    expected=0.0, unit="largest difference of logits", how="exact", cost=2.0, source=CARD,
    needs=("torch",), control="at sparsity 0.5 the difference is another (details)",
    setting="random Llama, 2 x 70 tokens and 24 decoded, sparsity 0 in full precision, against the "
    "dense cache",
)  # fmt: skip
def logits_at_sparsity_0() -> Figure:
    """Bit-identical: every token is attended, so nothing may change."""
    dense = _logits(None)[0]
    found = {s: float((_logits(ALISA(s, kv_bits=None))[0] - dense).abs().max()) for s in (0.0, 0.5)}
    return Figure(found[0.0], details={"sparsity 0.5": found[0.5]})


@claim(
    expected=0.0, unit="largest difference of logits", how="exact", cost=2.0, needs=("torch",),
    source=CARD + ": nothing is evicted", setting="as logits_at_sparsity_0: sparsity 0.8, half of "
    "the tokens on the host from step 8, against all on the device; in full precision and INT8",
    control="bytes that crossed the link are above 0 (details)",
)  # fmt: skip
def logits_with_tokens_on_the_host() -> Figure:
    """Where a token lies changes nothing of what is computed."""
    from narrows.kv.adapter import stores

    worst, details = 0.0, dict[str, float | str]()
    for bits in (None, 8):
        plain = ALISA(0.8, kv_bits=bits, group_size=8)
        there, cache = _logits(plain.planned(Phases(0.5, 0.0, 8, 24, 70, 24)))
        worst = max(worst, float((there - _logits(plain)[0]).abs().max()))
        details[f"bytes fetched, {bits or 32} bits"] = stores(cache)[0].host.traffic.bytes  # type: ignore[attr-defined]
    if not all(details.values()):
        raise Inconclusive("nothing was fetched, so phase II was not entered")
    return Figure(worst, details=details)


@claim(
    expected=(0.0, 1e-5), unit="largest difference", how="exact", cost=2.0, needs=("torch",),
    source=CARD, setting="random Llama fp32, 2 x 70 tokens: keys and values of all dropped tokens "
    "made again from states, against those of a cache that keeps them",
    control="made at positions one further, keys differ (details)",
)  # fmt: skip
def keys_and_values_made_again() -> Figure:
    """The dropped ones are gone: neither tier holds them."""
    import torch

    from narrows.kv.adapter import stores

    plain = ALISA(0.8, kv_bits=None)
    kept = stores(_logits(plain)[1])
    dropping = stores(_logits(plain.planned(Phases(0.5, 0.5, 4, 8, 70, 24)))[1])
    worst, moved, count = 0.0, float("inf"), 0
    for own, store in zip(kept, dropping, strict=True):
        assert own.keys is not None
        assert own.values is not None
        at: Any = store
        count = at.dropped
        held = at.tiers()["host"] / (at.away - at.dropped + at.known - at.dropped)
        if not count or held > 2 * 2 * 32 * 4 + 2 * 64 * 4:
            raise Inconclusive("nothing was dropped, so phase III was not entered")
        both = torch.cat([own.keys, own.values], -1)[:, :, :count]
        slots = torch.arange(count).expand(2, 1, -1)
        with torch.inference_mode():
            again = at.take(slots)
            off = at.recompute(at.layer, at.states.view[:, 0], slots[:, 0] + 1)
        worst = max(worst, float((again - both).abs().max()))
        moved = min(moved, float((off - both).abs().max()))
    return Figure(worst, details={"tokens dropped": count, "one position further": moved})


# --- quality of the reference model --------------------------------------------------------------


@claim(
    expected=(0.0, 1.03), unit="of dense perplexity", how="measured", cost=90.0, source=CARD,
    needs=("torch", "data"), control="the local window and even strides, in claims of their own",
    setting="recall-lm, 64 tokens after 2,048 of unseen text, sparsity 0.8, INT8, 16 windows",
    explained="recall-lm looks somewhere else at every token, where it has seen the last ones "
    "before, so what the last steps looked at does not tell what the next one will. Its attention "
    "is sparse enough: chosen by the current row, which nobody knows before fetching, a fifth of "
    "the tokens loses little (details). INT8 is not the reason either (details)",
)  # fmt: skip
def perplexity_at_80_percent() -> Figure:
    """With a 95 % interval over windows; details give every rule's ratio."""
    told = losses()
    ratio, low, high = paired(told["alisa"], told["dense"])
    others = {
        n: paired(x, told["dense"])[0] for n, x in told.items() if n not in ("alisa", "dense")
    }
    return Figure(ratio, (low, high), details=dict(others))


@claim(
    expected=(0.0, 1.0), unit="of the local window's perplexity", how="measured", cost=90.0,
    needs=("torch", "data"), source=CARD, setting="as perplexity_at_80_percent",
    explained="plain text leans on recent tokens, of which the local window holds twice as many; "
    "what recall-lm takes from further back changes at every token (see perplexity_at_80_percent)",
)  # fmt: skip
def perplexity_beside_a_local_window() -> Figure:
    """The same number of tokens, all of them the most recent."""
    told = losses()
    ratio, low, high = paired(told["alisa in full precision"], told["local window"])
    return Figure(ratio, (low, high))


@claim(
    expected=(0.0, 1.0), unit="of strided attention's perplexity", how="measured", cost=90.0,
    needs=("torch", "data"), source=CARD, setting="as perplexity_at_80_percent",
    explained="even strides sample the past without a bias; sums of the last steps keep choosing "
    "tokens that are read all the time, and what recall-lm copies from is not among them",
)  # fmt: skip
def perplexity_beside_strides() -> Figure:
    """The same recent half, the other half at even distances."""
    told = losses()
    ratio, low, high = paired(told["alisa in full precision"], told["strided"])
    return Figure(ratio, (low, high))


@claim(
    expected=(0.0, 1.0), unit="of the all-time sum's perplexity", how="measured", cost=90.0,
    needs=("torch", "data"), source=CARD + ": better or equal to H2O-sum after a topic shift",
    setting="recall-lm, 64 tokens after 1,536 of one text and 512 of another, sparsity 0.8, full "
    "precision, 24 windows; H2O's sum over all steps chooses, nothing is evicted for good",
)  # fmt: skip
def perplexity_beside_h2o_after_a_shift() -> Figure:
    """Local sums forget the former topic; the interval tells how far they are from equal."""
    told = shifted_losses()
    ratio, low, high = paired(told["alisa"], told["all-time sum"])
    dense = {n: paired(told[n], told["dense"])[0] for n in ("alisa", "all-time sum")}
    return Figure(ratio, (low, high), details={f"{n} over dense": x for n, x in dense.items()})


@claim(
    expected=(0.95, 1.05), unit="of dense recall", how="measured", cost=90.0,
    needs=("torch", "data"), source="the harness of kv/: recall beside perplexity",
    setting="recall-lm, 16 pairs in 2,048 tokens, each asked at the end of the prompt, sparsity "
    "0.8, INT8, 8 prompts",
    explained="the first token of an answer comes from prefill, which is exact; the others need a "
    "token that only the last few of 205 summed steps looked at. A sum over all steps finds still "
    "fewer (details)",
)  # fmt: skip
def pairs_recall() -> Figure:
    """Where it hurts: a question about something read long ago."""
    told = recalled()
    full = told["dense"].share
    if full < 0.5:
        raise Inconclusive(f"the model itself recalls only {full:.0%}: nothing to compare")
    ours = told["alisa"]
    return Figure(
        ours.share / full, (ours.low / full, ours.high / full),
        details={n: f"{s.share:.1%}" for n, s in told.items()},
    )  # fmt: skip


# --- executed here --------------------------------------------------------------------------------


@claim(
    expected=(0.0, 0.2), unit="largest miss of a phase", how="measured", cost=60.0, source=CARD,
    needs=("torch",), control="without what the link and recomputing add, phases II and III miss "
    "by far (details)",
    setting="random Llama of 4 layers, 8 KV heads, fp32; 4 x 256 tokens read, 96 written, sparsity "
    "0.8, full precision; a host at 20 MB/s; alpha 0.6, beta 0.5, phases from steps 32 and 64; "
    "runs take turns with ones that keep all on the device, to whose steps the model adds tokens "
    "fetched and made again, each timed alone; where choices lie is known from another text",
)  # fmt: skip
def step_time_in_three_phases() -> Figure:
    """|measured / model - 1|, of the phase where it is largest; medians over rounds."""
    from narrows.claims import _alisa_runs as runs

    plan = Phases(0.6, 0.5, 32, 64, runs.PROMPT, runs.GENERATE)
    found = runs.beside_model(plan, RATE)
    if found.spread() > 0.2:
        raise Inconclusive(f"the machine is not quiet: ratios spread {found.spread():.0%}")
    medians = {name: float(np.median(r)) for name, r in found.ratios.items()}
    details: dict[str, float | str] = {f"phase {n}": x for n, x in medians.items()}
    details["bytes fetched over the model's"] = found.moved
    details |= {f"phase {n} without the link": x for n, x in found.bare.items()}
    return Figure(max(abs(x - 1) for x in medians.values()), details=details)


@claim(
    expected=(1.0, 1.05), unit="of the best plan's seconds", how="measured", cost=150.0,
    source=CARD, needs=("torch",), control="the worst plan that fits (details)",
    setting="as step_time_in_three_phases, with room on the device for 0.7 of all tokens: all "
    "plans of a grid that fit, executed in turn; alpha and beta in quarters, phases at halves",
)  # fmt: skip
def plan_beside_an_executed_sweep() -> Figure:
    """Seconds of the plan that schedule() chooses, over the fastest one."""
    from narrows.claims import _alisa_runs as runs

    found = runs.swept(RATE, 0.7)
    spread = float(np.median([np.ptp(s) / np.median(s) for s in found.seconds.values()]))
    if spread > 0.1:
        raise Inconclusive(f"the machine is not quiet: runs of one plan spread {spread:.0%}")
    ours = found.seconds[found.chosen]
    ratios = {p: float(np.median(ours / s)) for p, s in found.seconds.items()}
    beaten_by = max(ratios.values())
    worst = min(ratios.values())
    plan = found.chosen
    return Figure(max(beaten_by, 1.0), details={
        "plans executed": len(ratios), "worst plan over the chosen one": 1 / worst,
        "chosen": f"alpha {plan.alpha}, beta {plan.beta}, p1 {plan.p1}, p2 {plan.p2}",
    })  # fmt: skip


# --- the paper's machines -------------------------------------------------------------------------

MACHINES = (
    "OPT-6.7B on V100-16, 13B on V100-32, 30B on H100-80; 128 tokens read, 512 written, batches of "
    "4 to 64; PCIe at 12 and 24 GB/s, datasheet rates, nothing fitted"
)


def _ratios(other: str) -> dict[str, float]:
    from narrows.claims._alisa_machines import served

    return {
        f"{model}, batch {batch}": told["alisa"].rate / told[other].rate
        for (model, batch), told in served().items()
    }


@claim(
    expected=3.0, tolerance=0.25, unit="times the tokens, at most", how="modelled", cost=15.0,
    source=ABSTRACT, setting=MACHINES + "; FlexGen moves its host share of the cache every step",
    control="with all on the device the ratio is near 1 (details)",
    explained="a FlexGen that moves all its host's cache over the link is slower than the paper's: "
    "at a batch of 64 it moves some ten times the tokens, in twice the bits. FlexGen may also "
    "attend on the host's processor, which leaves less than half of the peak at 60 GB/s of host "
    "memory (details); ALISA's own gathering and launching, which datasheet rates leave out, and "
    "the paper's batches, which are not known here, would take more of it",
)  # fmt: skip
def throughput_over_flexgen() -> Figure:
    """The peak over models and batches; details give all."""
    from narrows.claims._alisa_machines import served_over_host_attention

    told = _ratios("flexgen")
    instead = max(served_over_host_attention().values())
    return Figure(max(told.values()), details={"attending on the host": instead, **told})


@claim(
    expected=1.9, tolerance=0.25, unit="times the tokens, at most", how="modelled", cost=15.0,
    source=ABSTRACT, setting=MACHINES + "; vLLM keeps what fits running, pages swap when they end",
    explained="the peak is of OPT-6.7B on 16 GB, where 1.1 GB are left for the cache: vLLM runs a "
    "few sequences at a time there, ALISA all of them; on the two larger memories the peak is "
    "within a tenth of the paper's (details)",
)  # fmt: skip
def throughput_over_vllm() -> Figure:
    """As throughput_over_flexgen."""
    told = _ratios("vllm")
    larger = max(x for name, x in told.items() if not name.startswith("opt-6.7b"))
    return Figure(max(told.values()), details={"without OPT-6.7B": larger, **told})


@claim(
    expected=1.0, unit="share of models", how="modelled", cost=15.0, source=CARD,
    setting=MACHINES + ": at the largest batch ALISA before vLLM before FlexGen, and at the "
    "smallest none more than 1.5 times another",
)  # fmt: skip
def order_of_crossing() -> float:
    """What memory is ample for is served alike; then FlexGen falls behind, then vLLM."""
    from narrows.claims._alisa_machines import PAIRS, served

    right = 0
    for model, _ in PAIRS:
        of = {batch: told for (name, batch), told in served().items() if name == model}
        small, large = ({n: s.rate for n, s in of[batch].items()} for batch in (min(of), max(of)))
        near = max(small.values()) <= 1.5 * min(small.values())
        right += near and large["alisa"] > large["vllm"] > large["flexgen"]
    return right / len(PAIRS)
