"""Techniques that store every token in codes, and how a workload sees that.

Bytes are by the mean of the tokens, some of which wait in full precision; codes cost operations.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.core.tensor import Codec, Number
from narrows.core.workload import Op, Workload
from narrows.kv._base import KVTechnique, Prompt

if TYPE_CHECKING:
    import torch

PARTS = ("prompt", "new")
"""The cache of a closed form or a trace: `kv.prompt.*` and `kv.new.*`, keys and values."""

STEPS = 512
"""Decode steps that means are taken over: evenly spaced, all of a shorter generation."""

UNPACK, RANGE, PACK = 2.0, 2.0, 4.0
"""Operations an element: mask, convert; least, largest; subtract, divide, round, shift."""

Shares = dict[tuple[str, str], Number]


def in_full(
    prompt: Number, generate: Number, kept: Callable[[np.ndarray], dict[str, np.ndarray]]
) -> Shares:
    """Shares of tokens in full precision, mean over decode steps, by (part, `key` or `value`).

    kept: recent tokens in full by what they are, given the tokens seen. Arrays over cases work.
    """
    prompt, generate = np.broadcast_arrays(np.asarray(prompt, float), np.asarray(generate, float))
    # generated tokens at each step; without any the cache is as prefill left it
    made = np.floor(np.linspace(0, 1, STEPS) * np.maximum(generate - 1, 0)[..., None])
    found: Shares = {}
    for what, full in kept(prompt[..., None] + made).items():
        counts = {"new": np.minimum(full, made), "prompt": np.maximum(full - made, 0)}
        for part, of in (("prompt", prompt), ("new", made.mean(-1))):
            tokens = counts[part].mean(-1)
            share = np.divide(tokens, of, out=np.ones_like(tokens), where=of > 0)
            found[part, what] = float(share) if share.ndim == 0 else share
    return found


def coded(work: Workload, name: str, shares: Shares, bits: Mapping[str, Number]) -> Workload:
    """The workload with its cache in codes of so many bits (scales included) by key and value.

    shares: see in_full. The same workload where the cache is coded so already.
    """
    changed: dict[str, Any] = {}
    for (part, what), share in shares.items():
        tensor = work.tensors.get(f"kv.{part}.{what}")
        if tensor is None or tensor.codec.name == name:
            continue
        full = tensor.codec.bits_per_element
        mean: Any = np.minimum(bits[what], full) * (1 - share) + full * share
        changed[tensor.name] = tensor.with_(codec=Codec(name, mean))
    if not changed:
        return work
    return work.with_tensors(changed.values()).map_ops(lambda _, op: _computing(op, changed))


def _computing(op: Op, changed: dict[str, Any]) -> tuple[Op, ...]:
    """An op with what unpacking its reads or packing its writes computes.

    Packing passes over its source twice: for the least and largest of a group, then for codes.
    A product with codes is no library's matrix product but a kernel that streams the cache, so it
    is priced as the attention kernels are, whether its neighbours are fused to it or not.
    """
    rates = {u.tensor: UNPACK for u in op.reads if u.tensor in changed}
    if rates:
        more = {name: op.per_element.get(name, 0.0) + rate for name, rate in rates.items()}
        kind = "attention_decode" if op.kind == "matmul" else op.kind
        return (replace(op, kind=kind, per_element={**op.per_element, **more}),)
    if not any(u.tensor in changed for u in op.writes):
        return (op,)
    source = op.reads[0]
    ranges = Op(
        f"{op.name}.range", "reduce", (source,), per_element={source.tensor: RANGE},
        repeat=op.repeat,
    )  # fmt: skip
    return ranges, replace(op, kind="pointwise", per_element={source.tensor: PACK})


class Coding(KVTechnique):
    """Stores all tokens of every layer that attends to them all, in fewer bits.

    settings: of the constructor, as a plan records them.
    """

    stepwise = True
    settings: ClassVar[tuple[str, ...]]

    @abstractmethod
    def _element_bits(self) -> dict[str, float]:
        """Bits of an element, scales included, by `key` and `value`."""

    @abstractmethod
    def _in_full(self, seen: np.ndarray) -> dict[str, np.ndarray]:
        """Tokens in full precision after so many were seen, by `key` and `value`."""

    @abstractmethod
    def _check(self, head_dim: int) -> None:
        """Raise NarrowsError where heads of so many channels cannot be coded."""

    def on_prefill_end(self, prompt: Prompt) -> torch.Tensor | None:
        """Nothing is dropped."""
        return None

    def predict(self, case: Case) -> Case:
        """The case with the cache coded, and what packing and unpacking compute.

        Bits of a tensor are the mean of packed and recent tokens. Facts may be arrays. The same
        case where the cache is coded so already, or in fewer bits.
        """
        facts = self._facts(case)
        # what a former step left of the prompt
        prompt = case.workload.tensors["kv.prompt.key"].extent("token")
        shares = in_full(prompt, facts["generate"], self._in_full)
        work = coded(case.workload, self.key, shares, self._element_bits())
        if work is case.workload:
            return case
        chosen = {name: getattr(self, name) for name in self.settings}
        return replace(case, workload=work, plan=case.plan.with_policy("code", self.key, **chosen))

    def why(self, case: Case) -> str:
        """One sentence with the bytes saved and what decode is spared."""
        facts = self._facts(case)
        before, after = (float(np.max(c.workload.bytes("kv"))) for c in (case, self.predict(case)))
        if after >= before:
            return "the cache is packed already, or too short to be: nothing changes"
        told = f"packs the cache from {before / 1e9:.3g} to {after / 1e9:.3g} GB"
        if float(np.max(facts["generate"])) < 1:
            return f"{told}; nothing is decoded, so only memory is saved"
        weights = float(np.max(case.workload.bytes("weight")))
        spared = (before - after) / (before + weights)
        return f"{told}, sparing each decode step {spared:.0%} of its bytes; prefill stays whole"

    def _facts(self, case: Case) -> Mapping[str, Any]:
        """What is known of the load; NarrowsError where there is no cache that this can pack."""
        facts = cached(case, self.key, "pack")
        self._check(int(facts["head_dim"]))
        return facts


def cached(case: Case, key: str, verb: str) -> Mapping[str, Any]:
    """Facts of a load with a cache that the substrate can hold.

    key: of the technique that asks. verb: what it would do with it. Raises NarrowsError where
    there is no cache, or none that this attention reads.
    """
    work = case.workload
    missing = [n for n in ("prompt", "generate", "head_dim") if n not in work.facts]
    if missing or not any(f"kv.{part}.key" in work.tensors for part in PARTS):
        raise NarrowsError(
            f"{work.name} has no key-value cache, so there is nothing for {key} to {verb}; it "
            "works on decoders that generate from a prompt"
        )
    if work.facts.get("window") and not any(
        t.name == "kv.prompt.key.local" for t in work.role("kv")
    ):
        raise NarrowsError(
            f"every layer of {work.name} has a sliding window of {work.facts['window']} tokens, "
            f"which bounds its cache already; {key} works on layers that attend to everything"
        )
    if getattr(work.facts.get("config"), "softcap", False):
        raise NarrowsError(
            f"{work.name} passes its scores through a tanh (softcap), which the attention that "
            "reads this cache does not do"
        )
    return work.facts
