"""Cascades of extended Einsums: how often a kernel must pass over a rank, derived from its text.

A cascade is a list of Einsums, each on a line of its own:

    QK[m, p] = Q[e, p] * K[e, m]                     # e is missing on the left: summed
    GM[p] = QK[m, p] :: max                          # another reduction
    SN[m, p] = exp(QK[m, p] - GM[p])
    BK[e, m1, m0] = K[e, m1*M0 + m0]                 # a rank in partitions, outer first
    RM[m1+1, p] = max(RM[m1, p], LM[m1, p])          # a recurrence along m1 ...
    RM[0, p] = -inf                                  # ... its start ...
    AV[f, p] = RNV[M1, f, p] / RD[M1, p]             # ... and its end

Ranks are lower-case, their extents are written in capitals; the parts of a rank carry its name
and a digit, the largest digit outermost. Functions: exp, log, sqrt, abs, max.

A **pass** over a rank ends where an Einsum needs a reduction over the whole rank before it may
touch an element that was touched before it (Nayak et al. 2024, "FuseMax", section III). What a
later pass touches again must either have been kept (memory that grows with the rank) or be moved
once more. A reduction within one partition, or a recurrence, ends no pass: that is how online
softmax needs a single one.

    cascade = parse(text)
    cascade.passes("m")             # derived by walking the dependencies, never tabulated
    cascade.held("m", extents)      # words to keep while m streams by, by pass
    cascade.operations(extents)     # by Einsum: multiply-adds, additions, maxima, ...
    run(cascade, inputs, extents)   # numerically, in numpy (core/cascade_run.py)
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import inf, prod

from narrows.core.errors import NarrowsError, unknown

REDUCTIONS = ("sum", "max")
FUNCTIONS: Mapping[str, str] = {
    "exp": "exp", "log": "log", "sqrt": "sqrt", "abs": "abs", "max": "max",
}  # fmt: skip
OPERATORS: Mapping[type[ast.operator], str] = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Index:
    """One axis of a reference.

    ranks: one rank, or (outer, inner) of a partitioned axis; empty for a fixed coordinate.
    shift: added to the rank (`m1+1`). at: the fixed coordinate: a number, or an extent such as
    `M1`, which is one past the last.
    """

    ranks: tuple[str, ...]
    shift: int = 0
    at: int | str | None = None


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor with an index for each axis."""

    tensor: str
    index: tuple[Index, ...]

    @property
    def ranks(self) -> tuple[str, ...]:
        """The ranks it varies along, in the order of its axes."""
        return tuple(r for i in self.index for r in i.ranks)

    def along(self, rank: str) -> Index | None:
        """The index that varies along a rank."""
        return next((i for i in self.index if rank in i.ranks), None)


@dataclass(frozen=True, slots=True)
class Apply:
    """An operation on one or two terms."""

    op: str
    terms: tuple[Term, ...]


Term = Ref | Apply | float


def refs(term: Term) -> Iterator[Ref]:
    """Every reference in a term, from left to right."""
    if isinstance(term, Ref):
        yield term
    elif isinstance(term, Apply):
        for inner in term.terms:
            yield from refs(inner)


def applications(term: Term) -> Iterator[Apply]:
    """Every operation in a term."""
    if isinstance(term, Apply):
        yield term
        for inner in term.terms:
            yield from applications(inner)


