"""A real run held against its bound: total seconds, seconds by phase, or a profiler's trace."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from narrows.core.bound import Bound, PhaseBound
from narrows.core.errors import NarrowsError

PATTERNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attention", ("flash", "fmha", "scaled_dot_product", "attention")),
    ("all_reduce", ("nccl", "allreduce", "all_reduce", "all_gather", "reduce_scatter")),
    ("optimizer", ("adam", "sgd", "optimizer", "multi_tensor_apply")),
    ("norm", ("norm",)),
    ("softmax", ("softmax",)),
    ("conv", ("conv",)),
    ("matmul", ("gemm", "gemv", "::mm", "::bmm", "addmm", "matmul", "linear", "cutlass", "nvjet")),
    ("gather", ("embedding", "index_select", "gather", "::index")),
    ("copy", ("memcpy", "copy", "::cat", "clone", "contiguous", "memset")),
    ("reduce", ("reduce", "::sum", "::mean", "argmax", "topk")),
    (
        "pointwise",
        ("elementwise", "::add", "::mul", "::silu", "::gelu", "vectorized", "triton_poi"),
    ),
)
"""Name parts by which a kernel or an aten op is told apart; the first that matches wins."""

OTHER = "other"


@dataclass(frozen=True)
class Measured:
    """A real run. total: seconds. phases: seconds by phase name, where known.

    ops: seconds by op class within each phase, where known.
    """

    total: float
    phases: Mapping[str, float] = field(default_factory=dict[str, float])
    ops: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])


def read(given: str) -> Measured:
    """Seconds as a number, or a JSON file.

    Files: `{"prefill": 0.5, "decode": 2.1}`; `{"phases": [{"name": "decode", "seconds": 2.1,
    "ops": {"matmul": 1.4}}]}`; or a Chrome trace of torch.profiler, where record_function ranges
    named after the phases split it. Raises NarrowsError for anything else.
    """
    try:
        seconds = float(given)
    except ValueError:
        return _read_file(Path(given))
    return Measured(_seconds(seconds, "--measured"))


def _seconds(value: Any, what: str) -> float:
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    if not ok or not math.isfinite(value) or value <= 0:
        raise NarrowsError(f"{what} must be seconds above zero, not {value!r}")
    return float(value)


def _read_file(path: Path) -> Measured:
    if not path.is_file():
        raise NarrowsError(f"--measured takes seconds or a JSON file; there is no file {path}")
    try:
        data: Any = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise NarrowsError(f"{path} is not readable JSON: {error}") from error
    if isinstance(data, dict) and "traceEvents" in data:
        return _chrome(data["traceEvents"], path)
    if isinstance(data, dict) and isinstance(data.get("phases"), list):
        rows = data["phases"]
    elif isinstance(data, dict) and data:
        rows = [{"name": name, "seconds": seconds} for name, seconds in data.items()]
    else:
        raise NarrowsError(f"{path}: expected phases with seconds, or a profiler's traceEvents")
    phases: dict[str, float] = {}
    ops: dict[str, Mapping[str, float]] = {}
    for row in rows:
        if not (isinstance(row, dict) and isinstance(row.get("name"), str) and "seconds" in row):
            raise NarrowsError(f"{path}: every phase needs a name and seconds, not {row!r}")
        name = row["name"]
        phases[name] = _seconds(row["seconds"], f"{path}: phase {name!r}")
        inner = row.get("ops", {})
        if not isinstance(inner, dict):
            raise NarrowsError(f"{path}: ops of phase {name!r} must map op classes to seconds")
        if inner:
            ops[name] = {o: _seconds(s, f"{path}: {name}.{o}") for o, s in inner.items()}
    if not phases:
        raise NarrowsError(f"{path}: no phases in it")
    return Measured(sum(phases.values()), phases, ops)


def classify(name: str) -> str:
    """The op class of a kernel or aten op, by its name."""
    lower = name.lower()
    for kind, parts in PATTERNS:
        if any(part in lower for part in parts):
            return kind
    return OTHER


def _chrome(events: Any, path: Path) -> Measured:
    """Sum a torch.profiler trace: GPU kernels where there are any, top-level CPU ops otherwise."""
    if not isinstance(events, list):
        raise NarrowsError(f"{path}: traceEvents must be a list")
    timed = [
        e for e in events
        if isinstance(e, dict) and e.get("ph") == "X" and isinstance(e.get("name"), str)
        and all(isinstance(e.get(k), int | float) for k in ("ts", "dur"))
    ]  # fmt: skip
    ranges = [e for e in timed if e.get("cat") == "user_annotation"]
    kernels = [e for e in timed if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    chosen = kernels or _outermost([e for e in timed if e.get("cat") == "cpu_op"])
    if not chosen:
        raise NarrowsError(f"{path}: the trace has neither GPU kernels nor CPU ops")
    phases: dict[str, float] = {}
    ops: dict[str, dict[str, float]] = {}
    for event in chosen:
        phase = next(
            (r["name"] for r in ranges if r["ts"] <= event["ts"] < r["ts"] + r["dur"]), "run"
        )
        seconds = event["dur"] * 1e-6
        kind = classify(event["name"])
        phases[phase] = phases.get(phase, 0.0) + seconds
        inside = ops.setdefault(phase, {})
        inside[kind] = inside.get(kind, 0.0) + seconds
    total = sum(phases.values())
    if not ranges:
        return Measured(total, {}, ops)
    return Measured(total, phases, ops)


def _outermost(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events not inside another of the same thread: their times do not count twice."""
    ends: dict[Any, float] = {}
    kept: list[dict[str, Any]] = []
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        thread = (event.get("pid"), event.get("tid"))
        if event["ts"] >= ends.get(thread, -math.inf):
            ends[thread] = event["ts"] + event["dur"]
            kept.append(event)
    return kept


def against(found: Bound, run: Measured) -> Bound:
    """The bound with the measured run beside it.

    A run that beats the physical limit is refused: its unit or its workload is not this one.
    """
    if run.total < found.limit_seconds and (not run.phases or len(run.phases) >= len(found.phases)):
        raise NarrowsError(
            f"the measured {run.total:.4g} s is below the limit of {found.limit_seconds:.4g} s: "
            "no run can be that fast; check the unit, the options and the machine"
        )
    names = [p.name for p in found.phases]
    seconds = dict(run.phases)
    ops = dict(run.ops)
    if not seconds and len(names) == 1:
        seconds = {names[0]: run.total}
        ops = dict.fromkeys(names, next(iter(run.ops.values()), {}))
    missing = [n for n in seconds if n not in names]
    if missing:
        raise NarrowsError(
            f"the measured phase {missing[0]!r} is not one of this case: {', '.join(names)}"
        )
    phases: list[PhaseBound] = []
    for phase in found.phases:
        mine = seconds.get(phase.name)
        if mine is not None and mine < phase.limit_seconds:
            raise NarrowsError(
                f"the measured {mine:.4g} s of {phase.name} is below its limit of "
                f"{phase.limit_seconds:.4g} s: no run can be that fast; check unit and options"
            )
        phases.append(
            replace(phase, measured_seconds=mine, measured_ops=dict(ops.get(phase.name, {})))
        )
    spent: dict[str, float] = {}
    for inner in run.ops.values():
        for kind, s in inner.items():
            spent[kind] = spent.get(kind, 0.0) + s
    return replace(found, phases=tuple(phases), measured_seconds=run.total, measured_ops=spent)
