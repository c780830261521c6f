"""Real runs beside their bound: what is read, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.measure.measured import against, classify, read
from tests.null import toys

LIMIT = 8.8  # seconds of the toy case, by hand in test_price


def found():
    return Case(toys.product(), toys.machine()).bound()


def test_seconds():
    held = against(found(), read("17.6"))
    assert held.phases[0].measured_seconds == 17.6
    assert held.phases[0].distance == pytest.approx(2.0)


def test_a_run_that_beats_the_limit_is_refused():
    with pytest.raises(NarrowsError, match="no run can be that fast"):
        against(found(), read("8.7"))


def write(folder: Path, data: object) -> str:
    file = folder / "run.json"
    file.write_text(json.dumps(data))
    return str(file)


def test_phases_with_op_classes(tmp_path: Path):
    run = read(
        write(tmp_path, {"phases": [{"name": "forward", "seconds": 20, "ops": {"matmul": 15}}]})
    )
    held = against(found(), run)
    assert held.phases[0].measured_ops == {"matmul": 15.0}
    with pytest.raises(NarrowsError, match="not one of this case"):
        against(found(), read(write(tmp_path, {"prefill": 20})))


def test_a_profilers_trace_is_split_by_its_ranges(tmp_path: Path):
    events = [
        {"ph": "X", "cat": "user_annotation", "name": "forward", "ts": 0, "dur": 40e6, "tid": 1},
        {"ph": "X", "cat": "cpu_op", "name": "aten::linear", "ts": 1e6, "dur": 20e6, "tid": 1},
        {"ph": "X", "cat": "cpu_op", "name": "aten::addmm", "ts": 2e6, "dur": 18e6, "tid": 1},
        {"ph": "X", "cat": "cpu_op", "name": "aten::silu", "ts": 25e6, "dur": 5e6, "tid": 1},
    ]
    run = read(write(tmp_path, {"traceEvents": events}))
    assert run.phases == {"forward": pytest.approx(25.0)}  # the inner addmm does not count twice
    assert run.ops["forward"] == {"matmul": pytest.approx(20.0), "pointwise": pytest.approx(5.0)}


def test_gpu_kernels_win_over_the_ops_that_launch_them(tmp_path: Path):
    events = [
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 5, "tid": 1},
        {"ph": "X", "cat": "kernel", "name": "sm90_xmma_gemm_bf16", "ts": 1, "dur": 30e6, "tid": 7},
    ]
    run = read(write(tmp_path, {"traceEvents": events}))
    assert run.total == pytest.approx(30.0)
    assert against(found(), run).measured_ops == {"matmul": pytest.approx(30.0)}


def test_kernel_names():
    assert classify("flash_fwd_splitkv_kernel") == "attention"
    assert classify("ncclDevKernel_AllReduce_Sum_bf16") == "all_reduce"
    assert classify("ampere_bf16_s16816gemm") == "matmul"
    assert classify("something else") == "other"


@pytest.mark.parametrize("bad", ["0", "-1", "nan", "inf", "nowhere.json", ""])
def test_bad_arguments(bad: str):
    with pytest.raises(NarrowsError):
        read(bad)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["phases", "name", "seconds", "ops", "traceEvents", "ph", "ts", "dur", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_json_is_read_or_refused_in_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, data: object
):
    file = tmp_path_factory.mktemp("fuzz") / "run.json"
    file.write_text(json.dumps(data))
    try:
        run = read(str(file))
    except NarrowsError:
        return  # refused; anything else would fail the test
    assert run.total > 0


@given(st.binary(max_size=64))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes):
    file = tmp_path_factory.mktemp("fuzz") / "run.json"
    file.write_bytes(data)
    with pytest.raises(NarrowsError):
        read(str(file))
