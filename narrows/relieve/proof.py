"""A technique on the real model: decode timed beside the dense cache, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from narrows.core.bound import Bound
from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.kv._base import KVTechnique
from narrows.measure.measured import Measured, against
from narrows.report.model import Interval, Proof, Quality
from narrows.target import Target

if TYPE_CHECKING:
    from narrows.measure.timing import Progress

ANSWERS = 128
"""Answers a quality figure of the main job rests on; claims and benchmarks use thousands."""


def part(progress: Progress | None, low: float, high: float) -> Progress | None:
    """A progress that fills a part of another."""
    if progress is None:
        return None
    return lambda done, what: progress(low + (high - low) * done, what)


def loaded(target: Target) -> Any:
    """The target's transformers model, in fp32 and ready to be read."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    assert target.path is not None, "what is proved here is a model of a folder"
    logging.disable_progress_bar()  # the job has its own
    return AutoModelForCausalLM.from_pretrained(target.path, dtype="float32").eval()


def prove(
    model: Any,
    case: Case,
    found: Bound,
    after: Bound,
    technique: KVTechnique,
    settings: str,
    notes: list[str],
    progress: Progress | None = None,
    beside: Mapping[str, KVTechnique] | None = None,
) -> tuple[Bound, Proof]:
    """Decode through the technique's cache and the dense one in turn.

    found, after: bounds of the case without and with the technique. notes: what a reader should
    know is added to. beside: others to time in the same run, by name. Returns `found` with what
    was measured, and the proof without quality figures.
    """
    from narrows.kv.adapter import ATTENTION, KVCache, hidden_states, nbytes
    from narrows.measure.generation import prompts, time_generation

    before: Any = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    facts = case.workload.facts
    ids = prompts(model.config.vocab_size, int(facts["batch"]), int(facts["prompt"]))
    caches = {
        "dense": KVCache(model.config),
        technique.key: technique.of(model).cache(model.config),
    }
    others = beside or {}
    caches |= {name: other.of(model).cache(model.config) for name, other in others.items()}
    asked = (technique, *others.values())
    # a prompt is read at once here: what is timed are steps over what is kept of it
    hooks = hidden_states(model) if any(t.needs_hidden for t in asked) else []
    try:
        ran = time_generation(model, ids, caches, progress=progress)
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)
    held = {name: float(nbytes(cache)) for name, cache in caches.items()}
    del caches
    speedup = ran.decode.speedup(technique.key, over="dense")
    dense = ran.decode["dense"].median
    phases = {"prefill": ran.prefill["dense"], "decode": dense * float(facts["generate"])}
    try:
        found = against(found, Measured(sum(phases.values()), phases))
    except NarrowsError as error:
        notes.append(f"the measured run was refused: {error}")
    proof = Proof(
        key=technique.key,
        phase="decode",
        predicted_gain=found.phase("decode").seconds / after.phase("decode").seconds,
        measured_gain=Interval(speedup.median, speedup.low, speedup.high),
        dense_seconds=dense,
        technique_seconds=ran.decode[technique.key].median,
        spread=speedup.spread,
        repeats=speedup.repeats,
        settings=settings,
        dense_bytes=held["dense"],
        technique_bytes=held[technique.key],
        peers={name: ran.decode[name].median for name in others},
        note=_beside(ran.decode, technique.key, held, list(others)),
    )
    return found, proof


def _beside(timings: Any, key: str, held: Mapping[str, float], others: list[str]) -> str:
    """How the technique compares with those timed beside it."""
    told = []
    for name in others:
        gain = timings.speedup(key, over=name)
        told.append(
            f"beside {name}: {gain.median:.2f}x as fast ({gain.low:.2f} to {gain.high:.2f}), "
            f"{held[name] / held[key]:.2f} times fewer bytes"
        )
    return "; ".join(told)


def with_recall(
    proof: Proof,
    model: Any,
    target: Target,
    technique: Any,
    prompt: int,
    progress: Progress | None = None,
) -> Proof:
    """The proof with recall of the reference model, beside simpler ways to spend the bytes."""
    from transformers import AutoTokenizer

    from narrows.kv import baselines, quality

    share = float(technique.budget(prompt)) / prompt
    kept = round(share * quality.TOKENS)
    technique = technique.of(model)
    at = getattr(technique, "at", None)  # evicting ones say what a share of other prompts is
    policies = {"dense": None, technique.key: at(share) if at and share < 1 else technique}
    spent = {"random": baselines.RandomEviction, "window only": baselines.WindowOnly}
    simpler = {name: made(kept) for name, made in spent.items()} if share < 1 else {}
    tokenizer = AutoTokenizer.from_pretrained(target.path)
    if progress:
        progress(0.0, "sampling text to hide needles in")
    haystack = quality.sampled_text(model, 32768)
    told = quality.recall(
        model, tokenizer, {**policies, **simpler}, haystack, ANSWERS,
        progress=part(progress, 0.05, 1.0),
    )  # fmt: skip

    def interval(share: Any) -> Interval:
        return Interval(share.share, share.low, share.high)

    rows = tuple(
        Quality(
            name=f"recall of {task}",
            dense=interval(shares["dense"]),
            technique=interval(shares[technique.key]),
            baselines={n: interval(shares[n]) for n in simpler},
        )
        for task, shares in told.items()
    )
    return replace(proof, quality=rows)
