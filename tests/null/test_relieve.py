"""The search within limits of quality: limits, intervals, verdicts, and who is read how often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from narrows import door
from narrows.cli import main
from narrows.core.errors import NarrowsError
from narrows.kv.bfp import BFP
from narrows.kv.kivi import KIVI
from narrows.kv.snapkv import SnapKV
from narrows.kv.stack import Stack
from narrows.relieve import judge, search, within
from narrows.relieve.judge import Effort, fewer_right, limits, more_perplexity, student
from narrows.relieve.search import verdict
from narrows.relieve.stacks import Priced, priced
from narrows.report.model import Interval

# --- limits ----------------------------------------------------------------------------------


def test_limits_are_shares() -> None:
    assert limits(["ppl=1%", "recall=0.02", "later=0"]) == {
        "ppl": 0.01, "recall": 0.02, "later": 0.0,
    }  # fmt: skip
    assert limits(["ppl=.5%"]) == {"ppl": pytest.approx(0.005)}
    assert limits(["ppl=1e-2"]) == {"ppl": 0.01}


@pytest.mark.parametrize(
    "text",
    ["ppl=1%%", "ppl=%", "ppl", "ppl=", "ppl=-1%", "ppl=nan", "ppl=inf", "ppl=1e9", "ppl=1 %",
     "ppl=one", "speed=1%", "=1%", "ppl=1_0%", "ppl=٣%"],
)  # fmt: skip
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(NarrowsError):
        limits([text])


def test_a_limit_given_twice_is_refused() -> None:
    with pytest.raises(NarrowsError, match="twice"):
        limits(["ppl=1%", "ppl=2%"])


# --- intervals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freedom", "known"),
    [(1, 12.706), (2, 4.3027), (3, 3.1824), (7, 2.3646), (15, 2.1314), (127, 1.9788)],
)
def test_student_s_t(freedom: int, known: float) -> None:
    assert student(0.95, freedom) == pytest.approx(known, rel=0.01 if freedom == 3 else 1e-3)


def test_one_reading_gives_no_interval() -> None:
    with pytest.raises(ValueError, match="two readings"):
        student(0.95, 0)


def test_intervals_of_perplexity_hold_the_truth() -> None:
    rng, true, held = np.random.default_rng(0), 0.004, 0
    for _ in range(2000):
        dense = rng.normal(3, 0.3, 8)
        found = more_perplexity(dense, dense + rng.normal(true, 0.01, 8))
        held += found.low <= np.expm1(true) <= found.high
    assert 0.94 < held / 2000 < 0.965


@pytest.mark.parametrize("prompts", [8, 32])
@pytest.mark.parametrize("kept", [0.9, 0.99, 1.0])
def test_intervals_of_answers_hold_the_truth(prompts: int, kept: float) -> None:
    """Prompts differ in how hard they are, so that answers of one are not independent."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(600):
        easy = rng.beta(9, 1, (prompts, 1))
        dense = rng.random((prompts, 16)) < easy
        read = dense & (rng.random((prompts, 16)) < kept)
        found = fewer_right(dense, read)
        held += found.low <= 1 - kept <= found.high
    assert held / 600 > 0.93


def test_no_interval_is_without_width() -> None:
    dense = np.full(8, 3.0)
    for read in (dense, dense + 0.25):
        found = more_perplexity(dense, read)
        assert found.low < found.value < found.high
        assert found.high - found.low > 1e-6
    right = np.ones((8, 16), bool)
    found = fewer_right(right, right)
    assert found.low < 0 == found.value < found.high
    none = fewer_right(right, np.zeros((8, 16), bool))
    assert none.low < 1.0 == none.value < none.high


def test_more_read_is_narrower_and_more_looks_are_wider() -> None:
    rng = np.random.default_rng(0)
    dense = rng.random((128, 16)) < 0.9
    read = dense & (rng.random((128, 16)) < 0.98)
    few, many = fewer_right(dense[:8], read[:8]), fewer_right(dense, read)
    assert many.high - many.low < few.high - few.low
    wide = fewer_right(dense, read, 1 - 0.05 / 3)
    assert wide.high > many.high


def test_a_dense_cache_that_knows_nothing_has_nothing_to_lose() -> None:
    none = np.zeros((8, 16), bool)
    with pytest.raises(NarrowsError, match="answers nothing"):
        fewer_right(none, none)


