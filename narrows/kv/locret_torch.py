"""Retaining heads: what they look at, what they are trained to say, and the choice they make.

All of it is torch; `locret.py` says what it is for, `locret_train.py` how shipped heads were made.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from narrows.core.errors import NarrowsError

FORMAT = "narrows-locret-1"
SMOOTHING = 0.0025
"""Weight of the smoothing loss: neighbours are to score alike."""


@dataclass(frozen=True)
class Heads:
    """One retaining head a layer: `W2 act(W1 [q; k; v])`, a number for each KV head of a token.

    first: W1 by layer, (width, (heads + 2 kv_heads) * head_dim). second: W2, (kv_heads, width).
    """

    first: Sequence[torch.Tensor]
    second: Sequence[torch.Tensor]

    @property
    def digest(self) -> str:
        """Tells heads apart, so that caches saved under others are refused."""
        told = hashlib.sha256()
        for weight in (*self.first, *self.second):
            told.update(weight.detach().float().contiguous().cpu().numpy().tobytes())
        return told.hexdigest()[:16]

    def score(self, layer: int, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Scores of tokens, (batch, kv_heads, tokens) fp32: of each token by itself alone.

        hidden: what comes into the attention `module`, (batch, tokens, width).
        """
        if layer >= len(self.first):
            raise NarrowsError(
                f"locret: there is a retaining head for {len(self.first)} layers, none for layer "
                f"{layer}; fit heads on this model"
            )
        seen = inputs(module, hidden)
        first, second = (w[layer].to(seen) for w in (self.first, self.second))
        return (activation(module)(seen @ first.T) @ second.T).transpose(1, 2)


def inputs(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Queries, keys and values of tokens side by side, before positions, fp32."""
    told = [projection(hidden) for projection in (module.q_proj, module.k_proj, module.v_proj)]
    return torch.cat(told, -1).float()


def activation(module: Any) -> Any:
    """The model's own, SiLU for a Llama."""
    from transformers.activations import ACT2FN

    return ACT2FN[getattr(module.config, "hidden_act", None) or "silu"]


def fresh(model: Any, width: int = 1024, seed: int = 0) -> Heads:
    """Untrained heads of a model's shape."""
    config = model.config.get_text_config(decoder=True)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    made = torch.Generator().manual_seed(seed)
    wide = (heads + 2 * kv_heads) * size
    shapes = ((width, wide), (kv_heads, width))
    every = [
        tuple(torch.randn(shape, generator=made) * shape[1] ** -0.5 for shape in shapes)
        for _ in range(config.num_hidden_layers)
    ]
    return Heads([w for w, _ in every], [w for _, w in every])


def labels(queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor:
    """What a head is to say of each prompt token, (batch, kv_heads, tokens) fp32.

    queries: of the answer's rows, (batch, heads, rows, head_dim); keys: of the prompt's tokens,
    (batch, kv_heads, tokens, head_dim), both with positions. The largest score before the softmax,
    over the answer's rows and the query heads that share the KV head.
    """
    batch, kv_heads, _, size = keys.shape
    asked = queries.float().reshape(batch, kv_heads, -1, size)
    return (asked @ keys.float().transpose(2, 3)).amax(2) * scaling


def loss(scores: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """SmoothL1 to the labels, and that neighbours score alike."""
    near = torch.nn.functional.smooth_l1_loss(scores, wanted)
    return near + SMOOTHING * (scores[..., 1:] - scores[..., :-1]).square().mean()


def best(scores: torch.Tensor, real: torch.Tensor, forced: int, budget: int) -> torch.Tensor | None:
    """Slots to keep, (batch, kv_heads, budget) int64 ascending, -1 in front; None to keep all.

    scores, real: (batch, kv_heads, held), whether a slot holds a token. The last `forced` slots
    stay whatever they score; of equal scores the earlier token stays.
    """
    held = scores.shape[2]
    if held <= budget:
        return None
    late = torch.arange(held, device=scores.device) >= held - forced
    ranked = scores.masked_fill(late, torch.inf).masked_fill(~real, -torch.inf)
    found = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :budget]
    return found.masked_fill(~real.gather(2, found), -1).sort(-1).values


def save(heads: Heads, path: str | os.PathLike[str], model: Any) -> None:
    """Write heads in half precision, whole or not at all; model: whose they are."""
    from safetensors.torch import save_file

    from narrows.kv.saved import fingerprint

    tensors = {
        f"{i}.{name}": weight.detach().half().contiguous()
        for name, weights in (("first", heads.first), ("second", heads.second))
        for i, weight in enumerate(weights)
    }
    path = Path(path)
    header = {"format": FORMAT, "model": fingerprint(model), "layers": str(len(heads.first))}
    with tempfile.TemporaryDirectory(prefix=path.name, dir=path.parent) as folder:
        save_file(tensors, Path(folder) / path.name, metadata=header)
        os.replace(Path(folder) / path.name, path)


def load(path: str | os.PathLike[str], model: Any) -> Heads:
    """Heads from a file; NarrowsError where there is none, or they are another model's."""
    from safetensors import SafetensorError, safe_open

    from narrows.kv.saved import fingerprint

    how = (
        "fit some: python -m narrows.kv.locret_train --out FILE, then of(model, load(FILE, model))"
    )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {n: file.get_tensor(n).float() for n in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise NarrowsError(f"there are no retaining heads at {path}; {how}") from error
    except (SafetensorError, OSError) as error:
        raise NarrowsError(f"{path} is not a whole file of retaining heads: {error}") from error
    if header.get("format") != FORMAT:
        raise NarrowsError(f"{path} is of the format {header.get('format')!r}, not {FORMAT!r}")
    if header.get("model") != fingerprint(model):
        raise NarrowsError(
            f"the retaining heads of {path} were trained for {header.get('model')}, this model is "
            f"{fingerprint(model)}; {how}"
        )
    layers = range(int(header["layers"]))
    return Heads(*([tensors[f"{i}.{name}"] for i in layers] for name in ("first", "second")))
