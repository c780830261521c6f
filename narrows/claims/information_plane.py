"""The information plane (arXiv 1703.00810, version 3): what its paper and its card say.

Networks are the paper's (12-10-7-5-4-3-2) on 4096 patterns with a rule of our own weights, for the
authors' table may not be passed on. Trained by plain SGD as the text says (rate 0.1, batches of
512); their published code uses Adam. Ten thousand epochs are cut to 1,500, where the training
error is below 0.1 %. Every figure of a trained network hangs on the ruler named in its setting
(Saxe et al. 2018 show how); that is part of the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import log2
from typing import TYPE_CHECKING

import numpy as np

from narrows.core.claim import Figure, Inconclusive, claim
from narrows.information import information_plane as subject
from narrows.information._base import binary_entropy
from narrows.information.bottleneck import ib_curve, sufficient
from narrows.information.information_plane import InformationPlane
from narrows.information.source import Source, sphere_rule

if TYPE_CHECKING:
    from narrows.information.networks_torch import History

CARD = "systems/information.md, card information_plane, works when"
NET = "12-10-7-5-4-3-2, rule of seed 0, 85 % of 4096 patterns, SGD 0.1, batch 512, 1,500 epochs"
FIXED = "30 bins on [-1, 1]"
SEEDS = (0, 1, 2, 3, 4)
LAST = 4
"""Index of the last hidden layer."""
PAPER_DEFAULTS = {"bins": 30, "span": "fixed", "low": -1.0, "high": 1.0}
"""Section 3.3: 30 equal intervals between -1 and 1."""


@contextmanager
def mutant() -> Iterator[str]:
    """Bins that follow the values of a unit, whatever was asked; the claim that must notice."""
    sound = subject.cut

    def broken(
        values: np.ndarray, bins: int, span: str, low: float, high: float
    ) -> tuple[np.ndarray, float]:
        return sound(values, bins, "unit", low, high)

    subject.cut = broken
    try:
        yield counts_are_those_of_the_definition.name
    finally:
        subject.cut = sound


def spread(values: np.ndarray | list[float]) -> tuple[float, tuple[float, float]]:
    """Mean over seeds and its 95 % interval (Student's t, 5 seeds)."""
    v = np.asarray(values, float)
    student = {3: 4.303, 5: 2.776}[len(v)]
    half = student * float(v.std(ddof=1)) / len(v) ** 0.5
    return float(v.mean()), (float(v.mean()) - half, float(v.mean()) + half)


# --- exact ---------------------------------------------------------------------------------------


def by_definition(values: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """H(T) and I(T; Y) counted row by row in dictionaries."""
    rows = [tuple(min(int((v + 1) / 2 * 30), 29) for v in row) for row in values]
    n = len(rows)

    def bits(counts: Counter) -> float:
        return -sum(c / n * log2(c / n) for c in counts.values())

    h = bits(Counter(rows))
    label = [int(v) for v in y]
    return h, h + bits(Counter(label)) - bits(Counter(zip(rows, label, strict=True)))


@claim(
    expected=(0.0, 1e-12), unit="bit", how="exact", cost=2.0, source=CARD,
    setting=f"tanh of random layers of 2 to 10 units on all 4096 patterns, {FIXED}",
    control="mutant(): bins that follow the values",
)  # fmt: skip
def counts_are_those_of_the_definition() -> float:
    """Largest difference of I(X; T) or I(T; Y) from counting in dictionaries."""
    source = sphere_rule()
    rng = np.random.default_rng(0)
    worst = 0.0
    for units in (2, 3, 5, 10):
        values = np.tanh(source.x @ rng.normal(size=(12, units)) * rng.uniform(0.1, 2))
        layer = InformationPlane().layer("t", values, source)
        h, label = by_definition(values, source.y)
        worst = max(worst, abs(layer.x.value - h), abs(layer.y.value - label))
    return worst


@claim(
    expected=0.0, unit="bit", how="exact", cost=1.0, source=CARD,
    setting="units of a layer in another order",
)  # fmt: skip
def a_permutation_loses_nothing() -> float:
    """Largest change of I(X; T) or I(T; Y) by a layer that only reorders units."""
    source = sphere_rule()
    rng = np.random.default_rng(1)
    values = np.tanh(source.x @ rng.normal(size=(12, 5)))
    plane = InformationPlane().plane({"a": values, "b": values[:, [3, 0, 4, 1, 2]]}, source)
    a, b = plane.layers
    return max(abs(a.x.value - b.x.value), abs(a.y.value - b.y.value))


def _inverse_entropy(bits: float) -> float:
    low, high = 0.0, 0.5
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if binary_entropy(middle) < bits else (low, middle)
    return low


@claim(
    expected=(0.0, 1e-3), unit="bit", how="exact", cost=2.0, source=CARD,
    setting="binary symmetric channel of 11 % flips, 60 betas; closed form by Mrs Gerber's lemma",
)  # fmt: skip
def the_curve_of_a_binary_channel_is_the_closed_form() -> float:
    """Largest |I(T; Y) - closed form| along the curve."""
    flips = 0.11
    curve = ib_curve(
        np.array([[1 - flips, flips], [flips, 1 - flips]]) / 2, np.geomspace(1, 200, 60)
    )
    worst = 0.0
    for x, y in zip(curve.x, curve.y, strict=True):
        a = _inverse_entropy(1 - float(x))
        worst = max(worst, abs(1 - float(binary_entropy(a * (1 - flips) + (1 - a) * flips)) - y))
    return worst


@claim(
    expected=(0.0, 1e-3), unit="bit", how="exact", cost=10.0, source=CARD,
    setting="two Gaussians of correlation 0.8 on a grid of 41 x 41, 12 betas; closed form of "
    "Chechik et al. 2005",
)  # fmt: skip
def the_curve_of_gaussians_is_the_closed_form() -> Figure:
    """Largest |I(T; Y) - closed form| along the curve."""
    rho = 0.8
    g = np.linspace(-4, 4, 41)
    p = np.exp(-(g[:, None] ** 2 - 2 * rho * g[:, None] * g + g**2) / (2 * (1 - rho**2)))
    curve = ib_curve(p / p.sum(), np.geomspace(1.7, 20, 12), steps=3000)
    closed = -0.5 * np.log2(1 - rho**2 + rho**2 * 2.0 ** (-2 * curve.x))
    return Figure(float(np.abs(closed - curve.y).max()), details={"I(X;T)": float(curve.x.max())})


@claim(
    expected=(0.0, 0.01), unit="bit", how="exact", cost=2.0,
    source="Saxe et al. 2018: a layer wide enough knows every input, and so any label",
    setting=f"random first layer of 10 tanh units, {FIXED}",
)  # fmt: skip
def a_wide_layer_reads_the_same_for_shuffled_labels() -> Figure:
    """I(T; Y) less its null: what a saturated reading is worth. The reading itself in details."""
    source = sphere_rule()
    values = np.tanh(source.x @ np.random.default_rng(2).normal(size=(12, 10)) / 12**0.5)
    y = InformationPlane().layer("t", values, source).y
    if not y.facts["saturated"]:
        raise AssertionError("a reading at its ceiling that does not say so")
    return Figure(y.value - y.facts["null"], details={"I(T;Y)": y.value, "null": y.facts["null"]})


@claim(
    expected=(0.0, 1.0), unit="ratio of seconds", how="measured", cost=10.0,
    source="CONTRIBUTING.md: a speed is shown beside the best peer",
    setting="I(X; T) and I(T; Y) of 5 units, 4096 rows, against distinct rows as raw bytes (the "
    "way of the public code of Shwartz-Ziv and of Saxe), which gives no null and no interval",
)  # fmt: skip
def reading_takes_less_time_than_sorting_bytes() -> Figure:
    """Seconds of ours over the peer's, interleaved."""
    from narrows.measure.timing import interleave

    source = sphere_rule()
    values = np.tanh(source.x @ np.random.default_rng(3).normal(size=(12, 5)))
    instrument = InformationPlane()

    def entropy_of(rows: np.ndarray) -> float:
        raw = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.itemsize * rows.shape[1])))
        p = np.unique(raw, return_counts=True)[1] / len(rows)
        return float(-(p * np.log2(p)).sum())

    edges = np.linspace(-1, 1, 31)

    def peer() -> tuple[float, float]:
        cut = edges[np.digitize(values.reshape(-1), edges) - 1].reshape(values.shape)
        h = entropy_of(cut)
        parts = [(source.y == c) for c in np.unique(source.y)]
        return h, h - sum(float(m.mean()) * entropy_of(cut[m]) for m in parts)

    ours = instrument.layer("t", values, source)
    h, label = peer()
    if max(abs(ours.x.value - h), abs(ours.y.value - label)) > 1e-9:
        raise AssertionError("ours and the peer read differently")
    timings = interleave(
        {"ours": lambda: instrument.layer("t", values, source), "peer": peer},
        repeats=31,
        min_seconds=5e-3,
    )
    ratio = timings.ratio("ours", to="peer")
    if ratio.verdict == "inconclusive":
        raise Inconclusive(f"the spread covers the difference: {ratio.quartiles}")
    return Figure(ratio.median, (ratio.low, ratio.high))


