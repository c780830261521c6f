"""What can be asked of a chip by name, and how each is read: `latency.l2`, `compute.fp8`, ..."""

from __future__ import annotations

import numpy as np

from narrows.chips import _cpu_probes
from narrows.chips._settle import settle
from narrows.core.errors import NarrowsError, unknown
from narrows.core.method import Reading

CPU_PRECISIONS = ("fp32", "fp64", "bf16", "int8")
GPU_PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8")
GPU_LEVELS = {"l1": 32 * 1024, "l2": 8 * 1024**2, "hbm": 512 * 1024**2}
"""Footprints well inside each level of every data-centre GPU since 2020."""
SIDES = {"cpu": 512, "cuda": 8192}
OPS = ("latency", "read", "compute", "minplus", "multiply_add", "recurrence")
PRODUCT = "square product of {side} a side, random operands"
CHASE = "pointer chase in random order, {size} bytes"
STREAM = "reads of {size} bytes, over and over"


def names(backend: str) -> tuple[str, ...]:
    """All that a backend can be asked."""
    if backend == "cpu":
        levels = tuple(_cpu_probes.footprints())
        return (
            *(f"latency.{level}" for level in levels),
            *(f"read.{level}" for level in levels),
            *(f"compute.{precision}" for precision in CPU_PRECISIONS),
            "minplus.fp32", "multiply_add.fp32", "recurrence",
        )  # fmt: skip
    return (
        *(f"latency.{level}" for level in GPU_LEVELS),
        "read.l2", "read.hbm", "size.l2",
        *(f"compute.{precision}" for precision in GPU_PRECISIONS),
        "minplus.int32", "minplus.fp32", "multiply_add.int32", "multiply_add.fp32",
        "copy.h2d", "copy.d2h", "copy.d2d", "crossover.fp8",
    )  # fmt: skip


def read(backend: str, name: str, repeats: int, rounds: int, limit: float) -> Reading:
    """One quantity. Raises NoisyRun where repeats contradict each other."""
    if name not in names(backend):
        raise unknown(f"quantity ({backend})", name, names(backend))
    what, _, of = name.partition(".")
    if backend == "cpu":
        size = _cpu_probes.at(of) if what in ("latency", "read") else SIDES["cpu"]
        if what in ("minplus", "multiply_add"):
            size = 256
        return at(backend, name, size, repeats, rounds, limit)
    if what == "size":
        return _capacity(repeats, rounds)
    if what == "copy":
        from narrows.chips import _gpu_probes as gpu

        size = 256 * gpu.MIB
        samples = _gpu_samples(gpu.copy(of, size), repeats, rounds)
        way = "a copy engine, pinned host memory" if of != "d2d" else "device to device, bytes read"
        return settle(samples, "byte/s", way, limit, size, inverse=True)
    if what == "crossover":
        return _crossover(repeats, rounds, limit)
    size = GPU_LEVELS.get(of, SIDES["cuda"])
    if name == "read.hbm":
        size = 4 * 1024**3
    return at(backend, name, size, repeats, rounds, limit)


