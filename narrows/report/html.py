"""report.html: one file that asks nothing of the network, light and dark, screen and paper.

Every string of a user goes through `escape`; there is no script in it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from html import escape
from pathlib import Path

from narrows.core.bound import PhaseBound
from narrows.core.errors import NarrowsError
from narrows.core.resource import Kind
from narrows.report import bars, units, words
from narrows.report import frontier as frontiers
from narrows.report.model import Frontier, Interval, Proof, Report
from narrows.report.picture import colours
from narrows.report.points import calibrated
from narrows.report.roofline import svg

Row = Iterable[str]

SHOWN = 12
"""Rows of a search before the rest folds away."""


def _table(head: Iterable[tuple[str, bool]], rows: Iterable[tuple[str, Row]]) -> str:
    """A table: (heading, whether numeric) columns; (class of the row, cells as HTML) rows."""
    columns = list(head)
    top = "".join(
        f'<th scope="col"{" class=num" if numeric else ""}>{escape(name)}</th>'
        for name, numeric in columns
    )
    body = ""
    for css, cells in rows:
        inside = "".join(
            f"<td{' class=num' if numeric else ''}>{cell}</td>"
            for (_, numeric), cell in zip(columns, cells, strict=True)
        )
        body += f"<tr{f' class={css}' if css else ''}>{inside}</tr>"
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _section(name: str, title: str, *parts: str) -> str:
    return (
        f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{"".join(parts)}</section>'
    )


def _paragraph(text: str, css: str = "") -> str:
    return f"<p{f' class={css}' if css else ''}>{escape(text)}</p>" if text else ""


def _facts(pairs: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in pairs) + "</dl>"


# --- first screen ----------------------------------------------------------------------------


def _card(what: str, value: str, note: str, css: str = "") -> str:
    css = css or ("words" if len(value) > 12 else "")
    return (
        f"<li><span>{escape(what)}</span><strong{f' class={css!r}' if css else ''}>"
        f"{escape(value)}</strong><span>{escape(note)}</span></li>"
    )


def _cards(report: Report) -> str:
    bound, proof = report.bound, report.proof
    narrow = bound.narrowest
    taken = words.measured(bound)
    worst = words.error(bound)
    unsure = bound.trust if worst is None else f"p90 error {units.percent(worst)}"
    top = words.best(list(report.options))
    cards = [
        _card(
            "narrowest point", words.resource(narrow, report.machine),
            f"{units.percent(words.share(bound, narrow))} of all seconds",
        ),
        _card("predicted", units.seconds(bound.seconds), f"for the whole request, {unsure}"),
    ]  # fmt: skip
    if taken is not None or words.calibrated(bound):
        note = f"{units.times(words.distance(bound))} away, "
        note += "measured" if taken is not None else "predicted"
        cards.append(_card("physical limit", units.seconds(bound.limit_seconds), note))
    if taken is not None:
        note = f"prediction {words.missed(bound.seconds / taken - 1)}"
        cards.insert(2, _card("measured", units.seconds(taken), note))
    if proof is not None:
        gain = proof.measured_gain
        cards.append(
            _card(
                f"{proof.phase} with {proof.key}, measured", units.times(gain.value),
                f"95 % {units.span(gain.low, gain.high)}, "
                f"predicted {units.times(proof.predicted_gain)}",
                "good" if proof.conclusive and gain.value > 1 else "",
            )
        )  # fmt: skip
    elif top is not None:
        cards.append(_card(f"with {top.key}, predicted", units.times(top.gain),
                           f"{units.seconds(top.seconds)} for the whole request"))  # fmt: skip
    full = words.fullest(bound)
    if full is not None and bound.fits is not None:
        phase, name, part = full
        cards.append(
            _card(
                "fits" if bound.fits else "does not fit", units.percent(part),
                f"of {name} at the worst moment, {phase.name}", "" if bound.fits else "bad",
            )
        )  # fmt: skip
    return f'<ul class="cards of-{len(cards)}">{"".join(cards)}</ul>'


def _header(report: Report) -> str:
    where = f"{report.bound.workload} on {report.machine.title or report.machine.name}"
    sentences = [words.headroom(report.bound)]
    if report.bound.fits is False:
        sentences.append(words.fits(report.bound))
    if report.proof is not None:
        sentences += [words.proves(report.proof), words.costs(report.proof)]
    elif report.options:
        sentences.append(words.widens(report))
    return (
        f'<header><div class="mark"><span><b>narrows</b> &#8202;·&#8202; {escape(where)}</span>'
        f"<time>{escape(report.date)}</time></div><h1>{escape(report.title)}</h1>"
        f'<p class="verdict">{escape(words.limits(report.bound, report.machine))}</p>'
        f"{_paragraph(' '.join(sentences))}{_cards(report)}</header>"
    )


# --- sections --------------------------------------------------------------------------------


def _roofline(report: Report) -> str:
    _, told = calibrated(report.machine, report.bound)
    caption = (
        "Each mark is one op class of a phase; its area is its share of the seconds, its height "
        "the operations a second as predicted. No run can be in the grey. "
    )
    if report.after is not None:
        caption += (
            f"Rings are the case as it is, discs the same op classes with {report.technique}. "
        )
    if told:
        caption += f"Dashed: the roof as it was measured to be reached ({told}). "
    else:
        caption += "This machine is not calibrated: the marks lie on its datasheet roof. "
    picture = svg(report.machine, report.bound, report.after, report.technique)
    return _section(
        "roofline", "What the hardware allows",
        f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>",
    )  # fmt: skip


def _time(report: Report) -> str:
    parts = [bars.legend(report.bound)]
    for phase in report.bound.phases:
        after = _after(report, phase)
        steps = f"{units.number(phase.steps)} steps" if phase.steps != 1 else "one step"
        parts.append(
            f"<h3>{escape(phase.name)} <small>{steps}, {escape(_phase_fact(phase))}</small></h3>"
            f"{bars.phase_bars(phase, after, report.technique)}"
        )
    parts.append(
        f"<details><summary>The numbers of every op class</summary>{_ops(report)}</details>"
    )
    return _section("time", "Where the time goes", *parts)


def _after(report: Report, phase: PhaseBound) -> PhaseBound | None:
    """The same phase with the technique, where there is one."""
    phases = report.after.phases if report.after is not None else ()
    return next((p for p in phases if p.name == phase.name), None)


def _phase_fact(phase: PhaseBound) -> str:
    told = f"{words.resource(phase.narrowest)} is the narrowest, "
    told += f"{units.times(phase.distance)} the limit"
    if phase.energy_joules is not None:
        told += f", at most {units.joules(phase.energy_joules)} at full power"
    return told


def _ops(report: Report) -> str:
    rows = [
        (
            "",
            (
                escape(phase.name), escape(words.op(row.op)),
                escape(words.resource(row.resource, report.machine)),
                units.rate(row.need, row.unit),
                units.rate(row.have, f"{row.unit}/s"),
                units.seconds(row.limit), units.seconds(row.seconds), units.percent(row.share),
            ),
        )
        for phase in report.bound.phases
        for row in phase.rows
    ]  # fmt: skip
    head = (("phase", False), ("op class", False), ("resource", False), ("need", True),
            ("have", True), ("least", True), ("narrowest", True), ("of phase", True))  # fmt: skip
    return _table(head, rows)


def _options(report: Report) -> str:
    if not report.options:
        return _section(
            "techniques", "What would widen it",
            _paragraph("No technique was asked about this case."),
        )  # fmt: skip
    ranked = sorted(report.options, key=lambda o: -o.gain)
    largest = max(ranked[0].gain - 1, 0.1)
    top = words.best(ranked)
    rows: list[tuple[str, Row]] = []
    for option in ranked:
        wide = max(0.0, option.gain - 1) / largest * 4.5
        rows.append(
            (
                "best" if option is top else "",
                (
                    f"<b>{escape(option.key)}</b><br><small>{escape(option.settings)}</small>",
                    f'<span class="gain" style="width:{wide:.2f}rem"></span>'
                    f"{units.times(option.gain)}",
                    units.seconds(option.seconds), escape(option.price.quality),
                    escape(option.price.training), escape(option.price.memory),
                    escape(option.reason),
                ),
            )
        )  # fmt: skip
    head = (("technique", False), ("gain", True), ("request", True), ("quality at risk", False),
            ("training", False), ("memory", False), ("here", False))  # fmt: skip
    lead = "Predicted by rewriting this case as each technique would run it; gain is old over new "
    lead += f"seconds of the whole request ({words.trust(report.bound)})."
    return _section("techniques", "What would widen it", _paragraph(lead, "lead"),
                    _table(head, rows))  # fmt: skip


def _frontier(found: Frontier) -> str:
    rows: list[tuple[str, Row]] = []
    for c in words.ranked(found):
        mark = words.mark(found, c.name)
        told = words.verdict(c) if c.verdict != "dense" else ""
        rows.append(
            (
                "best" if c.name == found.best else "",
                (
                    f"<b>{escape(c.name)}</b>" if mark else escape(c.name),
                    units.count_bytes(c.bytes), units.seconds(c.seconds), units.number(c.speed),
                    *(words.cost(c.costs[m]) if m in c.costs else "" for m in found.limits),
                    escape(f"{told} ({mark})" if mark else told),
                ),
            )
        )  # fmt: skip
    head = (
        ("cache", False), ("bytes", True), ("a step", True), ("tokens/s", True),
        *((f"{m} lost", True) for m in found.limits), ("verdict", False),
    )  # fmt: skip
    caption = (
        "Upper left is better. Filled: shown to be within the limits; hollow: not decided, or not "
        "read to the end; crossed: shown to be outside. The line joins what is within and is "
        "beaten by nothing else in both. Dashed: decode with next to nothing in the cache. "
    )
    measures = [(name, what) for name, what in found.measures.items()]
    left = sorted(found.left.items())
    parts = [
        *(_paragraph(sentence) for sentence in found.told),
        f"<figure>{frontiers.svg(found)}<figcaption>{escape(caption)}</figcaption></figure>",
        _paragraph(f"Limits: {words.asked(found)}. {words.searched(found)}", "lead"),
        _facts(measures),
        _table(head, rows[:SHOWN]),
    ]
    if rows[SHOWN:]:
        more = f"<details><summary>{len(rows) - SHOWN} more</summary>"
        parts.append(f"{more}{_table(head, rows[SHOWN:])}</details>")
    if left:
        parts.append(f"<details><summary>{len(left)} that were not read</summary>"
                     f"{_facts(left)}</details>")  # fmt: skip
    return _section("frontier", "What keeps the quality", *parts)


def _proof(proof: Proof) -> str:
    gain = proof.measured_gain
    predicted = Interval(proof.predicted_gain, proof.predicted_gain, proof.predicted_gain)
    rows = {"predicted": predicted, "measured": gain}
    told = {
        "predicted": units.times(proof.predicted_gain),
        "measured": f"{units.times(gain.value)} {units.span(gain.low, gain.high)}",
    }
    facts = [
        (f"{proof.phase}, as it is", f"{units.seconds(proof.dense_seconds)} a step"),
        (f"with {words.name(proof)}", f"{units.seconds(proof.technique_seconds)} a step"),
        *((name, f"{units.seconds(s)} a step") for name, s in proof.peers.items()),
        ("repeats", f"{proof.repeats}, interleaved; spread {units.percent(proof.spread)}"),
    ]
    if proof.dense_bytes is not None and proof.technique_bytes is not None:
        facts.append(
            (
                "bytes held",
                f"{units.count_bytes(proof.dense_bytes)} before, "
                f"{units.count_bytes(proof.technique_bytes)} with it",
            )
        )
    parts = [
        _paragraph(words.proves(proof)),
        f"<figure>{bars.whiskers(rows, told, ('measured',))}</figure>", _facts(facts),
    ]  # fmt: skip
    if proof.quality:
        parts.append("<h3>What it costs in quality <small>95 % intervals</small></h3>")
    for row in proof.quality:
        shown = {"as it is": row.dense, f"with {proof.key}": row.technique, **row.baselines}
        labels = {name: words.interval(row, figure) for name, figure in shown.items()}
        parts.append(
            f'<p class="note">{escape(row.name)}, {escape(row.better)} is better</p>'
            f"<figure>{bars.whiskers(shown, labels, (f'with {proof.key}',))}</figure>"
        )
    parts.append(_paragraph(proof.note, "note"))
    return _section("proof", "The gain, measured", *parts)


def _fits(report: Report) -> str:
    told = words.fits(report.bound)
    if report.bound.fits is False and report.after is not None and report.after.fits:
        told += f" With {report.technique} it fits."
    parts = [_paragraph(told, "lead")]
    for phase in report.bound.phases:
        if phase.levels:
            held = bars.level_bars(phase, _after(report, phase), report.technique)
            parts.append(f"<h3>{escape(phase.name)}</h3>{held}")
    return _section("fits", "What fits", *parts)


def _machine(report: Report) -> str:
    machine = report.machine
    rows: list[tuple[str, Row]] = [
        ("", (escape(r.name), units.rate(r.capacity, r.unit), escape(str(r.kind)),
              escape(r.source or machine.source)))
        for r in machine.resources.values()
        if r.kind is not Kind.CHANNEL
    ]  # fmt: skip
    for link in machine.links.values():
        has = units.rate(link.bandwidth, "byte/s")
        if link.latency:
            has += f", {units.seconds(link.latency)}"
        told = escape(link.source or machine.source)
        rows.append(("", (escape(link.name), has, f"link&nbsp;of&nbsp;{link.peers}", told)))
    head = (("resource", False), ("has", True), ("kind", False), ("source", False))
    parts = [
        _paragraph(f"{machine.title or machine.name}. {machine.note}".strip(), "lead"),
        _table(head, rows),
        "<h3>Calibration</h3>",
    ]
    if not machine.calibrations:
        parts.append(_paragraph(f"None: {report.bound.trust}."))
    else:
        known = (
            ("op class", False), ("compute", True), ("memory", True), ("fixed", True),
            ("rows", True), ("median error", True), ("p90 error", True), ("source", False),
        )  # fmt: skip
        fitted: list[tuple[str, Row]] = [
            (
                "",
                (
                    escape(words.op_class(name)), units.percent(c.compute), units.percent(c.memory),
                    units.seconds(c.fixed), str(c.n),
                    units.percent(c.error.median if c.error else None),
                    units.percent(c.error.p90 if c.error else None),
                    escape(", ".join(filter(None, (c.source, c.era)))),
                ),
            )
            for name, c in machine.calibrations.items()
        ]  # fmt: skip
        parts.append(
            _paragraph(
                "Fractions of the datasheet rate that each op class was measured to reach, the "
                "fixed cost of a call, and the error on rows that were not fitted on.", "lead",
            )
        )  # fmt: skip
        parts.append(_table(known, fitted))
    return _section("machine", "The machine", *parts)


def _again(report: Report) -> str:
    parts = [_facts(report.facts.items())] if report.facts else []
    if report.commands:
        lines = "\n".join(escape(command) for command in report.commands)
        parts.append(f"<pre><code>{lines}</code></pre>")
    parts += [_paragraph(note, "note") for note in report.notes]
    pairs = [*report.versions.items(), *([("date", report.date)] if report.date else [])]
    parts.append(_facts(pairs) if pairs else "")
    return _section("again", "How to get it again", *parts)


def page(report: Report) -> str:
    """The whole file as text."""
    css = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    body = [_roofline(report), _time(report), _options(report)]
    if report.frontier is not None:
        body.append(_frontier(report.frontier))
    if report.proof is not None:
        body.append(_proof(report.proof))
    body += [_fits(report), _machine(report), _again(report)]
    return (
        '<!doctype html>\n<html lang="en-GB"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="generator" content="narrows"><title>{escape(report.title)}</title>'
        f"<style>\n{colours(':root')}\n{css}</style></head>\n<body>{_header(report)}<main>{''.join(body)}</main>"
        "<footer>Made by narrows. Predictions are bounds of a model with the error given beside "
        "them; measured figures are medians of interleaved repeats on the machine named.</footer>"
        "</body></html>\n"
    )


def write(report: Report, path: str | Path) -> Path:
    """Write the report, wholly or not at all; returns where it is.

    Raises NarrowsError where the file cannot be written or matplotlib is not installed.
    """
    target = Path(path)
    text = page(report)
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, target)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise NarrowsError(f"the report could not be written to {target}: {error}") from error
    return target
