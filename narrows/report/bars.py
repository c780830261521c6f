"""Bars and whiskers of the HTML file: plain elements and small SVG, no library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from narrows.core.bound import Bound, LevelRow, PhaseBound, Row
from narrows.core.caches import FAULTS
from narrows.core.price import DISPATCH
from narrows.report import units, words
from narrows.report.model import Interval

ROLES = {
    "weight": "weights", "kv": "key-value cache", "activation": "activations",
    "state": "optimiser state", "gradient": "gradients", "saved": "saved activations",
    "input": "input", "output": "output",
}  # fmt: skip


SHADES = {"weight": 0, "kv": 1, "activation": 2, "saved": 2, "state": 3, "gradient": 3}
"""Which of the five shades of the page a role has."""


def kind(resource: str) -> str:
    """The CSS class that colours a resource."""
    if resource.startswith("compute."):
        return "compute"
    if resource in (DISPATCH, FAULTS):
        return "dispatch"
    return "memory" if words.resource(resource).startswith(("memory", "cache")) else "link"


def legend(bound: Bound) -> str:
    """Which colour is which resource, for those that some seconds hang on."""
    used = dict.fromkeys(r.resource for p in bound.phases for r in p.rows if r.seconds > 0)
    seen: dict[str, list[str]] = {}
    for name in used:
        seen.setdefault(kind(name), []).append(name)
    items = "".join(
        f'<li><i class="seg {group}"></i>{escape(words.group(group))} '
        f"<small>{escape(', '.join(words.short(n) for n in names if n != group))}</small></li>"
        for group, names in seen.items()
    )
    return f'<ul class="legend">{items}</ul>'


def _inside(label: str, part: float) -> str:
    """The label of a segment, where the segment is long enough for it."""
    return escape(label) if part * 100 > 1.25 * len(label) + 1 else ""


def _segment(row: Row, scale: float, total: float) -> str:
    part = row.seconds / scale
    told = (
        f"{words.op(row.op)}, held up by {words.resource(row.resource)}: "
        f"{units.seconds(row.seconds)}, {units.percent(row.seconds / total)}"
    )
    return (
        f'<span class="seg {kind(row.resource)}" style="width:{part * 100:.3f}%" '
        f'title="{escape(told)}">{_inside(words.op(row.op), part)}</span>'
    )


def _stack(phase: PhaseBound, scale: float) -> str:
    order = {"compute": 0, "memory": 1, "link": 2, "dispatch": 3}
    rows = [r for r in phase.rows if r.seconds > 0]
    rows.sort(key=lambda r: (order[kind(r.resource)], -r.seconds))
    return "".join(_segment(r, scale, phase.seconds) for r in rows)


def _bar(label: str, inside: str, seconds: float, note: str = "") -> str:
    small = f" <small>{escape(note)}</small>" if note else ""
    return (
        f'<div class="bar"><span class="what">{escape(label)}</span>'
        f'<span class="track">{inside}</span>'
        f'<span class="value">{units.seconds(seconds)}{small}</span></div>'
    )


def _plain(seconds: float, scale: float, css: str) -> str:
    return f'<span class="seg {css}" style="width:{100 * seconds / scale:.3f}%"></span>'


def _measured(phase: PhaseBound, scale: float) -> str:
    """The measured bar, by op class where the profile tells them apart."""
    total = phase.measured_seconds or 0.0
    if not phase.measured_ops:
        return _plain(total, scale, "measured")
    parts = sorted(phase.measured_ops.items(), key=lambda item: -item[1])
    return "".join(
        f'<span class="seg measured" style="width:{100 * s / scale:.3f}%" '
        f'title="{escape(f"{words.op(kind)}: {units.seconds(s)}")}">'
        f"{_inside(words.op(kind), s / scale)}</span>"
        for kind, s in parts
    )


def phase_bars(phase: PhaseBound, after: PhaseBound | None, technique: str) -> str:
    """Limit, prediction, measurement and the prediction with a technique, on one scale."""
    shown = [phase.limit_seconds, phase.seconds, phase.measured_seconds or 0.0]
    scale = max([*shown, after.seconds if after else 0.0]) or 1.0
    error = "" if phase.error is None else f"± {units.percent(phase.error)}"
    bars = [
        _bar("limit", _plain(phase.limit_seconds, scale, "limit"), phase.limit_seconds),
        _bar("predicted", _stack(phase, scale), phase.seconds, error),
    ]
    if phase.measured_seconds is not None:
        bars.append(_bar("measured", _measured(phase, scale), phase.measured_seconds))
    if after is not None:
        note = "" if after.error is None else f"± {units.percent(after.error)}"
        bars.append(_bar(f"with {technique}", _stack(after, scale), after.seconds, note))
    return f'<div class="bars">{"".join(bars)}</div>'


def level_bar(level: LevelRow, label: str, scale: float) -> str:
    """What one memory holds at the worst moment, by role; `scale` bytes fill the bar."""
    parts = sorted(level.parts.items(), key=lambda item: (SHADES.get(item[0], 4), -item[1]))
    inside = "".join(
        f'<span class="seg role-{SHADES.get(role, 4)}" style="width:{100 * size / scale:.3f}%" '
        f'title="{escape(f"{ROLES.get(role, role)}: {units.count_bytes(size)}")}">'
        f"{_inside(ROLES.get(role, role), size / scale)}</span>"
        for role, size in parts
        if size > 0
    )
    if level.have is not None and level.have < scale:
        edge = 100 * level.have / scale
        inside += f'<span class="edge" style="left:{edge:.3f}%" title="capacity"></span>'
    have = "capacity not known" if level.have is None else f"of {units.count_bytes(level.have)}"
    return (
        f'<div class="bar"><span class="what">{escape(label)}</span>'
        f'<span class="track">{inside}</span>'
        f'<span class="value">{units.count_bytes(level.need)} <small>{have}</small></span></div>'
    )


def level_bars(phase: PhaseBound, after: PhaseBound | None, technique: str) -> str:
    """The memories of a phase, each as it is and with a technique, on one scale."""
    bars: list[str] = []
    for level in phase.levels:
        then = (
            next((x for x in after.levels if x.resource == level.resource), None) if after else None
        )
        scale = max(level.need, level.have or 0.0, then.need if then else 0.0) or 1.0
        bars.append(level_bar(level, level.resource, scale))
        if then is not None and abs(then.need - level.need) > 0.001 * level.need:
            bars.append(level_bar(then, f"with {technique}", scale))
    return f'<div class="bars">{"".join(bars)}</div>'


def whiskers(
    rows: Mapping[str, Interval], labels: Mapping[str, str], strong: Sequence[str] = ()
) -> str:
    """Values with 95 % intervals on one axis, a row each; labels: the text at the right of each."""
    low = min(i.low for i in rows.values())
    high = max(i.high for i in rows.values())
    room = (high - low) * 0.06 or abs(high) * 0.02 or 1.0
    low, high = low - room, high + room
    wide, step, left, right = 640.0, 26.0, 150.0, 170.0
    body: list[str] = []

    def place(value: float) -> float:
        return left + (wide - left - right) * (value - low) / (high - low)

    for i, (name, row) in enumerate(rows.items()):
        y = step * i + step / 2
        css = ' class="strong"' if name in strong else ""
        body.append(
            f'<g{css}><text x="0" y="{y + 4:.1f}">{escape(name)}</text>'
            f'<line class="rail" x1="{left}" x2="{wide - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<line class="span" x1="{place(row.low):.1f}" x2="{place(row.high):.1f}" '
            f'y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<circle cx="{place(row.value):.1f}" cy="{y:.1f}" r="4.5"/>'
            f'<text class="num" x="{wide - right + 12:.1f}" y="{y + 4:.1f}">'
            f"{escape(labels[name])}</text></g>"
        )
    told = "; ".join(f"{name} {labels[name]}" for name in rows)
    return (
        f'<svg class="whiskers" role="img" viewBox="0 0 {wide:g} {step * len(rows):g}" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{escape(told)}</title>{"".join(body)}</svg>'
    )
