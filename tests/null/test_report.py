"""Numbers with units, the sentences, and the tables of a terminal."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from narrows import index
from narrows.core.calibration import Error
from narrows.core.claim import Claim
from narrows.evidence import Result
from narrows.machines.load import catalogue
from narrows.report import text, units, words
from narrows.report.points import points, roofs
from tests.null import reports


@pytest.mark.parametrize(
    ("value", "unit", "told"),
    [
        (3.35e12, "B/s", "3.35 TB/s"), (402e6, "B", "402 MB"), (989e12, "FLOP/s", "989 TFLOP/s"),
        (0, "W", "0 W"), (999.6e9, "B", "1.00 TB"), (9.996, "s", "10.0 s"),
        (1.234e-3, "s", "1.23 ms"), (8.1e-6, "s", "8.10 µs"), (5e-10, "s", "500 ps"),
        (-2e3, "J", "-2.00 kJ"), (None, "B", "–"), (float("nan"), "B", "–"),
        (float("inf"), "B", "∞"), (1e25, "B", "10000000 EB"),
    ],
)  # fmt: skip
def test_si(value: float | None, unit: str, told: str) -> None:
    assert units.si(value, unit) == told


@given(st.floats(1e-14, 1e20))
def test_si_says_the_value_within_half_a_figure(value: float) -> None:
    number, unit = units.si(value, "s").split(" ")
    prefix = unit.removesuffix("s")
    steps = {p: i for i, p in enumerate(units.PREFIXES)} | {
        p: -i for i, p in enumerate(units.SMALL)
    }
    assert float(number) * 1000.0 ** steps[prefix] == pytest.approx(value, rel=0.00501)
    if 1e-14 < value < 1e19:
        assert 1 <= float(number) < 1000


@pytest.mark.parametrize(
    ("show", "value", "told"),
    [
        (units.percent, 0.123, "12 %"), (units.percent, 0.0123, "1.2 %"),
        (units.percent, 0.0996, "10 %"), (units.percent, 0.00004, "<0.1 %"),
        (units.percent, 1.5, "150 %"), (units.percent, None, "–"), (units.percent, 0.0, "0 %"),
        (units.times, 2.314, "2.31×"), (units.times, 130.4, "130×"), (units.times, None, "–"),
        (units.seconds, 45.6, "45.6 s"), (units.seconds, 1234.0, "20.6 min"),
        (units.seconds, 7300.0, "2.03 h"), (units.seconds, 2e5, "2.31 days"),
        (units.count_bytes, 512, "512 B"), (units.number, 4096, "4096"),
        (units.number, 8.03e9, "8.03 G"), (units.number, 2.5, "2.50"),
    ],
)  # fmt: skip
def test_other_units(show: Callable[[float | None], str], value: float | None, told: str) -> None:
    assert show(value) == told


def test_a_resource_says_what_sort_of_narrow_point_it_is() -> None:
    machine = reports.whole().machine
    assert words.resource("hbm") == "memory bandwidth (hbm)"
    assert words.resource("compute.bf16") == "compute (bf16)"
    assert words.resource("nvlink", machine) == "link (nvlink)"
    assert words.resource("l2") == "cache bandwidth (l2)"
    assert words.op("attention_decode") == "attention"
    assert words.op_class("attention_decode") == "attention (decode)"
    assert words.op_class("matmul.fp32.vector") == "matmul fp32 vector"


def test_the_verdict_names_resource_share_limit_and_error() -> None:
    told = reports.whole()
    share = units.percent(words.share(told.bound, "compute.bf16"))
    assert words.limits(told.bound).startswith("Compute (bf16) is the narrowest point: it sets ")
    assert f"it sets {share} of the {units.seconds(told.bound.seconds)}" in words.limits(told.bound)
    assert "physical limit" in words.headroom(told.bound)
    assert "p90 error 15 %" in words.headroom(told.bound)
    assert "9.1 % too low" in words.headroom(told.bound)
    assert "expect 30-80 % optimism" in words.headroom(reports.bare().bound)
    assert words.fits(reports.bare().bound).startswith("Whether it fits is not known")


def test_a_gain_within_its_spread_is_no_gain() -> None:
    assert words.proves(reports.proof(0.95, 1.08)).startswith("Inconclusive")
    assert not reports.proof(0.95, 1.08).conclusive
    assert "9.0 % too high" in words.proves(reports.proof())


def test_half_measured_is_not_measured() -> None:
    found = reports.whole().bound
    half = replace(found, phases=(found.phases[0], replace(found.phases[1], measured_seconds=None)))
    assert words.measured(half) is None
    assert words.measured(found) == pytest.approx(1.1 * found.seconds)


def test_every_op_class_is_a_point_and_seconds_add_up() -> None:
    found = reports.whole().bound
    marks = points(found)
    for phase in found.phases:
        mine = [p for p in marks if p.phase == phase.name]
        assert [p.op for p in mine] == list(dict.fromkeys(r.op for r in phase.rows))
        assert sum(p.seconds for p in mine) == pytest.approx(phase.seconds)
        assert sum(p.flops for p in mine) == pytest.approx(phase.flops)
        assert sum(p.bytes for p in mine) == pytest.approx(sum(phase.bytes.values()))


def test_roofs_are_the_machine_s_own_rates() -> None:
    told = reports.whole()
    lines = {r.name: r for r in roofs(told.machine, told.bound)}
    assert lines["hbm"].used
    assert lines["hbm"].rate == told.machine.bandwidth("hbm")
    assert lines["bf16, fp16"].rate == told.machine.compute("bf16").capacity
    assert not lines["tf32"].used


# --- tables ----------------------------------------------------------------------------------


def shown(draw: Callable[[Console], None], width: int) -> str:
    """What a pipe of that width gets."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    draw(console)
    got = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(len(line) for line in got.splitlines()) <= width
    assert "\x1b" not in got, "no colour codes in a pipe"
    return got


