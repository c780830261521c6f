"""How the shipped projection was made: `python -m narrows.kv.matryoshkakv_train --out FILE`.

Principal axes of keys (positions applied) and values first, then training of them on the frozen
model: every step draws a rank of each layer, head, and of keys and values, from a quarter, half,
three quarters and all of the channels; the loss is the divergence of the logits from the frozen
model's (temperature 1), over all tokens and, as they are few, a little more over the rows that
answer questions. Keys and values are those of the frozen model: prefill is exact here, so that is
what a cache projects. Bases are `start @ cayley(X)`, X from zero: orthogonal whatever X is. The
official code adds a cross-entropy to the text; here the divergence alone is used.

Samples are texts with statements, all asked and answered at the end, of recall-lm's own training
text (the held-out tails that quality claims read are not in it), statements from seeds of their
own. Sixty steps of about six hundred tokens, where the paper has batches of 131,072.

Then the order of ranks: from all channels on, the four entries whose next eighth costs least
divergence on such samples are lowered, again and again. Resumable: what is reached lies beside
FILE and every step draws from its own seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from narrows.kv._training import remember, resumed
from narrows.kv.matryoshkakv_torch import STEPS, Projection, cayley, principal, save, spread

ATTENTION = "narrows_matryoshka_fit"
LENGTHS = (512,)
STATEMENTS = ((1, 3), (4, 3), (16, 2), (1, 6), (16, 2))
LEVELS = (0.25, 0.5, 0.75, 1.0)
WARM_UP = 0.1
SAMPLES, JUDGES = 8, 2
"""Samples of the first axes; and those that the order of ranks is searched on, shorter ones."""

TOGETHER = 4
"""Entries lowered at a time."""

ROWS = 0.2
"""Weight of the rows that answer."""

Change = Callable[[int, int, torch.Tensor], torch.Tensor]
"""What becomes of keys (0) or values (1) of a layer, (batch, kv_heads, tokens, head_dim)."""


@contextmanager
def changed(model: Any, change: Change) -> Iterator[None]:
    """The model with keys and values changed wherever attention reads them; gradients flow."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        key, value = (change(module.layer_idx, i, x) for i, x in enumerate((key, value)))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


Held = dict[tuple[int, int], torch.Tensor]
"""Keys (0) and values (1) of each layer, as the frozen model makes them."""


def projected(basis: torch.Tensor, mean: torch.Tensor, masks: torch.Tensor, held: Held) -> Change:
    """What is held, as it comes back from the channels that masks (see `spread`) keep.

    It is the frozen model's own, not what a model that reads a projected cache would make of the
    text: prefill is exact, so that is what a cache projects.
    """

    def change(layer: int, which: int, _: torch.Tensor) -> torch.Tensor:
        x = held[layer, which]
        turn, centre = basis[layer, which], mean[layer, which].unsqueeze(1)
        kept = (x - centre) @ turn * masks[layer, which].unsqueeze(1)
        return kept @ turn.transpose(1, 2) + centre

    return change


