"""The memory-level part of bound: what attention moves across faster memories."""

from __future__ import annotations

from dataclasses import replace

import pytest

import narrows
from narrows.core.hierarchy import HierarchyRow, fast_levels, hierarchy
from narrows.core.resource import Kind, Resource
from narrows.machines.load import load


def rows(phase: str = "prefill", **settings: object) -> dict[str, HierarchyRow]:
    given = {"machine": "a100-80", "prompt": 8192, "generate": 8, "batch": 2, **settings}
    case = narrows.case("llama-3-8b", **given)  # pyright: ignore[reportArgumentType]
    return {row.level: row for row in hierarchy(case) if row.phase == phase}


def test_the_fast_memories_are_those_in_front_of_the_main_one() -> None:
    assert list(fast_levels(load("a100-80"))) == ["smem", "l2"]
    assert fast_levels(load("cortex-m7")) == {}


def test_nothing_moves_less_than_once_nor_beats_the_bound() -> None:
    for phase in ("prefill", "decode"):
        for row in rows(phase).values():
            assert row.floor <= row.least <= row.reached
    assert rows("decode")["smem"].reached == rows("decode")["smem"].floor
    assert rows()["smem"].reached > 2 * rows()["smem"].floor


def test_the_floor_is_what_the_price_counts_when_scores_stay_on_chip() -> None:
    assert rows()["l2"].planned == pytest.approx(rows()["l2"].floor)
    config = narrows.case("llama-3-8b", machine="a100-80", prompt=1024, generate=0, batch=1)
    eager = replace(config, plan=replace(config.plan, fusion=()))
    assert hierarchy(eager)[0].planned > 5 * hierarchy(eager)[0].floor


def test_more_fast_memory_never_moves_more() -> None:
    case = narrows.case("llama-3-8b", machine="a100-80", prompt=16384, generate=0, batch=1)
    before = float("inf")
    for size in (16e3, 64e3, 256e3, 1e6, 4e6, 16e6):
        level = Resource("smem.capacity", Kind.LEVEL, size, "byte")
        machine = replace(
            case.machine, resources={**case.machine.resources, "smem.capacity": level}
        )
        row = next(r for r in hierarchy(replace(case, machine=machine)) if r.level == "smem")
        assert row.least <= row.reached <= before
        before = row.reached


def test_sixteen_bit_words_halve_the_bytes_of_a_bound_that_capacity_does_not_touch() -> None:
    assert rows(dtype="fp32")["l2"].floor == pytest.approx(2 * rows(dtype="bf16")["l2"].floor)
