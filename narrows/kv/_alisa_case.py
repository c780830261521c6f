"""A workload whose decode steps read few of the tokens that are held, some of them elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from narrows.core.tensor import Codec, Number, Tensor
from narrows.core.workload import Op, Phase, Use, Workload
from narrows.kv._coded import STEPS, Shares, coded
from narrows.kv._phases import Phases, means, window

if TYPE_CHECKING:
    from narrows.kv.alisa import ALISA

WHAT: tuple[str, ...] = ("key", "value")


def rewritten(work: Workload, technique: ALISA, facts: Mapping[str, Any]) -> Workload:
    """The workload under ALISA; the same where it changes nothing."""
    prompt = work.tensors["kv.prompt.key"].extent("token")  # what a former step left of it
    generate = facts["generate"]
    sparsity, split, group = technique.sparsity, technique.split, technique.group_size
    read = means(prompt, generate, sparsity, split, STEPS)
    if sparsity:
        work = _fewer(work, read)
        work = _chosen(work, facts, prompt, read)
    if technique.element_bits is not None:
        seen = np.asarray(prompt, float) + np.asarray(generate, float) / 2
        full = np.minimum(np.asarray(group / 2), seen) / np.maximum(seen, 1)
        shares: Shares = {(part, what): full for part in ("prompt", "new") for what in WHAT}
        bits = dict.fromkeys(WHAT, technique.element_bits)
        work = coded(work, technique.key, shares, bits)  # the rest of a group waits in full
    if technique.plan is not None and float(np.max(generate)) >= 1:
        work = _placed(work, technique, technique.plan)
    return work


def _fewer(work: Workload, read: Mapping[str, Number]) -> Workload:
    """Decode that reads the mean number of tokens; scores and what follows them shrink too."""
    found = {t.name: t for t in work.tensors.values() if "key" in t.axes and t.role == "activation"}
    names = {f"kv.{part}.{what}": part for part in ("prompt", "new") for what in WHAT}
    touched: set[str] = set()

    def change(phase: Phase, op: Op) -> tuple[Op, ...]:
        reads = {u.tensor for u in op.reads}
        if phase.name != "decode" or not reads & (touched | names.keys()):
            return (op,)
        touched.update({u.tensor for u in op.writes} & found.keys())
        uses = tuple(
            replace(u, at={**u.at, "token": np.minimum(u.at["token"], read[names[u.tensor]])})
            if u.tensor in names and "token" in u.at else u
            for u in op.reads
        )  # fmt: skip
        old = op.shape.get("kv")
        if old is None:
            return (replace(op, reads=uses),)
        new = np.minimum(old, read["total"])
        shape = {n: new if np.array_equal(x, old) and n in ("n", "k", "kv") else x
                 for n, x in op.shape.items()}  # fmt: skip
        # a case of no decode steps has no keys to scale by
        share = np.divide(new, old, out=np.ones_like(np.asarray(new, float)),
                          where=np.asarray(old) > 0)  # fmt: skip
        return (replace(op, reads=uses, shape=shape, flops=op.flops * share),)

    work = work.map_ops(change)
    return work.with_tensors(found[n].keep(key=read["total"]) for n in touched)


def _chosen(
    work: Workload, facts: Mapping[str, Any], prompt: Number, read: Mapping[str, Number]
) -> Workload:
    """What the choice holds and runs: sums of the last steps' weights, and the best of them."""
    cache = work.tensors["kv.prompt.key"]
    layers, batch = cache.extent("layer"), cache.extent("batch")
    heads = facts["heads"] / facts.get("devices", 1)
    kv_heads, size = cache.extent("head"), facts["head_dim"]
    seen = prompt + np.asarray(facts["generate"], float)
    int32, fp32 = Codec.of("int32"), Codec.of("fp32")
    axes: dict[str, Number] = {"layer": layers, "batch": batch}
    # slot and weight of each token that a step attended; sums are twice as wide
    steps = Tensor(
        "alisa.history", "state",
        {**axes, "step": read["recent"], "token": read["total"], "part": 2}, int32,
    )  # fmt: skip
    sums = Tensor("alisa.sums", "state", {**axes, "token": seen}, Codec.of("int64"))
    slots = Tensor("alisa.slots", "activation", {"batch": batch, "token": read["total"]},
                   Codec.of("int64"))  # fmt: skip
    rows = Tensor(
        "alisa.rows", "activation", {"head": heads, "query": read["recent"], "token": prompt}, fp32
    )
    weights = replace(rows, name="alisa.weights")
    made = [steps, sums, slots, rows, weights]
    one = {"layer": 1}
    each: Number = layers
    decode = (
        # one step joins, one leaves
        Op("alisa.sum", "pointwise", (Use(steps.name, {**one, "step": 2}),),
           (Use(sums.name, {**one, "token": 2 * read["total"]}),),
           per_element={steps.name: 1.0}, repeat=each),
        Op("alisa.top", "reduce", (Use(sums.name, one),), (Use(slots.name),),
           per_element={sums.name: 1.0}, repeat=each),
    )  # fmt: skip
    fresh = next(
        (op.reads[0].tensor for p in work.phases if p.name == "prefill" for op in p.ops
         if any(u.tensor == "kv.prompt.key" for u in op.writes)), None,
    )  # fmt: skip
    shape = {"m": read["recent"] * heads / kv_heads, "n": prompt, "k": size, "batch": kv_heads}
    active = np.asarray(np.asarray(facts["generate"], float) > 0, float)
    many: Number = layers * batch * active  # of one prompt at a time
    prefill = () if fresh is None else (
        Op("alisa.scores", "matmul", (Use(fresh, {"batch": 1}),), (Use(rows.name),),
           2.0 * heads * read["recent"] * prompt * size,
           precision=facts.get("dtype", "fp32"), repeat=many, shape=shape),
        Op("alisa.softmax", "softmax", (Use(rows.name),), (Use(weights.name),),
           per_element={rows.name: 5.0}, repeat=many),
        Op("alisa.mean", "reduce", (Use(weights.name),),
           (Use(steps.name, {**one, "batch": 1}),), per_element={weights.name: 1.0}, repeat=many),
    )  # fmt: skip

    def change(phase: Phase, op: Op) -> tuple[Op, ...]:
        written = {u.tensor for u in op.writes}
        if phase.name == "prefill" and "kv.prompt.key" in written:
            return (*prefill, op)
        if phase.name == "decode" and "kv.new.key" in written:
            return (op, *decode)
        return (op,)

    return work.with_tensors(made).map_ops(change)