def divergence(told: torch.Tensor, wanted: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """KL(wanted || told) of logits, mean over all tokens; of `rows` a little more."""
    each = F.kl_div(told.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True)
    each = each.sum(-1)[0]
    return each.mean() + ROWS * each[rows].mean()


def samples(tokenizer: Any, text: np.ndarray, seed: tuple[int, ...], length: int = 0) -> Any:
    """A sample of a seed: text, statements, every question with its answer."""
    from narrows.kv.locret_train import sample

    rng = np.random.default_rng(seed)
    size = length or LENGTHS[int(rng.integers(len(LENGTHS)))]
    return sample(rng, tokenizer, text, size, *STATEMENTS[int(rng.integers(len(STATEMENTS)))])


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of all tokens, (1, tokens, vocabulary)."""
    return model(ids, use_cache=False).logits.float()


def watched(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, Held]:
    """The frozen model's logits, and the keys and values that it makes."""
    held: Held = {}

    def listen(layer: int, which: int, x: torch.Tensor) -> torch.Tensor:
        held[layer, which] = x
        return x

    with torch.no_grad(), changed(model, listen):
        return logits(model, ids), held


def begun(model: Any, tokenizer: Any, text: np.ndarray, seed: int = 0) -> Projection:
    """Principal axes: where training starts, and what it is held against."""
    found: dict[tuple[int, int], list[torch.Tensor]] = {}
    for i in range(SAMPLES):
        held = watched(model, samples(tokenizer, text, (seed, 95, 1, i)).ids)[1]
        for place, x in held.items():
            found.setdefault(place, []).append(x[0])
    layers = 1 + max(layer for layer, _ in found)
    both = [[principal(torch.cat(found[i, j], 1)) for j in (0, 1)] for i in range(layers)]
    mean, basis = (torch.stack([torch.stack([x[k] for x in row]) for row in both]) for k in (0, 1))
    return Projection(basis, mean, torch.empty(0, dtype=torch.int64))


def train(
    model: Any, tokenizer: Any, text: np.ndarray, steps: int = 60, seed: int = 0,
    rate: float = 5e-4, resume: Path | None = None, every: int = 25, tell: Any = None,
) -> Projection:  # fmt: skip
    """A projection trained for a model, without an order; tell(step, loss) is called on the way.

    text: tokens, int64. resume: a file that what is reached is written to `every` so many steps,
    and gone on from.
    """
    start = begun(model, tokenizer, text, seed)
    free = [torch.zeros_like(start.basis).requires_grad_(), start.mean.clone().requires_grad_()]
    optimizer = torch.optim.AdamW(free, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    begin = resumed(resume, optimizer, free)
    warm = max(1, int(WARM_UP * steps))
    size = start.mean.shape[-1]
    asked = [w.requires_grad for w in model.parameters()]
    model.requires_grad_(False)
    try:
        for step in range(begin, steps):
            given = samples(tokenizer, text, (seed, 95, 2, step))
            wanted, held = watched(model, given.ids)
            share = (steps - step) / (steps - warm)
            for group in optimizer.param_groups:
                cosine = 0.5 - 0.5 * np.cos(np.pi * min(share, 1.0))
                group["lr"] = rate * min((step + 1) / warm, cosine)
            drawn = np.random.default_rng((seed, 95, 3, step)).choice(LEVELS, start.mean.shape[:-1])
            masks = spread((drawn * size).astype(int).tolist(), size)
            basis = start.basis @ cayley(free[0])
            with changed(model, projected(basis, free[1], masks, held)):
                loss = divergence(logits(model, given.ids), wanted, given.rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if tell:
                tell(step + 1, float(loss.detach()))
            if resume and (step + 1) % every == 0:
                remember(resume, step + 1, optimizer, free)
    finally:
        for weight, wants in zip(model.parameters(), asked, strict=True):
            weight.requires_grad_(wants)
    with torch.no_grad():  # in fp64, so that what is stored is orthogonal to what fp32 tells
        basis = start.basis.double() @ cayley(free[0].double())
    return Projection(basis.float(), free[1].detach(), start.order)


def ordered(
    model: Any, tokenizer: Any, text: np.ndarray, made: Projection, seed: int = 0,
    tell: Any = None,
) -> Projection:  # fmt: skip
    """With the order in which ranks are lowered, all the way down to an eighth everywhere."""
    size, shape = made.mean.shape[-1], made.mean.shape[:-1]
    given = [samples(tokenizer, text, (seed, 95, 4, i), 256) for i in range(JUDGES)]
    ranks, order = torch.full((int(np.prod(shape)),), size), []
    with torch.inference_mode():
        seen = [watched(model, one.ids) for one in given]

        def cost(entry: int) -> float:
            tried = ranks.clone()
            tried[entry] -= size // STEPS
            masks = spread(tried.reshape(shape).tolist(), size)
            total = 0.0
            for one, (wanted, held) in zip(given, seen, strict=True):
                with changed(model, projected(made.basis, made.mean, masks, held)):
                    total += float(divergence(logits(model, one.ids), wanted, one.rows))
            return total

        while True:
            open_ = [i for i, r in enumerate(ranks.tolist()) if r > size // STEPS]
            if not open_:
                break
            costs = {i: cost(i) for i in open_}
            for best in sorted(open_, key=lambda i: costs[i])[:TOGETHER]:
                ranks[best] -= size // STEPS
                order.append(best)
                if tell:
                    tell(len(order), costs[best])
    return Projection(made.basis, made.mean, torch.tensor(order, dtype=torch.int64))


def main(arguments: list[str] | None = None) -> None:
    """Train a projection for recall-lm, search the order of its ranks, and write it."""
    from narrows.kv.locret_train import text_of
    from narrows.models import recall_lm

    parser = argparse.ArgumentParser(description="Train MatryoshkaKV's projection for recall-lm.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    model, tokenizer = recall_lm.load()
    text = text_of(tokenizer)
    part = given.out.with_suffix(f".{given.seed}-{given.steps}-{given.rate:g}.part")
    recent: list[float] = []

    def tell(step: int, value: float) -> None:
        recent.append(value)
        if step % 20 == 0:
            sys.stdout.write(f"step {step}: divergence {np.mean(recent[-20:]):.4f}\n")
            sys.stdout.flush()

    made = train(
        model, tokenizer, text, given.steps, given.seed, given.rate, resume=part, tell=tell
    )
    recent.clear()
    save(ordered(model, tokenizer, text, made, given.seed, tell), given.out, model)
    part.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
