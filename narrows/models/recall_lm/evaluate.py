"""Judge recall-lm: recall with Wilson intervals and perplexity, with any cache.

``python -m narrows.models.recall_lm.evaluate DIR`` prints, and writes ``DIR/evaluation.json``. The
functions other systems use are `recall` and `perplexity`; with ``cache`` they prefill the given
cache and then decode through it token by token: what a compressed cache forgets is forgotten.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from narrows.core.errors import NarrowsError

from . import corpus, load, tasks
from .writing import KEY_TOKENS


@dataclass(frozen=True)
class Share:
    """Right answers of ``total``, their share and its 95 % Wilson interval."""

    right: int
    total: int
    share: float
    low: float
    high: float

    @staticmethod
    def of(right: int, total: int) -> Share:
        """The share and its interval."""
        z, p = 1.959964, right / total
        middle, spread = (
            p + z * z / (2 * total),
            z * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2)),
        )
        scale = 1 + z * z / total
        return Share(
            right,
            total,
            p,
            max(0.0, (middle - spread) / scale),
            min(1.0, (middle + spread) / scale),
        )

    def __str__(self) -> str:
        return f"{self.share:.1%} [{self.low:.1%}, {self.high:.1%}] of {self.total}"


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss per token (nats), over ``tokens`` tokens."""

    perplexity: float
    loss: float
    tokens: int


def answers_right(
    model,
    batch: tasks.Batch,
    cache: Callable[[], object] | None = None,
    batch_size: int = 4,
    workers: int = 1,
) -> np.ndarray:
    """Per prompt, whether every token of the greedy answer is right: bool ``(n,)``.

    With ``cache`` a fresh ``cache()`` is filled with each ``batch_size`` prompts and the answers
    are decoded through it, token by token. Without, one forward pass over prompt and answer
    decides it: a greedy answer is wholly right exactly when each of its tokens is the arg-max after
    the right ones before it; prompts that share their text (``asked`` of `tasks.pairs`) read it
    once.
    """
    import torch

    device = next(model.parameters()).device

    def judge(group: tuple[int, int]) -> np.ndarray:
        rows = slice(group[0], group[0] + group[1])
        with torch.inference_mode():
            ids = torch.from_numpy(batch.ids[rows]).to(device)
            answers = torch.from_numpy(batch.answers[rows]).to(device)
            if cache is not None:
                said = _decode(model, ids, answers.shape[1], cache())
            else:
                said = _force(model, ids, answers, shared=len(ids) > 1 and _same_text(ids))
            return (said == answers).all(1).cpu().numpy()

    groups = _groups(batch.ids, batch_size, share=cache is None)
    if workers == 1:
        return np.concatenate(list(map(judge, groups)))
    with ThreadPoolExecutor(workers) as pool:
        return np.concatenate(list(pool.map(judge, groups)))


def recall(
    model,
    batch: tasks.Batch,
    cache: Callable[[], object] | None = None,
    batch_size: int = 4,
    workers: int = 1,
) -> Share:
    """The share of prompts answered wholly right (see `answers_right`)."""
    right = answers_right(model, batch, cache, batch_size, workers)
    return Share.of(int(right.sum()), len(right))


def perplexity(
    model,
    ids: np.ndarray,
    context: int,
    cache: Callable[[], object] | None = None,
    scored: int = 64,
    windows: int = 128,
) -> Perplexity:
    """Perplexity of ``scored`` tokens a window, each predicted from ``context`` tokens or more.

    ``windows`` windows end at places spread evenly over ``ids`` that do not depend on ``context``
    (up to 4,096), so figures of two contexts are over the same tokens. A window is ``context``
    tokens, then the scored ones. With ``cache`` the context is prefilled and the scored tokens are
    decoded through it one by one.
    """
    import torch

    device = next(model.parameters()).device
    total, counted = 0.0, 0
    with torch.inference_mode():
        for window in _windows(ids, context, scored, windows):
            row = torch.from_numpy(window[None]).to(device)
            if cache is None:
                logits = model(row[:, :-1], use_cache=False, logits_to_keep=scored).logits
            else:
                store = cache()
                parts = [
                    _last(
                        model(
                            row[:, :context],
                            past_key_values=store,
                            use_cache=True,
                            logits_to_keep=1,
                        )
                    )
                ]
                for at in range(context, context + scored - 1):
                    parts.append(
                        _last(model(row[:, at : at + 1], past_key_values=store, use_cache=True))
                    )
                logits = torch.stack(parts, 1)
            total += float(
                torch.nn.functional.cross_entropy(
                    logits[0].float(), row[0, -scored:], reduction="sum"
                )
            )
            counted += scored
    return Perplexity(math.exp(total / counted), total / counted, counted)


