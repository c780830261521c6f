"""What a cache costs in quality: the reference model reads through it, with intervals.

Candidates are compared with the dense cache on the same text and the same questions, so that what
both get wrong does not count. Limits are held by the upper end of the interval, not its middle:
within means shown to be within. A candidate is looked at several times, each time with more read;
its intervals hold 95 % of the time over all looks together.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import pi, sqrt, tan
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from narrows.core.errors import NarrowsError, unknown
from narrows.kv import quality
from narrows.kv._base import KVTechnique, Policy
from narrows.measure.timing import Progress
from narrows.report.model import Interval

METRICS: Mapping[str, str] = {
    "ppl": "more perplexity, read through the cache",
    "recall": "fewer right answers of 16 pairs of 2 tokens, the question at the prompt's end",
    "later": "fewer right answers where the question comes after the prompt was compressed",
}
"""What can be limited; all as a fraction of what the dense cache reaches."""

DENSE = "dense"

CONFIDENCE = 0.95
"""Of all looks at a candidate together: each look's interval is wider, so that looking again and
stopping at will does not make a verdict likelier by chance (Bonferroni)."""

BLOCK = 8
"""Prompts, or pieces of text, that are read at a time; a reading is made of whole blocks."""

ROWS, SCORED = 32, 128
"""Pieces of text a perplexity rests on, and tokens of each that are predicted."""

RESOLUTION = 1e-5
"""Nats to which a mean loss is read: logits of about ten have an fp32 error of 1e-6, and sums in
another order change several of them. No interval is narrower than this much spread gives."""

NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)(e-?\d+)?(%?)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is read. prompts: of 16 questions each. windows: of text, SCORED tokens each."""

    prompts: int
    windows: int


LOOKS = (Effort(prompts=8, windows=8), Effort(prompts=32, windows=16),
         Effort(prompts=128, windows=ROWS))  # fmt: skip
"""From a screening to the whole; what was read stays, and later looks add to it."""


def limits(given: Iterable[str]) -> dict[str, float]:
    """`ppl=1%` or `recall=0.01` to fractions.

    Raises NarrowsError for an unknown metric, one that is given twice, and what is no share
    from 0 up.
    """
    found: dict[str, float] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if name not in METRICS:
            raise unknown("measure of quality", name, METRICS)
        read = NUMBER.fullmatch(value)
        share = float(value.removesuffix("%")) / (100 if read[3] else 1) if read else -1.0
        if not equals or not 0 <= share < 10:
            raise NarrowsError(
                f"--within takes a share from 0 up, {name}=1% or {name}=0.01, not {text!r}"
            )
        if name in found:
            raise NarrowsError(f"--within gives {name} twice; give one limit for each measure")
        found[name] = share
    return found


