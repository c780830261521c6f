"""KV prediction (arXiv 2410.08391): what the paper and its card say, and what comes out here.

Quality figures are of recall-lm and of predictors trained for it in minutes on one core. The
paper's own are of OpenELM 1.1B, trained on a cluster, whose weights do not belong here; of those
only the operations are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from narrows.claims._kvprediction import (
    CONTEXT,
    LAYERS,
    OPENELM,
    OPENELM_PARAMETERS,
    PROMPT,
    VOCABULARY,
    losses,
    openelm_parameters,
    openelm_predicted,
    openelm_prefill,
    recalled,
    shares,
    small_model,
    some_predictor,
    tokens_run,
)
from narrows.core.claim import Figure, Inconclusive, claim
from narrows.kv.kvprediction import KVPrediction

ABSTRACT = "abstract"
CARD = "systems/kv_cache.md, card kvprediction, works when"
PAPER_DEFAULTS = {"layers": 0.5, "width": 1.0}
"""A layer-pruned auxiliary of half the model: one of the paper's."""


@contextmanager
def mutant() -> Iterator[str]:
    """Predicted keys turned as if every token stood first; the claim that must notice."""
    from narrows.kv import kvprediction_torch as predicting

    fill = predicting.fill

    def wrong(model: Any, cache: Any, pairs: Any, positions: Any, valid: Any) -> None:
        fill(model, cache, pairs, positions * 0, valid)

    predicting.fill = wrong
    try:
        yield the_model_predicts_itself.name
    finally:
        predicting.fill = fill


# --- exact ---------------------------------------------------------------------------------------


@claim(
    expected=(0.0, 1e-10), unit="largest difference", how="exact", cost=2.0, needs=("torch",),
    source=CARD + ": the base as its own auxiliary, identity maps",
    setting="a random Llama in fp64, 8 query heads over 2 KV heads, 2 rows of 60 tokens, one "
    "padded by 23",
    control="mutant(): all keys at position 0",
)  # fmt: skip
def the_model_predicts_itself() -> Figure:
    """Keys and values of every layer, and logits, against those of an ordinary prefill."""
    import torch

    from narrows.kv.adapter import KVCache, stores
    from narrows.kv.kvprediction_torch import KVPredictor
    from narrows.kv.reading import reading

    model = small_model().double()
    ids = torch.randint(2, 128, (2, 60), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :23] = 0
    with reading(model):
        dense = KVCache(model.config)
        logits = model(ids, attention_mask=mask, past_key_values=dense, logits_to_keep=1).logits
    identity = KVPredictor(model, model).identity()
    with KVPrediction(1.0).apply(model, identity) as applied, torch.no_grad():
        found = applied.model(ids, attention_mask=mask, use_cache=True).logits
        pairs = list(zip(stores(applied.cache), stores(dense), strict=True))
    told = {"logits": float((found - logits).abs().max())}
    for what in ("keys", "values"):
        told[what] = max(
            float(((getattr(a, what) - getattr(b, what)) * mask[:, None, :, None]).abs().max())
            for a, b in pairs
        )
    return Figure(max(told.values()), details=dict(told))


@claim(
    expected=0.0, unit="tokens", how="exact", cost=1.0, needs=("torch",),
    source=CARD + ": instrumented",
    setting="a random Llama, 2 prompts of 200 tokens, 8 generated, an auxiliary of 2 of 3 blocks",
    control="without the technique every block runs 398 more (details)",
)  # fmt: skip
def prompt_tokens_the_model_runs_but_the_last() -> Figure:
    """Counted at the input of every block of the model, the busiest block."""
    import torch

    model, new = small_model(), 8
    ids = torch.randint(2, 128, (2, 200), generator=torch.Generator().manual_seed(1))
    told = {}
    with tokens_run(model) as counts:
        model.generate(ids, max_new_tokens=new, do_sample=False)
        told["without"] = float(max(counts) - 2 * new)
    predictor = some_predictor(model, 2)
    with tokens_run(model) as counts, KVPrediction(2 / 3).apply(model, predictor) as applied:
        applied.model.generate(ids, max_new_tokens=new, do_sample=False)
        return Figure(float(max(counts) - 2 * new), details=dict(told))


