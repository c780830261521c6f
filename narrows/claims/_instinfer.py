"""What the claims of InstInfer share: SparQ written out, drives at hand, the paper's machines."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from narrows.claims._snapkv import reference, unseen
from narrows.core.case import Case
from narrows.core.machine import Machine
from narrows.core.plan import Plan
from narrows.core.resource import Link
from narrows.kv._base import Policy, Prompt
from narrows.kv.instinfer import InstInfer
from narrows.machines.load import load
from narrows.trace.llm import llm

SIZE = 64
"""Channels of the heads in the exact checks."""


def sparq(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float, r: int, k: int
) -> np.ndarray:
    """SparQ of the queries that share a KV head, written out one number at a time, float64.

    queries: (group, d), keys, values: (tokens, d).
    """
    tokens, size = keys.shape
    together = [sum(abs(float(q[c])) for q in queries) for c in range(size)]
    chosen = sorted(range(size), key=lambda c: -together[c])[:r]
    weights: list[list[float]] = []
    for q in queries:
        of = sum(abs(float(q[c])) for c in chosen) / sum(abs(float(x)) for x in q)
        scores = [
            sum(float(q[c]) * float(keys[t, c]) for c in chosen) * scale / of**0.5
            for t in range(tokens)
        ]
        weights.append(_softmax(scores))
    best = sorted(range(tokens), key=lambda t: -sum(w[t] for w in weights))[:k]
    out = np.zeros((len(queries), values.shape[1]))
    for i, q in enumerate(queries):
        exact = _softmax([float(np.dot(q.astype(float), keys[t])) * scale for t in best])
        share = sum(weights[i][t] for t in best)
        for c in range(values.shape[1]):
            attended = sum(w * float(values[t, c]) for w, t in zip(exact, best, strict=True))
            mean = sum(float(values[t, c]) for t in range(tokens)) / tokens
            out[i, c] = share * attended + (1 - share) * mean
    return out


def _softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    made = [float(np.exp(s - top)) for s in scores]
    return [m / sum(made) for m in made]


def stream_of(keys: np.ndarray, values: np.ndarray, page: int, begun: int, strip: int = 2) -> Any:
    """A head's tokens in a flash of its own: `begun` at once, the others one by one."""
    from narrows.kv.instinfer_engine import Stream
    from narrows.kv.instinfer_flash import Flash

    flash = Flash(tempfile.gettempdir(), page)
    made = Stream(flash, keys.shape[1], values.shape[1], keys.dtype, strip)
    flash.reserve(made.pages(len(keys)))
    made.append(keys[:begun], values[:begun])
    for t in range(begun, len(keys)):
        made.append(keys[t : t + 1], values[t : t + 1])
    return made


def tensors(heads: int, kv_heads: int, tokens: int, rows: int = 1, new: int = 1) -> Any:
    """Queries, keys and values of order 1, fp32: (rows, heads, new | tokens, SIZE)."""
    import torch

    rng = torch.Generator().manual_seed(0)
    shapes = [(heads, new), (kv_heads, tokens), (kv_heads, tokens)]
    return [torch.randn(rows, *shape, SIZE, generator=rng) for shape in shapes]


def attended(queries: Any, keys: Any, values: Any, mask: Any, scale: float = SIZE**-0.5) -> Any:
    """Attention of the last tokens over all, float64; mask: (rows, 1, new, tokens) bool."""
    import torch

    group = queries.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    scores = queries.double() @ keys.transpose(2, 3) * scale
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values


def beside_attended(technique: InstInfer) -> float:
    """Largest difference of a store's answers to attention over all, one row padded."""
    import torch

    rows, tokens, new, padded = 2, 700, 3, 250
    queries, keys, values = tensors(8, 2, tokens, rows, new)
    valid = torch.arange(tokens) >= torch.tensor([[0], [padded]])
    mask = valid[:, None, None] & (
        torch.arange(tokens) <= torch.arange(tokens - new, tokens)[:, None]
    )
    store = technique.store(Heads())
    store.fill(keys[:, :, :-new], values[:, :, :-new], None, valid[:, :-new])
    store.append(keys[:, :, -new:], values[:, :, -new:])
    found = store.attend(queries, mask, None)
    for drive in technique.running():
        drive.close()
    return float((found - attended(queries, keys, values, mask)).abs().max())


class Heads:
    """The part of a model's configuration that a store asks for."""

    head_dim = SIZE


# --- quality of the reference model --------------------------------------------------------------


@cache
def recalled() -> Mapping[str, Any]:
    """Shares of right answers of 16 pairs at 2,048 tokens, by candidate; drives ended after."""
    from narrows.kv import quality
    from narrows.kv.baselines import RandomEviction, WindowOnly

    ours = {"tokens": InstInfer(direct=False), "pages": InstInfer(pages=True, direct=False)}
    some = {"dense": None, **ours, "random eighth": RandomEviction(256),
            "window of an eighth": WindowOnly(256)}  # fmt: skip
    model, tokenizer = reference()
    told = quality.asked(model, tokenizer, some, unseen(), 16, 2048, 16, 2, seed=5, seen=True)
    for technique in ours.values():
        for drive in technique.running():
            drive.close()
    return told


