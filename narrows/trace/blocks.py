"""The kernels of a transformer, one op for each that an eager framework launches.

Op lists and element types are those of the `transformers` 5 modules run eagerly: a root mean
square norm in 16 bit is eight kernels, a rotary embedding five for each of query and key. What a
compiler makes of them is the plan's business (core/fusion.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from narrows.core.tensor import BITS, Codec, Number, Tensor
from narrows.core.workload import Op, Use

Read = str | Use
Axes = Mapping[str, Number]

NONE: Axes = MappingProxyType({})

SIXTEEN = ("bf16", "fp16", "fp32", "fp64")
"""Formats activations are kept in; narrower weights compute with 16-bit activations."""

NORM_FLOPS, SOFTMAX_FLOPS = 5.0, 5.0
"""Operations an element: mean, variance, difference, quotient, scale; maximum, difference,
exponent, sum, quotient."""


@dataclass(frozen=True, slots=True)
class Note:
    """What a backward pass needs to know of an op.

    saves: tensors its backward reads. passes: the gradient of the output is that of the inputs
    (sums). extra: kernels beyond one for each input.
    """

    saves: tuple[str, ...] = ()
    passes: bool = False
    extra: int = 0


class Builder:
    """Collects the ops and tensors of one phase.

    batch, tokens: extents of the activations, numbers or arrays over cases. repeat, group: of
    the ops added from now on. prefix: of the names of activations made from now on.
    notes: one for each op. saved: activations that a backward pass needs, and how many there
    are. shared: activations that all layers use and no gradient reaches.
    """

    def __init__(
        self, phase: str, weights: Mapping[str, Tensor], batch: Number, tokens: Number, dtype: str
    ) -> None:
        self.phase = phase
        self.tensors: dict[str, Tensor] = dict(weights)
        self.ops: list[Op] = []
        self.notes: list[Note] = []
        self.saved: dict[str, Number] = {}
        self.shared: set[str] = set()
        self.batch, self.tokens = batch, tokens
        self.repeat: Number = 1
        self.precision = dtype
        self.format = dtype if dtype in SIXTEEN else "bf16"
        self.wide = "fp64" if self.format == "fp64" else "fp32"
        self.narrow = BITS[self.format] < 32
        self.group = ""
        self.prefix = ""

    # -- tensors -----------------------------------------------------------------------------

    def make(self, name: str, axes: Axes = NONE, format: str = "") -> str:
        """An activation with axes batch, token and those given; its full name."""
        full = f"{self.phase}.{self.prefix}{name}"
        shape = {"batch": self.batch, "token": self.tokens, **axes}
        self.tensors[full] = Tensor(full, "activation", shape, Codec.of(format or self.format))
        return full

    def like(self, source: str, name: str, axes: Axes = NONE, format: str = "") -> str:
        """An activation of the same extents as another, some replaced."""
        full = f"{self.phase}.{self.prefix}{name}"
        held = self.tensors[source]
        codec = Codec.of(format) if format else held.codec
        self.tensors[full] = Tensor(full, "activation", {**held.axes, **axes}, codec)
        return full

    def rows(self, name: str) -> Number:
        """Tokens of all sequences that an activation holds."""
        axes = self.tensors[name].axes
        return axes["batch"] * axes["token"]

    # -- ops ---------------------------------------------------------------------------------

    def run(
        self, name: str, kind: str, reads: Sequence[Read], writes: Sequence[Read],
        flops: Number = 0.0, per_element: Axes = NONE, shape: Axes = NONE, precision: str = "fp32",
        note: Note = Note(),
    ) -> None:  # fmt: skip
        """Add an op."""
        self.ops.append(Op(
            name, kind, tuple(self._use(r) for r in reads), tuple(self._use(w) for w in writes),
            flops, per_element, precision, self.repeat, shape, self.group,
        ))  # fmt: skip
        self.notes.append(note)
        for tensor in note.saves:
            if self.tensors[tensor].role == "activation":
                count = 1 if tensor in self.shared else self.repeat
                self.saved[tensor] = np.maximum(self.saved.get(tensor, 0), count)

    def _use(self, read: Read) -> Use:
        """Weights and caches have a layer axis of which an op touches one."""
        use = Use(read) if isinstance(read, str) else read
        if "layer" in self.tensors[use.tensor].axes:
            return Use(use.tensor, {"layer": 1, **use.at})
        return use

    def map(
        self, name: str, kind: str, reads: Sequence[Read], out: str, cost: float = 1.0,
        saves: Sequence[str] = (), passes: bool = False, extra: int = 0,
    ) -> str:  # fmt: skip
        """A kernel that makes `out` with `cost` operations for each of its elements."""
        flops = cost * self.tensors[out].elements() if cost else 0.0
        self.run(name, kind, reads, [out], flops, note=Note(tuple(saves), passes, extra))
        return out

    def add(self, name: str, left: str, right: str, out: str) -> str:
        """A residual sum."""
        made = self.like(left, out)
        return self.map(name, "pointwise", [left, right], made, passes=True)

    def linear(self, name: str, source: str, axes: Axes) -> str:
        """A product with a weight (and its bias): 2 operations a weight and row."""
        made = self.make(name, axes)
        self._product(name, source, [made])
        return made

    def split(self, name: str, source: str, parts: Mapping[str, Axes]) -> list[str]:
        """One product whose output is used in parts (views of it, each with its own bytes)."""
        made = [self.make(part, axes) for part, axes in parts.items()]
        self._product(name, source, made)
        return made

    def _product(self, name: str, source: str, made: list[str]) -> None:
        held = self.tensors[name]
        rows = self.rows(made[0])
        reads: list[Read] = [source, name]
        if f"{name}.bias" in self.tensors:
            reads.append(f"{name}.bias")
        self.run(
            name, "matmul", reads, made, per_element={name: 2.0 * rows},
            shape={"m": rows, "n": held.extent("out"), "k": held.extent("in")},
            precision=self.precision, note=Note((source,)),
        )  # fmt: skip

    def reduce_over(self, source: str, peers: int, name: str) -> None:
        """The sum over tensor-parallel devices; nothing on one device."""
        if peers > 1:
            self.run(name, "all_reduce", [source], [source], shape={"peers": peers})

    # -- norms, activations, positions -------------------------------------------------------

    def norm(self, style: str, name: str, source: str) -> str:
        """A norm over the last axis: `layer` is one kernel, RMS norms are several."""
        weight = [n for n in (name, f"{name}.bias") if n in self.tensors]
        last = next(reversed(list(self.tensors[source].axes)))
        if style == "layer":
            out = self.like(source, f"{name}.out")
            stats = self.like(source, f"{name}.stats", {last: 2}, "fp32")
            flops = NORM_FLOPS * self.tensors[out].elements()
            self.run(name, "norm", [source, *weight], [out, stats], flops,
                     note=Note((source, stats)))  # fmt: skip
            return out
        x = source
        if self.narrow:
            wide = self.like(source, f"{name}.wide", format=self.wide)
            x = self.map(f"{name}.widen", "copy", [x], wide, 0.0)
        square = self.like(x, f"{name}.square")
        self.map(f"{name}.square", "pointwise", [x], square, saves=[x], extra=2)
        mean = self.like(x, f"{name}.mean", {last: 1})
        self.run(f"{name}.mean", "reduce", [square], [mean], self.tensors[square].elements(),
                 note=Note(passes=True))  # fmt: skip
        shifted = self.like(mean, f"{name}.shifted")
        self.map(f"{name}.shift", "pointwise", [mean], shifted, passes=True)
        root = self.like(mean, f"{name}.root")
        self.map(f"{name}.root", "pointwise", [shifted], root, saves=[root], extra=2)
        scaled = self.like(x, f"{name}.scaled")
        self.map(f"{name}.scale", "pointwise", [x, root], scaled, saves=[x, root])
        if style == "gemma":
            plus = self._gemma_weight(name)
            made = self.like(scaled, f"{name}.product")
            self.map(f"{name}.weight", "pointwise", [scaled, plus], made, saves=[scaled, plus])
            if not self.narrow:
                return made
            out = self.like(source, f"{name}.out")
            return self.map(f"{name}.narrow", "copy", [made], out, 0.0)
        if self.narrow:
            narrow = self.like(source, f"{name}.narrowed")
            scaled = self.map(f"{name}.narrow", "copy", [scaled], narrow, 0.0)
        out = self.like(source, f"{name}.out")
        return self.map(f"{name}.weight", "pointwise", [scaled, name], out, saves=[scaled])

    def _gemma_weight(self, name: str) -> str:
        """Gemma's weight is stored as its distance from one and widened at every call."""
        axes = {"channel": self.tensors[name].extent("channel")}
        start = f"{self.phase}.{self.prefix}{name}"
        made = [f"{start}.wide_weight", f"{start}.plus_one"]
        for tensor in made:
            self.tensors[tensor] = Tensor(tensor, "activation", axes, Codec.of(self.wide))
        source = name
        if self.narrow:
            source = self.map(f"{name}.widen weight", "copy", [name], made[0], 0.0)
        return self.map(f"{name}.plus one", "pointwise", [source], made[1], passes=True)

    def activate(self, activation: str, source: str) -> str:
        """The activation of an MLP: one kernel, or eight for `gelu_new` written out."""
        if activation != "gelu_new":
            out = self.like(source, "activated")
            return self.map(activation, "pointwise", [source], out, saves=[source])
        made = {n: self.like(source, f"activated.{n}") for n in
                ("half", "cube", "part", "inner", "scaled", "tanh", "one", "out")}  # fmt: skip

        def step(reads: Sequence[str], out: str, saves: Sequence[str] = (), **how: bool) -> None:
            names = [made.get(r, r) for r in reads]
            kept = [made.get(s, s) for s in saves]
            self.map(f"{activation}.{out}", "pointwise", names, made[out], saves=kept, **how)

        step([source], "half")
        step([source], "cube", [source])
        step(["cube"], "part")
        step([source, "part"], "inner", passes=True)
        step(["inner"], "scaled")
        step(["scaled"], "tanh", ["tanh"])
        step(["tanh"], "one", passes=True)
        step(["half", "one"], "out", ["half", "one"])
        return made["out"]

    def rotary_table(self, dim: float) -> tuple[str, str]:
        """Cosines and sines of all positions, made once a step."""
        axes: Axes = {"batch": 1, "channel": dim}
        angle = self.make("rotary.angle", {"batch": 1, "channel": dim / 2}, "fp32")
        self.run("rotary.outer", "pointwise", [], [angle], self.tensors[angle].elements())
        both = self.make("rotary.both", axes, "fp32")
        self.map("rotary.concatenate", "copy", [angle], both, 0.0)
        made: list[str] = []
        for name in ("cos", "sin"):
            wave = self.make(f"rotary.{name}.raw", axes, "fp32")
            self.map(f"rotary.{name}", "pointwise", [both], wave)
            out = self.make(f"rotary.{name}.scaled", axes, "fp32")
            self.map(f"rotary.{name}.scale", "pointwise", [wave], out)
            if self.narrow:
                narrow = self.make(f"rotary.{name}", axes)
                out = self.map(f"rotary.{name}.narrow", "copy", [out], narrow, 0.0)
            made.append(out)
            self.shared.add(out)
        return made[0], made[1]

    def rotate(self, source: str, table: tuple[str, str], share: float, name: str) -> str:
        """Rotary positions of queries or keys (Su et al. 2021), as the rotate-half kernels."""
        dim = self.tensors[source].axes["channel"]
        turned: Axes = {"channel": dim * share}
        half: Axes = {"channel": dim * share / 2}
        part: Read = Use(source, turned) if share < 1 else source
        a = self.like(source, f"{name}.times_cos", turned)
        self.map(f"{name}.times_cos", "rope", [part, table[0]], a, saves=[table[0]])
        negative = self.like(source, f"{name}.negative", half)
        self.map(f"{name}.negate", "rope", [Use(source, half)], negative)
        swapped = self.like(source, f"{name}.swapped", turned)
        self.map(f"{name}.swap", "rope", [negative, Use(source, half)], swapped, 0.0, passes=True)
        b = self.like(source, f"{name}.times_sin", turned)
        self.map(f"{name}.times_sin", "rope", [swapped, table[1]], b, saves=[table[1]])
        out = self.like(source, f"{name}.turned", turned)
        self.map(f"{name}.add", "rope", [a, b], out, passes=True)
        if share == 1:
            return out
        rest = Use(source, {"channel": dim * (1 - share)})
        whole = self.like(source, f"{name}.whole")
        return self.map(f"{name}.join", "rope", [out, rest], whole, 0.0, passes=True)


def causal_sum(before: Number, count: Number, window: int = 0) -> Number:
    """Sum over i = 1..count of min(window, before + i): keys that `count` queries in a row see.

    window 0 is no window. Exact for whole numbers.
    """
    if not window:
        return count * before + count * (count + 1) / 2
    # queries that still see everything: before + i <= window
    free = np.clip(window - np.asarray(before, float), 0, count)
    return free * before + free * (free + 1) / 2 + (count - free) * window