def at(backend: str, name: str, size: int, repeats: int, rounds: int, limit: float) -> Reading:
    """One quantity at a footprint in bytes (latency, read) or a side of a matrix (the others)."""
    what, _, of = name.partition(".")
    if what not in OPS:
        raise unknown("operation to sweep", name, OPS)
    if backend == "cpu":
        if what == "latency":
            found = _cpu_probes.latency(size, repeats, rounds)
            return settle(found, "cycle", CHASE.format(size=size), limit, size=size)
        if what == "read":
            found, unit, method = _cpu_probes.read(size, repeats, rounds), "byte/s", STREAM
        elif what == "compute":
            unit, method = "flop/s", PRODUCT
            found = _cpu_probes.product(of, size, repeats, rounds)
        elif what == "recurrence":
            unit, method = "cell/s", "edit distance of two sequences of {side} letters"
            found = _cpu_probes.recurrence(size, repeats, rounds)
        else:
            unit, method = "op/s", what + " product, {side} by 16 by {side}, fp32"
            found = _cpu_probes.arithmetic(what, size, repeats, rounds)
        told = method.format(size=size, side=size)
        return settle(found, unit, told, limit, inverse=True, size=size)

    from narrows.chips import _gpu_probes as gpu

    if what == "latency":
        found = np.stack([gpu.load_seconds(size, rounds, seed=i) for i in range(repeats)])
        return settle(found, "second", CHASE.format(size=size), limit, size=size)
    if what == "recurrence":
        raise NarrowsError("recurrence is read on cpu only; minplus.int32 is the GPU's counterpart")
    if what == "read" and of == "l2":
        call, moved = gpu.read_footprint(size)
        unit, method = "byte/s", f"random blocks of 4 KiB among {size} bytes"
    elif what == "read":
        tried = gpu.timed(gpu.read_main(size), repeats * rounds)
        by = min(tried.rows, key=lambda name: tried[name].median)
        samples = tried[by].seconds.reshape(repeats, rounds)
        told = f"{size} bytes read once by {by}"
        return settle(samples, "byte/s", told, limit, size, inverse=True, size=size)
    elif what == "compute":
        call, moved, unit = gpu.product(of, size), 2.0 * size**3, "flop/s"
        method = PRODUCT.format(side=size)
    else:
        (call, moved), unit = gpu.arithmetic(what, of), "op/s"
        method = f"{what} on registers, {of}"
    samples = _gpu_samples(call, repeats, rounds)
    return settle(samples, unit, method, limit, moved, inverse=True, size=size)


def _gpu_samples(call: object, repeats: int, rounds: int) -> np.ndarray:
    from narrows.chips import _gpu_probes as gpu

    assert callable(call)
    timed = gpu.timed({"it": call}, repeats * rounds)
    return timed["it"].seconds.reshape(repeats, rounds)


def _capacity(repeats: int, rounds: int) -> Reading:
    """Bytes of the L2 that random reads find; the interval is the range over repeats."""
    from narrows.chips import _gpu_probes as gpu

    found: list[float] = []
    for _ in range(repeats):
        sizes, cost = gpu.knee(rounds)
        found.append(gpu.capacity(sizes, np.median(cost, axis=1))[0])
    return Reading(
        float(np.median(found)), "byte", (min(found), max(found)), None,
        {"method": "where random reads of growing footprints slow down, least squares"},
    )  # fmt: skip


def _crossover(repeats: int, rounds: int, limit: float) -> Reading:
    """Side from which an fp8 product with the cast of its input beats bf16."""
    from narrows.chips import _gpu_probes as gpu

    sizes = np.array([512, 1024, 2048, 4096, 8192])
    ratios = np.empty((len(sizes), repeats))
    for i, side in enumerate(int(x) for x in sizes):
        calls = {"fp8": gpu.cast_product(side), "bf16": gpu.product("bf16", side)}
        timed = gpu.timed(calls, repeats * rounds)
        one = timed["fp8"].seconds / timed["bf16"].seconds
        ratios[i] = np.median(one.reshape(repeats, rounds), axis=1)
        settle(one.reshape(repeats, rounds), "times", f"fp8 over bf16, side {side}", limit)
    found = [gpu.crossover(sizes, ratios[:, j]) for j in range(repeats)]
    if any(x is None for x in found):
        raise NarrowsError("fp8 with its casts never beats bf16 up to a side of 8192 on this GPU")
    sides = [float(x) for x in found if x is not None]
    table = {f"side {s}": float(np.median(r)) for s, r in zip(sizes, ratios, strict=True)}
    return Reading(
        float(np.median(sides)), "rows", (min(sides), max(sides)), None,
        {"method": "fp8 with a cast of its input beside bf16, in turn", **table},
    )  # fmt: skip
