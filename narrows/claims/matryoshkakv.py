"""MatryoshkaKV (arXiv 2410.14731): what its paper and its card say, and what comes out here.

Quality figures are of recall-lm with the shipped projection, on text that neither model nor
projection was trained on. The paper's tables are of 7B models whose weights do not belong here;
the batch that its saving lets in is modelled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from narrows.claims._matryoshkakv import (
    SIZE,
    divergences,
    full_rank_error,
    needles,
    random_codec,
    store_of,
    trained,
)
from narrows.core.case import Case
from narrows.core.claim import Figure, Inconclusive, claim
from narrows.core.plan import Plan
from narrows.kv.matryoshkakv import MatryoshkaKV
from narrows.machines.load import load
from narrows.trace.llm import llm

ABSTRACT = "abstract"
CARD = "systems/kv_cache.md, card matryoshkakv, works when"
PAPER_DEFAULTS = {"budget": 0.4}
"""The 60 % average compression of the abstract."""

ROOM = 80e9
"""Bytes of an A100."""


@contextmanager
def mutant() -> Iterator[str]:
    """Scores without the product of query and mean; the claim that must notice."""
    from narrows.kv.lowrank import LowRank

    sound = LowRank.scores

    def broken(self: Any, queries: Any, packed: Any) -> Any:
        mean = self.mean.to(queries.device).unsqueeze(-1)
        return sound(self, queries, packed) - queries @ mean

    LowRank.scores = broken
    try:
        yield packed_attention_beside_unpacked.name
    finally:
        LowRank.scores = sound


# --- exact ---------------------------------------------------------------------------------------


@claim(
    expected=(0.0, 1e-4), unit="largest difference of logits", how="exact", cost=2.0,
    needs=("torch",), source=CARD, control="at half of the channels (details)",
    setting="random model, 8 query heads over 2 KV heads; random bases and means at full rank, the "
    "last 8 tokens in full; 20 tokens after a prompt of 40",
)  # fmt: skip
def full_rank_changes_nothing() -> Figure:
    """Logits through the cache against a plain one."""
    full, half = full_rank_error()
    return Figure(full, details={"at half": half})


@claim(
    expected=(0.0, 1e-5), unit="largest difference", how="exact", cost=2.0, needs=("torch",),
    source=CARD, setting="every basis of the shipped projection, after training",
)  # fmt: skip
def trained_bases_are_orthogonal() -> Figure:
    """Of U^T U from the unit matrix, in fp64."""
    import torch

    basis = trained().basis.double()
    off = basis.transpose(-1, -2) @ basis - torch.eye(SIZE, dtype=torch.float64)
    turned = torch.linalg.det(basis).min()
    return Figure(float(off.abs().max()), details={"smallest determinant": float(turned)})


@claim(
    expected=1.0, unit="share of numbers", how="exact", cost=1.0, needs=("torch",), source=CARD,
    setting="64 tokens of 2 heads, codes at ranks 8, 16, 40 and 64 of one basis",
)  # fmt: skip
def ranks_are_nested() -> Figure:
    """What a smaller rank stores is what a larger one begins with (to 1e-5: other sums)."""
    import torch

    x = torch.randn(1, 2, 64, SIZE, generator=torch.Generator().manual_seed(2))
    whole = random_codec((SIZE, SIZE)).pack(x).parts[0].unflatten(3, (2, SIZE))
    same = total = 0
    for rank in (8, 16, 40, 64):
        codes = random_codec((rank, rank)).pack(x).parts[0].unflatten(3, (2, rank))
        same += int(((codes - whole[..., :rank]).abs() < 1e-5).sum())
        total += codes.numel()
    return Figure(same / total, details={"numbers compared": total})


@claim(
    expected=(0.0, 1e-5), unit="largest difference", how="exact", cost=2.0, needs=("torch",),
    source=CARD, control="mutant(): scores without the product with the mean",
    setting="1,000 tokens, the last 64 in full, ranks 24 and 40 of 64, group 4 of 8 query heads "
    "over 2 KV heads, 2 rows, one of them padded by 300",
)  # fmt: skip
def packed_attention_beside_unpacked() -> Figure:
    """Attention in the basis, merged with what is in full, against unpacking first, in fp64."""
    import torch

    made = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 2, 1000, SIZE, generator=made) for _ in (0, 1))
    queries = torch.randn(2, 8, 1, SIZE, generator=made)
    valid = torch.arange(1000) >= torch.tensor([[0], [300]])
    store = store_of((24, 40), recent=64)
    store.fill(keys, values, None, valid)

    def attended(k: Any, v: Any) -> Any:
        k, v = (x.double().repeat_interleave(4, 1) for x in (k, v))
        scores = queries.double() @ k.transpose(2, 3) * SIZE**-0.5
        return scores.masked_fill(~valid[:, None, None], -torch.inf).softmax(-1) @ v

    found = store.attend(queries, valid[:, None, None], None)
    lost = float((found - attended(keys, values)).abs().max())
    off = float((found - attended(store.keys, store.values)).abs().max())
    return Figure(off, details={"to what was given": lost})


@claim(
    expected=1.0, tolerance=0.001, unit="of the share of channels", how="exact", cost=2.0,
    needs=("torch",), source=CARD + ": stored bytes fall as the ranks",
    setting="the shipped projection at 40 %, greedy ranks: a store of each layer, 512 tokens",
    control="stored as rectangles of the widest head it would be more (details)",
)  # fmt: skip
def stored_bytes_follow_the_ranks() -> Figure:
    """Bytes of live storage over those in full, over the mean share of the ranks."""
    import torch

    class Config:
        head_dim = SIZE

    made = trained()
    technique = MatryoshkaKV()
    technique._projection = made
    ranks = torch.tensor(made.allocate(0.4)).double()
    held = full = wide = 0.0
    for layer in range(len(ranks)):
        store = technique.store(Config(), layer)
        x = torch.randn(
            1, ranks.shape[2], 512, SIZE, generator=torch.Generator().manual_seed(layer)
        )
        store.fill(x, x, None, None)
        held, full = held + store.nbytes(), full + 2 * x.nbytes
        wide += float(ranks[layer].amax(-1).sum()) * ranks.shape[2] * 512 * 4
    share = float(ranks.mean()) / SIZE
    details: dict[str, float | str] = {"mean share": share, "as rectangles": wide / full / share}
    details |= {"least": float(ranks.min()), "most": float(ranks.max())}
    return Figure(held / full / share, details=details)


# --- quality of the reference model --------------------------------------------------------------

READ = "recall-lm, 64 tokens read one by one after 1,024 of unseen text, 16 windows"


@claim(
    expected=(0.3, 1.0), unit="less divergence", how="measured", cost=60.0, source=CARD,
    needs=("torch", "data"), setting=READ + "; the same rank everywhere, 50 % and 37.5 %",
    control="principal axes at equal ranks",
    explained="the shipped projection was trained for 60 steps of one sample, the paper's for "
    "batches of 131,072 tokens: it hardly leaves the axes it begins from. Larger steps lower the "
    "divergence of its samples and raise that of unseen text: with 12 times the rate it came out "
    "29 % above the axes' at one of the two ranks; 300 steps at 4 times, with answers weighed "
    "more, 13 % above. Whether batches would do it was not tried. Greedy ranks matter far more "
    "here (adaptive_beside_uniform)",
)  # fmt: skip
def trained_beside_principal_axes() -> Figure:
    """How much less the logits diverge from a plain cache's; the smaller of two ranks."""
    told = divergences()
    less = {s: 1 - told[f"trained {s}"][0] / told[f"axes {s}"][0] for s in ("0.5", "0.375")}
    return Figure(
        min(less.values()),
        details={**less, **{n: f"{off:.4f}" for n, (off, _) in told.items()}},
    )


