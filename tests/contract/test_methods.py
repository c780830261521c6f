"""What every built system keeps: its defaults, its docs, its claims, and that they can fail."""

from __future__ import annotations

import inspect

import pytest

from narrows import index
from narrows.claims import prove
from narrows.core.bound import bound
from narrows.core.case import Case
from narrows.core.method import Method, Technique

BUILT = [entry.key for entry in index.built()]


def defaults(method: type[Method]) -> dict[str, object]:
    return {
        name: p.default
        for name, p in list(inspect.signature(method.__init__).parameters.items())[1:]
        if p.default is not inspect.Parameter.empty
    }


@pytest.fixture(params=BUILT)
def key(request: pytest.FixtureRequest) -> str:
    return request.param


def test_something_is_built():
    assert "snapkv" in BUILT


def test_defaults_are_the_papers(key: str):
    method = index.load(key)
    wanted = prove.module(key).PAPER_DEFAULTS
    have = defaults(method)
    assert {n: have.get(n) for n in wanted} == wanted


def test_it_says_what_it_is(key: str):
    method = index.load(key)
    entry = index.get(key)
    assert method.key == key
    assert method.paper == entry.paper
    module = inspect.getmodule(method)
    assert module is not None
    told = (module.__doc__ or "").lower()
    for word in ("narrow point", "mechanism"):
        assert word in told, f"{module.__name__} does not say its {word}"
    assert "arxiv" in told
    assert method.__doc__


def test_claims_exist_and_are_told_apart(key: str):
    found = prove.claims(key)
    assert found
    assert len({c.name for c in found}) == len(found)
    for claim in found:
        assert claim.setting, claim.name
        assert claim.source, claim.name
        assert claim.compute.__code__.co_argcount == 0


def test_cheap_claims_hold(key: str):
    cheap = [c for c in prove.claims(key) if c.cost <= prove.QUICK]
    assert cheap, f"{key} has no claim that tests can afford"
    for claim in cheap:
        result = prove.judge(claim)
        if claim.how == "measured" and index.get(key).role == "instrument":
            # what an instrument reads of this machine is a fact of it: it must be told, with its
            # figure or why there is none; whether it is as published is for `prove` to say
            assert (result.figure is None) == (result.verdict in ("inconclusive", "needs-gpu"))
            assert result.figure is not None or result.reason
            continue
        assert result.verdict != "not-reproduced" or result.explained, (claim.name, result.reason)


def test_a_broken_mechanism_turns_a_claim_red(key: str):
    module = prove.module(key)
    with module.mutant() as name:
        claim = next(c for c in prove.claims(key) if c.name == name)
        result = prove.judge(claim)
    if result.verdict in ("inconclusive", "needs-gpu"):
        pytest.skip(f"{key}: {result.reason}")
    assert result.verdict == "not-reproduced"
    assert not result.explained


def cases() -> dict[str, Case]:
    import narrows

    return {
        "long prompt": narrows.case("llama-3-8b", "h100-sxm", prompt=16384, generate=256),
        "short prompt": narrows.case("llama-3-8b", "h100-sxm", prompt=64, generate=16),
        "no decode": narrows.case("llama-2-7b", "a100-80", prompt=4096, generate=0),
    }


def test_predict_rewrites_a_case_and_conserves_it(key: str):
    method = index.load(key)
    if not issubclass(method, Technique):
        pytest.skip("not a technique")
    for name, case in cases().items():
        for technique in method.variants(case):
            before = {t: v.bytes() for t, v in case.workload.tensors.items()}
            after = technique.predict(case)
            assert {t: v.bytes() for t, v in case.workload.tensors.items()} == before, name
            found = bound(after)
            assert found.seconds >= found.limit_seconds > 0, name
            for phase in found.phases:
                assert all(b >= 0 for b in phase.bytes.values()), name
                assert sum(phase.share.values()) == pytest.approx(1.0), name
            assert technique.why(case)


def test_composing_twice_is_not_counted_twice(key: str):
    method = index.load(key)
    if not issubclass(method, Technique):
        pytest.skip("not a technique")
    case = cases()["long prompt"]
    technique = method.variants(case)[0]
    once, twice = technique.predict(case), technique.predict(technique.predict(case))
    assert twice.workload.bytes("kv") == pytest.approx(once.workload.bytes("kv"))
