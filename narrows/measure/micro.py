"""Micro-workloads of one op class each, from which the constants of this machine are fitted.

Shapes run from those that only cost their call to those that fill a cache or more; none of them
occurs in the validation battery (a test compares the two).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from narrows.core.tensor import Codec, Tensor
from narrows.core.workload import Op, Phase, Use, Workload
from narrows.measure.rates import GRAIN
from narrows.measure.sampling import Micro
from narrows.measure.small_models import Images, Language, Residual, Separable, Shape
from narrows.trace.module import ADAMW_FLOPS, trace

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# fmt: off
LINEAR = (  # rows, in, out
    (2, 256, 512), (3, 640, 640), (6, 1024, 512), (16, 256, 256), (16, 768, 768), (32, 512, 1536),
    (48, 128, 128), (64, 1024, 256), (96, 64, 320), (128, 320, 640), (256, 256, 768),
    (512, 512, 256), (1024, 96, 96), (2048, 64, 256), (384, 1024, 384), (3, 1024, 2048),
    (10, 1536, 1280), (40, 2048, 768), (20, 768, 4096), (160, 1280, 640),
)
VECTOR = ((64, 64), (128, 512), (512, 256), (512, 1024), (640, 1280), (1280, 640), (1024, 2048),
          (2560, 1024), (1792, 2048), (2048, 4096))
BATCHED = ((4, 32, 32, 48), (8, 128, 32, 128), (12, 96, 64, 192), (32, 24, 48, 24))
CONV = (  # batch, channels in, side, channels out, kernel, stride, groups
    (1, 3, 96, 16, 3, 2, 1), (2, 16, 24, 32, 3, 1, 1), (1, 32, 40, 64, 3, 2, 1),
    (4, 48, 20, 48, 3, 1, 1), (1, 128, 14, 96, 3, 1, 1), (8, 12, 16, 24, 5, 1, 1),
    (2, 96, 16, 192, 1, 1, 1), (1, 64, 36, 24, 1, 1, 1), (2, 40, 28, 40, 3, 1, 40),
    (1, 3, 128, 32, 7, 2, 1),
)
PREFILL = (  # batch, heads, tokens, channels
    (1, 2, 32, 32), (1, 4, 96, 64), (2, 6, 160, 32), (1, 8, 256, 64), (4, 4, 224, 48),
    (1, 3, 640, 64), (8, 2, 80, 64),
)
DECODE = (  # batch, heads, cached tokens, channels
    (1, 2, 48, 32), (1, 4, 320, 64), (2, 8, 160, 32), (1, 6, 1280, 64), (4, 4, 640, 64),
    (8, 2, 1536, 32), (4, 6, 2304, 64),
)
ROWS = ((1, 96), (1, 384), (1, 1280), (6, 160), (24, 96), (40, 768), (320, 128), (192, 640),
        (1536, 192), (96, 2560), (3072, 320))
FLAT = (96, 2560, 12_000, 30_000, 48_000, 140_000, 400_000, 900_000, 3_000_000)
TABLE = (  # rows of the table, channels, looked up
    (512, 96, 3), (4096, 160, 48), (20_000, 192, 320), (3000, 640, 1200), (60_000, 96, 6000),
)
EDGE = 576
"""Elements by which the rows on either side of the grain of one core differ from it."""
PARAMETERS = (  # shape, how many
    ((96,), 1), ((96,), 12), ((320, 96), 8), ((768, 320), 4), ((1280, 768), 3), ((640, 640), 16),
    ((48, 48), 24),
)
# fmt: on


def reference(device: str = "cpu") -> Callable[[], object]:
    """The kernel that others are held against: a product, and a pass over memory it reuses."""
    side, flat = (256, 600_000) if device == "cpu" else (4096, 1 << 26)
    a, b = (torch.ones(side, side, device=device) for _ in range(2))
    x, y = (torch.ones(flat, device=device) for _ in range(2))
    product, total = torch.empty_like(a), torch.empty_like(x)

    def run() -> None:
        torch.mm(a, b, out=product)
        torch.add(x, y, out=total)

    return run


def medley(device: str = "cpu") -> Callable[[], object]:
    """A few different small ops: what lies between two calls of one op in a model.

    Called in a tight loop an op finds its code in the instruction cache and its branches
    foretold, and takes half of what the same op takes in a model. One of the ops runs on all
    cores, because a core that has just worked is woken sooner than one that has long been idle.
    """
    x, wide = torch.ones(8, 8, device=device), torch.ones(64, 256, device=device)
    norm = nn.LayerNorm(8, device=device)

    def run() -> torch.Tensor:
        y = torch.cat((x, x)) + norm(x).sum()
        return torch.softmax(wide, -1)[:8, :8] + F.silu(y)[:8] @ x.transpose(0, 1).contiguous()

    return run


def _micro(name: str, target: Callable[..., Any], *inputs: torch.Tensor) -> Micro:
    def call() -> object:
        return target(*inputs)

    return Micro(name, call, trace(target, inputs, name=name))


New = Callable[..., torch.Tensor]


def micros(device: str = "cpu", precisions: tuple[str, ...] = ("fp32",), scale: int = 1
           ) -> Iterator[Micro]:  # fmt: skip
    """The micro-workloads on a device; `scale` multiplies rows and batches (a GPU needs more).

    Products, convolutions, norms and tables run as the modules they are in models, so that the
    cost of calling those is in the constants.
    """
    generator = torch.Generator().manual_seed(0)
    for precision in precisions:
        dtype = DTYPES[precision]

        def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        if precision == "fp32":
            yield from _wholes(device)
            yield from _edges(new)
            yield from _pointwise(new, scale)
            yield from _copies(new, scale)
            yield from _rowwise(new, scale)
            yield from _tables(device, scale)
            yield from _updates(new)
            yield from _backwards(new, scale)
        yield from _products(new, precision, scale)
        yield from _attention(new, precision, scale)


def _products(new: New, precision: str, scale: int) -> Iterator[Micro]:
    like = new(1)
    place = {"device": like.device, "dtype": like.dtype}
    for m, k, n in LINEAR:
        layer = nn.Linear(k, n, **place)
        yield _micro(f"linear {precision} {m}x{k}x{n}", layer, new(m * scale, k))
    for b, m, k, n in BATCHED:
        yield _micro(f"bmm {precision} {b}x{m}x{k}x{n}", torch.bmm,
                     new(b * scale, m, k), new(b * scale, k, n))  # fmt: skip
    for k, n in VECTOR:
        layer = nn.Linear(k, n, bias=False, **place)
        yield _micro(f"linear {precision} 1x{k}x{n}", layer, new(1, k))
    for b, c, side, out, kernel, stride, groups in CONV:
        layer = nn.Conv2d(c, out, kernel, stride, kernel // 2, groups=groups, bias=False, **place)
        name = f"conv {precision} {b}x{c}x{side} to {out}, {kernel}/{stride}, {groups}"
        yield _micro(name, layer, new(b * scale, c, side, side))


def _attention(new: New, precision: str, scale: int) -> Iterator[Micro]:
    """From projections side by side to their like: heads are split off and joined again."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        b, t, h, c = q.shape
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).reshape(b, t, h * c)

    def look_back(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        b, _, h, c = q.shape
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v)
        return out.transpose(1, 2).reshape(b, 1, h * c)

    for b, h, t, c in PREFILL:
        yield _micro(f"attention prefill {precision} {b}x{h}x{t}x{c}", attend,
                     *(new(b * scale, t, h, c) for _ in range(3)))  # fmt: skip
    for b, h, t, c in DECODE:
        cache = [new(b * scale, h, t, c) for _ in range(2)]
        yield _micro(f"attention decode {precision} {b}x{h}x{t}x{c}", look_back,
                     new(b * scale, 1, h, c), *cache)  # fmt: skip


