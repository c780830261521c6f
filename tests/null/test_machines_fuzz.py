"""Whatever is in a machine file, it is either wholly a machine or refused in one sentence."""

from __future__ import annotations

import copy
import math
import tomllib
from typing import Any

import tomli_w
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from narrows.core.errors import NarrowsError
from narrows.core.machine import Machine
from narrows.machines.load import CATALOGUE, dumps, loads, names

FILES = {name: (CATALOGUE / f"{name}.toml").read_text("utf-8") for name in names()}
MODELS = {name: tomllib.loads(text) for name, text in FILES.items()}
RELAXED = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # fmt: skip


def read(text: str | bytes) -> Machine | None:
    """The machine, or None where it was refused; any other exception fails the test."""
    try:
        machine = loads(text, "fuzz.toml")
    except NarrowsError as refused:
        told = str(refused)
        assert told.startswith("fuzz.toml: ")
        assert len(told) < 1500
        return None
    assert isinstance(machine, Machine)
    for resource in machine.resources.values():
        assert math.isfinite(resource.capacity)
        assert resource.capacity > 0
    for tier in machine.tiers:
        assert machine.bandwidth(tier) > 0
    assert loads(dumps(machine), "again") == machine
    return machine


def refusal(document: dict[str, Any]) -> str:
    """The sentence a document is refused with, empty when it was taken for a machine."""
    try:
        loads(tomli_w.dumps(document), "fuzz.toml")
    except NarrowsError as refused:
        return str(refused)
    return ""


LEAVES = st.one_of(
    st.text(max_size=20), st.integers(), st.floats(), st.booleans(), st.dates(), st.times(),
    st.datetimes(), st.just([]), st.just({}), st.integers(min_value=10**300, max_value=10**310),
    st.sampled_from(["byte/s", "flop/s", "GB/s", "hbm", "pcie", "device", "here", ""]),
)  # fmt: skip
KEYS = st.one_of(
    st.text(max_size=12),
    st.sampled_from([
        "name", "kind", "tiers", "rates", "levels", "links", "calibrations", "capacity", "unit",
        "compute.bf16", "hbm", "device", "power", "caches", "error", "tiles", "pricer",
    ]),
)  # fmt: skip
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=20,
)


@RELAXED
@given(st.binary(max_size=300))
@example(b"\xef\xbb\xbf")
@example(b"x = " + b"[" * 3_900)
@example(b"x = " + b"[" * 190_000)
@example(b"x = " + b"9" * 3_900)
@example(b"rates" + b".a" * 1_900 + b" = 1")
@example(b"rates" + b".a" * 90_000 + b" = 1")
@example(b"x = 1e999999999")
@example(b"x = nan\n[x]")
def test_random_bytes(data: bytes) -> None:
    assert read(data) is None


@RELAXED
@given(st.text(max_size=300))
def test_random_text(text: str) -> None:
    assert read(text) is None


@RELAXED
@given(st.dictionaries(KEYS, TREES, max_size=8))
def test_random_documents(document: dict[str, Any]) -> None:
    try:
        text = tomli_w.dumps(document)
    except (ValueError, TypeError):
        return
    read(text)


