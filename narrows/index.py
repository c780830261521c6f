"""The one table of systems: what is known, what is built, and how to find it.

The rows are index.toml; nothing of a method is imported before `load`. Packages of others add
rows through the entry-point group `narrows.methods`: each entry point names an `Entry` (or a
tuple of them) in a light module, so that listing never imports a method either.
"""

from __future__ import annotations

import ast
import re
import tomllib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

from narrows.core.errors import NarrowsError, unknown

if TYPE_CHECKING:
    from narrows.core.method import Method

ROLES = ("instrument", "technique", "simulator", "searcher")

NARROW_POINTS: Mapping[str, str] = {
    "memory bandwidth": "bytes per second between a memory (hbm, gddr, dram, sram) and the units",
    "memory capacity": "bytes held at the worst moment, in hbm, vram, ram or on chip",
    "compute": "operations per second (flop, flops, tensor cores) and how well units are filled",
    "link": "bytes and messages between devices, hosts and nodes (pcie, nvlink, network, radio)",
    "storage": "bytes per second of a drive (disk, ssd, nvme, flash)",
    "dispatch": "fixed cost of a call, a step or a request (launch, overhead, host, python, copy)",
    "scheduling": "units that wait for others (bubble, straggler, imbalance, interference, idle)",
    "power": "watts and joules (energy)",
    "information": "bits that a layer, a code or an estimate passes (entropy, concept)",
    "search cost": "trials, evaluations or engineering until a good design is found (tuning)",
    "data": "examples that do not exist yet",
}
"""The words of `relieves`. The words of the description find a narrow point as well."""

GROUP = "narrows.methods"
"""Entry-point group of other packages' rows."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One system. See index.toml for the fields; `target` is empty while it is only planned."""

    key: str
    title: str
    folder: str
    role: str
    narrow_points: tuple[str, ...]
    what: str
    paper: str = ""
    target: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise unknown(f"role (of {self.key})", self.role, ROLES)
        for point in self.narrow_points:
            if point not in NARROW_POINTS:
                raise unknown(f"narrow point (of {self.key})", point, NARROW_POINTS)
        if not self.narrow_points:
            raise NarrowsError(f"system {self.key!r} says nothing of what it relieves")

    @property
    def relieves(self) -> str:
        """The main narrow point it widens or measures."""
        return self.narrow_points[0]

    @property
    def url(self) -> str:
        """Where the paper is, empty where it has no arXiv identifier."""
        arxiv = self.paper.removeprefix("arXiv:")
        return f"https://arxiv.org/abs/{arxiv}" if arxiv != self.paper else ""


@cache
def _own() -> tuple[Entry, ...]:
    table = tomllib.loads(Path(__file__).with_name("index.toml").read_text(encoding="utf-8"))
    return tuple(
        Entry(
            key, row["title"], folder, row["role"], tuple(row["relieves"]), row["what"],
            row["paper"], row.get("target", ""),
        )
        for folder, rows in table.items()
        for key, row in rows.items()
    )  # fmt: skip


@cache
def _others() -> tuple[Entry, ...]:
    """Rows of other packages; one that cannot be read is left out with a warning."""
    from importlib.metadata import entry_points  # takes longer to import than all of this file

    known = {entry.key for entry in _own()}
    found: list[Entry] = []
    for point in entry_points(group=GROUP):
        try:
            given = point.load()
            rows = (given,) if isinstance(given, Entry) else tuple(given)
            for row in rows:
                if not isinstance(row, Entry):
                    raise TypeError(f"{row!r} is not a narrows.index.Entry")
                if row.key in known:
                    raise ValueError(f"the key {row.key!r} is taken")
                known.add(row.key)
                found.append(row)
        except Exception as error:
            # A broken package of someone else must not take this one's systems with it.
            warnings.warn(f"entry point {point.value!r} of {GROUP}: {error}", stacklevel=2)
    return tuple(found)


def entries() -> tuple[Entry, ...]:
    """All systems, in the order of index.toml, those of other packages last."""
    return (*_own(), *_others())


def get(key: str) -> Entry:
    """The system of that key. Raises NarrowsError, with the nearest keys, for any other."""
    for entry in entries():
        if entry.key == key:
            return entry
    raise unknown("system", key, [e.key for e in entries()], "`narrows methods` lists them.")


def status(entry: Entry) -> str:
    """How far a system is, computed from its files and the committed evidence.

    `planned`: no module. `built`: some claim was not run under the current sources, is
    inconclusive, or waits for a GPU. `works`: all claims run, some not reproduced, each with its
    reason. `proven`: all reproduced.
    """
    if not is_built(entry):
        return "planned"
    wanted = _claims(entry.key)
    if not wanted:
        return "built"
    from narrows.evidence import SETTLED, standing

    found = standing(entry.key)
    verdicts = {name: found[name].verdict for name in wanted if name in found}
    if len(verdicts) < len(wanted) or not set(verdicts.values()) <= set(SETTLED):
        return "built"
    missed = [found[n] for n in wanted if found[n].verdict != "reproduced"]
    if not missed:
        return "proven"
    return "works" if all(r.explained for r in missed) else "built"


