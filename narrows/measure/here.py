"""This machine, measured: its rates, and how its op classes run against them.

    machine = load_or_measure()          # from the cache, or in about half a minute
    machine = measure(device="cuda")     # `here-gpu`

The rates are the best that was reached (a product, a stream): the limits of this machine. The
calibrations say which part of them each op class reaches, fitted from micro-workloads by the very
law that prices cases (core/price.py), with leave-one-out errors. Without torch, products
and streams are measured with numpy and no class but the product is calibrated.
"""

from __future__ import annotations

import os
import platform
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

import numpy as np

from narrows.core.caches import WAKE
from narrows.core.errors import NarrowsError
from narrows.core.machine import Machine
from narrows.core.resource import Kind, Resource
from narrows.measure import micro_numpy, probes
from narrows.measure.engines import Engine, Torch, engine
from narrows.measure.fit import Sample, fit, glue, keys, wake
from narrows.measure.quiet import Watch
from narrows.measure.rates import Found, survey
from narrows.measure.sampling import REFERENCE, sample
from narrows.measure.timing import Progress, passive_openmp

FORMAT = 1
"""Raised when what is measured, or the law it is fitted by, changes: older files are stale."""

SURVEY = 0.4
"""Share of the time that goes to rates; the rest goes to op classes."""


def _silent(_fraction: float, _what: str) -> None:
    pass


def measure(progress: Progress | None = None, seconds: float = 30.0, device: str = "cpu"
            ) -> Machine:  # fmt: skip
    """Measure this machine (`here`), or its CUDA GPU (`here-gpu`), in at most `seconds`.

    Raises NarrowsError for a GPU that torch does not see. What could not be measured is said in
    the machine's note; KeyboardInterrupt leaves nothing behind.
    """
    tell = progress or _silent
    begin = perf_counter()
    passive = passive_openmp()
    tell(0.0, "starting")
    runner = engine(device, probes.cores())
    watch = Watch().start()
    found = survey(runner, cache_folder(), SURVEY * (seconds - 4.0), tell)
    machine = _machine(found, runner)
    machine = _classes(machine, runner, begin + seconds, watch, tell, found)
    quiet = watch.stop()
    notes = [
        f"How quiet: {quiet}.",
        *found.notes,
        f"Not measured: {'; '.join(found.missing)}." if found.missing else "",
        "" if passive else "OpenMP was loaded before narrows could ask it to wait passively.",
    ]
    tell(1.0, "measured")
    return replace(machine, note=" ".join(note for note in notes if note))


def _machine(found: Found, runner: Engine) -> Machine:
    gpu = runner.device != "cpu"
    units = runner.threads
    title = f"{probes.processor()}, {runner.threads} threads"
    if gpu and isinstance(runner, Torch):
        facts = runner.facts()
        title, units = facts.name, facts.multi_processor_count
    return Machine(
        name="here-gpu" if gpu else "here", title=title, kind="gpu" if gpu else "cpu",
        resources=found.resources, tiers=found.tiers, links=found.links, caches=found.caches,
        units=units, year=datetime.now(UTC).year,
        source=f"measured {datetime.now(UTC):%Y-%m-%dT%H:%MZ} on {fingerprint(runner.device)}",
    )  # fmt: skip


def _classes(
    machine: Machine, runner: Engine, deadline: float, watch: Watch, tell: Progress, found: Found
) -> Machine:
    """The machine with a reference kernel and a calibration of every op class."""
    device = runner.device
    tell(0.38, "preparing op classes")
    if isinstance(runner, Torch):
        import torch

        from narrows.measure import micro

        known = tuple(p for p in micro.DTYPES if f"compute.{p}" in machine.resources)
        rows = list(micro.micros(device, known, scale=1 if device == "cpu" else 16))
        kernel, between, quietly = micro.reference(device), micro.medley(device), torch.no_grad()
    else:
        rows = list(micro_numpy.micros())
        kernel, between, quietly = micro_numpy.reference(), micro_numpy.medley(), nullcontext()
        found.notes.append("torch is not installed: rates and the few op classes here are numpy's.")
    left = max(deadline - perf_counter() - FIT_SECONDS, 1.0)
    with quietly:
        samples, seconds = sample(
            rows, kernel, between, device, left, watch,
            lambda done, what: tell(0.4 + 0.5 * done, what),
        )  # fmt: skip
    rate = Resource(REFERENCE, Kind.RATE, 1 / seconds, "op/s",
                    "the kernel that validate --here holds others against")  # fmt: skip
    machine = replace(machine, resources={**machine.resources, REFERENCE: rate})
    machine = raised(machine, samples)
    tell(0.92, "fitting constants")
    return calibrated(machine, samples, found, runner.name)