# --- trained networks ----------------------------------------------------------------------------


@cache
def _source() -> Source:
    return sphere_rule()


@cache
def _history(activation: str) -> History:
    """Five networks of the paper, read by a fixed ruler and by one that follows each layer."""
    from narrows.information.networks_torch import train

    # ReLU is unbounded: bins of the same width as the paper's, as far up as any unit goes
    fixed = InformationPlane() if activation == "tanh" else InformationPlane(180, low=0, high=12)
    rulers = {"fixed": fixed, "layer": InformationPlane(span="layer")}
    return train(_source(), rulers, activation=activation, seeds=SEEDS, epochs=1500)


def _fall(history: History, ruler: str, layer: int = LAST) -> np.ndarray:
    """Bits of I(X; T) lost since the peak, by seed."""
    x = history.x[ruler][:, :, layer]
    return x.max(axis=0) - x[-1]


def _peak(history: History) -> np.ndarray:
    """Epoch at which I(X; T) of the last hidden layer is greatest, by seed."""
    return history.epochs[history.x["fixed"][:, :, LAST].argmax(axis=0)]


@claim(
    expected=(2.0, 12.0), unit="bit", how="measured", cost=60.0, needs=("torch",),
    source=f"{CARD}; figures 2 and 3", setting=f"tanh, {NET}, 5 seeds, last hidden layer, {FIXED}",
)  # fmt: skip
def the_last_tanh_layer_compresses() -> Figure:
    """Bits of I(X; T) lost between its peak and the end; I(T; Y) at the end in the details."""
    h = _history("tanh")
    value, interval = spread(_fall(h, "fixed"))
    details = {
        "I(T;Y) at the end, least seed": float(h.y["fixed"][-1, :, LAST].min()),
        "its null": float(h.null["fixed"][-1, :, LAST].mean()),
        "first": float(h.x["fixed"][0, :, LAST].mean()),
        "peak": float(h.x["fixed"][:, :, LAST].max(axis=0).mean()),
        "last": float(h.x["fixed"][-1, :, LAST].mean()),
        "by the layer's own range": float(_fall(h, "layer").mean()),
        "test error": float(h.test_error[-1].mean()),
    }
    return Figure(value, interval, details=dict(details))


