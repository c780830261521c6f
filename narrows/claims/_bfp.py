"""What the claims of BFP share: the format in exact fractions, keys with large channels, models."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from functools import cache

import numpy as np
import torch

from narrows.claims._kivi import model_with_outliers
from narrows.claims._snapkv import reference, unseen
from narrows.kv import _ksort
from narrows.kv.bfp import BFP
from narrows.kv.blockfloat import BlockFloat, Order
from narrows.kv.codec import unfold
from narrows.kv.store_packed import PackedStore

SIZE = 64
"""Channels of a head, recall-lm's."""

CALIBRATED, READ = 2, 512
"""Windows of text, and tokens of each, that errors of keys are taken over."""


def block_by_definition(block: list[float], bits: int) -> tuple[list[int], int, list[Fraction]]:
    """Mantissas, stored exponent and values of one block, in exact fractions."""
    exact = [Fraction(x) for x in block]
    largest = max(abs(x) for x in exact)
    exponent = -127
    while largest >= Fraction(2) ** (exponent + 1):
        exponent += 1
    step, most = Fraction(2) ** (exponent - bits + 2), 2 ** (bits - 1) - 1
    codes = [max(-most, min(most, round(x / step))) for x in exact]  # round: half to even
    return codes, exponent + 127, [c * step for c in codes]