def _windows(ids: np.ndarray, context: int, scored: int, windows: int) -> Iterator[np.ndarray]:
    first = max(context, min(4096, len(ids) - scored - windows)) + scored
    if len(ids) < first:
        raise NarrowsError(
            f"the text has {len(ids)} tokens; context {context} and {scored} scored tokens "
            f"need {first}: give more text or a shorter context."
        )
    for end in np.unique(np.linspace(first, len(ids), windows).astype(int)):
        yield np.ascontiguousarray(ids[end - scored - context : end])


QUESTION = KEY_TOKENS + 2


def _groups(ids: np.ndarray, batch_size: int, share: bool) -> Iterator[tuple[int, int]]:
    """Start and size of each group of prompts: those that share their text, else ``batch_size``."""
    at = 0
    while at < len(ids):
        size = 1
        while share and at + size < len(ids) and _same_text(ids[[at, at + size]]):
            size += 1
        size = size if size > 1 else min(batch_size, len(ids) - at)
        yield at, size
        at += size


def _same_text(ids) -> bool:
    """Whether all prompts are the same but for their question."""
    return bool((ids[1:, :-QUESTION] == ids[:1, :-QUESTION]).all())


def _force(model, ids, answers, shared: bool):
    """The arg-max at each place of the answer, given the right tokens before it: ``(n, a)``."""
    import torch
    from transformers import DynamicCache

    rows, store = torch.cat([ids, answers[:, :-1]], 1), None
    if shared:
        store = DynamicCache()
        model.model(rows[:1, : ids.shape[1] - QUESTION], past_key_values=store, use_cache=True)
        store.batch_repeat_interleave(len(ids))
        rows = rows[:, ids.shape[1] - QUESTION :]
    kept = {"logits_to_keep": answers.shape[1]}
    return model(rows, past_key_values=store, use_cache=shared, **kept).logits.argmax(-1)


def _decode(model, ids, count: int, store):
    """Greedy: ``(n, count)`` tokens after ``ids``, decoded through ``store``."""
    import torch

    said = [_last(model(ids, past_key_values=store, use_cache=True, logits_to_keep=1)).argmax(-1)]
    while len(said) < count:
        one = _last(model(said[-1][:, None], past_key_values=store, use_cache=True))
        said.append(one.argmax(-1))
    return torch.stack(said, 1)


def _last(output):
    return output.logits[:, -1]


def window_share(model, batch: tasks.Batch, budget: float, sinks: int = 4) -> Share:
    """Recall when every token sees only the first ``sinks`` and the last tokens before it.

    StreamingLLM's rule as a mask: ``budget`` (a fraction of the prompt) positions in all, in every
    layer and at every position, with the positions of the full text.
    """
    import torch

    kept = int(budget * batch.ids.shape[1])
    right = 0
    with torch.inference_mode():
        for ids, answer in zip(batch.ids, batch.answers, strict=True):
            row = torch.from_numpy(np.concatenate([ids, answer[:-1]])[None])
            length = row.shape[1]
            place = torch.arange(length)
            sees = (place[None] <= place[:, None]) & (
                (place[None] < sinks) | (place[None] > place[:, None] - (kept - sinks))
            )
            said = model(
                row, attention_mask=sees[None, None], use_cache=False, logits_to_keep=len(answer)
            ).logits.argmax(-1)[0]
            right += bool((said == torch.from_numpy(answer)).all())
    return Share.of(right, len(batch.ids))


