"""Train what predicts recall-lm's cache: `python -m narrows.kv.kvprediction_train --out FILE`.

The auxiliary is a layer-pruned copy of the model: its lowest blocks, with attention and norms of
their own. Embedding and feed-forward weights stay the model's, shared and not trained, so that a
predictor is small. The maps start as the identity. Loss, by the paper: that of the
model attending to predicted keys and values only, never to its own; plus the auxiliary's own; plus
the mean absolute error of keys and of values, summed over layers. Gradients reach the auxiliary
through all of them, the model is frozen.

Trained on recall-lm's own lessons (recall tasks and text, other seeds) in the training part of
its corpus: the held-out ends and WikiText-2 test, which quality claims read, are not seen. The
batch of a step is a function of seed and step alone, so a run that was stopped goes on with the
same command from FILE's .part and gives what an uninterrupted one gives. A file holds predictors
of several sizes: the one that is trained joins or replaces those there.

What is shipped: `--layers 1 --map 0,0,0,0 --steps 120`, `--layers 2 --map 0,1,1,1 --steps 800` and
`--layers 3 --map 0,1,2,2 --steps 150`, some 15 minutes of one core in all. These maps are not the
even ones: the auxiliary's blocks start as the model's lowest, so each is mapped to its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from narrows.core.errors import NarrowsError
from narrows.kv import kvprediction_torch as predicting
from narrows.models.recall_lm import corpus, lessons
from narrows.models.recall_lm.writing import Alphabet

LENGTHS = (256, 512, 512, 1024)
MIX = {"pairs": 0.5, "text": 0.4, "needle": 0.1}
BATCH = 2048
"""Tokens of a step."""

RATE, WARM, DECAY, CLIP = 8e-4, 0.03, 0.1, 1.0
"""Peak rate; share of the steps it rises over; the share of it that the cosine ends at."""

SAVE_EVERY = 60.0
"""Seconds between checkpoints."""


def lesson(rng: np.random.Generator, text: dict[str, np.ndarray], alphabet: Alphabet) -> Any:
    """One step's sequences: recall tasks in text, or text."""
    length = int(rng.choice(LENGTHS))
    task = str(rng.choice(list(MIX), p=list(MIX.values())))
    names = sorted(text)
    size = np.array([len(text[k]) for k in names]) ** 0.5
    ids = text[names[int(rng.choice(len(names), p=size / size.sum()))]]
    rows = max(1, BATCH // length)
    if task == "text":
        return lessons.text_lesson(rng, ids, length, rows)
    if task == "needle":
        return lessons.pair_lesson(rng, alphabet, ids, length, rows, 1, (2, 6), 1, 0.0)
    count = int(rng.integers(1, min(16, length // 32) + 1))
    return lessons.pair_lesson(rng, alphabet, ids, length, rows, count, (1, 6))


def cross_entropy(model: Any, ids: Any, taught: Any) -> Any:
    """Mean loss of answers, and half that of text, of the model as it is hooked now."""
    import torch

    answer = torch.from_numpy(taught.answer[:, 1:] >= 0)
    text = torch.from_numpy(taught.text[:, 1:])
    keep = answer | text
    hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[keep]).float()
    found = torch.nn.functional.cross_entropy(logits, ids[:, 1:][keep], reduction="none")
    asked = answer[keep]
    parts = [found[asked].mean()] if asked.any() else []
    if not asked.all():
        parts.append(found[~asked].mean() * (0.5 if parts else 1.0))
    return sum(parts)


def losses(model: Any, predictor: Any, taught: Any) -> dict[str, Any]:
    """The three losses of one step, by name."""
    import torch

    ids = torch.from_numpy(taught.ids)
    layers, small = predicting.blocks(model), predicting.blocks(predictor.auxiliary)
    with torch.autocast("cpu", torch.bfloat16):
        wanted: list[Any] = []
        with torch.no_grad(), predicting.seen(layers, wanted):
            model.model(ids[:, :-1], use_cache=False)
        cached: list[Any] = []
        with predicting.seen(small, cached):
            own = cross_entropy(predictor.auxiliary, ids, taught)
        pairs = predictor.mapped(cached)
        with predicting.given(layers, pairs):
            base = cross_entropy(model, ids, taught)
    error = sum(
        (x.float() - y.float()).abs().mean()
        for found, true in zip(pairs, wanted, strict=True)
        for x, y in zip(found, true, strict=True)
    )
    return {"base": base, "auxiliary": own, "cache": error}


class Trainer:
    """One run: a predictor, its optimiser and where it stands."""

    def __init__(
        self, layers: int, layer_map: str | tuple[int, ...], steps: int, seed: int = 0,
        data: str | None = None,
    ) -> None:  # fmt: skip
        import torch

        from narrows.models import recall_lm

        self.model, self.tokenizer = recall_lm.load()
        self.model.requires_grad_(False)
        auxiliary = predicting.pruned(self.model, layers)
        predictor = predicting.KVPredictor(self.model, auxiliary, layer_map).identity()
        self.predictor, self.steps, self.seed, self.step = predictor, steps, seed, 0
        self.named = predicting.own(predictor)
        for parameter in self.named.values():
            parameter.requires_grad_(True)
        self.optimiser = torch.optim.AdamW(
            self.named.values(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1
        )
        texts = corpus.training(data)
        self.text = {k: np.array(self.tokenizer.encode(v), np.int64) for k, v in texts.items()}
        self.alphabet = Alphabet.of(self.tokenizer)

    def advance(self) -> dict[str, float]:
        """One step; the losses by name."""
        import torch

        rng = np.random.default_rng((self.seed, 99, self.step))
        told = losses(self.model, self.predictor, lesson(rng, self.text, self.alphabet))
        self.optimiser.zero_grad()
        (told["base"] + told["auxiliary"] + told["cache"]).backward()
        torch.nn.utils.clip_grad_norm_(self.named.values(), CLIP)
        done = (self.step + 1) / self.steps
        cosine = DECAY + (1 - DECAY) * (1 + math.cos(math.pi * done)) / 2
        for group in self.optimiser.param_groups:
            group["lr"] = RATE * min(1.0, done / WARM) * cosine
        self.optimiser.step()
        self.step += 1
        return {name: float(x.detach()) for name, x in told.items()}

    def save(self, path: Path) -> None:
        """A checkpoint, whole or not at all."""
        from safetensors.torch import save_file

        kept = {n: p.detach().clone() for n, p in self.named.items()}
        names = list(self.named)
        for i, moments in self.optimiser.state_dict()["state"].items():
            kept |= {f"{k}!{names[i]}": x.clone() for k, x in moments.items()}
        scratch = path.with_name(path.name + ".new")
        save_file(kept, scratch, metadata={"step": str(self.step), "run": self.run})
        os.replace(scratch, path)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of the same run."""
        import torch
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            if header["run"] != self.run:
                raise NarrowsError(
                    f"{path} is of the run {header['run']}, this is {self.run}: give its settings, "
                    "or remove it"
                )
            self.step = int(header["step"])
            state = self.optimiser.state_dict()
            with torch.no_grad():
                for i, (name, p) in enumerate(self.named.items()):
                    p.copy_(file.get_tensor(name))
                    state["state"][i] = {
                        k: file.get_tensor(f"{k}!{name}") for k in ("step", "exp_avg", "exp_avg_sq")
                    }
            self.optimiser.load_state_dict(state)

    @property
    def run(self) -> str:
        """What a checkpoint must agree with."""
        layers = self.predictor.auxiliary.config.num_hidden_layers
        shape = {"layers": layers, "map": self.predictor.layer_map}
        return json.dumps({**shape, "steps": self.steps, "seed": self.seed})


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    import torch

    parser = argparse.ArgumentParser(
        prog="python -m narrows.kv.kvprediction_train", description=__doc__
    )
    parser.add_argument("--out", required=True, type=Path, help="file of predictors")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the auxiliary")
    parser.add_argument(
        "--map", default="even", help="layer map: even, or numbers joined by commas"
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", help=f"corpus (default ${corpus.ENVIRONMENT_VARIABLE})")
    given = parser.parse_args(arguments)
    layer_map = given.map if given.map == "even" else tuple(map(int, given.map.split(",")))
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    try:
        trainer = Trainer(given.layers, layer_map, given.steps, given.seed, given.data)
        part = given.out.with_name(f"{given.out.name}.{given.layers}.part")
        if part.is_file():
            trainer.resume(part)
    except NarrowsError as error:
        parser.error(str(error))
    began = saved = time.monotonic()
    first, recent = trainer.step, []
    while trainer.step < trainer.steps:
        recent.append(trainer.advance())
        now = time.monotonic()
        if trainer.step % 20 == 0 or trainer.step == trainer.steps:
            told = " ".join(f"{k} {np.mean([r[k] for r in recent]):.3f}" for k in recent[0])
            each = (now - began) / (trainer.step - first)
            click.echo(f"step {trainer.step} of {trainer.steps}: {told}, {each:.2f} s each")
            recent = []
        if now - saved > SAVE_EVERY:
            trainer.save(part)
            saved = now
    trainer.save(part)
    predicting.save(given.out, trainer.model, trainer.predictor)
    click.echo(f"done: {given.out}")


if __name__ == "__main__":
    main()