FIT_SECONDS = 4.0
"""What fitting the constants may take, kept free of the time for measuring."""


def calibrated(machine: Machine, samples: list[Sample], found: Found, source: str) -> Machine:
    """The machine with every op class fitted that the samples tell, simple ones first.

    Then what small whole models take beyond their ops is shared out over the calls: the work of
    the interpreter between two ops, which every op of a model has.
    """
    era = f"{datetime.now(UTC):%Y-%m}"
    woken = wake(samples)
    if WAKE in machine.resources and woken is not None and woken > 0:
        rate = replace(machine.resources[WAKE], capacity=1 / woken)
        machine = replace(machine, resources={**machine.resources, WAKE: rate})
    for key in keys(samples):
        made = fit(samples, key, machine, source, era)
        if made is None:
            found.missing.append(f"op class {key} (too few rows)")
        else:
            machine = machine.calibrated(made)
    between = glue(samples, machine)
    found.notes.append(f"Between two ops of a model pass {between * 1e6:.1f} us.")
    return machine.calibrated(
        *(replace(c, fixed=max(c.fixed + between, 0.0)) for c in machine.calibrations.values())
    )


def raised(machine: Machine, samples: list[Sample]) -> Machine:
    """The machine with flop rates no lower than any sample reached: a limit is the best seen."""
    resources = dict(machine.resources)
    for timed in samples:
        work = timed.workload
        ops = [op for phase in work.phases for op in phase.ops]
        for precision in {op.precision for op in ops if op.kind in ("matmul", "conv")}:
            rate = machine.compute(precision)
            done = sum(float(np.sum(work.op_flops(op))) for op in ops if op.precision == precision)
            reached = done / timed.seconds
            if reached > resources[rate.name].capacity:
                resources[rate.name] = replace(
                    rate, capacity=reached, source=f"best product, {timed.name}"
                )
    return replace(machine, resources=resources)


# -- the cache ---------------------------------------------------------------------------------


def fingerprint(device: str = "cpu") -> str:
    """What a measurement stands or falls with: processor, threads, versions of the software."""
    runner = engine(device, probes.cores())
    parts = [probes.processor(), f"{runner.threads} threads", runner.name,
             f"numpy {np.__version__}",
             platform.system(), f"form {FORMAT}"]  # fmt: skip
    if isinstance(runner, Torch) and device != "cpu":
        parts[:2] = [runner.facts().name]
    return ", ".join(parts)


def cache_folder() -> Path:
    """Where measured machines are kept: NARROWS_CACHE, or the platform's folder for caches."""
    given = os.environ.get("NARROWS_CACHE")
    if given:
        return Path(given).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("narrows"))


def cache_file(device: str = "cpu") -> Path:
    """The file of this machine, or of its GPU."""
    return cache_folder() / ("here.toml" if device == "cpu" else "here-gpu.toml")


def cached(device: str = "cpu") -> Machine | None:
    """The machine as measured before; None where there is none, or one of other software."""
    from narrows.machines.load import load

    path = cache_file(device)
    if not path.is_file():
        return None
    try:
        machine = load(path)
    except NarrowsError:
        return None  # from an older form, or damaged: measured anew and written over
    return machine if machine.source.endswith(f" on {fingerprint(device)}") else None


def load_or_measure(
    fresh: bool = False, progress: Progress | None = None, device: str = "cpu"
) -> Machine:
    """This machine from the cache, or measured now and cached.

    fresh: measure in any case. The file is written wholly or not at all.
    """
    found = None if fresh else cached(device)
    if found is not None:
        return found
    from narrows.machines.load import save

    machine = measure(progress, device=device)
    path = cache_file(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NarrowsError(
            f"{path.parent}: cannot be made ({error.strerror or error}); set NARROWS_CACHE to a "
            "folder that can be written"
        ) from None
    save(machine, path)
    return machine
