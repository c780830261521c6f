"""Caches, woken cores and new memory in the law, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from narrows.core import caches
from narrows.core.calibration import Calibration
from narrows.core.machine import Machine
from narrows.core.price import calibration_of, class_of, price
from narrows.core.resource import Kind, Resource
from narrows.core.tensor import Codec, Tensor
from narrows.core.workload import Op, Phase, Use, Workload
from tests.null import toys

FP32 = Codec.of("fp32")


def rate(name: str, capacity: float, unit: str = "byte/s") -> Resource:
    return Resource(name, Kind.RATE, capacity, unit)


def level(name: str, capacity: float, unit: str = "byte") -> Resource:
    return Resource(name, Kind.LEVEL, capacity, unit)


def machine(*more: Resource) -> Machine:
    """A cache of 1000 bytes at 100 byte/s before a memory of 10 byte/s."""
    extra = [rate("l2", 100.0), level("l2.capacity", 1000.0), *more]
    base = toys.machine().resources
    return toys.machine(caches=("l2",), resources={**base, **{r.name: r for r in extra}})


def chain(sizes: dict[str, tuple[str, float]], *ops: Op, steps: float = 1.0) -> Workload:
    tensors = {n: Tensor(n, role, {"d0": e}, FP32) for n, (role, e) in sizes.items()}
    return Workload("chain", tensors, (Phase("forward", ops, steps),))


def op(name: str, reads: str, writes: str, kind: str = "pointwise", **more: object) -> Op:
    return Op(name, kind, tuple(Use(r) for r in reads.split()),
              tuple(Use(w) for w in writes.split()), **more)  # fmt: skip


def test_what_a_cache_still_holds_falls_gradually():
    share = caches.held(np.array([0.0, 600.0, 1000.0, 1400.0]), 1000.0)
    assert share == pytest.approx([1.0, 1.0, 0.5, 0.0])


def test_a_tensor_used_again_soon_is_in_the_cache_and_one_used_late_is_not():
    sizes = {"w": ("weight", 100.0), "x": ("activation", 10.0), "y": ("activation", 10.0),
             "big": ("weight", 10_000.0), "z": ("activation", 10.0)}  # fmt: skip
    soon = chain(sizes, op("a", "w x", "y"), op("b", "w y", "z"), op("c", "big z", "x"))
    late = chain(sizes, op("a", "w x", "y"), op("c", "big y", "z"), op("b", "w z", "x"))
    bytes_soon, bytes_late = (price(w, machine())[0].bytes["dram"] for w in (soon, late))
    assert bytes_soon[0] == pytest.approx(400.0)  # once a step it comes back after all of `big`
    assert bytes_soon[1] == pytest.approx(0.0)
    assert bytes_late[2] == pytest.approx(480.0)  # x and z are further from it than `big`


def test_only_what_was_touched_before_is_near():
    cache = Tensor("kv", "kv", {"token": 1000.0}, FP32)
    work = Workload(
        "decode", {"kv": cache, "k": Tensor("k", "activation", {"token": 1.0}, FP32)},
        (Phase("decode", (
            Op("write", "copy", (Use("k"),), (Use("kv", {"token": 1.0}),)),
            Op("read", "attention_decode", (Use("kv"),), (Use("k"),)),
        )),),
    )  # fmt: skip
    assert price(work, machine())[0].bytes["dram"][1] == pytest.approx(3996.0, rel=0.01)


def test_levels_add_up_and_packing_kernels_do_not_hide_them():
    sizes = {"w": ("weight", 250.0), "x": ("activation", 0.25), "y": ("activation", 0.25)}
    for kind, expected in (("pointwise", 55.0), ("matmul", 60.0 + 55.0)):
        work = chain(sizes, op("a", "w x", "y", kind, flops=3000.0))  # 60 s at 50 flop/s
        priced = price(work, machine())[0]
        both = (priced.terms["l2"] + priced.terms["dram"])[0]
        assert both == pytest.approx(501 * 0.01 + 501 * 0.1, rel=0.02)  # half of 1002 bytes each
        assert priced.seconds[0] == pytest.approx(max(expected, 60.0), rel=0.02)
        assert priced.limit[0] == pytest.approx(60.0)


def test_no_caches_no_change():
    work = toys.product(7.0, 3.0)
    plain = price(work, toys.machine())[0]
    assert set(plain.bytes) == {"dram"}
    assert plain.bytes["dram"][0] == 8 * 4 * 2 + 7 * 8 * 2 + 7 * 4 * 2


def test_cores_are_woken_above_a_grain():
    woken = machine(rate("wake", 2.0, "op/s"), level("wake.grain", 64.0, "slot"))
    for kind, elements, seconds in (
        ("pointwise", 64.0, 0.0), ("pointwise", 65.0, 0.5), ("softmax", 4.0, 0.0),
        ("softmax", 5.0, 0.5), ("matmul", 65.0, 0.0), ("norm", 65.0, 0.0),
    ):  # fmt: skip
        sizes = {"x": ("input", elements), "y": ("output", elements)}
        priced = price(chain(sizes, op("a", "x", "y", kind)), woken)[0]
        spent = priced.terms.get("dispatch", np.zeros(1))[0]
        assert spent == pytest.approx(seconds), kind
    rows = Workload(
        "norm", {n: Tensor(n, "activation", {"row": 2.0, "channel": 8.0}, FP32) for n in "xy"},
        (Phase("forward", (op("a", "x", "y", "norm"),)),),
    )  # fmt: skip
    assert price(rows, woken)[0].terms["dispatch"][0] == pytest.approx(0.5)


def test_large_results_are_mapped_once_and_lasting_ones_never():
    new = machine(rate("faults", 4.0), level("faults.block", 400.0))
    sizes = {"x": ("input", 100.0), "y": ("activation", 100.0), "s": ("activation", 99.0),
             "w": ("weight", 100.0), "g": ("gradient", 100.0)}  # fmt: skip
    work = chain(sizes, op("a", "x", "y"), op("b", "y", "y"), op("c", "x", "s"),
                 op("d", "x", "w"), op("e", "x", "g"))  # fmt: skip
    priced = price(work, new)[0]
    assert priced.terms["faults"] == pytest.approx([100.0, 0.0, 0.0, 0.0, 100.0])
    assert "faults" not in priced.bytes


def test_many_cases_in_one_call_are_priced_like_each():
    new = machine(rate("wake", 2.0, "op/s"), level("wake.grain", 64.0, "slot"),
                  rate("faults", 4.0), level("faults.block", 400.0))  # fmt: skip
    extents = np.array([1.0, 50.0, 80.0, 300.0, 5000.0])

    def work(extent: object) -> Workload:
        sizes = {"x": ("input", extent), "y": ("activation", extent), "w": ("weight", 100.0)}
        return chain(sizes, op("a", "x w", "y"), op("b", "y w", "x", "matmul"))  # type: ignore[arg-type]

    together = price(work(extents), new)[0].seconds
    for i, extent in enumerate(extents):
        assert together[:, i] == pytest.approx(price(work(float(extent)), new)[0].seconds)


def test_the_most_special_class_is_taken():
    product = Op("p", "matmul", precision="bf16", shape={"m": 1.0, "n": 4.0, "k": 4.0})
    assert class_of(product) == ("matmul.bf16.vector", "matmul.bf16", "matmul")
    assert class_of(Op("mlp.act.silu", "pointwise"))[0] == "pointwise.fp32.silu"
    assert class_of(Op("mlp.add", "pointwise")) == ("pointwise.fp32", "pointwise")
    known = toys.machine().calibrated(Calibration("matmul", 0.5), Calibration("matmul.bf16", 0.4))
    assert calibration_of(product, known) is known.calibrations["matmul.bf16"]
    assert calibration_of(Op("q", "matmul"), known) is known.calibrations["matmul"]