@claim(
    expected=(0.95, 1.0), unit="bit", how="measured", cost=60.0, needs=("torch",), source=CARD,
    setting=f"tanh, {NET}, 5 seeds, last hidden layer, {FIXED}",
)  # fmt: skip
def the_compressed_layer_still_knows_the_label() -> Figure:
    """I(T; Y) at the end."""
    value, interval = spread(_history("tanh").y["fixed"][-1, :, LAST])
    return Figure(value, interval)


@claim(
    expected=(0.5, 1.0), unit="share of epochs", how="measured", cost=60.0, needs=("torch",),
    source="abstract (i): most of the epochs are spent on compression",
    setting=f"tanh, {NET}, 5 seeds, last hidden layer, {FIXED}",
)  # fmt: skip
def most_epochs_are_spent_compressing() -> Figure:
    """Share of the epochs after the peak of I(X; T)."""
    peak = _peak(_history("tanh"))
    value, interval = spread(1 - peak / 1500)
    return Figure(value, interval, details={"peak epoch, mean": float(peak.mean())})


@claim(
    expected=(0.5, 2.0), unit="ratio of epochs", how="measured", cost=60.0, needs=("torch",),
    source="abstract (ii); figure 4: compression begins where drift turns into diffusion",
    setting=f"tanh, {NET}, 5 seeds; crossing: first epoch read from which on the deviation of the "
    "gradient over mini-batches exceeds its mean, norms over all hidden layers",
)  # fmt: skip
def compression_begins_where_drift_turns_into_diffusion() -> Figure:
    """Epoch of the crossing over the epoch of the peak of I(X; T), geometric mean over seeds."""
    h = _history("tanh")
    hidden = slice(0, LAST + 1)
    drift = np.linalg.norm(h.drift[:, :, hidden], axis=2)
    drifts = np.linalg.norm(h.diffusion[:, :, hidden], axis=2) <= drift
    if drifts[-1].any():
        raise AssertionError("a network whose gradients never turn to diffusion")
    last = len(h.epochs) - 1 - drifts[::-1].argmax(axis=0)
    crossing = h.epochs[np.where(drifts.any(axis=0), last + 1, 0)]
    value, interval = spread(np.log2(np.maximum(crossing, 1) / np.maximum(_peak(h), 1)))
    return Figure(
        2.0**value, (2.0 ** interval[0], 2.0 ** interval[1]),
        details={
            "crossing": float(crossing.mean()), "peak": float(_peak(h).mean()),
        },
    )  # fmt: skip


