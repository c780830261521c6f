"""Prefill in chunks: a long prompt is read piece by piece, so that memory is bounded on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from narrows.core.errors import NarrowsError
from narrows.measure.timing import Progress

if TYPE_CHECKING:
    import torch


def prefill(
    model: Any,
    ids: torch.Tensor,
    cache: Any,
    chunk: int = 512,
    attention_mask: torch.Tensor | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Read a prompt into an empty cache of ours, `chunk` tokens at a time.

    ids: (batch, tokens). attention_mask: (batch, tokens), 0 on padding, which must lie on the left
    and within the first chunk. After every chunk the cache's policy may throw tokens away; what is
    packed is packed when the prompt has ended. Returns the logits of the last token, (batch,
    vocabulary). Go on with `generate` or a loop, `past_key_values=cache`.
    """
    import torch

    from narrows.kv.adapter import stores

    if not stores(cache):
        raise NarrowsError(f"a {type(cache).__name__} is not a cache of narrows; use KVCache")
    if cache.get_seq_length():
        raise NarrowsError("the cache holds tokens already; a prompt is read into an empty one")
    with torch.inference_mode():
        begin = read(model, ids, cache, chunk, attention_mask, progress)
        with in_chunks(cache, last=True):
            logits = model(
                ids[:, begin:], past_key_values=cache, use_cache=True,
                attention_mask=attention_mask, logits_to_keep=1,
            ).logits  # fmt: skip
    return logits[:, -1]


def read(
    model: Any,
    ids: torch.Tensor,
    cache: Any,
    chunk: int,
    attention_mask: torch.Tensor | None = None,
    progress: Progress | None = None,
) -> int:
    """All chunks of a prompt but the last, which begins at the column returned; see prefill."""
    if chunk < 1:
        raise NarrowsError(f"a chunk has at least one token, not {chunk!r}")
    tokens = ids.shape[1]
    if attention_mask is not None and tokens - int(attention_mask.sum(1).min()) >= chunk:
        raise NarrowsError(
            f"a row has more padding than a chunk of {chunk} tokens; give larger chunks, or rows "
            "of similar lengths"
        )
    begin = 0
    for begin in range(0, tokens - chunk, chunk):
        if progress:
            progress(begin / tokens, f"token {begin} of {tokens}")
        end = begin + chunk
        mask = None if attention_mask is None else attention_mask[:, :end]
        with in_chunks(cache, last=False):
            model(
                ids[:, begin:end], past_key_values=cache, use_cache=True,
                attention_mask=mask, logits_to_keep=1,
            )  # fmt: skip
    return begin + chunk if tokens > chunk else 0


@contextmanager
def in_chunks(cache: Any, last: bool) -> Iterator[None]:
    """The layers told that what comes is a chunk of a prompt."""
    from narrows.kv.adapter import Chunk, KVLayer

    ours = [layer for layer in cache.layers if isinstance(layer, KVLayer)]
    for layer in ours:
        layer.chunk = Chunk(last)
    try:
        yield
    finally:
        for layer in ours:
            layer.chunk = None