@claim(
    expected=1.0, unit="share of tokens", how="exact", cost=1.0, needs=("torch",),
    source=CARD + ": accepted by unmodified generate",
    setting="a random Llama, an auxiliary of 2 of 3 blocks, random maps, 2 rows of 50 tokens",
    control="generating from an ordinary prefill gives other tokens (details)",
)  # fmt: skip
def generate_goes_on_from_the_cache() -> Figure:
    """The cache handed to plain `generate`, beside all of it inside the technique."""
    import torch

    from narrows.kv.reading import reading

    model, new = small_model(), 12
    ids = torch.randint(2, 128, (2, 50), generator=torch.Generator().manual_seed(1))
    dense = model.generate(ids, max_new_tokens=new, do_sample=False)
    with KVPrediction(2 / 3).apply(model, some_predictor(model, 2)) as applied:
        inside = applied.model.generate(ids, max_new_tokens=new, do_sample=False)
        first = applied.model(ids, use_cache=True).logits[:, -1:].argmax(-1)
        cache = applied.cache
    with reading(model):
        begun = torch.cat([ids, first], 1)
        after = model.generate(
            begun, past_key_values=cache, max_new_tokens=new - 1, do_sample=False
        )
    same = float((inside == after)[:, 50:].float().mean())
    return Figure(same, details={"dense": float((inside == dense)[:, 50:].float().mean())})


@claim(
    expected=0.0, unit="difference in loss", how="exact", cost=2.0, needs=("torch",),
    source=CARD + ": traps, teacher-forced true keys and values",
    setting="a random Llama in the training step's forward pass; its own key and value weights "
    "doubled",
    control="attending to its own keys and values its loss changes (details)",
)  # fmt: skip
def training_attends_to_predicted_keys_only() -> Figure:
    """What the model would cache itself has no part in the loss that is trained on."""
    import torch

    from narrows.kv.kvprediction_torch import blocks, given, read

    model = small_model()
    ids = torch.randint(2, 128, (2, 64), generator=torch.Generator().manual_seed(1))
    predictor = some_predictor(model, 2)
    with torch.no_grad():
        pairs = predictor.mapped(read(predictor.auxiliary, ids))

        def loss(own: bool) -> float:
            if own:
                return float(model(ids, labels=ids).loss)
            with given(blocks(model), pairs):
                return float(model(ids, labels=ids).loss)

        before = {own: loss(own) for own in (False, True)}
        for layer in blocks(model):
            layer.self_attn.k_proj.weight.mul_(2)
            layer.self_attn.v_proj.weight.mul_(2)
        after = {own: loss(own) for own in (False, True)}
    return Figure(
        abs(after[False] - before[False]), details={"own": abs(after[True] - before[True])}
    )


@claim(
    expected=1.0, tolerance=0.005, unit="of a count by hand", how="exact", cost=1.0,
    source=CARD + ": TTFT FLOPs",
    setting="Llama-3-8B reading 4,096 tokens, an auxiliary of 16 of its 32 blocks",
    control="with the auxiliary's last block whole it would be 6 % more (details)",
)  # fmt: skip
def operations_that_predict_says() -> Figure:
    """Products of weights, causal attention, maps, one token of the model: written out."""
    import narrows

    tokens, width, keys, feed, vocab = 4095, 4096, 1024, 14336, 128256
    block = 2 * width * width + 2 * width * keys + 3 * width * feed
    pairs = 4 * width * tokens * (tokens + 1) / 2
    small = 15 * (2 * tokens * block + pairs) + 2 * tokens * 2 * width * keys
    maps = 32 * 2 * 2 * tokens * keys * keys
    last = 32 * (2 * block + 4 * width * (tokens + 1)) + 2 * width * vocab
    case = narrows.case("llama-3-8b", "h100-sxm", prompt=tokens + 1, generate=1)
    after = KVPrediction().predict(case).workload
    said = sum(
        float(op.repeat * after.op_flops(op) * op.shape.get("causal", 1.0))
        for op in after.phase("prefill").ops
        if op.kind == "matmul"
    )
    by_hand = small + maps + last
    whole = by_hand + 2 * tokens * (block - 2 * width * keys) + pairs
    return Figure(said / by_hand, details={"last block whole": whole / by_hand})


@claim(
    expected=1.0, unit="of published parameters", how="exact", source="apple/OpenELM-* checkpoints",
    setting="OpenELM 270M, 450M and 1.1B from the published rule of their blocks",
)  # fmt: skip
def openelm_shapes() -> Figure:
    """The shapes that TTFT is counted on are the published ones, to the parameter."""
    told = {n: openelm_parameters(n) / OPENELM_PARAMETERS[n] for n in OPENELM}
    return Figure(max(told.values(), key=lambda x: abs(x - 1)), details=dict(told))


def _blocks(name: str) -> float:
    return OPENELM_PARAMETERS[name] - VOCABULARY * OPENELM[name][1]