@claim(
    expected=(0.0, 0.1), unit="share of the training set", how="measured", cost=60.0,
    needs=("torch",), source="abstract (ii): compression begins when the training error is small",
    setting=f"tanh, {NET}, 5 seeds; small taken as below a tenth",
    explained="here the peak comes after some 20 epochs, as the gradients turn, while a fifth of "
    "the labels is still wrong; most of the fitting and the compression run side by side",
)  # fmt: skip
def training_error_is_small_when_compression_begins() -> Figure:
    """Training error at the peak of I(X; T)."""
    h = _history("tanh")
    peak = h.x["fixed"][:, :, LAST].argmax(axis=0)
    value, interval = spread(h.train_error[peak, np.arange(len(SEEDS))])
    return Figure(value, interval)


@claim(
    expected=(0.0, 0.05), unit="bit", how="measured", cost=60.0, needs=("torch",),
    source="abstract (iii): the converged layers lie on or very close to the bound",
    setting=f"tanh, {NET}, 5 seeds, all hidden layers at the end, {FIXED}; labels of the rule, "
    "not as drawn",
)  # fmt: skip
def converged_layers_reach_the_bound_in_label_bits() -> Figure:
    """Largest I(T; Y) missing to the bound at the layer's I(X; T), mean over seeds.

    The details tell the other axis: bits of I(X; T) that the last hidden layer holds beyond what
    its I(T; Y) needs. There the layers are not close.
    """
    h = _history("tanh")
    posterior = _source().posterior
    assert posterior is not None
    curve = ib_curve(sufficient(posterior), np.geomspace(1.01, 200, 80))
    x, y = h.x["fixed"][-1, :, : LAST + 1], h.of_rule["fixed"][-1, :, : LAST + 1]
    missing = np.array(
        [[curve.at(a) - b for a, b in zip(*r, strict=True)] for r in zip(x, y, strict=True)]
    )
    order = np.argsort(curve.y)
    needed = np.interp(y[:, LAST], curve.y[order], curve.x[order])
    value, interval = spread(missing.max(axis=1))
    return Figure(value, interval, details={"surplus I(X;T)": float((x[:, LAST] - needed).mean())})


