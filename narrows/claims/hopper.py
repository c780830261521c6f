"""Claims of the dissection of Hopper.

Paper: Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture", IPDPS 2024
(arXiv:2402.13499v1), on H800 PCIe, A100 PCIe and RTX 4090. Its latencies are in cycles; a GPU's
clock cannot be counted from torch or triton without assuming it, so what is checked is their
ratios. H800 PCIe is not in the catalogue: H100 PCIe has its arithmetic and memory. What cannot be
reproduced here, as it needs hand-written PTX: single mma and wgmma instructions, TMA, distributed
shared memory, DPX against its emulation. Figures of tables were read second-hand where a source
says so; thresholds without a table are the card's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np

from narrows.chips import _cache_inference, _cpu_probes, _gemm_model, _minplus, _pchase
from narrows.chips._cache_simulator import CacheLevel, CacheSimulator
from narrows.chips._settle import NoisyRun, disagreement, settle
from narrows.chips.hopper import Hopper, compare
from narrows.core.claim import Figure, Inconclusive, claim
from narrows.core.errors import NarrowsError
from narrows.core.machine import Machine
from narrows.core.method import Reading
from narrows.machines.load import load
from narrows.measure import probes

PAPER_DEFAULTS = {"backend": "cuda", "limit": 0.15}
"""The paper states no repeats; the limit of disagreement is the card's."""

PAPER = "arXiv:2402.13499v1"
CARD = "card hopper, works when"
HIERARCHIES = (
    (90.0, (CacheLevel(4096, 4, 64, 4.0), CacheLevel(32768, 8, 64, 14.0))),
    (120.0, (CacheLevel(6144, 12, 32, 5.0), CacheLevel(49152, 6, 32, 17.0))),
    (200.0, (CacheLevel(2048, 1, 64, 3.0), CacheLevel(8192, 2, 64, 9.0),
             CacheLevel(65536, 16, 64, 40.0))),
    (80.0, (CacheLevel(8192, 64, 128, 30.0),)),
)  # fmt: skip
"""(latency of memory, levels): ways from one to full, sizes that are no power of two."""


@claim(
    expected=0.0, unit="figures that differ",
    setting="size, ways, line and latency of every level of four simulated hierarchies",
    source=f"{CARD} (a): known parameters are recovered exactly", how="exact", cost=4.0,
    control="edges taken from the sweep alone are too small",
)  # fmt: skip
def simulated_caches_are_recovered() -> Figure:
    """How many parameters the inference got wrong."""
    wrong, asked = 0, 0
    for memory, levels in HIERARCHIES:
        found = Hopper("cpu").levels(CacheSimulator(levels, memory), 512, 1 << 17)
        wrong += abs(len(found) - len(levels) - 1)
        for seen, known in zip(found, levels, strict=False):
            pairs = (
                (seen.size, known.size), (seen.ways, known.ways), (seen.line, known.line),
                (seen.latency, known.latency),
            )  # fmt: skip
            wrong += sum(a != b for a, b in pairs)
            asked += len(pairs)
        wrong += found[-1].latency != memory
        asked += 1
    return Figure(float(wrong), details={"asked": asked})


@claim(
    expected=1.0, unit="fraction decided rightly",
    setting="200 runs with repeats 0 to 12 % apart, 200 with 18 to 60 %; samples vary by 1 %",
    source=f"{CARD} (a): refuses above 15 %", how="exact", cost=1.0,
)  # fmt: skip
def noisy_runs_are_refused() -> float:
    """Share of runs published when they may be, and refused when not."""
    rng = np.random.default_rng(0)
    right = 0
    for low, high, quiet in ((0.0, 0.12, True), (0.18, 0.6, False)):
        for _ in range(200):
            apart = np.linspace(0.0, rng.uniform(low, high), 3)[rng.permutation(3)]
            samples = 10 * (1 + apart[:, None]) * (1 + 0.01 * rng.standard_normal((3, 31)))
            try:
                settle(samples, "cycle", "synthetic")
                right += quiet
            except NoisyRun:
                right += not quiet
    return right / 400


