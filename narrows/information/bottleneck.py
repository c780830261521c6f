"""The information bottleneck's curve: the most I(T; Y) for every I(X; T), in bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from narrows.core.errors import NarrowsError
from narrows.information._base import information, joint, law


@dataclass(frozen=True)
class Curve:
    """Points of the curve. betas, x, y: (points,); x is I(X; T) and y is I(T; Y), bits."""

    betas: np.ndarray
    x: np.ndarray
    y: np.ndarray

    def at(self, x: float) -> float:
        """The most I(T; Y) at I(X; T) of x bits, along chords of the points (a lower bound)."""
        order = np.lexsort((self.y, self.x))
        xs = np.append(0.0, self.x[order])
        ys = np.maximum.accumulate(np.append(0.0, self.y[order]))
        return float(np.interp(x, xs, ys))


def sufficient(posterior: np.ndarray, prior: np.ndarray | None = None) -> np.ndarray:
    """The joint table with inputs of equal p(y | x) joined, (classes of inputs, labels).

    The curve is the same: an input's number says nothing of Y beyond its posterior. A rule of
    4096 inputs and 64 different posteriors costs 64 rows.
    """
    posterior = law(posterior, "posterior")
    n = len(posterior)
    weight = np.full(n, 1 / n) if prior is None else law(prior, "prior")
    rows, inverse = np.unique(np.round(posterior, 12), axis=0, return_inverse=True)
    return rows * np.bincount(inverse.reshape(-1), weight, len(rows))[:, None]


def ib_curve(
    pxy: np.ndarray,
    betas: np.ndarray | list[float],
    codes: int | None = None,
    steps: int = 2000,
    tolerance: float = 1e-9,
    seed: int = 0,
) -> Curve:
    """Iterate the self-consistent equations at each beta, annealed from the largest down.

    p(t|x) is proportional to p(t) 2^(-beta KL[p(y|x) || p(y|t)]). pxy: (n, m). codes: size of T,
    n unless given. Each point is a fixed point, hence feasible: its true curve lies on or above.
    """
    p = joint(pxy)
    p = p[p.sum(1) > 0]
    if len(betas) == 0 or min(betas) <= 0:
        raise NarrowsError("betas must be given and above zero")
    px = p.sum(1)
    given = p / px[:, None]
    n = len(p)
    k = n if codes is None else codes
    rng = np.random.default_rng(seed)
    start = np.eye(n)[:, :k] if k <= n else np.pad(np.eye(n), ((0, 0), (0, k - n)))
    if k < n:
        start = rng.dirichlet(np.ones(k), size=n)
    encoder = 0.999 * start + 0.001 / k
    own = (given * np.log2(np.where(given > 0, given, 1.0))).sum(1, keepdims=True)
    points: list[tuple[float, float, float]] = []
    for beta in sorted((float(b) for b in betas), reverse=True):
        for _ in range(steps):
            pt = px @ encoder
            decoder = (encoder * px[:, None]).T @ given / np.maximum(pt, 1e-300)[:, None]
            divergence = own - given @ np.log2(np.maximum(decoder, 1e-300)).T
            score = np.log2(np.maximum(pt, 1e-300)) - beta * divergence
            new = np.exp2(score - score.max(1, keepdims=True))
            new /= new.sum(1, keepdims=True)
            moved = float(np.abs(new - encoder).max())
            encoder = new
            if moved < tolerance:
                break
        xt = px[:, None] * encoder
        points.append((beta, float(information(xt)), float(information(xt.T @ given))))
    b, x, y = (np.array(c) for c in zip(*points, strict=True))
    return Curve(b, x, y)