@claim(
    expected=(-float("inf"), 0.5), unit="of the axes' loss", how="measured", cost=60.0, source=CARD,
    needs=("torch", "data"), setting=READ + "; the same rank everywhere, 50 % and 37.5 %",
    control="principal axes at equal ranks",
    explained="the shipped projection was trained for 60 steps of one sample, the paper's for "
    "batches of 131,072 tokens: it hardly leaves the axes it begins from. Larger steps lower the "
    "divergence of its samples and raise that of unseen text: with 12 times the rate it came out "
    "29 % above the axes' at one of the two ranks; 300 steps at 4 times, with answers weighed "
    "more, 13 % above. Whether batches would do it was not tried. Greedy ranks matter far more "
    "here (adaptive_beside_uniform)",
)  # fmt: skip
def perplexity_beside_principal_axes() -> Figure:
    """Perplexity above the plain cache's, over that of principal axes; the larger of two ranks."""
    import math

    told = {n: math.exp(loss) for n, (_, loss) in divergences().items()}
    lost = {n: p / told["dense"] - 1 for n, p in told.items() if n != "dense"}
    over = [lost[f"trained {s}"] / lost[f"axes {s}"] for s in ("0.5", "0.375")]
    return Figure(max(over), details={n: f"{x:.2%}" for n, x in lost.items()})


