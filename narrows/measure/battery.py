"""Forty-odd torch workloads that the constants of `here` were not fitted on, and how far off.

Each is timed in turn with a reference kernel, 31 rounds, and is held as a ratio to it:

    measured   = median over rounds of seconds(workload) / seconds(reference)
    predicted  = seconds that the machine's calibrated roofline gives the workload
                 / seconds the reference took when the machine was measured

The reference is a product and a pass over memory of fixed size. Its own prediction does not
enter, or its error would be in every row; that it is measured both times takes out what the
whole machine has become faster or slower since. Only quiet rows (interquartile range of the
ratios below 10 %) count. With fewer than 20 of them there is no verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.core.bound import bound
from narrows.core.calibration import Error
from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.core.machine import Machine
from narrows.core.plan import Plan
from narrows.core.workload import Workload
from narrows.measure.micro import DTYPES, reference
from narrows.measure.sampling import REFERENCE
from narrows.measure.small_models import (
    Classifier,
    Images,
    Language,
    Residual,
    Separable,
    Shape,
    Vision,
)
from narrows.measure.timing import QUIET_SPREAD, Progress, Ratio, interleave
from narrows.trace.module import trace

LEAST_QUIET = 20
"""Quiet rows without which no verdict is given."""

TURNS = 6
"""Times a round alternates between a workload and the reference, where they are short enough."""

BEYOND = 0.10
"""A row that beats the measured limit by more than this is refused, not averaged."""

MEDIAN, P90 = 0.12, 0.30
"""The errors that the quiet rows must keep to."""


@dataclass(frozen=True)
class Work:
    """One workload. call: runs it once. family: what it stands for."""

    name: str
    family: str
    call: Callable[[], object]
    workload: Workload


@dataclass(frozen=True)
class HereRow:
    """One workload, predicted and measured as ratios to the reference kernel.

    limit: the least ratio that the machine's rates allow. seconds: median of a call.
    """

    name: str
    family: str
    predicted: float
    limit: float
    measured: float
    spread: float
    seconds: float
    narrowest: str

    @property
    def error(self) -> float:
        """|predicted / measured - 1|."""
        return abs(self.predicted / self.measured - 1)

    @property
    def quiet(self) -> bool:
        """Whether the ratios kept together enough to count."""
        return self.spread < QUIET_SPREAD

    @property
    def refused(self) -> bool:
        """Whether it ran clearly faster than the limit: then the machine was measured wrongly."""
        return self.measured * (1 + BEYOND) < self.limit


@dataclass(frozen=True)
class HereReport:
    """What `validate --here` found. error: over the quiet rows, None where there are none."""

    machine: str
    rows: tuple[HereRow, ...]
    repeats: int

    @property
    def quiet(self) -> tuple[HereRow, ...]:
        """The rows that count: quiet, and not beyond the limit."""
        return tuple(row for row in self.rows if row.quiet and not row.refused)

    @property
    def error(self) -> Error | None:
        """Error over the quiet rows."""
        rows = self.quiet
        if not rows:
            return None
        return Error.of([r.predicted for r in rows], [r.measured for r in rows])

    @property
    def verdict(self) -> bool | None:
        """Whether the errors keep to MEDIAN and P90; None with too few quiet rows."""
        error = self.error
        if error is None or error.n < LEAST_QUIET:
            return None
        return error.median <= MEDIAN and error.p90 <= P90

    @property
    def exit_code(self) -> int:
        """0 where the verdict is good, 1 where it is bad, 3 where there is none."""
        return 3 if self.verdict is None else 0 if self.verdict else 1

    def as_dict(self) -> dict[str, Any]:
        """For `--json`; errors are fractions."""
        error = self.error
        return {
            "machine": self.machine,
            "n": 0 if error is None else error.n,
            "median_ape": None if error is None else error.median,
            "mean_ape": None if error is None else error.mean,
            "p90_ape": None if error is None else error.p90,
            "refused": [
                {"file": self.machine, "row": r.name,
                 "reason": f"{r.limit / r.measured - 1:.0%} faster than the rates the machine was "
                           "measured with; measure it anew with 'narrows machine --fresh'"}
                for r in self.rows if r.refused
            ],
            "verdict": self.verdict,
            "needed": {"quiet_rows": LEAST_QUIET, "median": MEDIAN, "p90": P90},
            "repeats": self.repeats,
            "rows": [
                {"name": r.name, "family": r.family, "predicted": r.predicted,
                 "limit": r.limit, "measured": r.measured, "spread": r.spread,
                 "quiet": r.quiet, "error": r.error,
                 "seconds": r.seconds, "narrowest": r.narrowest}
                for r in self.rows
            ],
        }  # fmt: skip


def validate_here(
    machine: Machine, progress: Progress | None = None, repeats: int = 31, seconds: float = 0.012,
    device: str | None = None,
) -> HereReport:  # fmt: skip
    """Hold the measured machine against workloads it has not seen.

    seconds: least time of one turn of a workload, and of the reference. device: `cpu` or `cuda`,
    the machine's own by default. Raises NarrowsError for a machine that was not measured.
    """
    rate = machine.resources.get(REFERENCE)
    if rate is None:
        raise NarrowsError(
            f"machine {machine.name!r} has no reference kernel: only a machine that narrows "
            "measured with torch can be validated so; run 'narrows machine --fresh'"
        )
    device = device or ("cuda" if machine.kind == "gpu" else "cpu")
    kernel = reference(device)
    rows: list[HereRow] = []
    works = list(battery(device, narrow="compute.bf16" in machine.resources))
    for i, work in enumerate(works):
        if progress is not None:
            progress(i / len(works), work.name)
        timed = interleave({"work": work.call, "reference": kernel}, repeats, seconds, device,
                           turns=TURNS)  # fmt: skip
        ratio: Ratio = timed.ratio("work", to="reference")
        found = bound(Case(work.workload, machine, Plan(("flash",))))
        rows.append(
            HereRow(work.name, work.family, found.seconds * rate.capacity,
                    found.limit_seconds * rate.capacity, ratio.median, ratio.spread,
                    timed["work"].median, found.narrowest)
        )  # fmt: skip
    if progress is not None:
        progress(1.0, "done")
    return HereReport(machine.name, tuple(rows), repeats)


def battery(device: str = "cpu", narrow: bool = True) -> Iterator[Work]:
    """The workloads, one at a time; `narrow` adds those in bf16."""
    torch.manual_seed(1)
    yield from _products(device, narrow)
    yield from _images(device, narrow)
    yield from _rows(device)
    yield from _pointwise(device)
    yield from _attention(device, narrow)
    yield from _models(device)
    yield from _training(device)


def _work(name: str, family: str, target: Callable[..., Any], *inputs: Tensor) -> Work:
    def call() -> object:
        with torch.no_grad():
            return target(*inputs)

    return Work(name, family, call, trace(target, inputs, name=name))


def _products(device: str, narrow: bool) -> Iterator[Work]:
    shapes = ((200, 384, 1152), (1024, 256, 224), (24, 2048, 512), (5, 768, 3072), (448, 448, 448),
              (1600, 128, 512), (1, 1536, 1536), (1, 896, 4864), (12, 512, 2048))  # fmt: skip
    for m, k, n in shapes:
        layer, x = nn.Linear(k, n, device=device), torch.randn(m, k, device=device)
        yield _work(f"linear {m}x{k}x{n}", "matmul", layer, x)
    for m, k, n in ((200, 384, 1152), (640, 512, 512), (9, 1024, 1024)) if narrow else ():
        layer = nn.Linear(k, n, device=device, dtype=DTYPES["bf16"])
        x = torch.randn(m, k, device=device, dtype=DTYPES["bf16"])
        yield _work(f"linear bf16 {m}x{k}x{n}", "matmul", layer, x)
    for b, m, k, n in ((6, 200, 64, 200), (16, 48, 96, 48)):
        x, y = torch.randn(b, m, k, device=device), torch.randn(b, k, n, device=device)
        yield _work(f"batched product {b}x{m}x{k}x{n}", "matmul", torch.bmm, x, y)


def _images(device: str, narrow: bool) -> Iterator[Work]:
    shapes = (  # batch, channels in, side, channels out, kernel, stride, groups
        (2, 64, 32, 64, 3, 1, 1), (4, 128, 20, 256, 1, 1, 1), (4, 24, 40, 48, 5, 2, 1),
        (1, 96, 40, 96, 3, 1, 96), (2, 3, 112, 64, 7, 2, 1), (1, 256, 12, 128, 3, 1, 1),
    )  # fmt: skip
    for b, c, side, out, kernel, stride, groups in shapes:
        layer = nn.Conv2d(c, out, kernel, stride, kernel // 2, groups=groups, device=device)
        x = torch.randn(b, c, side, side, device=device)
        name = f"conv {b}x{c}x{side}x{side} to {out}, kernel {kernel}, stride {stride}"
        yield _work(name + (f", {groups} groups" if groups > 1 else ""), "conv", layer, x)
    if narrow:
        layer = nn.Conv2d(64, 96, 3, 1, 1, device=device, dtype=DTYPES["bf16"])
        x = torch.randn(2, 64, 28, 28, device=device, dtype=DTYPES["bf16"])
        yield _work("conv bf16 2x64x28x28 to 96, kernel 3", "conv", layer, x)


def _rows(device: str) -> Iterator[Work]:
    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    yield _work("layer norm 600x512", "norm", nn.LayerNorm(512, device=device), new(600, 512))
    yield _work("layer norm 2500x256", "norm", nn.LayerNorm(256, device=device), new(2500, 256))
    yield _work("RMS norm 300x1024", "norm", nn.RMSNorm(1024, device=device), new(300, 1024))
    yield _work("group norm 4x64x24x24", "norm", nn.GroupNorm(8, 64, device=device),
                new(4, 64, 24, 24))  # fmt: skip
    yield _work("batch norm 8x48x28x28", "norm", nn.BatchNorm2d(48, device=device).eval(),
                new(8, 48, 28, 28))  # fmt: skip
    yield _work("softmax 500x900", "softmax", nn.Softmax(-1), new(500, 900))
    yield _work("softmax 64x48x48", "softmax", nn.Softmax(-1), new(64, 48, 48))


def _pointwise(device: str) -> Iterator[Work]:
    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    def residual(x: Tensor, y: Tensor) -> Tensor:
        return (x + y) * 0.5 + x

    def gated(x: Tensor, y: Tensor) -> Tensor:
        return F.silu(x) * y

    yield _work("residual sum 1200x1000", "pointwise", residual, new(1200, 1000), new(1200, 1000))
    yield _work("residual sum 64x500", "pointwise", residual, new(64, 500), new(64, 500))
    yield _work("gated unit 400x1500", "pointwise", gated, new(400, 1500), new(400, 1500))
    yield _work("gelu 700x1200", "pointwise", F.gelu, new(700, 1200))
    yield _work("sum of two 24 MB", "pointwise", torch.add, new(6_000_000), new(6_000_000))
    index = torch.randint(0, 10_000, (700,), device=device)
    yield _work("embedding 10000x256, 700", "gather", F.embedding, index, new(10_000, 256))


def _attention(device: str, narrow: bool) -> Iterator[Work]:
    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) * 0.125, -1) @ v

    full = F.scaled_dot_product_attention
    for b, h, t, c in ((1, 6, 384, 64), (2, 4, 512, 32), (3, 8, 112, 48)):
        q, k, v = (torch.randn(b, h, t, c, device=device) for _ in range(3))
        yield _work(f"attention prefill {b}x{h}x{t}x{c}", "attention", causal, q, k, v)
    for b, h, t, c in ((2, 6, 900, 64), (6, 4, 1800, 48), (1, 8, 3000, 64)):
        q = torch.randn(b, h, 1, c, device=device)
        k, v = (torch.randn(b, h, t, c, device=device) for _ in range(2))
        yield _work(f"attention decode {b}x{h}x{t}x{c}", "attention", full, q, k, v)
    if narrow:
        q, k, v = (torch.randn(1, 4, 300, 64, device=device).bfloat16() for _ in range(3))
        yield _work("attention prefill bf16 1x4x300x64", "attention", causal, q, k, v)
    q, k, v = (torch.randn(2, 4, 200, 32, device=device) for _ in range(3))
    work = _work("attention written out 2x4x200x32", "attention", written_out, q, k, v)
    yield work


def _models(device: str) -> Iterator[Work]:
    def ids(batch: int, tokens: int) -> Tensor:
        return torch.randint(0, 2000, (batch, tokens), device=device)

    mlp = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)).to(device)
    yield _work("MLP block 144x512", "model", mlp, torch.randn(144, 512, device=device))
    plain = Shape(4, 192, 6, 6, 768, 2000)
    gated = Shape(6, 288, 6, 2, 800, 4000, gated=True)
    for name, shape in (("GPT", plain), ("Llama", gated)):
        model = Language(shape, 2048).to(device).eval()
        yield _work(f"{name} prefill 2x144", "prefill", model, ids(2, 144))
        yield _work(f"{name} prefill 1x40", "prefill", model, ids(1, 40))
        for batch, cached in ((1, 300), (4, 1400)):
            model = Language(shape, cached).decoding(batch, cached).to(device).eval()
            yield _work(f"{name} decode {batch}x1 after {cached}", "decode", model, ids(batch, 1))
    for name, block, widths in (
        ("residual", Residual, (24, 48, 96)),
        ("separable", Separable, (32, 64, 128)),
    ):
        model = Images(block, widths, 10).to(device).eval()
        yield _work(f"{name} network 6x3x32x32", "model", model,
                    torch.randn(6, 3, 32, 32, device=device))  # fmt: skip
    vision = Vision(Shape(4, 160, 5, 5, 640, 100), 16).to(device).eval()
    yield _work("vision transformer 2x3x160x160", "model", vision,
                torch.randn(2, 3, 160, 160, device=device))  # fmt: skip


def _training(device: str) -> Iterator[Work]:
    x = torch.randn(96, 600, device=device)
    yield _step("classifier training step 96x600", Classifier((600, 700, 300, 20)).to(device), x,
                torch.randint(0, 20, (96,), device=device))  # fmt: skip
    ids = torch.randint(0, 2000, (4, 72), device=device)
    goal = torch.randint(0, 2000, (4 * 72,), device=device)
    for name, shape in (
        ("GPT", Shape(3, 144, 4, 4, 576, 2000)),
        ("Llama", Shape(3, 160, 5, 1, 448, 2000, gated=True)),
    ):
        yield _step(f"{name} training step 4x72", Language(shape, 72).to(device), ids, goal)
    network = Images(Residual, (20, 40), 10).to(device)
    yield _step("residual network training step 8x3x24x24", network,
                torch.randn(8, 3, 24, 24, device=device),
                torch.randint(0, 10, (8,), device=device))  # fmt: skip


def _step(name: str, model: nn.Module, x: Tensor, targets: Tensor) -> Work:
    """Forward, backward and AdamW; gradients are made anew each step, as torch does."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(x, targets).backward()
        optimizer.step()

    return Work(name, "training", call, trace(model, (x, targets), training=True, name=name))
