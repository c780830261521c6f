"""What predicts a cache: an auxiliary model and one linear map of keys and of values a layer.

Keys are predicted as the model's projection gives them, before any norm of keys and before their
positions are applied: the model does both to a predicted key as it does to its own.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from narrows.core.errors import NarrowsError
from narrows.kv._base import Policy, Prompt
from narrows.kv.adapter import AppliedCache, KVLayer, Supply, known, wrap
from narrows.kv.saved import fingerprint

FORMAT = "narrows-kvprediction-1"
"""Of files of predictors."""

Pairs = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, (batch, tokens, kv_heads * head_dim), before positions."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Models whose keys are a projection, perhaps a norm, and positions by rotation of halves."""


class KVPredictor(nn.Module):
    """Reads a prompt with `auxiliary` and predicts the cache of `base` from what that caches.

    base: a transformers model of FAMILIES; only shapes are read. auxiliary: one of a Llama's
    shape, same vocabulary. layer_map: for every layer of the base the auxiliary's layer it is
    predicted from, not decreasing, or "even" (see even).
    """

    def __init__(self, base: Any, auxiliary: Any, layer_map: str | Sequence[int] = "even") -> None:
        super().__init__()
        layers, small = blocks(base), blocks(auxiliary)
        if base.config.vocab_size != auxiliary.config.vocab_size:
            raise NarrowsError(
                f"the auxiliary has a vocabulary of {auxiliary.config.vocab_size}, the model one "
                f"of {base.config.vocab_size}: both must read the same tokens"
            )
        self.layer_map = mapped(layer_map, len(layers), len(small))
        self.auxiliary = auxiliary
        self.keys, self.values = (
            nn.ModuleList(
                nn.Linear(
                    getattr(small[j].self_attn, name).out_features,
                    getattr(layer.self_attn, name).out_features,
                    dtype=base.dtype,
                    device=base.device,
                )
                for layer, j in zip(layers, self.layer_map, strict=True)
            )
            for name in ("k_proj", "v_proj")
        )

    def identity(self) -> KVPredictor:
        """Every map set to take over what the auxiliary caches, where the sizes agree."""
        for linear in (*self.keys, *self.values):
            assert isinstance(linear, nn.Linear)
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
        return self

    def mapped(self, cached: Pairs) -> Pairs:
        """The base's keys and values from the auxiliary's."""
        rows = zip(self.layer_map, self.keys, self.values, strict=True)
        return [(keys(cached[j][0]), values(cached[j][1])) for j, keys, values in rows]

    def forward(
        self,
        ids: torch.Tensor,
        valid: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> Pairs:
        """The base's keys and values of a prompt, (batch, tokens) ids.

        valid: (batch, tokens) bool, False on padding; None where there is none. positions:
        (batch or 1, tokens); None: the columns. Of the auxiliary's last block only keys and
        values are computed: nothing reads what comes after them.
        """
        return self.mapped(read(self.auxiliary, ids, valid, positions))


def blocks(model: Any) -> Any:
    """The decoder blocks of a model of FAMILIES; NarrowsError for another."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES:
        raise NarrowsError(
            f"kvprediction knows how the keys of {', '.join(FAMILIES)} are made, not of {kind}"
        )
    return model.model.layers


def even(layers: int, small: int) -> tuple[int, ...]:
    """Layers of the base dealt out to the auxiliary's in order; the lower ones get one more.

    28 from 16 gives the paper's 0, 0, 1, 1, ..., 11, 11, 12, 13, 14, 15.
    """
    each, more = divmod(layers, small)
    return tuple(j for j in range(small) for _ in range(each + (j < more)))


def mapped(given: str | Sequence[int], layers: int, small: int) -> tuple[int, ...]:
    """A layer map as numbers; NarrowsError where it is none."""
    if given == "even":
        if small > layers:
            raise NarrowsError(
                f"an auxiliary of {small} layers is deeper than the model of {layers}"
            )
        return even(layers, small)
    made = () if isinstance(given, str) else tuple(int(j) for j in given)
    falls = any(b < a for a, b in pairwise(made))
    if len(made) != layers or falls or not all(0 <= j < small for j in made):
        raise NarrowsError(
            f"layer_map must be 'even' or {layers} numbers from 0 to {small - 1} that do not "
            f"decrease, not {given!r}"
        )
    return made


def read(
    model: Any,
    ids: torch.Tensor,
    valid: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> Pairs:
    """What a model caches of a prompt, before norms of keys and positions; see KVPredictor."""
    layers, inner = blocks(model), model.model
    hidden = inner.embed_tokens(ids)
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
    turned = inner.rotary_emb(hidden, position_ids=positions)
    mask = None
    if valid is not None:
        row = torch.arange(ids.shape[1], device=ids.device)
        # a padding token sees itself, or its softmax would be of nothing
        sees = (row <= row[:, None]) & valid[:, None, :] | torch.eye(
            len(row), dtype=torch.bool, device=ids.device
        )
        mask = sees[:, None]
    told: Pairs = []
    with seen(layers[:-1], told):
        for layer in layers[:-1]:
            hidden = layer(
                hidden, attention_mask=mask, position_embeddings=turned, position_ids=positions
            )
    normed, last = layers[-1].input_layernorm(hidden), layers[-1].self_attn
    return [*told, (last.k_proj(normed), last.v_proj(normed))]


@contextmanager
def seen(layers: Any, told: Pairs) -> Iterator[None]:
    """The keys and values that these blocks project, noted as they run."""
    keys: list[torch.Tensor] = []

    def note_keys(_: Any, args: Any, made: torch.Tensor) -> None:
        keys.append(made)

    def note_values(_: Any, args: Any, made: torch.Tensor) -> None:
        told.append((keys.pop(), made))

    hooks = []
    for layer in layers:
        hooks.append(layer.self_attn.k_proj.register_forward_hook(note_keys))
        hooks.append(layer.self_attn.v_proj.register_forward_hook(note_values))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def given(layers: Any, pairs: Pairs) -> Iterator[None]:
    """These blocks attend to the keys and values given, not to those they project."""

    def instead(made: torch.Tensor) -> Callable[..., torch.Tensor]:
        return lambda *_: made

    hooks = []
    for layer, (keys, values) in zip(layers, pairs, strict=True):
        hooks.append(layer.self_attn.k_proj.register_forward_hook(instead(keys)))
        hooks.append(layer.self_attn.v_proj.register_forward_hook(instead(values)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Predicted(Policy):
    """Keeps all of what is predicted."""

    def on_prefill_end(self, prompt: Prompt) -> torch.Tensor | None:
        """See Policy."""
        return None


class Prefill:
    """Forward pre-hook of a wrapped model: fills the cache it got and leaves it the last token.

    calls: prompts that were predicted.
    """

    def __init__(self, predictor: KVPredictor) -> None:
        self.predictor = predictor
        self.calls = 0

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length():
            return args, kwargs
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None or kwargs.get("inputs_embeds") is not None:
            raise NarrowsError("kvprediction reads prompts as input_ids, not as inputs_embeds")
        if kwargs.get("labels") is not None:
            raise NarrowsError(
                "kvprediction runs the model on the last prompt token only, so there is no loss "
                "over the prompt; leave labels away, or the technique"
            )
        if ids.shape[1] < 2:
            return args, kwargs
        valid = _valid(kwargs.get("attention_mask"), ids)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        before = None if valid is None else valid[:, :-1]
        with torch.no_grad():
            pairs = self.predictor(ids[:, :-1], before, positions[:, :-1])
            fill(model, cache, pairs, positions[:, :-1], before)
        self.calls += 1
        kwargs = dict(kwargs)
        for name in ("position_ids", "cache_position"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][..., -1:]
        last = ids[:, -1:]
        return ((last, *args[1:]), kwargs) if args else ((), {**kwargs, "input_ids": last})


def _valid(mask: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor | None:
    """Which columns of a prompt are tokens, (batch, tokens) bool; None where all are."""
    if mask is None:
        return None
    if getattr(mask, "ndim", 0) != 2 or mask.shape != ids.shape:
        raise NarrowsError(
            "kvprediction takes an attention_mask of the prompt's shape, (batch, tokens), not "
            f"{getattr(mask, 'shape', type(mask).__name__)}"
        )
    valid = mask.bool()
    if not bool(valid[:, -1].all()):
        raise NarrowsError(
            "the prompt is padded on the right, so its last tokens are no tokens; pad on the left "
            "(tokenizer.padding_side = 'left')"
        )
    return None if bool(valid.all()) else valid


def fill(
    model: Any, cache: Any, pairs: Pairs, positions: torch.Tensor, valid: torch.Tensor | None
) -> None:
    """A cache of ours filled with predicted keys and values, which end before the last token."""
    first = pairs[0][0]
    cosine, sine = model.model.rotary_emb(first, position_ids=positions)
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    for layer, held, (keys, values) in zip(blocks(model), cache.layers, pairs, strict=True):
        if not isinstance(held, KVLayer):
            raise NarrowsError(
                f"a layer's cache is transformers' own {type(held).__name__}: kvprediction fills "
                "layers that attend to everything"
            )
        attention = layer.self_attn
        size = attention.head_dim
        keys, values = (x.unflatten(2, (-1, size)) for x in (keys, values))
        norm = getattr(attention, "k_norm", None)
        keys = (keys if norm is None else norm(keys)).transpose(1, 2)
        one, two = keys.chunk(2, -1)
        turned = keys * cosine + torch.cat([-two, one], -1) * sine
        held.store.fill(turned.to(model.dtype), values.transpose(1, 2).to(model.dtype), None, valid)


@contextmanager
def at_work(model: Any, predictor: KVPredictor) -> Iterator[AppliedCache]:
    """A model whose prompts are read by a predictor; undone on exit, whatever happened."""
    layers = blocks(known(model))
    if len(predictor.layer_map) != len(layers):
        raise NarrowsError(
            f"this predictor is for a model of {len(predictor.layer_map)} layers, not {len(layers)}"
        )
    if any(isinstance(hook, Prefill) for hook in model._forward_pre_hooks.values()):
        raise NarrowsError("kvprediction is at work on this model already; leave it first")
    supply = next((h for h in model._forward_pre_hooks.values() if isinstance(h, Supply)), None)
    with ExitStack() as inside:
        if supply is None:
            applied = inside.enter_context(wrap(model, Predicted()))
        else:
            if supply.policy.chunk or supply.policy.budget(1 << 20) < 1 << 20:
                raise NarrowsError(
                    f"{getattr(supply.policy, 'key', 'the technique at work')} chooses tokens by "
                    "what the model does with the prompt, which it does not read here"
                )
            applied = AppliedCache(model, supply)
        hook = model.register_forward_pre_hook(Prefill(predictor), with_kwargs=True)
        inside.callback(hook.remove)
        yield applied


def pruned(model: Any, layers: int) -> Any:
    """A copy of a model's lowest blocks; embedding, head and feed-forward weights are the model's.

    Attention and norms are its own, in the model's number format and place.
    """
    total = len(blocks(model))
    if not 1 <= layers <= total:
        raise NarrowsError(f"{layers} blocks were asked of a model of {total}: give 1 to {total}")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):  # what is drawn is thrown away at once
        made = type(model)(config).to(device=model.device, dtype=model.dtype).eval()
    have = model.state_dict()
    made.load_state_dict({name: have[name] for name in made.state_dict()})
    made.set_input_embeddings(model.get_input_embeddings())
    made.lm_head = model.lm_head
    for layer, theirs in zip(made.model.layers, blocks(model), strict=False):
        layer.mlp = theirs.mlp
    return made


def own(predictor: KVPredictor) -> dict[str, torch.nn.Parameter]:
    """The parameters that a predictor of a pruned copy does not share with its model, by name."""
    shared = (".mlp.", ".embed_tokens.", ".lm_head.")
    return {n: p for n, p in predictor.named_parameters() if not any(s in n for s in shared)}


def save(path: Path, model: Any, predictor: KVPredictor) -> None:
    """Write the predictor of a pruned copy in bfloat16, beside those of other sizes there."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    layers = str(len(blocks(predictor.auxiliary)))
    tensors: dict[str, torch.Tensor] = {}
    maps: dict[str, list[int]] = {}
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT or header.get("model") != fingerprint(model):
                raise NarrowsError(f"{path} is no file of this model's predictors; give another")
            maps = json.loads(header["maps"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors = {n: x for n, x in tensors.items() if not n.startswith(f"{layers}/")}
    for name, x in own(predictor).items():
        tensors[f"{layers}/{name}"] = x.detach().to(torch.bfloat16).contiguous()
    maps = {**maps, layers: list(predictor.layer_map)}
    header = {"format": FORMAT, "model": fingerprint(model), "maps": json.dumps(maps)}
    scratch = path.with_name(path.name + ".new")
    save_file(tensors, scratch, metadata=header)
    os.replace(scratch, path)


def load(path: Path, model: Any, layers: int) -> KVPredictor:
    """The predictor that is kept for a model, with an auxiliary of so many layers.

    Raises NarrowsError where there is none: what to do is in it.
    """
    from safetensors import safe_open

    what = f"no predictor is shipped for this model ({fingerprint(model)})"
    how = (
        "train one (narrows/kv/kvprediction_train.py shows how) and give it: "
        "KVPrediction(...).apply(model, state=predictor)"
    )
    if not path.is_file():
        raise NarrowsError(f"kvprediction: {what}; {how}")
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        if header.get("format") != FORMAT or header.get("model") != fingerprint(model):
            raise NarrowsError(f"kvprediction: {what}; {how}")
        maps = json.loads(header["maps"])
        if str(layers) not in maps:
            total = len(blocks(model))
            shares = ", ".join(f"{int(n) / total:g}" for n in maps)
            raise NarrowsError(
                f"kvprediction: no predictor of {layers} of the model's {total} layers is shipped; "
                f"layers={shares} are, or {how}"
            )
        made = KVPredictor(model, pruned(model, layers), maps[str(layers)])
        with torch.no_grad():
            for name, parameter in own(made).items():
                parameter.copy_(file.get_tensor(f"{layers}/{name}"))
    for parameter in own(made).values():
        parameter.requires_grad_(False)
    return made.eval()
