"""The main job: measure, bound, find, apply the best, prove it, tell the whole story."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from narrows import door
from narrows.core.bound import Bound
from narrows.core.errors import NarrowsError
from narrows.measure.measured import Measured, against
from narrows.report.model import Interval, Proof, Quality, Report
from narrows.target import REFERENCE, Target, resolve

if TYPE_CHECKING:
    from narrows.core.case import Case
    from narrows.door import Option, Progress

WORTH = 1.02
"""Least predicted gain of a request for which a technique is worth applying."""

ANSWERS = 128
"""Answers a quality figure of the main job rests on; claims and benchmarks use thousands."""


def relieve(
    model: str = REFERENCE,
    machine: str = "here",
    *,
    prompt: int = 4096,
    generate: int = 128,
    batch: int = 4,
    progress: Progress | None = None,
) -> Report:
    """Do the whole job for a model, and give the report.

    With weights at hand and machine `here` the best technique is applied and measured beside its
    prediction; for a shape, or another machine, the report ends with the prediction and says so.
    """
    target = resolve(model)
    where = door.machine(machine, progress=_part(progress, 0.0, 0.3))
    case = door.case(model, where, prompt=prompt, generate=generate, batch=batch)
    found = case.bound()
    options = door.find(case)
    best = next((o for o in options if o.gain >= WORTH), None)
    notes: list[str] = [] if not where.note else [where.note]
    after, proof = None, None
    if best is None:
        notes.append("no technique built so far would gain 2 % or more on this case")
    else:
        after = case.with_(best.technique).bound()
        if machine != "here" or not target.runnable:
            notes.append(
                "predicted, not measured: "
                + ("this machine is not at hand" if machine != "here" else "no weights were given")
            )
        else:
            found, proof = _prove(target, case, found, after, best, notes, progress)
    if progress:
        progress(1.0, "writing the report")
    return Report(
        title=f"What limits {case.workload.name} on {where.title}",
        machine=where,
        bound=found,
        facts={
            "model": case.workload.name,
            "prompt": f"{prompt} tokens",
            "generated": f"{generate} tokens",
            "batch": f"{batch} requests",
            "number format": str(case.workload.facts.get("dtype", "")),
        },
        options=options,
        technique=best.key if best else "",
        after=after,
        proof=proof,
        notes=tuple(notes),
        commands=(
            f"narrows relieve {model} --machine {machine} --prompt {prompt} "
            f"--generate {generate} --batch {batch}",
        ),
        versions=_versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def _part(progress: Progress | None, low: float, high: float) -> Progress | None:
    """A progress that fills a part of another."""
    if progress is None:
        return None
    return lambda done, what: progress(low + (high - low) * done, what)


def _prove(
    target: Target, case: Case, found: Bound, after: Bound, best: Option, notes: list[str],
    progress: Progress | None,
) -> tuple[Bound, Proof]:  # fmt: skip
    """Apply the technique for real: decode in turn with the dense cache, then the quality."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from narrows.kv._base import KVTechnique
    from narrows.kv.adapter import ATTENTION, KVCache, nbytes
    from narrows.measure.generation import prompts, time_generation

    technique = best.technique
    assert isinstance(technique, KVTechnique), "the main job proves cache techniques"
    assert target.path is not None, "what is proved here is a model of a folder"
    if progress:
        progress(0.3, "loading the model")
    logging.disable_progress_bar()  # the job has its own
    model = AutoModelForCausalLM.from_pretrained(target.path, dtype="float32").eval()
    before: Any = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    facts = case.workload.facts
    ids = prompts(model.config.vocab_size, int(facts["batch"]), int(facts["prompt"]))
    caches = {"dense": KVCache(model.config), technique.key: technique.cache(model.config)}
    ran = time_generation(model, ids, caches, progress=_part(progress, 0.32, 0.6))
    held = {name: float(nbytes(cache)) for name, cache in caches.items()}
    del caches
    model.set_attn_implementation(before)
    speedup = ran.decode.speedup(technique.key, over="dense")
    measured = Measured(
        0.0,
        {"prefill": ran.prefill["dense"],
         "decode": ran.decode["dense"].median * float(facts["generate"])},
    )  # fmt: skip
    try:
        found = against(found, Measured(sum(measured.phases.values()), measured.phases))
    except NarrowsError as error:
        notes.append(f"the measured run was refused: {error}")
    quality: tuple[Quality, ...] = ()
    if target.name == REFERENCE:
        quality = _quality(model, target, technique, int(facts["prompt"]), progress)
        notes.append(
            f"quality rests on {ANSWERS} answers a figure, in prompts of 2,048 tokens sampled from "
            "the model; the model card and the claims rest on thousands of answers in real text"
        )
    else:
        notes.append("quality was not measured: only the reference model has tasks with answers")
    proof = Proof(
        key=technique.key,
        phase="decode",
        predicted_gain=found.phase("decode").seconds / after.phase("decode").seconds,
        measured_gain=Interval(speedup.median, speedup.low, speedup.high),
        dense_seconds=ran.decode["dense"].median,
        technique_seconds=ran.decode[technique.key].median,
        spread=speedup.spread,
        repeats=speedup.repeats,
        settings=best.settings,
        dense_bytes=held["dense"],
        technique_bytes=held[technique.key],
        quality=quality,
    )
    return found, proof


def _quality(
    model: Any, target: Target, technique: Any, prompt: int, progress: Progress | None
) -> tuple[Quality, ...]:
    """Recall of the reference model: dense, the technique, and simpler ways to spend its bytes."""
    from transformers import AutoTokenizer

    from narrows.kv import baselines, quality

    share = float(technique.budget(prompt)) / prompt
    kept = round(share * quality.TOKENS)
    policies = {
        "dense": None,
        technique.key: technique.at(share),
        "random": baselines.RandomEviction(kept),
        "window only": baselines.WindowOnly(kept),
    }
    tokenizer = AutoTokenizer.from_pretrained(target.path)
    if progress:
        progress(0.6, "sampling text to hide needles in")
    haystack = quality.sampled_text(model, 32768)
    told = quality.recall(
        model, tokenizer, policies, haystack, ANSWERS, progress=_part(progress, 0.62, 0.99)
    )

    def interval(share: Any) -> Interval:
        return Interval(share.share, share.low, share.high)

    return tuple(
        Quality(
            name=f"recall of {task}",
            dense=interval(shares["dense"]),
            technique=interval(shares[technique.key]),
            baselines={n: interval(shares[n]) for n in ("random", "window only")},
        )
        for task, shares in told.items()
    )


def _versions() -> Mapping[str, str]:
    """What the figures depend on."""
    found = {"python": platform.python_version()}
    for package in ("narrows", "numpy", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
