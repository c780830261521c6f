"""Tables for terminals: aligned, in colours that survive a light background, plain in a pipe.

Every function prints one thing on a rich Console. Wide columns are left out where the terminal
is narrower than `WIDE`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.text import Text

from narrows import index
from narrows.report import units, words
from narrows.report.tables import WIDE, grid, plain, say, strong
from narrows.report.verdicts import claim_teller, verdicts

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from narrows.core.bound import Bound, PhaseBound
    from narrows.core.hierarchy import HierarchyRow
    from narrows.core.machine import Machine
    from narrows.report.model import Frontier, Option, Proof, Report

BAR = 12
"""Characters of a share of 100 %."""


__all__ = [
    "bound", "calibration", "claim_teller", "frontier", "here", "machine", "machines", "methods",
    "options", "proof", "report", "validation", "verdicts",
]  # fmt: skip

IDLE = 0.001
"""Gains closer to one than this change nothing; those are told below the table."""

ROWS = 8
"""Caches of a search that are shown: with what was said before, no more than a screen."""

SHOWN = 3
"""Refused rows that are shown one by one."""


class Checked(Protocol):
    """What a validation gives: its figures by name (`n`, `median_ape`, ...)."""

    def as_dict(self) -> Mapping[str, Any]: ...


# --- bound -----------------------------------------------------------------------------------


def bound(console: Console, found: Bound, near: Sequence[HierarchyRow] = ()) -> None:
    """The verdict, each phase by op class, what fits, and what fast memories cost attention."""
    if found.fits is False:
        console.print(strong(words.fits(found), "bold red"))
    console.print(strong(words.limits(found)))
    say(console, words.headroom(found))
    for phase in found.phases:
        console.print()
        _phase(console, phase)
    console.print()
    say(console, words.fits(found))
    _levels(console, found)
    _hierarchy(console, near)


def _phase(console: Console, phase: PhaseBound) -> None:
    wide = console.width >= WIDE
    steps = "" if phase.steps == 1 else f", {units.number(phase.steps)} steps"
    error = "" if phase.error is None else f" ± {units.percent(phase.error)}"
    head = Text(f"{phase.name}{steps}: ", style="bold")
    head.append(f"{units.seconds(phase.seconds)}{error}", style="bold")
    head.append(f", limit {units.seconds(phase.limit_seconds)}")
    if phase.measured_seconds is not None:
        head.append(f", measured {units.seconds(phase.measured_seconds)}")
        head.append(f" ({units.times(phase.distance)} the limit)")
    if phase.energy_joules is not None:
        head.append(f", at most {units.joules(phase.energy_joules)}")
    console.print(head)
    columns = ["op class", "held up by", ">seconds", ">share", ""]
    table = grid(*columns, *([">moves or does", ">least"] if wide else []))
    shown = [row for row in phase.rows if row.share >= 0.005] or list(phase.rows[:1])
    for row in shown:
        style = "bold" if row.resource == phase.narrowest else ""
        cells: list[object] = [
            words.op(row.op), Text(words.short(row.resource), style=style),
            units.seconds(row.seconds), units.percent(row.share),
            Text("█" * max(1, round(BAR * row.share)), style="magenta" if style else "dim"),
        ]  # fmt: skip
        if wide:
            call = row.unit == "call"
            need = f"{units.number(row.need)} calls" if call else units.rate(row.need, row.unit)
            cells += [need, "" if call else units.seconds(row.limit)]
        table.add_row(*plain(*cells))
    rest = [row for row in phase.rows if row not in shown and row.seconds > 0]
    if rest:
        spent = sum(row.seconds for row in rest)
        share = sum(row.share for row in rest)
        table.add_row(*plain(f"{len(rest)} more", "", units.seconds(spent), units.percent(share)))
    console.print(table)


def _levels(console: Console, found: Bound) -> None:
    table = grid("memory", "phase", ">needs", ">has", "of it")
    for phase in found.phases:
        for level in phase.levels:
            parts = sorted(level.parts.items(), key=lambda item: -item[1])[:3]
            table.add_row(
                *plain(
                    level.resource, phase.name,
                    Text(units.count_bytes(level.need), style="red" if level.fits is False else ""),
                    units.count_bytes(level.have),
                    ", ".join(f"{role} {units.count_bytes(size)}" for role, size in parts if size),
                )
            )  # fmt: skip
    if table.row_count:
        console.print(table)


def _hierarchy(console: Console, near: Sequence[HierarchyRow]) -> None:
    """Fast memories too small for attention to read its operands once; nothing where all do."""
    again = [row for row in near if row.reached > 1.01 * row.floor]
    if not again:
        return
    console.print()
    say(
        console,
        "Attention does not fit these memories, so what lies behind is read again "
        "(a cache between the two that is not listed catches part of it):",
    )
    columns = ["memory", ">has", "phase", "read from", ">once", ">at least", ">best known", ""]
    table = grid(*columns)
    for row in again:
        table.add_row(
            *plain(
                row.level, units.count_bytes(row.capacity), row.phase, row.behind,
                units.count_bytes(row.floor), units.count_bytes(row.least),
                units.count_bytes(row.reached),
                "" if row.seconds is None else f"({row.program}, {units.seconds(row.seconds)})",
            )
        )  # fmt: skip
    console.print(table)


# --- find and prove --------------------------------------------------------------------------


def options(console: Console, found: Sequence[Option]) -> None:
    """Techniques by predicted gain, with their price and what they do here."""
    if not found:
        console.print("No technique is built that could be asked.")
        return
    wide = console.width >= WIDE
    ranked = sorted(found, key=lambda o: -o.gain)
    idle = [o for o in ranked if abs(o.gain - 1) < IDLE]
    price = ["quality at risk", "training", "memory"] if wide else []
    table = grid("technique", ">gain", ">request", *price, "here")
    for option in ranked:
        if option in idle:
            continue
        helps = option.gain >= 1.01
        cells: list[object] = [
            strong(words.name(option), "bold" if helps else ""),
            strong(units.times(option.gain), "bold green" if helps else "dim"),
            units.seconds(option.seconds),
        ]
        if wide:
            cells += [option.price.quality, option.price.training, option.price.memory]
        table.add_row(*plain(*cells, option.reason))
    if table.row_count:
        console.print(table)
    if idle:
        say(console, "Changes nothing here:")
        for option in idle:
            say(console, f"  {words.name(option)}: {option.reason}")
    top = words.best(list(ranked))
    if top is None:
        return
    console.print()
    if not wide:
        paid = f"quality: {top.price.quality}; training: {top.price.training}; "
        say(console, f"Price of {top.key}: {paid}memory: {top.price.memory}.")
    how = f"narrows apply --with {words.name(top)} does it for real"
    say(console, f"Predicted gain of the whole request; {how}.")


def proof(console: Console, found: Proof) -> None:
    """What was measured beside what was predicted, and what it cost in quality."""
    console.print(strong(words.proves(found)))
    table = grid(f"a step of {found.phase}", ">seconds", ">bytes held")
    table.add_row(
        *plain("as it is", units.seconds(found.dense_seconds), units.count_bytes(found.dense_bytes))
    )
    table.add_row(
        *plain(
            f"with {words.name(found)}", units.seconds(found.technique_seconds),
            units.count_bytes(found.technique_bytes),
        )
    )  # fmt: skip
    for name, seconds in found.peers.items():
        table.add_row(*plain(name, units.seconds(seconds), ""))
    console.print(table)
    say(console, f"{found.repeats} interleaved repeats, spread {units.percent(found.spread)}.")
    if found.quality:
        console.print()
        _quality(console, found)
    say(console, found.note)


def _quality(console: Console, found: Proof) -> None:
    table = grid("quality, 95 % intervals", "as it is", f"with {found.key}", "at equal bytes")
    for row in found.quality:
        others = "\n".join(
            f"{name}: {words.interval(row, figure)}" for name, figure in row.baselines.items()
        )
        sign = "higher" if row.better == "higher" else "lower"
        table.add_row(
            *plain(
                f"{row.name} ({sign} is better)", words.interval(row, row.dense),
                words.interval(row, row.technique), others,
            )
        )  # fmt: skip
    console.print(table)


def frontier(console: Console, found: Frontier) -> None:
    """A search of stacks: what came of it, and the rows that tell most."""
    for sentence in found.told:
        say(console, sentence)
    wide = console.width >= WIDE
    costs = [f">{name} lost" for name in found.limits] if wide else []
    # intervals only where names of stacks keep their room
    roomy = console.width >= WIDE - 30 + 26 * len(costs)
    show = words.cost if roomy else lambda cost: f"{cost.value * 100:+.2f} %"
    table = grid("cache", ">bytes", ">tokens/s", *costs, "verdict")
    rows = words.ranked(found)
    for c in rows[:ROWS]:
        mark = words.mark(found, c.name)
        style = "bold" if mark else "dim" if c.verdict == "outside" else ""
        cells: list[object] = [
            strong(c.name, style), units.count_bytes(c.bytes), units.number(c.speed),
        ]  # fmt: skip
        if wide:
            cells += [show(c.costs[m]) if m in c.costs else "" for m in found.limits]
        told = words.verdict(c) if c.verdict != "dense" else ""
        table.add_row(*plain(*cells, f"{told} ({mark})" if mark else told))
    console.print(table)
    if len(rows) > ROWS:
        inside = sum(words.shown_within(c) for c in rows[ROWS:])
        say(console, f"{len(rows) - ROWS} more, {inside} of them within; --json gives all of them.")
    say(console, f"Limits: {words.asked(found)}. {words.searched(found)}")


def report(console: Console, told: Report) -> None:
    """The whole job, in the order it was done."""
    bound(console, told.bound)
    console.print()
    if told.frontier is None:
        options(console, told.options)
    else:
        frontier(console, told.frontier)
    if told.proof is not None:
        console.print()
        proof(console, told.proof)
    if told.notes:
        console.print()
        for note in told.notes:
            console.print(Text(f"Note: {note}"), style="dim")


# --- machines --------------------------------------------------------------------------------


def machine(console: Console, found: Machine) -> None:
    """What a machine has, where the figures are from, and how it is calibrated."""
    console.print(strong(f"{found.name}: {found.title}"))
    say(console, found.note)
    wide = console.width >= WIDE
    table = grid("resource", ">has", *(["source"] if wide else []))
    for held in found.resources.values():
        cells: list[object] = [held.name, units.rate(held.capacity, held.unit)]
        table.add_row(*plain(*cells, *([held.source or found.source] if wide else [])))
    for link in found.links.values():
        has = units.rate(link.bandwidth, "byte/s")
        if link.latency:
            has += f" + {units.seconds(link.latency)}"
        cells = [f"{link.name} (link of {link.peers})", has]
        table.add_row(*plain(*cells, *([link.source or found.source] if wide else [])))
    console.print(table)
    console.print()
    _calibrations(console, found)


def _calibrations(console: Console, found: Machine) -> None:
    if not found.calibrations:
        say(console, "Not calibrated: bounds are of the datasheet, expect 30-80 % optimism.")
        return
    table = grid("calibrated", ">compute", ">memory", ">fixed", ">rows", ">median", ">p90")
    for name, c in found.calibrations.items():
        table.add_row(
            *plain(
                words.op_class(name), units.percent(c.compute), units.percent(c.memory),
                units.seconds(c.fixed), c.n, units.percent(c.error.median if c.error else None),
                units.percent(c.error.p90 if c.error else None),
            )
        )  # fmt: skip
    console.print(table)
    say(console, "Median and p90 errors are on rows that were not fitted on.")


def machines(console: Console, found: Iterable[Machine]) -> None:
    """The catalogue, a line each."""
    wide = console.width >= WIDE
    more = (["title", ">year"], [">fitted"]) if wide else ([], [])
    table = grid("machine", *more[0], ">compute", ">memory", ">capacity", *more[1])
    for m in found:
        rates = {n: r for n, r in m.resources.items() if n.startswith("compute.")}
        # The rate people compare: of 16-bit floats, else of the widest that is there.
        chosen = next(
            (rates[n] for n in ("compute.bf16", "compute.fp16", "compute.fp32") if n in rates),
            next(iter(rates.values())),
        )
        table.add_row(
            *plain(
                strong(m.name), *([m.title, m.year or units.UNKNOWN] if wide else []),
                f"{units.rate(chosen.capacity, chosen.unit)} {words.short(chosen.name):4}",
                units.rate(m.bandwidth("device"), "byte/s"),
                units.count_bytes(m.capacity("device")),
                *([len(m.calibrations) or "no"] if wide else []),
            )
        )  # fmt: skip
    console.print(table)
    if wide:
        console.print()
        say(console, "Fitted: op classes whose constants come from measured rows.")


def methods(console: Console, found: Sequence[index.Entry]) -> None:
    """Systems with what they relieve and whether they are built."""
    if not found:
        console.print("No system answers to these words; narrows methods lists all of them.")
        return
    wide = console.width >= WIDE
    table = grid("key", "folder", "role", "relieves", "status", *(["what it does"] if wide else []))
    for entry in found:
        status = index.status(entry)
        cells: list[object] = [
            strong(entry.key), entry.folder, entry.role, entry.relieves,
            strong(status, "green" if status != "planned" else "dim"),
        ]  # fmt: skip
        table.add_row(*plain(*cells, *([entry.what] if wide else [])))
    console.print(table)
    ready = sum(index.status(entry) != "planned" for entry in found)
    one = "system" if len(found) == 1 else "systems"
    console.print()
    say(console, f"{len(found)} {one}, {ready} built.")


# --- calibration and validation --------------------------------------------------------------


def calibration(console: Console, fitted: Machine, refused: Sequence[Any], out: Path | str) -> None:
    """What was fitted, what was refused, and where it was written."""
    _calibrations(console, fitted)
    _refused(console, refused)
    say(console, f"Written to {out}.")


def validation(console: Console, checked: Checked) -> None:
    """Errors of a machine's predictions against measured rows."""
    figures = checked.as_dict()
    table = grid("rows", ">n", ">median", ">mean", ">p90")
    _errors(table, "all", figures)
    for name, value in figures.items():
        if isinstance(value, Mapping):
            rows = {name: value} if "median_ape" in value else value
            for inner, row in rows.items():
                if isinstance(row, Mapping):
                    _errors(table, str(inner).replace("_", " "), row)
    console.print(table)
    say(console, "Absolute relative error of predicted against measured seconds.")
    _refused(console, figures.get("refused", ()))


