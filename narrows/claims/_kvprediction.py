"""What the claims of KV prediction share: models and baselines, tasks, OpenELM's shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch

from narrows.claims._snapkv import reference, unseen
from narrows.core.workload import Phase, Workload
from narrows.kv import _predicted
from narrows.kv.adapter import KVCache
from narrows.kv.kvprediction import WEIGHTS, KVPrediction
from narrows.kv.kvprediction_torch import KVPredictor, blocks, even, load, pruned
from narrows.kv.reading import reading
from narrows.models.recall_lm.evaluate import Share
from narrows.trace.config import TransformerConfig
from narrows.trace.llm import llm

LAYERS = (1, 2, 3)
"""Blocks of the auxiliaries that are shipped, of recall-lm's four: points on the FLOPs axis."""

CONTEXT, SCORED, WINDOWS = 1024, 64, 16
"""Tokens of a prompt of text, tokens of its continuation that are scored, and windows."""

PROMPT, PAIRS, PROMPTS = 512, 8, 64
"""Tokens of a prompt of recall, statements in it, and prompts; each asks for one."""

ROWS = 8
"""Prompts read at a time."""

Logits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Logits after a prompt and after each token of what follows, (rows, 1 + rest, vocabulary)."""


def small_model(layers: int = 3, heads: int = 8, kv_heads: int = 2, seed: int = 0) -> Any:
    """A small random Llama whose attention is peaked."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=16,
        initializer_range=0.3, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def some_predictor(model: Any, layers: int, seed: int = 0) -> KVPredictor:
    """A predictor with an auxiliary of a model's own lowest blocks, and maps drawn at random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KVPredictor(model, pruned(model, layers)).eval().requires_grad_(False)


@contextmanager
def tokens_run(model: Any) -> Iterator[list[int]]:
    """Counts of tokens that went through each block of a model, counted at the block's input."""
    layers = blocks(model)
    counts = [0] * len(layers)

    def count(i: int) -> Callable[..., None]:
        def add(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            counts[i] += hidden.shape[0] * hidden.shape[1]

        return add

    hooks = [
        layer.register_forward_pre_hook(count(i), with_kwargs=True)
        for i, layer in enumerate(layers)
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def itself(model: Any) -> Logits:
    """A model that reads its prompts itself."""

    def logits(prompt: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        with reading(model):
            held = KVCache(model.config)
            first = model(prompt, past_key_values=held, use_cache=True, logits_to_keep=1).logits
            return torch.cat([first, model(rest, past_key_values=held, use_cache=True).logits], 1)

    return logits


def predicted(model: Any, layers: int) -> Logits:
    """recall-lm over the cache that the shipped predictor gives."""
    technique = KVPrediction(layers / len(blocks(model)))

    def logits(prompt: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), technique.apply(model) as applied:
            first = applied.model(prompt, use_cache=True).logits
            then = applied.model(rest, past_key_values=applied.cache, use_cache=True).logits
            return torch.cat([first, then], 1)

    return logits


@cache
def candidates() -> Mapping[str, Logits]:
    """The whole model; and by layers: predicted, the auxiliary alone, the model cut short."""
    model, _ = reference()
    made = {"whole": itself(model)}
    for n in LAYERS:
        made[f"{n} predicted"] = predicted(model, n)
        made[f"{n} auxiliary alone"] = itself(load(WEIGHTS, model, n).auxiliary)
        made[f"{n} pruned"] = itself(pruned(model, n))
    return made


@cache
def losses() -> Mapping[str, np.ndarray]:
    """Mean loss (nats) of continuations of unseen text, (windows,) by candidate."""
    text, length = unseen(), CONTEXT + SCORED
    starts = np.linspace(0, len(text) - length, WINDOWS).astype(int)
    rows = torch.from_numpy(np.stack([text[s : s + length] for s in starts]).astype(np.int64))
    told: dict[str, np.ndarray] = {}
    for name, logits in candidates().items():
        parts = []
        for some in rows.split(ROWS):
            found = logits(some[:, :CONTEXT], some[:, CONTEXT:-1])
            each = torch.nn.functional.cross_entropy(
                found.float().transpose(1, 2), some[:, CONTEXT:], reduction="none"
            )
            parts.append(each.mean(1).numpy())
        told[name] = np.concatenate(parts)
    return told


@cache
def recalled() -> Mapping[str, Share]:
    """Answers wholly right, by candidate: one of PAIRS statements asked at a prompt's end."""
    from narrows.models.recall_lm import tasks

    _, tokenizer = reference()
    batch = tasks.pairs(
        np.random.default_rng(7), tasks.Alphabet.of(tokenizer), unseen(), PROMPT, PROMPTS, PAIRS
    )
    ids, answers = torch.from_numpy(batch.ids), torch.from_numpy(batch.answers)
    told: dict[str, Share] = {}
    for name, logits in candidates().items():
        right = 0
        for some, expected in zip(ids.split(ROWS), answers.split(ROWS), strict=True):
            said = logits(some, expected[:, :-1]).argmax(-1)
            right += int((said == expected).all(1).sum())
        told[name] = Share.of(right, PROMPTS)
    return told


def shares(tokens: int) -> dict[str, float]:
    """Operations of reading a prompt over those of the whole model, by candidate.

    An auxiliary alone, or a model cut short, is given what the predictor gets: of its last block
    only keys and values are computed, for all tokens but the last.
    """
    config = TransformerConfig.from_json(WEIGHTS.parents[2] / "models" / "recall_lm" / "weights")
    work = llm(config, tokens, 1, dtype="fp32")
    whole = float(work.flops("prefill"))
    told = {"whole": 1.0}
    for n in LAYERS:
        part = n / config.layers
        ops = _predicted.reading(work, part, 1.0)
        tensors = {name: t for _, more in ops for name, t in more.items()}
        read = Workload("read", tensors, (Phase("prefill", tuple(op for op, _ in ops)),))
        last = llm(replace(config, layers=n), tokens - 1, 1, dtype="fp32").flops("decode")
        alone = (float(read.flops("prefill")) + float(last)) / whole
        ours = float(_predicted.predicted(work, part, 1.0).flops("prefill")) / whole
        told |= {f"{n} predicted": ours, f"{n} auxiliary alone": alone, f"{n} pruned": alone}
    return told


# --- OpenELM ------------------------------------------------------------------------------------

OPENELM = {"270M": (16, 1280), "450M": (20, 1536), "1.1B": (28, 2048)}
"""Blocks and width, as apple/OpenELM-* publish them; heads of 64 channels, groups of 4."""

OPENELM_PARAMETERS = {"270M": 271_527_168, "450M": 457_179_136, "1.1B": 1_079_891_456}
"""Parameters of the published checkpoints: what the shapes written out here must give."""

VOCABULARY, HEAD, GROUP = 32000, 64, 4


def openelm(name: str) -> list[dict[str, int]]:
    """Each block's sizes by the published rule (layer-wise scaling, arXiv 2404.14619, section 2.1).

    Query heads grow from half the width to all of it, feed-forward widths from half to four times,
    both evenly by block; rounded to what divides by a group of heads, and by 256.
    """
    layers, width = OPENELM[name]

    def rounded(x: float) -> int:
        made = max(256, int(x + 128) // 256 * 256)
        return made + 256 if made < 0.9 * x else made

    found = []
    for attend, feed in zip(
        np.linspace(0.5, 1.0, layers), np.linspace(0.5, 4.0, layers), strict=True
    ):
        queries = rounded(width * round(float(attend), 2))
        found.append({
            "width": width, "queries": queries, "keys": queries // GROUP,
            "feed": rounded(width * round(float(feed), 2)),
        })  # fmt: skip
    return found


def openelm_parameters(name: str) -> int:
    """All parameters: embedding (tied), blocks, norms."""
    total = 0
    for b in openelm(name):
        total += b["width"] * (2 * b["queries"] + 2 * b["keys"]) + 3 * b["width"] * b["feed"]
        total += 2 * b["width"] + 2 * HEAD
    width = OPENELM[name][1]
    return total + VOCABULARY * width + width


def openelm_prefill(name: str, tokens: int) -> int:
    """Multiply-adds, twice, of products and causal attention of a prompt; one token's logits."""
    total = 0
    for b in openelm(name):
        weights = b["width"] * (2 * b["queries"] + 2 * b["keys"]) + 3 * b["width"] * b["feed"]
        total += 2 * tokens * weights + 2 * 2 * b["queries"] * tokens * (tokens + 1) // 2
    return total + 2 * VOCABULARY * OPENELM[name][1]


def openelm_predicted(base: str, auxiliary: str, tokens: int) -> int:
    """The auxiliary whole (as the paper counts it), the maps, and the base's last token."""
    big, small = openelm(base), openelm(auxiliary)
    total = openelm_prefill(auxiliary, tokens - 1) - 2 * VOCABULARY * OPENELM[auxiliary][1]
    for b, j in zip(big, even(len(big), len(small)), strict=True):
        total += 2 * 2 * (tokens - 1) * b["keys"] * small[j]["keys"]
        weights = b["width"] * (2 * b["queries"] + 2 * b["keys"]) + 3 * b["width"] * b["feed"]
        total += 2 * weights + 2 * 2 * b["queries"] * tokens
    return total + 2 * VOCABULARY * OPENELM[base][1]
