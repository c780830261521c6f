"""Relief within limits of quality: search stacks, apply the best, time it beside the others."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from narrows.core.bound import Bound
from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.kv._base import KVTechnique
from narrows.relieve.judge import LOOKS, METRICS, SCORED, Judge, limits
from narrows.relieve.proof import loaded, part, prove
from narrows.relieve.search import Found, Judged, search
from narrows.relieve.stacks import Priced, priced
from narrows.report import units, words
from narrows.report.model import Candidate, Frontier, Proof
from narrows.target import REFERENCE, Target, resolve

if TYPE_CHECKING:
    from narrows.measure.timing import Progress

FEWER, FASTER = 2.0, 1.3
"""What a stack should gain over the best single technique to be worth its two parts."""


def relieved(
    target: Target | None, case: Case, floor: Case, found: Bound, given: list[str],
    text: Path | None, notes: list[str], progress: Progress | None,
) -> tuple[Bound, Bound | None, Proof | None, Frontier, str]:  # fmt: skip
    """Search, choose, and where the target can be run apply and time.

    target: None where nothing is to be run. floor: the same load with next to no prompt, so that
    what its decode takes is what no cache technique can save. given: limits as text. notes: are
    added to. Returns the bound with what was measured, the bound of the chosen, the proof, the
    frontier, and the key of what was applied.
    """
    within = limits(given)
    if progress:
        progress(0.06, "loading the reference model")
    reference = resolve(REFERENCE)
    model, judge = _judge(reference, within, text, part(progress, 0.06, 0.15))
    chosen = model if target is None or target.name == REFERENCE else loaded(target)
    end = 0.8 if target is not None else 0.99
    told = search(case, judge, within, part(progress, 0.15, end), models=[chosen])
    best = told.best
    frontier = _frontier(told, case, priced(floor), judge)
    notes.append(
        "quality is that of the reference model, in prompts of 2,048 tokens; "
        + ("perplexity is of text that it wrote itself" if judge.written else f"text: {text}")
    )
    if best is None:
        return found, None, None, frontier, ""
    after, technique = best.priced.bound, best.priced.technique
    assert technique is not None
    if target is None:
        return found, after, None, frontier, technique.key
    other = told.single if best is told.stack else told.stack
    beside: dict[str, KVTechnique] = {}
    if other is not None and other.priced.technique is not None:
        beside[other.priced.name] = other.priced.technique
    _, _, settings = best.priced.name.partition(":") if not best.priced.stacked else ("", "", "")
    found, proof = prove(
        chosen, case, found, after, technique, settings, notes, part(progress, 0.8, 0.99), beside
    )
    if best.priced.stacked:
        proof = replace(proof, key=best.priced.name)
    return found, after, proof, frontier, technique.key


def _judge(
    reference: Target, within: dict[str, float], text: Path | None, progress: Progress | None
) -> tuple[Any, Judge]:
    """The reference model, and the judge that reads with it."""
    from transformers import AutoTokenizer

    model = loaded(reference)
    tokenizer = AutoTokenizer.from_pretrained(reference.path)
    ids = None
    if text is not None:
        ids = np.asarray(tokenizer(read(text))["input_ids"], np.int64)
    return model, Judge(model, tokenizer, within, ids, progress)


def read(text: Path) -> str:
    """A file as UTF-8; one that ends in .gz is unpacked.

    Raises NarrowsError where it cannot be read so.
    """
    try:
        written = text.read_bytes()
        return (gzip.decompress(written) if text.suffix == ".gz" else written).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise NarrowsError(f"{text} cannot be read as text in UTF-8: {error}") from error


def _frontier(told: Found, case: Case, floor: Priced, judge: Judge) -> Frontier:
    """What is drawn and said of a search."""
    dense = Candidate(
        "dense", False, told.dense.bytes, told.dense.seconds, told.dense.tokens_per_second, {},
        "dense", True,
    )  # fmt: skip

    def named(found: Judged | None) -> str:
        return "" if found is None else found.priced.name

    most = LOOKS[-1]
    candidates = (dense, *(_candidate(j) for j in told.judged))
    return Frontier(
        limits=told.limits,
        measures={name: METRICS[name] for name in told.limits},
        candidates=candidates,
        best=named(told.best),
        single=named(told.single),
        stack=named(told.stack),
        told=tuple(_sentences(told, floor)),
        judged=f"up to {most.prompts * 16:,} answers and {most.windows * SCORED:,} tokens of text"
        + (" that the model wrote" if judge.written else ""),
        left=dict(told.left),
        most=floor.tokens_per_second,
        error=told.dense.error,
    )


def _candidate(judged: Judged) -> Candidate:
    p = judged.priced
    return Candidate(
        p.name, p.stacked, p.bytes, p.seconds, p.tokens_per_second, judged.costs, judged.verdict,
        judged.thorough,
    )  # fmt: skip


def _sentences(told: Found, floor: Priced) -> list[str]:
    """What came of it: the choice, the stack beside the best single one, and why not more."""
    asked = ", ".join(f"{n} {units.percent(v)}" for n, v in told.limits.items())
    dense, single, stack, best = told.dense, told.single, told.stack, told.best
    if best is None:
        return [f"Nothing that was tried is shown to be within {asked} of the dense cache."]
    chosen = best.priced
    said = [
        f"Within {asked} of the dense cache, {chosen.name} decodes fastest: "
        f"{units.times(dense.seconds / chosen.seconds)} as fast as dense and "
        f"{units.times(dense.bytes / chosen.bytes)} fewer bytes (predicted)."
    ]
    most = dense.seconds / floor.seconds
    if single is None:
        said.append("No single technique that was tried is shown to be within.")
        return said
    least = (
        f"a step with next to nothing in its cache would take {units.seconds(floor.seconds)}, "
        f"so no cache can decode more than {units.times(most)} as fast as the dense one"
    )
    if stack is None:
        said.append(
            f"No stack is shown to be within: beside {single.priced.name} alone, what the other "
            f"part loses comes on top. {least[0].upper()}{least[1:]}."
        )
        return said
    fewer = single.priced.bytes / stack.priced.bytes
    faster = single.priced.seconds / stack.priced.seconds
    said.append(
        f"The best single technique within is {single.priced.name}; the stack "
        f"{stack.priced.name} holds {units.times(fewer)} fewer bytes than it and decodes "
        f"{units.times(faster)} as fast."
    )
    if fewer < FEWER or faster < FASTER:
        why = _short(told, single, single.priced.seconds / floor.seconds)
        said.append(
            f"That is not {units.times(FEWER)} and {units.times(FASTER)}: {why}; {least}, and "
            f"{units.times(single.priced.seconds / floor.seconds)} as fast as {single.priced.name}."
        )
    return said


def _short(told: Found, single: Judged, room: float) -> str:
    """Why no stack gains as much as it should: it cannot, or those that do lose too much."""
    if room < FASTER:
        return f"no cache could be {units.times(FASTER)} as fast as that one"
    enough = [
        j
        for j in told.judged
        if j.priced.stacked
        and single.priced.bytes / j.priced.bytes >= FEWER
        and single.priced.seconds / j.priced.seconds >= FASTER
    ]
    if not enough:
        return "none that was read would be, as predicted"
    near = min(enough, key=lambda j: max(c.value / told.limits[m] if told.limits[m] else c.value
                                         for m, c in j.costs.items()))  # fmt: skip
    lost = ", ".join(f"{m} {words.cost(c)}" for m, c in near.costs.items())
    return f"of those that would be, {near.priced.name} loses least ({lost}: {near.verdict})"
