"""ALISA: attend to recent and lately important tokens, keep the rest elsewhere (arXiv 2403.17312).

Narrow point: the cache outgrows the device, so the batch is capped by memory capacity, or the
cache crosses the link to the host at every step.

Mechanism. A step that sees n tokens attends to (1 - sparsity) n of them: half are the most
recent, half are those of the older ones that the last steps looked at most (local attention sum,
over as many steps as there are recent tokens; of each layer, a mean over heads). Nothing is
evicted: what is not chosen now may be later. Keys and values are in INT8 by channel. While the
cache grows it passes three phases (_phases.py): all on the device; the oldest on the host,
fetched when chosen; the oldest of these deleted, and made again from saved states when chosen.
The phases' parameters are chosen by a grid before the run.

It hurts where the answer lies in a token that nobody looked at lately (a question about something
read long ago), in short prompts, whose few tokens all matter, and in prefill, which gains nothing
and pays for the sums. States to make keys and values from are worth their room only where these
are larger: not under grouped queries, and hardly under INT8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.core.method import Price
from narrows.kv._base import KVTechnique, Prompt
from narrows.kv._coded import cached
from narrows.kv._phases import EVEN, Costs, Phases, Schedule, best, window

if TYPE_CHECKING:
    import torch

    from narrows.kv.store_torch import Store
    from narrows.kv.tier import Tier

__all__ = ["ALISA", "Phases", "schedule"]

BITS = (1, 2, 4, 8)
SETTINGS = ("sparsity", "split", "kv_bits", "group_size")
SCALES_BITS = 32
"""Of a channel of a group: scale and minimum in fp16."""


class ALISA(KVTechnique):
    """Attends to few tokens of every layer that attends to all, and places the others by a plan.

    sparsity: share of the tokens that a step leaves out. split: share of its tokens that are the
    most recent. kv_bits: of a stored element, by channel over `group_size` tokens; None: as they
    come. plan: three phases, see `schedule`; None: all tokens stay on the device. host: the tier
    that the plan moves tokens to; the host's memory if None.
    """

    key = "alisa"
    paper = "arXiv:2403.17312"
    relieves = "memory capacity"
    stepwise = True
    price = Price(
        quality="a step misses what nobody looked at lately; keys and values are rounded to 8 bits",
        memory="weights of the last steps: about a tenth of the prompt's length squared, a layer",
    )

    def __init__(
        self,
        sparsity: float = 0.8,
        split: float = 0.5,
        kv_bits: int | None = 8,
        group_size: int = 64,
        plan: Phases | None = None,
        host: Tier | None = None,
    ) -> None:
        for name, value, top in (("sparsity", sparsity, "below"), ("split", split, "up to")):
            real = isinstance(value, int | float | np.floating) and not isinstance(value, bool)
            if not real or not 0 <= value <= 1 or (top == "below" and value == 1):
                raise NarrowsError(f"alisa: {name} is a share from 0 {top} 1, not {value!r}")
        if kv_bits is not None and (isinstance(kv_bits, bool) or kv_bits not in BITS):
            raise NarrowsError(f"alisa: kv_bits must be 1, 2, 4 or 8, or None, not {kv_bits!r}")
        if not isinstance(group_size, int | np.integer) or isinstance(group_size, bool) \
                or group_size < 1:  # fmt: skip
            raise NarrowsError(
                f"alisa: group_size must be a whole number of tokens from 1 up, not {group_size!r}"
            )
        if plan is not None and not isinstance(plan, Phases):
            raise NarrowsError(
                f"alisa: a plan is Phases, as schedule() gives it, not {type(plan).__name__}"
            )
        self.sparsity, self.split = float(sparsity), float(split)
        self.kv_bits = None if kv_bits is None else int(kv_bits)
        self.group_size, self.plan, self.host = int(group_size), plan, host
        self.placement = "" if plan is None else repr(plan)  # so that saved caches tell plans apart
        self.needs_hidden = bool(plan is not None and plan.saved)  # pyright: ignore[reportAttributeAccessIssue]
        self._handover: Any = None
        self._recompute: Any = None

    @classmethod
    def variants(cls, case: Case) -> tuple[ALISA, ...]:
        """The default; and with a plan where the cache does not fit the device without one."""
        default = cls()
        facts, machine = case.workload.facts, case.machine
        room = machine.capacity("device")
        scalar = all(np.ndim(facts.get(n, 0)) == 0 for n in ("prompt", "generate", "batch"))
        known = room is not None and scalar and "config" in facts and facts.get("generate")
        if not known or "host" not in machine.tiers or facts.get("train"):
            return (default,)
        assert room is not None
        held = default.predict(case).workload.bytes("weight", "kv", "state")
        if float(np.max(held)) <= 0.9 * room:
            return (default,)
        try:
            return (default.planned(schedule(case, default).plan), default)
        except NarrowsError:
            return (default,)  # nothing fits; the bound says so

    @classmethod
    def ladder(cls, case: Case) -> tuple[ALISA, ...]:
        """Fewer tokens a step."""
        return tuple(cls(sparsity) for sparsity in (0.2, 0.4, 0.6, 0.8, 0.9))

    def planned(self, plan: Phases | None) -> ALISA:
        """The same with another plan."""
        return ALISA(self.sparsity, self.split, self.kv_bits, self.group_size, plan, self.host)

    @property
    def element_bits(self) -> float | None:
        """Bits of a stored element, scales included; None: as they come."""
        return None if self.kv_bits is None else self.kv_bits + SCALES_BITS / self.group_size

    def of(self, model: Any, state: Any = None) -> ALISA:
        """With what makes keys and values again, where the plan drops any."""
        if not self.needs_hidden:
            return self
        from narrows.kv._again import Recompute

        made = copy(self)
        made._recompute, made._handover = Recompute(model), None
        return made

    def store(self, config: Any, layer: int = 0) -> Store:
        """A store that attends to few tokens and moves them by the plan."""
        from narrows.kv._lately import Handover
        from narrows.kv.alisa_torch import SparseStore
        from narrows.kv.codec import Affine
        from narrows.kv.tier import Host

        if self.needs_hidden and self._recompute is None:
            raise NarrowsError(
                "alisa: to make dropped keys and values again the model's projections are needed, "
                "which a cache alone does not see; use ALISA(...).of(model), or a plan with beta=0"
            )
        if self._handover is None:
            self._handover = Handover()
        if self.host is None:
            self.host = Host()
        codec = None
        if self.kv_bits is not None:
            codec = Affine(self.kv_bits, "channel", self.group_size)
            codec.check(
                getattr(config, "head_dim", None)
                or config.hidden_size // config.num_attention_heads
            )
        return SparseStore(
            layer, self.sparsity, self.split, codec, self.plan, self.host, self._handover,
            self._recompute,
        )  # fmt: skip

    def on_prefill_chunk(self, chunk: Prompt, store: Store) -> torch.Tensor | None:
        """What the end of a chunk looked at counts like steps; nothing is dropped."""
        from narrows.kv.alisa_torch import SparseStore

        if isinstance(store, SparseStore):
            store.witness(chunk)
        return None

    def on_prefill_end(self, prompt: Prompt) -> torch.Tensor | None:
        """What the end of the prompt looked at is handed to the store; nothing is dropped."""
        tokens = prompt.keys.shape[2]
        if self._handover is not None and prompt.queries.shape[2] == tokens:
            recent = int(window(tokens + 1, self.sparsity, self.split)[1])
            self._handover.give(prompt, min(recent, tokens))
        return None

    def on_decode_step(self, layer: int, store: Store) -> None:
        """What nobody took of a prompt is let go."""
        if self._handover is not None:
            self._handover.layers.pop(layer, None)

    def predict(self, case: Case) -> Case:
        """The case with fewer tokens read a step, the cache coded, and by the plan on the host.

        Means over the decode steps; nothing is evicted, so what is held stays. Facts may be
        arrays. The same case where this is at work already.
        """
        from narrows.kv import _alisa_case

        facts = self._facts(case)
        if case.plan.policies.get("attend", ("", {}))[0] == self.key:
            return case
        work = _alisa_case.rewritten(case.workload, self, facts)
        if work is case.workload:
            return case
        parameters = {n: getattr(self, n) for n in SETTINGS}
        plan = case.plan.with_policy("attend", self.key, **parameters, placement=self.placement)
        return replace(case, workload=work, plan=plan)

    def why(self, case: Case) -> str:
        """One sentence with the tokens read and the bytes held."""
        facts = self._facts(case)
        after = self.predict(case)
        if after is case:
            return "few tokens are attended already: nothing changes"
        held = [float(np.max(c.workload.bytes("kv"))) for c in (case, after)]
        told = f"the cache shrinks from {held[0] / 1e9:.3g} to {held[1] / 1e9:.3g} GB"
        if float(np.max(facts["generate"])) < 1:
            return f"{told}; nothing is decoded, so only memory is saved"
        end = float(np.max(facts["prompt"]) + np.max(facts["generate"]))
        total, recent = window(int(end), self.sparsity, self.split)
        told = (
            f"a step reads {int(total)} of {end:.0f} tokens at the end ({int(recent)} recent, the "
            f"others lately looked at), and {told}"
        )
        return told if self.plan is None else f"{told}; {self._where(self.plan, int(end))}"

    def _where(self, plan: Phases, end: int) -> str:
        dropped, away = plan.place(end, int(window(end, self.sparsity, self.split)[1]))
        return (
            f"at the end {end - int(away)} tokens lie on the device, {int(away - dropped)} on the "
            f"host and {int(dropped)} are made again"
        )

    def _facts(self, case: Case) -> Mapping[str, Any]:
        """What is known of the load; NarrowsError where there is no cache that this can thin."""
        return cached(case, self.key, "thin")


def schedule(
    case: Case, technique: ALISA | None = None, room: float | None = None,
    ages: Sequence[float] = EVEN,
) -> Schedule:  # fmt: skip
    """The plan that takes least time for a case on its machine, of all on a grid.

    case: scalars, as it is without this technique. technique: its settings, the defaults if None.
    room: bytes of the device that the cache may take; None: what weights leave of nine tenths of
    the memory. ages: where in the past chosen tokens lie, see Costs.
    Raises NarrowsError where no plan fits, or the machine has no host.
    """
    return best(Costs.of(case, technique or ALISA(), room, ages))