def test_a_text_that_cannot_be_kept_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    judge._keep(tmp_path / "file" / "deeper" / "text.npy", np.zeros(3))
    judge._keep(tmp_path / "folder" / "text.npy", np.arange(3))
    assert np.load(tmp_path / "folder" / "text.npy").tolist() == [0, 1, 2]
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["text.npy"]


# --- verdicts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [(-0.1, 0.01, "within"), (-0.1, 0.011, "undecided"), (0.0101, 0.2, "outside"),
     (0.01, 0.2, "undecided")],
)  # fmt: skip
def test_verdict(low: float, high: float, told: str) -> None:
    good = Interval(0.0, -0.001, 0.001)
    costs = {"ppl": good, "recall": Interval((low + high) / 2, low, high)}
    assert verdict(costs, {"ppl": 0.01, "recall": 0.01}) == told
    del costs["ppl"]
    known = told if told == "outside" else "undecided"
    assert verdict(costs, {"ppl": 0.01, "recall": 0.01}) == known


# --- the search ------------------------------------------------------------------------------


@dataclass
class Fake:
    """A judge whose truth is given; its intervals shrink as more is read."""

    truth: Mapping[str, float]
    model: Any = None
    read: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    calls: list[tuple[str, ...]] = field(default_factory=list[tuple[str, ...]])

    def costs(
        self, candidates: Mapping[str, Any], effort: Effort, limits: Any, progress: Any = None
    ) -> dict[str, dict[str, Interval]]:
        self.calls.append(tuple(candidates))
        self.read += [(name, effort.prompts) for name in candidates]
        half = 0.02 / effort.prompts
        told: dict[str, dict[str, Interval]] = {}
        for name in candidates:
            cost = self.truth[name]
            told[name] = {"ppl": Interval(cost, cost - half, cost + half)}
        return told


LOOKS = Effort(1, 1), Effort(4, 4), Effort(16, 16)


@dataclass(frozen=True)
class Named:
    """A stand-in for a technique."""

    key: str


def candidate(name: str, seconds: float, held: float = 1.0) -> Priced:
    stack = "+" in name
    made = Stack(SnapKV(), KIVI()) if stack else Named(name)

    class Known(Priced):
        @property
        def name(self) -> str:
            return name

    return Known(made, None, held, seconds, 1 / seconds, None)  # type: ignore[arg-type]


def found(
    monkeypatch: pytest.MonkeyPatch, alone: list[Priced], stacks: list[Priced], fake: Fake
) -> search.Found:
    monkeypatch.setattr(search, "singles", lambda case, *models: (alone, {"locret": "train it"}))
    monkeypatch.setattr(search, "pairs", lambda case, parts, *models: stacks)
    monkeypatch.setattr(search, "priced", lambda case: candidate("dense", 10.0, 10.0))
    return search.search(None, fake, {"ppl": 0.01}, looks=LOOKS)  # type: ignore[arg-type]


def test_the_fastest_within_is_chosen_and_no_more_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [candidate(n, s) for n, s in (("a", 4.0), ("b", 3.0), ("c", 2.0), ("d", 1.0))]
    stacks = [candidate("b+a", 2.5), candidate("c+a", 1.5), candidate("d+a", 0.5)]
    fake = Fake({"a": 0.0, "b": 0.002, "c": 0.016, "d": 0.5, "b+a": 0.003, "c+a": 0.02, "d+a": 0.6})
    told = found(monkeypatch, alone, stacks, fake)
    assert told.single is not None
    assert told.stack is not None
    assert (told.single.priced.name, told.stack.priced.name) == ("b", "b+a")
    assert told.best is told.stack
    further = [name for name, prompts in fake.read if prompts > 1]
    assert "d" not in further, "what the screening showed to be outside is read no further"
    assert "d+a" not in further
    assert further.count("b") == 1, "what is within is read no further"
    assert ("c", 16) not in fake.read, "what is outside is read no further"
    assert told.left["locret"] == "train it"


def test_kinds_share_a_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake({"a": 0.0, "a+b": 0.0})
    found(monkeypatch, [candidate("a", 1.0)], [candidate("a+b", 0.5)], fake)
    assert ("a", "a+b") in fake.calls


