"""report.html: whole, self-contained, escaped, and honest about what is missing."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="the report extra is not installed")

from narrows.core.errors import NarrowsError
from narrows.report import frontier, html, roofline, units
from narrows.report.labels import Box, Labels, width
from narrows.report.picture import VARIABLES
from narrows.report.points import frame, points, roofs
from tests.null import reports

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Reader(HTMLParser):
    """Checks that every element is closed in order; collects attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def whole() -> str:
    return html.page(reports.whole())


@pytest.fixture(scope="module")
def bare() -> str:
    return html.page(reports.bare())


@pytest.mark.parametrize("which", ["whole", "bare"])
def test_it_parses_and_loads_nothing(which: str, request: pytest.FixtureRequest) -> None:
    page = request.getfixturevalue(which)
    reader = read(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
    for tag, name, value in reader.attributes:
        if name in ("src", "href", "xlink:href", "data", "srcset", "action"):
            assert value.startswith("#"), f"<{tag} {name}={value}> would load something"
        assert not name.startswith("on"), f"<{tag} {name}> is a script"
    css = re.sub(r"url\(#[^)]*\)", "", page)
    assert "url(" not in css
    assert "@import" not in css


def test_strings_of_a_user_are_text(whole: str) -> None:
    reader = read(whole)
    assert "<script" not in whole
    assert reports.NASTY in "".join(reader.text)
    assert whole.count("alert") >= 8, "the nasty name is in title, verdict, facts, notes, ..."


def test_semantics_for_those_who_do_not_see_it(whole: str) -> None:
    reader = read(whole)
    assert ("html", "lang", "en-GB") in reader.attributes
    assert reader.tags.count("h1") == 1
    assert {"main", "header", "footer", "section", "figure", "figcaption"} <= set(reader.tags)
    pictures = [a for a in reader.attributes if a[0] == "svg" and a[1] == "role"]
    assert len(pictures) == whole.count("<svg")
    ids = [v for _, name, v in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids)), "ids are unique in the page"
    for target in (v for _, name, v in reader.attributes if name == "aria-labelledby"):
        assert target in ids


def test_every_section_of_the_whole_job_is_there(whole: str) -> None:
    text = "".join(read(whole).text)
    for heading in (
        "What the hardware allows", "Where the time goes", "What would widen it",
        "The gain, measured", "What fits", "The machine", "How to get it again",
    ):  # fmt: skip
        assert heading in text
    assert "p90 error 15 %" in text
    assert "[2.05, 2.19]" in text


def test_what_is_missing_is_said(bare: str) -> None:
    text = "".join(read(bare).text)
    assert "expect 30-80 % optimism" in text
    assert "No technique was asked" in text
    assert "capacity not known" in text
    assert "The gain, measured" not in text


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    assert html.write(reports.bare(), target) == target
    assert target.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(NarrowsError, match="could not be written"):
        html.write(reports.bare(), tmp_path / "missing" / "report.html")


# --- the picture -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def picture() -> str:
    told = reports.whole()
    return roofline.svg(told.machine, told.bound, told.after, "snapkv", standalone=True)


def test_the_picture_has_a_mark_for_each_op_class(picture: str) -> None:
    told = reports.whole()
    assert told.after is not None
    ElementTree.fromstring(picture)
    for name, found in (("mark", told.bound), ("after", told.after)):
        for i, p in enumerate(points(found)):
            hint = re.search(rf'<g id="{name}-{i}"><title>([^<]*)</title>', picture)
            assert hint is not None, f"{p.phase} {p.op} has no mark"
            assert units.seconds(p.seconds) in hint.group(1)
    for i in range(len(told.bound.phases)):
        assert f'id="measured-{i}"' in picture


def test_the_picture_takes_the_colours_of_the_page(picture: str) -> None:
    for stand_in in VARIABLES:
        assert stand_in not in picture
    assert "var(--ink)" in picture
    assert "prefers-color-scheme:dark" in picture
    assert "DejaVu" not in picture
    assert len(picture) < 120_000, "texts are texts, not outlines"


def test_the_picture_names_what_it_shows(picture: str) -> None:
    told = "".join(ElementTree.fromstring(picture).itertext())
    for needed in ("narrowest:", "hbm", "989 TFLOP/s", "3.35 TB/s", "with snapkv",
                   "roof as calibrated", "area: share of the seconds"):  # fmt: skip
        assert needed in told


@pytest.mark.parametrize("name", ["cortex-m7", "raspberry-pi-4", "tpu-v4", "m2-pro"])
def test_pictures_of_other_machines(name: str) -> None:
    given = reports.case(name, "gpt2", 256)
    found = given.bound()
    ElementTree.fromstring(roofline.svg(given.machine, found))
    box = frame(points(found), roofs(given.machine, found))
    for p in points(found):
        x, y = box.place(p)
        assert box.left < x < box.right
        assert box.bottom < y <= box.top


def test_the_same_report_gives_the_same_picture() -> None:
    told = reports.bare()
    assert roofline.svg(told.machine, told.bound) == roofline.svg(told.machine, told.bound)


def test_labels_keep_apart() -> None:
    from matplotlib.figure import Figure

    axes = Figure(figsize=(8, 5), dpi=72).add_axes((0, 0, 1, 1))
    labels = Labels(axes, "black", "grey")
    for i in range(12):
        labels.mark(
            f"label {i}", 0.5 + 0.01 * (i % 4), 0.5 + 0.01 * (i // 4), 4, "black", must=False
        )
    placed: list[Box] = labels.taken
    assert len(placed) >= 8, "there is room for most of them"
    for i, box in enumerate(placed):
        for other in placed[i + 1 :]:
            assert box.overlap(other) <= 4
    assert width("ill") < width("mmm")


# --- the frontier ----------------------------------------------------------------------------


def test_the_frontier_has_a_mark_and_a_hint_for_each_cache() -> None:
    found = reports.frontier()
    drawn = frontier.svg(found, standalone=True)
    ElementTree.fromstring(drawn)
    for i, c in enumerate(found.candidates):
        hint = re.search(rf'<g id="cache-{i}"><title>([^<]*)</title>', drawn)
        assert hint is not None, c.name
        assert units.count_bytes(c.bytes) in hint.group(1)
    for stand_in in VARIABLES:
        assert stand_in not in drawn
    told = "".join(ElementTree.fromstring(drawn).itertext())
    for needed in ("best stack", "best single one", "dense", "with an empty cache", "not decided"):
        assert needed in told


def test_the_frontier_line_joins_what_nothing_beats() -> None:
    found = reports.frontier()
    assert [c.name for c in frontier.best(found)] == [found.stack]
    slower = replace(found.of(found.stack), name="small", bytes=1e6, speed=10.0)
    more = replace(found, candidates=(*found.candidates, slower))
    assert [c.name for c in frontier.best(more)] == ["small", found.stack]


def test_a_search_that_found_nothing_is_drawn() -> None:
    dense = reports.frontier().candidates[:1]
    nothing = replace(reports.frontier(), candidates=dense, best="", single="", stack="", most=None)
    picture = frontier.svg(nothing)
    ElementTree.fromstring(picture)
    assert picture.count('id="cache-') == 1
    assert "best" not in re.sub(r"<title>.*?</title>", "", picture, flags=re.S)


def test_the_page_with_both_pictures_is_whole_and_escaped() -> None:
    page = html.page(replace(reports.whole(), frontier=reports.frontier()))
    reader = read(page)
    names = [value for _, name, value in reader.attributes if name == "id"]
    assert len(names) == len(set(names)), "ids of two pictures do not clash"
    assert "<script" not in page
    assert "What keeps the quality" in page
