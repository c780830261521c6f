"""SnapKV (arXiv 2404.14469): what its paper and its card say, and what comes out here.

Figures of the reference model are of recall-lm; each of them names how many answers it rests on.
The paper's LongBench scores are of 7B models whose weights do not belong here.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrows.claims._snapkv import (
    by_definition,
    candidates,
    random_model,
    recalled,
    reference,
    unseen,
)
from narrows.core.case import Case
from narrows.core.claim import Figure, Inconclusive, claim
from narrows.core.plan import Plan
from narrows.core.tensor import Number
from narrows.core.workload import Op, Phase, Workload
from narrows.kv._base import Prompt
from narrows.kv.snapkv import KEYS, VALUES, SnapKV
from narrows.machines.load import load
from narrows.trace.llm import llm

if TYPE_CHECKING:
    from narrows.measure.generation import Generation

ABSTRACT = "abstract"
CARD = "systems/kv_cache.md, card snapkv, works when"
ROOT = Path(__file__).parents[2]
PAPER_DEFAULTS = {"capacity": 2048, "window": 32, "kernel": 5, "pool": "avg"}
"""Of the official code's configuration (snapkv_utils.py, init_snapkv)."""


@contextmanager
def mutant() -> Iterator[str]:
    """Votes of the prompt's first tokens instead of its last; the claim that must notice."""
    from narrows.kv import select_torch

    sound = select_torch.window_votes

    def broken(prompt: Prompt, window: int, kernel: int, pool: str) -> Any:
        return sound(replace(prompt, queries=prompt.queries.flip(2)), window, kernel, pool)

    select_torch.window_votes = broken
    try:
        yield kept_tokens_are_those_of_the_definition.name
    finally:
        select_torch.window_votes = sound


# --- exact ---------------------------------------------------------------------------------------


@claim(
    expected=1.0, unit="share of tokens", how="exact", cost=2.0, needs=("torch",),
    source="algorithm listing of the paper; votes averaged over a KV head's queries",
    setting="random queries and keys, 2 prompts of 200 and 140 tokens in one padded batch",
    control="mutant(): votes of the first tokens instead of the last",
)  # fmt: skip
def kept_tokens_are_those_of_the_definition() -> float:
    """Share of the tokens kept by definition that SnapKV keeps, padded rows as if alone."""
    import torch

    made = torch.Generator().manual_seed(0)
    queries = 2 * torch.randn(2, 8, 200, 16, generator=made)
    keys = torch.randn(2, 2, 200, 16, generator=made)
    lengths = (200, 140)
    valid = torch.arange(200) >= 200 - torch.tensor(lengths)[:, None]
    technique = SnapKV(capacity=64, window=16)
    columns = technique.on_prefill_end(Prompt(0, queries, keys, keys, valid, 0.25))
    assert columns is not None
    same = total = 0
    for row, n in enumerate(lengths):
        wanted = by_definition(
            queries[row, :, 200 - n :].double().numpy(), keys[row, :, 200 - n :].double().numpy(),
            0.25, technique,
        )  # fmt: skip
        for head, positions in enumerate(wanted):
            found = set((columns[row, head] - (200 - n)).tolist())
            same += len(found & set(positions))
            total += len(positions)
    return same / total


