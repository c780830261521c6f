"""Prefill and decode of a causal language model of `transformers`, traced (needs torch)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from narrows.core.errors import NarrowsError
from narrows.core.tensor import Number, Tensor
from narrows.core.workload import Op, Phase, Use, Workload
from narrows.trace.aten import codec
from narrows.trace.config import TransformerConfig, load_fields, published
from narrows.trace.layers import Span
from narrows.trace.module import causal_modules, prepare, run, workload_of
from narrows.trace.recorder import Recorder

DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64,
}  # fmt: skip

CACHES = ("static", "dynamic")
"""`static`: written in place, fresh keys are attended directly. `dynamic`: transformers' default,
which copies the whole cache at every step to append one token."""


def meta_model(
    source: str | Path | Mapping[str, Any] | PreTrainedConfig,
    dtype: str = "bf16",
    attention: str = "",
) -> torch.nn.Module:
    """A causal language model without weights, from a configuration.

    source: a catalogue name, a config.json or its folder, its fields, or a configuration of
    transformers. attention: `sdpa` or `eager`; empty for sdpa, except eager where scores are
    capped, which sdpa cannot do.
    Raises NarrowsError on what is not a configuration of transformers, or an unknown dtype.
    """
    if dtype not in DTYPES:
        raise NarrowsError(f"dtype {dtype!r} cannot be traced; choose {', '.join(DTYPES)}")
    if isinstance(source, PreTrainedConfig):
        config = source
    else:
        if isinstance(source, Mapping):
            fields = dict(source)
        elif isinstance(source, str) and not Path(source).exists():
            fields = dict(published(source))
        else:
            fields = dict(load_fields(Path(source)))
        fields.pop("source", None)
        kind = fields.pop("model_type", None)
        try:
            config = AutoConfig.for_model(kind, **fields)
        except (ValueError, TypeError, KeyError) as error:
            raise NarrowsError(f"transformers has no model of these fields: {error}") from None
    capped = getattr(config, "attn_logit_softcapping", None)
    chosen = attention or ("eager" if capped else "sdpa")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[dtype], attn_implementation=chosen
        ).eval()


def trace_generation(
    source: Any,
    prompt: int,
    generate: int,
    batch: int = 1,
    dtype: str = "bf16",
    attention: str = "",
    cache: str = "static",
    folded: bool = True,
) -> Workload:
    """Prefill and decode of a causal language model, op by op as eager transformers run them.

    source: a model (its own weights and format are kept), or what meta_model takes. cache: see
    CACHES. Decode is traced at the mean context of its steps; reads of the cache are then set
    to the exact mean, so totals over all steps are exact for flops and cache bytes. Logits of
    the last position only. Picking the next token is not part of it.
    Cached keys and values are the tensors `kv.prompt.*` and `kv.new.*` of the closed form, so
    techniques rewrite traced and closed workloads alike.
    Raises NarrowsError on a cache or dtype that is not known, on lengths below zero, and where
    the model's code looks at the values of tensors.
    """
    if cache not in CACHES:
        raise NarrowsError(f"cache {cache!r} is not known; choose {' or '.join(CACHES)}")
    if prompt < 0 or generate < 0 or batch < 1 or prompt + generate < 1:
        raise NarrowsError("prompt and generate must be 0 or more, not both 0, and batch 1 or more")
    model = source if isinstance(source, torch.nn.Module) else meta_model(source, dtype, attention)
    recorder = Recorder()
    store = _Store(recorder, model.config, prompt, generate, batch)
    phases: list[Phase] = []
    with ExitStack() as stack:
        call = prepare(recorder, model, False, stack)
        if prompt:
            ops = _pass(recorder, call, model, "prefill", prompt, batch, store.cache(cache, 0))
            phases.append(Phase("prefill", tuple(map(store.named, ops))))
        if generate:
            before = prompt + (generate + 1) // 2 - 1
            ops = _pass(recorder, call, model, "decode", 1, batch, store.cache(cache, before))
            phases.append(Phase("decode", tuple(map(store.named, ops)), steps=float(generate)))
    tensors = {n: t for n, t in recorder.tensors().items() if n not in store.storages}
    config: Any = model.config
    name = source if isinstance(source, str) and not Path(source).exists() else (
        str(getattr(config, "_name_or_path", "") or config.model_type))  # fmt: skip
    windows = {f"{p.name}.{path}": window for p in phases
               for path, window in causal_modules(model, store.windows).items()}  # fmt: skip
    facts = {**_facts(model, prompt, generate, batch), "cache": cache}
    return workload_of(name, {**tensors, **store.tensors}, tuple(phases), facts, folded, windows)


def _pass(
    recorder: Recorder, call: Callable[..., Any], model: torch.nn.Module, stage: str, tokens: int,
    batch: int, cache: Cache,
) -> list[Op]:  # fmt: skip
    """The ops of one call of the model over `tokens` tokens with a cache."""
    recorder.ops, recorder.stage = [], stage
    ids = torch.empty((batch, tokens), dtype=torch.long, device="meta")
    recorder.know(ids, f"{stage}.input_ids", "input")
    given: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
    accepted = inspect.signature(model.forward).parameters
    if "logits_to_keep" in accepted:
        given["logits_to_keep"] = 1
    run(recorder, call, (), given, training=False)
    return recorder.ops


def _facts(model: Any, prompt: int, generate: int, batch: int) -> dict[str, Any]:
    """What techniques ask of a workload; the closed form's where the family is known."""
    fields = model.config.to_dict()
    known: dict[str, Any] = {"prompt": float(prompt), "generate": float(generate),
                             "batch": float(batch)}  # fmt: skip
    try:
        config = TransformerConfig.from_json(fields, fields.get("model_type", ""))
    except NarrowsError:
        return known
    return {
        **known, "config": config, "layers": config.layers, "heads": config.heads,
        "kv_heads": config.kv_heads, "head_dim": config.head_dim, "hidden": config.hidden,
        "window": config.window, "vocab": config.vocab,
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Part:
    """One storage of cached keys or values: whose it is, and what of it a pass touches.

    slot: a write reaches the token that is new only, not all of the storage. past: it holds the
    tokens before the new one, not the new one itself.
    """

    prompt: str
    new: str
    decoding: bool
    tokens: int
    window: int
    slot: bool
    past: bool


class _Store:
    """Gives the model caches that say what they are, and names them as the closed form does."""

    def __init__(
        self, recorder: Recorder, config: Any, prompt: int, generate: int, batch: int
    ) -> None:
        self.recorder = recorder
        self.prompt, self.generate, self.batch = prompt, generate, batch
        made = DynamicCache(config=config).layers
        count = getattr(config, "num_hidden_layers", None) or getattr(config, "n_layer", 0)
        self.windows = [int(getattr(layer, "sliding_window", 0) or 0) for layer in made]
        self.windows += [0] * (count - len(self.windows))
        self.span = Span.decode(float(prompt), float(generate), float(batch))
        self.storages: dict[str, _Part] = {}
        self.tensors: dict[str, Tensor] = {}
        self._layers: dict[str, set[int]] = {}

    def cache(self, kind: str, before: int) -> Cache:
        """A cache that holds `before` tokens already; 0 before the prefill."""
        decoding = before > 0 or not self.prompt
        make = _InPlace if kind == "static" else _Growing
        return Cache(layers=[make(self, i, before, decoding) for i in range(len(self.windows))])

    def know(
        self, layer: int, what: str, tensor: torch.Tensor, decoding: bool, slot: bool = False,
        past: bool = False,
    ) -> None:  # fmt: skip
        """Register a storage of keys or values that a layer of the cache made."""
        heads, tokens, dim = tensor.shape[1], tensor.shape[2], tensor.shape[3]
        window = self.windows[layer]
        end = ".local" if window and len(set(self.windows)) > 1 else ""
        names = [f"kv.{part}.{what}{end}" for part in ("prompt", "new")]
        held = self.recorder.know(
            tensor, f"cache.{layer}.{what}", "kv", ("batch", "head", "token", "channel")
        )
        held.role, held.axes = "kv", ("batch", "head", "token", "channel")
        self.storages[held.name] = _Part(names[0], names[1], decoding, tokens, window, slot, past)
        for name, count in zip(names, (self.prompt, self.generate), strict=True):
            layers = self._layers.setdefault(name, set())
            layers.add(layer)
            axes: dict[str, Number] = {
                "layer": float(len(layers)), "batch": float(self.batch), "head": float(heads),
                "token": float(min(count, window) if window else count), "channel": float(dim),
            }  # fmt: skip
            known = self.tensors.get(name)
            if known is not None and (known.axes["head"], known.axes["channel"]) != (heads, dim):
                raise NarrowsError("layers with keys of different width are not covered")
            self.tensors[name] = Tensor(name, "kv", axes, codec(tensor.dtype))

    def named(self, op: Op) -> Op:
        """An op whose uses of cache storages are uses of the prompt's and the new tokens."""
        if not any(u.tensor in self.storages for u in (*op.reads, *op.writes)):
            return op
        rates: dict[str, Number] = {}
        for tensor, rate in op.per_element.items():
            part = self.storages.get(tensor)
            rates.update({tensor: rate} if part is None else {part.prompt: rate, part.new: rate})
        return replace(
            op, reads=self._split(op.reads, False), writes=self._split(op.writes, True),
            per_element=rates,
        )  # fmt: skip

    def _split(self, uses: Sequence[Use], written: bool) -> tuple[Use, ...]:
        made: list[Use] = []
        for use in uses:
            part = self.storages.get(use.tensor)
            if part is None:
                made.append(use)
            elif not part.decoding:
                tokens = use.at.get("token", float(part.tokens))
                made.append(Use(part.prompt, {"layer": 1.0, "token": tokens}))
            elif written and part.slot:
                made.append(Use(part.new, {"layer": 1.0, "token": 1.0}))
            else:
                old, new = self.span.old_keys(part.window), self.span.new_keys(part.window)
                if self.prompt:
                    made.append(Use(part.prompt, {"layer": 1.0, "token": old}))
                made.append(Use(part.new, {"layer": 1.0, "token": new - part.past}))
        return tuple(made)


class _Layer(DynamicLayer):
    """What both caches share: one layer that holds `before` tokens when the pass starts."""

    is_croppable = False

    def __init__(self, store: _Store, layer: int, before: int, decoding: bool) -> None:
        super().__init__()
        self.store, self.layer, self.before, self.decoding = store, layer, before, decoding
        self.window = store.windows[layer]
        self.is_sliding = bool(self.window)

    def held(self) -> int:
        """Tokens of the past that the layer still keeps."""
        return min(self.before, self.window - 1) if self.window else self.before

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        length = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.held() + length, self.before - self.held()

    def get_seq_length(self) -> int:
        return self.before

    def storage(self, fresh: torch.Tensor, tokens: int, what: str, past: bool) -> torch.Tensor:
        """A storage of so many tokens, like the fresh keys or values, known to the store."""
        made = fresh.new_empty((*fresh.shape[:2], tokens, fresh.shape[3]))
        self.store.know(self.layer, what, made, self.decoding, not past, past)
        return made


class _InPlace(_Layer):
    """New tokens are written into a buffer; a prefill attends to its own keys directly."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        made: list[torch.Tensor] = []
        count = key_states.shape[-2]
        for what, fresh in (("key", key_states), ("value", value_states)):
            keep = min(count, self.window) if self.window else count
            buffer = self.storage(fresh, self.held() + keep, what, past=False)
            buffer[:, :, self.held() :].copy_(fresh[:, :, count - keep :])
            made.append(buffer if self.decoding else fresh)
        self.keys, self.values = made
        return made[0], made[1]


class _Growing(_Layer):
    """Past and new tokens are concatenated into a new storage at every step."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        made: list[torch.Tensor] = []
        for what, fresh in (("key", key_states), ("value", value_states)):
            parts = [fresh]
            if self.held():
                parts = [self.storage(fresh, self.held(), what, past=True), fresh]
            joined = torch.cat(parts, dim=-2)
            self.store.know(self.layer, what, joined, self.decoding)
            made.append(joined)
        self.keys, self.values = made
        return made[0], made[1]
