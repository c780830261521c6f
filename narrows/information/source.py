"""Sources whose information is known: every input once, and a label for each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from narrows.core.errors import NarrowsError
from narrows.information._base import binary_entropy, entropy

INPUTS = 12
DEGREES = 7
"""Spherical harmonics of degree 0 to 6: the ones that tell patterns on twelve points apart."""


@dataclass(frozen=True)
class Source:
    """Inputs, labels and how far both are all there is.

    x: (n, d) float. y: (n,) int labels. posterior: p(y | x), (n, classes), where the labels were
    drawn from a known rule. population: the rows are every input, equally likely, and not a
    sample of them: only then are figures of this source exact.
    """

    x: np.ndarray
    y: np.ndarray
    posterior: np.ndarray | None = None
    population: bool = False

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y) or len(self.x) == 0:
            raise NarrowsError(
                f"a source needs one label for each input; there are {len(self.x)} inputs and "
                f"{len(self.y)} labels"
            )

    @property
    def label_bits(self) -> float:
        """H(Y) of the labels as drawn, bits."""
        counts = np.bincount(np.unique(self.y, return_inverse=True)[1])
        return float(entropy(counts / len(self.y)))


def _icosahedron() -> np.ndarray:
    """The twelve most evenly spread points on a sphere, (12, 3)."""
    golden = (1 + 5**0.5) / 2
    plane = [(0.0, a, b * golden) for a in (1, -1) for b in (1, -1)]
    points = [p[-turn:] + p[:-turn] for turn in range(3) for p in plane]
    return np.array(points) / np.linalg.norm(points[0])


def sphere_spectrum() -> tuple[np.ndarray, np.ndarray]:
    """All 4096 patterns (4096, 12) of 0 and 1, and their power by degree, (4096, DEGREES).

    The power of degree l is the sum over pairs of points of P_l(cos angle): it does not change
    when the sphere is turned (Kazhdan et al. 2003).
    """
    points = _icosahedron()
    cosine = points @ points.T
    x = ((np.arange(2**INPUTS)[:, None] >> np.arange(INPUTS)) & 1).astype(np.float64)
    power = [
        np.einsum("ni,ij,nj->n", x, np.polynomial.legendre.legval(cosine, np.eye(DEGREES)[k]), x)
        for k in range(DEGREES)
    ]
    return x, np.round(np.stack(power, axis=1), 9)


def sphere_rule(seed: int = 0, bits: float = 0.99) -> Source:
    """Twelve binary inputs on a sphere, and a label by a rule that turning it does not change.

    p(y = 1 | x) = sigmoid(gain (f(x) - threshold)), f a random combination (by `seed`) of the
    pattern's power by degree; threshold so that both labels are equally likely, as nearly as the
    rule allows, gain so that I(X; Y) is `bits`; labels are drawn once. After the paper's section
    3.1; its own table may not be passed on, so the weights are ours.
    Raises NarrowsError where no gain gives so many bits.
    """
    x, power = sphere_spectrum()
    rng = np.random.default_rng(seed)
    spread = power.std(axis=0)
    varies = spread > 1e-9
    weights = rng.normal(size=DEGREES)[varies]
    f = np.round((power[:, varies] / spread[varies]) @ weights, 6)
    levels = np.unique(f)
    middles = (levels[1:] + levels[:-1]) / 2
    above = np.array([(f > m).mean() for m in middles])
    distance = f - middles[int(np.argmin(np.abs(above - 0.5)))]

    def posterior(gain: float) -> np.ndarray:
        return 1.0 / (1.0 + np.exp(-np.clip(gain * distance, -500, 500)))

    def known(gain: float) -> float:
        p = posterior(gain)
        return float(binary_entropy(p.mean()) - binary_entropy(p).mean())

    low, high = 1e-6, 1e6
    if not known(low) < bits < known(high):
        raise NarrowsError(
            f"this rule (seed {seed}) gives at most {known(high):.4f} bits of its label; "
            f"{bits!r} were asked for"
        )
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if known(middle) < bits else (low, middle)
    p = posterior(high)
    y = (rng.random(len(p)) < p).astype(np.int64)
    return Source(x, y, np.stack([1 - p, p], axis=1), population=True)