def _latencies() -> dict[str, Reading]:
    """Cycles by level of this processor; noise becomes Inconclusive."""
    chaser = _pchase.Chaser(rounds=5)
    found: dict[str, Reading] = {}
    for level, size in _cpu_probes.footprints().items():
        # latency beyond the private caches is shared with neighbours: only its order is asked
        repeats, limit = (3, 0.15) if level in ("l1", "l2") else (2, 0.6)
        try:
            found[level] = settle(chaser.samples(size, repeats), "cycle", "P-chase", limit)
        except NoisyRun as why:
            raise Inconclusive(f"{level}: {why}") from None
    return found


@claim(
    expected=0.0, unit="steps down",
    setting="this processor: random pointer chase well inside each cache and beyond the last",
    source=f"{CARD} (a): monotone steps", how="measured", cost=6.0, needs=("torch",),
)  # fmt: skip
def latency_rises_from_level_to_level() -> Figure:
    """Levels whose interval lies below that of the level before; overlaps cannot be told."""
    found = _latencies()
    down = 0
    for (near, a), (far, b) in pairwise(found.items()):
        if b.interval[0] <= a.interval[1] and a.interval[0] <= b.interval[1]:
            raise Inconclusive(
                f"the intervals of {near} and {far} overlap; run on a quieter machine"
            )
        down += b.value < a.value
    return Figure(float(down), details={f"{k}, cycles": r.value for k, r in found.items()})


@claim(
    expected=(3.8, 5.2), unit="cycles",
    setting="this processor: dependent loads in a quarter of the first cache, cycles counted by a "
    "chain of additions beside them; 4 to 5 cycles, read to 0.2",
    source=f"{CARD} (a): L1 4-5 cycles", how="measured", cost=2.0, needs=("torch",),
)  # fmt: skip
def latency_of_the_first_cache() -> Figure:
    """Median cycles of a load."""
    size = next(iter(_cpu_probes.footprints().values()))
    try:
        # 0.2 of 5 cycles is 4 %: repeats further apart than that cannot decide
        chaser = _pchase.Chaser(5, slices=60)
        found = settle(chaser.samples(size, 9), "cycle", "P-chase", limit=0.04)
    except NoisyRun as why:
        raise Inconclusive(str(why)) from None
    return Figure(found.value, found.interval)