@claim(
    expected=_blocks("1.1B") / _blocks("270M"), tolerance=0.10, unit="times fewer operations",
    how="modelled", source=CARD + ": (c); published parameters without the embedding",
    setting="OpenELM 1.1B read by OpenELM 270M, 1,024 tokens, the auxiliary run whole",
)  # fmt: skip
def openelm_by_270m() -> Figure:
    """TTFT operations of the base over those of auxiliary, maps and last token."""
    return _openelm("270M")


@claim(
    expected=_blocks("1.1B") / _blocks("450M"), tolerance=0.10, unit="times fewer operations",
    how="modelled", source=CARD + ": (c); published parameters without the embedding",
    setting="OpenELM 1.1B read by OpenELM 450M, 1,024 tokens, the auxiliary run whole",
)  # fmt: skip
def openelm_by_450m() -> Figure:
    """As openelm_by_270m."""
    return _openelm("450M")


def _openelm(auxiliary: str) -> Figure:
    gains = {
        t: openelm_prefill("1.1B", t) / openelm_predicted("1.1B", auxiliary, t)
        for t in (256, 1024, 2048)
    }
    return Figure(gains[1024], details={f"{t} tokens": g for t, g in gains.items()})


# --- quality of the reference model --------------------------------------------------------------


NO_ROOM = (
    "recall-lm's lowest two blocks hold all of its recall (it was grown from two): cut to them, "
    "untrained, it answers what the whole model does, so at 2 and 3 blocks no one can be better; "
    "and one block has no layer that could have looked at the token before, which recall needs. "
    "What blocks above add is knowledge of text: see largest_gain_in_perplexity"
)


def _beside(what: str, pick: Callable[..., int] = min) -> Figure:
    """Perplexity of a baseline over ours at equal depth, the worst (or best) point of the axis."""
    import numpy as np

    told, cost = losses(), shares(CONTEXT)
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(told["whole"]), (1000, len(told["whole"])))
    ratios, ends = {}, {}
    details: dict[str, float | str] = {}
    for n in LAYERS:
        gap = told[f"{n} {what}"] - told[f"{n} predicted"]
        ratios[n] = float(np.exp(gap.mean()))
        low, high = np.quantile(np.exp(gap[picks].mean(1)), (0.025, 0.975))
        ends[n] = (float(low), float(high))
        for name in (f"{n} predicted", f"{n} {what}"):
            ppl = float(np.exp(told[name].mean()))
            details[name] = f"perplexity {ppl:.2f} at {cost[name]:.3f} of the operations"
    details["whole"] = f"perplexity {float(np.exp(told['whole'].mean())):.2f}"
    point = pick(ratios, key=lambda n: ratios[n])
    return Figure(ratios[point], ends[point], details=details)


@claim(
    expected=(1.0, float("inf")), unit="times our perplexity", how="measured", cost=60.0,
    needs=("torch", "data"), source=CARD + ": (i) the auxiliary alone",
    setting="recall-lm, auxiliaries of 1, 2 and 3 of 4 blocks, 64 tokens that continue 1,024 of "
    "unseen text, 16 windows; the worst of the three points",
)  # fmt: skip
def perplexity_of_the_auxiliary_alone() -> Figure:
    """Continuation, never the prompt: what the auxiliary itself would go on with."""
    return _beside("auxiliary alone")


@claim(
    expected=(1.0, float("inf")), unit="times our perplexity", how="measured", cost=60.0,
    needs=("torch", "data"), source=CARD + ": (ii) the layer-pruned base",
    setting="as perplexity_of_the_auxiliary_alone: recall-lm cut to its lowest blocks, untrained",
)  # fmt: skip
def perplexity_of_the_model_cut_short() -> Figure:
    """The model's own lowest blocks under its own head."""
    return _beside("pruned")


@claim(
    expected=(1.15, float("inf")), unit="times our perplexity", how="measured", cost=60.0,
    needs=("torch", "data"), source=CARD + ": at least 15 % somewhere",
    setting="as perplexity_of_the_auxiliary_alone, the best of the three points",
)  # fmt: skip
def largest_gain_in_perplexity() -> Figure:
    """The auxiliary alone, trained by the same loss, at equal depth."""
    return _beside("auxiliary alone", max)


