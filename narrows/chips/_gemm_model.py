"""A linear layer's product on catalogue machines: what the paper measures, as narrows prices it."""

from __future__ import annotations

from narrows.core.machine import Machine
from narrows.core.price import price
from narrows.core.tensor import Codec, Tensor
from narrows.core.workload import Op, Phase, Use, Workload


def layer(side: int, precision: str, cast: bool = False) -> Workload:
    """A square product with a bf16 result. cast: both operands come in bf16 and are cast first.

    The weight is cast again each time, as a layer in training does.
    """
    axes = {"row": float(side), "column": float(side)}
    wide, narrow = Codec.of("bf16"), Codec.of(precision)
    tensors = {"y": Tensor("y", "output", axes, wide)}
    ops: list[Op] = []
    for name, role in (("x", "activation"), ("w", "weight")):
        tensors[name] = Tensor(name, role, axes, narrow)
        if cast:
            tensors[f"{name}16"] = Tensor(f"{name}16", role, axes, wide)
            ops.append(Op(f"cast.{name}", "copy", (Use(f"{name}16"),), (Use(name),)))
    ops.append(
        Op("linear", "matmul", (Use("x"), Use("w")), (Use("y"),), 2.0 * side**3,
           precision=precision, shape={"m": side, "k": side, "n": side})
    )  # fmt: skip
    return Workload("linear", tensors, (Phase("forward", tuple(ops)),))


def seconds(machine: Machine, side: int, precision: str, cast: bool = False) -> float:
    """Seconds of the layer on a machine."""
    return float(price(layer(side, precision, cast), machine)[0].total_seconds)
