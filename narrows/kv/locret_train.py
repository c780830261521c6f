"""How the shipped retaining heads were trained: `python -m narrows.kv.locret_train --out FILE`.

The model is frozen. A sample is a text of up to 2,048 tokens with `{key=value}` statements (one
needle, or 4 or 16 pairs), then every question with its answer; heads learn what the answers' rows
look at. The text is recall-lm's own training text (`corpus.training`, without the held-out tails
that the quality claims read), statements are drawn from seeds of their own.

An answer is a few tokens here, thousands of samples fewer than LongAlpaca's: the row that says an
answer's first token (the mark before it) counts as a row of the answer. The width is 128 instead
of 1024, the steps are 400 instead of 3,000, the rate is 2e-3 instead of 5e-4. Resumable: what is
reached lies beside FILE and every step draws from its own seed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from narrows.kv._base import Policy, Prompt
from narrows.kv._training import remember, resumed
from narrows.kv.locret_torch import Heads, activation, fresh, inputs, labels, loss, save

STATEMENTS = ((1, 3), (4, 3), (16, 2), (1, 6), (16, 2))
LENGTHS = (512, 1024, 2048)
WARM_UP = 0.1
CLIP = 0.5


class Recorder(Policy):
    """Keeps everything, and remembers what each layer saw."""

    needs_hidden = True

    def __init__(self) -> None:
        self.seen: list[Prompt] = []

    def on_prefill_end(self, prompt: Prompt) -> None:
        """See Policy."""
        self.seen.append(prompt)


@dataclass(frozen=True)
class Sample:
    """Text, then questions with answers. rows: columns whose queries are the answers'."""

    ids: torch.Tensor
    text: int
    rows: torch.Tensor


def sample(
    rng: np.random.Generator, tokenizer: Any, haystack: np.ndarray, length: int, count: int,
    size: int,
) -> Sample:  # fmt: skip
    """A text with `count` statements of values of `size` tokens, all of them asked and answered."""
    from narrows.kv.quality import QUESTION
    from narrows.models.recall_lm import tasks

    alphabet = tasks.Alphabet.of(tokenizer)
    batch = tasks.pairs(rng, alphabet, haystack, length, count, count, size, asked=count)
    text = length - QUESTION
    pieces, rows, at = [batch.ids[0, :text]], [], text
    for ids, answer in zip(batch.ids, batch.answers, strict=True):
        pieces += [ids[text:], answer, [alphabet.close]]
        rows += range(at + QUESTION - 1, at + QUESTION + size)
        at += QUESTION + size + 1
    return Sample(torch.from_numpy(np.concatenate(pieces))[None], text, torch.tensor(rows))


def observed(model: Any, given: Sample) -> list[tuple[Prompt, torch.Tensor]]:
    """What each layer saw of a sample, and the labels of its text's tokens."""
    from narrows.kv.adapter import KVCache
    from narrows.kv.reading import reading

    recorder = Recorder()
    with reading(model, [recorder]):
        cache = KVCache(model.config, recorder)
        model(given.ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return [
            (seen, labels(seen.queries[:, :, given.rows], seen.keys[:, :, : given.text],
                          seen.scaling))
            for seen in recorder.seen
        ]  # fmt: skip


def text_of(tokenizer: Any) -> np.ndarray:
    """Tokens of the text that may be trained on."""
    from narrows.models.recall_lm import corpus

    # half a million characters of each source: thousands of different windows
    texts = [t[:500_000] for t in corpus.training().values()]
    return np.concatenate([np.array(tokenizer.encode(t), np.int64) for t in texts])


def train(
    model: Any, tokenizer: Any, haystack: np.ndarray, steps: int = 400, width: int = 128,
    seed: int = 0, rate: float = 2e-3, resume: Path | None = None, every: int = 50,
    tell: Any = None,
) -> Heads:  # fmt: skip
    """Heads trained on recall tasks in `haystack`; tell(step, loss) is called as it goes on.

    resume: a file that what is reached is written to `every` so many steps, and gone on from.
    """
    heads = fresh(model, width, seed)
    weights = [w.requires_grad_() for w in (*heads.first, *heads.second)]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95))
    begin = resumed(resume, optimizer, weights)
    warm = max(1, int(WARM_UP * steps))
    for step in range(begin, steps):
        rng = np.random.default_rng((seed, 87, step))
        length = LENGTHS[int(rng.integers(len(LENGTHS)))]
        count, size = STATEMENTS[int(rng.integers(len(STATEMENTS)))]
        given = sample(rng, tokenizer, haystack, length, count, size)
        found = observed(model, given)
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warm, (steps - step) / (steps - warm))
        total = torch.zeros(())
        for seen, wanted in found:
            assert seen.hidden is not None
            with torch.no_grad():
                x = inputs(seen.module, seen.hidden[:, : given.text].clone())
            hidden = activation(seen.module)(x @ heads.first[seen.layer].T)
            scores = (hidden @ heads.second[seen.layer].T).transpose(1, 2)
            total = total + loss(scores, wanted.clone()) / len(found)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_value_(weights, CLIP)
        optimizer.step()
        if tell:
            tell(step + 1, float(total.detach()))
        if resume and (step + 1) % every == 0:
            remember(resume, step + 1, optimizer, weights)
    return Heads(*([w.detach() for w in part] for part in (heads.first, heads.second)))


def main(arguments: list[str] | None = None) -> None:
    """Train heads for recall-lm and write them."""
    from narrows.models import recall_lm

    parser = argparse.ArgumentParser(description="Train retaining heads for recall-lm.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    model, tokenizer = recall_lm.load()
    part = given.out.with_suffix(f".{given.seed}-{given.steps}-{given.width}.part")
    mean: list[float] = []

    def tell(step: int, value: float) -> None:
        mean.append(value)
        if step % 20 == 0:
            sys.stdout.write(f"step {step} of {given.steps}: loss {np.mean(mean[-20:]):.4f}\n")
            sys.stdout.flush()

    heads = train(
        model, tokenizer, text_of(tokenizer), given.steps, given.width, given.seed,
        resume=part, tell=tell,
    )  # fmt: skip
    save(heads, given.out, model)
    part.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
