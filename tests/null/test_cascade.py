"""Cascades of extended Einsums: text, passes, what is kept, and numbers."""

from __future__ import annotations

import numpy as np
import pytest

from narrows.chips._cascades import ATTENTION, attention
from narrows.claims.fusemax import UNSEEN
from narrows.core.cascade import parse
from narrows.core.cascade_run import run
from narrows.core.errors import NarrowsError

EXTENTS = {"e": 4, "f": 3, "p": 5, "m": 24, "m1": 6, "m0": 4}


@pytest.mark.parametrize(("name", "passes"), [("three_pass", 3), ("two_pass", 2), ("one_pass", 1)])
def test_passes_follow_from_the_dependencies(name: str, passes: int):
    assert attention(name).passes("m") == passes


@pytest.mark.parametrize("name", UNSEEN)
def test_passes_of_cascades_that_no_table_holds(name: str):
    passes, text = UNSEEN[name]
    assert parse(text).passes("m") == passes


def test_deferring_the_division_saves_a_pass():
    text = ATTENTION["three_pass"].replace("A[m, p] = SN[m, p] / SD[p]\n", "")
    late = text.replace(
        "AV[f, p] = A[m, p] * V[f, m]",
        "SNV[f, p] = SN[m, p] * V[f, m]\nAV[f, p] = SNV[f, p] / SD[p]",
    )
    assert parse(late).passes("m") == 2


def test_an_einsum_that_waits_for_the_end_of_a_recurrence_starts_a_pass():
    text = "R[0] = 0\nR[m+1] = R[m] + X[m]\nY[m] = X[m] / R[M]"
    assert parse(text).passes("m") == 2
    assert parse(text.replace("R[M]", "R[m+1]")).passes("m") == 1


def test_reductions_within_a_partition_cost_no_pass_of_the_whole():
    text = "B[m1, m0] = X[m1*M0 + m0]\nL[m1] = B[m1, m0] :: max\nY[m1, m0] = B[m1, m0] - L[m1]"
    cascade = parse(text)
    assert cascade.passes("m") == 1
    assert cascade.passes("m0") == 2


def test_a_cascade_of_k_chained_norms_needs_k_passes_and_one():
    lines = ["S0[p] = X0[m, p]"]
    for i in range(5):
        lines += [f"X{i + 1}[m, p] = X{i}[m, p] / S{i}[p]", f"S{i + 1}[p] = X{i + 1}[m, p]"]
    assert parse("\n".join(lines)).passes("m") == 6


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_numbers_equal_softmax_attention(name: str, scale: float):
    rng = np.random.default_rng(1)
    q, k, v = (scale * rng.normal(size=(4, 5)), rng.normal(size=(4, 24)), rng.normal(size=(3, 24)))
    scores = k.T @ q
    weights = np.exp(scores - scores.max(axis=0))
    expected = v @ (weights / weights.sum(axis=0))
    found = run(attention(name), {"Q": q, "K": k, "V": v}, EXTENTS)["AV"]
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_what_is_kept_grows_with_the_rank_only_where_a_pass_comes_back():
    def held(name: str, chunks: int) -> int:
        extents = {**EXTENTS, "m": 4 * chunks, "m1": chunks}
        return attention(name).held("m", extents)

    assert held("one_pass", 6) == held("one_pass", 6000)
    # QK and SN of all keys, for five queries.
    assert held("three_pass", 6000) - held("three_pass", 6) == 2 * 5 * 4 * (6000 - 6)
    assert attention("three_pass").carried("m") == ("QK", "SN")
    assert attention("one_pass").carried("m") == ()


def test_what_is_not_kept_moves_again():
    # QK and SN written once and read once more each, and V not again: it is first used in pass 3.
    words = attention("three_pass").respilled("m", EXTENTS)
    assert words == 4 * 24 * 5 + 3 * 24
    assert attention("one_pass").respilled("m", EXTENTS) == 0


def test_operations_count_a_summed_product_once():
    count = attention("one_pass").operations(EXTENTS)
    assert count["QK"] == {"mac": 4 * 24 * 5}
    assert count["SLN"] == {"exp": 24 * 5, "add": 24 * 5}
    assert count["LM"] == {"max": 24 * 5}
    assert count["SPNV"] == {"mul": 6 * 3 * 5}
    assert count["AV"] == {"div": 3 * 5}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "empty"),
        ("Z[m]", "form OUTPUT"),
        ("Z[m] = X[m] ** 2", "not a term"),
        ("Z[m] = sin(X[m])", "no function named 'sin'"),
        ("Z[m] = X[2*m]", "not an index"),
        ("Z[m] = X[m] :: mean", "no reduction named 'mean'"),
        ("Z[m] = Z[m] + X[m]", "reads itself"),
        ("Z[m] = __import__('os')", "not a term|no function"),
        ("Z[m] = X[m", "line 1"),
    ],
)
def test_what_is_no_einsum_is_refused_with_its_line(text: str, told: str):
    with pytest.raises(NarrowsError, match=told):
        parse(text)


def test_circular_cascades_and_wrong_arrays_are_refused():
    circle = parse("A[m] = B[m] + X[m]\nB[m] = A[m] * X[m]")
    with pytest.raises(NarrowsError, match="circular"):
        run(circle, {"X": np.ones(3)}, {"m": 3})
    with pytest.raises(NarrowsError, match="never ends"):
        parse("S[p] = Y[m, p]\nY[m, p] = X[m, p] / S[p]").passes("m")
    one = parse("Z[p] = X[m, p]")
    with pytest.raises(NarrowsError, match="input"):
        run(one, {}, {"m": 3, "p": 2})
    with pytest.raises(NarrowsError, match="are needed"):
        run(one, {"X": np.ones((2, 2))}, {"m": 3, "p": 2})
    with pytest.raises(NarrowsError, match="extent"):
        run(one, {"X": np.ones((3, 2))}, {"m": 3})
    with pytest.raises(NarrowsError, match="rank"):
        one.passes("q")