class Judge:
    """Reads text and questions through candidates' caches, and remembers what it read.

    model, tokenizer: the reference model's. metrics: of METRICS. text: token ids (int64) of real
    text; None: text that the model writes itself, kept for the next time.
    """

    def __init__(
        self, model: Any, tokenizer: Any, metrics: Iterable[str], text: np.ndarray | None = None,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.metrics = model, tokenizer, tuple(metrics)
        self.length = quality.TOKENS + 1
        self.written = text is None
        if text is None:
            text = written(model, ROWS, self.length, progress)
        pieces = len(text) // self.length
        if pieces < ROWS:
            raise NarrowsError(
                f"the text has {len(text)} tokens of the reference model; to judge by it takes "
                f"at least {ROWS * self.length}"
            )
        # spread over the whole text, in an order that no early look sees only its beginning
        chosen = np.random.default_rng(0).permutation(np.linspace(0, pieces - 1, ROWS).astype(int))
        self.text = text[: pieces * self.length].reshape(pieces, self.length)[chosen]
        self._read: dict[tuple[str, str, int], np.ndarray] = {}
        self._ready: dict[str, Policy | None] = {DENSE: None}

    def costs(
        self,
        candidates: Mapping[str, KVTechnique],
        effort: Effort,
        limits: Mapping[str, float],
        progress: Progress | None = None,
    ) -> dict[str, dict[str, Interval]]:
        """By candidate and metric: the share of dense quality that is lost, with intervals.

        limits: by metric; one that is shown to be outside a limit is not read for the metrics that
        follow. Candidates of one call share the reading of prompts; what was read of one before is
        not read again.
        """
        for name, technique in candidates.items():
            if name not in self._ready:
                self._ready[name] = technique.of(self.model)
        told: dict[str, dict[str, Interval]] = {name: {} for name in candidates}
        count = {m: self._blocks(m, effort) for m in self.metrics}
        done, every = 0, sum(count.values())
        names = list(candidates)
        for metric in self.metrics:
            for block in range(count[metric]):
                if progress:
                    progress(done / every, f"{metric} of {len(names)}, reading {block + 1}")
                self._reads(metric, block, names)
                done += 1
            compare = more_perplexity if metric == "ppl" else fewer_right
            dense = self._all(DENSE, metric, count[metric])
            for name in names:
                told[name][metric] = compare(
                    dense, self._all(name, metric, count[metric]), 1 - (1 - CONFIDENCE) / len(LOOKS)
                )
            names = [n for n in names if told[n][metric].low <= limits[metric]]
            if not names:
                break
        return told

    def _blocks(self, metric: str, effort: Effort) -> int:
        return -(-(effort.windows if metric == "ppl" else effort.prompts) // BLOCK)

    def _all(self, name: str, metric: str, blocks: int) -> np.ndarray:
        return np.concatenate([self._read[name, metric, block] for block in range(blocks)])

    def _reads(self, metric: str, block: int, names: Iterable[str]) -> None:
        """Read a block through the caches that have not read it yet, the dense one among them."""
        policies = {
            name: self._ready[name]
            for name in (DENSE, *names)
            if (name, metric, block) not in self._read
        }
        if not policies:
            return
        if metric == "ppl":
            some = self.text[block * BLOCK : (block + 1) * BLOCK]
            context = self.length - 1 - SCORED
            read = quality.losses(
                self.model, policies, some.reshape(-1), context, SCORED, len(some)
            )
        else:
            read = quality.answered(
                self.model, self.tokenizer, policies, self.text.reshape(-1), BLOCK, seed=block,
                seen=metric == "recall",
            )  # fmt: skip
        self._read.update({(name, metric, block): found for name, found in read.items()})


def student(confidence: float, freedom: int) -> float:
    """How many standard errors hold the share `confidence` of Student's t, both sides.

    Exact for 1 and 2 degrees of freedom; above, Fisher's expansion, to 1 % at 3 and 0.01 % at 7.
    """
    share = (1 + confidence) / 2
    if freedom < 1:
        raise ValueError(f"an interval takes two readings or more: {freedom + 1} given")
    if freedom == 1:
        return tan(pi * (share - 0.5))
    if freedom == 2:
        return (2 * share - 1) * sqrt(1 / (2 * share * (1 - share)))
    z, n = NormalDist().inv_cdf(share), float(freedom)
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )


def more_perplexity(
    dense: np.ndarray, read: np.ndarray, confidence: float = CONFIDENCE
) -> Interval:
    """The ratio of perplexities less one, from losses (nats) on the same windows, (windows,).

    Student's t, for windows are few; a spread below what a reading resolves counts as that much.
    """
    more = read - dense
    spread = max(float(more.std(ddof=1)), RESOLUTION)
    half = student(confidence, len(more) - 1) * spread / np.sqrt(len(more))
    low, value, high = np.expm1(more.mean() + np.array([-half, 0.0, half]))
    return Interval(float(value), float(low), float(high))


def fewer_right(dense: np.ndarray, read: np.ndarray, confidence: float = CONFIDENCE) -> Interval:
    """The share of the right answers that is lost, from (prompts, count) bool of each.

    The interval is the wider of two: of prompts as independent readings of several questions
    (Student's t), and of answers with half an answer added to each cell of the paired table
    (Agresti and Min 2005), which does not collapse where both agree on everything. What is lost is
    divided by what the dense cache answers, which is uncertain too: the delta method in both.
    """
    answers, prompts = dense.size, len(dense)
    share = float(dense.mean())
    if not share:
        raise NarrowsError("the dense cache answers nothing: there is no quality to lose")
    lost = float((dense & ~read).sum()), float((~dense & read).sum())
    middle = (lost[0] - lost[1]) / answers / share
    spread = ((1 - middle) * dense.mean(1) - read.mean(1)).std(ddof=1)
    clustered = student(confidence, prompts - 1) * spread / np.sqrt(prompts)
    b, c, n = lost[0] + 0.5, lost[1] + 0.5, answers + 2.0
    paired = ((b + c) - (b - c) ** 2 / n) / n**2 + middle**2 * share * (1 - share) / answers
    half = max(clustered, NormalDist().inv_cdf((1 + confidence) / 2) * sqrt(paired)) / share
    return Interval(middle, float(middle - half), float(middle + half))


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
    with suppress(OSError, ValueError, EOFError):  # none, or cut short: it is written again
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
        with suppress(OSError):  # no folder there, or a file in its place: nothing to take away
            beside.unlink()
