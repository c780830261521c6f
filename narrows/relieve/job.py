"""The main job: measure, bound, find, apply the best, prove it, tell the whole story."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrows import door
from narrows.core.errors import NarrowsError
from narrows.kv._base import KVTechnique
from narrows.relieve.proof import ANSWERS, loaded, part, prove, with_recall
from narrows.relieve.stacks import can_run
from narrows.report.model import Proof, Report
from narrows.target import REFERENCE, Target, resolve

if TYPE_CHECKING:
    from narrows.core.bound import Bound
    from narrows.core.case import Case
    from narrows.core.method import Technique
    from narrows.door import Option, Progress

WORTH = 1.02
"""Least predicted gain of a request for which a technique is worth applying."""

LOAD, LOAD_OF_STACKS = (4096, 4), (8192, 8)
"""Tokens of a prompt and requests at a time where none are given: what takes two minutes here,
and what a comparison of caches needs."""


def relieve(
    model: str = REFERENCE,
    machine: str = "here",
    *,
    prompt: int | None = None,
    generate: int = 128,
    batch: int | None = None,
    within: Iterable[str] = (),
    text: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Do the whole job for a model, and give the report.

    With weights at hand and machine `here` the best technique is applied and measured beside its
    prediction; for a shape, or another machine, the report ends with the prediction and says so.
    within: limits such as `ppl=1%`: stacks of techniques are searched too, and what is applied is
    the fastest that the reference model shows to be within all of them (text: a file to judge
    perplexity by; without it the model writes its own). prompt, batch: 4096 and 4, or 8192 and 8
    where stacks are searched.
    """
    limits = list(within)
    _check(limits, text, generate)
    usual = LOAD_OF_STACKS if limits else LOAD
    prompt = usual[0] if prompt is None else prompt
    batch = usual[1] if batch is None else batch
    target = resolve(model)
    where = door.machine(machine, progress=part(progress, 0.0, 0.05 if limits else 0.3))
    case = door.case(model, where, prompt=prompt, generate=generate, batch=batch)
    found = case.bound()
    options = door.find(case)
    notes: list[str] = [] if not where.note else [where.note]
    here = machine == "here" and target.runnable
    if not here:
        notes.append(
            "predicted, not measured: "
            + ("this machine is not at hand" if machine != "here" else "no weights were given")
        )
    frontier, after, proof, applied = None, None, None, ""
    if limits:
        from narrows.relieve.within import relieved

        floor = door.case(model, where, prompt=1, generate=generate, batch=batch)
        found, after, proof, frontier, applied = relieved(
            target if here else None, case, floor, found, limits, text, notes, progress
        )
    else:
        gains = [o for o in options if o.gain >= WORTH]
        if not gains:
            notes.append("no technique built so far would gain 2 % or more on this case")
        elif here:
            found, after, proof, applied = _proved(target, case, found, gains, notes, progress)
        else:
            applied, after = gains[0].key, case.with_(gains[0].technique).bound()
    if progress:
        progress(1.0, "writing the report")
    asked = "".join(f" --within {shlex.quote(limit)}" for limit in limits)
    asked += f" --text {shlex.quote(str(text))}" if text is not None else ""
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
        technique=applied,
        after=after,
        proof=proof,
        frontier=frontier,
        notes=tuple(notes),
        commands=(
            f"narrows relieve {shlex.quote(model)} --machine {shlex.quote(machine)} "
            f"--prompt {prompt} --generate {generate} --batch {batch}{asked}",
        ),
        versions=_versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def _check(limits: list[str], text: Path | None, generate: int) -> None:
    """Raises NarrowsError for what a long job would otherwise stumble over at its end."""
    if not limits and text is not None:
        raise NarrowsError("--text is what quality is judged by: give --within ppl=1% with it")
    if not limits:
        return
    from narrows.relieve import judge
    from narrows.relieve.within import read

    judge.limits(limits)
    if generate < 1:
        raise NarrowsError("stacks of cache techniques speed decode up: give --generate 1 or more")
    if text is not None:
        read(text)


def _proved(
    target: Target, case: Case, found: Bound, gains: list[Option], notes: list[str],
    progress: Progress | None,
) -> tuple[Bound, Bound, Proof | None, str]:  # fmt: skip
    """Apply the best technique that can be for real: decode in turn with the dense cache, quality.

    gains: best first. What cannot be applied and timed here is said in the notes, and the next
    one taken; where none can, the best stays a prediction. Returns the bound with what was
    measured, the bound with the technique, the proof, and the technique's key.
    """
    if progress:
        progress(0.3, "loading the model")
    model = loaded(target)
    for best in gains:
        technique, rewritten = best.technique, case.with_(best.technique)
        after = rewritten.bound()
        refused = _refused(technique, model, found, after)
        if rewritten.machine is not case.machine:
            refused = "it needs hardware that this machine does not have"
        if not refused:
            assert isinstance(technique, KVTechnique)
            break
        told = f"{best.key} was not applied: {refused}"
        notes += [] if told in notes else [told]
    else:
        return found, case.with_(gains[0].technique).bound(), None, gains[0].key
    found, proof = prove(
        model, case, found, after, technique, best.settings, notes, part(progress, 0.32, 0.6)
    )
    if technique.chunk:
        notes.append(
            f"{technique.key} reads prompts in chunks; here a prompt was read at once, and timed "
            "are decode steps over what is kept of it"
        )
    if target.name != REFERENCE:
        notes.append("quality was not measured: only the reference model has tasks with answers")
        return found, after, proof, best.key
    prompt = int(case.workload.facts["prompt"])
    proof = with_recall(proof, model, target, technique, prompt, part(progress, 0.6, 0.99))
    notes.append(
        f"quality rests on {ANSWERS} answers a figure, in prompts of 2,048 tokens sampled from "
        "the model; the model card and the claims rest on thousands of answers in real text"
    )
    return found, after, proof, best.key


def _refused(technique: Technique, model: Any, before: Bound, after: Bound) -> str:
    """Why a technique cannot be applied and timed here; empty where it can."""
    if not isinstance(technique, KVTechnique):
        return "it is no cache that decode can be timed through, which is what is proved here"
    if after.phase("decode").seconds * WORTH > before.phase("decode").seconds:
        return "its gain is not in decode, which is what is timed here"
    try:
        can_run(technique, model)
    except NarrowsError as error:
        return str(error)
    return ""


def _versions() -> Mapping[str, str]:
    """What the figures depend on."""
    found = {"python": platform.python_version()}
    for package in ("narrows", "numpy", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
