"""Runs a cascade of extended Einsums in numpy: slow, exact, and independent of any mapping.

Einsums that wait for each other (recurrences) are walked together along their rank, one
coordinate at a time; all others are evaluated whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from narrows.core.cascade import Apply, Cascade, Einsum, Index, Ref, Term
from narrows.core.errors import NarrowsError, unknown

Array = np.ndarray[Any, np.dtype[Any]]

FUNCTIONS: Mapping[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative,
    "exp": np.exp, "log": np.log, "sqrt": np.sqrt, "abs": np.abs, "max": np.maximum,
}  # fmt: skip


def run(
    cascade: Cascade, inputs: Mapping[str, Array], extents: Mapping[str, int]
) -> dict[str, Array]:
    """Every tensor a cascade computes, by name.

    inputs: arrays by name, axes as the text indexes them. extents: of every rank (of the parts,
    where a rank is partitioned). A recurrence Z[m+1] is stored with one element more than m.
    Raises NarrowsError for missing inputs, wrong shapes and circular cascades.
    """
    for name in cascade.inputs:
        if name not in inputs:
            raise unknown("input of the cascade", name, inputs)
    state = _State(cascade, extents, {name: np.asarray(inputs[name]) for name in cascade.inputs})
    done: set[str] = set(cascade.inputs)
    for group in _groups(cascade):
        starts = [e for e in group if e.start]
        steps = [e for e in group if not e.start]
        for e in starts:
            state.evaluate(e, {})
        if _recurrent(steps):
            rank = _rank(steps)
            for position in range(state.extent(rank)):
                for e in steps:
                    state.evaluate(e, {rank: position})
        else:
            for e in steps:
                state.evaluate(e, {})
        done.update(e.name for e in group)
    return {name: state.values[name] for name in done if name not in cascade.inputs}


def _recurrent(group: list[Einsum]) -> bool:
    names = {e.name for e in group}
    return any(x.tensor in names for e in group for x in e.reads)


def _rank(group: list[Einsum]) -> str:
    """The rank a group of mutually dependent Einsums walks along."""
    for e in group:
        for i in e.output.index:
            if i.shift and i.ranks:
                return i.ranks[0]
    names = ", ".join(e.name for e in group)
    raise NarrowsError(f"the cascade is circular: {names} wait for each other, and none steps")


def _groups(cascade: Cascade) -> list[list[Einsum]]:
    """Strongly connected components (Tarjan 1972), dependencies first, text order inside."""
    by_name: dict[str, list[Einsum]] = {}
    for e in cascade.einsums:
        by_name.setdefault(e.name, []).append(e)
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    out: list[list[Einsum]] = []

    def visit(name: str) -> None:
        number[name] = low[name] = len(number)
        stack.append(name)
        for e in by_name[name]:
            for x in e.reads:
                if x.tensor not in by_name:
                    continue
                if x.tensor not in number:
                    visit(x.tensor)
                    low[name] = min(low[name], low[x.tensor])
                elif x.tensor in stack:
                    low[name] = min(low[name], number[x.tensor])
        if low[name] == number[name]:
            members: set[str] = set()
            while True:
                last = stack.pop()
                members.add(last)
                if last == name:
                    break
            out.append([e for e in cascade.einsums if e.name in members])

    for name in by_name:
        if name not in number:
            visit(name)
    return out


class _State:
    """Extents and the values computed so far."""

    def __init__(
        self, cascade: Cascade, extents: Mapping[str, int], values: dict[str, Array]
    ) -> None:
        self.extents = extents
        self.values = values
        self.shapes: dict[str, tuple[int, ...]] = {}
        for e in cascade.einsums:
            here = tuple(self._length(e, i) for i in e.output.index)
            before = self.shapes.get(e.name, here)
            if len(before) != len(here):
                raise NarrowsError(f"{e.name} is written with {len(before)} and {len(here)} axes")
            self.shapes[e.name] = tuple(max(a, b) for a, b in zip(before, here, strict=True))

    def _length(self, e: Einsum, index: Index) -> int:
        """Elements along one axis of an output, as far as this Einsum writes."""
        if len(index.ranks) > 1:
            raise NarrowsError(f"{e.name}: the left of an Einsum cannot join partitions")
        if index.ranks:
            return self.extent(index.ranks[0]) + index.shift
        return self.fixed(index) + 1

    def extent(self, rank: str) -> int:
        if rank not in self.extents:
            raise unknown("extent of rank", rank, self.extents)
        return self.extents[rank]

    def fixed(self, index: Index) -> int:
        if isinstance(index.at, str):
            return self.extent(index.at.lower())
        return index.at or 0

    def evaluate(self, e: Einsum, at: Mapping[str, int]) -> None:
        """Write the output of an Einsum, at one coordinate of the ranks in `at`."""
        axes = tuple(r for r in e.ranks if r not in at)
        kept = tuple(r for r in axes if r in e.output.ranks)
        value = self._term(e.term, axes, at)
        value = np.broadcast_to(value, tuple(self.extent(r) for r in axes))
        gone = tuple(i for i, r in enumerate(axes) if r not in kept)
        if gone:
            value = value.max(axis=gone) if e.reduce == "max" else value.sum(axis=gone)
        where: list[int | slice] = []
        for i in e.output.index:
            rank = i.ranks[0] if i.ranks else None
            if rank is None:
                where.append(self.fixed(i))
            elif rank in at:
                where.append(at[rank] + i.shift)
            else:
                where.append(slice(i.shift, i.shift + self.extent(rank)))
        whole = self.values.setdefault(e.name, np.full(self.shapes[e.name], np.nan))
        order = [kept.index(r) for r in e.output.ranks if r in kept]
        whole[tuple(where)] = np.transpose(value, order) if order else value

    def _term(self, term: Term, axes: tuple[str, ...], at: Mapping[str, int]) -> Array:
        if isinstance(term, Ref):
            return self._ref(term, axes, at)
        if isinstance(term, Apply):
            return FUNCTIONS[term.op](*(self._term(t, axes, at) for t in term.terms))
        return np.asarray(term)

    def _ref(self, ref: Ref, axes: tuple[str, ...], at: Mapping[str, int]) -> Array:
        """A reference as an array whose axes are those of the iteration space."""
        value = self.values.get(ref.tensor)
        if value is None:
            raise NarrowsError(f"{ref.tensor} is read before it is computed")
        if value.ndim != len(ref.index):
            raise NarrowsError(
                f"{ref.tensor} has {value.ndim} axes, but is indexed with {len(ref.index)}"
            )
        ranks: list[str] = []
        for axis, i in enumerate(ref.index):
            done = len(ranks)
            if not i.ranks:
                value = value.take(self.fixed(i), axis=done)
                continue
            lengths = tuple(self.extent(r) for r in i.ranks)
            need = int(np.prod(lengths)) + i.shift
            if value.shape[done] < need:
                raise NarrowsError(
                    f"{ref.tensor}: axis {axis} has {value.shape[done]} elements, "
                    f"but {need} are needed along {'*'.join(i.ranks)}"
                )
            value = value.take(np.arange(i.shift, need), axis=done)
            value = value.reshape(*value.shape[:done], *lengths, *value.shape[done + 1 :])
            for r in i.ranks:
                if r in at:
                    value = value.take(at[r], axis=len(ranks))
                else:
                    ranks.append(r)
        order = [ranks.index(r) for r in axes if r in ranks]
        value = np.transpose(value, order)
        return value.reshape(tuple(self.extent(r) if r in ranks else 1 for r in axes))
