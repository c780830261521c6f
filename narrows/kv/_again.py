"""Keys and values made again from what came into attention, where they were deleted."""

from __future__ import annotations

from typing import Any

import torch

from narrows.core.errors import NarrowsError


class Recompute:
    """Makes keys and values of tokens again from what came into attention.

    model: a transformers decoder whose attention has `k_proj` and `v_proj`, with rotary positions.
    """

    def __init__(self, model: Any) -> None:
        self.rotary = next((m for n, m in model.named_modules() if n.endswith("rotary_emb")), None)
        self.layers = {
            m.layer_idx: m for m in model.modules() if hasattr(m, "layer_idx")
            and hasattr(m, "k_proj") and hasattr(m, "v_proj")
        }  # fmt: skip
        if self.rotary is None or not self.layers:
            raise NarrowsError(
                f"alisa: the projections of {type(model).__name__} are not known (k_proj, v_proj "
                "and rotary_emb are needed), so its keys cannot be made again; take a plan with "
                "beta = 0"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Recompute:
        return self

    def __call__(self, layer: int, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys beside values, (batch, kv_heads, tokens, 2 * head_dim).

        states: (batch, tokens, width); positions: (batch, tokens).
        """
        module = self.layers[layer]
        assert self.rotary is not None
        batch, tokens = positions.shape
        shape = batch, tokens, -1, module.head_dim
        keys, values = (p(states).view(shape) for p in (module.k_proj, module.v_proj))
        if hasattr(module, "k_norm"):
            keys = module.k_norm(keys)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        cos, sin = (x[:, None] for x in self.rotary(states, positions))
        turned, rest = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
        first, second = turned.chunk(2, -1)
        turned = turned * cos + torch.cat([-second, first], -1) * sin
        return torch.cat([turned, rest, values], -1)
