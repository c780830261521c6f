"""A prefill that an auxiliary model reads, as a workload sees it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from narrows.core.tensor import Codec, Number, Tensor
from narrows.core.workload import Op, Phase, Use, Workload
from narrows.trace.config import TransformerConfig
from narrows.trace.llm import llm

AUXILIARY, LAST = "auxiliary.", "last."
"""What names of the auxiliary's tensors begin with, and of the last token's run of the model."""

ONCE = ("embed", "rotary", "positions", "project_in")
"""Ops that run once, whatever number of blocks follow."""

AFTER = ("final_norm", "lm_head", "logits", "softcap", "project_out")
"""Ops behind the last block, which the auxiliary never runs."""

CACHED = ("attention_norm", "k", "v", "qkv")
"""Ops of a block that keys and values need: all that is run of the auxiliary's last one."""


def small(config: TransformerConfig, layers: float, width: float) -> TransformerConfig:
    """The auxiliary's shape: shares of the model's layers and width, heads as wide."""

    def part(count: int, share: float) -> int:
        return max(1, round(count * share))

    heads, kv_heads = part(config.heads, width), part(config.kv_heads, width)
    kv_heads = max(k for k in range(1, kv_heads + 1) if heads % k == 0)
    return replace(
        config, name=f"{config.name}-auxiliary", layers=part(config.layers, layers),
        hidden=part(config.hidden, width), ffn=part(config.ffn, width), heads=heads,
        kv_heads=kv_heads,
    )  # fmt: skip


def reading(work: Workload, layers: float, width: float) -> list[tuple[Op, dict[str, Tensor]]]:
    """The auxiliary's ops over all of a prompt but its last token, and their tensors."""
    facts = work.facts
    shape = small(facts["config"], layers, width)
    made = llm(
        shape, _before(work), 0, facts["batch"], facts["dtype"], facts["kv_dtype"],
        int(facts["devices"]),
    )  # fmt: skip
    found: list[tuple[Op, dict[str, Tensor]]] = []
    for op in made.phase("prefill").ops:
        name = op.name.split(".")[0]
        if name in AFTER or op.name.startswith("kv.write"):
            continue  # what is cached goes to the maps as it is
        once = name in ONCE
        times = op.repeat if once or name in CACHED else shape.layers - 1
        if times:
            found.append(_renamed(replace(op, repeat=times), made, AUXILIARY, keep=()))
    return found


def predicting(work: Workload, layers: float, width: float) -> list[tuple[Op, dict[str, Tensor]]]:
    """The maps of every layer, positions of the predicted keys, and the cache written."""
    facts, tokens = work.facts, _before(work)
    config: TransformerConfig = facts["config"]
    shape = small(config, layers, width)
    tp, rows = int(facts["devices"]), facts["batch"] * tokens
    found: list[tuple[Op, dict[str, Tensor]]] = []
    for what, letter in (("key", "k"), ("value", "v")):
        cached = work.tensors[f"kv.prompt.{what}"]
        sizes = {n: cached.axes[n] for n in ("head", "channel")}
        out: Number = sizes["head"] * sizes["channel"]
        into = max(shape.kv_heads / tp, 1.0) * shape.head_dim
        source = Tensor(
            f"{AUXILIARY}prefill.{letter}", "activation",
            {"batch": facts["batch"], "token": tokens, "head": into / shape.head_dim,
             "channel": shape.head_dim}, Codec.of(_wide(facts["dtype"])),
        )  # fmt: skip
        weight = Tensor(
            f"predictor.{what}",
            "weight",
            {"layer": config.layers, "out": out, "in": into},
            Codec.of(facts["dtype"]),
        )
        axes: dict[str, Number] = {"layer": config.layers, "out": out}
        bias = Tensor(f"predictor.{what}.bias", "weight", axes, Codec.of(facts["dtype"]))
        told = replace(source, name=f"prefill.predicted.{what}", axes={**source.axes, **sizes})
        one = {"layer": 1.0}
        product = Op(
            f"predict {what}", "matmul",
            (Use(source.name), Use(weight.name, one), Use(bias.name, one)), (Use(told.name),),
            per_element={weight.name: 2.0 * rows}, precision=facts["dtype"],
            repeat=config.layers, shape={"m": rows, "n": out, "k": into},
        )  # fmt: skip
        found.append((product, {t.name: t for t in (source, weight, bias, told)}))
        if what == "key" and config.positions == "rotary":
            turned = replace(told, name="prefill.predicted.turned")
            turn = Op(
                "predicted.rope", "rope", (Use(told.name),), (Use(turned.name),),
                per_element={told.name: 4.0}, repeat=config.layers,
            )  # fmt: skip
            found.append((turn, {turned.name: turned}))
            told = turned
        write = Op(
            f"kv.write {what}", "copy", (Use(told.name),),
            (Use(cached.name, {"layer": 1.0, "token": tokens}),), repeat=config.layers,
        )  # fmt: skip
        found.append((write, {}))
    return found