@dataclass(frozen=True)
class Einsum:
    """One extended Einsum: output, term, and how ranks missing on the left are reduced."""

    output: Ref
    term: Term
    reduce: str = "sum"

    @property
    def name(self) -> str:
        """The tensor it writes."""
        return self.output.tensor

    @cached_property
    def reads(self) -> tuple[Ref, ...]:
        """References on the right, from left to right."""
        return tuple(refs(self.term))

    @cached_property
    def ranks(self) -> tuple[str, ...]:
        """Its iteration space: the ranks of the output, then those that are reduced."""
        return tuple(dict.fromkeys((*self.output.ranks, *(r for x in self.reads for r in x.ranks))))

    @cached_property
    def reduced(self) -> tuple[str, ...]:
        """Ranks that are missing on the left."""
        return tuple(r for r in self.ranks if r not in self.output.ranks)

    @property
    def view(self) -> bool:
        """Whether it only renames elements (a partition): no work, no new data."""
        return (
            isinstance(self.term, Ref)
            and not self.reduced
            and len(self.output.index) > len(self.term.index)
        )

    @property
    def start(self) -> bool:
        """Whether it sets the first element of a recurrence."""
        return any(i.at is not None for i in self.output.index)

    def points(self, extents: Mapping[str, int]) -> int:
        """Points of its iteration space."""
        return prod(_extent(extents, r) for r in self.ranks)

    def operations(self) -> dict[str, int]:
        """Operations at every point: mac, mul, add, div, max, exp, ...

        A product that is summed is one multiply-add (`mac`); a subtraction counts as `add`.
        """
        if self.view or self.start:
            return {}
        count: dict[str, int] = {}
        for a in applications(self.term):
            op = "add" if a.op in ("sub", "neg") else a.op
            count[op] = count.get(op, 0) + 1
        if self.reduced:
            product = isinstance(self.term, Apply) and self.term.op == "mul"
            if self.reduce == "sum" and product:
                count["mul"] -= 1
                count["mac"] = 1
            else:
                op = "add" if self.reduce == "sum" else self.reduce
                count[op] = count.get(op, 0) + 1
        return {op: n for op, n in count.items() if n}


@dataclass(frozen=True, slots=True)
class Timing:
    """When tensors exist, in passes over one rank.

    streams: tensors that vary along the rank, by the first pass in which their elements exist.
    ready: the others, by the pass at whose end they are complete (0: before the first).
    runs: Einsums that iterate the rank, by their pass.
    """

    streams: Mapping[str, int]
    ready: Mapping[str, int]
    runs: Mapping[int, int]