def test_what_stays_open_is_read_whole_and_called_undecided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = Fake({"a": 0.01})
    told = found(monkeypatch, [candidate("a", 1.0)], [], fake)
    assert told.best is None
    assert [prompts for _, prompts in fake.read] == [1, 4, 16]
    assert told.judged[-1].verdict == "undecided"
    assert told.judged[-1].thorough


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [candidate(f"a{i}", 1.0 + i) for i in range(20)]
    fake = Fake(dict.fromkeys((p.name for p in alone), 0.01))
    found(monkeypatch, alone, [], fake)
    further = {name for name, prompts in fake.read if prompts > 1}
    assert further == {f"a{i}" for i in range(search.PATIENCE)}


def test_a_slower_one_is_taken_where_faster_ones_are_outside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = [candidate(f"a{i}", 1.0 + i) for i in range(5)]
    fake = Fake({"a0": 0.016, "a1": 0.016, "a2": 0.016, "a3": 0.0, "a4": 0.0})
    told = found(monkeypatch, alone, [], fake)
    assert told.single is not None
    assert told.single.priced.name == "a3"


def test_stacks_that_may_be_within_are_screened_first(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [candidate("harsh", 1.0), candidate("mild", 2.0)]
    stacks = [candidate(f"harsh+{i}", 0.1) for i in range(30)] + [candidate("mild+x", 0.9)]
    truth = {"harsh": 0.012, "mild": 0.0, "mild+x": 0.0} | {f"harsh+{i}": 0.5 for i in range(30)}
    fake = Fake(truth)
    told = found(monkeypatch, alone, stacks, fake)
    assert told.stack is not None
    assert told.stack.priced.name == "mild+x"
    assert "mild+x" in fake.calls[1]
    assert sum(name in told.left for name in truth) == len(stacks) - search.SCREENED


def test_equal_speeds_are_told_apart_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [candidate("big", 1.0, 9.0), candidate("small", 1.001, 3.0)]
    told = found(monkeypatch, alone, [], Fake({"big": 0.0, "small": 0.0}))
    assert told.best is not None
    assert told.best.priced.name == "small"


# --- prices and names ------------------------------------------------------------------------


def test_a_stack_is_priced_as_both() -> None:
    case = door.case("llama-3-8b", "h100-sxm", prompt=8192, generate=128, batch=8)
    choose, code = SnapKV(ratio=0.5), KIVI(4, 4, residual_length=32)
    dense, a, b = priced(case), priced(case, choose), priced(case, code)
    both = priced(case, Stack(choose, code))
    assert both.stacked
    assert not a.stacked
    assert both.bytes < min(a.bytes, b.bytes) < dense.bytes
    assert both.bytes / dense.bytes == pytest.approx(a.bytes * b.bytes / dense.bytes**2, rel=0.05)
    assert both.seconds < min(a.seconds, b.seconds) < dense.seconds
    assert both.tokens_per_second == pytest.approx(8 / both.seconds)


@pytest.mark.parametrize(
    "made",
    [KIVI(8, 4, residual_length=32), SnapKV(ratio=0.9375), BFP(8, 4, sort=False),
     Stack(SnapKV(ratio=0.1), KIVI(4, 2)), Stack(SnapKV(capacity=64, pool="max"), BFP())],
    ids=door.spelled,
)  # fmt: skip
@pytest.mark.parametrize("whole", [False, True])
def test_a_name_can_be_typed(made: Any, whole: bool) -> None:
    again = door.technique(door.spelled(made, whole))
    assert type(again) is type(made)
    assert door.spelled(again, True) == door.spelled(made, True)


# --- the command -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        ("--text", "there.txt"),
        ("--within", "ppl=1%", "--text", "missing.txt"),
        ("--within", "ppl=1%", "--text", "."),
        ("--within", "ppl=1%", "--text", "binary"),
        ("--within", "ppl=1%", "--text", "cut.gz"),
        ("--within", "ppl=1%%"),
        ("--within", "ppl=1%", "--within", "ppl=2%"),
        ("--within", "ppl=1%", "--generate", "0"),
        ("--within", "speed=1%"),
        ("--prompt", "0", "--generate", "0"),
        ("--batch", "0"),
    ],
    ids=" ".join,
)
def test_bad_input_is_told_before_anything_is_measured(
    given: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("narrows.measure.here.load_or_measure", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.txt").write_text("text")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "cut.gz").write_bytes(b"\x1f\x8b\x08\x00")
    machine = () if "--within" in given or "--text" in given else ("--machine", "h100-sxm")
    told = CliRunner().invoke(main, ["relieve", "reference", *machine, *given])
    assert told.exit_code == 2, told.output
    assert "narrows: " in told.output
    assert not (tmp_path / "report.html").exists()


def test_text_is_read_packed_or_plain(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "a.txt").write_text("größer", encoding="utf-8")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("größer".encode()))
    assert within.read(tmp_path / "a.txt") == within.read(tmp_path / "a.txt.gz") == "größer"


# --- the judge, and what cannot be applied ---------------------------------------------------


def test_the_judge_reads_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, tuple[str, ...]]] = []

    def losses(model: Any, policies: Any, ids: Any, context: int, scored: int, windows: int) -> Any:
        assert len(ids) == windows * (context + scored + 1)
        read.append(("ppl", tuple(policies)))
        worse = {"bad": 0.5}
        return {n: np.linspace(3, 3.1, windows) + worse.get(n, 0.0) for n in policies}

    def answered(
        model: Any, tokenizer: Any, policies: Any, text: Any, prompts: int, **_: Any
    ) -> Any:
        read.append(("recall", tuple(policies)))
        return {n: np.ones((prompts, 16), bool) for n in policies}

    monkeypatch.setattr(judge.quality, "losses", losses)
    monkeypatch.setattr(judge.quality, "answered", answered)
    text = np.arange(judge.ROWS * (judge.quality.TOKENS + 1) * 2)
    made = judge.Judge(None, None, ("ppl", "recall"), text)
    asked = {"good": KIVI(), "bad": SnapKV()}
    limit = {"ppl": 0.01, "recall": 0.01}
    told = made.costs(asked, Effort(8, 8), limit)
    assert read == [("ppl", ("dense", "good", "bad")), ("recall", ("dense", "good"))]
    assert told["bad"].keys() == {"ppl"}, "what is outside one limit is not read for another"
    assert verdict(told["bad"], limit) == "outside"
    read.clear()
    again = made.costs({"good": KIVI()}, Effort(8, 8), limit)
    assert read == []
    assert again["good"] == told["good"]
    more = made.costs({"good": KIVI(), "new": KIVI(4, 4)}, Effort(8, 16), limit)
    assert read == [
        ("ppl", ("new",)), ("ppl", ("dense", "good", "new")), ("recall", ("new",)),
    ]  # fmt: skip
    assert more["good"]["ppl"].high < told["good"]["ppl"].high


