"""The spatial array: loop nests by hand, five designs, and the published points."""

from __future__ import annotations

import os

import pytest

from narrows.chips._baselines import Dataflow
from narrows.chips._fused import divisors
from narrows.chips._nest import Nest
from narrows.chips.fusemax import DESIGNS, SHAPES, FuseMax, Scenario, Shape
from narrows.claims import fusemax as claims
from narrows.core.claim import Claim
from narrows.core.errors import NarrowsError

CLAIMS = [c for c in vars(claims).values() if isinstance(c, Claim)]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.name)
def test_claim_holds_or_is_explained(claim: Claim):
    if "data" in claim.needs and not os.environ.get("NARROWS_DATA"):
        pytest.skip("NARROWS_DATA is not set: the published points are not at hand")
    assert claim.holds(claim.figure().value) != bool(claim.explained)


def test_the_mutant_is_noticed():
    with claims.mutant() as name:
        found = next(c for c in CLAIMS if c.name == name)
        assert not found.holds(found.figure().value)


def test_moves_of_a_product_by_hand():
    # C[m, n] += A[m, k] B[k, n], k innermost: m 4 x 2 in time, n 8 over the array, k 16.
    nest = Nest({"dram": {"m": 4}, "buffer": {"k": 16, "m": 2}}, {"n": 8})
    assert (nest.cycles, nest.elements, nest.points) == (128, 8, 1024)
    a = nest.moves(("m", "k"), ("dram", "buffer", "pe"), False)
    assert (a["dram"].reads, a["buffer"].fills, a["buffer"].reads) == (128, 128, 128)
    b = nest.moves(("k", "n"), ("dram", "buffer", "pe"), False)
    # B stays in the buffer for every m outside, but passes to the elements for each of them.
    assert (b["dram"].reads, b["buffer"].reads) == (128, 128 * 8)
    c = nest.moves(("m", "n"), ("dram", "pe"), True)
    # Partial sums stay in an element while k runs: written once, never read back.
    assert (c["dram"].updates, c["dram"].reads) == (64, 0)
    assert (c["pe"].updates, c["pe"].reads) == (128, 128 - 8)


def test_partial_sums_come_back_where_the_reduced_rank_is_outside():
    nest = Nest({"dram": {"k": 16}, "buffer": {"m": 8}}, {"n": 8})
    c = nest.moves(("m", "n"), ("dram", "pe"), True)
    assert (c["dram"].updates, c["dram"].reads) == (1024, 1024 - 64)


def test_cycles_of_the_smallest_published_point_by_hand():
    # u = 64 x 12 heads x 4 chunks x 4 tiles of queries. First phase: products of queries and keys
    # and maxima (65 u) beside sums and division (1 + 64 + 64/4); then 1, 8 and 64 u.
    u = 64 * 12 * 4 * 4
    ran = FuseMax().run(Scenario("BERT", 1024))
    assert ran.seconds == pytest.approx((81 + 1 + 8 + 64) * u / 940e6, rel=1e-12)
    assert ran.bytes == 64 * 12 * 1024 * 64 * 4 * 2
    assert ran.narrow == pytest.approx(1.0)


def test_what_does_not_fit_is_read_again():
    # 128 of 256 tiles of queries fit, so keys and values come twice.
    ran = FuseMax().run(Scenario("BERT", 65536))
    assert ran.bytes == 64 * 12 * 65536 * 64 * 6 * 2
    large = FuseMax(buffer=2**26).run(Scenario("BERT", 65536))
    assert large.bytes == 64 * 12 * 65536 * 64 * 4 * 2


@pytest.mark.parametrize("design", DESIGNS)
def test_sane_for_every_design(design: str):
    for name in SHAPES:
        ran = FuseMax().run(Scenario(name, 16384, design))
        assert 0 < ran.wide <= 1 + 1e-12
        assert 0 < ran.narrow <= 1 + 1e-12
        assert ran.seconds >= ran.memory / (3 if design == "unfused" else 1)
        assert ran.energy == pytest.approx(sum(ran.joules.values()))
        assert all(joules >= 0 for joules in ran.joules.values())


def test_quadratic_in_tokens_and_linear_in_batch():
    one, four = (FuseMax().run(Scenario("T5", n)) for n in (2**16, 2**18))
    assert four.seconds / one.seconds == pytest.approx(16, rel=0.01)
    double = FuseMax(batch=128).run(Scenario("T5", 2**16))
    assert double.seconds == pytest.approx(2 * one.seconds)


def test_a_slow_memory_becomes_the_narrow_point():
    ran = FuseMax(bandwidth=1e9).run(Scenario("BERT", 1024))
    assert ran.seconds == ran.memory


def test_any_shape_and_any_dataflow():
    shape = Shape(heads=8, head_dim=128, width=1024, hidden=4096)
    flow = Dataflow(frozenset({"QK", "A"}), 512)
    ours = FuseMax().run(Scenario(shape, 8192))
    flat = FuseMax().run(Scenario(shape, 8192, "flat", flow=flow))
    assert ours.seconds < flat.seconds
    linear = FuseMax().run(Scenario(shape, 8192, layers="linear"))
    assert linear.bytes >= 2 * 64 * 8192 * (8 * 1024 + 2 * (1024 + 4096))


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: Scenario("BERT", 1024, "fused"), "no design named"),
        (lambda: Scenario("BERT", 0), "tokens must be"),
        (lambda: FuseMax().run(Scenario("GPT", 1024)), "no network of the paper"),
        (lambda: FuseMax().run(Scenario("BERT", 1000)), "do not fill tiles"),
        (lambda: FuseMax().run(Scenario("BERT", 8192, "flat")), "is not published"),
        (lambda: FuseMax(buffer=2**16).run(Scenario("BERT", 1024)), "cannot hold one tile"),
        (lambda: FuseMax(pe=0), "above zero"),
    ],
)
def test_refusals(build, told: str):
    with pytest.raises(NarrowsError, match=told):
        build()


def test_divisors():
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert divisors(1) == [1]
