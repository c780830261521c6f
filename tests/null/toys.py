"""A machine and a workload small enough to price by hand."""

from __future__ import annotations

from narrows.core.machine import Machine
from narrows.core.resource import Kind, Link, Resource
from narrows.core.tensor import Codec, Number, Tensor
from narrows.core.workload import Op, Phase, Use, Workload

FP16 = Codec.of("fp16")


def machine(**changes: object) -> Machine:
    """100 flop/s, 10 byte/s, 1000 bytes, 5 W, a link of 2 byte/s among 4."""
    resources = [
        Resource("compute.fp16", Kind.RATE, 100.0, "flop/s"),
        Resource("compute.fp32", Kind.RATE, 50.0, "flop/s"),
        Resource("dram", Kind.RATE, 10.0, "byte/s"),
        Resource("dram.capacity", Kind.LEVEL, 1000.0, "byte"),
        Resource("power", Kind.LEVEL, 5.0, "watt"),
    ]
    given: dict[str, object] = {
        "name": "toy", "title": "Toy", "kind": "cpu",
        "resources": {r.name: r for r in resources},
        "tiers": {"device": "dram", "peers": "wire"},
        "links": {"wire": Link("wire", 2.0, latency=0.5, peers=4)},
    }  # fmt: skip
    return Machine(**{**given, **changes})  # type: ignore[arg-type]


def product(rows: Number = 1.0, layers: float = 1.0) -> Workload:
    """(rows, 8) by (8, 4) in fp16, `layers` times."""
    tensors = [
        Tensor("w", "weight", {"layer": layers, "in": 8, "out": 4}, FP16),
        Tensor("x", "activation", {"token": rows, "in": 8}, FP16),
        Tensor("y", "activation", {"token": rows, "out": 4}, FP16),
    ]
    op = Op(
        "xw", "matmul", (Use("w", {"layer": 1}), Use("x")), (Use("y"),),
        per_element={"w": 2 * rows}, precision="fp16", repeat=layers,
        shape={"m": rows, "n": 4, "k": 8},
    )  # fmt: skip
    return Workload("product", {t.name: t for t in tensors}, (Phase("forward", (op,)),))
