"""The information plane: bits that each layer keeps of input and label (arXiv 1703.00810).

Narrow point: the information a hidden layer passes, I(X; T) and I(T; Y), in bits a sample.

Mechanism. Feed every input of the source through the network. Cut the activation of each unit
into `bins` equal bins on [-1, 1] and take a layer's row of bin numbers as one symbol T. A layer
without noise is a function of its input, so I(X; T) = H(T) by counting, and I(T; Y) is
H(T) - H(T | Y). Both are exact for the binned layer if the source is a population; a sample gets
Miller and Madow's correction and an interval. Each layer is a channel of I(X; T) bits.

It misleads whoever forgets the ruler. An unbinned layer without noise keeps all of X; every
figure here is made by the bins. Bins on a fixed range call saturated units compressed; bins that
follow the values call shrinking ones unchanged. A wide layer gives each input a symbol of its
own: I(T; Y) is then H(Y) for any labels, which the null (shuffled labels) shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import log2
from typing import Any

import numpy as np

from narrows.core.errors import NarrowsError, unknown
from narrows.core.flow import Flow
from narrows.core.method import Instrument, Reading
from narrows.core.resource import Kind, Resource
from narrows.information._base import entropy, information, observed, symbols
from narrows.information.ruler import SPANS, cut
from narrows.information.source import Source

SHUFFLES = 3
"""Permutations of the labels that the null is the mean of."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's place on the plane. x: I(X; T). y: I(T; Y). Both Readings in bits."""

    name: str
    units: int
    x: Reading
    y: Reading


@dataclass(frozen=True)
class Plane:
    """All layers, in the order they were given. ruler: what the figures hang on, in words."""

    layers: tuple[Layer, ...]
    ruler: str
    label_bits: float

    @property
    def narrowest(self) -> Layer:
        """The layer that keeps least of its input, the earliest of equal ones."""
        return min(self.layers, key=lambda layer: layer.x.value)

    @property
    def violations(self) -> tuple[str, ...]:
        """Layers that seem to know more than the one before: an artefact of the ruler.

        Of the network itself that cannot be (data-processing inequality); of binned layers it
        can, for the next layer is a function of the activations and not of their bins.
        """
        pairs = pairwise(self.layers)
        return tuple(
            b.name for a, b in pairs if b.x.value > a.x.value + 1e-9 or b.y.value > a.y.value + 1e-9
        )

    def channels(self) -> dict[str, Resource]:
        """Each layer as a channel of I(X; T) bits a symbol."""
        return {
            layer.name: Resource(layer.name, Kind.CHANNEL, layer.x.value, "bit", self.ruler)
            for layer in self.layers
        }

    def flow(self, name: str = "label") -> Flow:
        """The label's bits through the layers, for a workload: what is needed is H(Y)."""
        return Flow(name, self.label_bits, tuple(self.channels()), self.channels())


