"""The rates, levels and links of this machine, each measured or said to be missing, and why."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from narrows.core.caches import FAULTS, WAKE
from narrows.core.errors import NarrowsError
from narrows.core.resource import Kind, Link, Resource
from narrows.measure import probes
from narrows.measure.engines import Engine, Torch
from narrows.measure.kernels import compiled
from narrows.measure.probes import MB
from narrows.measure.timing import Progress, best

GRAIN = 32768
"""Elements from which torch splits a pointwise op over cores (at::internal::GRAIN_SIZE)."""

NATIVE = 1.1
"""A format is a compute rate of its own when its products beat fp32's by this factor; fp64 always
is one. Slower formats are emulated and run at the rate of the next wider one."""

PRODUCTS = {"cpu": ((512, 512, 512), (1024, 512, 1024), (256, 1024, 768)),
            "cuda": ((4096, 4096, 4096), (8192, 8192, 8192))}  # fmt: skip
"""Shapes (m, k, n) of which the fastest is the compute rate."""


@dataclass
class Found:
    """What has been measured so far. notes: said of the whole. missing: what was not, and why."""

    resources: dict[str, Resource] = field(default_factory=dict[str, Resource])
    links: dict[str, Link] = field(default_factory=dict[str, Link])
    tiers: dict[str, str] = field(default_factory=dict[str, str])
    caches: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list[str])
    missing: list[str] = field(default_factory=list[str])

    def rate(self, name: str, capacity: float, unit: str, source: str) -> None:
        """Add a rate."""
        self.resources[name] = Resource(name, Kind.RATE, capacity, unit, source)

    def level(self, name: str, capacity: float, unit: str, source: str) -> None:
        """Add a level."""
        self.resources[name] = Resource(name, Kind.LEVEL, capacity, unit, source)


def compute(found: Found, engine: Engine, seconds: float) -> None:
    """Flop rates by precision: the best product of a few shapes."""
    plain = 0.0
    precisions = engine.precisions()
    end = perf_counter() + 2 * seconds
    for precision in precisions:
        top, shape = 0.0, ""
        if plain and perf_counter() > end:
            found.missing.append(f"compute.{precision} (no time left: the machine is busy)")
            continue
        try:
            small = best(engine.product(precision, 128, 128, 128), 0.01, engine.device)
            if plain and precision != "fp64" and 2 * 128**3 / small < plain / 20:
                # an emulated format would spend the whole time on one large product
                found.missing.append(f"compute.{precision} (emulated: slower than fp32)")
                continue
            for m, k, n in PRODUCTS["cuda" if engine.device != "cpu" else "cpu"]:
                call = engine.product(precision, m, k, n)
                took = best(call, seconds / len(precisions) / 3, engine.device)
                if 2 * m * k * n / took > top:
                    top, shape = 2 * m * k * n / took, f"({m}, {k}) by ({k}, {n})"
        except NarrowsError as error:
            found.missing.append(f"compute.{precision} ({error})")
            continue
        if plain and precision != "fp64" and top < NATIVE * plain:
            found.missing.append(f"compute.{precision} (not faster than fp32)")
            continue
        plain = plain or top
        found.rate(f"compute.{precision}", top, "flop/s", f"best product, {shape}, {engine.name}")


def memory(found: Found, engine: Engine, threads: int, seconds: float) -> None:
    """Main memory and caches of a processor, and the latency of a load."""
    listed = probes.caches(threads)
    available = probes.memory_available()
    far = 4 * max([c.size for c in listed], default=16 * MB)
    far = int(min(max(far, 64 * MB), (available or 1e18) / 8))
    loops = compiled()
    triad = 3 * far / best(engine.triad(far // 4), seconds / 8)  # three arrays of `far` bytes
    read = far / best(engine.read(far // 4), seconds / 8)
    if loops is not None and listed:
        last = listed[-1]
        near = [c.size // 2 for c in listed]
        steps = [int(last.size * f) for f in (0.625, 0.75, 0.875, 1.0, 1.25, 1.5)]
        sizes = [*near, *steps, far]
        streams = probes.streams(loops, sizes, threads, seconds / 2 / len(sizes))
        for cache, at in zip(listed, streams, strict=False):
            size, told = float(cache.size), "as the system lists it"
            if cache is last:
                beyond = max(streams[-1].read, read)
                size = probes.knee(streams[len(near) - 1 : -1], at.read, beyond, cache.size)
                told = f"where reads slow down; {cache.size / MB:g} MiB nominal"
            found.rate(cache.name, max(at.read, at.triad), "byte/s",
                       f"best of read and triad, {at.size / 1024:.0f} KiB")  # fmt: skip
            found.level(f"{cache.name}.capacity", size, "byte", told)
        read = max(read, streams[-1].read)
        triad = max(triad, streams[-1].triad)
        found.caches = _rising(found, [c.name for c in listed])
        places = [*(c.size // 2 for c in listed), min(far, 64 * MB)]
        waits = [probes.random_access(loops, p, seconds / 16) for p in places]
        shown = ", ".join(f"{w * 1e9:.3g} ns in {p / MB:.3g} MiB"
                          for w, p in zip(waits, places, strict=True))  # fmt: skip
        found.rate("random", 1 / waits[-1], "op/s", f"loads that wait for each other: {shown}")
    else:
        why = "numba is not installed" if loops is None else "the system lists no caches"
        found.missing.append(f"caches and random access ({why})")
    # A store to a line that is not in a cache reads it first (write-allocate): a triad that
    # counts 3 transfers makes 4. The limit of the memory is what really went over the bus.
    found.rate("dram", max(read, triad * 4 / 3), "byte/s",
               f"best of read ({read / 1e9:.3g} GB/s) and STREAM triad ({triad / 1e9:.3g} GB/s as "
               f"STREAM counts, 4/3 of it with write-allocate), {far / MB:.0f} MiB")  # fmt: skip
    found.tiers |= {"device": "dram", "host": "dram"}
    total = available or probes.memory_total()
    if total is not None:
        found.level("dram.capacity", total, "byte", "available to a new process when measured")
    else:
        found.missing.append("dram.capacity (the system does not tell)")


def _rising(found: Found, names: list[str]) -> tuple[str, ...]:
    """Caches that are really larger than the one before: a virtual machine may list any."""
    kept: list[str] = []
    for name in names:
        size = found.resources[f"{name}.capacity"].capacity
        if not kept or size > found.resources[f"{kept[-1]}.capacity"].capacity:
            kept.append(name)
    return tuple(kept)


def overheads(found: Found, engine: Engine, seconds: float) -> None:
    """What an op costs beside its work: the call, waking the other cores, new memory."""
    part = seconds / 8
    call = best(engine.tiny(), part, engine.device)
    found.rate("dispatch", 1 / call, "op/s", f"an addition of one element, {engine.name}")
    if engine.device != "cpu":
        return
    if isinstance(engine, Torch) and engine.threads > 1:
        alone = best(engine.unary(GRAIN, False), part)
        split = best(engine.unary(GRAIN + 64, False), part)
        if split > alone + 5e-7:
            found.rate(WAKE, 1 / (split - alone), "op/s", "a pointwise op just above the grain")
            found.level(f"{WAKE}.grain", GRAIN, "slot", "elements that torch leaves to one core")
    # C libraries keep freed blocks up to a size and give larger ones back to the system, which
    # clears them page by page when they are next touched.
    for block in (8 * MB, 32 * MB, 64 * MB):
        new = best(engine.unary(block // 4, True), part, least=5)
        kept = best(engine.unary(block // 4, False), part, least=5)
        if new > 1.5 * kept:
            rate = block / (new - kept)
            found.rate(FAULTS, rate, "byte/s", "first touch of new memory, beside its traffic")
            found.level(f"{FAULTS}.block", block, "byte", "results this large get new memory")
            break


def surroundings(found: Found, folder: Path) -> None:
    """Drive and loopback."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found.rate("drive", probes.drive(folder), "byte/s", "sequential O_DIRECT reads of 64 MiB")
        found.tiers["drive"] = "drive"
    except OSError as error:
        found.missing.append(f"drive ({error.strerror or error})")
    try:
        bandwidth, latency = probes.loopback()
        found.links["loopback"] = Link("loopback", bandwidth, latency, 2, "point", "TCP, one way")
        found.tiers["peers"] = "loopback"
    except OSError as error:
        found.missing.append(f"loopback ({error.strerror or error})")


