"""The one exception a user is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NarrowsError(Exception):
    """Bad input or a missing optional part: one sentence, saying what was given and what to do."""


def unknown(what: str, given: str, known: Iterable[str], hint: str = "") -> NarrowsError:
    """An error for a name that is not in a list, with the nearest names of it."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    if near:
        told = f"did you mean {' or '.join(near)}?"
    elif len(names) <= 12:
        told = f"known: {', '.join(names)}."
    else:
        told = hint
    return NarrowsError(f"no {what} named {given!r}; {told}".rstrip("; "))
