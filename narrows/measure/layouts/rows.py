"""Measured rows of any layout: what ran, its work, and how long it took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import numpy as np

from narrows.core.tensor import BITS

Values = np.ndarray | float | int | str

SIZES = ("m", "n", "k", "batch", "groups", "peers")
"""Sizes of the shape a row may have; 0 where its op class has no such size."""

SPELLINGS: Mapping[str, str] = {
    "half": "fp16", "float16": "fp16", "f16": "fp16", "bfloat16": "bf16", "float": "fp32",
    "float32": "fp32", "f32": "fp32", "float64": "fp64", "double": "fp64",
    "float8": "fp8", "e4m3": "fp8", "e5m2": "fp8",
}  # fmt: skip
"""Other names of precisions that profiles use."""


@dataclass(frozen=True)
class Rows:
    """Columns of equal length, one value a measured row.

    kind: op class. precision: of the arithmetic, empty where not declared. flops, bytes: work of
    one run; for a collective `bytes` is the message of a rank. m, n, k, batch, groups, peers: the
    shape as `Op.shape` has it. seconds: of one run. resolution: seconds to which it was rounded.
    line: of the file. item: what ran, as the file names it.
    """

    kind: np.ndarray
    precision: np.ndarray
    flops: np.ndarray
    bytes: np.ndarray
    m: np.ndarray
    n: np.ndarray
    k: np.ndarray
    batch: np.ndarray
    groups: np.ndarray
    peers: np.ndarray
    seconds: np.ndarray
    resolution: np.ndarray
    line: np.ndarray
    item: np.ndarray

    def __len__(self) -> int:
        return len(self.seconds)

    def take(self, chosen: np.ndarray) -> Rows:
        """The rows of a mask or of indices."""
        return Rows(*(getattr(self, f.name)[chosen] for f in fields(Rows)))

    def shape(self) -> dict[str, np.ndarray]:
        """The sizes that all rows have, as `Op.shape` wants them."""
        return {s: getattr(self, s) for s in SIZES if len(self) and (getattr(self, s) > 0).all()}

    def same(self) -> np.ndarray:
        """A number for every row, equal where kind, precision, work and shape are equal."""
        words = [np.unique(w.astype(str), return_inverse=True)[1] for w in
                 (self.kind, self.precision)]  # fmt: skip
        figures = [self.flops, self.bytes, *(getattr(self, s) for s in SIZES)]
        table = np.stack([*words, *figures], axis=1).astype(float)
        return np.unique(table, axis=0, return_inverse=True)[1].reshape(-1)

    @classmethod
    def of(
        cls, kind: Values, precision: Values, seconds: np.ndarray, line: np.ndarray,
        flops: Values = 0.0, bytes: Values = 0.0, resolution: float = 0.0, item: Values = "",
        shape: Mapping[str, Values] | None = None,
    ) -> Rows:  # fmt: skip
        """Rows from columns and from values that hold for all of them."""
        count = len(seconds)

        def words(value: Values) -> np.ndarray:
            if isinstance(value, str):
                return np.full(count, value, object)
            return np.asarray(value, object)

        def figures(value: Values) -> np.ndarray:
            return np.broadcast_to(np.asarray(value, float), (count,)).copy()

        sizes = {s: figures((shape or {}).get(s, 0.0)) for s in SIZES}
        return cls(
            words(kind), words(precision), figures(flops), figures(bytes), **sizes,
            seconds=figures(seconds), resolution=figures(resolution),
            line=np.asarray(line, int), item=words(item),
        )  # fmt: skip

    @classmethod
    def joined(cls, parts: Iterable[Rows]) -> Rows:
        """All rows of several parts."""
        parts = list(parts)
        if not parts:
            return cls.of("", "", np.zeros(0), np.zeros(0, int))
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Rows)))


def spelt(precisions: np.ndarray) -> np.ndarray:
    """Precisions by the names used here; what is not known stays as it was given."""
    names = (str(p).removeprefix("torch.").removeprefix("dtype.") for p in precisions)
    return np.array([SPELLINGS.get(n, n) for n in names], object)


def width(precisions: np.ndarray) -> np.ndarray:
    """Bytes of an element of each precision; NaN where it is not known."""
    return np.array([BITS.get(str(p), np.nan) / 8 for p in precisions], float)
