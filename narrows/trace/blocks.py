"""The kernels of a transformer, one op for each that an eager framework launches.

Op lists and element types are those of the `transformers` 5 modules run eagerly: a root mean
square norm in 16 bit is eight kernels, a rotary embedding five for each of query and key. What a
compiler makes of them is the plan's business (core/fusion.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from narrows.core.tensor import BITS, Codec, Number, Tensor
from narrows.core.workload import Op, Use

Read = str | Use

ACTIVATIONS: Mapping[str, tuple[tuple[str, bool], ...]] = {
    "gelu_new": (
        ("half", False), ("cube", False), ("scale cube", False), ("add input", True),
        ("scale", False), ("tanh", False), ("add one", False), ("times half", True),
    ),
}  # fmt: skip
"""Activations that run as several kernels: (name, whether it reads an earlier tensor again)."""

SIXTEEN = ("bf16", "fp16", "fp32", "fp64")
"""Formats activations are kept in; narrower weights compute with 16-bit activations."""


class Builder:
    """Collects the ops and tensors of one phase.

    batch, tokens: extents of the activations, numbers or arrays over cases. repeat: of the ops
    added from now on. group: of those ops. prefix: of the names of new activations. saved: activations that a backward pass needs, by name, as ops are added.
    """

    def __init__(
        self, phase: str, weights: Mapping[str, Tensor], batch: Number, tokens: Number, dtype: str
    ) -> None:
        self.phase = phase
        self.tensors: dict[str, Tensor] = dict(weights)
        self.ops: list[Op] = []
        self.saved: dict[str, None] = {}
        self.batch, self.tokens = batch, tokens
        self.repeat: Number = 1
        self.precision = dtype
        self.format = dtype if dtype in SIXTEEN else "bf16"
        self.wide = "fp64" if self.format == "fp64" else "fp32"
        self.narrow = BITS[self.format] < 32
        self.group = ""
        self.prefix = ""

    def make(self, name: str, format: str = "", **axes: Number) -> str:
        """An activation of this phase with axes batch, token and those given; its full name."""
        full = f"{self.phase}.{self.prefix}{name}"
        shape = {"batch": self.batch, "token": self.tokens, **axes}
        self.tensors[full] = Tensor(full, "activation", shape, Codec.of(format or self.format))
        return full

    def like(self, source: str, name: str, format: str = "", **axes: Number) -> str:
        """An activation of the same extents as another, some replaced."""
        full = f"{self.phase}.{self.prefix}{name}"
        shape = {**self.tensors[source].axes, **axes}
        codec = Codec.of(format) if format else self.tensors[source].codec
        self.tensors[full] = Tensor(full, "activation", shape, codec)
        return full

    def run(
        self, name: str, kind: str, reads: Sequence[Read], writes: Sequence[Read],
        flops: Number = 0.0, per_element: Mapping[str, Number] | None = None,
        shape: Mapping[str, Number] | None = None, precision: str = "", saves: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Add an op; `saves` are the tensors its backward reads."""
        self.ops.append(Op(
            name, kind, tuple(self._use(r) for r in reads), tuple(self._use(w) for w in writes),
            flops, per_element or {}, precision or "fp32", self.repeat, shape or {}, self.group,
        ))  # fmt: skip
        for tensor in saves:
            if self.tensors[tensor].role == "activation":
                self.saved[tensor] = None

    def _use(self, read: Read) -> Use:
        """Weights and caches have a layer axis of which an op touches one."""
        use = Use(read) if isinstance(read, str) else read
        if "layer" in self.tensors[use.tensor].axes:
            return Use(use.tensor, {"layer": 1, **use.at})
        return use

    def map(
        self, name: str, kind: str, reads: Sequence[Read], out: str, cost: float = 1.0,
        saves: Sequence[str] = (),
    ) -> str:  # fmt: skip
        """A kernel that makes `out` with `cost` operations for each of its elements."""
        self.run(name, kind, reads, [out], cost * self.tensors[out].elements(), saves=saves)
        return out

    def linear(self, name: str, source: str, weight: str = "", **axes: Number) -> str:
        """A product with a weight (and its bias): 2 operations a weight and row."""
        made = self.make(name, **axes)
        self._product(name, source, weight or name, [made])
        return made

    def split(self, name: str, source: str, parts: Mapping[str, Mapping[str, Number]]) -> list[str]:
        """One product whose output is used in parts (views of it, each with its own bytes)."""
        made = [self.make(part, **axes) for part, axes in parts.items()]
        self._product(name, source, name, made)
        return made

    def _product(self, name: str, source: str, weight: str, made: list[str]) -> None:
        held = self.tensors[weight]
        axes = self.tensors[made[0]].axes
        rows = axes["batch"] * axes["token"]
        reads: list[Read] = [source, weight]
        if f"{weight}.bias" in self.tensors:
            reads.append(f"{weight}.bias")
        self.run(
            name, "matmul", reads, made, per_element={weight: 2.0 * rows},
            shape={"m": rows, "n": held.extent("out"), "k": held.extent("in")},
            precision=self.precision, saves=[source],
        )  # fmt: skip

    def norm(self, style: str, name: str, source: str) -> str:
        """A norm over the last axis: `layer` is one kernel, RMS norms are several."""
        weight = [n for n in (name, f"{name}.bias") if n in self.tensors]
        out = self.like(source, f"{name}.out")
        last = next(reversed(self.tensors[source].axes))
        if style == "layer":
            stats = self.like(source, f"{name}.stats", "fp32", **{last: 2})
            self.run(name, "norm", [source, *weight], [out, stats],
                     5.0 * self.tensors[out].elements(), saves=[source, stats])  # fmt: skip
            return out
        x = source
        if self.narrow:
            x = self.map(f"{name}.widen", "copy", [x],
                         self.like(source, f"{name}.wide", self.wide), 0.0)  # fmt: skip
        square = self.like(x, f"{name}.square")
        self.map(f"{name}.square", "pointwise", [x], square, saves=[x])
        mean = self.like(x, f"{name}.mean", **{last: 1})
        self.run(f"{name}.mean", "reduce", [square], [mean], self.tensors[square].elements())
        shifted = self.map(f"{name}.add", "pointwise", [mean], self.like(mean, f"{name}.shifted"))
        root = self.like(mean, f"{name}.root")
        self.map(f"{name}.rsqrt", "pointwise", [shifted], root, saves=[root])
        scaled = self.like(x, f"{name}.scaled")
        self.map(f"{name}.scale", "pointwise", [x, root], scaled, saves=[x, root])
        if style == "gemma":
            plus = self._gemma_weight(name)
            product = self.like(scaled, f"{name}.product")
            self.map(f"{name}.weight", "pointwise", [scaled, plus], product, saves=[scaled, plus])
            return self.map(f"{name}.narrow", "copy", [product], out, 0.0) if self.narrow else (
                product)  # fmt: skip
        if self.narrow:
            scaled = self.map(f"{name}.narrow", "copy", [scaled],
                              self.like(source, f"{name}.narrowed"), 0.0)  # fmt: skip
        return self.map(f"{name}.weight", "pointwise", [scaled, name], out, saves=[scaled])

    def _gemma_weight(self, name: str) -> str:
        """Gemma's weight is stored as its distance from one and widened at every call."""
        width = self.tensors[name].extent("channel")
        start = f"{self.phase}.{self.prefix}{name}"
        made = [f"{start}.wide_weight", f"{start}.plus_one"]
        for tensor in made:
            self.tensors[tensor] = Tensor(tensor, "activation", {"channel": width},
                                          Codec.of(self.wide))  # fmt: skip
        source = name
        if self.narrow:
            source = self.map(f"{name}.widen weight", "copy", [name], made[0], 0.0)
        return self.map(f"{name}.one", "pointwise", [source], made[1])

    def rotary_table(self, dim: float) -> tuple[str, str]:
        """Cosines and sines of all positions, made once a step."""
        axes: dict[str, Number] = {"batch": 1, "channel": dim}
        angle = self.make("rotary.angle", "fp32", batch=1, channel=dim / 2)
        self.run("rotary.outer", "pointwise", [], [angle], self.tensors[angle].elements())
        both = self.make("rotary.both", "fp32", **axes)
        self.map("rotary.concatenate", "copy", [angle], both, 0.0)
        made: list[str] = []
        for name in ("cos", "sin"):
            wave = self.map(f"rotary.{name}", "pointwise", [both],
                            self.make(f"rotary.{name}.raw", "fp32", **axes))  # fmt: skip
            out = self.map(f"rotary.{name}.scale", "pointwise", [wave],
                           self.make(f"rotary.{name}.scaled", "fp32", **axes))  # fmt: skip
            if self.narrow:
                out = self.map(f"rotary.{name}.narrow", "copy", [out],
                               self.make(f"rotary.{name}", **axes), 0.0)  # fmt: skip
            made.append(out)
        return made[0], made[1]

    def rotate(self, source: str, table: tuple[str, str], share: float, name: str) -> str:
        """Rotary positions of queries or keys (Su et al. 2021), as the rotate-half kernels."""
        axes = self.tensors[source].axes
        dim = axes["channel"]
        turned = {"channel": dim * share}
        part: Read = Use(source, turned) if share < 1 else source
        a = self.like(source, f"{name}.times_cos", **turned)
        self.map(f"{name}.times_cos", "rope", [part, table[0]], a, saves=[table[0]])
        half: Read = Use(source, {"channel": dim * share / 2})
        negative = self.like(source, f"{name}.negative", channel=dim * share / 2)
        self.map(f"{name}.negate", "rope", [half], negative)
        swapped = self.like(source, f"{name}.swapped", **turned)
        self.map(f"{name}.concatenate", "rope", [negative, half], swapped, 0.0)
        b = self.like(source, f"{name}.times_sin", **turned)
        self.map(f"{name}.times_sin", "rope", [swapped, table[1]], b, saves=[table[1]])
        out = self.map(f"{name}.add", "rope", [a, b], self.like(source, f"{name}.turned", **turned))
        if share < 1:
            rest = Use(source, {"channel": dim * (1 - share)})
            out = self.map(f"{name}.join", "rope", [out, rest],
                           self.like(source, f"{name}.whole"), 0.0)  # fmt: skip
        return out

    def activate(self, activation: str, source: str) -> str:
        """The activation of the MLP; most are one kernel, see ACTIVATIONS."""
        steps = ACTIVATIONS.get(activation)
        if steps is None:
            out = self.like(source, "activated")
            return self.map(activation, "pointwise", [source], out, saves=[source])
        held: dict[str, str] = {"input": source}
        last = source
        for name, again in steps:
            reads: list[Read] = [source if name in ("half", "cube") else last]
            if again:
                reads.append(held["half"] if name == "times half" else source)
            out = self.like(source, f"activated.{name}")
            saves = {"cube": [source], "tanh": [out], "times half": reads}.get(name, [])
            last = self.map(f"{activation}.{name}", "pointwise", reads, out,
                            saves=[str(s) for s in saves])  # fmt: skip
            held[name] = last
        return last

    def add(self, name: str, left: str, right: str, out: str) -> str:
        """A residual sum."""
        return self.map(name, "pointwise", [left, right], self.like(left, out))

    def reduce_over(self, source: str, peers: int, name: str) -> None:
        """The sum over tensor-parallel devices; nothing on one device."""
        if peers > 1:
            self.run(name, "all_reduce", [source], [source], shape={"peers": peers})


def causal_sum(before: Number, count: Number, window: int = 0) -> Number:
    """Sum over i = 1..count of min(window, before + i): keys that `count` queries in a row see.

    window 0 is no window. Exact for whole numbers.
    """
    if not window:
        return count * before + count * (count + 1) / 2
    # queries that still see everything: before + i <= window
    free = np.clip(window - np.asarray(before, float), 0, count)
    return free * before + free * (free + 1) / 2 + (count - free) * window