@RELAXED
@given(st.sampled_from(sorted(FILES)), st.data())
def test_cut_and_spliced_files(name: str, data: st.DataObject) -> None:
    text = FILES[name]
    at = data.draw(st.integers(0, len(text)))
    upto = data.draw(st.integers(at, min(len(text), at + 40)))
    read(text[:at] + data.draw(st.text(max_size=8)) + text[upto:])
    raw = bytearray(text.encode())
    raw[at % len(raw)] = data.draw(st.integers(0, 255))
    read(bytes(raw))


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all fields and tables of a document."""
    found: list[tuple[Any, ...]] = []
    if isinstance(tree, dict):
        for key, inner in tree.items():
            found += [(*path, key), *places(inner, (*path, key))]
    return found


def changed(document: dict[str, Any], path: tuple[Any, ...], change: str, new: Any) -> Any:
    """The document with one field dropped, renamed, retyped or with its number spoilt."""
    copied = copy.deepcopy(document)
    table = copied
    for key in path[:-1]:
        table = table[key]
    old = table[path[-1]]
    number = isinstance(old, int | float) and not isinstance(old, bool)
    if change == "drop":
        del table[path[-1]]
    elif change == "rename":
        table[f"{path[-1]}x"] = table.pop(path[-1])
    elif change == "retype":
        table[path[-1]] = new
    elif number:
        table[path[-1]] = {
            "negate": -old, "zero": 0 * old, "nan": math.nan, "inf": math.inf, "shrink": old * 1e-12
        }[change]  # fmt: skip
    return copied


CHANGES = ("drop", "rename", "retype", "negate", "zero", "nan", "inf", "shrink")


@settings(RELAXED, max_examples=500)
@given(st.sampled_from(sorted(MODELS)), st.sampled_from(CHANGES), st.data())
def test_mutated_machines(name: str, change: str, data: st.DataObject) -> None:
    document = MODELS[name]
    path = data.draw(st.sampled_from(places(document)))
    mutant = changed(document, path, change, data.draw(TREES))
    try:
        text = tomli_w.dumps(mutant)
    except (ValueError, TypeError):
        return
    read(text)


def test_every_single_spoilt_number_is_refused() -> None:
    """Not by chance: every figure of a rich machine, spoilt in every way, is refused by name."""
    document = copy.deepcopy(MODELS["h100-sxm"])
    document["calibrations"] = {
        "matmul": {
            "compute": 0.7, "memory": 0.8, "fixed": 8e-6, "tiles": [[128, 128]], "n": 10,
            "source": "s", "era": "e",
            "error": {"median": 0.1, "mean": 0.1, "p90": 0.2, "n": 5},
        }
    }  # fmt: skip
    document["links"]["nvlink"]["latency"] = 1e-6
    assert read(tomli_w.dumps(document)) is not None
    free_to_be_zero = {"latency", "fixed", "n", "median", "mean", "p90", "units", "year"}
    for path in places(document):
        table = document
        for key in path:
            table = table[key]
        if isinstance(table, dict | list | str):
            continue
        for change in ("negate", "zero", "nan", "inf"):
            if change == "zero" and path[-1] in free_to_be_zero:
                continue
            told = refusal(changed(document, path, change, None))
            assert str(path[-1]) in told, f"{change} of {path}: {told!r}"


def test_every_missing_needed_field_is_named() -> None:
    document = MODELS["h100-sxm"]
    needed = [
        ("name",), ("kind",), ("tiers",), ("rates",), ("tiers", "device"),
        ("rates", "hbm", "capacity"), ("rates", "hbm", "unit"),
        ("levels", "power", "capacity"), ("links", "nvlink", "bandwidth"), ("rates", "hbm"),
    ]  # fmt: skip
    for path in needed:
        told = refusal(changed(document, path, "drop", None))
        assert path[-1] in told, f"without {path}: {told!r}"


def test_wrong_units_are_refused_by_name() -> None:
    for path, unit in (
        (("rates", "hbm"), "GB/s"), (("rates", "hbm"), "byte"), (("rates", "hbm"), "flop/s"),
        (("rates", "compute.bf16"), "TFLOPS"), (("rates", "compute.bf16"), "byte/s"),
        (("levels", "hbm.capacity"), "GB"), (("levels", "hbm.capacity"), "watt"),
        (("levels", "power"), "byte"), (("levels", "power"), "kW"),
    ):  # fmt: skip
        document = copy.deepcopy(MODELS["h100-sxm"])
        document[path[0]][path[1]]["unit"] = unit
        assert "unit" in refusal(document), f"{path} in {unit}"


def test_figures_in_giga_and_tera_are_refused() -> None:
    for path, figure in (
        (("rates", "hbm", "capacity"), 3350), (("rates", "compute.bf16", "capacity"), 989.4),
        (("levels", "hbm.capacity", "capacity"), 80), (("links", "nvlink", "bandwidth"), 450),
    ):  # fmt: skip
        document = copy.deepcopy(MODELS["h100-sxm"])
        document[path[0]][path[1]][path[2]] = figure
        assert "plain SI" in refusal(document), f"{path} = {figure}"
