"""Exact information of tables, codes of limited rate, couplings, and rulers; no torch."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.core.errors import NarrowsError
from narrows.core.resource import Kind
from narrows.information import _base as base
from narrows.information.bottleneck import ib_curve, sufficient
from narrows.information.coding_game import Grid, play
from narrows.information.coupling import couple, encode, meet, quantiser
from narrows.information.information_plane import InformationPlane
from narrows.information.ruler import cut
from narrows.information.source import Source, sphere_rule, sphere_spectrum

masses = st.lists(st.floats(0.001, 1.0), min_size=2, max_size=12)


def normal(values: list[float]) -> np.ndarray:
    return base.law(np.array(values) / np.sum(values))


def tables(seed: int, *shape: int) -> np.ndarray:
    p = np.random.default_rng(seed).random(shape)
    return p / p.sum((-2, -1), keepdims=True)


def test_known_figures():
    assert base.entropy(np.full(8, 1 / 8)) == pytest.approx(3.0)
    assert base.entropy(np.array([1.0, 0.0])) == 0.0
    assert base.information(np.eye(4) / 4) == pytest.approx(2.0)
    assert base.information(np.full((4, 3), 1 / 12)) == pytest.approx(0.0, abs=1e-15)
    flips = np.array([[0.89, 0.11], [0.11, 0.89]])
    assert base.information(flips / 2) == pytest.approx(1 - base.binary_entropy(0.11))


def test_leading_axes_are_the_single_tables():
    many = tables(0, 7, 3, 4)
    assert base.information(many) == pytest.approx([base.information(p) for p in many])
    hx, hy = base.entropy(many.sum(-1)), base.entropy(many.sum(-2))
    assert base.information(many) == pytest.approx(hx + hy - base.entropy(many, 2))
    assert base.equivocation(many) == pytest.approx(hx - base.information(many))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_data_processing(seed):
    p, channel = tables(seed, 4, 5), base.conditional(tables(seed + 1, 5, 3))
    after = base.through(p, channel)
    assert after.sum() == pytest.approx(1.0)
    assert 0 <= base.information(after) <= base.information(p) + 1e-12


def test_fano_is_reached_by_the_channel_that_meets_it():
    wrong, n = 0.2, 5
    p = np.full((n, n), wrong / (n - 1) / n) + np.eye(n) * (1 - wrong - wrong / (n - 1)) / n
    assert base.fano(float(base.equivocation(p)), n) == pytest.approx(wrong)
    assert base.fano(0.0, n) == 0.0
    assert base.fano(9.0, n) == pytest.approx(1 - 1 / n)


@pytest.mark.parametrize("wrong", [[0.5, 0.4], [1.5, -0.5], [], [np.nan, 1.0]])
def test_what_is_no_law_is_refused(wrong):
    with pytest.raises(NarrowsError):
        base.law(wrong)


def test_symbols_number_rows_whatever_their_extent():
    rng = np.random.default_rng(0)
    rows = rng.integers(-(2**62), 2**62, (50, 6))[rng.integers(0, 50, 400)]
    code = base.symbols(rows)
    _, wanted = np.unique(rows, axis=0, return_inverse=True)
    pairs = set(zip(code.tolist(), wanted.reshape(-1).tolist(), strict=True))
    assert len(pairs) == len(np.unique(code)) == len(np.unique(wanted))
    with pytest.raises(NarrowsError, match="choose bins"):
        base.symbols(np.array([0.1, 0.2]))


def test_a_sample_is_corrected_and_a_population_is_not():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 8, 200), rng.integers(0, 8, 200)
    sample, whole = base.observed(x, y, False), base.observed(x, y, True)
    assert sample.value == whole.value
    assert whole.bias == 0.0
    assert abs(sample.value - sample.bias) < sample.value / 2  # truth: 0
    assert whole.value <= whole.ceiling <= 3.0


# --- codes and couplings -------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(masses, st.floats(0.0, 1.2), st.booleans())
def test_a_code_keeps_its_budget_and_its_guarantee(values, share, refine):
    p = normal(values)
    budget = share * float(base.entropy(p))
    code = encode(p, budget, refine)
    assert code.rate <= budget + 1e-9
    assert base.information(code.table) == pytest.approx(code.information, abs=1e-9)
    assert code.table.sum(1) == pytest.approx(p, abs=1e-12)
    assert code.table.min() >= 0
    loss = min(budget, float(base.entropy(p))) - code.information
    assert -1e-9 <= loss <= float(base.binary_entropy(np.sort(p)[-2])) + 1e-9


def test_the_vectorised_greedy_is_the_algorithm_as_written():
    rng = np.random.default_rng(1)
    for _ in range(60):
        p = rng.dirichlet(np.ones(rng.integers(2, 9)))
        budget = rng.uniform(0, 1) * float(base.entropy(p))
        columns = [[i] for i in range(len(p))]

        def bits(c, p=p):
            return float(base.entropy(np.array([p[k].sum() for k in c])))

        while bits(columns) > budget + 1e-12:
            ordered = sorted(columns, key=lambda c: p[c].sum())
            small = [ordered[0] + ordered[1], *ordered[2:]]
            columns = small if bits(small) <= budget + 1e-12 else [
                *ordered[:-2], ordered[-2] + ordered[-1]
            ]  # fmt: skip
        assert encode(p, budget).rate == pytest.approx(bits(columns), abs=1e-9)


def test_refining_uses_up_the_budget():
    p = np.array([0.7, 0.2, 0.1])
    plain, fine = encode(p, 0.9), encode(p, 0.9, refine=True)
    assert fine.rate == pytest.approx(0.9, abs=1e-9)
    assert fine.information > plain.information + 0.003
    assert fine.moved is not None


def test_budgets_at_the_ends():
    p = np.array([0.5, 0.0, 0.25, 0.25])
    assert encode(p, 1.5).information == pytest.approx(1.5)
    assert encode(p, 0.0).information == pytest.approx(0.0)
    with pytest.raises(NarrowsError, match="budget"):
        encode(p, -1.0)


@settings(deadline=None, max_examples=60)
@given(masses, masses, st.sampled_from(["max", "zero"]))
def test_a_coupling_has_its_marginals(left, right, seek):
    p, q = normal(left), normal(right)
    found = couple(p, q, seek)
    assert found.table.sum(1) == pytest.approx(p, abs=1e-12)
    assert found.table.sum(0) == pytest.approx(q, abs=1e-12)
    assert len(found.mass) <= len(p) + len(q)
    floor = float(base.entropy(meet(p, q)))
    assert floor - 1e-9 <= found.entropy <= floor + np.log2(np.e) + 1e-9


def test_equal_laws_couple_without_loss():
    p = np.array([0.4, 0.3, 0.2, 0.1])
    for order in permutations(range(4)):
        assert couple(p, p[list(order)]).entropy == pytest.approx(base.entropy(p))


def test_the_quantiser_has_cells_of_equal_numbers_or_of_equal_mass():
    sizes = np.bincount(quantiser(np.full(512, 1 / 512), 4.5).column)
    assert len(sizes) == 22
    assert set(sizes.tolist()) == {23, 24}
    peaked = normal([16, 1, 1, 2, 12])
    assert quantiser(peaked, 1.0).column.tolist() == [0, 0, 0, 1, 1]
    assert quantiser(peaked, 1.0, "probability").column.tolist() == [0, 1, 1, 1, 1]
    with pytest.raises(NarrowsError, match="cells"):
        quantiser(peaked, 1.0, "mass")


# --- the game ------------------------------------------------------------------------------------


def test_the_policy_is_the_soft_optimum_and_walks_to_the_goal():
    grid = Grid(noise=0.0)
    policy = grid.policy(np.exp(-6))
    assert policy.sum(1) == pytest.approx(1.0)
    alone = play(grid, policy, np.array([1.0]), lambda b, q: b[:, None] * q, 0)
    assert alone.reward == pytest.approx(0.95 ** (len(alone.belief) - 2))


def test_a_sure_link_tells_the_message_and_an_independent_one_nothing():
    grid, prior = Grid(), np.full(4, 0.25)
    policy = grid.policy(np.exp(-3))
    none = play(grid, policy, prior, lambda b, q: b[:, None] * q, 1)
    assert none.belief == pytest.approx([0.25] * len(none.belief))
    sure = play(grid, policy, prior, lambda b, q: couple(b, q).table, 1)
    assert sure.right
    assert sure.belief[-1] > 0.99


# --- the curve and the source --------------------------------------------------------------------


def test_joined_inputs_have_the_same_curve():
    posterior = np.array([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    short = sufficient(posterior)
    assert short.shape == (3, 2)
    assert base.information(short) == pytest.approx(base.information(posterior / 4))
    a = ib_curve(posterior / 4, [3.0, 8.0])
    b = ib_curve(short, [3.0, 8.0])
    assert a.y == pytest.approx(b.y, abs=1e-6)
    assert (np.diff(a.x) <= 1e-9).all()
    assert a.at(0.0) == 0.0


def test_the_rule_does_not_change_when_the_sphere_is_turned():
    x, power = sphere_spectrum()
    assert x.shape == (4096, 12)
    single = power[x.sum(1) == 1]
    assert np.ptp(single, axis=0).max() < 1e-8  # any one point is like any other
    source = sphere_rule()
    assert source.posterior is not None
    assert base.information(source.posterior / 4096) == pytest.approx(0.99, abs=1e-6)
    assert len(np.unique(np.round(np.c_[power, source.posterior[:, 1]], 6), axis=0)) == len(
        np.unique(power, axis=0)
    )
    with pytest.raises(NarrowsError, match="at most"):
        sphere_rule(bits=1.5)


# --- rulers and the instrument -------------------------------------------------------------------


def test_rulers():
    values = np.array([[-1.0, 0.0], [0.0, 0.5], [1.0, 1.0], [2.0, 1.0]])
    fixed, outside = cut(values, 4)
    assert fixed.tolist() == [[0, 2], [2, 3], [3, 3], [3, 3]]
    assert outside == pytest.approx(1 / 8)
    assert cut(values, 3, "layer")[0].tolist() == [[0, 1], [1, 1], [2, 2], [2, 2]]
    assert cut(values, 2, "unit")[0].tolist() == [[0, 0], [0, 1], [1, 1], [1, 1]]
    assert cut(values, 2, "quantile")[0].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert cut(1000 * values, 5, "unit")[0].tolist() == cut(values, 5, "unit")[0].tolist()
    with pytest.raises(NarrowsError, match="diverged"):
        cut(np.array([[np.nan]]), 4)


def four() -> tuple[dict[str, np.ndarray], Source]:
    x = np.array([[0.0], [1.0], [2.0], [3.0]])
    layers = {
        "wide": np.array([[-0.9], [-0.3], [0.3], [0.9]]),
        "narrow": np.array([[-0.9], [-0.9], [0.9], [0.9]]),
    }
    return layers, Source(x, np.array([0, 0, 1, 1]), population=True)


def test_a_plane_by_hand():
    layers, source = four()
    plane = InformationPlane().plane(layers, source)
    assert [(one.x.value, one.y.value) for one in plane.layers] == [(2.0, 1.0), (1.0, 1.0)]
    assert plane.narrowest.name == "narrow"
    assert plane.violations == ()
    reading = InformationPlane().measure((layers, source))
    assert (reading.value, reading.unit, reading.interval) == (1.0, "bit", (1.0, 1.0))
    assert reading.ceiling == 2.0
    assert reading.facts["layers"] == {"wide": (2.0, 1.0), "narrow": (1.0, 1.0)}
    assert "30 bins" in reading.facts["ruler"]


def test_a_layer_is_a_channel_and_the_plane_a_flow():
    layers, source = four()
    plane = InformationPlane().plane(layers, source)
    channels = plane.channels()
    assert channels["narrow"].kind is Kind.CHANNEL
    assert channels["narrow"].capacity == 1.0
    flow = plane.flow()
    assert (flow.need, flow.through) == (1.0, ("wide", "narrow"))
    dead = InformationPlane().plane({"dead": np.zeros((4, 2))}, source)
    assert dead.channels()["dead"].capacity == 0.0


def test_a_ruler_that_makes_bits_is_found_out():
    layers, source = four()
    coarse = InformationPlane(bins=2).plane({"a": layers["wide"], "b": 10 * layers["wide"]}, source)
    assert coarse.violations == ()
    shifted = {"a": layers["wide"] / 10 + 0.5, "b": layers["wide"]}
    assert InformationPlane(bins=4).plane(shifted, source).violations == ("b",)


def test_a_sample_has_an_interval_and_says_when_it_is_full():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 3))
    y = (x[:, 0] > 0).astype(int)
    source = Source(x, y)
    coarse = InformationPlane(bins=4).layer("t", np.tanh(x[:, :1]), source)
    low, high = coarse.x.interval
    assert low < coarse.x.value < high
    assert not coarse.x.facts["saturated"]
    fine = InformationPlane(bins=200).layer("t", np.tanh(x), source)
    assert fine.x.facts["saturated"]
    assert fine.x.value <= fine.x.ceiling == pytest.approx(np.log2(500))
    assert fine.y.facts["null"] > 0.9  # any labels would read the same


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"bins": 1}, "bins"),
        ({"bins": None}, "keeps all"),
        ({"span": "units"}, "did you mean unit"),
        ({"low": 1.0}, "exceed"),
    ],
)
def test_what_is_no_ruler_is_refused(wrong, match):
    with pytest.raises(NarrowsError, match=match):
        InformationPlane(**wrong)


def test_what_cannot_be_measured_is_refused():
    layers, source = four()
    with pytest.raises(NarrowsError, match="measure takes"):
        InformationPlane().measure(layers)
    with pytest.raises(NarrowsError, match="rows"):
        InformationPlane().layer("t", np.zeros((3, 1)), source)
    with pytest.raises(NarrowsError, match="one label"):
        Source(np.zeros((3, 1)), np.zeros(2))
