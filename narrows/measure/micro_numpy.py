"""Micro-workloads for a machine without torch: what numpy runs of the op classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from narrows.core.tensor import Codec, Tensor
from narrows.core.workload import Op, Phase, Use, Workload
from narrows.measure.sampling import Micro

# fmt: off
PRODUCTS = (  # rows, in, out
    (2, 256, 512), (6, 1024, 512), (16, 256, 256), (16, 768, 768), (48, 128, 128), (64, 1024, 256),
    (128, 320, 640), (256, 256, 768), (512, 512, 256), (2048, 64, 256), (384, 1024, 384),
    (1, 64, 64), (1, 512, 256), (1, 640, 1280), (1, 1024, 2048), (1, 2560, 1024),
)
FLAT = (96, 2560, 12_000, 48_000, 140_000, 400_000, 900_000, 3_000_000)
# fmt: on


def reference() -> Callable[[], object]:
    """The kernel that others are held against: a product, and a pass over memory it reuses."""
    a, b = (np.ones((256, 256), np.float32) for _ in range(2))
    x, y = (np.ones(600_000, np.float32) for _ in range(2))
    product, total = np.empty_like(a), np.empty_like(x)

    def run() -> None:
        np.matmul(a, b, out=product)
        np.add(x, y, out=total)

    return run


def medley() -> Callable[[], object]:
    """A few different small calls: what lies between two calls of one op in a program."""
    x = np.ones((8, 8), np.float32)
    return lambda: np.tanh(np.concatenate((x, x)).sum(axis=0) @ x).T.copy()


def one_op(
    name: str, kind: str, reads: dict[str, tuple[int, ...]], out: tuple[int, ...], flops: float,
    shape: dict[str, float] | None = None,
) -> Workload:  # fmt: skip
    """A workload of one fp32 op that reads tensors of these shapes and writes another."""

    def tensor(name: str, role: str, sizes: tuple[int, ...]) -> Tensor:
        return Tensor(name, role, {f"d{i}": float(n) for i, n in enumerate(sizes)},
                      Codec.of("fp32"))  # fmt: skip

    tensors = [tensor(n, "input", sizes) for n, sizes in reads.items()]
    tensors.append(tensor("out", "output", out))
    op = Op(name, kind, tuple(Use(n) for n in reads), (Use("out"),), flops, shape=shape or {})
    return Workload(name, {t.name: t for t in tensors}, (Phase("forward", (op,)),))


def micros() -> Iterator[Micro]:
    """Products, sums, copies and means in numpy, each beside the op it is."""
    rng = np.random.default_rng(0)

    def new(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    for n in FLAT:
        x, y = new(n), new(n)
        yield Micro(f"add {n}", lambda x=x, y=y: x + y,
                    one_op("add", "pointwise", {"x": (n,), "y": (n,)}, (n,), float(n)))  # fmt: skip
        yield Micro(f"copy {n}", lambda x=x: x.copy(), one_op("copy", "copy", {"x": (n,)}, (n,), 0))
        rows, width = max(n // 64, 1), min(n, 64)
        z = x[: rows * width].reshape(rows, width)
        work = one_op("mean", "reduce", {"x": (rows, width)}, (rows,), float(z.size))
        yield Micro(f"mean {rows}x{width}", lambda z=z: z.mean(-1), work)
    for m, k, n in PRODUCTS:
        a, b = new(m, k), new(k, n)
        work = one_op("product", "matmul", {"a": (m, k), "b": (k, n)}, (m, n), 2.0 * m * k * n,
                      {"m": m, "k": k, "n": n})  # fmt: skip
        yield Micro(f"product {m}x{k}x{n}", lambda a=a, b=b: a @ b, work)