@claim(
    expected=(1.15, float("inf")), unit="times the baseline's recall", how="measured", cost=60.0,
    needs=("torch", "data"), source=ABSTRACT + "; " + CARD,
    setting="recall-lm, one of 8 pairs asked after 512 tokens of unseen text, 64 prompts; the "
    "auxiliary alone, the best of the three points", explained=NO_ROOM,
)  # fmt: skip
def recall_beside_the_auxiliary() -> Figure:
    """Share of answers wholly right over that of the auxiliary alone at equal depth."""
    told, cost = recalled(), shares(PROMPT)
    if told["whole"].share < 0.5:
        raise Inconclusive(f"the model itself recalls only {told['whole']}: nothing to compare")
    gains = {
        n: told[f"{n} predicted"].share / told[f"{n} auxiliary alone"].share
        for n in LAYERS
        if told[f"{n} auxiliary alone"].right
    }
    if not gains:
        raise Inconclusive("no auxiliary alone answers anything: there is nothing to divide by")
    details: dict[str, float | str] = {
        name: f"{share} at {cost[name]:.3f} of the operations" for name, share in told.items()
    }
    best = max(gains, key=lambda n: gains[n])
    alone = told[f"{best} auxiliary alone"].share
    ours = told[f"{best} predicted"]
    return Figure(gains[best], (ours.low / alone, ours.high / alone), details=details)


@claim(
    expected=3.0, unit="points", how="measured", cost=60.0, needs=("torch", "data"),
    source=CARD + ": on at least 3 points of the FLOPs axis",
    setting="auxiliaries of 1, 2 and 3 of 4 blocks as in the claims above", explained=NO_ROOM,
)  # fmt: skip
def points_better_in_both() -> Figure:
    """Points at which perplexity and recall are both better than both baselines'."""
    ppl, right = losses(), recalled()
    found = 0
    details: dict[str, float | str] = {}
    for n in LAYERS:
        ours = f"{n} predicted"
        others = [f"{n} auxiliary alone", f"{n} pruned"]
        less = all(ppl[ours].mean() < ppl[o].mean() for o in others)
        more = all(right[ours].right > right[o].right for o in others)
        found += less and more
        details[f"{n} blocks"] = f"perplexity {'better' if less else 'not better'}, recall " + (
            "better" if more else "not better"
        )
    return Figure(float(found), details=details)


# --- speed here ----------------------------------------------------------------------------------


def _first_token(tokens: int) -> tuple[Any, float]:
    """Ratio of seconds to the first token, and that of operations, at one length of prompt."""
    import torch

    from narrows.measure.timing import interleave
    from narrows.models import recall_lm

    dense, ours = (recall_lm.load()[0] for _ in range(2))
    ids = torch.randint(1, 1024, (1, tokens), generator=torch.Generator().manual_seed(0))
    given = {"use_cache": True, "logits_to_keep": 1}
    with torch.inference_mode(), KVPrediction().apply(ours):
        timings = interleave(
            {"dense": lambda: dense(ids, **given), "ours": lambda: ours(ids, **given)}, repeats=11
        )
    return timings.speedup("ours", over="dense"), 1 / shares(tokens)["2 predicted"]


@cache
def _timed() -> tuple[dict[int, tuple[Any, float]], dict[str, float | str]]:
    """Both ratios by length of prompt; Inconclusive where none of them can be relied on."""
    found = {tokens: _first_token(tokens) for tokens in (1024, 2048, 4096)}
    loud = {
        t: f"{r.spread:.0%} around {r.median:.2f}" for t, (r, _) in found.items() if not r.quiet
    }
    if loud:
        raise Inconclusive(f"the machine is not quiet: ratios spread, by tokens: {loud}")
    return found, {
        f"{t} tokens": f"{r.median:.2f}x, operations {counted:.2f}x"
        for t, (r, counted) in found.items()
    }


@claim(
    expected=(2.0, float("inf")), unit="times sooner", how="measured", cost=40.0,
    needs=("torch",), source=CARD + ": (b)",
    setting="recall-lm on this CPU, the worst of 1,024, 2,048 and 4,096 tokens, an auxiliary of a "
    "quarter of its operations (2 of 4 blocks, of the last only keys and values); taking turns",
)  # fmt: skip
def first_token() -> Figure:
    """Seconds to the first token of plain transformers over ours."""
    every, told = _timed()
    found, counted = min(every.values(), key=lambda x: x[0].median)
    return Figure(found.median, (found.low, found.high), predicted=counted, details=told)


@claim(
    expected=1.0, tolerance=0.25, unit="of the ratio of operations", how="measured", cost=40.0,
    needs=("torch",), source=CARD + ": (b)", setting="as first_token",
    explained="what the calls of two models take beside their operations weighs the more the "
    "shorter the prompt: at 4,096 tokens the ratio holds (0.86), at 2,048 about (0.75), at 1,024 "
    "not (0.65; details)",
)  # fmt: skip
def first_token_against_operations() -> Figure:
    """The measured ratio over the counted one, where they are furthest apart."""
    every, told = _timed()
    found, counted = max(every.values(), key=lambda x: abs(x[0].median / x[1] - 1))
    ends = found.low / counted, found.high / counted
    return Figure(found.median / counted, ends, details=told)
