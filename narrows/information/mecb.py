"""MEC-B: couple two given laws through a code of limited rate (arXiv 2410.21666).

Narrow point: the bits a symbol that get from encoder to decoder, where what comes out must follow
a prescribed law (moves of a policy, tokens of a model) and not the law of what went in.

Mechanism. Of X - T - Y with X and Y's laws given and H(T) <= R, keep as much of I(X; Y) as can be
had in two steps. The encoder merges symbols of X, the two smallest columns if that is enough for
R, else the two largest; it loses at most h(p2) bits against the best encoder, p2 the second
largest mass. The decoder couples T's law with Y's by the greedy rule for minimum entropy: largest
mass left with largest mass left; at most 0.531 bits above the least joint entropy. The joint
table is p(x, y) = sum over t of p(x, t) p(y | t); Y's law comes out exactly.

It hurts when the merged symbols are the ones that matter: the choice looks at masses, never at
what a symbol means. Merging the heavy ones first leaves the frequent cases undistinguished.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from math import ceil, log2
from typing import Any

import numpy as np

from narrows.core.case import Case
from narrows.core.errors import NarrowsError, unknown
from narrows.core.flow import Flow, stored_bits
from narrows.core.method import Applied, Change, Price, Technique
from narrows.core.resource import Kind, Resource
from narrows.core.tensor import Codec, Tensor
from narrows.core.workload import Op, Phase, Use, Workload
from narrows.information._base import conditional, entropy, information, law, through
from narrows.information.coupling import SEEK, Coupling, Encoder, couple, encode
from narrows.information.courier import Courier, at_work

MESSAGES = 512
"""Messages of equal probability that `apply` assumes where no prior is given: the paper's."""


@dataclass(frozen=True)
class Coded:
    """Both halves for one pair of laws."""

    encoder: Encoder
    decoder: Coupling

    @property
    def table(self) -> np.ndarray:
        """p(x, y), (n, m)."""
        return through(self.encoder.table, conditional(self.decoder.table))

    @property
    def information(self) -> float:
        """I(X; Y), bits."""
        return float(information(self.table))


