"""Limits of quality as a user gives them: `ppl=1%`, `recall=0.01`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from narrows.core.errors import NarrowsError, unknown

METRICS: Mapping[str, str] = {
    "ppl": "more perplexity, read through the cache",
    "recall": "fewer right answers of 16 pairs of 2 tokens, the question at the prompt's end",
    "later": "fewer right answers where the question comes after the prompt was compressed",
}
"""What can be limited; all as a fraction of what the dense cache reaches."""


def parsed(given: Iterable[str]) -> dict[str, float]:
    """`ppl=1%` or `recall=0.01` to fractions.

    Raises NarrowsError for an unknown metric, and for what is no share from 0 up.
    """
    found: dict[str, float] = {}
    for text in given:
        name, _, value = text.partition("=")
        if name not in METRICS:
            raise unknown("measure of quality", name, METRICS)
        number = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(%?)", value.strip())
        if number is None:
            raise NarrowsError(f"--within takes {name}=1% or {name}=0.01, not {text!r}")
        share = float(number[1]) / (100 if number[2] else 1)
        if share >= 10:
            raise NarrowsError(
                f"--within {text} would allow ten times the loss of everything; {name}=1% is one "
                "part in a hundred"
            )
        if name in found:
            raise NarrowsError(f"--within names {name} twice; give one limit for each measure")
        found[name] = share
    return found
