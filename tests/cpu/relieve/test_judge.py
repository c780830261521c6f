"""Intervals of quality cover what they should; verdicts rest on their ends."""

from __future__ import annotations

import numpy as np
import pytest

from narrows.core.errors import NarrowsError
from narrows.relieve.judge import fewer_right, more_perplexity, student
from narrows.relieve.search import verdict
from narrows.report.model import Interval


def test_students_distribution_by_its_expansion():
    # two-sided 95 % points of the table
    for count, wanted in ((8, 2.3646), (32, 2.0395), (128, 1.9788)):
        assert student(count) == pytest.approx(wanted, rel=1e-3)


def test_more_perplexity_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        dense = rng.normal(3, 0.5, 8)
        found = more_perplexity(dense, dense + rng.normal(0.01, 0.02, 8))
        held += found.low <= np.expm1(0.01) <= found.high
    assert 0.935 < held / 2000 < 0.965
    assert found.low < found.value < found.high


def test_fewer_right_covers_the_truth_also_where_answers_of_a_prompt_go_together():
    rng = np.random.default_rng(1)
    for together in (False, True):
        held = 0
        for _ in range(1000):
            right = rng.random((128, 16)) < 0.97
            rate = rng.beta(0.4, 19.6, (128, 1)) if together else np.full((128, 1), 0.02)
            found = fewer_right(right, right & ~(rng.random((128, 16)) < rate))
            held += found.low <= 0.02 <= found.high
        assert held / 1000 > 0.92


def test_agreement_on_everything_is_no_certainty():
    right = np.ones((128, 16), bool)
    found = fewer_right(right, right)
    assert found.value == 0
    assert found.low < 0 < found.high < 0.005
    few = fewer_right(right[:8], right[:8])
    assert few.high > found.high, "fewer answers say less"


def test_a_cache_that_answers_nothing_has_no_quality_to_lose():
    with pytest.raises(NarrowsError, match="answers nothing"):
        fewer_right(np.zeros((4, 16), bool), np.ones((4, 16), bool))


@pytest.mark.parametrize(
    ("ppl", "recall", "wanted"),
    [
        ((0.001, 0.009), (-0.01, 0.01), "within"),
        ((0.001, 0.011), (-0.01, 0.01), "undecided"),
        ((0.011, 0.02), (-0.01, 0.01), "outside"),
        ((0.001, 0.011), (0.02, 0.03), "outside"),
    ],
)
def test_within_means_shown_to_be_within(ppl, recall, wanted):
    costs = {n: Interval(sum(x) / 2, *x) for n, x in (("ppl", ppl), ("recall", recall))}
    assert verdict(costs, {"ppl": 0.01, "recall": 0.01}) == wanted