def awkward(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Blocks (count, size) fp32 of every kind: zeros, powers of two, ties, tiny, huge, mixed."""
    rng = np.random.default_rng(seed)
    smallest, largest = np.float32(2.0**-149), np.finfo(np.float32).max
    special = [
        np.zeros(size), -np.zeros(size), np.full(size, -1.0), np.full(size, smallest),
        np.full(size, -largest), np.full(size, -(2.0**-126)), np.full(size, 2.0**127),
        np.where(np.arange(size) % 2, smallest, -largest),
        np.linspace(-1.5, 1.5, size), (np.arange(size) - size // 2) * 0.125,
        rng.integers(-9, 9, size) * 2.0**-149, rng.integers(-(2**20), 2**20, size) * 2.0**-149,
        np.r_[-(2.0 ** rng.integers(-126, 127)), np.zeros(size - 1)],
    ]  # fmt: skip
    made = [np.asarray(s, np.float32) for s in special]
    while len(made) < count:
        scale = 2.0 ** float(rng.integers(-140, 120))
        made.append((rng.standard_normal(size) * scale).astype(np.float32))
    return np.stack(made)


def equal_blocks(bits: int, size: int, axis: str, count: int = 64) -> tuple[int, int]:
    """Numbers (mantissas, exponents, values) that are those of the definition, and of how many."""
    blocks = awkward(count, size)
    x = torch.from_numpy(blocks)
    if axis == "token":  # a token is four blocks
        given = x.reshape(1, 1, count // 4, 4 * size)
    else:  # blocks of tokens of eight channels
        given = x.reshape(count // 8, 8, size).transpose(1, 2).reshape(1, 1, -1, 8)
    codec = BlockFloat(bits, axis, size)
    packed = codec.pack(given)
    folded, stored = packed.parts
    spare = 8 - bits
    codes = (unfold(folded, bits) << spare).view(torch.int8) >> spare

    def back(part: torch.Tensor) -> np.ndarray:
        if axis == "token":
            return part.reshape(count, size).numpy()
        return part.reshape(count // 8, size, 8).transpose(1, 2).reshape(count, size).numpy()

    found = back(codes), stored.reshape(count).numpy(), back(packed.unpack())
    same = total = 0
    for i, block in enumerate(blocks):
        wanted = block_by_definition(block.tolist(), bits)
        same += sum(int(a) == b for a, b in zip(found[0][i], wanted[0], strict=True))
        same += int(found[1][i]) == wanted[1]
        same += sum(Fraction(float(a)) == b for a, b in zip(found[2][i], wanted[2], strict=True))
        total += 2 * size + 1
    return same, total


def store_of(technique: BFP, orders: Mapping[int, Order] | None = None) -> PackedStore:
    """A store as the technique makes it for heads of SIZE channels, with an order for layer 0."""

    class Config:
        head_dim = SIZE

    technique._orders = orders
    made = technique.store(Config())
    assert isinstance(made, PackedStore)
    return made


def some_order(heads: int = 2, seed: int = 0) -> Order:
    """Channels shuffled, another way in each head."""
    rng = np.random.default_rng(seed)
    return tuple(tuple(rng.permutation(SIZE).tolist()) for _ in range(heads))


def rotated(keys: torch.Tensor, base: float = 10000.0) -> torch.Tensor:
    """Keys (..., tokens, channels) with their positions applied, as Llama has it."""
    tokens, size = keys.shape[-2:]
    angle = torch.arange(tokens)[:, None] * base ** (-torch.arange(0, size, 2) / size)
    cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
    first, second = keys.chunk(2, -1)
    return keys * cos + torch.cat([-second, first], -1) * sin


def pattern(seed: int, tokens: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """A random key projection (2 heads) with large pairs of channels, and keys of it, rotated.

    One to eight pairs of a head, anywhere, are 4 to 16 times larger.
    """
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((2, 2, SIZE // 2, 32)) / 32**0.5
    for head in range(2):
        chosen = rng.choice(SIZE // 2, rng.integers(1, 9), replace=False)
        weight[head][:, chosen] *= rng.uniform(4, 16, len(chosen))[:, None]
    flat = torch.from_numpy(weight.reshape(2 * SIZE, 32)).float()
    hidden = torch.from_numpy(rng.standard_normal((tokens, 32))).float()
    keys = (hidden @ flat.T).reshape(1, tokens, 2, SIZE).transpose(1, 2)
    return flat, rotated(keys)


def large_channels() -> torch.Tensor:
    """Which channels model_with_outliers made larger, (SIZE,) bool."""
    made = torch.zeros(SIZE, dtype=torch.bool)
    half = torch.tensor([2, 9, 17, 30])
    made[half] = made[half + SIZE // 2] = True
    return made


def errors(keys: torch.Tensor, block: int, order: Order | None, bits: int = 4) -> torch.Tensor:
    """Squared errors of keys as they come back, summed over tokens: (kv_heads, channels) fp64."""
    codec = BlockFloat(bits, "token", block, order)
    return (codec.pack(keys).unpack() - keys.float()).double().square().sum((0, 2))


def energy(keys: torch.Tensor, block: int, order: Order | None, bits: int = 4) -> float:
    """Sum of squared errors of keys as they come back."""
    return float(errors(keys, block, order, bits).sum())


@cache
def key_errors(block: int) -> Mapping[str, torch.Tensor]:
    """`errors` of the reference model's keys with large channels, by order; unseen text.

    (layers, kv_heads, channels).
    """
    from narrows.kv.adapter import KVCache, stores
    from narrows.kv.reading import reading

    model = model_with_outliers()
    text = unseen()
    starts = np.linspace(0, len(text) - READ, CALIBRATED).astype(int)
    ids = torch.from_numpy(np.stack([text[s : s + READ] for s in starts]))
    held = KVCache(model.config)
    with reading(model):
        model(ids, past_key_values=held, use_cache=True, logits_to_keep=1)
    told: dict[str, list[torch.Tensor]] = {"sorted": [], "as they come": [], "shuffled": []}
    orders = _ksort.key_orders(model)
    for layer, store in enumerate(stores(held)):
        keys = store.keys
        assert keys is not None
        told["sorted"].append(errors(keys, block, orders[layer]))
        told["as they come"].append(errors(keys, block, None))
        told["shuffled"].append(errors(keys, block, some_order(keys.shape[1], layer)))
    return {name: torch.stack(each) for name, each in told.items()}


@cache
def perplexities(outliers: bool = True, windows: int = 32) -> Mapping[str, float]:
    """exp of the mean loss of 64 tokens after 2,048 of unseen text, by candidate."""
    from narrows.kv import quality

    model = model_with_outliers() if outliers else reference()[0]
    some = {
        "dense": None, "sorted": BFP().of(model), "as they come": BFP(sort=False),
        "n = 16, sorted": BFP(block=16).of(model), "n = 16": BFP(block=16, sort=False),
        "values in 8 bits, sorted": BFP(4, 8).of(model),
        "values in 8 bits": BFP(4, 8, sort=False),
    }  # fmt: skip
    return quality.perplexity(model, some, unseen(), windows=windows)