def finishing(work: Workload) -> list[tuple[Op, dict[str, Tensor]]]:
    """The model's run of the last prompt token, over the cache that was predicted."""
    facts = work.facts
    made = llm(
        facts["config"], _before(work), 1, facts["batch"], facts["dtype"], facts["kv_dtype"],
        int(facts["devices"]),
    )  # fmt: skip
    weights = tuple(t.name for t in made.role("weight"))
    prompt = tuple(t.name for t in work.role("kv") if t.name.startswith("kv.prompt."))
    return [
        _renamed(op, made, LAST, (*weights, *prompt), {"kv.new.": "kv.prompt."})
        for op in made.phase("decode").ops
    ]


def predicted(work: Workload, layers: float, width: float) -> Workload:
    """The workload with its prefill read by the auxiliary, predicted and finished."""
    parts = [
        *reading(work, layers, width), *predicting(work, layers, width), *finishing(work)
    ]  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for _, new in parts:
        tensors |= {name: t for name, t in new.items() if name not in work.tensors}
    prefill = Phase("prefill", tuple(op for op, _ in parts))
    used = {u.tensor for op in prefill.ops for u in (*op.reads, *op.writes)}
    kept = {
        name: t
        for name, t in work.tensors.items()
        if name in used or not name.startswith("prefill.")
    }
    phases = tuple(prefill if p.name == "prefill" else p for p in work.phases)
    return replace(work, tensors={**kept, **tensors}, phases=phases)


def _before(work: Workload) -> Number:
    """Tokens before the last one of a prompt."""
    tokens: Any = np.maximum(np.asarray(work.facts["prompt"], float) - 1, 1)
    return float(tokens) if tokens.ndim == 0 else tokens


def _wide(dtype: str) -> str:
    return dtype if dtype in ("fp32", "bf16", "fp16") else "bf16"


def _renamed(
    op: Op, work: Workload, start: str, keep: tuple[str, ...],
    instead: dict[str, str] | None = None,
) -> tuple[Op, dict[str, Tensor]]:  # fmt: skip
    """An op of another workload with names of its own, but those to keep; and its tensors."""
    names: dict[str, str] = {}
    for use in (*op.reads, *op.writes):
        name = use.tensor
        for old, new in (instead or {}).items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        names[use.tensor] = name if name in keep else start + name
    made = replace(
        op, name=start + op.name,
        reads=tuple(replace(u, tensor=names[u.tensor]) for u in op.reads),
        writes=tuple(replace(u, tensor=names[u.tensor]) for u in op.writes),
        per_element={names[n]: rate for n, rate in op.per_element.items() if n in names},
        group=op.group + start if op.group else "",
    )  # fmt: skip
    fresh = {
        new: replace(work.tensors[old], name=new)
        for old, new in names.items()
        if new.startswith(start)
    }
    return made, fresh