@claim(
    expected=(0.999, 1.0), unit="share of indices", how="exact", cost=40.0, source=CARD,
    needs=("torch", "peer"), control="kvpress's padded row must differ: it keeps 100, not 75",
    setting="random model of recall-lm's shape, prompts of 300 to 2,048 tokens, budgets 1/8 to 3/4",
)  # fmt: skip
def kept_indices_agree_with_kvpress() -> Figure:
    """Indices kept by both NVIDIA/kvpress 0.5.5 and SnapKV, of those kvpress keeps."""
    python = ROOT / ".venv-kvpress" / "bin" / "python"
    script = ROOT / "tests" / "peers" / "kvpress_indices.py"
    if not (python.is_file() and script.is_file()):
        raise Inconclusive(
            "no environment for kvpress; make it in a checkout: python -m benchmarks.peers kvpress"
        )
    done = subprocess.run(
        [python, script], capture_output=True, text=True, check=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    told = json.loads(done.stdout.splitlines()[-1])
    rows, padding = told["rows"], told["padding"]
    share = sum(r["common"] for r in rows) / sum(r["total"] for r in rows)
    return Figure(share, details={
        "indices": sum(r["total"] for r in rows), "transformers": told["transformers"],
        "kept of a padded row of 300": f"{padding['ours'][1]} here, {padding['theirs'][1]} there",
    })  # fmt: skip


@claim(
    expected=0.0, unit="largest difference of logits", how="exact", cost=2.0, source=CARD,
    needs=("torch",), control="a capacity of half the prompt gives another figure",
    setting="random Llama, 2 x 200 tokens and 8 decoded, capacity 200 against the dense cache",
)  # fmt: skip
def logits_when_the_prompt_fits() -> Figure:
    """Bit-identical: nothing is dropped, so nothing may change."""
    fits, halved = _difference(200), _difference(100)
    return Figure(fits, details={"at half the capacity": halved})


def _difference(capacity: int) -> float:
    import torch

    from narrows.kv.adapter import ATTENTION, KVCache

    model = random_model()
    model.set_attn_implementation(ATTENTION)
    ids = torch.randint(1, 128, (2, 208), generator=torch.Generator().manual_seed(0))
    caches = KVCache(model.config), SnapKV(capacity).cache(model.config)
    largest = 0.0
    with torch.inference_mode():
        for begin, end in ((0, 200), *((i, i + 1) for i in range(200, 208))):
            a, b = (model(ids[:, begin:end], past_key_values=c).logits for c in caches)
            largest = max(largest, float((a - b).abs().max()))
    return largest


@claim(
    expected=300.0, unit="position", how="exact", cost=2.0, source=CARD, needs=("torch",),
    setting="a hand-written loop without position_ids, 300 tokens cut to 75",
    control="kvpress 0.5.5 places it at 75, the length it kept",
)  # fmt: skip
def position_of_the_next_token() -> float:
    """Positions count on from the prompt, whatever was dropped of it."""
    import torch

    model = random_model()
    seen: list[int] = []
    ids = torch.randint(1, 128, (1, 300), generator=torch.Generator().manual_seed(0))
    with SnapKV(ratio=0.75).apply(model) as applied, torch.inference_mode():
        out = applied.model(ids)
        model.model.rotary_emb.register_forward_hook(
            lambda module, args, kwargs, out: seen.append(int(kwargs["position_ids"].max())),
            with_kwargs=True,
        )
        model(ids[:, :1], past_key_values=out.past_key_values)
    return float(seen[0])


# --- quality of the reference model --------------------------------------------------------------


def _beside_dense(task: str, name: str) -> Figure:
    told = recalled(task)
    full = told["dense"].share
    if full < 0.5:
        raise Inconclusive(f"the model itself recalls only {full:.0%}: nothing to compare")
    share = told[name]
    others = {n: f"{s.share:.1%}" for n, s in told.items()}
    return Figure(
        share.share / full, (share.low / full, share.high / full),
        details={"answers": share.total, **others},
    )  # fmt: skip


@claim(
    expected=(0.95, 1.05), unit="of dense recall", how="measured", cost=400.0, source=CARD,
    needs=("torch", "data"), control="random eviction at equal bytes",
    setting="recall-lm, one needle of 3 tokens in 2,048 of unseen text, 1/8 of the cache",
)  # fmt: skip
def needle_recall() -> Figure:
    """The question stands in the window. Details give the drop when it comes later."""
    found = _beside_dense("needle", "snapkv")
    later = recalled("needle", later=True)["snapkv"]
    return replace(found, details={**found.details, "asked after compression": str(later)})


@claim(
    expected=(0.95, 1.05), unit="of dense recall", how="measured", cost=400.0, source=CARD,
    needs=("torch", "data"), control="random eviction at equal bytes",
    setting="recall-lm, 16 pairs (2-token values) in 2,048 tokens, each asked, 1/8 of the cache",
)  # fmt: skip
def pairs_recall() -> Figure:
    """As needle_recall, with 15 distractors."""
    found = _beside_dense("pairs", "snapkv")
    later = recalled("pairs", later=True)["snapkv"]
    return replace(found, details={**found.details, "asked after compression": str(later)})


@claim(
    expected=(0.95, 1.05), unit="of dense recall", how="measured", cost=120.0, source=CARD,
    needs=("torch", "data"), setting="as needle_recall, but a needle of 6 tokens",
    explained="the end of the prompt looks at the first token of the value only, and a kernel of 5 "
    "keeps two tokens beyond a peak; recall-lm finds each later token when it has said the one "
    "before. Kernel 13 reaches the whole value (details)",
)  # fmt: skip
def long_needle_recall() -> Figure:
    """Values longer than (kernel + 1) / 2 tokens lose their end."""
    return _beside_dense("long needle", "snapkv")


@claim(
    expected=(0.0, 0.5), unit="of dense recall", how="measured", cost=400.0, source=CARD,
    needs=("torch", "data"), setting="as needle_recall, random tokens kept beside the window",
)  # fmt: skip
def needle_recall_of_random_eviction() -> Figure:
    """What equal bytes give without votes."""
    return _beside_dense("needle", "random")


@claim(
    expected=(0.0, 0.5), unit="of dense recall", how="measured", cost=400.0, source=CARD,
    needs=("torch", "data"), setting="as needle_recall, the most recent tokens and 4 sinks kept",
)  # fmt: skip
def needle_recall_of_the_window_only() -> Figure:
    """What equal bytes give to the recent past."""
    return _beside_dense("needle", "window only")


@claim(
    expected=(0.05, 1.0), unit="points of recall", how="measured", cost=400.0, source=CARD,
    needs=("torch", "data"), setting="as needle_recall, kernel 5 against kernel 1",
)  # fmt: skip
def pooling_on_values_of_several_tokens() -> Figure:
    """Pooling keeps the neighbours of a peak, so whole values survive."""
    told = recalled("needle")
    gain = told["snapkv"].share - told["not pooled"].share
    return Figure(gain, details={n: str(told[n]) for n in ("snapkv", "not pooled")})


@claim(
    expected=(0.0, 1.0), unit="of window-only's perplexity", how="measured", cost=100.0,
    needs=("torch", "data"), source="issue: perplexity at 2K against dense, random and window-only",
    setting="recall-lm, 64 tokens after 2,048 of unseen text through 1/8 of the cache, 128 windows",
    explained="text that merely goes on leans on its recent tokens, of which the window holds 32; "
    "votes find what the end asks about, so they pay where something is asked",
)  # fmt: skip
def perplexity_beside_window_only() -> Figure:
    """Plain continuation is where SnapKV hurts: details give every candidate's perplexity."""
    from narrows.kv import quality

    told = quality.perplexity(reference()[0], candidates(), unseen())
    share = told["snapkv"] / told["window only"]
    return Figure(share, details={n: f"{p:.3f}" for n, p in told.items()})


@claim(
    expected=33.36, unit="F1", tolerance=0.02, how="measured", source="table of LongBench, Qasper",
    setting="Mistral-7B-Instruct-v0.2, capacity 4096, window 32, max pooling, kernel 7",
)  # fmt: skip
def qasper() -> float:
    """Needs what is not here."""
    raise Inconclusive(
        "needs Mistral-7B-Instruct-v0.2 (14.5 GB of weights) and LongBench, which are not shipped; "
        "others reproduced it with the official code: 33.38 (FasterDecoding/SnapKV issue 1)"
    )


# --- speed here ----------------------------------------------------------------------------------


@cache
def _decoding() -> tuple[Generation, Case, Case]:
    """Decode steps at 8 x 8,192 tokens, dense in place and with an eighth; and both cases."""
    import torch

    import narrows
    from narrows.kv.adapter import ATTENTION, KVCache
    from narrows.measure.generation import prompts, time_generation

    technique = SnapKV(8192 // 8)
    case = narrows.case("reference", "here", prompt=8192, generate=32, batch=8, dtype="fp32")
    model = reference()[0].to(torch.float32)
    model.set_attn_implementation(ATTENTION)
    caches = {"dense": KVCache(model.config), "snapkv": technique.cache(model.config)}
    ids = prompts(model.config.vocab_size, 8, 8192)
    return time_generation(model, ids, caches), case, case.with_(technique)


def _speedups() -> tuple[Any, float]:
    """Measured speed-up of a decode step over dense in place, and the predicted one."""
    ran, dense, ours = _decoding()
    hoped = dense.bound().phase("decode").seconds / ours.bound().phase("decode").seconds
    got = ran.decode.speedup("snapkv", over="dense")
    if not got.quiet:
        raise Inconclusive(f"the machine is not quiet: ratios spread {got.spread:.0%}")
    return got, hoped


@claim(
    expected=(0.7, float("inf")), unit="of the predicted gain", how="measured", cost=300.0,
    needs=("torch",), source="issue: at least 70 % of (calibrated speed-up - 1)",
    setting="recall-lm fp32, 8 x 8,192 tokens, 1/8 kept, over dense attention, cache in place",
)  # fmt: skip
def decode_gain_reached() -> Figure:
    """(measured speed-up - 1) over (the bound's - 1)."""
    got, hoped = _speedups()
    share = (got.median - 1) / (hoped - 1)
    ends = (got.low - 1) / (hoped - 1), (got.high - 1) / (hoped - 1)
    return Figure(share, ends, 1.0, {"speed-up": got.median, "predicted speed-up": hoped})


@claim(
    expected=(0.8, 1.25), unit="measured over predicted", how="measured", cost=300.0,
    needs=("torch",), source="issue: prediction within 20 % of measurement",
    setting="as decode_gain_reached: speed-up of a decode step",
)  # fmt: skip
def decode_prediction() -> Figure:
    """How far the bound's calibrated speed-up is from what happened."""
    got, hoped = _speedups()
    ran, dense, ours = _decoding()
    details: dict[str, float | str] = {}
    for name, case in (("dense", dense), ("snapkv", ours)):
        told = case.bound().phase("decode").seconds / 32
        details[f"{name}: measured over predicted"] = ran.decode[name].median / told
    ends = got.low / hoped, got.high / hoped
    return Figure(got.median / hoped, ends, 1.0, details)


@claim(
    expected=(3.0, float("inf")), unit="times faster", how="measured", cost=10.0, source=CARD,
    needs=("torch",), setting="attention of one decode step, 16,384 tokens against 2,048 kept",
)  # fmt: skip
def attention_at_16k() -> Figure:
    """One layer of 2 KV heads of 64 channels, batch 8, fp32."""
    import torch

    from narrows.kv.store_torch import Store
    from narrows.measure.timing import interleave

    stores = {"dense": Store(), "kept": Store()}
    for name, tokens in (("dense", 16384), ("kept", 2048)):
        keys = torch.randn(8, 2, tokens, 64, generator=torch.Generator().manual_seed(0))
        stores[name].fill(keys, keys.clone(), None, None)
    query = torch.randn(8, 4, 1, 64)
    with torch.inference_mode():
        timings = interleave({
            name: lambda store=store: store.attend(query, None, 0.125)
            for name, store in stores.items()
        })  # fmt: skip
    found = timings.speedup("kept", over="dense")
    if not found.quiet:
        raise Inconclusive(f"the machine is not quiet: ratios spread {found.spread:.0%}")
    return Figure(found.median, (found.low, found.high))


# --- the paper's machine -------------------------------------------------------------------------


@claim(
    expected=3.6, tolerance=0.25, unit="times faster", how="modelled", source=ABSTRACT,
    setting="LWM-7B (Llama-2-7B's shape) fp16 on A100-80, 2 x 16,384 tokens and 512 generated, "
    "capacity 2048; both caches concatenate at every step, as transformers 4.37 did",
    control="over a cache in place the same model gives about half of it (see details)",
)  # fmt: skip
def generation_speed_at_16k() -> Figure:
    """Batch 2 and capacity 2048 are as remembered of the paper's section on decoding speed."""
    work = llm("llama-2-7b", 16384, 512, 2, "fp16")
    case = Case(work, load("a100-80"), Plan(("flash", "compiled")))
    ours = case.with_(SnapKV())
    place = _decode_seconds(case) / _decode_seconds(ours)
    copied = _decode_seconds(_concatenating(case)) / _decode_seconds(_concatenating(ours))
    return Figure(copied, details={"over a cache in place": place})


def _decode_seconds(case: Case) -> float:
    return case.bound().phase("decode").seconds


def _concatenating(case: Case) -> Case:
    """The case with a cache that is copied whole to append a token (torch.cat)."""
    copies: list[Op] = []
    attends = [
        op for op in case.workload.phase("decode").ops
        if any(u.tensor in (KEYS, VALUES) for u in op.reads)
    ]  # fmt: skip
    for op in attends:
        uses = tuple(u for u in op.reads if u.tensor.startswith("kv."))
        copies.append(Op(f"{op.name}.cat", "copy", uses, uses, repeat=op.repeat))

    def add(phase: Phase) -> Phase:
        return replace(phase, ops=(*phase.ops, *copies)) if phase.name == "decode" else phase

    work = case.workload
    return replace(case, workload=replace(work, phases=tuple(add(p) for p in work.phases)))


@claim(
    expected=8.2, tolerance=0.05, unit="times less", how="exact", source=ABSTRACT,
    setting="bytes of the prompt's cache, 16,384 tokens against capacity 2048",
)  # fmt: skip
def memory_efficiency_at_16k() -> float:
    """The paper's figure is of the longest prompts that fit (131K over 16K, as remembered)."""
    case = Case(llm("llama-2-7b", 16384, 512, 2, "fp16"), load("a100-80"))
    return float(_cache_bytes(case.workload) / _cache_bytes(case.with_(SnapKV()).workload))


def _cache_bytes(work: Workload) -> Number:
    return work.tensors[KEYS].bytes() + work.tensors[VALUES].bytes()


@claim(
    expected=380e3, tolerance=0.10, unit="tokens", how="modelled", source=ABSTRACT,
    setting="LWM-7B fp16 on one A100-80 (80 GiB), batch 1, capacity 1024; transformers 4.37 keeps "
    "the logits of all positions, in fp16 and in fp32 at once",
)  # fmt: skip
def longest_context() -> Figure:
    """Weights + kept cache + tokens x (hidden state + both copies of the logits) = 80 GiB.

    Later the logits of one position are enough, and the MLP of a layer is the peak (details).
    """
    room = 80 * 2**30
    work = llm("llama-2-7b", 1024, 0, 1, "fp16")
    config = work.facts["config"]
    fixed = float(work.bytes("weight") + _cache_bytes(work))
    hidden = 2.0 * config.hidden
    logits = (2.0 + 4.0) * config.vocab
    inner = 2.0 * config.ffn
    dense = float(_cache_bytes(work)) / 1024
    return Figure(
        (room - fixed) / (hidden + logits),
        details={
            "dense cache": (room - fixed) / (hidden + logits + dense),
            "logits of the last position only": (room - fixed) / (2 * hidden + 3 * inner),
        },
    )
