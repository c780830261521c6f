"""What the claims of KIVI share: its definition written out, the state to compare, controls."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from narrows.claims._snapkv import recalled_by, reference, unseen
from narrows.kv._base import Policy, Prompt
from narrows.kv.codec import Affine, Packed, unfold
from narrows.kv.kivi import KIVI
from narrows.kv.store_packed import PackedStore
from narrows.kv.store_torch import Store

if TYPE_CHECKING:
    from collections.abc import Mapping

SIZE = 64
"""Channels of a head, recall-lm's."""


def below(x: float) -> np.float16:
    """The largest fp16 number not above x."""
    near = np.float16(x)
    return near if float(near) <= x else np.nextafter(near, np.float16(-np.inf))


def group_by_definition(values: np.ndarray, bits: int) -> tuple[list[int], np.float16, np.float16]:
    """Codes, scale and minimum of one group of numbers, fp32."""
    levels = 2**bits - 1
    low = below(float(values.min()))
    scale = np.float16((values.max() - np.float32(low)) / np.float32(levels))
    codes: list[int] = []
    for x in values:
        if scale == 0:
            codes.append(0)
            continue
        exact = (x - np.float32(low)) / np.float32(scale)
        codes.append(round(min(max(float(exact), 0.0), float(levels))))
    return codes, scale, low


