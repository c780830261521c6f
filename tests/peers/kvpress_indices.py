"""Runs in the environment of kvpress: which tokens it keeps, and which we do; prints JSON.

python kvpress_indices.py [MODEL_DIRECTORY]; without one, a random model of recall-lm's shape.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import transformers
from kvpress import SnapKVPress
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from narrows.kv.adapter import stores
from narrows.kv.snapkv import SnapKV

WINDOW, KERNEL = 32, 5


def network(folder: str | None) -> Any:
    """The model of a directory, or a random one whose attention is peaked."""
    if folder:
        # in fp32: scores of 16 bits tie, and ties may fall either way
        return LlamaForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32
        ).eval()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=688, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, initializer_range=0.15,
        max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def theirs(model: Any, ids: torch.Tensor, ratio: float, mask: Any = None) -> torch.Tensor:
    """Columns kvpress keeps, (layers, batch, kv_heads, kept) ascending, from its own scores."""
    found: list[torch.Tensor] = []

    class Watched(SnapKVPress):
        def score(self, module, hidden_states, keys, values, attentions, kwargs):
            scores = super().score(module, hidden_states, keys, values, attentions, kwargs)
            kept = int(keys.shape[2] * (1 - self.compression_ratio))
            found.append(scores.topk(kept, dim=-1).indices.sort(-1).values)
            return scores

    press = Watched(compression_ratio=ratio, window_size=WINDOW, kernel_size=KERNEL)
    cache = DynamicCache()
    with torch.inference_mode(), press(model):
        model(ids, attention_mask=mask, past_key_values=cache)
    assert all(layer.keys.shape[2] == found[0].shape[-1] for layer in cache.layers)
    return torch.stack(found)


def ours(model: Any, ids: torch.Tensor, ratio: float, mask: Any = None) -> torch.Tensor:
    """Positions SnapKV keeps, (layers, batch, kv_heads, kept) ascending, -1 in front."""
    technique = SnapKV(window=WINDOW, kernel=KERNEL, ratio=ratio)
    with torch.inference_mode(), technique.apply(model) as applied:
        model(ids, attention_mask=mask)
        return torch.stack([s.positions() for s in stores(applied.cache)])


def shared(a: torch.Tensor, b: torch.Tensor) -> tuple[int, int]:
    """How many indices two choices have in common, and how many the first has."""
    common = 0
    for left, right in zip(a.flatten(0, -2).tolist(), b.flatten(0, -2).tolist(), strict=True):
        common += len(set(left) & set(right) - {-1})
    return common, int((a >= 0).sum())


def main(folder: str | None) -> None:
    """Compare on several prompts and ratios, then on a padded row."""
    model = network(folder)
    made = torch.Generator().manual_seed(1)
    rows: list[dict[str, Any]] = []
    for tokens, ratio in ((300, 0.25), (300, 0.5), (777, 0.75), (777, 0.875), (2048, 0.5)):
        ids = torch.randint(3, 1024, (2, tokens), generator=made)
        a, b = theirs(model, ids, ratio), ours(model, ids, ratio)
        common, total = shared(a, b)
        rows.append({
            "tokens": tokens, "ratio": ratio, "common": common, "total": total,
            "kept": [a.shape[-1], b.shape[-1]],
        })  # fmt: skip
    row = torch.randint(3, 1024, (1, 300), generator=made)
    padded = torch.cat([torch.zeros(1, 100, dtype=torch.long), row], 1)
    mask = (torch.arange(400) >= 100).long()[None]
    alone = ours(model, row, 0.75)
    beside = ours(model, padded, 0.75, mask)
    common, total = shared(alone, beside)
    found = {
        "transformers": transformers.__version__,
        "rows": rows,
        "padding": {
            "ours": [int((alone >= 0).sum(-1)[0, 0, 0]), int((beside >= 0).sum(-1)[0, 0, 0])],
            "ours_common": common, "ours_total": total,
            "theirs": [theirs(model, row, 0.75).shape[-1],
                       theirs(model, padded, 0.75, mask).shape[-1]],
        },
    }  # fmt: skip
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
