"""The seam to Hugging Face transformers: caches that plug in, no modelling code patched.

A layer's `update` returns a handle instead of tensors; models pass it on to the attention
function untouched, and ours, registered as ATTENTION, writes the store and reads it as it lies.
The queries a policy needs arrive there too, with their positions applied.

Works from transformers 5.2 on. What moved since is told apart by shape and signature, never by
version: `get_mask_sizes` gets the query's positions or their number, the longest length is asked
as `get_max_cache_shape` or `get_max_length`, `crop` gets a final length or a number to remove,
`update` does or does not get `cache_kwargs`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from narrows.core.errors import NarrowsError
from narrows.kv._base import Policy, Prompt
from narrows.kv.store_torch import Store

ATTENTION = "narrows_kv"
"""Name of the attention that reads these caches: `model.set_attn_implementation(ATTENTION)`.

With any other cache, or none, it is plain scaled dot-product attention.
"""

UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Arguments of attention functions that change the scores in a way this one does not know."""

_CROP_TO_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters


@dataclass(frozen=True, slots=True)
class Chunk:
    """That a prompt comes in chunks, and whether this is the last."""

    last: bool


class KVLayer(CacheLayerMixin):
    """One layer of a cache: a Store, filled under a policy (None keeps all, in place)."""

    is_sliding = False
    is_croppable = True

    def __init__(
        self, index: int, policy: Policy | None = None, store: Store | None = None
    ) -> None:
        # the base would set `keys` and `values`, which the store answers for here
        self.index = index
        self.policy = policy
        self.store = Store() if store is None else store
        self.chunk: Chunk | None = None
        self.hidden: torch.Tensor | None = None

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """The keys held, (batch, kv_heads, held, head_dim)."""
        return self.store.keys

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """The values held, (batch, kv_heads, held, head_dim)."""
        return self.store.values

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether anything was stored."""
        return bool(self.store.seen)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare: the store is sized by the first prompt."""

    def update(  # type: ignore[override]
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Incoming, Incoming]:
        """A handle for the attention function, which stores the tokens and reads them."""
        incoming = Incoming(self, key_states, value_states)
        return incoming, incoming

    def attend(
        self,
        module: torch.nn.Module,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Store the new tokens and attend, (batch, tokens, heads, head_dim)."""
        scale = queries.shape[3] ** -0.5 if scaling is None else scaling
        hidden, self.hidden = self.hidden, None
        if not self.store.seen:
            valid = _valid(mask, keys)
            prompt = Prompt(self.index, queries, keys, values, valid, scale, module, hidden)
            if self.chunk is not None:
                self.store.append(keys, values, valid)
                return self._chunk(prompt, module, mask, scaling, options)
            out = None
            if self.policy is not None:
                out = self.policy.attend_prompt(prompt, mask)
            if out is None:
                out, _ = sdpa_attention_forward(
                    module, queries, keys, values, mask, scaling=scaling, **options
                )
            else:
                out = out.transpose(1, 2)
            columns = None if self.policy is None else self.policy.on_prefill_end(prompt)
            self.store.fill(keys, values, columns, valid)
            return out
        start = self.store.seen
        self.store.append(keys, values)
        if self.chunk is not None:
            prompt = Prompt(self.index, queries, keys, values, None, scale, module, hidden, start)
            return self._chunk(prompt, module, mask, scaling, options)
        out = self.store.attend(queries, mask, scaling).transpose(1, 2)
        self.store.settle()
        if self.policy is not None:
            self.policy.on_decode_step(self.index, self.store)
        return out

    def _chunk(
        self, chunk: Prompt, module: torch.nn.Module, mask: torch.Tensor | None,
        scaling: float | None, options: dict[str, Any],
    ) -> torch.Tensor:  # fmt: skip
        """Attend a chunk of a prompt that is stored already, and let the policy choose."""
        assert self.chunk is not None
        chunk = replace(chunk, last=self.chunk.last)
        if chunk.start:
            out = self.store.attend(chunk.queries, mask, scaling).transpose(1, 2)
        else:
            out, _ = sdpa_attention_forward(
                module, chunk.queries, chunk.keys, chunk.values, mask, scaling=scaling, **options
            )
        if self.policy is not None:
            slots = self.policy.on_prefill_chunk(chunk, self.store)
            if slots is not None:
                self.store.keep(slots)
            if chunk.last:
                keys, values = self.store.keys, self.store.values
                assert keys is not None
                assert values is not None
                held = replace(chunk, keys=keys, values=values, start=0, valid=self.store.valid())
                slots = self.policy.on_prefill_end(held)
                if slots is not None:
                    self.store.keep(slots)
        if chunk.last:
            self.store.settle()
        return out

    def get_mask_sizes(self, query: int | torch.Tensor) -> tuple[int, int]:  # type: ignore[override]
        """Length and offset of the mask: over all tokens seen, whatever is still held."""
        new = query.shape[0] if isinstance(query, torch.Tensor) else query
        return self.store.seen + new, 0

    def get_seq_length(self) -> int:
        """Tokens seen: the position the next one gets."""
        return self.store.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget everything."""
        self.store.clear()

    def crop(self, tokens: int) -> None:
        """Take back tokens, counted as the installed transformers counts them."""
        if tokens > 0 and not _CROP_TO_LENGTH:
            raise NarrowsError(f"crop takes a negative number of tokens to remove, not {tokens}")
        remove = self.store.seen - tokens if _CROP_TO_LENGTH and tokens >= 0 else -tokens
        if remove > 0:
            self.store.crop(remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows of the batch in another order, for beam search."""
        self.store.rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows of the batch."""
        self.store.rows(torch.arange(self._rows, device=indices.device)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch `repeats` times."""
        self.store.rows(torch.arange(self._rows).repeat_interleave(repeats))

    def copied(self) -> KVLayer:
        """A layer that holds the same and goes on on its own."""
        return KVLayer(self.index, self.policy, deepcopy(self.store))

    @property
    def _rows(self) -> int:
        return self.store.batch


@dataclass(slots=True)
class Incoming:
    """New keys and values on their way from a model to the attention function."""

    layer: KVLayer
    keys: torch.Tensor
    values: torch.Tensor

    def __getattr__(self, name: str) -> Any:
        raise _unread()

    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:
        raise _unread()


def _unread() -> NarrowsError:
    return NarrowsError(
        "the model does not run the attention that reads this cache: call "
        f"model.set_attn_implementation({ATTENTION!r}) first, or use technique.apply(model)"
    )


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls, (batch, tokens, heads, head_dim)."""
    if not isinstance(key, Incoming):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    for name in UNSUPPORTED:
        if options.get(name) is not None:
            raise NarrowsError(f"{type(module).__name__} uses {name}, which {ATTENTION} lacks")
    layer = key.layer
    out = layer.attend(module, query, key.keys, key.values, attention_mask, scaling, options)
    return out.contiguous(), None


def _valid(mask: torch.Tensor | None, keys: torch.Tensor) -> torch.Tensor | None:
    """Which columns of a prompt are tokens, (batch, tokens); None where all are.

    The last token of a prompt sees all that is not padding, so the mask's last row tells.
    """
    if mask is None:
        return None
    last = mask[:, :, -1, : keys.shape[2]]
    seen = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
    valid = seen.any(1).expand(keys.shape[0], -1)
    if not bool(valid[:, -1].all()):
        raise NarrowsError(
            "the prompt is padded on the right, so its last tokens are no tokens; pad on the left "
            "(tokenizer.padding_side = 'left')"
        )
    return None if bool(valid.all()) else valid


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def layers_for(config: Any, policy: Policy | None) -> list[Any]:
    """Cache layers of a model: ours where it attends to everything, transformers' own elsewhere."""
    text = config.get_text_config(decoder=True)
    if getattr(text, "num_kv_shared_layers", 0):
        raise NarrowsError(
            f"{text.model_type} shares keys and values between layers: not supported"
        )
    made = DynamicCache(config=config).layers
    ours = [i for i, layer in enumerate(made) if type(layer) is DynamicLayer]
    if not ours:
        raise NarrowsError(f"{text.model_type} has no layer with full attention to hold a cache of")
    return [
        KVLayer(i, policy, None if policy is None else policy.store(text, i))
        if i in ours
        else layer
        for i, layer in enumerate(made)
    ]


class KVCache(Cache):
    """A cache to pass as `past_key_values`: in place, under a policy (None: dense).

    config: the model's. The model must run ATTENTION.
    """

    def __init__(self, config: Any, policy: Policy | None = None) -> None:
        super().__init__(layers=layers_for(config, policy))


def copied(cache: Cache) -> Cache:
    """A cache that goes on from here on its own; policies and tiers stay shared."""
    made = copy(cache)
    made.layers = [
        layer.copied() if isinstance(layer, KVLayer) else deepcopy(layer) for layer in cache.layers
    ]
    return made


def stores(cache: Cache) -> list[Store]:
    """The stores of a cache's layers, in order; layers of transformers' own have none."""
    return [layer.store for layer in cache.layers if isinstance(layer, KVLayer)]


def nbytes(cache: Cache) -> int:
    """Bytes of the keys and values a cache of ours holds."""
    return sum(store.nbytes() for store in stores(cache))


class Supply:
    """Forward pre-hook of a wrapped model: gives it the cache that a run starts with.

    A fresh one where the caller passed none; an empty DynamicCache (what `generate` makes) is
    taken over, so that the caller's own object holds what is kept. A cache that holds tokens
    already is left as it is. A policy that reads prompts in chunks gets them so: the logits are
    then of the last chunk.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.cache: Cache | None = None
        self._reading = False
        self._last: Any = None

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > 1:
            named = list(inspect.signature(model.forward).parameters)
            kwargs = {**dict(zip(named[1:], args[1:], strict=False)), **kwargs}
            args = args[:1]
        wanted = kwargs.get("use_cache")
        default = getattr(model.config.get_text_config(decoder=True), "use_cache", True)
        if not (default if wanted is None else wanted):
            return args, kwargs
        given = kwargs.get("past_key_values")
        if given is None:
            given = KVCache(model.config, self.policy)
        elif isinstance(given, Cache) and stores(given):
            pass
        elif type(given) is not DynamicCache:
            raise NarrowsError(
                f"a {type(given).__name__} was passed as past_key_values, but the technique brings "
                "its own cache; pass none, or an empty DynamicCache"
            )
        elif given.get_seq_length() == 0:
            given.layers = layers_for(model.config, self.policy)
            given.layer_class_to_replicate = None
        self.cache = given
        kwargs = {**kwargs, "past_key_values": given}
        return self._in_chunks(model, args, kwargs) if self.policy.chunk else (args, kwargs)

    def _in_chunks(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Read all but the last chunk of a long prompt here; the model goes on with that one."""
        from narrows.kv.chunked import in_chunks, read

        ids, cache = args[0] if args else kwargs.get("input_ids"), kwargs["past_key_values"]
        size = self.policy.chunk
        if size is None or ids is None or cache.get_seq_length() or self._reading:
            return args, kwargs
        self._reading = True
        try:
            begin = read(model, ids, cache, size, kwargs.get("attention_mask"))
        finally:
            self._reading = False
        self._last = in_chunks(cache, last=True)
        self._last.__enter__()
        for name in ("position_ids", "cache_position"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][..., begin:]
        rest = ids[:, begin:]
        return ((rest,), kwargs) if args else ((), {**kwargs, "input_ids": rest})

    def leave(self, *_: Any) -> None:
        """Forward hook: the last chunk has been read, or failed."""
        if self._last is not None and not self._reading:
            self._last.__exit__(None, None, None)
            self._last = None


@dataclass
class AppliedCache:
    """A model whose caches follow a policy, inside the context of `apply`."""

    model: Any
    supply: Supply

    @property
    def cache(self) -> Cache:
        """The cache of the latest run."""
        if self.supply.cache is None:
            raise NarrowsError("no cache yet: run the model first")
        return self.supply.cache

    def nbytes(self) -> int:
        """Bytes of keys and values held by the latest run."""
        return nbytes(self.cache)


def known(model: Any) -> PreTrainedModel:
    """The model, which is a transformers one; NarrowsError otherwise."""
    if not isinstance(model, PreTrainedModel):
        raise NarrowsError(
            f"a transformers model is needed to change its cache, not a {type(model).__name__}"
        )
    return model


@contextmanager
def wrap(model: Any, policy: Policy) -> Iterator[AppliedCache]:
    """A transformers model whose caches follow a policy; undone on exit, whatever happened."""
    known(model)
    if any(isinstance(hook, Supply) for hook in model._forward_pre_hooks.values()):
        raise NarrowsError("a cache technique is at work on this model already; leave it first")
    layers_for(model.config, policy)
    before = _implementations(model.config)
    supply = Supply(policy)
    hooks = [
        model.register_forward_pre_hook(supply, with_kwargs=True),
        model.register_forward_hook(supply.leave, always_call=True),
        *(hidden_states(model) if policy.needs_hidden else ()),
    ]
    try:
        model.set_attn_implementation(ATTENTION)
        if model.config.get_text_config(decoder=True)._attn_implementation != ATTENTION:
            raise NarrowsError(
                f"{type(model).__name__} does not let its attention be chosen "
                "(it does not go through transformers' AttentionInterface)"
            )
        yield AppliedCache(model, supply)
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)


def hidden_states(model: Any) -> list[Any]:
    """Hooks that hand what comes into each attention to its layer of a cache; remove them after."""

    def tell(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, Cache) and stores(cache):
            layer = cache.layers[module.layer_idx]
            if isinstance(layer, KVLayer):
                layer.hidden = args[0] if args else kwargs.get("hidden_states")

    found = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "q_proj")]
    if not found:
        raise NarrowsError(
            f"the attention modules of {type(model).__name__} are not known, so what comes into "
            "them cannot be seen"
        )
    return [m.register_forward_pre_hook(tell, with_kwargs=True) for m in found]


def _implementations(config: Any) -> str | dict[str, str]:
    """The attention a model runs now, in the form that sets it back."""
    inner = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    found = {n: c._attn_implementation for n, c in inner.items() if c is not None}
    return {"": config._attn_implementation, **found} if found else config._attn_implementation
