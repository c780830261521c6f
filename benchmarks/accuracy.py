"""Errors of predictions on measured GPU rows, beside the datasheet's: python -m benchmarks.accuracy

Needs NARROWS_DATA, the folder of the measured profiles. Constants are fitted on the Llama-2-7B
rows of a GPU and tested on the other models; attention is fitted on a tenth of its shapes and
collectives on half of theirs, and tested on the rest. Deterministic; takes about half a minute.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from narrows.core.calibration import Error
from narrows.core.machine import Machine
from narrows.machines.load import load
from narrows.measure.calibrate import fit, predicted, split, validate
from narrows.measure.profiles import Profile, read

GPUS = {"a100": "a100-80", "h100": "h100-sxm"}
LINEAR = "linear layers, other models"


@dataclass(frozen=True)
class Line:
    """One line of the table: what was tested, by which law, and its errors."""

    gpu: str
    rows: str
    law: str
    error: Error

    def cells(self) -> list[str]:
        """Errors in percent."""
        e = self.error
        errors = [f"{100 * v:.1f}" for v in (e.median, e.mean, e.p90)]
        return [self.gpu, self.rows, self.law, f"{e.n}", *errors]


def bare(name: str) -> Machine:
    """A machine of the catalogue by its datasheet alone."""
    return replace(load(name), calibrations={})


def linear(data: Path, gpu: str) -> tuple[Profile, Profile]:
    """Linear layers of Llama-2-7B, and of all other models."""
    machine = bare(GPUS[gpu])
    files = sorted((data / "serving" / "vidur").glob(f"mlp-{gpu}-*.csv.gz"))
    first = [f for f in files if "llama2-7b" in f.name]
    rest = [f for f in files if "llama2-7b" not in f.name]
    return read(first, machine), read(rest, machine)


def operators(data: Path) -> Iterator[Line]:
    """Linear layers and the other operators, on models that were not fitted on."""
    profiles = {gpu: linear(data, gpu) for gpu in GPUS}
    fitted: dict[str, Machine] = {}
    for gpu, (first, rest) in profiles.items():
        machine, products = bare(GPUS[gpu]), rest.only("matmul")
        yield Line(gpu, LINEAR, "datasheet", validate(products, machine).total.error)
        plain = fit(first.only("matmul"), machine, share=1.0, tiled=False)
        yield Line(gpu, LINEAR, "three constants", validate(products, plain).total.error)
        fitted[gpu] = fit(first, machine, share=1.0)
        yield Line(gpu, LINEAR, "three constants, tiles and waves",
                   validate(products, fitted[gpu]).total.error)  # fmt: skip
        shuffled = np.random.default_rng(0).permutation(products.rows.seconds)
        control = Error.of(predicted(products.rows, fitted[gpu]), shuffled)
        yield Line(gpu, LINEAR, "control: measured times shuffled", control)
    for here, there in (("a100", "h100"), ("h100", "a100")):
        moved = replace(bare(GPUS[there]), calibrations=fitted[here].calibrations)
        error = validate(profiles[there][1].only("matmul"), moved).total.error
        yield Line(there, LINEAR, f"the constants of the {here}", error)
    for gpu, (_, rest) in profiles.items():
        for check in validate(rest, fitted[gpu]).classes:
            if check.name != "matmul":
                rows = f"{check.name}, other models"
                yield Line(gpu, rows, "datasheet", check.naive)
                yield Line(gpu, rows, "calibrated", check.error)


def parts(data: Path) -> Iterator[Line]:
    """Attention and collectives, on shapes that were not fitted on."""
    serving = data / "serving"
    for gpu, path, share in (
        ("a100", serving / "vidur" / "attention-a100-llama2-70b-tp2.csv.gz", 0.1),
        ("h100", serving / "mha-decode-h100.csv", 0.5),
        ("h100", serving / "mha-prefill-h100.csv", 0.5),
        ("a100", serving / "vidur" / "net-a100-dgx-all-reduce.csv", 0.5),
        ("h100", serving / "vidur" / "net-h100-dgx-all-reduce.csv", 0.5),
        ("a100", serving / "vidur" / "net-a100-dgx-send-recv.csv", 0.5),
        ("h100", serving / "vidur" / "net-h100-dgx-send-recv.csv", 0.5),
    ):
        machine = bare(GPUS[gpu])
        profile = read(path, machine)
        rest = profile.take(~split(profile.rows, share, 0))
        for kind in dict.fromkeys(rest.rows.kind.tolist()):
            chosen = profile.only(kind)
            told = f"{kind}, other shapes"
            plain = validate(rest.only(kind), fit(chosen, machine, share=share, tiled=False))
            tiled = validate(rest.only(kind), fit(chosen, machine, share=share))
            yield Line(gpu, told, "datasheet", tiled.total.naive)
            yield Line(gpu, told, "plain law", plain.total.error)
            if kind.startswith("attention"):
                yield Line(gpu, told, "best law", tiled.total.error)


def table(data: Path) -> str:
    """The whole table in Markdown."""
    lines = [
        "| GPU | rows | law | n | median % | mean % | p90 % |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for line in (*operators(data), *parts(data)):
        lines.append("| " + " | ".join(line.cells()) + " |")
    return "\n".join(lines)


def main() -> int:
    """Print the table."""
    if "NARROWS_DATA" not in os.environ:
        print("set NARROWS_DATA to the folder of the measured profiles", file=sys.stderr)
        return 2
    print(table(Path(os.environ["NARROWS_DATA"])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
