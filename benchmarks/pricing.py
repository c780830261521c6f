"""Cases priced a second, beside LLM-Viewer, and seconds to trace: python -m benchmarks.pricing

    python -m benchmarks.pricing [--llm-viewer DIR] [--cases 10000] [--repeats 9] [--model NAME]

A case is a prompt length, a number of generated tokens and a batch of one model on one machine,
priced op by op in prefill and decode. narrows does all cases in one call; LLM-Viewer's analyser
(github.com/hahnyuan/LLM-Viewer, whose checkout DIR is) takes one at a time and prices the same two
phases. Both take turns in one run. Then what it takes to trace model code instead.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import chdir, redirect_stdout
from dataclasses import replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

from narrows.core.fusion import fuse
from narrows.core.price import price
from narrows.machines.load import load
from narrows.trace.config import published
from narrows.trace.llm import llm

PEER_CALLS = 200
"""Calls of the peer that make one sample of its speed."""


def cases(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts, generated tokens and batches, spread over what people ask."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, 32_768, count).astype(float)
    return prompts, rng.integers(1, 2048, count).astype(float), 2.0 ** rng.integers(0, 8, count)


def ours(model: str, count: int, calibrated: bool) -> Callable[[], None]:
    """Price that many cases in one call."""
    machine = load("a100-80")
    if not calibrated:
        machine = replace(machine, calibrations={})
    prompts, generated, batches = cases(count)

    def run() -> None:
        work = fuse(llm(model, prompts, generated, batches), ("flash", "compiled"))
        seconds = np.sum([phase.total_seconds for phase in price(work, machine)], axis=0)
        if seconds.shape != (count,) or not np.all(seconds > 0):
            raise RuntimeError("a case was not priced")

    return run


def peer(checkout: Path, model: str) -> Callable[[], None]:
    """One sample of LLM-Viewer's analyser; what it prints on the way is dropped."""
    fields = {k: v for k, v in published(model).items() if k != "source"}
    prompts, _, batches = cases(PEER_CALLS)
    with tempfile.TemporaryDirectory() as folder, chdir(checkout), redirect_stdout(io.StringIO()):
        (Path(folder) / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        sys.path.insert(0, str(checkout))
        analyser = importlib.import_module("model_analyzer").ModelAnalyzer
        made = analyser(folder, "nvidia_A100_80G", "configs/Llama.py")

    def run() -> None:
        for prompt, batch in zip(prompts, batches, strict=True):
            made.analyze(int(prompt), int(batch), use_flashattention=True)

    return run


def rates(runs: dict[str, tuple[Callable[[], None], int]], repeats: int) -> dict[str, Any]:
    """Cases a second of each, by turns: median, and the spread from the 10th to 90th percent."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run, _ in runs.values():
        run()
    for _ in range(repeats):
        for name, (run, count) in runs.items():
            start = perf_counter()
            run()
            taken[name].append(count / (perf_counter() - start))
    return {
        name: tuple(float(q) for q in np.quantile(found, (0.5, 0.1, 0.9)))
        for name, found in taken.items()
    }


def tracing(names: tuple[str, ...]) -> dict[str, tuple[float, float, int]]:
    """Wall and processor seconds, and kernels, of tracing prefill and decode of each model."""
    from narrows.trace.generation import trace_generation

    trace_generation("opt-125m", 16, 2)  # torch and transformers are loaded
    found: dict[str, tuple[float, float, int]] = {}
    for name in names:
        wall, processor = perf_counter(), process_time()
        made = trace_generation(name, 2048, 128, 4)
        ops = sum(int(op.repeat) for phase in made.phases for op in phase.ops)
        found[name] = perf_counter() - wall, process_time() - processor, ops
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--llm-viewer", type=Path, help="a checkout of hahnyuan/LLM-Viewer")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--model", default="llama-2-7b", help="a Llama of the catalogue")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    runs: dict[str, tuple[Callable[[], None], int]] = {
        "narrows, datasheet": (ours(given.model, given.cases, False), given.cases),
        "narrows, calibrated": (ours(given.model, given.cases, True), given.cases),
        "narrows, one case a call": (ours(given.model, 1, False), 1),
    }
    if given.llm_viewer is not None:
        runs["LLM-Viewer"] = (peer(given.llm_viewer.resolve(), given.model), PEER_CALLS)
    found = rates(runs, given.repeats)
    base = found.get("LLM-Viewer", (0.0, 0.0, 0.0))[0]
    print(f"{given.model}, {given.cases} cases, prefill and decode, cases a second")
    for name, (median, low, high) in found.items():
        times = f"  {median / base:8.1f} x" if base else ""
        print(f"  {name:26s}{median:12,.0f}  ({low:,.0f} to {high:,.0f}){times}")
    print("tracing prefill and decode of model code, 4 x 2,048 tokens")
    for name, (wall, processor, ops) in tracing(("llama-3-8b", "llama-3-70b")).items():
        print(f"  {name:26s}{wall:8.2f} s wall {processor:8.2f} s processor {ops:8,d} kernels")


if __name__ == "__main__":
    main()
