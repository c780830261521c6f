"""Rulers: how the activations of a layer are cut into symbols that can be counted."""

from __future__ import annotations

import numpy as np

from narrows.core.errors import NarrowsError

SPANS = ("fixed", "layer", "unit", "quantile")
"""What the bins of a ruler span: the range given, the least to the greatest value of the layer or
of each unit at that moment, or equal numbers of values of each unit."""


def cut(
    values: np.ndarray, bins: int, span: str = "fixed", low: float = -1.0, high: float = 1.0
) -> tuple[np.ndarray, float]:
    """Bin numbers of activations (n, units), and the share of values outside the ruler.

    Values outside are put in the end bins. `layer`, `unit` and `quantile` move with the values:
    a change of their scale alone is then not seen, and what looks like compression may come from
    the ruler. Raises NarrowsError for values that are no numbers.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size:
        raise NarrowsError(f"activations must be (rows, units), not {values.shape}")
    if not np.isfinite(values).all():
        raise NarrowsError("activations hold NaN or infinity: the network has diverged")
    if span == "quantile":
        rank = np.argsort(np.argsort(values, axis=0, kind="stable"), axis=0, kind="stable")
        # equal values share a bin: the one of the first of them
        out = np.empty(values.shape, np.int64)
        for j, column in enumerate(values.T):
            _, first, inverse = np.unique(column, return_index=True, return_inverse=True)
            least = np.full(len(first), len(column))
            np.minimum.at(least, inverse, rank[:, j])
            out[:, j] = least[inverse] * bins // len(column)
        return out, 0.0
    if span == "fixed":
        start, end = np.array(low), np.array(high)
    elif span == "layer":
        start, end = values.min(), values.max()
    else:
        start, end = values.min(axis=0), values.max(axis=0)
    width = np.where(end > start, end - start, 1.0)
    number = np.floor((values - start) / width * bins).astype(np.int64)
    outside = float(((values < start) | (values > end)).mean())
    return np.clip(number, 0, bins - 1), outside