@claim(
    expected=(0.0, 0.5), unit="bit", how="measured", cost=60.0, needs=("torch",),
    source="Saxe et al. 2018, abstract: ReLU networks do not compress",
    setting=f"ReLU, {NET}, 5 seeds, last hidden layer, bins of 1/15 from 0 to 12",
    explained="the layer gains five to seven bits first, and then every seed loses some (0.4 to "
    "2.7): less than tanh, yet not nothing; Chelombiev et al. 2019 see the same with ReLU",
)  # fmt: skip
def the_last_relu_layer_does_not_compress_under_a_fixed_ruler() -> Figure:
    """Bits of I(X; T) lost since the peak."""
    h = _history("relu")
    fall = _fall(h, "fixed")
    value, interval = spread(fall)
    x = h.x["fixed"][:, :, LAST]
    details = {
        "first": float(x[0].mean()), "peak": float(x.max(axis=0).mean()),
        "last": float(x[-1].mean()), "least": float(fall.min()), "greatest": float(fall.max()),
    }  # fmt: skip
    return Figure(value, interval, details=dict(details))


@claim(
    expected=(0.0, 0.5), unit="ratio of bits", how="measured", cost=120.0, needs=("torch",),
    source="Saxe et al. 2018, abstract: it is the saturating activation that compresses",
    setting=f"{NET}, 5 seeds, last hidden layer, bins of 1/15 for both",
)  # fmt: skip
def relu_loses_less_than_tanh() -> Figure:
    """Bits of I(X; T) that ReLU loses since its peak over those that tanh loses, of the means."""
    relu, tanh = _fall(_history("relu"), "fixed"), _fall(_history("tanh"), "fixed")
    details = {"relu": float(relu.mean()), "tanh": float(tanh.mean())}
    return Figure(float(relu.mean() / tanh.mean()), details=dict(details))


@claim(
    expected=(0.5, 12.0), unit="bit", how="measured", cost=60.0, needs=("torch",), source=CARD,
    setting=f"ReLU, {NET}, 5 seeds, last hidden layer, 30 bins over the layer's range at each time",
)  # fmt: skip
def the_same_relu_layer_compresses_under_a_ruler_that_follows_it() -> Figure:
    """Bits of I(X; T) lost since the peak: the sign of the finding hangs on the ruler."""
    h = _history("relu")
    value, interval = spread(_fall(h, "layer"))
    x = h.x["layer"][:, :, LAST]
    return Figure(
        value, interval, details={"first": float(x[0].mean()), "last": float(x[-1].mean())}
    )


WIDTHS = {
    1: (12, 10, 2), 2: (12, 10, 7, 2), 4: (12, 10, 7, 5, 4, 2), 6: (12, 10, 7, 5, 4, 4, 3, 2),
}  # fmt: skip


@cache
def _depth() -> dict[int, np.ndarray]:
    """Epochs until the output knows 0.9 bit of the label, by hidden layers and seed; inf never."""
    from narrows.information.networks_torch import log_spaced, train

    found: dict[int, np.ndarray] = {}
    for hidden, widths in WIDTHS.items():
        h = train(
            _source(), {"fixed": InformationPlane()}, widths, seeds=SEEDS, epochs=1500,
            at=log_spaced(1500, each=4),
        )  # fmt: skip
        known = h.y["fixed"][:, :, -1] >= 0.9
        found[hidden] = np.where(known.any(axis=0), h.epochs[known.argmax(axis=0)], np.inf)
    return found


@claim(
    expected=(-1.0, 0.0), unit="rank correlation", how="measured", cost=120.0, needs=("torch",),
    source="abstract (iv); figure 5: training time falls with more hidden layers",
    setting="1, 2, 4 and 6 hidden layers, 5 seeds, epochs until the output knows 0.9 bit of the "
    "label (1,500 at most)",
)  # fmt: skip
def more_layers_train_faster() -> Figure:
    """Spearman's correlation of hidden layers and epochs; medians of the epochs in the details."""
    depth = _depth()
    layers = np.repeat(list(depth), len(SEEDS)).astype(float)
    epochs = np.concatenate(list(depth.values()))
    ranks = np.stack([_ranks(layers), _ranks(np.minimum(epochs, 1e9))])
    details = {f"{k} layers": float(np.median(np.minimum(v, 1e9))) for k, v in depth.items()}
    details |= {f"{k} layers, never": float(np.isinf(v).sum()) for k, v in depth.items()}
    return Figure(float(np.corrcoef(ranks)[0, 1]), details=dict(details))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks with ties at their mean."""
    return np.array([(values < v).sum() + (values == v).sum() / 2 for v in values], float)