def _rowwise(new: New, scale: int) -> Iterator[Micro]:
    for rows, width in ROWS:
        x = new(rows * scale, width)
        norm = nn.LayerNorm(width, device=x.device)
        yield _micro(f"layer norm {rows}x{width}", norm, x)
        yield _micro(f"softmax {rows}x{width}", lambda x: F.softmax(x, -1), x)
        yield _micro(f"mean {rows}x{width}", lambda x: x.mean(-1), x)


def _pointwise(new: New, scale: int) -> Iterator[Micro]:
    for n in FLAT:
        x, y = new(n * scale), new(n * scale)
        yield _micro(f"add {n}", torch.add, x, y)
        yield _micro(f"mul by number {n}", lambda x: x * 0.5, x)
        yield _micro(f"relu {n}", torch.relu, x)
    for n in FLAT[:8]:
        x = new(n * scale)
        for function in (F.silu, F.gelu, torch.exp, torch.tanh, torch.sigmoid):
            yield _micro(f"{function.__name__} {n}", function, x)


def _edges(new: New) -> Iterator[Micro]:
    """Pairs on either side of the grain: their difference is what waking the cores costs."""
    for function in (torch.neg, torch.abs, torch.clone, torch.relu):
        for role, n in (("alone", GRAIN - EDGE), ("split", GRAIN + EDGE)):
            x = new(n)
            yield replace(_micro(f"{function.__name__} {n}", function, x), role=role)


