"""The TOML form of a machine, written: Machine to text that reads back as an equal machine."""

from __future__ import annotations

from decimal import Decimal

import tomli_w

from narrows.core.errors import NarrowsError
from narrows.core.machine import Machine
from narrows.machines.form import BARE, TABLES, loads


def _text(value: str) -> str:
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")


def _figure(value: float) -> str:
    """The shortest TOML number that reads back as the same float: 700, 0.71, 989.4e12."""
    value = float(value)
    if abs(value) < 1e6 and value == int(value):
        return str(int(value))
    return Decimal(repr(value)).normalize().to_eng_string().replace("E+", "e").replace("E", "e")


def _quoted(name: str) -> str:
    return name if BARE.fullmatch(name) else f'"{name}"'


def _table(title: str, /, **fields: str | None) -> str:
    """One table; fields that are None are at their default and left out."""
    lines = [f"{_quoted(key)} = {value}" for key, value in fields.items() if value is not None]
    return "\n".join([f"[{title}]", *lines] if title else lines)


def _emit(machine: Machine) -> str:
    m = machine
    caches = f"[{', '.join(_text(c) for c in m.caches)}]" if m.caches else None
    tables = [
        _table(
            "", name=_text(m.name), title=_text(m.title), kind=_text(m.kind),
            year=str(int(m.year)) if m.year else None, units=str(int(m.units)) if m.units else None,
            source=_text(m.source), note=_text(m.note) if m.note else None, caches=caches,
            pricer=None if m.pricer is None else _text(m.pricer),
        ),
        _table("tiers", **{tier: _text(name) for tier, name in m.tiers.items()}),
    ]  # fmt: skip
    for name, r in m.resources.items():
        tables.append(_table(
            f"{TABLES[r.kind]}.{_quoted(name)}", capacity=_figure(r.capacity),
            unit=_text(r.unit), source=_text(r.source),
        ))  # fmt: skip
    for name, link in m.links.items():
        tables.append(_table(
            f"links.{_quoted(name)}", bandwidth=_figure(link.bandwidth),
            latency=_figure(link.latency) if link.latency else None, peers=str(int(link.peers)),
            topology=_text(link.topology), source=_text(link.source),
        ))  # fmt: skip
    for op, c in m.calibrations.items():
        tiles = ", ".join(f"[{int(rows)}, {int(columns)}]" for rows, columns in c.tiles)
        tables.append(_table(
            f"calibrations.{_quoted(op)}", compute=_figure(c.compute), memory=_figure(c.memory),
            fixed=_figure(c.fixed), step=_figure(c.step) if c.step else None,
            tiles=f"[{tiles}]" if c.tiles else None,
            n=str(int(c.n)), source=_text(c.source), era=_text(c.era),
        ))  # fmt: skip
        if c.error is not None:
            errors = {s: _figure(getattr(c.error, s)) for s in ("median", "mean", "p90")}
            tables.append(_table(
                f"calibrations.{_quoted(op)}.error", **errors, n=str(int(c.error.n))
            ))  # fmt: skip
    return "\n\n".join(tables) + "\n"


def dumps(machine: Machine) -> str:
    """The TOML text of a machine; `loads` of it gives an equal machine.

    Raises NarrowsError for a machine the form cannot hold exactly.
    """
    where = f"machine {machine.name!r}"
    try:
        text = _emit(machine)
    except (TypeError, ValueError, OverflowError) as error:
        raise NarrowsError(f"{where}: cannot be written ({error})") from None
    if loads(text, where) != machine:
        raise NarrowsError(
            f"{where}: cannot be written exactly; are all resources filed under their own names?"
        )
    return text