def graphics(found: Found, engine: Torch, seconds: float) -> None:
    """Memory of a CUDA GPU and its link to the host."""
    import torch

    free, total = torch.cuda.mem_get_info()
    far = int(min(1 << 30, free / 8))
    triad = 3 * far / best(engine.triad(far // 4), seconds / 4, engine.device)
    read = far / best(engine.read(far // 4), seconds / 4, engine.device)
    found.rate("hbm", max(triad, read), "byte/s",
               f"best of read ({read / 1e9:.4g} GB/s) and STREAM triad ({triad / 1e9:.4g} GB/s), "
               f"{far / MB:.0f} MiB")  # fmt: skip
    found.level("hbm.capacity", float(free), "byte", f"free when measured, of {total / 1e9:.4g} GB")
    found.tiers["device"] = "hbm"
    size = min(far, 256 * MB)
    there = torch.empty(size, dtype=torch.uint8, device=engine.device)
    try:
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        found.missing.append(f"host link ({error})")
        return
    took = best(lambda: there.copy_(pinned, non_blocking=True), seconds / 8, engine.device)
    found.links["host"] = Link("host", size / took, 0.0, 2, "point", "pinned copies to the GPU")
    found.tiers["host"] = "host"


def survey(engine: Engine, folder: Path | None, seconds: float, progress: Progress) -> Found:
    """Everything but the op classes, in about `seconds`."""
    found = Found()
    gpu = engine if isinstance(engine, Torch) and engine.device != "cpu" else None
    progress(0.02, "products by precision")
    compute(found, engine, 0.35 * seconds)
    progress(0.12, "memory and caches")
    if gpu is not None:
        graphics(found, gpu, 0.4 * seconds)
    else:
        memory(found, engine, engine.threads, 0.4 * seconds)
    progress(0.25, "cost of a call")
    overheads(found, engine, 0.2 * seconds)
    progress(0.32, "drive and loopback")
    surroundings(found, folder or Path(tempfile.gettempdir()))
    return found
