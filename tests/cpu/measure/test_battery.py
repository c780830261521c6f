"""The validation battery: unseen shapes, real workloads, and when there is a verdict."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from narrows.core.errors import NarrowsError
from narrows.core.machine import Machine
from narrows.core.resource import Kind, Resource
from narrows.core.workload import Workload
from narrows.measure import battery as module
from narrows.measure.battery import LEAST_QUIET, HereReport, HereRow, Work, battery, validate_here
from narrows.measure.micro import micros


@pytest.fixture(scope="module")
def works() -> list[Work]:
    return list(battery())


def signature(workload: Workload) -> list[tuple[object, ...]]:
    """Kinds, formats, shapes and sizes of the ops of a workload, without names."""
    return [
        (op.kind, op.precision, tuple(sorted((k, float(np.sum(v))) for k, v in op.shape.items())),
         tuple(float(np.sum(workload.tensors[u.tensor].elements(u.at)))
               for u in (*op.reads, *op.writes)))
        for phase in workload.phases for op in phase.ops
    ]  # fmt: skip


def test_there_are_enough_and_of_every_family(works: list[Work]):
    assert len(works) >= 30
    assert len({w.name for w in works}) == len(works)
    assert {w.family for w in works} >= {
        "matmul", "conv", "norm", "attention", "prefill", "decode", "training", "model",
    }  # fmt: skip


def test_no_shape_was_seen_in_calibration(works: list[Work]):
    seen = {tuple(signature(m.workload)) for m in micros("cpu", ("fp32", "bf16"))}
    for work in works:
        assert tuple(signature(work.workload)) not in seen, work.name
    heavy = {s for rows in seen for s in rows if s[0] in ("matmul", "conv")}
    singles = [w for w in works if len(signature(w.workload)) == 1]
    assert not heavy & {s for w in singles for s in signature(w.workload)}


def test_every_workload_runs_and_counts_what_it_does(works: list[Work]):
    for work in works:
        work.call()
        flops = sum(float(np.sum(work.workload.flops(p.name))) for p in work.workload.phases)
        assert flops > 0 or work.family == "gather", work.name


def test_training_steps_train():
    import torch

    torch.manual_seed(0)
    step = next(w for w in module._training("cpu"))
    assert any(op.kind == "optimizer" for op in step.workload.phases[0].ops)
    first = [p.detach().clone() for p in _parameters(step)]
    step.call()
    assert any(not torch.equal(a, b) for a, b in zip(first, _parameters(step), strict=True))


def _parameters(step: Work):
    cells = step.call.__closure__ or ()
    models = [c.cell_contents for c in cells if hasattr(c.cell_contents, "parameters")]
    return list(models[0].parameters())


def row(error: float, spread: float = 0.02) -> HereRow:
    return HereRow("x", "matmul", 1.0 + error, 0.5, 1.0, spread, 1e-3, "dram")


@pytest.mark.parametrize(
    ("rows", "verdict", "code"),
    [
        ([row(0.05)] * 25, True, 0),
        ([row(0.05)] * 25 + [row(5.0, spread=0.2)] * 40, True, 0),  # noisy rows do not count
        ([row(0.2)] * 25, False, 1),
        ([row(0.05)] * 20 + [row(0.5)] * 5, False, 1),  # the tail counts
        ([row(0.05)] * (LEAST_QUIET - 1) + [row(0.05, spread=0.3)] * 30, None, 3),
        ([], None, 3),
    ],
)
def test_a_verdict_needs_quiet_rows(rows: list[HereRow], verdict: bool | None, code: int):
    report = HereReport("here", tuple(rows), 31)
    assert report.verdict is verdict
    assert report.exit_code == code
    told = report.as_dict()
    assert told["verdict"] is verdict
    assert told["n"] == len(report.quiet)
    assert len(told["rows"]) == len(rows)


def test_a_row_beyond_the_limit_is_refused_by_name():
    beyond = replace(row(0.05), name="too good", limit=1.5)
    close = replace(row(0.05), limit=1.05)  # as far as clocks wander
    report = HereReport("here", (beyond, close), 31)
    assert report.quiet == (close,)
    refused = report.as_dict()["refused"]
    assert [r["row"] for r in refused] == ["too good"]
    assert "50% faster" in refused[0]["reason"]


def toy() -> Machine:
    rates = {"compute.fp32": (1e11, "flop/s"), "dram": (3e10, "byte/s"), "reference": (1e3, "op/s")}
    resources = {n: Resource(n, Kind.RATE, c, u) for n, (c, u) in rates.items()}
    return Machine("here", "toy", "cpu", resources, {"device": "dram"})


def test_rows_hold_ratios_to_the_reference(monkeypatch: pytest.MonkeyPatch):
    def few(device: str = "cpu", narrow: bool = True):
        return islice(battery(device, narrow=False), 3)

    monkeypatch.setattr(module, "battery", few)
    told: list[float] = []
    report = validate_here(toy(), lambda done, what: told.append(done), repeats=5, seconds=2e-3)
    assert told[-1] == 1.0
    assert len(report.rows) == 3
    first = report.rows[0]
    work = next(few())
    ideal = float(np.sum(work.workload.flops("forward"))) / 1e11
    assert first.predicted == pytest.approx(ideal * 1e3, rel=0.01)  # bound by arithmetic
    assert 0.01 < first.measured < 100
    assert report.verdict is None


def test_a_machine_that_was_not_measured_is_refused():
    from narrows.machines.load import load

    with pytest.raises(NarrowsError, match="reference kernel"):
        validate_here(load("epyc-9654"))
