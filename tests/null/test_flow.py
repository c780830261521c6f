"""The third law: along a path of channels the least rules, and nothing later brings bits back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from narrows.core.bound import bound
from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.core.flow import Flow
from narrows.core.resource import Kind, Resource
from narrows.core.tensor import Codec

from . import toys


def channel(name: str, bits: float) -> Resource:
    return Resource(name, Kind.CHANNEL, bits, "bit")


def case(*flows: Flow) -> Case:
    return Case(replace(toys.product(rows=3.0), flows=flows), toys.machine())


def test_a_case_without_flows_has_no_channel_rows():
    assert bound(case()).channels == ()


def test_a_tensor_passes_what_it_stores_of_a_symbol():
    (row,) = bound(case(Flow("task", 60.0, ("x", "y")))).channels
    assert dict(row.passes) == {"x": 8 * 16, "y": 4 * 16}
    assert (row.resource, row.have, row.fits) == ("y", 64.0, True)


def test_the_least_channel_rules_and_bits_never_come_back():
    layers = {"layer.1": channel("layer.1", 5.0), "layer.2": channel("layer.2", 7.0)}
    (row,) = bound(case(Flow("task", 6.0, ("x", "layer.1", "layer.2", "y"), layers))).channels
    assert (row.resource, row.have, row.fits) == ("layer.1", 5.0, False)
    assert dict(row.passes) == {"x": 128.0, "layer.1": 5.0, "layer.2": 5.0, "y": 5.0}


def test_a_channel_of_the_machine_counts_and_a_rate_does_not():
    given = case(Flow("task", 2.0, ("x", "code")))
    resources = {**given.machine.resources, "code": channel("code", 1.5)}
    (row,) = bound(given.on(replace(given.machine, resources=resources))).channels
    assert (row.resource, row.have, row.fits) == ("code", 1.5, False)
    with pytest.raises(NarrowsError, match="tensor or channel"):
        bound(case(Flow("task", 2.0, ("x", "dram"))))


def test_a_name_that_is_tensor_and_channel_passes_the_lesser():
    (row,) = bound(case(Flow("task", 2.0, ("y",), {"y": channel("y", 3.0)}))).channels
    assert row.have == 3.0


def test_overhead_of_a_codec_carries_nothing():
    given = case(Flow("task", 2.0, ("y",)))
    packed = given.workload.tensors["y"].with_(codec=Codec("q", 2, group=4, overhead_bits=32))
    (row,) = bound(replace(given, workload=given.workload.with_tensors([packed]))).channels
    assert row.have == 8.0


def test_flows_outlive_other_rewrites_and_leave_seconds_alone():
    with_flow = case(Flow("task", 2.0, ("y",)))
    moved = with_flow.workload.map_ops(lambda phase, op: (op,)).with_tensors([])
    assert moved.flows == with_flow.workload.flows
    assert bound(with_flow).seconds == bound(case()).seconds


def test_a_dead_layer_passes_nothing_and_other_resources_may_not_be_zero():
    (row,) = bound(case(Flow("task", 1.0, ("dead",), {"dead": channel("dead", 0.0)}))).channels
    assert (row.have, row.fits) == (0.0, False)
    with pytest.raises(NarrowsError, match="above zero"):
        Resource("dram", Kind.RATE, 0.0, "byte/s")


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"need": -1.0}, "need"),
        ({"through": ()}, "at least one"),
        ({"channels": {"dram": Resource("dram", Kind.RATE, 1.0, "byte/s")}}, "not a channel"),
        ({"law": (0.5, 0.4)}, "sum to 1"),
    ],
)
def test_what_is_no_flow_is_refused(wrong, match):
    given = {"name": "task", "need": 1.0, "through": ("y",)}
    with pytest.raises(NarrowsError, match=match):
        Flow(**{**given, **wrong})
