"""Policies to compare against at equal bytes: they fill the same budget, by a simpler rule.

All keep the last `window` tokens, so that the question at the end of a prompt survives in each:
that makes them stronger than their originals, and the comparison fair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from narrows.core.errors import NarrowsError
from narrows.kv._base import Policy, Prompt

if TYPE_CHECKING:
    import torch


class RandomEviction(Policy):
    """Keeps a random choice of the earlier tokens, another one for each layer and head."""

    def __init__(self, capacity: int, window: int = 32, seed: int = 0) -> None:
        _check(capacity, window)
        self.capacity, self.window, self.seed = capacity, window, seed

    def on_prefill_end(self, prompt: Prompt) -> torch.Tensor | None:
        """See Policy."""
        import torch

        from narrows.kv.select_torch import top

        def score() -> torch.Tensor:
            made = torch.Generator().manual_seed(self.seed * 1000003 + prompt.layer)
            batch, heads, tokens = prompt.keys.shape[:3]
            shape = (batch, heads, tokens - self.window)
            return torch.rand(shape, generator=made).to(prompt.keys.device)

        return top(prompt, self.window, [self.capacity] * prompt.keys.shape[0], score)


class WindowOnly(Policy):
    """Keeps the first `sinks` tokens and the most recent ones (StreamingLLM, arXiv 2309.17453)."""

    def __init__(self, capacity: int, window: int = 32, sinks: int = 4) -> None:
        _check(capacity, window + sinks)
        self.capacity, self.window, self.sinks = capacity, window, sinks

    def on_prefill_end(self, prompt: Prompt) -> torch.Tensor | None:
        """See Policy."""
        import torch

        from narrows.kv.select_torch import top

        def score() -> torch.Tensor:
            batch, heads, tokens = prompt.keys.shape[:3]
            place = torch.arange(tokens - self.window, device=prompt.keys.device)
            place = place.float().expand(batch, heads, -1)
            if prompt.valid is None:
                return place.masked_fill(place < self.sinks, torch.inf)
            first = prompt.valid.int().argmax(1)[:, None, None]
            return place.masked_fill(place < first + self.sinks, torch.inf)

        return top(prompt, self.window, [self.capacity] * prompt.keys.shape[0], score)


class KeyNorm(Policy):
    """Keeps the tokens whose keys are shortest (arXiv 2406.11430)."""

    def __init__(self, capacity: int, window: int = 32) -> None:
        _check(capacity, window)
        self.capacity, self.window = capacity, window

    def on_prefill_end(self, prompt: Prompt) -> torch.Tensor | None:
        """See Policy."""
        from narrows.kv.select_torch import top

        def score() -> torch.Tensor:
            return -prompt.keys[:, :, : prompt.keys.shape[2] - self.window].float().norm(dim=-1)

        return top(prompt, self.window, [self.capacity] * prompt.keys.shape[0], score)


class HeavyHitters(Policy):
    """Keeps the tokens that all queries together look at most (H2O, arXiv 2306.14048).

    At the end of the prompt; the original also lets tokens go during decode.
    """

    def __init__(self, capacity: int, window: int = 32) -> None:
        _check(capacity, window)
        self.capacity, self.window = capacity, window

    def on_prefill_end(self, prompt: Prompt) -> torch.Tensor | None:
        """See Policy."""
        from narrows.kv.select_torch import all_votes, top

        return top(
            prompt, self.window, [self.capacity] * prompt.keys.shape[0],
            lambda: all_votes(prompt)[..., : prompt.keys.shape[2] - self.window],
        )  # fmt: skip


def _check(capacity: int, least: int) -> None:
    if capacity <= least:
        raise NarrowsError(f"capacity must be above {least} tokens, not {capacity}")