def by_definition(
    x: np.ndarray, bits: int, axis: str, group: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (tokens, channels), scales and minima of one head, written out group by group."""
    tokens, channels = x.shape
    codes = np.zeros((tokens, channels), np.uint8)
    shape = (tokens // group, channels) if axis == "channel" else (tokens, channels // group)
    scale, low = np.zeros(shape, np.float16), np.zeros(shape, np.float16)
    for i, j in np.ndindex(shape):
        at = (
            (slice(i * group, (i + 1) * group), j)
            if axis == "channel"
            else (i, slice(j * group, (j + 1) * group))
        )
        codes[at], scale[i, j], low[i, j] = group_by_definition(x[at], bits)
    return codes, scale, low


def random_tokens(tokens: int, batch: int = 1, heads: int = 2, seed: int = 0) -> torch.Tensor:
    """Keys with a few large channels, as models with rotated positions grow them."""
    made = torch.Generator().manual_seed(seed)
    wide = torch.ones(SIZE)
    wide[::16] = 8.0
    return torch.randn(batch, heads, tokens, SIZE, generator=made) * wide


def store_of(technique: KIVI) -> PackedStore:
    """A store as the technique makes it for heads of SIZE channels."""

    class Config:
        head_dim = SIZE

    store = technique.store(Config())
    assert isinstance(store, PackedStore)
    return store


def histories(technique: KIVI) -> Iterator[tuple[PackedStore, torch.Tensor, torch.Tensor]]:
    """Stores filled on both sides of each residual boundary and then stepped over the next one.

    Yields each store whenever its length is a boundary, one below or one above, with all keys
    and values it was given.
    """
    size = technique.residual_length
    for prompt in (1, size - 1, size, size + 1, 2 * size - 1, 2 * size, 2 * size + 1):
        total = prompt + size + 2
        keys, values = random_tokens(total, seed=prompt), random_tokens(total, seed=prompt + 999)
        store = store_of(technique)
        store.fill(keys[:, :, :prompt], values[:, :, :prompt], None, None)
        yield store, keys[:, :, :prompt], values[:, :, :prompt]
        for end in range(prompt + 1, total + 1):
            store.append(keys[:, :, end - 1 : end], values[:, :, end - 1 : end])
            store.settle()
            if end % size in (0, 1, size - 1):
                yield store, keys[:, :, :end], values[:, :, :end]


def equal_parts(store: PackedStore, keys: torch.Tensor, values: torch.Tensor) -> tuple[int, int]:
    """Numbers of a store that are those of the definition, and how many there must be.

    Packed by definition: keys in whole residuals, all values but the last `residual`.
    """
    tokens, size = keys.shape[2], store.residual
    same = total = 0
    ends = tokens // size * size, max(tokens - size, 0)
    wanted = ("channel", "token")
    for body, tail, x, end, axis in zip(
        store.bodies, store.tails, (keys, values), ends, wanted, strict=True
    ):
        full = x[:, :, end:]
        total += full.numel()
        if tail.view.shape == full.shape:
            same += int((tail.view == full).sum())
        if not end:
            same -= body.tokens  # nothing may be packed
            continue
        codec = body.codec
        assert isinstance(codec, Affine)
        for head in range(x.shape[1]):
            parts = by_definition(x[0, head, :end].numpy(), codec.bits, axis, codec.group)
            if body.tokens == end:
                folded, scale, low = body.packed.parts
                codes = unfold(folded, codec.bits)[0, head].numpy()
                mine = codes, scale[0, head].numpy(), low[0, head].numpy()
            else:
                mine = ()
            for part in parts:
                total += part.size
            for part, found in zip(parts, mine, strict=False):
                same += int((part == found).sum()) if part.shape == found.shape else 0
    return same, total


class Rounded(Store):
    """A dense store whose older tokens were rounded as other axes of the codec would."""

    def __init__(self, key_axis: str, value_axis: str, bits: int, group: int, residual: int):
        super().__init__()
        self.codecs = Affine(bits, key_axis, group), Affine(bits, value_axis, group)
        self.residual = residual

    def fill(self, keys: Any, values: Any, columns: Any, valid: Any) -> None:
        """As Store, what lies before the residual rounded; a whole number of blocks of both."""
        end = keys.shape[2] // self.residual * self.residual
        end -= self.residual if end == keys.shape[2] else 0
        made = []
        for codec, x in zip(self.codecs, (keys, values), strict=True):
            packed: Packed = codec.pack(x[:, :, :end])
            made.append(torch.cat([packed.unpack().to(x.dtype), x[:, :, end:]], 2))
        super().fill(made[0], made[1], columns, valid)


class Axes(Policy):
    """A choice of axes for keys and values, the prompt rounded by it."""

    def __init__(self, key_axis: str, value_axis: str, bits: int = 2) -> None:
        self.key_axis, self.value_axis, self.bits = key_axis, value_axis, bits

    def on_prefill_end(self, prompt: Prompt) -> None:
        """Nothing is dropped."""

    def store(self, config: Any, layer: int = 0) -> Store:
        """See Policy."""
        return Rounded(self.key_axis, self.value_axis, self.bits, 32, 128)


def candidates() -> dict[str, Any]:
    """Ways to round, and not to."""
    return {
        "dense": None, "kivi": KIVI(), "4 bits": KIVI(4, 4),
        "keys channel, values token": Axes("channel", "token"),
        "keys token, values token": Axes("token", "token"),
        "keys channel, values channel": Axes("channel", "channel"),
        "keys token, values channel": Axes("token", "channel"),
    }  # fmt: skip


@cache
def model_with_outliers(factor: float = 8.0) -> Any:
    """The reference model with a few large key channels: the same function (fp32 rounding apart).

    In each KV head four pairs of channels that positions rotate together are `factor` times
    larger in the key projection, and smaller in the queries that meet them.
    """
    model = copy.deepcopy(reference()[0]).to(torch.float32)
    config = model.config
    size = config.head_dim
    chosen = torch.ones(size)
    chosen[[2, 9, 17, 30]] = factor
    chosen[size // 2 :] = chosen[: size // 2]
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.k_proj.weight.mul_(chosen.repeat(config.num_key_value_heads)[:, None])
            attention.q_proj.weight.div_(chosen.repeat(config.num_attention_heads)[:, None])
    return model


@cache
def perplexities(outliers: bool, windows: int = 64) -> Mapping[str, float]:
    """exp of the mean loss of 64 tokens after 2,048 of unseen text, by candidate."""
    from narrows.kv import quality

    model = model_with_outliers() if outliers else reference()[0]
    return quality.perplexity(model, candidates(), unseen(), windows=windows)


@cache
def recalled(task: str) -> Mapping[str, Any]:
    """Shares of right answers at 2,048 tokens, by candidate."""
    some = {n: c for n, c in candidates().items() if n in ("dense", "kivi", "4 bits")}
    return recalled_by(some, task, 4)