class Cascade:
    """Einsums in the order of their text; every tensor that none of them writes is an input."""

    def __init__(self, einsums: tuple[Einsum, ...]) -> None:
        self.einsums = einsums
        written = {e.name for e in einsums}
        self.inputs = tuple(
            dict.fromkeys(x.tensor for e in einsums for x in e.reads if x.tensor not in written)
        )
        self.ranks = tuple(dict.fromkeys(r for e in einsums for r in e.ranks))
        self._timings: dict[str, Timing] = {}

    def __getitem__(self, name: str) -> Einsum:
        """The Einsum that computes a tensor (not the one that starts its recurrence)."""
        found = [e for e in self.einsums if e.name == name and not e.start]
        if not found:
            raise unknown("Einsum", name, [e.name for e in self.einsums])
        return found[0]

    def parts(self, rank: str) -> tuple[str, ...]:
        """A rank's own name where it occurs whole, and its partitions, outermost first."""
        whole = [rank] if rank in self.ranks else []
        split = sorted(
            (r for r in self.ranks if r != rank and r.rstrip("0123456789") == rank), reverse=True
        )
        if not whole and not split:
            raise unknown("rank", rank, self.ranks)
        return (*whole, *split)

    def _outer(self, rank: str) -> tuple[str, ...]:
        """Names whose iteration walks along the whole rank: itself and its outermost part."""
        parts = self.parts(rank)
        split = [r for r in parts if r != rank]
        return (*(r for r in parts if r == rank), *split[:1])

    def timing(self, rank: str) -> Timing:
        """In which pass over a rank every tensor comes into being."""
        if rank not in self._timings:
            self._timings[rank] = self._derive(rank)
        return self._timings[rank]

    def _derive(self, rank: str) -> Timing:
        outer = self._outer(rank)
        varying: dict[str, bool] = {}
        for e in self.einsums:
            for x in (e.output, *e.reads):
                along = any(r in outer for r in x.ranks)
                varying[x.tensor] = varying.get(x.tensor, False) or along
        streams = {name: 1 for name in self.inputs if varying[name]}
        ready = {name: 0 for name in self.inputs if not varying[name]}
        runs: dict[int, int] = {}
        for _ in range(len(self.einsums) ** 2 + 2):
            before = (dict(streams), dict(ready), dict(runs))
            for i, e in enumerate(self.einsums):
                iterates = any(r in outer for r in e.ranks)
                pass_, complete = (1 if iterates else 0), 0
                for x in e.reads:
                    if any(r in outer for r in x.ranks):
                        pass_ = max(pass_, streams.get(x.tensor, 1))
                    elif not varying[x.tensor]:
                        complete = max(complete, ready.get(x.tensor, 0))
                    elif any(i.at is not None and i.at != 0 for i in x.index):
                        complete = max(complete, streams.get(x.tensor, 1))
                if iterates:
                    pass_ = max(pass_, complete + 1)
                    runs[i] = max(runs.get(i, 1), pass_)
                else:
                    pass_ = complete
                if varying[e.name]:
                    first = complete + 1 if e.start else pass_
                    streams[e.name] = max(streams.get(e.name, 1), first)
                else:
                    ready[e.name] = max(ready.get(e.name, 0), pass_)
            if (streams, ready, runs) == before:
                return Timing(streams, ready, runs)
            if max(runs.values(), default=0) > len(self.einsums) + 1:
                break
        raise NarrowsError(
            f"the cascade never ends along {rank!r}: an Einsum waits for a reduction over "
            f"{rank!r} that waits for the Einsum itself"
        )

    def passes(self, rank: str) -> int:
        """Passes over the elements of a rank: the least any order of this cascade needs.

        A partitioned rank counts where all its parts are walked; walking only the outer part
        touches one value for each partition, not the elements. A single part may be asked for
        too (`m0`: passes over each partition).
        """
        timing = self.timing(rank)
        split = tuple(r for r in self.parts(rank) if r != rank)
        return len(
            {
                pass_
                for i, pass_ in timing.runs.items()
                if rank in self.einsums[i].ranks
                or (split and all(r in self.einsums[i].ranks for r in split))
            }
        )

    def _uses(self, rank: str) -> dict[str, tuple[int, int]]:
        """Every tensor's first and last pass: where it comes into being, where it is last read."""
        timing = self.timing(rank)
        life: dict[str, tuple[int, int]] = {}
        for name, made in (*timing.streams.items(), *timing.ready.items()):
            life[name] = (max(made, 1), max(made, 1))
        for i, e in enumerate(self.einsums):
            when = timing.runs.get(i) or max(timing.ready.get(e.name, 1), 1)
            for x in e.reads:
                first, last = life[x.tensor]
                life[x.tensor] = (first, max(last, when))
        return life

    def _words(self, name: str, extents: Mapping[str, int], single: tuple[str, ...]) -> int:
        """Elements of a tensor, with one coordinate along the ranks in `single`."""
        ref = next(
            x for e in self.einsums for x in (e.output, *e.reads)
            if x.tensor == name and all(i.at is None for i in x.index)
        )  # fmt: skip
        return prod(1 if r in single else _extent(extents, r) for r in ref.ranks)

    def carried(self, rank: str) -> tuple[str, ...]:
        """Computed tensors with elements along a rank that a later pass reads again."""
        streams = self.timing(rank).streams
        life = self._uses(rank)
        views = {e.name for e in self.einsums if e.view}
        return tuple(
            name for name in streams
            if name not in self.inputs and name not in views and life[name][0] < life[name][1]
        )  # fmt: skip

    def held(self, rank: str, extents: Mapping[str, int]) -> int:
        """Words to keep while a rank streams by, at the worst pass.

        One coordinate (or partition) of what streams, the whole rank of what a later pass reads
        again, and everything that does not vary along the rank. `extents` of the other ranks may
        be those of a tile. Inputs stream again in every pass, so they are never kept.
        """
        timing, outer = self.timing(rank), self._outer(rank)
        life, again = self._uses(rank), set(self.carried(rank))
        views = {e.name for e in self.einsums if e.view}
        worst = 0
        for now in range(1, max(timing.runs.values(), default=1) + 1):
            live = (
                self._words(name, extents, () if name in again else outer)
                for name, (first, last) in life.items()
                if first <= now <= last and name not in views
            )
            worst = max(worst, sum(live))
        return worst

    def respilled(self, rank: str, extents: Mapping[str, int]) -> int:
        """Words moved when nothing along the rank is kept between passes.

        Every carried tensor is written once and read in each later pass that uses it; inputs are
        read again in each later pass that uses them (their first reading is not counted).
        """
        timing, total = self.timing(rank), 0
        carried = self.carried(rank)
        source = {e.name: e.reads[0].tensor for e in self.einsums if e.view}
        for name in timing.streams:
            if name in source or (name in self.inputs) == (name in carried):
                continue
            readers = {
                timing.runs[i]
                for i, e in enumerate(self.einsums)
                for x in e.reads
                if i in timing.runs and source.get(x.tensor, x.tensor) == name
            }
            later = len(readers - {timing.streams[name]})
            words = self._words(name, extents, ())
            total += words * (later + (name in carried))
        return total

    def operations(self, extents: Mapping[str, int]) -> dict[str, dict[str, int]]:
        """Operations of every Einsum over its whole iteration space, by kind."""
        return {
            e.name: {op: n * e.points(extents) for op, n in e.operations().items()}
            for e in self.einsums
            if not e.start and not e.view
        }