@claim(
    expected=(0.7, 1.05), unit="times the size the system lists",
    setting="this processor: largest footprint that stays within 25 % of the first plateau",
    source=f"{CARD} (a): finds this processor's cache edges", how="measured", cost=2.0,
    needs=("torch",),
)  # fmt: skip
def edge_of_the_first_cache() -> Figure:
    """The edge the P-chase finds over the listed size; the bracket is the interval."""
    listed = probes.caches(1)
    if not listed:
        raise Inconclusive("the system lists no caches to compare with")
    size = listed[0].size
    # many slices: another thread of the core, if there is one, takes its part of this cache
    chaser = _pchase.Chaser(5, slices=20)
    seen = [
        _cache_inference.levels(chaser, size // 8, size * 4, 64, tolerance=0.25, exact=False)[0]
        for _ in range(3)
    ]
    edges = [found.size for found in seen]
    if min(edges) * 1.25 < max(edges):  # a step of the sweep is 19 %
        raise Inconclusive(f"three sweeps disagree: {edges} bytes; run on a quieter machine")
    found = seen[edges.index(sorted(edges)[1])]
    low, high = found.bracket
    return Figure(found.size / size, (low / size, high / size))


@claim(
    expected=(0.0, 0.10), unit="standard deviation over mean",
    setting="this processor: nine latencies of the first cache, each the median of five",
    source=f"{CARD} (a): repeatability", how="measured", cost=2.0, needs=("torch",),
)  # fmt: skip
def readings_repeat() -> Figure:
    """Coefficient of variation of medians of five."""
    size = next(iter(_cpu_probes.footprints().values()))
    samples = _pchase.Chaser(5).samples(size, 9)
    medians = np.median(samples, axis=1)
    value = float(medians.std(ddof=1) / medians.mean())
    return Figure(value, details={"largest disagreement": disagreement(samples)})


@claim(
    expected=0.0, unit="entries that differ",
    setting="the timed kernels against numpy, and an edit distance against its definition",
    source=f"{CARD} (c): the min-plus operation", how="exact", cost=4.0, needs=("torch",),
)  # fmt: skip
def minimum_plus_is_exact() -> float:
    """Entries of the products and the distance that are wrong."""
    kernels = _minplus.kernels()
    a, b, c = _minplus.operands(32)
    low, total = c.copy(), c.copy()
    kernels.minplus(a, b, low)
    kernels.multiply_add(a, b, total)
    wrong = int((low != np.minimum(c, (a[:, :, None] + b[None]).min(axis=1))).sum())
    wrong += int((~np.isclose(total, c + a @ b, rtol=1e-5)).sum())
    x, y = (np.array([ord(letter) for letter in word]) for word in ("intention", "execution"))
    wrong += int(kernels.edit_distance(x, y, np.zeros(len(y) + 1, np.int64)) != 5)
    return float(wrong)


@claim(
    expected=2.0, tolerance=0.2, unit="times",
    setting="this processor, one core: operations a second of multiply-add over minimum-plus, the "
    "same fp32 loops, in turn; one fused instruction for the one and two for the other",
    source=f"{PAPER}: why DPX fuses addition and minimum; {CARD} (c)", how="measured", cost=4.0,
    needs=("torch",),
    explained="where loads bind, or adders and comparators are units of their own, two "
    "instructions take no longer than one: such a processor has nothing that DPX would relieve",
)  # fmt: skip
def minimum_plus_beside_multiply_add() -> Figure:
    """Ratio of rates."""
    from narrows.measure.timing import interleave

    kernels = _minplus.kernels()
    a, b, c = _minplus.operands()
    calls = {"min": lambda: kernels.minplus(a, b, c), "mul": lambda: kernels.multiply_add(a, b, c)}
    ratio = interleave(calls, repeats=31, min_seconds=5e-4, turns=4).ratio("min", to="mul")
    if ratio.spread > 0.5:
        raise Inconclusive(f"rounds vary by {ratio.spread:.0%}; run on a quieter machine")
    return Figure(ratio.median, (ratio.low, ratio.high))


@claim(
    expected=756.5, tolerance=0.005, unit="TFLOPS",
    setting="FP16 rate of the catalogue's h100-pcie, which stands for H800 PCIe",
    source="arXiv:2501.12084, section 6.2 (the authors' extended version): the peak that its "
    "65.3 % for mma and 96.4 % for wgmma refer to; read second-hand", how="exact", cost=0.5,
)  # fmt: skip
def catalogue_has_the_papers_peak() -> float:
    """The catalogue's figure."""
    return load("h100-pcie").compute("fp16").capacity / 1e12


@claim(
    expected=0.0, unit="orders broken",
    setting="products of side 8192 on catalogue machines, H100 PCIe, A100 and RTX 4090, with FP32 "
    "sums: FP16 and TF32 in this order, FP8 and INT8 fastest on Hopper, memory in this order",
    source=f"{PAPER}: throughput of tensor cores and memory follows the official figures; "
    f"{CARD} (c)", how="modelled", cost=1.0,
)  # fmt: skip
def catalogue_keeps_the_papers_orders() -> Figure:
    """Pairs whose order is another; seconds in the details."""
    hopper, ampere, ada = (load(name) for name in ("h100-pcie", "a100-40", "rtx-4090"))
    broken = 0
    details: dict[str, float | str] = {}
    for precision in ("fp16", "bf16", "tf32", "int8", "fp8"):
        chips: list[Machine] = [hopper, ampere, ada]
        if precision == "fp8":
            chips.remove(ampere)  # it has no such unit
        took = [_gemm_model.seconds(chip, 8192, precision) for chip in chips]
        details |= {
            f"{precision}, {c.name}": t for c, t in zip(chips, took, strict=True)
        }  # fmt: skip
        if precision == "int8":
            broken += took[0] != min(took)
        else:
            broken += sum(a >= b for a, b in pairwise(took))
    rates = [chip.bandwidth(chip.memory) for chip in (hopper, ampere, ada)]
    broken += sum(a <= b for a, b in pairwise(rates))
    return Figure(float(broken), details=details)


@claim(
    expected=(1.6, 2.1), unit="times",
    setting="linear layer of side 16384 on h100-pcie, FP8 with both casts over FP16, priced",
    source=f"{PAPER}: FP8 about twice FP16 at size; {CARD}", how="modelled", cost=0.5,
)  # fmt: skip
def fp8_pays_when_large() -> float:
    """Seconds in FP16 over seconds in FP8 with casts."""
    chip = load("h100-pcie")
    return _gemm_model.seconds(chip, 16384, "fp16") / _gemm_model.seconds(chip, 16384, "fp8", True)


@claim(
    expected=(0.0, 1.0), unit="times",
    setting="the same at side 1024",
    source=f"{PAPER}: small layers do not cover the casts", how="modelled", cost=0.5,
)  # fmt: skip
def fp8_does_not_pay_when_small() -> float:
    """Seconds in FP16 over seconds in FP8 with casts."""
    chip = load("h100-pcie")
    return _gemm_model.seconds(chip, 1024, "fp16") / _gemm_model.seconds(chip, 1024, "fp8", True)


@claim(
    expected=0.0, unit="figures",
    setting="a dissected machine beside a catalogue one: rows that were not measured",
    source="card hopper, traps: catalogue values printed as measured", how="exact", cost=0.5,
)  # fmt: skip
def catalogue_figures_are_never_called_measured() -> float:
    """Rows of a comparison without a measurement; machines with none must be refused."""
    reading = Reading(1e9, "byte/s", (9e8, 1.1e9), None, {"method": "synthetic"})
    flops = Reading(1e12, "flop/s", (9e11, 1.1e12), None, {"method": "synthetic"})
    made = Hopper("cpu")._machine({"read.dram": reading, "compute.fp32": flops}, "dram")
    rows = compare(made, load("h100-pcie"))
    wrong = sum(not row.method.startswith("measured") for row in rows) + (len(rows) != 2)
    try:
        compare(load("a100-40"), load("h100-pcie"))
        wrong += 1
    except NarrowsError:
        pass
    return float(wrong)


# --- on a GPU ------------------------------------------------------------------------------------


def _gpu() -> Machine:
    """The catalogue's machine for this GPU; Inconclusive where it is not a known Hopper."""
    import torch

    name = torch.cuda.get_device_name()
    for words, key in ((("H200",), "h200"), (("H100", "PCIe"), "h100-pcie"),
                       (("H800", "PCIe"), "h100-pcie"),
                       (("H100", "HBM3"), "h100-sxm")):  # fmt: skip
        if all(word in name for word in words):
            return load(key)
    raise Inconclusive(f"the figures are Hopper's; this GPU is {name!r}")


def _read(name: str, repeats: int = 3) -> Reading:
    try:
        return Hopper("cuda", repeats).measure(name)
    except NoisyRun as why:
        raise Inconclusive(str(why)) from None


def _share(reading: Reading, of: float) -> Figure:
    low, high = reading.interval
    told: dict[str, float | str] = {"measured": reading.value, "unit": reading.unit}
    told["method"] = str(reading.facts["method"])
    return Figure(reading.value / of, (low / of, high / of), details=told)


@claim(
    expected=(0.85, 1.0), unit="of the datasheet",
    setting="4 GiB read once; on H200 of 4.8 TB/s",
    source=f"{CARD} (b)", how="measured", cost=5.0, needs=("gpu",),
)  # fmt: skip
def gpu_memory_is_read_at_its_rate() -> Figure:
    """Bytes a second over the catalogue's."""
    chip = _gpu()
    return _share(_read("read.hbm"), chip.bandwidth(chip.memory))


@claim(
    expected=(0.65, 1.0), unit="of the datasheet",
    setting="square BF16 product of side 8192, random operands; on H200 of 989 TFLOPS",
    source=f"{CARD} (b)", how="measured", cost=5.0, needs=("gpu",),
)  # fmt: skip
def gpu_products_reach_their_rate() -> Figure:
    """Operations a second over the catalogue's."""
    return _share(_read("compute.bf16"), _gpu().compute("bf16").capacity)


@claim(
    expected=(1.6, 2.1), unit="times",
    setting="square products of side 8192, FP8 (e4m3, scaled) over BF16, in turn",
    source=f"{PAPER}: FP8 about twice FP16; {CARD} (b)", how="measured", cost=5.0, needs=("gpu",),
)  # fmt: skip
def gpu_fp8_over_bf16() -> Figure:
    """Ratio of rates."""
    from narrows.chips import _gpu_probes as gpu

    _gpu()
    calls = {name: gpu.product(name, 8192) for name in ("fp8", "bf16")}
    ratio = gpu.timed(calls, 21).ratio("bf16", to="fp8")
    return Figure(ratio.median, (ratio.low, ratio.high))


@claim(
    expected=50.0, tolerance=0.2, unit="MB",
    setting="random reads of 4 KiB over footprints from 4 to 512 MiB",
    source=f"{CARD} (b); H100 white paper: 50 MB", how="measured", cost=5.0, needs=("gpu",),
)  # fmt: skip
def gpu_second_cache_ends() -> Figure:
    """Where reads slow down."""
    _gpu()
    found = _read("size.l2")
    low, high = found.interval
    return Figure(found.value / 1e6, (low / 1e6, high / 1e6))


@claim(
    expected=(512.0, 8192.0), unit="rows",
    setting="side from which FP8 with the cast of its input beats BF16, sides 512 to 8192",
    source=f"{PAPER}: FP8 wins once a product covers its casts; {CARD} (b)", how="measured",
    cost=5.0, needs=("gpu",),
)  # fmt: skip
def gpu_fp8_crossover() -> Figure:
    """The side."""
    _gpu()
    found = _read("crossover.fp8", 2)
    told = {k: float(v) for k, v in found.facts.items() if k.startswith("side")}
    return Figure(found.value, found.interval, details={**told})


def _latency_ratio(far: str, near: str) -> Figure:
    _gpu()
    a, b = _read(f"latency.{far}"), _read(f"latency.{near}")
    told: dict[str, float | str] = {f"{far}, s": a.value, f"{near}, s": b.value}
    low, high = a.interval[0] / b.interval[1], a.interval[1] / b.interval[0]
    return Figure(a.value / b.value, (low, high), details=told)


@claim(
    expected=263.0 / 40.7, tolerance=0.3, unit="times",
    setting="dependent loads over 8 MiB and 32 KiB; paper: 263.0 and 40.7 cycles on H800",
    source=f"{PAPER}, table IV, read second-hand", how="measured", cost=5.0, needs=("gpu",),
)  # fmt: skip
def gpu_second_cache_over_first() -> Figure:
    """Ratio of latencies."""
    return _latency_ratio("l2", "l1")


@claim(
    expected=478.8 / 263.0, tolerance=0.3, unit="times",
    setting="dependent loads over 512 MiB and 8 MiB; paper: 478.8 and 263.0 cycles on H800",
    source=f"{PAPER}, table IV, read second-hand", how="measured", cost=5.0, needs=("gpu",),
)  # fmt: skip
def gpu_memory_over_second_cache() -> Figure:
    """Ratio of latencies."""
    return _latency_ratio("hbm", "l2")


@contextmanager
def mutant() -> Iterator[str]:
    """Takes the edge of a cache from the coarse sweep, without looking between its footprints."""
    whole = _cache_inference.bisect

    def coarse(
        probe: _cache_inference.Probe, fits: int, overflows: int, level: float, stride: int,
        tolerance: float,
    ) -> tuple[int, int]:  # fmt: skip
        return overflows - stride, overflows

    _cache_inference.bisect = coarse
    try:
        yield simulated_caches_are_recovered.name
    finally:
        _cache_inference.bisect = whole
