"""Prefill and decode of a transformers model, timed: seconds beside which a bound is held."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from narrows.measure.timing import Progress, Timings, interleave


@dataclass(frozen=True)
class Generation:
    """What was measured. prefill: seconds by candidate. decode: interleaved single steps."""

    prefill: Mapping[str, float]
    decode: Timings


def prompts(vocabulary: int, batch: int, tokens: int, seed: int = 0) -> Any:
    """Token ids to time with, (batch, tokens) int64: speed does not depend on what they say."""
    import torch

    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(1, vocabulary, (batch, tokens)))


def time_generation(
    model: Any,
    ids: Any,
    caches: Mapping[str, Any],
    repeats: int = 31,
    progress: Progress | None = None,
) -> Generation:
    """Prefill each cache with the same prompts, then time decode steps through them in turn.

    ids: (batch, tokens) int64 on the model's device. caches: empty caches by candidate's name,
    which the model's attention can read. Every step appends one token to its cache, so all
    candidates are always at the same length.
    """
    import torch

    device = str(ids.device)

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    prefill: dict[str, float] = {}
    with torch.inference_mode():
        for i, (name, cache) in enumerate(caches.items()):
            if progress:
                progress(0.5 * i / len(caches), f"prefill, {name}")
            wait()
            begin = perf_counter()
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            wait()
            prefill[name] = perf_counter() - begin
        token = ids[:, :1]

        def step(cache: Any) -> Any:
            return lambda: model(token, past_key_values=cache, use_cache=True)

        timings = interleave(
            {name: step(cache) for name, cache in caches.items()}, repeats, device=device,
            progress=None if progress is None
            else lambda done, what: progress(0.5 + 0.5 * done, f"decode, {what}"),
        )  # fmt: skip
    return Generation(prefill, timings)
