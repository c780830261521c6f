"""What runs the products and streams that are timed: torch on a processor or GPU, or numpy alone.

An engine hands out functions without arguments; the caller times them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from narrows.core.errors import NarrowsError

Call = Callable[[], object]


class Engine(Protocol):
    """Something that multiplies and streams. device: `cpu` or `cuda`; threads: 0 on a GPU."""

    name: str
    device: str
    threads: int

    def precisions(self) -> tuple[str, ...]:
        """Number formats whose products are worth trying, `fp32` first."""
        ...

    def product(self, precision: str, m: int, k: int, n: int) -> Call:
        """A product of (m, k) by (k, n). Raises NarrowsError where it cannot be formed."""
        ...

    def triad(self, elements: int) -> Call:
        """a = b + 3 c over fp32 arrays: 12 bytes an element as STREAM counts."""
        ...

    def read(self, elements: int) -> Call:
        """The sum of an fp32 array: 4 bytes an element."""
        ...

    def tiny(self) -> Call:
        """The least an op can be: an addition of one element into a given place."""
        ...

    def unary(self, elements: int, fresh: bool) -> Call:
        """A pointwise op over fp32, into new memory (fresh) or a given place."""
        ...


class Numpy:
    """numpy and the BLAS it was built with."""

    device = "cpu"

    def __init__(self, threads: int) -> None:
        self.name = f"numpy {np.__version__}"
        self.threads = threads

    def precisions(self) -> tuple[str, ...]:
        """fp32 and fp64: numpy has fast products for no other format."""
        return ("fp32", "fp64")

    def product(self, precision: str, m: int, k: int, n: int) -> Call:
        """See Engine."""
        if precision not in self.precisions():
            raise NarrowsError(f"numpy has no fast product in {precision}")
        dtype = np.float32 if precision == "fp32" else np.float64
        rng = np.random.default_rng(0)
        a, b = (rng.standard_normal(s).astype(dtype) for s in ((m, k), (k, n)))
        out = np.empty((m, n), dtype)
        return lambda: np.matmul(a, b, out=out)

    def triad(self, elements: int) -> Call:
        """See Engine; two passes over fewer elements, as numpy has no fused one: same bytes."""
        a, b, c = (np.ones(elements * 3 // 5, np.float32) for _ in range(3))

        def run() -> None:
            np.multiply(c, np.float32(3), out=a)
            np.add(a, b, out=a)

        return run

    def read(self, elements: int) -> Call:
        """See Engine."""
        a = np.ones(elements, np.float32)
        return lambda: np.add.reduce(a)

    def tiny(self) -> Call:
        """See Engine."""
        a, b = np.ones(1, np.float32), np.ones(1, np.float32)
        return lambda: np.add(a, a, out=b)

    def unary(self, elements: int, fresh: bool) -> Call:
        """See Engine."""
        a = np.ones(elements, np.float32)
        out = None if fresh else np.empty_like(a)
        return lambda: np.negative(a, out=out)


class Torch:
    """torch in eager mode on one device."""

    def __init__(self, device: str = "cpu") -> None:
        import torch

        if device.startswith("cuda") and not torch.cuda.is_available():
            raise NarrowsError(f"device {device!r} was asked for, but torch sees no CUDA GPU")
        self._torch = torch
        self.device = device
        self.name = f"torch {torch.__version__}"
        self.threads = torch.get_num_threads() if device == "cpu" else 0

    def facts(self) -> Any:
        """Properties of the CUDA device: name, multi_processor_count, ..."""
        return self._torch.cuda.get_device_properties(self.device)

    def precisions(self) -> tuple[str, ...]:
        """The formats torch multiplies; which of them natively, only the clock can tell."""
        common = ("fp32", "bf16", "fp16", "fp64", "int8")
        return common if self.device == "cpu" else ("fp32", "tf32", *common[1:])

    def product(self, precision: str, m: int, k: int, n: int) -> Call:
        """See Engine."""
        torch: Any = self._torch
        if precision == "int8":
            a, b = (
                torch.randint(-9, 9, s, dtype=torch.int8, device=self.device)
                for s in ((m, k), (k, n))
            )
            return self._tried(lambda: torch._int_mm(a, b), precision)
        dtype = {
            "fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16,
            "fp16": torch.float16, "fp64": torch.float64,
        }[precision]  # fmt: skip
        a, b = (torch.randn(s, device=self.device).to(dtype) for s in ((m, k), (k, n)))
        out = torch.empty((m, n), dtype=dtype, device=self.device)
        if self.device == "cpu":
            return self._tried(lambda: torch.mm(a, b, out=out), precision)

        def run() -> None:
            with self._tf32(precision == "tf32"):
                torch.mm(a, b, out=out)

        return self._tried(run, precision)

    def _tried(self, call: Call, precision: str) -> Call:
        try:
            call()
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            told = str(error).split("\n", 1)[0]
            raise NarrowsError(f"no product in {precision} here ({told})") from None
        return call

    @contextmanager
    def _tf32(self, allowed: bool) -> Any:
        """tf32 as asked for, and as it was afterwards."""
        matmul = self._torch.backends.cuda.matmul
        before, matmul.allow_tf32 = matmul.allow_tf32, allowed
        try:
            yield
        finally:
            matmul.allow_tf32 = before

    def _ones(self, elements: int) -> Any:
        return self._torch.ones(elements, dtype=self._torch.float32, device=self.device)

    def triad(self, elements: int) -> Call:
        """See Engine."""
        a, b, c = (self._ones(elements) for _ in range(3))
        return lambda: self._torch.add(b, c, alpha=3.0, out=a)

    def read(self, elements: int) -> Call:
        """See Engine."""
        a = self._ones(elements)
        return lambda: self._torch.sum(a)

    def tiny(self) -> Call:
        """See Engine."""
        a, b = self._ones(1), self._ones(1)
        return lambda: self._torch.add(a, a, out=b)

    def unary(self, elements: int, fresh: bool) -> Call:
        """See Engine."""
        a = self._ones(elements)
        if fresh:
            return lambda: self._torch.neg(a)
        out = self._torch.empty_like(a)
        return lambda: self._torch.neg(a, out=out)


def engine(device: str = "cpu", threads: int = 1) -> Engine:
    """torch where it is installed; numpy for a processor without it."""
    try:
        return Torch(device)
    except ImportError:
        if device != "cpu":
            raise NarrowsError(
                f"device {device!r} needs torch: pip install 'narrows[torch]'"
            ) from None
        return Numpy(threads)