def test_a_short_text_is_refused() -> None:
    with pytest.raises(NarrowsError, match="at least"):
        judge.Judge(None, None, ("ppl",), np.arange(1000))


def test_what_cannot_be_applied_is_said() -> None:
    from narrows.relieve.job import _refused

    case = door.case("llama-3-8b", "h100-sxm", prompt=8192, generate=128, batch=8)
    before = case.bound()
    after = case.with_(SnapKV()).bound()

    class Untrained(SnapKV):
        def of(self, model: Any, state: Any = None) -> Any:
            raise NarrowsError("train it first")

    assert "no cache" in _refused(Named("gpipe"), None, before, after)  # type: ignore[arg-type]
    assert "not in decode" in _refused(SnapKV(), None, before, before)
    assert _refused(Untrained(), None, before, after) == "train it first"


def test_why_a_stack_gains_less_is_told_in_figures() -> None:
    cost = {"ppl": Interval(0.03, 0.02, 0.04)}
    little = {"ppl": Interval(0.0, -0.001, 0.001)}
    single = search.Judged(candidate("a", 2.0, 8.0), little, "within", True)
    stack = search.Judged(candidate("a+b", 1.9, 6.0), little, "within", True)
    harsh = search.Judged(candidate("a+c", 1.0, 2.0), cost, "outside", False)
    made = search.Found(
        candidate("dense", 4.0, 16.0), (single, stack, harsh), {"ppl": 0.01}, single, stack, {}
    )
    told = within._sentences(made, candidate("empty", 0.5))
    assert told[1].endswith("holds 1.33× fewer bytes than it and decodes 1.05× as fast.")
    assert "a+c loses least (ppl +3.00 % [2.00, 4.00]: outside)" in told[2]
    assert "8.00× as fast as the dense one" in told[2]
    told = within._sentences(made, candidate("empty", 1.8))
    assert "no cache could be 1.30× as fast as that one" in told[2]
    assert "1.11× as fast as a." in told[2]
