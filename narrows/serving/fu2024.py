"""The arithmetic of Fu 2024 (arXiv 2405.08944), kept as it was printed, beside the exact count.

Nothing here prices anything for a user: `longcontext_analysis` does, from the closed form. These
functions exist so that both figures can stand side by side. Where the text could not be read, the
form is solved back from the published figures (`attention_coefficient`) and says so.

It differs from exact counting in five places:

1. Attention of a prompt is charged L * S * d operations a token. Both products (scores and
   values) over the (S + 1) / 2 keys that a causal mask leaves cost 2 * L * S * d: twice that.
2. All parameters work on every token: the embedding is a look-up, and logits are needed for the
   last token only (2.6 % less for Yi-34B).
3. Decoding reads a cache of S tokens at every step; it grows by a token a step, and the
   embedding (1.3 % of Yi-34B) is not read.
4. Gigabytes are decimal and binary by turns: 80 GB of memory are 80 * 2**30 bytes, a cache of
   12.3e9 bytes is "11 GB" (gibibytes), weights of 34e9 parameters are 68 GB (decimal).
5. Tensor parallelism talks for free.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import floor

from narrows.core.machine import Machine

GENERATE = 250
"""Tokens of one answer, about a screen of text."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the arithmetic knows of a model; `parameters` is the round figure it uses."""

    parameters: float
    layers: int
    hidden: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Device:
    """Datasheet figures: operations and bytes a second, bytes held, bytes a second to the host."""

    flops: float
    bandwidth: float
    capacity: float
    pcie: float


YI_34B = Shape(34e9, 60, 7168, 8, 128)
"""The running example."""

A100 = Device(312e12, 2e12, 80 * 2**30, 20e9)
"""Its machine, with what PCIe gen 4 gives in practice. Memory read as binary: with 80e9 bytes
nobody with 50,000 tokens fits, and the published figure is one."""


def kv_bytes(shape: Shape, tokens: float, width: float = 2.0) -> float:
    """Bytes of keys and values of one user, `width` bytes an element."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * tokens * width


def concurrency(shape: Shape, device: Device, tokens: float) -> int:
    """Users whose caches fit beside the weights; nothing else takes memory."""
    return max(floor((device.capacity - 2 * shape.parameters) / kv_bytes(shape, tokens)), 0)


def prefill_seconds(shape: Shape, device: Device, tokens: float, attention: float = 1.0) -> float:
    """S * (2 P + attention * L * S * d) / flops: 1 is the paper's, 2 counts both products."""
    each = 2 * shape.parameters + attention * shape.layers * tokens * shape.hidden
    return tokens * each / device.flops


def decode_seconds(shape: Shape, device: Device, tokens: float, generate: int = GENERATE) -> float:
    """Every token reads the weights and the prompt's cache."""
    return generate * (2 * shape.parameters + kv_bytes(shape, tokens)) / device.bandwidth


def switch_seconds(shape: Shape, device: Device, tokens: float) -> float:
    """One user's cache goes to the host, then another's comes: (KV + KV) / PCIe."""
    return 2 * kv_bytes(shape, tokens) / device.pcie


def attention_coefficient(
    shape: Shape, device: Device, long: tuple[float, float], short: tuple[float, float]
) -> tuple[float, float]:
    """What two prefill times (tokens, seconds) charge: L * S * d this often, and parameters.

    Two equations, seconds * flops / tokens = 2 P + c * L * S * d, for c and P.
    """
    (s, t), (z, u) = long, short
    rate_long, rate_short = t * device.flops / s, u * device.flops / z
    c = (rate_long - rate_short) / (shape.layers * shape.hidden * (s - z))
    return c, (rate_short - c * shape.layers * z * shape.hidden) / 2


def as_assumed(machine: Machine, device: Device = A100) -> Machine:
    """A machine of the catalogue at the paper's rates, uncalibrated: what its figures assume."""
    given = {
        "compute.bf16": device.flops,
        machine.memory: device.bandwidth,
        f"{machine.memory}.capacity": device.capacity,
    }
    resources = {
        name: replace(r, capacity=given.get(name, r.capacity), source="Fu 2024")
        if name in given else r
        for name, r in machine.resources.items()
    }  # fmt: skip
    host = machine.tiers["host"]
    links = {**machine.links, host: replace(machine.links[host], bandwidth=device.pcie)}
    return replace(machine, resources=resources, links=links, calibrations={})