@cache
def perplexities() -> Mapping[str, float]:
    """Perplexity of 16 tokens read one by one after 2,048, 16 windows."""
    from narrows.kv import quality

    some = {f"1/{c:g}": InstInfer(c, direct=False) for c in (8, 4, 2)}
    told = quality.perplexity(
        reference()[0], {"dense": None, **some}, unseen(), scored=16, windows=16
    )
    for technique in some.values():
        for drive in technique.running():
            drive.close()
    return told


class Touched(Policy):
    """Reads a prompt and notes which share of pages and strips SparF would touch."""

    def __init__(self, compression: int, per: int, strip: int) -> None:
        self.compression, self.per, self.strip = compression, per, strip
        self.pages: list[float] = []
        self.strips: list[float] = []

    def on_prefill_end(self, prompt: Prompt) -> None:
        """For queries in the second half, as if each were the next token."""
        import torch

        rows, kv_heads, tokens, size = prompt.keys.shape
        for at in range(tokens // 2, tokens, tokens // 16):
            asked = prompt.queries[:, :, at].reshape(rows, kv_heads, -1, size)
            keys = prompt.keys[:, :, : at + 1]
            chosen = asked.abs().sum(2).topk(size // self.compression, -1).indices
            part = torch.zeros(rows, kv_heads, size).scatter(-1, chosen, 1.0)[:, :, None]
            sizes = (asked * part).abs().sum(-1, keepdim=True) / asked.abs().sum(-1, keepdim=True)
            scores = (asked * part) @ keys.transpose(2, 3) * prompt.scaling / sizes.sqrt()
            best = scores.softmax(-1).sum(2).topk((at + 1) // self.compression, -1).indices
            for index, per, count, found in (
                (best, self.per, -(-(at + 1) // self.per), self.pages),
                (chosen, self.strip, size // self.strip, self.strips),
            ):
                hit = torch.zeros(rows, kv_heads, count).scatter(-1, index // per, 1.0)
                found.append(float(hit.mean()))


@cache
def touched() -> dict[str, float]:
    """Share of pages of 16 tokens and strips of 2 channels that an eighth touches: recall-lm."""
    import torch

    from narrows.kv.adapter import KVCache
    from narrows.kv.reading import reading

    model = reference()[0]
    policy = Touched(8, 16, 2)
    # text that CLUSTERED was not read from
    ids = torch.from_numpy(unseen()[200_000 : 200_000 + 4 * 2048].reshape(4, 2048))
    with reading(model):
        cache_ = KVCache(model.config, policy)
        model(ids, past_key_values=cache_, use_cache=True, logits_to_keep=1)
    return {"pages": float(np.mean(policy.pages)), "strips": float(np.mean(policy.strips))}


# --- the paper's machines ------------------------------------------------------------------------


def a6000() -> Machine:
    """RTX A6000: the A40's chip (GA102, 84 multiprocessors) with faster memory and clock.

    NVIDIA's data sheet: 768 GB/s, 154.8 TFLOPS of fp16 tensor cores (dense), 48 GB. What was
    calibrated is the A40's.
    """
    machine = load("a40")
    changed = {"gddr": 768e9, "compute.fp16": 154.8e12, "compute.bf16": 154.8e12,
               "compute.fp32": 38.7e12}  # fmt: skip
    resources = {
        n: replace(r, capacity=changed[n]) if n in changed else r
        for n, r in machine.resources.items()
    }
    return replace(machine, name="a6000", title="NVIDIA RTX A6000 48 GB", resources=resources)


SSD = 3.3e9
"""Bytes a second of a drive's path to the GPU: PCIe 3 x4 after its protocol, as CSD.link."""


def case(batch: int, machine: Machine | None = None, prompt: int = 1024) -> Case:
    """OPT-13B in fp16, 1,024 tokens read and 1,024 written."""
    work = llm("opt-13b", prompt, 1024, batch, "fp16")
    return Case(work, machine or a6000(), Plan(("flash", "compiled")))


def flexgen(batch: int) -> Case:
    """FlexGen with its cache in drives: all of it is read over their link at every step."""
    dense = case(batch)
    machine = replace(
        dense.machine,
        links={**dense.machine.links, "ssd": Link("ssd", SSD, source="PCIe 3 x4")},
        tiers={**dense.machine.tiers, "ssd": "ssd"},
    )
    cached = [t.with_(tier="ssd") for t in dense.workload.role("kv")]
    return replace(dense, workload=dense.workload.with_tensors(cached), machine=machine)


def seconds(some: Case) -> float:
    """Of prefill and decode together."""
    return sum(p.seconds for p in some.bound().phases)
