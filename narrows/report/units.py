"""Numbers with units, to three figures: 1.23 ms, 402 MB, 3.35 TB/s, 989 TFLOP/s, 12 %, 2.31×."""

from __future__ import annotations

from collections.abc import Callable
from math import floor, isfinite, isnan, log10

PREFIXES = ("", "k", "M", "G", "T", "P", "E")
SMALL = ("", "m", "µ", "n", "p", "f")
UNKNOWN = "–"
"""Stands for a number that is not known."""


TINY = 1e-5
"""Below this a figure is written with an exponent."""


def figures(value: float, count: int = 3) -> str:
    """A number rounded to `count` figures: 1234 -> 1230, 0.01234 -> 0.0123, 1e-12 -> 1e-12.

    Only what would be a row of zeros gets an exponent.
    """
    if value == 0:
        return "0"
    if not isfinite(value):
        return "∞" if value > 0 else "-∞"
    if abs(value) < TINY:
        return f"{value:.{count}g}"
    decimals = count - 1 - floor(log10(abs(value)))
    rounded = round(value, decimals)
    # Rounding may carry into a new figure (9.996 -> 10.00): count the decimals again.
    decimals = count - 1 - floor(log10(abs(rounded)))
    return f"{rounded:.{max(0, decimals)}f}"


def _special(value: float | None) -> str | None:
    if value is None or isnan(value):
        return UNKNOWN
    if not isfinite(value):
        return "∞" if value > 0 else "-∞"
    return None


def si(value: float | None, unit: str) -> str:
    """A value with an SI prefix: si(3.35e12, "B/s") is "3.35 TB/s"."""
    special = _special(value)
    if special is not None or value is None:
        return special or UNKNOWN
    if value == 0:
        return f"0 {unit}"
    # Three figures first, then the prefix: 999.6e9 is 1.00 T, not 1000 G.
    size = floor(log10(abs(float(f"{value:.3g}"))))
    step = max(1 - len(SMALL), min(len(PREFIXES) - 1, size // 3))
    prefix = PREFIXES[step] if step >= 0 else SMALL[-step]
    return f"{figures(value / 10.0 ** (3 * step))} {prefix}{unit}"


def seconds(value: float | None) -> str:
    """A duration: 8.10 µs, 1.23 ms, 45.6 s, 12.3 min, 3.40 h, 2.1 days."""
    special = _special(value)
    if special is not None or value is None:
        return special or UNKNOWN
    for least, size, name in ((172800, 86400, "days"), (7200, 3600, "h"), (120, 60, "min")):
        if abs(value) >= least:
            return f"{figures(value / size)} {name}"
    return si(value, "s")


def count_bytes(value: float | None) -> str:
    """Bytes, decimal prefixes: 402 MB. Below a kilobyte whole."""
    if value is not None and 0 < abs(value) < 1000:
        return f"{value:.0f} B"
    return si(value, "B")


def rate(value: float | None, unit: str) -> str:
    """A capacity in the units of core: `byte/s`, `flop/s`, `byte`, `watt`, `bit`, `call/s` ..."""
    short = {
        "byte/s": "B/s", "flop/s": "FLOP/s", "op/s": "OP/s", "byte": "B", "flop": "FLOP",
        "watt": "W", "joule": "J", "bit": "bit", "s": "s", "second": "s",
    }  # fmt: skip
    return si(value, short.get(unit, unit))


def flops(value: float | None) -> str:
    """Operations: 12.3 GFLOP."""
    return si(value, "FLOP")


def joules(value: float | None) -> str:
    """Energy: 1.20 kJ."""
    return si(value, "J")


def number(value: float | None) -> str:
    """A plain count, with a prefix from ten thousand on: 4096, 8.03 G."""
    if value is not None and isfinite(value) and abs(value) < 10000:
        return f"{value:.0f}" if value == int(value) else figures(value)
    return si(value, "").rstrip()


def percent(value: float | None) -> str:
    """A fraction in per cent: 0.123 -> "12 %", 0.0123 -> "1.2 %", 0.0004 -> "<0.1 %"."""
    special = _special(value)
    if special is not None or value is None:
        return special or UNKNOWN
    part = value * 100
    if 0 < abs(part) < 0.1:
        return "<0.1 %" if part > 0 else "0 %"
    if part == 0:
        return "0 %"
    return f"{part:.1f} %" if abs(part) < 9.95 else f"{part:.0f} %"


def times(value: float | None) -> str:
    """A ratio: 2.31×, 12.4×, 130×."""
    special = _special(value)
    if special is not None or value is None:
        return UNKNOWN if special in (None, UNKNOWN) else f"{special}×"
    return f"{figures(value)}×"


def span(low: float, high: float, show: Callable[[float], str] = figures) -> str:
    """An interval: [2.01, 2.22]."""
    return f"[{show(low)}, {show(high)}]"
