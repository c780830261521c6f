"""Labels of a picture, placed so that they do not cover each other or the marks."""

from __future__ import annotations

from dataclasses import dataclass
from math import atan2, cos, degrees, hypot, pi, sin
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = 10.0
"""Points of a label."""

SLIGHT = 60.0
"""A cost that a turned label may have: a corner that touches a line."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels of the picture."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Area shared with another, in square pixels."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.top, other.top) - max(self.bottom, other.bottom)
        return wide * high if wide > 0 and high > 0 else 0.0

    @property
    def area(self) -> float:
        """In square pixels."""
        return (self.right - self.left) * (self.top - self.bottom)


def width(text: str, size: float = SIZE) -> float:
    """Pixels of a text, generously: the page's font is not known here."""
    narrow = sum(c in "iljtf.,:;'|!()[] " for c in text)
    return size * (0.63 * (len(text) - narrow) + 0.36 * narrow)


def _along(x: float, y: float, angle: float, long: float) -> list[Box]:
    """Boxes that cover a text of `long` pixels that starts at a point and is turned by an angle."""
    tall = SIZE + 2
    boxes: list[Box] = []
    for step in range(int(long // 8) + 1):
        cx = x + 8 * step * cos(angle) - (4 + tall / 2) * sin(angle)
        cy = y + 8 * step * sin(angle) + (4 + tall / 2) * cos(angle)
        boxes.append(Box(cx - 4, cy - tall / 2 + 2, cx + 4, cy + tall / 2 - 2))
    return boxes


class Labels:
    """Places texts one after the other; each keeps off what is there already."""

    def __init__(self, axes: Axes, ink: str, muted: str) -> None:
        self.axes = axes
        self.ink, self.muted = ink, muted
        self.taken: list[Box] = []
        self.discs: list[tuple[float, float, float]] = []
        self.lines: list[tuple[float, float]] = []
        low = axes.transAxes.transform((0, 0))
        high = axes.transAxes.transform((1, 1))
        self.frame = Box(float(low[0]), float(low[1]), float(high[0]), float(high[1]))

    def pixel(self, x: float, y: float) -> tuple[float, float]:
        """Data coordinates to pixels."""
        found = self.axes.transData.transform((x, y))
        return float(found[0]), float(found[1])

    def data(self, x: float, y: float) -> tuple[float, float]:
        """Pixels to data coordinates."""
        found = self.axes.transData.inverted().transform((x, y))
        return float(found[0]), float(found[1])

    def take(self, left: float, bottom: float, right: float, top: float) -> None:
        """Keeps a rectangle of pixels free of what comes later."""
        self.taken.append(Box(left, bottom, right, top))

    def corner(self, wide: float, high: float) -> Box:
        """A box of that size in the freer of two corners: upper left, lower right; taken."""
        f = self.frame
        upper = Box(f.left + 4, f.top - high - 2, f.left + 4 + wide, f.top - 2)
        lower = Box(f.right - wide - 4, f.bottom + 4, f.right - 4, f.bottom + 4 + high)
        box = min(upper, lower, key=self._cost)
        self.taken.append(box)
        return box

    def disc(self, x: float, y: float, radius: float) -> None:
        """A mark that labels should not cover."""
        self.discs.append((*self.pixel(x, y), radius))

    def _cost(self, box: Box) -> float:
        """Square pixels covered of labels (dear), marks and lines; endless outside the frame."""
        f = self.frame
        if box.left < f.left or box.right > f.right or box.bottom < f.bottom or box.top > f.top:
            return float("inf")
        cost = 40 * sum(box.overlap(other) for other in self.taken)
        for x, y, r in self.discs:
            cost += 8 * box.overlap(Box(x - r * 0.85, y - r * 0.85, x + r * 0.85, y + r * 0.85))
        inside = sum(box.left < x < box.right and box.bottom < y < box.top for x, y in self.lines)
        return cost + 6 * inside

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Text at pixels; the page gives it a halo, so that lines do not cross it."""
        from matplotlib.transforms import IdentityTransform

        style.setdefault("fontsize", SIZE)
        self.axes.text(x, y, text, transform=IdentityTransform(), zorder=6, **style)

    def flat(self, text: str, ends: tuple[float, float], y: float, used: bool) -> bool:
        """A label above a flat roof, as far right as there is room.

        Returns whether there was room; a roof in use gets its label in any case.
        """
        left, line = self.pixel(ends[0], y)
        right = self.frame.right
        wide = width(text)
        ends_at = range(int(right - 2), int(left + wide), -12) or (int(right - 2),)
        boxes = [
            Box(end - wide, line + lift - 2, end, line + lift + SIZE)
            for lift in (4, 11)
            for end in ends_at
        ]
        box = min(boxes, key=lambda b: (self._cost(b), b.bottom, -b.right))
        if not used and self._cost(box) > 0:
            return False
        self.taken.append(box)
        colour = self.ink if used else self.muted
        self.text(box.right, box.bottom + 2, text, ha="right", color=colour)
        return True

    def slope(self, text: str, ends: tuple[float, float], slope: float, used: bool) -> bool:
        """A label along a slanted roof, near its foot, turned with it; as `flat` otherwise."""
        low, high = self.pixel(ends[0], ends[0] * slope), self.pixel(ends[1], ends[1] * slope)
        angle = atan2(high[1] - low[1], high[0] - low[0])
        long = width(text)
        length = hypot(high[0] - low[0], high[1] - low[1])
        if length < long + 20:
            return used
        spots = [
            (low[0] + start * cos(angle), low[1] + start * sin(angle))
            for start in range(12, int(length - long), 12)
        ]
        costs = [sum(self._cost(b) for b in _along(*spot, angle, long)) for spot in spots]
        best = min(range(len(spots)), key=lambda i: (costs[i] > SLIGHT, costs[i] + i))
        if not used and costs[best] > SLIGHT:
            return False
        x, y = spots[best]
        self.taken.extend(_along(x, y, angle, long))
        off = 4.0
        self.text(x - off * sin(angle), y + off * cos(angle), text, rotation=degrees(angle),
                  rotation_mode="anchor", ha="left", va="bottom",
                  color=self.ink if used else self.muted)  # fmt: skip
        return True

    def line(self, xs: tuple[float, float], ys: tuple[float, float]) -> None:
        """A line, in data coordinates, that labels should rather not cross."""
        low, high = self.pixel(xs[0], ys[0]), self.pixel(xs[1], ys[1])
        steps = max(1, int(hypot(high[0] - low[0], high[1] - low[1]) // 6))
        for i in range(steps + 1):
            part = i / steps
            self.lines.append(
                (low[0] + part * (high[0] - low[0]), low[1] + part * (high[1] - low[1]))
            )

    def mark(self, text: str, x: float, y: float, radius: float, colour: str, must: bool) -> None:
        """A label beside a mark; one that finds no free place is left out unless it must be."""
        px, py = self.pixel(x, y)
        wide, high = width(text), SIZE + 2
        best: tuple[float, Box, float] | None = None
        for far in (3.0, 10.0, 20.0, 34.0):
            for turn in range(16):
                angle = turn * pi / 8
                reach = radius + far
                cx, cy = px + reach * cos(angle), py + reach * sin(angle)
                left = cx - wide * (1 - cos(angle)) / 2
                bottom = cy - high * (1 - sin(angle)) / 2
                box = Box(left, bottom, left + wide, bottom + high)
                cost = self._cost(box) + far * 1.5 + (0 if turn in (0, 8) else 3)
                if best is None or cost < best[0]:
                    best = (cost, box, far)
        assert best is not None
        cost, box, far = best
        clash = any(box.overlap(other) > 4 for other in self.taken)
        if cost == float("inf") or (clash and not must):
            return
        self.taken.append(box)
        if far >= 20:
            self._leader((px, py), box, radius, colour)
        self.text(box.left, box.bottom + 2, text, color=colour, ha="left", va="baseline")

    def _leader(self, point: tuple[float, float], box: Box, radius: float, colour: str) -> None:
        """A thin line from the edge of a mark to the nearest edge of its label."""
        from matplotlib.lines import Line2D
        from matplotlib.transforms import IdentityTransform

        px, py = point
        tx = min(max(px, box.left), box.right)
        ty = min(max(py, box.bottom), box.top)
        far = hypot(tx - px, ty - py)
        if far <= radius + 1:
            return
        sx, sy = px + (tx - px) * radius / far, py + (ty - py) * radius / far
        self.axes.add_line(
            Line2D([sx, tx], [sy, ty], color=colour, linewidth=0.9, zorder=5.5,
                   transform=IdentityTransform())
        )  # fmt: skip

    def callout(self, rows: list[str], x: float, y: float, radius: float) -> None:
        """A few lines of text in a free spot of the picture, tied to a mark."""
        px, py = self.pixel(x, y)
        wide = max(width(row, SIZE + 1) for row in rows) + 8
        high = len(rows) * (SIZE + 6)
        f = self.frame
        best: tuple[float, Box] | None = None
        for i in range(25):
            for j in range(25):
                left = f.left + 6 + (f.right - f.left - wide - 12) * i / 24
                bottom = f.bottom + 6 + (f.top - f.bottom - high - 12) * j / 24
                box = Box(left, bottom, left + wide, bottom + high)
                near = hypot(
                    px - min(max(px, box.left), box.right), py - min(max(py, box.bottom), box.top)
                )
                cost = 4 * self._cost(box) + abs(near - radius - 34)
                if best is None or cost < best[0]:
                    best = (cost, box)
        assert best is not None
        box = best[1]
        self.taken.append(box)
        self._leader((px, py), box, radius + 1.5, self.ink)
        for i, row in enumerate(rows):
            self.text(box.left + 4, box.top - (i + 1) * (SIZE + 5), row, color=self.ink,
                       fontsize=SIZE + (1 if i == 0 else 0),
                       fontweight="bold" if i == 0 else "normal")  # fmt: skip