def _extent(extents: Mapping[str, int], rank: str) -> int:
    if rank not in extents:
        raise unknown("extent of rank", rank, extents)
    return extents[rank]


def parse(text: str) -> Cascade:
    """Read a cascade, one Einsum a line; `#` starts a comment.

    Raises NarrowsError, with the line, for anything that is not an extended Einsum.
    """
    einsums: list[Einsum] = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.partition("#")[0].strip()
        if line:
            try:
                einsums.append(_einsum(line))
            except (SyntaxError, NarrowsError) as error:
                why = error.args[0] if isinstance(error, NarrowsError) else error.msg
                raise NarrowsError(
                    f"line {number} of the cascade, {raw.strip()!r}: {why}"
                ) from None
    if not einsums:
        raise NarrowsError("the cascade is empty: write one Einsum a line, Z[m] = A[k, m] * B[k]")
    return Cascade(tuple(einsums))


def _einsum(line: str) -> Einsum:
    body, _, action = line.partition("::")
    reduce = action.strip() or "sum"
    if reduce not in REDUCTIONS:
        raise unknown("reduction", reduce, REDUCTIONS)
    left, sign, right = body.partition("=")
    if not sign:
        raise NarrowsError("an Einsum has the form OUTPUT[ranks] = term")
    output = _term(ast.parse(left.strip(), mode="eval").body)
    if not isinstance(output, Ref):
        raise NarrowsError("the left of an Einsum is a tensor, such as Z[m, p]")
    made = Einsum(output, _term(ast.parse(right.strip(), mode="eval").body), reduce)
    for x in made.reads:
        mine = [i.shift for i in output.index if i.shift]
        if x.tensor == output.tensor and (
            not mine or any(i.shift >= mine[0] for i in x.index if i.shift)
        ):
            raise NarrowsError(
                f"{x.tensor} reads itself, but not an earlier element: write Z[m+1] = f(Z[m])"
            )
    return made


def _term(node: ast.expr) -> Term:
    match node:
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.Name(id="inf"):
            return inf
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _term(operand)
            return -inner if isinstance(inner, float) else Apply("neg", (inner,))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return Apply(OPERATORS[type(op)], (_term(left), _term(right)))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            if name not in FUNCTIONS:
                raise unknown("function", name, FUNCTIONS)
            if len(args) != (2 if name == "max" else 1):
                raise NarrowsError(f"{name} takes {2 if name == 'max' else 1} terms")
            return Apply(FUNCTIONS[name], tuple(_term(a) for a in args))
        case ast.Subscript(value=ast.Name(id=name), slice=ast.Tuple(elts=elts)):
            return Ref(name, tuple(_index(e) for e in elts))
        case ast.Subscript(value=ast.Name(id=name), slice=one):
            return Ref(name, (_index(one),))
        case ast.Name(id=name):
            return Ref(name, ())
        case _:
            raise NarrowsError(f"{ast.unparse(node)!r} is not a term of an extended Einsum")


def _index(node: ast.expr) -> Index:
    match node:
        case ast.Constant(value=int() as value):
            return Index((), at=value)
        case ast.Name(id=name):
            return Index((name,)) if name.islower() else Index((), at=name)
        case ast.BinOp(left=ast.Name(id=name), op=ast.Add(), right=ast.Constant(value=int() as n)):
            return Index((name,), shift=n)
        case ast.BinOp(
            left=ast.BinOp(left=ast.Name(id=outer), op=ast.Mult(), right=ast.Name(id=size)),
            op=ast.Add(),
            right=ast.Name(id=inner),
        ) if size == inner.upper():
            return Index((outer, inner))
        case _:
            raise NarrowsError(f"{ast.unparse(node)!r} is not an index: m, m+1, 0, M or m1*M0 + m0")