class MECB(Technique):
    """Minimum entropy coupling with bottleneck.

    compression: H(X) / R, the paper's axis; 1 is lossless. seek: how the decoder's greedy
    coupling picks its cells, `max` or `zero`. refine: split one symbol between two columns, so
    that the whole budget is used (theorem 3).
    """

    key = "mecb"
    paper = "arXiv:2410.21666"
    relieves = "information"
    change = Change.WRAP
    price = Price(
        quality="symbols that share a code cannot be told apart any more",
        memory="a table of one index for each symbol",
    )

    def __init__(self, compression: float = 2.0, seek: str = "max", refine: bool = False) -> None:
        if not (isinstance(compression, int | float) and compression >= 1):
            raise NarrowsError(f"mecb: compression must be at least 1 (none), not {compression!r}")
        if seek not in SEEK:
            raise unknown("way to seek a coupling (mecb)", seek, SEEK)
        self.compression, self.seek, self.refine = float(compression), seek, bool(refine)

    def encoder(self, p: np.ndarray, bits: float | None = None) -> Encoder:
        """The code of law p (n,) for a budget of `bits`, H(X) / compression unless given."""
        p = law(p, "source")
        budget = float(entropy(p)) / self.compression if bits is None else bits
        return encode(p, budget, self.refine)

    def couple(self, p: np.ndarray, q: np.ndarray, bits: float | None = None) -> Coded:
        """Laws p (n,) and q (m,) coupled through the code."""
        code = self.encoder(p, bits)
        return Coded(code, couple(code.code_law, q, self.seek))

    # --- the case ------------------------------------------------------------------------------

    @classmethod
    def variants(cls, case: Case) -> tuple[MECB, ...]:
        """The default, and half its rate where a flow has a law to code."""
        return (cls(), cls(compression=4.0)) if _flows(case) else (cls(),)

    def predict(self, case: Case) -> Case:
        """Every flow whose law is known crosses its path as the code T instead of X.

        The tensors on the path then hold H(T) bits a symbol (an entropy coder's mean), and the
        flow gets a channel `mecb` of I(X; T) bits. Looking the code up is priced as a gather.
        """
        work = case.workload
        for flow in _flows(case):
            work = self._coded(work, flow)
        return case if work is case.workload else replace(case, workload=work)

    def _coded(self, work: Workload, flow: Flow) -> Workload:
        code = self.encoder(np.array(flow.law))
        wide = [t for t in _path(work, flow) if stored_bits(t, flow.axis) > code.rate * (1 + 1e-9)]
        if not wide:
            return work
        narrow: list[Tensor] = []
        for tensor in wide:
            each = stored_bits(tensor, flow.axis) / tensor.codec.bits
            narrow.append(tensor.with_(codec=Codec("mecb", code.rate / each)))
        name = f"mecb.{flow.name}"
        known = name in work.tensors
        index = Codec("index", max(1, ceil(log2(code.columns))) if code.columns > 1 else 1)
        table = Tensor(name, "weight", {"symbol": len(flow.law)}, index)
        channel = Resource(
            "mecb", Kind.CHANNEL, code.information, "bit", f"{self.paper}, I(X; T)"
        )  # fmt: skip
        path = flow.through if "mecb" in flow.through else ("mecb", *flow.through)
        coded = replace(flow, through=path, channels={**flow.channels, "mecb": channel})
        flows = tuple(coded if f.name == flow.name else f for f in work.flows)
        work = replace(work.with_tensors([*narrow, table]), flows=flows)
        if known:
            return work
        first = wide[0]
        count = first.extent(flow.axis) if flow.axis in first.axes else 1.0
        look = Op(name, "gather", (Use(name, {"symbol": count}),))
        placed: list[str] = []

        def with_look(phase: Phase, op: Op) -> tuple[Op, ...]:
            touched = {u.tensor for u in (*op.reads, *op.writes)}
            if first.name not in touched or phase.name in placed:
                return (op,)
            placed.append(phase.name)
            return (replace(look, repeat=op.repeat), op)

        return work.map_ops(with_look)

    def why(self, case: Case) -> str:
        """Bits a symbol before and after, for the first flow it codes; or what is missing."""
        flows = _flows(case)
        if not flows:
            return "nothing to code: no symbols of a known law cross a channel here"
        flow = flows[0]
        code = self.encoder(np.array(flow.law))
        wide = max((stored_bits(t, flow.axis) for t in _path(case.workload, flow)), default=0.0)
        if wide <= code.rate * (1 + 1e-9):
            return f"nothing to gain: {flow.name} crosses its path in {wide:.3g} bits already"
        loss = f"{code.information:.3g} of {float(entropy(np.array(flow.law))):.3g} bits arrive"
        short = "" if flow.need <= code.information + 1e-9 else f", {flow.need:.3g} are needed"
        return f"{flow.name}: {wide:.3g} to {code.rate:.3g} bits a symbol; {loss}{short}"

    # --- the real thing ------------------------------------------------------------------------

    def apply(self, target: Any, state: Any = None) -> AbstractContextManager[Applied]:
        """`with mecb.apply(policy, prior) as applied: move = applied.model.send(...)`.

        target: a callable from an observation to the law of the next symbol (n,), or a torch
        module whose last axis is logits. state: prior of the messages, (messages,); 512 of equal
        probability where it is None. `.model` is a Courier; the target itself is not touched.
        """
        if not callable(target):
            raise NarrowsError(
                "mecb: the target must be callable, from an observation to the probabilities of "
                f"the next symbol; {type(target).__name__} is not"
            )
        prior = np.full(MESSAGES, 1 / MESSAGES) if state is None else law(state, "prior")
        bits = float(entropy(prior)) / self.compression
        return at_work(Courier(target, prior, lambda p, q: self.couple(p, q, bits).table))


def _flows(case: Case) -> list[Flow]:
    """The flows that can be coded: their law is known, and a tensor carries them."""
    work = case.workload
    return [f for f in work.flows if f.law and _path(work, f)]


def _path(work: Workload, flow: Flow) -> list[Tensor]:
    return [work.tensors[n] for n in flow.through if n in work.tensors]
