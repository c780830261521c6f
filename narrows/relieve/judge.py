"""What a cache costs in quality: the reference model reads through it, with intervals.

Candidates are compared with the dense cache on the same text and the same questions, so that what
both get wrong does not count. Limits are held by the upper end of the 95 % interval, not its
middle: within means shown to be within.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from narrows.core.errors import NarrowsError
from narrows.kv import quality
from narrows.kv._base import KVTechnique, Policy
from narrows.measure.timing import Progress
from narrows.report.model import Interval

Z = 1.959964
"""Of 95 % of a normal distribution."""

ROWS, SCORED = 32, 256
"""Pieces of text a perplexity rests on, and tokens of each that are predicted."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is read. prompts: of 16 questions each. windows, scored: of text, in tokens."""

    prompts: int
    windows: int
    scored: int


SCREEN = Effort(prompts=8, windows=8, scored=64)
FULL = Effort(prompts=128, windows=ROWS, scored=SCORED)


class Judge:
    """Reads text and questions through candidates' caches.

    model, tokenizer: the reference model's. metrics: of METRICS. text: token ids (int64) of real
    text; None: text that the model writes itself, kept for the next time.
    """

    def __init__(
        self, model: Any, tokenizer: Any, metrics: Iterable[str], text: np.ndarray | None = None,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.metrics = model, tokenizer, tuple(metrics)
        self.length = quality.TOKENS + SCORED + 1
        self.written = text is None
        if text is None:
            text = written(model, ROWS, self.length, progress)
        if len(text) < ROWS * self.length:
            raise NarrowsError(
                f"the text has {len(text)} tokens of the reference model; to judge by it takes "
                f"at least {ROWS * self.length}"
            )
        self.text = text

    def costs(
        self,
        candidates: Mapping[str, KVTechnique],
        effort: Effort,
        progress: Progress | None = None,
    ) -> dict[str, dict[str, Interval]]:
        """By candidate and metric: the share of dense quality that is lost, with 95 % intervals."""
        ready = {name: technique.of(self.model) for name, technique in candidates.items()}
        policies: dict[str, Policy | None] = {"dense": None, **ready}
        told: dict[str, dict[str, Interval]] = {name: {} for name in candidates}
        for i, metric in enumerate(self.metrics):

            def part(done: float, what: str, i: int = i, metric: str = metric) -> None:
                if progress:
                    progress((i + done) / len(self.metrics), f"{metric}, {what}")

            if metric == "ppl":
                some = self.text[: effort.windows * self.length]
                context = self.length - 1 - effort.scored
                read = quality.losses(
                    self.model, policies, some, context, effort.scored, effort.windows, part
                )
                compare = more_perplexity
            else:
                read = quality.answered(
                    self.model, self.tokenizer, policies, self.text, effort.prompts,
                    seen=metric == "recall", progress=part,
                )  # fmt: skip
                compare = fewer_right
            for name in candidates:
                told[name][metric] = compare(read["dense"], read[name])
        return told


def student(count: int) -> float:
    """Half the width of a 95 % interval of the mean of so many readings, in standard errors.

    Student's distribution by its expansion around the normal one (Abramowitz and Stegun 26.7.5);
    within 0.1 % from eight readings on.
    """
    v = count - 1
    first = (Z**3 + Z) / 4
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / v + second / v**2 + third / v**3


def more_perplexity(dense: np.ndarray, read: np.ndarray) -> Interval:
    """The ratio of perplexities less one, from losses (nats) on the same windows, (windows,).

    Without any width where every window is read alike: then nothing was changed.
    """
    more = read - dense
    half = student(len(more)) * more.std(ddof=1) / np.sqrt(len(more))
    low, value, high = np.expm1(more.mean() + np.array([-half, 0.0, half]))
    return Interval(float(value), float(low), float(high))


def fewer_right(dense: np.ndarray, read: np.ndarray) -> Interval:
    """The share of the right answers that is lost, from (prompts, count) bool of each.

    The interval is the wider of two: of prompts as independent readings of several questions, and
    of answers with half an answer added to each cell of the paired table (Agresti and Min 2005),
    which does not collapse where both agree on everything. That the share of right answers of the
    dense cache is an estimate too is left out: it moves a loss of 1 % by some hundredths of it.
    """
    share = dense.mean()
    if not share:
        raise NarrowsError("the dense cache answers nothing: there is no quality to lose")
    lost, won = (dense & ~read).sum(), (~dense & read).sum()
    by_prompt = dense.mean(1) - read.mean(1)
    clustered = student(len(dense)) * by_prompt.std(ddof=1) / np.sqrt(len(dense))
    b, c, n = lost + 0.5, won + 0.5, dense.size + 2.0
    paired = Z * np.sqrt((b + c) - (b - c) ** 2 / n) / n
    middle, half = (lost - won) / dense.size, max(clustered, paired)
    return Interval(*(float(x / share) for x in (middle, middle - half, middle + half)))


def written(model: Any, rows: int, length: int, progress: Progress | None = None) -> np.ndarray:
    """Text the model writes itself, `rows` pieces of `length` tokens: int64, the same every time.

    Kept in the user's cache folder under what it was made from; made again where that is lost.
    """
    import platformdirs

    mark = hashlib.sha256(f"{rows} {length}".encode())
    for name, weight in sorted(model.state_dict().items()):
        mark.update(name.encode())
        mark.update(weight.contiguous().numpy().tobytes())
    file = Path(platformdirs.user_cache_dir("narrows")) / f"text-{mark.hexdigest()[:16]}.npy"
    with suppress(OSError, ValueError):  # none, or cut short: it is written again
        kept = np.load(file, allow_pickle=False)
        if kept.shape == (rows * length,) and kept.dtype == np.int64:
            return kept
    made = quality.sampled_text(model, rows * length, length=length, progress=progress)
    _keep(file, made)
    return made


def _keep(file: Path, made: np.ndarray) -> None:
    """Write wholly or not at all; a folder that cannot be written costs only the next run time."""
    beside = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    buffer = io.BytesIO()
    np.save(buffer, made, allow_pickle=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(buffer.getvalue())
        os.replace(beside, file)
    except OSError:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
