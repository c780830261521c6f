"""Claims on a terminal: each as it is judged, and all of them counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import isinf
from typing import TYPE_CHECKING

from rich.text import Text

from narrows.report import units
from narrows.report.tables import WIDE, grid, plain, say

if TYPE_CHECKING:
    from rich.console import Console

    from narrows.core.claim import Claim
    from narrows.evidence import Result

STYLES = {"reproduced": "bold green", "not-reproduced": "bold red"}
"""The verdicts that are settled; the others are plain."""


def expected(given: float | tuple[float, float]) -> str:
    """What was published: a figure, or an interval that may be open."""
    if not isinstance(given, tuple):
        return units.figures(given, 4)
    low, high = given
    if isinf(low) and isinf(high):
        return "any figure"
    if isinf(high):
        return f"at least {units.figures(low)}"
    if isinf(low):
        return f"at most {units.figures(high)}"
    return f"{units.figures(low)} to {units.figures(high)}"


def figure(result: Result) -> str:
    """What came out here, with its interval."""
    if result.figure is None:
        return units.UNKNOWN
    told = units.figures(result.figure, 4)
    if result.interval is not None:
        told += f" {units.span(*result.interval)}"
    return told


def _style(result: Result) -> str:
    return "bold" if result.explained else STYLES.get(result.verdict, "")


def claim_teller(console: Console) -> Callable[[str, Claim, Result], None]:
    """A function that tells each claim as soon as it is judged."""

    def tell(key: str, claim: Claim, result: Result) -> None:
        head = Text(f"{key}: {claim.name.replace('_', ' ')}: ")
        head.append(result.verdict.replace("-", " "), style=_style(result))
        if result.explained:
            head.append(", explained")
        if result.figure is not None:
            head.append(f", {figure(result)} {result.unit} (published {expected(claim.expected)})")
        console.print(head)
        if result.reason:
            say(console, f"    {result.reason}")

    return tell


def verdicts(console: Console, results: Sequence[Result]) -> None:
    """All claims in a table, then how many came out how."""
    wide = console.width >= WIDE
    table = grid("claim", "verdict", "here", "published", *(["unit"] if wide else []))
    for result in results:
        verdict = Text(result.verdict.replace("-", " "), style=_style(result))
        cells = (result.claim.replace("_", " "), verdict, figure(result), expected(result.expected))
        table.add_row(*plain(*cells, *([result.unit] if wide else [])))
    console.print()
    console.print(table)
    counted = Counter(r.verdict for r in results)
    parts = [f"{n} {verdict.replace('-', ' ')}" for verdict, n in counted.most_common()]
    explained = sum(r.explained for r in results)
    if explained:
        parts.append(f"{explained} of the misses explained")
    one = "claim" if len(results) == 1 else "claims"
    console.print()
    say(console, f"{len(results)} {one}: {', '.join(parts) or 'none were run'}.")