def _wholes(device: str) -> Iterator[Micro]:
    """Small whole models that hardly compute: what lies between the ops is the rest of them."""
    plain = Shape(3, 96, 4, 4, 384, 500)
    gated = Shape(3, 128, 4, 2, 320, 500, gated=True)
    for name, shape in (("plain", plain), ("gated", gated)):
        for batch, tokens in ((1, 20), (3, 9)):
            model = Language(shape, 64).to(device).eval()
            ids = torch.zeros(batch, tokens, dtype=torch.int64, device=device)
            yield replace(_micro(f"{name} prefill {batch}x{tokens}", model, ids), role="whole")
        for batch in (1, 3):
            model = Language(shape, 48).decoding(batch, 48).to(device).eval()
            ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
            yield replace(_micro(f"{name} decode {batch}", model, ids), role="whole")
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)).to(device)
    for block in (Residual, Separable):
        model = Images(block, (12, 20), 10).to(device).eval()
        yield replace(_micro(f"{block.__name__} 2x3x12x12", model, images), role="whole")


def _copies(new: New, scale: int) -> Iterator[Micro]:
    """Clones, and the copies of attention: joined heads, a cache that grows, one written to."""

    def write(cache: torch.Tensor, x: torch.Tensor) -> None:
        cache[:, :, -1:] = x

    for n in FLAT:
        yield _micro(f"clone {n}", torch.clone, new(n * scale))
    for b, h, t, c in PREFILL:
        x, one = new(b * scale, h, t, c), new(b * scale, h, 1, c)
        yield _micro(f"join heads {b}x{h}x{t}x{c}", lambda x: x.transpose(1, 2).contiguous(), x)
        yield _micro(f"append {b}x{h}x{t}x{c}", lambda x, y: torch.cat((x, y), -2), x, one)
        yield _micro(f"write {b}x{h}x{t}x{c}", write, x, one)


def _tables(device: str, scale: int) -> Iterator[Micro]:
    for rows, width, count in TABLE:
        index = torch.randint(0, rows, (count * scale,), device=device)
        table = nn.Embedding(rows, width, device=device)
        yield _micro(f"embedding {rows}x{width} {count}", table, index)


def _backwards(new: New, scale: int) -> Iterator[Micro]:
    """What a training step runs beside products: gradients of convolutions, norms, functions."""
    aten = torch.ops.aten

    def convolution(
        g: torch.Tensor, x: torch.Tensor, w: torch.Tensor, stride: int, groups: int
    ) -> object:
        pad = w.shape[-1] // 2
        return aten.convolution_backward(
            g, x, w, None, [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], groups,
            [True, True, False],
        )  # fmt: skip

    def norm(g: torch.Tensor, x: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> object:
        return aten.native_layer_norm_backward(g, x, [x.shape[-1]], s, s, w, w, [True] * 3)

    for b, c, side, out, kernel, stride, groups in CONV:
        x, w = new(b * scale, c, side, side), new(out, c // groups, kernel, kernel)
        g = torch.ones_like(F.conv2d(x, w, None, stride, kernel // 2, 1, groups))
        yield _micro(f"conv backward {b}x{c}x{side} to {out}, {kernel}/{stride}, {groups}",
                     partial(convolution, stride=stride, groups=groups), g, x, w)  # fmt: skip
    for rows, width in ROWS:
        x, w, s = new(rows * scale, width), new(width), new(rows * scale, 1)
        yield _micro(f"layer norm backward {rows}x{width}", norm, x, x, w, s)
        yield _micro(f"softmax backward {rows}x{width}",
                     lambda x: aten._softmax_backward_data(x, x, -1, x.dtype), x)  # fmt: skip
    for n in FLAT[1:8]:
        x = new(n * scale)
        yield _micro(f"gelu backward {n}", aten.gelu_backward, x, x)
        yield _micro(f"silu backward {n}", aten.silu_backward, x, x)


def _updates(new: New) -> Iterator[Micro]:
    for shape, count in PARAMETERS:
        weights: list[torch.Tensor] = [nn.Parameter(new(*shape)) for _ in range(count)]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer = torch.optim.AdamW(weights, fused=True)
        yield Micro(f"AdamW {count} of {shape}", optimizer.step, update(shape, count))


def update(shape: tuple[int, ...], count: int) -> Workload:
    """AdamW over `count` parameters as trace() writes it, without a forward pass."""
    axes = {f"d{i}": float(n) for i, n in enumerate(shape)}
    tensors: dict[str, Tensor] = {}
    ops: list[Op] = []
    for i in range(count):
        names = {"weight": f"w{i}", "gradient": f"w{i}.grad"}
        made = [Tensor(name, role, axes, Codec.of("fp32")) for role, name in names.items()]
        states = [Tensor(f"w{i}.{s}", "state", axes, Codec.of("fp32"))
                  for s in ("exp_avg", "exp_avg_sq")]  # fmt: skip
        tensors |= {t.name: t for t in (*made, *states)}
        kept = tuple(Use(t.name) for t in states)
        reads, writes = (Use(f"w{i}"), Use(f"w{i}.grad"), *kept), (Use(f"w{i}"), *kept)
        ops.append(Op(f"optimizer.w{i}", "optimizer", reads, writes,
                      ADAMW_FLOPS * float(made[0].elements())))  # fmt: skip
    return Workload("update", tensors, (Phase("training step", tuple(ops)),))
