"""The search drops what is plainly outside, pairs the rest, and stops at the first of each kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

import narrows
from narrows.door import spelled, technique
from narrows.kv.kivi import KIVI
from narrows.kv.snapkv import SnapKV
from narrows.kv.stack import Stack
from narrows.relieve import search as module
from narrows.relieve.judge import FULL, SCREEN
from narrows.relieve.search import PATIENCE, search
from narrows.relieve.stacks import priced, singles
from narrows.report.model import Interval
from tests.cpu.kv.tiny import llama


class Fake:
    """A judge that knows what each part costs; stacks cost the sum. Counts what is asked."""

    def __init__(self, costs: Mapping[str, float], width: float = 0.001) -> None:
        self.model = llama()
        self.known, self.width = costs, width
        self.asked: list[tuple[str, bool]] = []

    def cost(self, name: str) -> float:
        return sum(next((v for k, v in self.known.items() if part.startswith(k)), 1.0)
                   for part in name.split("+"))  # fmt: skip

    def costs(self, candidates: Mapping[str, Any], effort: Any, at: Any = None) -> dict[str, Any]:
        assert effort in (SCREEN, FULL)
        self.asked += [(name, effort is FULL) for name in candidates]
        wide = self.width * (1 if effort is FULL else 4)
        return {
            name: {"ppl": Interval(c, c - wide, c + wide)}
            for name in candidates for c in [self.cost(name)]
        }  # fmt: skip


@pytest.fixture
def case():
    return narrows.case("llama-3-8b", "h100-sxm", prompt=8192, generate=128, batch=16)


@pytest.fixture(autouse=True)
def two_techniques(monkeypatch, case):
    """Two techniques with two settings each, whatever else is built by now."""

    def some(*_: Any) -> tuple[list[Any], dict[str, str]]:
        # heads of 16 channels here
        made = [SnapKV(ratio=0.5), SnapKV(ratio=0.75), KIVI(8, 8, 16, 16), KIVI(2, 2, 16, 16)]
        return [priced(case, t) for t in made], {}

    monkeypatch.setattr(module, "singles", some)


def test_the_fastest_stack_within_is_found_and_little_is_read(case):
    judge = Fake({"snapkv:ratio=0.5": 0.002, "snapkv": 0.05, "kivi:key_bits=8": 0.001,
                  "kivi": 0.03})  # fmt: skip
    found = search(case, judge, {"ppl": 0.01})
    assert found.stack is not None
    assert found.single is not None
    assert found.best is found.stack
    assert found.best.priced.name.startswith("snapkv:ratio=0.5+kivi:key_bits=8")
    names = [name for name, _ in judge.asked]
    assert not any("ratio=0.75" in n and "+" in n for n in names), "what is outside is not paired"
    thorough = [n for n, full in judge.asked if full]
    assert len(thorough) <= 3, thorough
    told = {j.priced.name: j.verdict for j in found.judged}
    assert told["snapkv:ratio=0.75"] == "outside"


def test_the_fastest_of_a_kind_is_judged_first(case):
    judge = Fake({"snapkv": 0.001, "kivi": 0.001})
    found = search(case, judge, {"ppl": 0.01})
    assert found.single is not None
    least = min((j.priced for j in found.judged if not j.priced.stacked), key=lambda p: p.seconds)
    assert found.single.priced.seconds <= least.seconds * 1.03


def test_nothing_within_is_said(case):
    found = search(case, Fake({}), {"ppl": 0.01})
    assert found.best is None
    assert found.single is None
    assert {j.verdict for j in found.judged} == {"outside"}


def test_patience_ends(case, monkeypatch):
    many = [SnapKV(ratio=0.5 + i / 100) for i in range(20)]
    monkeypatch.setattr(module, "singles", lambda *_: ([priced(case, t) for t in many], {}))
    judge = Fake({"snapkv": 0.0095}, width=0.001)  # never decided
    found = search(case, judge, {"ppl": 0.01})
    assert found.single is None
    assert sum(full for _, full in judge.asked) == PATIENCE


def test_singles_say_why_one_is_left_out(case):
    found, left = singles(case, llama())
    assert all(p.bytes < priced(case).bytes for p in found)
    assert any("do not divide heads of 16" in why for why in left.values())


@pytest.mark.parametrize(
    "made",
    [
        SnapKV(ratio=0.75), KIVI(4, 2, 16, 32), Stack(SnapKV(capacity=96), KIVI()),
        Stack(SnapKV(ratio=0.5, pool="max"), KIVI(8, 8, residual_length=32)),
    ],
)  # fmt: skip
def test_names_are_read_back(made):
    for whole in (False, True):
        again = technique(spelled(made, whole=whole))
        assert type(again) is type(made)
        assert spelled(again, whole=True) == spelled(made, whole=True)


def test_a_stack_is_priced_as_both(case):
    both = priced(case, Stack(SnapKV(ratio=0.5), KIVI()))
    alone = priced(case, SnapKV(ratio=0.5))
    assert both.stacked
    assert both.bytes < alone.bytes
    assert both.seconds < alone.seconds < priced(case).seconds
