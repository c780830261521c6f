"""K-sort: which channels of a head's keys are alike in size, read from the weights."""

from __future__ import annotations

from typing import Any

import torch

from narrows.core.errors import NarrowsError
from narrows.kv.blockfloat import Order


def order_of(weight: torch.Tensor, head_dim: int, bias: torch.Tensor | None = None) -> Order:
    """Channels of each KV head, the largest pair first.

    weight: of the key projection, (kv_heads * head_dim, width). Positions rotate channels i and
    i + head_dim / 2 into each other, so a pair is sorted by its joint norm and stays side by side.
    A bias counts as one more column.
    """
    if head_dim % 2:
        raise NarrowsError(f"heads of {head_dim} channels have no pairs to sort; give sort=False")
    squares = weight.detach().double().square().sum(1)
    if bias is not None:
        squares = squares + bias.detach().double().square()
    half = head_dim // 2
    joint = squares.reshape(-1, 2, half).sum(1)
    first = joint.argsort(dim=1, descending=True, stable=True)
    return tuple(tuple(row) for row in torch.stack([first, first + half], 2).flatten(1).tolist())


def key_orders(model: Any) -> dict[int, Order]:
    """order_of each attention layer of a transformers model, by layer."""
    found: dict[int, Order] = {}
    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "k_proj"):
            keys: Any = module.k_proj
            weight: Any = getattr(keys, "weight", None)
            if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
                raise NarrowsError(
                    f"the key projection of layer {module.layer_idx} is a {type(keys).__name__}, "
                    "whose weights cannot be read as numbers; give sort=False"
                )
            found[module.layer_idx] = order_of(weight, module.head_dim, keys.bias)
    if not found:
        raise NarrowsError(
            f"the key projections of {type(model).__name__} are not known (no k_proj), so its "
            "channels cannot be sorted; give sort=False"
        )
    return found