def evaluate(
    model,
    tokenizer,
    data: str | Path | None = None,
    answers: int = 2048,
    other_answers: int = 256,
    seed: int = 1,
    workers: int = 1,
    known: dict[str, dict] | None = None,
) -> Iterator[tuple[str, dict]]:
    """The figures of the model card one by one, ``(name, figure)``, but for those ``known``.

    ``answers`` is for each figure of the gate, ``other_answers`` for each other. The haystacks are
    text the model was not trained on.
    """
    unseen = {k: np.array(tokenizer.encode(v), np.int64) for k, v in corpus.unseen(data).items()}
    haystack = np.concatenate(list(unseen.values()))
    alphabet = tasks.Alphabet.of(tokenizer)
    known = known or {}

    def prompts(kind: str, place: tuple[int, ...], length: int, n: int) -> tasks.Batch:
        rng = np.random.default_rng((seed, *place))
        if kind == "needle":
            return tasks.needle(rng, alphabet, haystack, length, n)
        if kind == "chains-2":
            return tasks.chains(rng, alphabet, haystack, length, n // 2)
        count, asked = {"pairs-8": (8, 8), "pairs-16": (16, 4)}[kind]
        return tasks.pairs(rng, alphabet, haystack, length, n, count, asked=asked)

    for name, text in unseen.items():
        for context in (64, 256, 1024, 2048):
            if (key := f"perplexity {name}@{context}") not in known:
                yield key, asdict(perplexity(model, text, context, windows=64))
    for kind in ("needle", "pairs-16"):
        if (key := f"window {kind}@2048") not in known:
            batch = prompts(kind, (7,), 2048, other_answers // 4)
            yield key, asdict(window_share(model, batch, 1 / 8))
    kinds, lengths = ("needle", "pairs-8", "pairs-16", "chains-2"), (2048, 512, 1024, 4096)
    jobs = [(kind, length) for length in lengths for kind in kinds]
    gate = [("pairs-16", 2048), ("needle", 2048)]
    rest = [job for job in jobs if job not in gate]
    for kind, length in [gate[0], *rest, gate[1]]:
        if (key := f"recall {kind}@{length}") not in known:
            n = answers if (kind, length) in gate else other_answers
            batch = prompts(kind, (length, jobs.index((kind, length))), length, n)
            yield key, asdict(recall(model, batch, workers=workers))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m narrows.models.recall_lm.evaluate", description=__doc__
    )
    parser.add_argument("folder", help="a saved model directory")
    parser.add_argument("--json", action="store_true", help="print the JSON only")
    parser.add_argument("--answers", type=int, default=2048, help="answers per figure of the gate")
    parser.add_argument("--other-answers", type=int, default=256, help="answers per other figure")
    parser.add_argument("--workers", type=int, default=1, help="threads that judge prompts")
    parser.add_argument(
        "--data", help=f"folder of the corpus (default ${corpus.ENVIRONMENT_VARIABLE})"
    )
    options = parser.parse_args(arguments)
    from rich.console import Console

    console = Console()
    file = Path(options.folder) / "evaluation.json"
    try:
        model, tokenizer = load(folder=options.folder)
        weights = (Path(options.folder) / "model.safetensors").read_bytes()
        told: dict = {
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "answers": [options.answers, options.other_answers],
            "figures": {},
        }
        before = json.loads(file.read_text()) if file.is_file() else {}
        if all(before.get(key) == told[key] for key in ("weights_sha256", "answers")):
            told["figures"] = before["figures"]
        every = evaluate(
            model,
            tokenizer,
            options.data,
            options.answers,
            options.other_answers,
            workers=options.workers,
            known=told["figures"],
        )
        for name, figure in every:
            told["figures"][name] = figure
            scratch = file.with_suffix(".json.part")
            scratch.write_text(json.dumps(told, indent=1) + "\n")
            os.replace(scratch, file)
            if not options.json:
                console.print(name, figure, highlight=False, soft_wrap=True)
    except NarrowsError as error:
        parser.error(str(error))
    if options.json:
        console.print_json(json.dumps(told))


if __name__ == "__main__":
    main()