def is_built(entry: Entry) -> bool:
    """Whether its module exists, whatever its evidence says."""
    module = entry.target.partition(":")[0]
    return bool(module) and _exists(module)


def _claims(key: str) -> tuple[str, ...]:
    """Names of a system's claims, read from its file without importing it."""
    file = Path(__file__).parent / "claims" / f"{key}.py"
    if not file.is_file():
        return ()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return tuple(
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any(
            isinstance(d, ast.Call) and isinstance(d.func, ast.Name) and d.func.id == "claim"
            for d in node.decorator_list
        )
    )


@cache
def _exists(module: str) -> bool:
    """Whether there is such a module; nothing is imported to find out, where it is narrows' own."""
    package, _, rest = module.partition(".")
    if package == __name__.partition(".")[0]:
        path = Path(__file__).parent.joinpath(*rest.split("."))
        return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def built(role: str | None = None) -> tuple[Entry, ...]:
    """Systems that can be loaded, of one role where it is given."""
    if role is not None and role not in ROLES:
        raise unknown("role", role, ROLES)
    return tuple(e for e in entries() if role in (None, e.role) and is_built(e))


def load(key: str) -> type[Method]:
    """The class of a built system, imported now.

    Raises NarrowsError for an unknown or planned system, and where an optional package that the
    method needs is not installed.
    """
    from narrows.core.method import Method

    entry = get(key)
    if not is_built(entry):
        raise NarrowsError(
            f"{key} is planned and not built yet; `narrows methods` says which systems are"
        )
    module, _, name = entry.target.partition(":")
    try:
        found = getattr(import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise NarrowsError(
            f"{key} needs the package {error.name!r}; install it, or narrows[all]"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Method) and found.key == key):
        raise NarrowsError(f"{entry.target} is not the method {key!r}: the index is wrong")
    return found


# --- search ----------------------------------------------------------------------------------

STOP = frozenset(
    """
    a about against all an and any anything are as at be by can could do does for from have help
    how i in into is it its less make me more most my need of on or our out please reduce relieve
    should show so some something system technique than that the their them there these they this
    to too use want way what when where which who why widen will with would you your
    """.split()  # noqa: SIM905
)
"""Words that say nothing about a system (techniques are most of them)."""

SUFFIXES = ("ation", "ment", "ing", "ion", "ed", "er", "e")
"""Endings that do not matter: training is trained, quantisation is a quantiser's work."""

WEIGHTS: Mapping[str, float] = {
    "key": 8, "folder": 6, "relieves": 4, "title": 3, "also": 2, "role": 2, "what": 1,
}  # fmt: skip
"""What a word of the query counts when it is found in a field."""


def _words(text: str) -> Iterator[str]:
    """Lower-case words without stop words, reduced to one form (singular, British, no ending)."""
    for word in re.findall(r"[a-z0-9]+", text.lower()):
        if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3:
            word = word[:-3] + "y" if word.endswith("ies") else word[:-1]
        if word in STOP:
            continue
        word = re.sub(r"iz(?=e|ation|ing)", "is", word)
        ending = next((s for s in SUFFIXES if word.endswith(s) and len(word) - len(s) >= 4), "")
        yield word.removesuffix(ending)


def _points(names: Iterable[str]) -> frozenset[str]:
    return frozenset(w for name in names for w in _words(f"{name} {NARROW_POINTS[name]}"))


@cache
def _fields(entry: Entry) -> Mapping[str, frozenset[str]]:
    """The words of an entry, by the field they stand in."""
    return {
        "key": frozenset({entry.key, *_words(entry.key.replace("_", " "))}),
        "folder": frozenset({entry.folder, *_words(entry.folder)}),
        "relieves": _points(entry.narrow_points[:1]),
        "title": frozenset(_words(entry.title)),
        "also": _points(entry.narrow_points[1:]),
        "role": frozenset(_words(entry.role)),
        "what": frozenset(_words(entry.what)),
    }


def search(words: str) -> list[Entry]:
    """Systems that answer to the words, best first; all of them for no words.

    Those that hold more of the words come first (and those with less than half of what the best
    holds are left out). Among equals a system scores, for each word, the WEIGHTS of the fields
    that hold it, and a word counts the more the fewer systems have it.
    """
    asked = sorted(set(_words(words)))
    if not asked:
        return list(entries())
    scores: dict[Entry, list[float]] = {
        entry: [
            sum(WEIGHTS[name] for name, held in _fields(entry).items() if word in held)
            for word in asked
        ]
        for entry in entries()
    }
    holders = [sum(score[i] > 0 for score in scores.values()) for i in range(len(asked))]
    rarity = [log(1 + len(scores) / n) if n else 0.0 for n in holders]
    hits = {entry: sum(s > 0 for s in score) for entry, score in scores.items()}
    least = max(1, max(hits.values()) / 2)
    value = {
        entry: sum(s * r for s, r in zip(score, rarity, strict=True))
        for entry, score in scores.items()
    }
    return sorted((e for e in scores if hits[e] >= least), key=lambda e: (-hits[e], -value[e]))
