"""Claims and their standing evidence as Markdown: the tables of the method and results pages.

Nothing here depends on the machine that writes: what stands is read from files, and judged by the
sources that it rests on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from narrows import evidence, index
from narrows.claims import prove
from narrows.core.claim import Claim
from narrows.evidence import SETTLED, Evidence, Result
from narrows.report import units, verdicts

MARKS = {"reproduced": "✓", "not-reproduced": "✗", "inconclusive": "?", "needs-gpu": "GPU"}
NOT_RUN = "not run"


@dataclass(frozen=True)
class Row:
    """A claim, and what stands of it: nothing where it was not run under the current sources."""

    claim: Claim
    result: Result | None
    evidence: Evidence | None


def rows(key: str) -> list[Row]:
    """All claims of a key in the order of its file, each with the newest result that stands."""
    origin: dict[str, tuple[Result, Evidence]] = {}
    current = evidence.sources(key)
    for found in evidence.read(key):
        if found.sources == current:
            for result in found.results:
                before = origin.get(result.claim)
                # as evidence.standing: what waits does not displace what is settled
                if before is None or result.verdict in SETTLED or before[0].verdict not in SETTLED:
                    origin[result.claim] = (result, found)
    return [Row(c, *origin.get(c.name, (None, None))) for c in prove.claims(key)]


def text(words: str) -> str:
    """Words in one line that a table's cell can hold."""
    return " ".join(words.split()).replace("|", "\\|").replace("<", "&lt;")


def name(claim: Claim) -> str:
    """The claim's name in words."""
    return claim.name.replace("_", " ")


def says(claim: Claim) -> str:
    """First sentence of the docstring, which says what the figure is."""
    told = text((claim.compute.__doc__ or "").strip().split("\n\n")[0])
    return told or name(claim)


def mark(row: Row) -> str:
    """The verdict with its mark."""
    if row.result is None:
        return NOT_RUN
    told = f"{MARKS[row.result.verdict]} {row.result.verdict.replace('-', ' ')}"
    return told + (", explained" if row.result.explained else "")


def measured(row: Row) -> str:
    """Our figure with its interval."""
    return verdicts.figure(row.result) if row.result else units.UNKNOWN


def predicted(row: Row) -> str:
    """What the bound said before, where it said something."""
    if row.result is None or row.result.predicted is None:
        return units.UNKNOWN
    return units.figures(row.result.predicted, 4)


def tolerance(claim: Claim) -> str:
    """How far a single published figure may be missed; an interval is its own tolerance."""
    if isinstance(claim.expected, tuple):
        return "the interval"
    return f"±{units.percent(claim.tolerance)}" if claim.tolerance else "none"


def table(found: list[Row]) -> list[str]:
    """The short table of a method's page."""
    lines = ["| claim | verdict | paper | here | unit |", "| --- | --- | --- | --- | --- |"]
    for row in found:
        cells = (name(row.claim), mark(row), verdicts.expected(row.claim.expected), measured(row))
        lines.append(f"| {' | '.join((*cells, text(row.claim.unit)))} |")
    return lines


def reasons(found: list[Row]) -> Iterator[str]:
    """A bullet for each claim that was not reproduced, waits, or passes unexpectedly."""
    for row in found:
        if row.result is None:
            if row.claim.explained:
                why = text(row.claim.explained)
                yield f"- *{name(row.claim)}*, not run; expected to miss: {why}"
        elif row.result.reason:
            yield f"- *{name(row.claim)}*: {text(row.result.reason)}"


def _machines(found: list[Row]) -> Iterator[str]:
    runs = {(r.evidence.machine, r.evidence.date): r.evidence for r in found if r.evidence}
    for run in runs.values():
        day = f"{run.date[:4]}-{run.date[4:6]}-{run.date[6:8]}"
        file = f"{run.machine}-{run.date}-{run.fingerprint[:8]}.json"
        versions = ", ".join(f"{n} {v}" for n, v in sorted(run.versions.items()))
        yield (
            f"Measured on `{run.machine}`, {day}, with {versions}: "
            f"[evidence](../evidence/{run.key}/{file}).\n"
        )


def summary(found: list[Row]) -> str:
    """How many claims came out how."""
    counted: dict[str, int] = {}
    for row in found:
        verdict = row.result.verdict.replace("-", " ") if row.result else NOT_RUN
        counted[verdict] = counted.get(verdict, 0) + 1
    return f"{len(found)} claims: {', '.join(f'{n} {v}' for v, n in counted.items())}."


def section(entry: index.Entry) -> list[str]:
    """All claims of a key: what was published, what came out, where that is written."""
    found = rows(entry.key)
    lines = [
        f"## {entry.key}", "",
        f"[{entry.title}](methods/{entry.key}.md). Status: **{index.status(entry)}**. "
        f"{summary(found)}", "",
        *_machines(found),
        "| claim | paper | tolerance | predicted | here | unit | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in found:
        cells = (
            name(row.claim), verdicts.expected(row.claim.expected), tolerance(row.claim),
            predicted(row), measured(row), text(row.claim.unit), mark(row),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "What each says, where it was published, and in which setting it is checked:",
        "",
    ]
    for row in found:
        lines.append(
            f"- *{name(row.claim)}* ({row.claim.how}; {text(row.claim.source)}): "
            f"{says(row.claim)} Setting: {text(row.claim.setting)}."
        )
    why = list(reasons(found))
    if why:
        lines += ["", "Why some are not reproduced, or wait:", "", *why]
    return [*lines, ""]


def page(entries: list[index.Entry]) -> str:
    """docs/results.md."""
    lines = [
        "# Results", "",
        "Every published figure that narrows checks, what came out here, and the file that says",
        "so. Written by `scripts/docs` from `narrows/claims/` and `evidence/`; run any of it again",
        "with `narrows prove KEY --fresh`.", "",
        "A result counts while the code that it rests on is unchanged; else a claim is *not run*.",
        "Intervals in brackets are 95 %. *Predicted* is what the bound said before measuring.", "",
        "| system | status | claims |", "| --- | --- | --- |",
        *(f"| [{e.key}](#{e.key}) | {index.status(e)} | {summary(rows(e.key))} |" for e in entries),
        "",
    ]  # fmt: skip
    for entry in entries:
        lines += section(entry)
    return "\n".join(lines).rstrip() + "\n"
