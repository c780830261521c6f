"""The TOML form of a machine, read: text to Machine, nothing half understood.

Every refusal is one sentence that names the file, the field, what was given and what to do.
The form itself is described in README.md of this folder.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any, NoReturn, TypeVar

import msgspec

from narrows.core.calibration import Calibration, Error
from narrows.core.errors import NarrowsError, unknown
from narrows.core.machine import Machine
from narrows.core.price import FUNCTIONS
from narrows.core.resource import Kind, Link, Resource
from narrows.core.tensor import BITS
from narrows.core.workload import KINDS

MAX_BYTES = 200_000
"""Larger files are not machines."""

MAX_LINE = 4_000
"""Nor are longer lines: a TOML key of thousands of parts takes the parser quadratic time."""

SEE = "the form is described in narrows/machines/README.md"

MACHINE_KINDS = ("gpu", "tpu", "cpu", "accelerator", "node", "board", "mcu")
TOPOLOGIES = ("point", "all-to-all", "ring", "tree", "torus", "shared")
PRECISIONS = (*(p for p in BITS if p not in ("bool", "int64")), "fp4", "int16")

UNITS: Mapping[Kind, Mapping[str, tuple[float, float]]] = {
    Kind.RATE: {"flop/s": (1e5, 1e21), "byte/s": (1e4, 1e18), "op/s": (1e-6, 1e21)},
    Kind.LEVEL: {"byte": (256, 1e18), "watt": (1e-6, 1e9), "slot": (1, 1e12)},
    Kind.CHANNEL: {"bit": (1e-6, 1e12)},
}
"""Units by table, with the figures a machine can have: what lies outside was given in GB or TF."""

TABLES: Mapping[Kind, str] = {kind: f"{kind}s" for kind in Kind}

_NAME = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*")
BARE = re.compile(r"[A-Za-z0-9_-]+")
_PRICER = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_WORDS = {
    "float": "a number", "int": "a whole number", "str": "text", "object": "a table",
    "array": "a list", "bool": "true or false", "null": "nothing", "datetime": "a date",
    "date": "a date", "time": "a time",
}  # fmt: skip


class _Resource(msgspec.Struct, forbid_unknown_fields=True):
    capacity: float
    unit: str
    source: str = ""


class _Link(msgspec.Struct, forbid_unknown_fields=True):
    bandwidth: float
    latency: float = 0.0
    peers: int = 2
    topology: str = "point"
    source: str = ""


class _Error(msgspec.Struct, forbid_unknown_fields=True):
    median: float
    mean: float
    p90: float
    n: int


class _Calibration(msgspec.Struct, forbid_unknown_fields=True):
    compute: float = 1.0
    memory: float = 1.0
    fixed: float = 0.0
    step: float = 0.0
    tiles: list[tuple[int, int]] = []
    n: int = 0
    source: str = ""
    era: str = ""
    error: _Error | None = None


class _Machine(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    kind: str
    tiers: dict[str, Any]
    rates: dict[str, Any]
    title: str = ""
    year: int = 0
    units: int = 0
    source: str = ""
    note: str = ""
    caches: list[str] = []
    pricer: str | None = None
    levels: dict[str, Any] = {}
    channels: dict[str, Any] = {}
    links: dict[str, Any] = {}
    calibrations: dict[str, Any] = {}


T = TypeVar("T", bound=msgspec.Struct)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse(where: str, at: str, told: str) -> NoReturn:
    raise NarrowsError(f"{where}: {at}: {told}" if at else f"{where}: {told}")


def _join(at: str, key: str) -> str:
    key = key if BARE.fullmatch(key) else _shown(key).replace("'", '"')
    return f"{at}.{key}" if at else key


def _convert(raw: object, form: type[T], where: str, at: str) -> T:
    """One table as its form; unknown and missing fields and wrong types are refused."""
    if not isinstance(raw, dict):
        _refuse(where, at, f"must be a table, not {_shown(raw)}")
    for key in raw:
        if key not in form.__struct_fields__:
            told = str(unknown("field", str(key), form.__struct_fields__, SEE))
            _refuse(where, at, told)
    try:
        return msgspec.convert(raw, form, strict=True)
    except msgspec.ValidationError as error:
        told, _, path = str(error).partition(" - at `$")
        found = re.fullmatch(r"Object missing required field `(\w+)`", told)
        if found:
            _refuse(where, at + path.rstrip("`"), f"{found[1]!r} is missing; add it")
        told = re.sub(r"`(\w+)`", lambda m: _WORDS.get(m[1], m[1]), told).replace("`", "'")
        told = told[:1].lower() + told[1:]
        if told == "expected a number, got text":
            told += "; write the bare figure, as in 3.35e12"
        _refuse(where, (at + path.rstrip("`")).lstrip("."), told)


def _number(value: float, low: float, high: float, where: str, at: str, unit: str) -> float:
    """A finite figure within what a machine can have."""
    if not isfinite(value) or value <= 0:
        _refuse(where, at, f"must be finite and above zero, not {value!r}")
    if not low <= value <= high:
        _refuse(
            where, at, f"{value:g} {unit} is not a figure a machine has ({low:g} to {high:g}); "
            "give it in plain SI units, as in 3.35e12 for 3.35 TB/s",
        )  # fmt: skip
    return value


def _whole(value: int, low: int, high: int, where: str, at: str) -> int:
    if not low <= value <= high:
        _refuse(where, at, f"must be a whole number from {low} to {high}, not {value}")
    return value


def _one_of(value: str, known: Iterable[str], what: str, where: str, at: str) -> str:
    if value not in known:
        _refuse(where, at, str(unknown(what, value, known)))
    return value


def _name(value: str, where: str, at: str) -> str:
    if not _NAME.fullmatch(value) or len(value) > 64:
        _refuse(
            where, at, f"{_shown(value)} is no name; use lower-case letters and digits, "
            "joined by '-', '_' or '.'",
        )  # fmt: skip
    return value


def _plain(value: object, where: str, at: str) -> None:
    """Refuse control characters anywhere: titles and sources go to terminals and reports."""
    if isinstance(value, str):
        if _CONTROL.search(value):
            _refuse(where, at, "has control characters; take them out")
    elif isinstance(value, dict):
        for key, inner in value.items():
            _plain(key, where, at)
            _plain(inner, where, _join(at, key))
    elif isinstance(value, list):
        for inner in value:
            _plain(inner, where, at)


def _resources(doc: _Machine, where: str) -> dict[str, Resource]:
    found: dict[str, Resource] = {}
    for kind, raw in (
        (Kind.RATE, doc.rates),
        (Kind.LEVEL, doc.levels),
        (Kind.CHANNEL, doc.channels),
    ):
        for name, entry in raw.items():
            at = _join(TABLES[kind], _name(name, where, TABLES[kind]))
            part = _convert(entry, _Resource, where, at)
            if part.unit not in UNITS[kind]:
                _refuse(
                    where, f"{at}.unit", f"{_shown(part.unit)} is no unit of {TABLES[kind]}; give "
                    f"the figure in {' or '.join(UNITS[kind])}, plain SI, as in 3.35e12",
                )  # fmt: skip
            if name.startswith("compute."):
                precision = name.removeprefix("compute.")
                _one_of(precision, PRECISIONS, "precision", where, at)
            if name in found:
                _refuse(where, at, "there is a resource of that name already; rename one")
            wrong = "byte/s" if name.startswith("compute.") else "flop/s"
            if part.unit == wrong:
                _refuse(where, f"{at}.unit", f"{wrong!r} does not fit a rate of that name")
            low, high = UNITS[kind][part.unit]
            _number(part.capacity, low, high, where, f"{at}.capacity", part.unit)
            found[name] = Resource(name, kind, part.capacity, part.unit, part.source)
    return found


def _links(doc: _Machine, where: str) -> dict[str, Link]:
    found: dict[str, Link] = {}
    for name, entry in doc.links.items():
        at = _join("links", _name(name, where, "links"))
        part = _convert(entry, _Link, where, at)
        _number(part.bandwidth, 1e3, 1e18, where, f"{at}.bandwidth", "byte/s")
        if not 0 <= part.latency <= 1e4:
            _refuse(where, f"{at}.latency", f"must be 0 to 10000 seconds, not {part.latency!r}")
        _whole(part.peers, 2, 100_000_000, where, f"{at}.peers")
        _one_of(part.topology, TOPOLOGIES, "topology", where, f"{at}.topology")
        found[name] = Link(
            name, part.bandwidth, part.latency, part.peers, part.topology, part.source
        )
    return found


def _calibrations(doc: _Machine, where: str) -> dict[str, Calibration]:
    found: dict[str, Calibration] = {}
    for op, entry in doc.calibrations.items():
        at = _join("calibrations", op)
        kind, *special = op.split(".")  # `matmul`, `matmul.bf16`, `matmul.bf16.vector`
        _one_of(kind, KINDS, "op class", where, at)
        if special:
            _one_of(special[0], PRECISIONS, "precision", where, at)
        if len(special) > 1:
            kernels = ("vector", "function", "backward", *FUNCTIONS)
            _one_of(".".join(special[1:]), kernels, "kernel", where, at)
        part = _convert(entry, _Calibration, where, at)
        for side in (side for tile in part.tiles for side in tile):
            _whole(side, 1, 65_536, where, f"{at}.tiles")
        _whole(part.n, 0, 10**12, where, f"{at}.n")
        for name, seconds in (("fixed", part.fixed), ("step", part.step)):
            if not 0 <= seconds <= 1e4:
                _refuse(where, f"{at}.{name}", f"must be 0 to 10000 seconds, not {seconds!r}")
        error = None
        if part.error is not None:
            for side in ("median", "mean", "p90"):
                if not 0 <= getattr(part.error, side) <= 1e6:
                    _refuse(where, f"{at}.error.{side}", "must be a fraction, as in 0.07 for 7 %")
            _whole(part.error.n, 0, 10**12, where, f"{at}.error.n")
            error = Error(part.error.median, part.error.mean, part.error.p90, part.error.n)
        try:
            found[op] = Calibration(
                op, part.compute, part.memory, part.fixed, tuple(part.tiles), part.n,
                part.source, part.era, error, part.step,
            )  # fmt: skip
        except NarrowsError as refused:
            _refuse(where, at, str(refused))
    return found


def _tiers(
    doc: _Machine, resources: Mapping[str, Resource], links: Mapping[str, Link], where: str
) -> dict[str, str]:
    """Tiers name byte rates or links; `device` is a memory, `peers` a link."""
    memories = [n for n, r in resources.items() if r.kind is Kind.RATE and r.unit == "byte/s"]
    for tier, target in doc.tiers.items():
        at = _join("tiers", _name(tier, where, "tiers"))
        if not isinstance(target, str):
            _refuse(where, at, f"must name a rate or a link, not {_shown(target)}")
        if tier == "device":
            _one_of(target, memories, "byte/s rate", where, at)
        elif tier == "peers":
            _one_of(target, links, "link", where, at)
        else:
            _one_of(target, [*memories, *links], "byte/s rate or link", where, at)
    for name, level in resources.items():
        owner = name.removesuffix(".capacity")
        if level.kind is Kind.LEVEL and owner != name:
            at = _join("levels", name)
            _one_of(owner, [*memories, *links], "byte/s rate or link", where, at)
            if level.unit != "byte":
                _refuse(where, f"{at}.unit", f"a capacity is in 'byte', not {level.unit!r}")
    power = resources.get("power")
    if power is not None and (power.kind, power.unit) != (Kind.LEVEL, "watt"):
        _refuse(where, _join(TABLES[power.kind], "power"), "power is a level and its unit 'watt'")
    return dict(doc.tiers)


def _build(raw: dict[str, Any], where: str) -> Machine:
    _plain(raw, where, "")
    doc = _convert(raw, _Machine, where, "")
    _name(doc.name, where, "name")
    _one_of(doc.kind, MACHINE_KINDS, "kind of machine", where, "kind")
    _whole(doc.units, 0, 10**9, where, "units")
    if doc.year:
        _whole(doc.year, 1940, 2100, where, "year")
    if doc.pricer is not None and not _PRICER.fullmatch(doc.pricer):
        _refuse(where, "pricer", f"must be 'module:Class', not {_shown(doc.pricer)}")
    resources = _resources(doc, where)
    links = _links(doc, where)
    for name in links:
        if name in resources:
            _refuse(where, _join("links", name), "a resource has that name already; rename one")
    try:
        return Machine(
            doc.name, doc.title, doc.kind, resources, _tiers(doc, resources, links, where), links,
            tuple(doc.caches), doc.units, _calibrations(doc, where), doc.year, doc.source,
            doc.note, doc.pricer,
        )  # fmt: skip
    except NarrowsError as error:
        told = str(error)
        raise (error if told.startswith(where) else NarrowsError(f"{where}: {told}")) from None


def loads(text: str | bytes, where: str) -> Machine:
    """The machine a TOML text describes; `where` is what error messages call it.

    Raises NarrowsError for anything that is not wholly a machine.
    """
    if len(text) > MAX_BYTES:
        raise NarrowsError(f"{where}: larger than {MAX_BYTES:,} bytes, so not a machine")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        if max(map(len, text.splitlines()), default=0) > MAX_LINE:
            raise NarrowsError(f"{where}: a line is longer than {MAX_LINE:,} characters; split it")
        return _build(tomllib.loads(text), where)
    except UnicodeDecodeError:
        raise NarrowsError(f"{where}: not UTF-8 text; save it as UTF-8") from None
    except RecursionError:
        raise NarrowsError(f"{where}: nested far deeper than a machine is") from None
    except (ValueError, OverflowError) as error:
        told = _shown(str(error)).strip("'\"")
        raise NarrowsError(f"{where}: not valid TOML ({told}); {SEE}") from None
