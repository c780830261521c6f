"""One portable program on every back end: exact, without temporaries, and told what it may not."""

from __future__ import annotations

import operator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.chips import _stream_c
from narrows.chips._stream_backends import backends, evaluate, plan, transform, untouched
from narrows.chips._stream_expression import Expression, lower, trace
from narrows.chips._stream_table import AGAIN, NATIVE, PLACES, allocated
from narrows.chips.stream_portability import Executor, StreamPortability
from narrows.core.errors import NarrowsError

QUICK = [name for name in backends() if name != "torch-compiled"]


@pytest.fixture(params=QUICK)
def backend(request: pytest.FixtureRequest) -> str:
    why = backends()[request.param].missing()
    if why:
        pytest.skip(f"{request.param}: {why}")
    return request.param


def test_any_expression_is_exact(backend: str):
    rng = np.random.default_rng(0)
    b, c = rng.normal(size=(2, 5003)) + 4
    out = np.empty_like(b)
    transform(lambda b, c: -(b - 3 * c) / (2 - c) * b - c + 1, b, c, out=out, backend=backend)
    np.testing.assert_allclose(out, -(b - 3 * c) / (2 - c) * b - c + 1, rtol=1e-12, atol=1e-12)


def test_the_result_may_be_an_argument(backend: str):
    b, c = np.arange(1000.0), np.ones(1000)
    transform(lambda b, c: (b + 2 * c) * b, b, c, out=b, backend=backend)
    assert np.array_equal(b, (np.arange(1000.0) + 2) * np.arange(1000.0))


def test_part_overlap_is_refused(backend: str):
    room = np.ones(101)
    with pytest.raises(NarrowsError, match="overlaps"):
        transform(lambda a: 2 * a, room[:100], out=room[1:], backend=backend)


def test_checksum(backend: str):
    assert StreamPortability(elements=10_007).checksum(backend) < 1e-8


EXPRESSIONS = st.recursive(
    st.one_of(
        st.integers(0, 2).map(lambda k: Expression("arg", k)), st.sampled_from([2.0, -3.0, 0.5])
    ),
    lambda inner: st.builds(
        lambda op, x, y: op(x, y),
        st.sampled_from([operator.add, operator.sub, operator.mul]),
        inner,
        inner,
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(EXPRESSIONS)
def test_passes_compute_what_the_expression_says(found: Expression | float):
    expression = trace(lambda *_: found, 3)
    arrays = [np.array([1.5, -2.0]), np.array([0.25, 3.0]), np.array([-1.0, 7.0])]
    wanted = np.broadcast_to(evaluate(expression, arrays), 2)
    for name in ("numpy", "torch-eager"):
        if not backends()[name].missing():
            out = np.empty(2)
            backends()[name].bind(expression, arrays, out, Executor("cpu"))()
            np.testing.assert_allclose(out, wanted, rtol=1e-9, atol=1e-9)


def test_a_library_with_axpy_needs_one_pass_for_triad():
    triad = trace(lambda b, c: b + 3 * c, 2)
    assert [p.op for p in lower(triad)] == ["multiply", "add"]
    assert [p.op for p in lower(triad, axpy=True)] == ["axpy"]


def test_hidden_temporaries_are_seen():
    arrays = [untouched(1 << 22, k) for k in range(3)]
    for one in arrays:
        one[:] = 1.0
    a, b, c = arrays
    calls = {n: plan(lambda b, c: b + 3 * c, b, c, out=a, backend=n) for n in QUICK[-2:]}
    assert allocated(calls["numpy"])[0] == 0
    faults, traced = allocated(calls["numpy-naive"])
    assert faults > 0
    assert traced >= 8 * (1 << 22)


def test_the_table_has_native_and_every_back_end():
    if _stream_c.available() is None:
        pytest.skip("no C compiler with OpenMP")
    names = ("c", "numpy", "numpy-naive")
    table = StreamPortability(times=4, elements=1 << 16, names=names).table("cpu")
    assert {(r.backend, r.kernel) for r in table.rows} == {
        (n, k) for n in (NATIVE, AGAIN, *names) for k in PLACES
    }
    for row in table.rows:
        assert row.interval[0] <= row.bandwidth <= row.interval[1] <= row.best * 1.0001
        assert (row.cause != "") == (
            row.backend in names and row.speed is not None and row.speed.median < 0.95
        )


def test_the_reading_has_its_interval():
    reading = StreamPortability(times=4, elements=1 << 14, names=("numpy",)).measure("cpu")
    assert reading.unit == "byte/s"
    assert 0 < reading.interval[0] <= reading.value == reading.interval[1]
    assert reading.facts["backend"] == "numpy"


def test_executors():
    first = Executor("cpu").cpus[0]
    assert Executor(f"cpu:{first}").threads == 1
    for wrong in ("cpu:9999", "cpu:x", "cpu:5-2", "tpu"):
        with pytest.raises(NarrowsError):
            _ = Executor(wrong).threads


def test_what_cannot_be_traced_is_refused():
    a, out = np.ones(4), np.ones(4)
    for wrong in (lambda a: a if a else 1, lambda a, b: a, lambda a: a**2, lambda a: [a], np.exp):
        with pytest.raises(NarrowsError):
            transform(wrong, a, out=out)
    with pytest.raises(NarrowsError, match="float64"):
        transform(lambda a: a, a.astype(np.float32), out=out)
    with pytest.raises(NarrowsError, match="back end"):
        transform(lambda a: a, a, out=out, backend="fortran")


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_stream_c, "available", lambda: None)
    with pytest.raises(NarrowsError, match="no C compiler"):
        transform(lambda a: a, np.ones(4), out=np.ones(4), backend="c")
    table = StreamPortability(times=3, elements=4096, names=("numpy",)).table("cpu")
    assert "native" in table.missing