@pytest.mark.parametrize("width", [40, 60, 120])
def test_tables_of_the_whole_job(width: int) -> None:
    told = reports.whole()
    got = shown(lambda c: text.report(c, told), width)
    joined = " ".join(got.split())
    assert "[bold]x[/bold]" in joined.replace("\n", ""), "markup of a user is text"
    for needed in ("matmul", "snapkv", "prefill", "decode"):
        assert needed in joined


@pytest.mark.parametrize("width", [60, 120])
def test_tables_of_what_is_missing(width: int) -> None:
    told = reports.bare()
    got = shown(lambda c: text.report(c, told), width)
    assert "not known" in got
    assert "No technique" in got
    assert "Not calibrated" in shown(lambda c: text.machine(c, told.machine), width)


@pytest.mark.parametrize("width", [60, 120])
def test_tables_of_machines_and_methods(width: int) -> None:
    machines = list(catalogue().values())
    got = shown(lambda c: text.machines(c, machines), width)
    for machine in machines:
        assert machine.name in got
        assert machine.name in shown(lambda c, m=machine: text.machine(c, m), width)
    listed = shown(lambda c: text.methods(c, index.entries()), width)
    for entry in index.entries():
        assert entry.key in listed
    assert "No system answers" in shown(lambda c: text.methods(c, []), width)


class Checked:
    """What validate gives: errors as fractions, by class, with refusals."""

    rows = ()
    verdict = None

    def as_dict(self) -> dict[str, object]:
        row = {"n": 10, "median_ape": 0.05, "mean_ape": 0.07, "p90_ape": 0.15}
        return {
            **row, "classes": {"attention_decode": row}, "naive": {**row, "median_ape": 0.35},
            "refused": [{"file": "a.csv", "row": i, "reason": "too fast"} for i in range(2, 32)],
        }  # fmt: skip


@pytest.mark.parametrize("width", [60, 120])
def test_tables_of_validation(width: int) -> None:
    got = shown(lambda c: text.validation(c, Checked()), width)
    assert "attention decode" in got
    assert "35 %" in got
    assert "Refused 30 rows" in got
    assert "a.csv:2: too fast" in got
    assert "27 more" in got
    assert "No verdict" in shown(lambda c: text.here(c, Checked()), width)


def test_table_of_a_calibration() -> None:
    machine = reports.whole().machine
    got = shown(lambda c: text.calibration(c, machine, (), "out.toml"), 100)
    assert "attention (decode)" in got
    assert "out.toml" in got
    assert Error.of([1.0], [1.0]).n == 1


@pytest.mark.parametrize("width", [60, 120])
def test_tables_of_verdicts(width: int) -> None:
    claim = Claim("decode_gain", (3.0, float("inf")), "times faster", "", "", "measured", float)
    results = [
        Result("decode_gain", 1, "reproduced", 3.61, "times faster", (3.0, inf), (3.5, 3.7)),
        Result("f1", 1, "not-reproduced", 30.0, "F1", 33.36, reason=reports.NASTY, explained=True),
        Result("on_a_gpu", 1, "needs-gpu", None, "tokens", 380e3, reason="needs a GPU"),
    ]  # fmt: skip

    def draw(console: Console) -> None:
        tell = text.claim_teller(console)
        for result in results:
            tell("snapkv", claim, result)
        text.verdicts(console, results)

    joined = " ".join(shown(draw, width).split())
    for needed in ("decode gain", "at least 3.00", "3.610", "needs gpu", "[bold]x[/bold]",
                   "3 claims: 1 reproduced", "1 of the misses explained"):  # fmt: skip
        assert needed in joined


def test_open_intervals_and_tiny_figures() -> None:
    from narrows.report.verdicts import expected

    inf = float("inf")
    assert expected((-inf, 0.0)) == "at most 0"
    assert expected((1.0, inf)) == "at least 1.00"
    assert expected((-inf, inf)) == "any figure"
    assert expected((0.0, 1e-12)) == "0 to 1e-12"
    assert units.figures(-inf) == "-∞"


# --- the frontier ----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 60, 96, 120])
def test_table_of_a_search_is_one_screen(width: int) -> None:
    found = reports.frontier()
    got = shown(lambda c: text.frontier(c, found), width)
    joined = " ".join(got.split())
    assert f"{len(found.candidates) - text.ROWS} more, 0 of them within" in joined
    squeezed = "".join(got.split())
    for needed in (found.best, found.single, "dense", "chosen", "bestsingle"):
        assert needed.split(":")[0] in squeezed or width < 96, needed
    assert "ppl at most 1.0 %" in joined
    if width >= 96:
        assert "+0.20 % [-0.10, 0.60]" in joined if width == 120 else "+0.20 %" in joined
    if width == 120:
        assert len(got.splitlines()) <= 24


def test_what_was_only_screened_is_not_called_within() -> None:
    found = reports.frontier()
    one = replace(found.of(found.single), thorough=False)
    assert words.verdict(one) == "only screened"
    assert not words.shown_within(one)
    assert words.verdict(replace(one, verdict="outside")) == "outside"


def test_a_search_goes_to_json_whole() -> None:
    import json
    from dataclasses import asdict

    told = json.loads(json.dumps(asdict(reports.frontier())))
    assert len(told["candidates"]) == len(reports.frontier().candidates)
    assert {"limits", "best", "single", "stack", "told", "left", "error", "most"} <= told.keys()