def here(console: Console, checked: Any) -> None:
    """How well the measured machine predicts workloads it was not calibrated on, and the verdict.

    checked: what measure.battery.validate_here gives.
    """
    validation(console, checked)
    console.print()
    table = grid("workload", "held up by", ">seconds", ">error", ">spread", "")
    for row in sorted(checked.rows, key=lambda row: -row.error):
        style = "" if row.quiet else "dim"
        cells = (
            row.name, words.short(row.narrowest), units.seconds(row.seconds),
            units.percent(row.error), units.percent(row.spread), "" if row.quiet else "not quiet",
        )  # fmt: skip
        table.add_row(*plain(*cells), style=style)
    console.print(table)
    console.print()
    told = {
        True: ("Within the errors promised for this machine.", "bold green"),
        False: ("Outside the errors promised for this machine.", "bold red"),
        None: ("No verdict: too few quiet rows; try again when the machine is idle.", "bold"),
    }
    sentence, style = told[checked.verdict]
    console.print(Text(sentence, style=style))


def _errors(table: Table, name: str, row: Mapping[str, Any]) -> None:
    if "median_ape" in row:
        cells = (row.get("median_ape"), row.get("mean_ape"), row.get("p90_ape"))
        table.add_row(*plain(name, row.get("n", ""), *(units.percent(cell) for cell in cells)))


def _refused(console: Console, refused: Sequence[Any]) -> None:
    """The first rows that were refused, as file:row: reason."""
    if not refused:
        return
    rows = "row" if len(refused) == 1 else "rows"
    console.print(strong(f"Refused {len(refused)} {rows}:", "bold red"))
    for row in list(refused)[:SHOWN]:
        told = row if isinstance(row, Mapping) else asdict(row)
        say(console, f"  {told['file']}:{told['row']}: {told['reason']}")
    if len(refused) > SHOWN:
        say(console, f"  and {len(refused) - SHOWN} more; --json gives all of them")
