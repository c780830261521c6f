"""Train recall-lm: ``python -m narrows.models.recall_lm.train --out DIR [--resume] [--minutes N]``.

The batch of a step is a function of (seed, stage, step) alone, and a checkpoint holds weights,
optimiser moments (safetensors) and progress (JSON), so a resumed run gives the weights of an
uninterrupted one. Ctrl-C saves and exits.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from narrows.core.errors import NarrowsError

from . import corpus, lessons, lookup, network
from .recipe import GATE_ANSWERS, RECIPES, Recipe, Stage
from .writing import Alphabet

SAVE_EVERY_SECONDS = 120.0


@dataclass
class Progress:
    """Where a run stands.

    stage, step and spent (tokens) within the stage; tokens and seconds in all; recent: [right,
    total] of the last answers by task; history: the figures of the finished stages.
    """

    stage: int = 0
    step: int = 0
    spent: int = 0
    tokens: int = 0
    seconds: float = 0.0
    recent: dict[str, list[list[int]]] = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)

    def note(self, task: str, right: int, total: int) -> None:
        """Count answers of a step; only the last `GATE_ANSWERS` or so are kept."""
        rows = self.recent.setdefault(task, [])
        rows.append([right, total])
        while sum(r[1] for r in rows[1:]) >= GATE_ANSWERS:
            rows.pop(0)

    def accuracy(self, task: str) -> tuple[float, int]:
        """Share of right answers among the last ones, and their number."""
        rows = self.recent.get(task, [])
        total = sum(r[1] for r in rows)
        return (sum(r[0] for r in rows) / total if total else 0.0), total


class Share(NamedTuple):
    """What one worker found: losses by kind, gradients, (task, right, total), tokens."""

    losses: dict[str, float]
    gradients: tuple
    answers: list[tuple[str, int, int]]
    tokens: int


class Trainer:
    """One run of a recipe in a directory."""

    def __init__(self, recipe: Recipe, out: str | Path, text: dict[str, str], device: str = "cpu"):
        self.recipe, self.out, self.device = recipe, Path(out), device
        self.out.mkdir(parents=True, exist_ok=True)
        self.progress = Progress()
        self.stopping = False
        self.pool = ThreadPoolExecutor(max(stage.workers for stage in recipe.stages))
        self.tokenizer = self._tokenizer(text)
        self.text = {k: np.array(self.tokenizer.encode(v), np.int64) for k, v in text.items()}
        self.alphabet = Alphabet.of(self.tokenizer)
        self.model = network.make_model(recipe.shape, recipe.stages[0].layers, recipe.seed)
        if recipe.draft_lookup:
            lookup.draft_lookup(self.model, recipe.seed)
        self.model.to(device)
        self.optimiser = self._optimiser()

    @property
    def stage(self) -> Stage:
        return self.recipe.stages[self.progress.stage]

    @property
    def done(self) -> bool:
        return self.progress.stage >= len(self.recipe.stages)

    def lesson(self, worker: int = 0) -> tuple[str, lessons.Lesson]:
        """A worker's share of the batch: a function of (seed, stage, step, worker) alone."""
        stage = self.stage
        place = (self.recipe.seed, self.progress.stage, self.progress.step)
        rng = np.random.default_rng(place)
        length = int(rng.choice(stage.lengths))
        if stage.workers > 1:
            rng = np.random.default_rng((*place, worker))
        shares = np.array(list(stage.mix.values()))
        task = str(rng.choice(list(stage.mix), p=shares / sum(shares)))
        names = sorted(self.text)
        weight = np.array([len(self.text[k]) for k in names]) ** 0.5
        text = self.text[names[int(rng.choice(len(names), p=weight / weight.sum()))]]
        n, a = max(1, stage.batch_tokens // (length * stage.workers)), self.alphabet
        count = int(rng.integers(stage.pairs[0], stage.pairs[1] + 1))
        if task == "copy":
            longest = min(48, length // 8)
            return task, lessons.copy_lesson(
                rng, a, length, n, (longest // 5, longest), int(rng.integers(2, 7))
            )
        if task == "pairs":
            return task, lessons.pair_lesson(rng, a, text, length, n, count, stage.values)
        if task == "needle":
            return task, lessons.pair_lesson(
                rng, a, text, length, n, 1, (4, 8), asked=1, spread=0.0
            )
        if task == "chain":
            return task, lessons.chain_lesson(
                rng, a, text, length, n, hops=2, count=max(2, count // 4)
            )
        if task == "text":
            return task, lessons.text_lesson(rng, text, length, n)
        raise NarrowsError(
            f"the stage {stage.name} asks for the task {task!r}: "
            "expected copy, pairs, needle, chain or text."
        )

    def step(self) -> dict[str, float]:
        """One optimiser step; the mean answer loss and text loss over its batch (nats a token)."""
        import torch

        for group in self.optimiser.param_groups:
            group["lr"] = self._rate()
        self.model.train()
        workers = range(self.stage.workers)
        shares = list(self.pool.map(self._share, workers) if len(workers) > 1 else [self._share(0)])
        for index, weight in enumerate(self.model.parameters()):
            weight.grad = torch.stack([share.gradients[index] for share in shares]).mean(0)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.progress.step += 1
        losses: dict[str, list[float]] = {}
        for share in shares:
            self.progress.tokens += share.tokens
            self.progress.spent += share.tokens
            for task, right, total in share.answers:
                self.progress.note(task, right, total)
            for key, loss in share.losses.items():
                losses.setdefault(key, []).append(loss)
        return {key: sum(values) / len(values) for key, values in losses.items()}

    def _share(self, worker: int) -> Share:
        """Loss and gradients of one worker's share; touches nothing of the trainer."""
        import torch

        stage = self.stage
        task, lesson = self.lesson(worker)
        length = lesson.ids.shape[1] - 1
        ids = torch.from_numpy(lesson.ids).to(self.device)
        answer = torch.from_numpy(lesson.answer[:, 1:].astype(np.int64)).to(self.device)
        text = torch.from_numpy(lesson.text[:, 1:] & (stage.text_weight > 0)).to(self.device)
        keep = (answer >= 0) | text
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            hidden = self.model.model(ids[:, :-1], use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden[keep]).float()
        losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:][keep], reduction="none")
        asked = answer[keep] >= 0
        parts = {}
        if asked.any():
            parts["answer"] = losses[asked].mean()
        if (~asked).any():
            parts["text"] = losses[~asked].mean()
        weight = {"answer": 1.0, "text": 1.0 if task == "text" else stage.text_weight}
        loss = torch.stack([weight[key] * part for key, part in parts.items()]).sum()
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        answers = []
        if asked.any():
            right = (logits.argmax(-1) == ids[:, 1:][keep])[asked]
            rows = torch.arange(len(answer), device=answer.device)[:, None].expand_as(answer)
            number = rows[keep][asked] * (int(answer.max()) + 1) + answer[keep][asked]
            _, index = number.unique(return_inverse=True)
            whole = torch.ones(int(index.max()) + 1, dtype=torch.int64, device=right.device)
            whole = whole.scatter_reduce(0, index, right.long(), "amin")
            counted = right if task == "copy" else whole
            answers = [
                (task, int(counted.sum()), len(counted)),
                (f"{task}@{length}", int(whole.sum()), len(whole)),
            ]
        tokens = lesson.ids.shape[0] * length
        return Share({k: float(v.detach()) for k, v in parts.items()}, gradients, answers, tokens)

    def advance(self) -> bool:
        """Go to the next stage if the gate is passed or the tokens are spent; true if it went."""
        import torch

        stage, progress = self.stage, self.progress
        passed = False
        if stage.gate is not None:
            share, answers = progress.accuracy(stage.gate[0])
            passed = answers >= GATE_ANSWERS and share >= stage.gate[1]
        if not passed and progress.spent < stage.max_tokens:
            return False
        progress.history.append(
            {
                "stage": stage.name,
                "layers": stage.layers,
                "lengths": stage.lengths,
                "steps": progress.step,
                "tokens": progress.spent,
                "seconds_so_far": round(progress.seconds, 1),
                "gate_passed": passed,
                "accuracy": {k: round(progress.accuracy(k)[0], 4) for k in progress.recent},
            }
        )
        progress.stage, progress.step, progress.spent, progress.recent = (
            progress.stage + 1,
            0,
            0,
            {},
        )
        if not self.done:
            if self.stage.layers != self.model.config.num_hidden_layers:
                seed = self.recipe.seed + progress.stage
                grown = network.grow(self.model, self.recipe.shape, self.stage.layers, seed)
                self.model = grown.to(self.device)
            self.optimiser = self._optimiser()
        torch.manual_seed(self.recipe.seed)
        return True

    def save(self) -> None:
        """Write the checkpoint; the JSON file, renamed last, says which weights count."""
        from safetensors.torch import save_file

        moments = {}
        names = [name for name, _ in self.model.named_parameters()]
        for index, state in self.optimiser.state_dict()["state"].items():
            for key, value in state.items():
                moments[f"{key}.{names[index]}"] = value.contiguous().clone()
        mark = f"{self.progress.stage:02d}-{self.progress.step:06d}"
        model = {k: v.contiguous().clone() for k, v in self.model.named_parameters()}
        save_file(model, self.out / f"weights-{mark}.safetensors")
        if moments:
            save_file(moments, self.out / f"moments-{mark}.safetensors")
        state = {
            "recipe": self.recipe.name,
            "mark": mark,
            "layers": self.model.config.num_hidden_layers,
            "progress": vars(self.progress),
        }
        scratch = self.out / "progress.json.part"
        scratch.write_text(json.dumps(state, indent=1))
        os.replace(scratch, self.out / "progress.json")
        for old in self.out.glob("*-??-??????.safetensors"):
            if mark not in old.name:
                old.unlink()

    def resume(self) -> None:
        """Take up the checkpoint in the directory."""
        from safetensors.torch import load_file

        file = self.out / "progress.json"
        if not file.is_file():
            raise NarrowsError(
                f"{self.out} has no checkpoint to resume: run without --resume first."
            )
        state = json.loads(file.read_text())
        self.progress = Progress(**state["progress"])
        self.model = network.make_model(self.recipe.shape, state["layers"], self.recipe.seed)
        self.model.load_state_dict(
            load_file(self.out / f"weights-{state['mark']}.safetensors"), strict=False
        )
        self.model.to(self.device)
        self.optimiser = self._optimiser()
        moments = self.out / f"moments-{state['mark']}.safetensors"
        if self.progress.step and moments.is_file():
            saved, restored = load_file(moments), self.optimiser.state_dict()
            for index, (name, _) in enumerate(self.model.named_parameters()):
                restored["state"][index] = {
                    k: saved[f"{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq")
                }
            self.optimiser.load_state_dict(restored)

    def run(self, minutes: float | None = None, report=None) -> None:
        """Train until the recipe or the minutes end, or `stopping` is set; saves as it goes."""
        began = saved = last = time.monotonic()
        while (
            not self.done
            and not self.stopping
            and not (minutes and time.monotonic() - began > 60 * minutes)
        ):
            figures = self.step()
            now = time.monotonic()
            self.progress.seconds, last = self.progress.seconds + now - last, now
            if report is not None:
                report(self, figures)
            if self.advance() or now - saved > SAVE_EVERY_SECONDS:
                self.save()
                saved = now
        self.save()

    def _rate(self) -> float:
        stage, done = self.stage, self.progress.spent / self.stage.max_tokens
        rate = stage.rate * min(1.0, (self.progress.step + 1) / max(1, stage.warmup_steps))
        if stage.decay:
            rate *= min(1.0, max(0.1, 1 - 0.9 * (done - (1 - stage.decay)) / stage.decay))
        return rate

    def _optimiser(self):
        import torch

        return torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01
        )

    def _tokenizer(self, text):
        from transformers import AutoTokenizer

        folder = self.out / "tokenizer"
        if not folder.is_dir():
            network.make_tokenizer(text.values(), self.recipe.shape.vocabulary).save_pretrained(
                folder
            )
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m narrows.models.recall_lm.train", description=__doc__
    )
    parser.add_argument(
        "--out", required=True, help="directory of checkpoints and of the final model"
    )
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="cpu")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes (resumable)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--data", help=f"folder of the corpus (default ${corpus.ENVIRONMENT_VARIABLE})"
    )
    options = parser.parse_args(arguments)
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    try:
        if not options.resume and (Path(options.out) / "progress.json").is_file():
            raise NarrowsError(f"{options.out} holds a run: give --resume or another directory.")
        corpus_text = corpus.training(options.data)
        trainer = Trainer(RECIPES[options.recipe], options.out, corpus_text, options.device)
        if options.resume:
            trainer.resume()
    except NarrowsError as error:
        parser.error(str(error))
    signal.signal(signal.SIGINT, lambda *_: setattr(trainer, "stopping", True))
    signal.signal(signal.SIGTERM, lambda *_: setattr(trainer, "stopping", True))
    with Bar(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()) as bar:
        row = bar.add_task("starting", total=1.0)
        began, first = time.monotonic(), trainer.progress.tokens

        def report(run: Trainer, figures: dict[str, float]) -> None:
            stage, p = run.stage, run.progress
            speed = (p.tokens - first) / (time.monotonic() - began)
            shares = " ".join(f"{k} {p.accuracy(k)[0]:.3f}" for k in sorted(p.recent))
            losses = " ".join(f"{k}-loss {v:.3f}" for k, v in figures.items())
            line = f"{stage.name} step {p.step} {losses} | {shares} | {speed:,.0f} tok/s"
            bar.update(row, description=line, completed=p.spent / stage.max_tokens)
            if not bar.console.is_terminal and p.step % 50 == 0:
                bar.console.print(
                    line + f" | {p.tokens:,} tokens {p.seconds:.0f} s", soft_wrap=True
                )

        trainer.run(options.minutes, report)
    if trainer.done:
        network.save(trainer.model, trainer.tokenizer, Path(options.out) / "model")


if __name__ == "__main__":
    main()
