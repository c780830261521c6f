"""Runs claims, judges them, and keeps the evidence."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from time import perf_counter
from types import ModuleType

from narrows import evidence
from narrows.core.claim import Claim, Inconclusive
from narrows.core.errors import NarrowsError
from narrows.evidence import Evidence, Result

QUICK = 5.0
"""Seconds up to which a claim is run by `--quick` and by the tests."""

Told = Callable[[str, Claim, Result], None]


def module(key: str) -> ModuleType:
    """The claims of a key, imported."""
    if find_spec(f"narrows.claims.{key}") is None:
        raise NarrowsError(f"{key} has no claims yet; `narrows methods` says what is built")
    return import_module(f"narrows.claims.{key}")


def claims(key: str) -> list[Claim]:
    """The claims of a key, in the order of its file."""
    return [c for c in vars(module(key)).values() if isinstance(c, Claim)]


def missing(claim: Claim) -> tuple[str, str]:
    """What a claim waits for here: (verdict, reason), empty where nothing is missing."""
    for need in claim.needs:
        if need == "gpu":
            if find_spec("torch") is None:
                return "needs-gpu", "needs a CUDA GPU and torch"
            import torch

            if not torch.cuda.is_available():
                return "needs-gpu", "needs a CUDA GPU; run scripts/gpu_queue where there is one"
        elif need == "torch" and find_spec("torch") is None:
            return "inconclusive", "needs torch; install narrows[torch]"
        elif need == "data" and not os.environ.get("NARROWS_DATA"):
            return "inconclusive", "needs measured data; set NARROWS_DATA to its folder"
    return "", ""


def judge(claim: Claim) -> Result:
    """Run one claim. Whatever its function raises becomes a result with the reason."""
    plain = Result(claim.name, claim.version, "inconclusive", None, claim.unit, claim.expected)
    verdict, reason = missing(claim)
    if verdict:
        return replace(plain, verdict=verdict, reason=reason)
    begin = perf_counter()
    try:
        figure = claim.figure()
    except Inconclusive as why:
        return replace(plain, reason=str(why), seconds=perf_counter() - begin)
    except Exception as error:
        return replace(
            plain, verdict="not-reproduced", reason=f"raised {type(error).__name__}: {error}",
            seconds=perf_counter() - begin,
        )  # fmt: skip
    holds = claim.holds(figure.value)
    reason = ""
    if not holds:
        reason = claim.explained or "the figure lies outside the tolerance; not explained yet"
    elif claim.explained:
        reason = f"passes now, but was explained as: {claim.explained}"
    return replace(
        plain, verdict="reproduced" if holds else "not-reproduced", figure=figure.value,
        interval=figure.interval, predicted=figure.predicted, details=figure.details,
        reason=reason, explained=bool(claim.explained) and not holds,
        seconds=perf_counter() - begin,
    )  # fmt: skip


def prove(
    key: str, *, quick: bool = False, fresh: bool = False, told: Told | None = None
) -> Evidence:
    """Run the claims of a key and write the evidence after each of them.

    What stands under the current fingerprint is not run again unless `fresh`; an interrupted run
    goes on where it stopped. quick: only claims that cost at most QUICK seconds.
    """
    mark = evidence.fingerprint(key)
    known: dict[str, Result] = {}
    if not fresh:
        for before in evidence.read(key):
            if before.fingerprint == mark:
                known = {r.claim: r for r in before.results}
    found = Evidence(
        key, evidence.machine(), evidence.now(), evidence.sources(key), mark, evidence.versions(),
        _commit(), shlex.join(["narrows", *sys.argv[1:]]), (),
    )  # fmt: skip
    for claim in claims(key):
        result = known.get(claim.name)
        stands = result is not None and (
            result.verdict in evidence.SETTLED or missing(claim)[0] == result.verdict
        )
        if not stands:
            if quick and claim.cost > QUICK:
                continue
            result = judge(claim)
            found = replace(found, results=(*found.results, result))
            evidence.write(replace(found, results=_merged(known, found.results)))
        else:
            assert result is not None
            found = replace(found, results=(*found.results, result))
        if told:
            told(key, claim, result)
    return found


def _merged(known: dict[str, Result], new: tuple[Result, ...]) -> tuple[Result, ...]:
    """What an interrupted run had, updated by what this one found."""
    return tuple({**known, **{r.claim: r for r in new}}.values())


def _commit() -> str:
    """The commit of a checkout, with a mark where files differ from it; empty elsewhere."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=evidence.PACKAGE, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short", "HEAD")
    return f"{head}+" if head and git("status", "--porcelain", "--", ".") else head


def verdicts(found: list[Evidence]) -> Iterator[Result]:
    """All results of several keys."""
    for one in found:
        yield from one.results


def exit_code(found: list[Evidence]) -> int:
    """0: all reproduced or explained. 1: an unexplained miss, or an explained one that passes.

    3: nothing missed, but something is inconclusive or waits for a GPU.
    """
    results = list(verdicts(found))
    alarm = any(
        (r.verdict == "not-reproduced" and not r.explained) or
        (r.verdict == "reproduced" and r.reason)
        for r in results
    )  # fmt: skip
    if alarm:
        return 1
    return 0 if all(r.verdict in evidence.SETTLED for r in results) else 3
