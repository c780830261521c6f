"""A small random Llama, and slow written-out references to hold the cache against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import sdpa_mask


def llama(layers: int = 3, heads: int = 8, kv_heads: int = 2, seed: int = 0) -> Any:
    """recall-lm's shape, fewer layers, weights large enough for attention to be peaked."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=16,
        max_position_embeddings=2048, initializer_range=0.3, bos_token_id=1, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompt(rows: int, tokens: int, seed: int = 1) -> torch.Tensor:
    """Token ids without the padding token, (rows, tokens)."""
    return torch.randint(2, 128, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as one batch, and its attention mask."""
    width = max(row.shape[0] for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - row.shape[0] :] = row
        mask[i, width - row.shape[0] :] = 1
    return ids, mask


@contextmanager
def seeing_only(model: Any, kept: Callable[[int], torch.Tensor], tokens: int) -> Iterator[None]:
    """The model with plain masked attention: rows after the prompt see kept columns of it only.

    kept: columns (batch, kv_heads, kept) by layer index. tokens: of the prompt.
    """

    def attention(module, query, key, value, attention_mask, scaling=None, **options):
        batch, heads, rows, size = query.shape
        group = heads // key.shape[1]
        columns = torch.arange(key.shape[2])
        place = torch.arange(rows) + key.shape[2] - rows
        sees = (columns <= place[:, None]).expand(batch, heads, -1, -1).clone()
        if attention_mask is not None:
            sees &= attention_mask
        chosen = torch.zeros(batch, key.shape[1], key.shape[2], dtype=torch.bool)
        columns_kept = kept(module.layer_idx)
        for b in range(batch):
            for h in range(key.shape[1]):
                chosen[b, h, columns_kept[b, h][columns_kept[b, h] >= 0]] = True
        chosen = chosen.repeat_interleave(group, 1)[:, :, None]
        sees &= chosen | (columns >= tokens) | (place < tokens)[:, None]
        scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * size**-0.5
        weights = scores.masked_fill(~sees, -torch.inf).softmax(-1).nan_to_num()
        return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None

    AttentionInterface.register("written_out", attention)
    AttentionMaskInterface.register("written_out", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("written_out")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