class InformationPlane(Instrument):
    """Reads I(X; T) and I(T; Y) of layers through a ruler of bins.

    bins: for each unit. span: see ruler.SPANS; low and high are the range of `fixed`.
    """

    key = "information_plane"
    paper = "arXiv:1703.00810"
    relieves = "information"

    def __init__(
        self, bins: int = 30, span: str = "fixed", low: float = -1.0, high: float = 1.0
    ) -> None:
        if not isinstance(bins, int | np.integer) or isinstance(bins, bool) or bins < 2:
            raise NarrowsError(
                f"information_plane: bins must be a whole number from 2, not {bins!r}; without "
                "bins a layer without noise keeps all of its input, and there is nothing to read"
            )
        if span not in SPANS:
            raise unknown("span of a ruler (information_plane)", span, SPANS)
        if not high > low:
            raise NarrowsError(f"information_plane: high must exceed low, not {low!r} to {high!r}")
        self.bins, self.span, self.low, self.high = int(bins), span, float(low), float(high)

    @property
    def ruler(self) -> str:
        """The ruler in words."""
        where = {
            "fixed": f"on [{self.low:g}, {self.high:g}]",
            "layer": "over the layer's range",
            "unit": "over each unit's range",
            "quantile": "of equal counts",
        }
        return f"{self.bins} bins a unit {where[self.span]}"

    def measure(self, target: Any) -> Reading:
        """I(X; T) of the narrowest layer, bits; `facts` hold its I(T; Y) and all layers.

        target: (model, source), a torch module and a Source, or (activations, source), with
        activations (n, units) by layer name. `plane` gives the whole table.
        """
        model, source = _target(target)
        found = self.plane(model, source)
        least = found.narrowest
        facts = {
            **least.x.facts,
            "layer": least.name,
            "label_bits": least.y.value,
            "layers": {one.name: (one.x.value, one.y.value) for one in found.layers},
            "ruler": found.ruler,
            "violations": found.violations,
        }
        return Reading(least.x.value, "bit", least.x.interval, least.x.ceiling, facts)

    def plane(self, model: Any, source: Source, layers: tuple[str, ...] = ()) -> Plane:
        """The table of all layers (or those named) of a torch module, or of given activations."""
        if isinstance(model, Mapping):
            given = dict(model) if not layers else {name: model[name] for name in layers}
        else:
            from narrows.information.probe_torch import activations

            given = activations(model, source.x, layers)
        read = tuple(self.layer(name, values, source) for name, values in given.items())
        return Plane(read, self.ruler, source.label_bits)

    def layer(self, name: str, values: np.ndarray, source: Source) -> Layer:
        """One layer's readings from its activations (n, units), a row for each input."""
        if len(values) != len(source.y):
            raise NarrowsError(
                f"layer {name!r} has {len(values)} rows for {len(source.y)} inputs of the source"
            )
        numbers, outside = cut(values, self.bins, self.span, self.low, self.high)
        code = symbols(numbers)
        n, units = numbers.shape
        # the input's own number as X: a layer is a function of it, so I(X; T) is H(T)
        seen = observed(code, source.y, source.population)
        count = np.bincount(code)
        met = int(np.count_nonzero(count))
        excess = 0.0 if source.population else (met - 1) / (2 * n * np.log(2))
        cells = units * log2(self.bins)
        top_x = min(log2(n), cells)
        value = min(seen.hx + excess, top_x)
        sampled = not source.population
        facts = {"outside": outside, "saturated": value > top_x - 0.01, "symbols": met}
        x = Reading(
            value, "bit", _interval(value, code, code, top_x, sampled), top_x, facts
        )  # fmt: skip
        labels = symbols(source.y)
        # shuffling moves neither marginal: only the joint table is counted anew
        rng, many = np.random.default_rng(0), int(labels.max()) + 1
        tables = [np.bincount(code * many + rng.permutation(labels)) for _ in range(SHUFFLES)]
        null = np.mean([seen.hx + seen.hy - float(entropy(t / n)) for t in tables])
        null = min(max(float(null), 0.0), seen.ceiling)  # rounding
        told = {"null": null, "saturated": seen.value > seen.hy - 0.01}
        if source.posterior is not None:
            table = np.zeros((len(count), source.posterior.shape[1]))
            np.add.at(table, code, source.posterior / n)
            told["of_rule"] = float(information(table))
        label = max(seen.value - seen.bias, 0.0)
        top_y = min(seen.hy, cells)
        y = Reading(label, "bit", _interval(label, code, labels, top_y, sampled), top_y, told)
        return Layer(name, units, x, y)


def _interval(
    value: float, t: np.ndarray, y: np.ndarray, ceiling: float, sampled: bool
) -> tuple[float, float]:
    """95 % interval of I(T; Y) of symbols (n,), or of H(T) where y is t; a population has none.

    From the spread of log2 p(t, y) / p(t) p(y) over the rows.
    """
    if not sampled:
        return value, value
    n = len(t)
    both = symbols(np.stack([t, y], axis=1))
    joint, left, right = np.bincount(both), np.bincount(t), np.bincount(y)
    terms = np.log2(joint[both] * n / (left[t] * right[y]))
    half = 1.96 * float(terms.std()) / n**0.5
    return max(value - half, 0.0), min(value + half, ceiling)


def _target(target: Any) -> tuple[Any, Source]:
    if isinstance(target, tuple) and len(target) == 2 and isinstance(target[1], Source):
        return target[0], target[1]
    raise NarrowsError(
        "information_plane: measure takes (model, source) or (activations by layer, source), "
        f"with a narrows.information.source.Source; it was given {type(target).__name__}"
    )