@claim(
    expected=(0.0, 1.0), unit="of the divergence of equal ranks", how="measured", cost=60.0,
    needs=("torch", "data"), source=CARD, setting=READ + "; trained bases, 50 % and 37.5 %",
)  # fmt: skip
def adaptive_beside_uniform() -> Figure:
    """Divergence at greedy ranks over that at the same rank everywhere; the larger of two."""
    told = divergences()
    over = {s: told[f"adaptive {s}"][0] / told[f"trained {s}"][0] for s in ("0.5", "0.375")}
    return Figure(max(over.values()), details=dict(over))


@claim(
    expected=(0.9, float("inf")), unit="of dense recall", how="measured", cost=60.0,
    needs=("torch", "data"), source=ABSTRACT + ": over 90 % of performance at 60 % compression",
    setting="recall-lm, one needle of 3 tokens in 2,048 of unseen text, 96 answers; asked after "
    "the text was projected; 40 % of channels, greedy ranks",
    control="principal axes with the same rank everywhere (details)",
)  # fmt: skip
def needle_at_60_percent() -> Figure:
    """Share of dense answers that remain."""
    told = needles()
    full, ours = told["dense"].share, told["adaptive"]
    if full < 0.5:
        raise Inconclusive(f"the model itself recalls only {full:.0%}: nothing to compare")
    ends = ours.low / full, ours.high / full
    return Figure(ours.share / full, ends, details={n: str(s) for n, s in told.items()})


# --- speed here ----------------------------------------------------------------------------------


@claim(
    expected=(1.5, float("inf")), unit="times faster", how="measured", cost=15.0,
    needs=("torch",), source=CARD + ": decode attention at 50 %, bytes-bound length",
    setting="attention of one decode step, 8 x 8,192 tokens, 4 heads over 2 KV heads of 64",
    explained="half of the bytes are read, but by torch's products of two rows with a narrow "
    "matrix, head by head, which reach a fraction of the rate that its attention kernel reads a "
    "dense cache at. Coordinates of unequal ranks lie side by side, which no kernel at hand reads; "
    "KIVI's loops show what compiling would give",
)  # fmt: skip
def decode_attention_at_half() -> Figure:
    """One layer of recall-lm's shape in fp32, against an in-place cache of all channels."""
    import torch

    from narrows.kv.store_torch import Store
    from narrows.measure.timing import interleave

    stores = {"dense": Store(), "equal": store_of((32, 32)), "ragged": store_of((24, 40))}
    keys = torch.randn(8, 2, 8192, SIZE, generator=torch.Generator().manual_seed(0))
    for store in stores.values():
        store.fill(keys, keys.flip(0).contiguous(), None, None)
    query = torch.randn(8, 4, 1, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        timings = interleave({
            name: lambda store=store: store.attend(query, None, 0.125)
            for name, store in stores.items()
        })  # fmt: skip
    found = timings.speedup("equal", over="dense")
    if not found.quiet:
        raise Inconclusive(
            f"the machine is not quiet: ratios spread {found.spread:.0%} around {found.median:.2f}"
        )
    details: dict[str, float | str] = {
        "ragged": timings.speedup("ragged", over="dense").median,
        "bytes": stores["dense"].nbytes() / stores["equal"].nbytes(),
    }
    return Figure(found.median, (found.low, found.high), details=details)


# --- the paper's models --------------------------------------------------------------------------


@claim(
    expected=2.5, tolerance=0.01, unit="times the batch", how="modelled", source=CARD,
    setting="Llama-2-7B fp16 on A100-80, 4,096 tokens read and 256 written, weights and cache of a "
    "batch that fills it; 40 % of channels",
)  # fmt: skip
def batch_that_fits() -> Figure:
    """Bytes derived from the case's channel axis."""
    work = llm("llama-2-7b", 4096, 256, 1, "fp16")
    case = Case(work, load("a100-80"), Plan(("flash", "compiled")))
    room = ROOM - float(work.bytes("weight"))
    fit = [room / float(c.workload.bytes("kv")) for c in (case, case.with_(MatryoshkaKV()))]
    return Figure(fit[1] / fit[0], details={"dense": int(fit[0]), "ours": int(fit[1])})
