"""The main job: measure, bound, find, apply the best, prove it, tell the whole story."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrows import door
from narrows.core.errors import NarrowsError
from narrows.kv._base import KVTechnique
from narrows.relieve.limits import parsed
from narrows.relieve.proof import ANSWERS, loaded, part, prove, with_recall
from narrows.report.model import Proof, Report
from narrows.target import REFERENCE, Target, resolve

if TYPE_CHECKING:
    from narrows.core.bound import Bound
    from narrows.core.case import Case
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
    within: Sequence[str] = (),
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
    limits = parsed(within)
    usual = LOAD_OF_STACKS if limits else LOAD
    prompt = usual[0] if prompt is None else prompt
    batch = usual[1] if batch is None else batch
    if text is not None and not limits:
        raise NarrowsError("--text is what --within judges by: give a limit such as ppl=1% too")
    if limits and generate < 1:
        raise NarrowsError("stacks of cache techniques speed decode up: give --generate 1 or more")
    written = None if text is None else _read(text)
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
            target if here else None, case, floor, found, limits, written, notes, progress
        )
    else:
        worth = [o for o in options if o.gain >= WORTH]
        if not worth:
            notes.append("no technique built so far would gain 2 % or more on this case")
        elif here:
            applied, found, after, proof = _proved(target, case, found, worth, notes, progress)
        else:
            applied, after = worth[0].key, case.with_(worth[0].technique).bound()
    if progress:
        progress(1.0, "writing the report")
    asked = "".join(f" --within {limit}" for limit in within)
    asked += "" if text is None else f" --text {shlex.quote(str(text))}"
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
            f"narrows relieve {model} --machine {machine} --prompt {prompt} "
            f"--generate {generate} --batch {batch}{asked}",
        ),
        versions=_versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def _read(text: Path) -> str:
    """The text to judge by; NarrowsError where it cannot be read."""
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NarrowsError(f"{text} cannot be read as text in UTF-8: {error}") from error


def _proved(
    target: Target, case: Case, found: Bound, worth: Sequence[Option], notes: list[str],
    progress: Progress | None,
) -> tuple[str, Bound, Bound | None, Proof | None]:  # fmt: skip
    """Apply the best that can be, for real: decode in turn with the dense cache, then the quality.

    worth: from the best on. Gives the key of what was applied, the bound with what was measured,
    the bound with the technique, and the proof.
    """
    if progress:
        progress(0.3, "loading the model")
    model = loaded(target)
    best = next((o for o in worth if _applies(o, model, notes)), None)
    if best is None:
        return "", found, None, None
    technique = best.technique
    assert isinstance(technique, KVTechnique)
    after = case.with_(technique).bound()
    found, proof = prove(
        model, case, found, after, technique, best.settings, notes, part(progress, 0.32, 0.6)
    )
    if target.name != REFERENCE:
        notes.append("quality was not measured: only the reference model has tasks with answers")
        return best.key, found, after, proof
    prompt = int(case.workload.facts["prompt"])
    proof = with_recall(proof, model, target, technique, prompt, part(progress, 0.6, 0.99))
    notes.append(
        f"quality rests on {ANSWERS} answers a figure, in prompts of 2,048 tokens sampled from "
        "the model; the model card and the claims rest on thousands of answers in real text"
    )
    return best.key, found, after, proof


def _applies(option: Option, model: Any, notes: list[str]) -> bool:
    """Whether this job can put a technique to work on the model; if not, why is noted."""
    technique = option.technique
    if not isinstance(technique, KVTechnique):
        notes.append(
            f"{option.key} would gain {option.gain:.2f}x; it is no technique of caches, which this "
            f"job measures: see narrows prove {option.key}"
        )
        return False
    try:
        technique.of(model).store(model.config)
    except NarrowsError as error:
        notes.append(f"{option.key} would gain {option.gain:.2f}x, but {error}")
        return False
    return True


def _versions() -> Mapping[str, str]:
    """What the figures depend on."""
    found = {"python": platform.python_version()}
    for package in ("narrows", "numpy", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