def _placed(work: Workload, technique: ALISA, plan: Phases) -> Workload:
    """The cache split by tiers: device, host, and what is made again.

    Held is what the last step finds; what is fetched and made again are means over the steps.
    """
    prompt = float(np.max(work.tensors["kv.prompt.key"].extent("token")))
    made = np.floor(np.linspace(0, 1, STEPS) * max(plan.generate - 1, 0))
    seen = prompt + made
    total, recent = window(seen + 1, technique.sparsity, technique.split)
    # a plan counts from its own prompt: a case of another length is placed by its own
    own = replace(plan, prompt=int(prompt))
    dropped, away = own.place(seen, recent)
    older = np.maximum(seen + 1 - recent, 1)
    lost, far = float(dropped[-1]), float((away - dropped)[-1])
    fetched = float(((total - recent) * (away - dropped) / older).mean())
    again = float(((total - recent) * dropped / older).mean())
    if not lost + far:
        return work
    tensors: list[Tensor] = []
    fetches: list[Op] = []
    for what in WHAT:
        held = work.tensors[f"kv.prompt.{what}"]
        own_tokens = float(np.max(held.extent("token")))
        left = max(own_tokens - lost - far, 0.0)
        tensors.append(held.keep(token=left))
        axes = {**held.axes, "token": far, "head": held.extent("head")}
        name = f"kv.prompt.{what}.host"
        tensors.append(Tensor(name, "kv", axes, held.codec, {}, "host"))
        near = Tensor(f"alisa.fetched.{what}", "activation",
                      {**axes, "layer": 1, "token": fetched}, held.codec)  # fmt: skip
        tensors.append(near)
        fetches.append(Op(f"alisa.fetch {what}", "gather",
                          (Use(name, {"layer": 1, "token": fetched}),), (Use(near.name),),
                          repeat=held.extent("layer")))  # fmt: skip
    facts, keys = work.facts, work.tensors["kv.prompt.key"]
    full = Codec.of(facts.get("kv_dtype", "fp16"))
    layers, batch = keys.extent("layer"), keys.extent("batch")
    if lost:
        width = float(facts["hidden"])
        channels = 2.0 * float(np.max(keys.extent("head"))) * float(facts["head_dim"])
        states = Tensor(
            "alisa.states", "state",
            {"layer": layers, "batch": batch, "token": lost, "channel": width}, full,
        )  # fmt: skip
        remade = Tensor("alisa.remade", "activation",
                        {"batch": batch, "token": again, "channel": channels}, full)  # fmt: skip
        tensors += [states, remade]
        fetches.append(Op(
            "alisa.recompute", "matmul", (Use(states.name, {"layer": 1, "token": again}),),
            (Use(remade.name),), 2.0 * batch * again * width * channels,
            precision=facts.get("dtype", "fp16"), repeat=layers,
            shape={"m": batch * again, "n": channels, "k": width},
        ))  # fmt: skip

    def change(phase: Phase, op: Op) -> tuple[Op, ...]:
        if phase.name == "decode" and any(u.tensor == "kv.new.key" for u in op.writes):
            return (op, *fetches)
        return (op,)

    return work.with_tensors(tensors).map_ops(change)
