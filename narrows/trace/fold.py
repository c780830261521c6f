"""Repeated layers become one block of ops that runs so many times.

A trace of eighty layers is eighty times the same ops. Folding finds stretches of ops that
repeat (same kernels, shapes and formats), keeps the first and multiplies its `repeat`. Tensors
of one place in all layers become one tensor: with a `layer` axis where they live side by side
(weights, caches, what is saved for a backward pass, skips to a later part), as it is where each
is dead before the next but one is made (activations inside a layer).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from narrows.core.tensor import Tensor
from narrows.core.workload import FUSIBLE, PERSISTENT, Op, Use, Workload

CANDIDATES = 12
"""Distances between equal ops that are tried as the length of a layer, most frequent first."""

LEAST = 2
"""Shortest block that is folded, in ops."""


def fold(workload: Workload) -> Workload:
    """The same work with repeated stretches folded; flops and bytes of each phase are kept."""
    state = _State(dict(workload.tensors))
    for phase in workload.phases:
        state.phase(list(phase.ops))
    phases = tuple(
        replace(p, ops=tuple(state.renamed(op) for op in ops))
        for p, ops in zip(workload.phases, state.done, strict=True)
    )
    gone = state.alias.keys()
    tensors = {n: t for n, t in state.tensors.items() if n not in gone}
    return replace(workload, tensors=tensors, phases=phases)


@dataclass
class _State:
    """Tensors as far as folded, and the name that each folded one now has."""

    tensors: dict[str, Tensor]
    alias: dict[str, str] = field(default_factory=dict[str, str])
    layered: set[str] = field(default_factory=set[str])
    done: list[list[Op]] = field(default_factory=list[list[Op]])

    def name(self, tensor: str) -> str:
        while tensor in self.alias:
            tensor = self.alias[tensor]
        return tensor

    def use(self, use: Use) -> Use:
        name = self.name(use.tensor)
        if name == use.tensor:
            return use
        # A tensor that was folded is one layer of what it is folded into.
        at = {"layer": 1.0, **use.at} if name in self.layered else use.at
        return Use(name, at, use.part)

    def renamed(self, op: Op) -> Op:
        if not any(u.tensor in self.alias for u in (*op.reads, *op.writes)):
            return op
        return replace(
            op,
            reads=tuple(map(self.use, op.reads)),
            writes=tuple(map(self.use, op.writes)),
            per_element={self.name(t): rate for t, rate in op.per_element.items()},
        )

    def phase(self, ops: list[Op]) -> None:
        """Fold the longest repetition, then what is left, until nothing repeats."""
        ops = [self.renamed(op) for op in ops]
        tried: set[tuple[int, int]] = set()
        while True:
            marks = self._marks(ops)
            found = _best(marks, tried)
            if found is None:
                break
            start, period, count = found
            folded = None
            if _layer(ops[start : start + 2 * period], period):
                folded = self._block(ops, start, period, count)
            if folded is None:
                tried.add((len(ops) - start, period))
                continue
            ops = [*ops[:start], *folded, *ops[start + period * count :]]
            ops = [self.renamed(op) for op in ops]
        self.done.append(ops)

    def _marks(self, ops: Sequence[Op]) -> np.ndarray:
        """A number for each op, equal where two ops are of the same make."""
        seen: dict[object, int] = {}
        shapes: dict[str, object] = {}

        def of(use: Use) -> object:
            made = shapes.get(use.tensor)
            if made is None:
                t = self.tensors[use.tensor]
                made = (t.role, tuple(t.axes.items()), t.codec.name, t.tier)
                shapes[use.tensor] = made
            return (made, tuple(use.at.items()), use.part)

        marks = np.empty(len(ops), dtype=np.int64)
        for i, op in enumerate(ops):
            key = (
                op.kind, _plain(op.name), op.flops, op.precision, op.repeat,
                op.group.partition(":")[0], tuple(map(of, op.reads)), tuple(map(of, op.writes)),
                tuple(op.per_element.values()), tuple(op.shape.items()),
            )  # fmt: skip
            marks[i] = seen.setdefault(key, len(seen))
        return marks

    def _block(self, ops: list[Op], start: int, period: int, count: int) -> list[Op] | None:
        """One block for `count` of them, None where the blocks are wired differently."""
        places = _places(ops, start, period, count)
        if places is None:
            return None
        lives = _lives(ops, {n for row in places for n in row})
        groups = _groups(places)
        for members in groups:
            self._join(members, lives, start, period, count)
        return [replace(op, name=_plain(op.name), repeat=op.repeat * count)
                for op in ops[start : start + period]]  # fmt: skip

    def _join(
        self, members: list[str], lives: Mapping[str, tuple[int, int]], start: int, period: int,
        count: int,
    ) -> None:  # fmt: skip
        """Make one tensor of the same place in all blocks."""
        if len(members) < 2:
            return
        # Named after the one that the first block makes, not after what is fed into it.
        own = [m for m in members if start <= lives[m][0] < start + period]
        first = self.tensors[(own or members)[0]]
        end = start + period * count
        lasting = [m for m in members if self.tensors[m].role in PERSISTENT]
        # An intermediate that is still used two blocks later lies beside those of other layers.
        far = [m for m in members if lives[m][1] - lives[m][0] >= 2 * period
               and lives[m][0] < end - period and lives[m][0] >= start]  # fmt: skip
        name = _plain(first.name)
        while name in self.tensors and name not in members:
            name += "'"
        made = replace(self.tensors[(lasting or members)[0]], name=name)
        if lasting or len(far) > 1:
            layers = sum(_layers(self.tensors[m]) for m in (lasting or members))
            axes = {"layer": float(layers), **{a: n for a, n in first.axes.items() if a != "layer"}}
            made = replace(made, axes=axes)
            self.layered.add(name)
        self.tensors[name] = made
        for member in members:
            if member != name:
                self.alias[member] = name


def _layers(tensor: Tensor) -> float:
    return float(np.max(tensor.axes.get("layer", 1.0)))


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_COUNT = re.compile(r"#\d+")


def _plain(name: str) -> str:
    """A name without the number of its layer and without its count among equals."""
    return _COUNT.sub("", _NUMBER.sub("*", name))


def _layer(ops: Sequence[Op], period: int) -> bool:
    """Whether two stretches are two layers, not alike work inside one (queries and keys).

    Layers hold some heavy kernel, were not folded before, and where modules have numbers, theirs
    differ.
    """
    first, second = ops[:period], ops[period:]
    if all(op.kind in FUSIBLE for op in first) or any(np.any(op.repeat != 1) for op in first):
        return False
    names = [[_COUNT.sub("", op.name) for op in half] for half in (first, second)]
    return names[0] != names[1] or not any(_NUMBER.search(n) for n in names[0])


def _best(marks: np.ndarray, tried: set[tuple[int, int]]) -> tuple[int, int, int] | None:
    """Start, length and count of the repetition that saves the most ops."""
    n = len(marks)
    order = np.argsort(marks, kind="stable")
    same = marks[order][1:] == marks[order][:-1]
    gaps = Counter((order[1:] - order[:-1])[same].tolist())
    best: tuple[int, int, int] | None = None
    saved = 0
    for period in sorted(p for p, _ in gaps.most_common(CANDIDATES)):
        if period < LEAST:
            continue
        equal = np.concatenate(([False], marks[period:] == marks[:-period], [False]))
        edges = np.flatnonzero(equal[1:] != equal[:-1])
        for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            count = (end - begin) // period + 1
            gain = (count - 1) * period
            if count > 1 and gain > saved and (n - begin, period) not in tried:
                best, saved = (begin, period, count), gain
    return best


def _places(ops: list[Op], start: int, period: int, count: int) -> list[list[str]] | None:
    """Tensor names by place: one row a use of the block, one column a block.

    None where two places hold one tensor in some blocks and different ones in others: then the
    blocks are wired differently and are not the same work.
    """
    rows: list[list[str]] = []
    for offset in range(period):
        uses = [
            [u.tensor for u in (*ops[i].reads, *ops[i].writes)]
            for i in range(start + offset, start + period * count, period)
        ]
        rows += [list(column) for column in zip(*uses, strict=True)]
    for j in range(count):
        seen: dict[str, str] = {}
        for row in rows:
            if seen.setdefault(row[0], row[j]) != row[j]:
                return None
    return rows


def _groups(rows: list[list[str]]) -> list[list[str]]:
    """Tensors that some place joins, each group in order of first appearance."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for row in rows:
        first = root(row[0])
        for name in row[1:]:
            other = root(name)
            if other != first:
                parent[other] = first
    groups: dict[str, dict[str, None]] = {}
    for row in rows:
        for name in row:
            groups.setdefault(root(name), {})[name] = None
    return [list(g) for g in groups.values()]


def _lives(ops: list[Op], names: set[str]) -> dict[str, tuple[int, int]]:
    """First and last op that uses each tensor."""
    lives: dict[str, tuple[int, int]] = {}
    for i, op in enumerate(ops):
        for use in (*op.reads, *op.writes):
            if use.tensor in names:
                lives[use.tensor] = (lives.get(use.tensor, (i, i))[0], i)
    return lives
