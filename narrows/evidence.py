"""Evidence: what `narrows prove` found, under which sources, on which machine.

One file a key and machine, `evidence/<key>/<machine>-<UTC>-<fingerprint8>.json`, written atomically
after every claim. In a checkout it lies in the repository and is committed; an installed user's own
goes to the platform's data directory, and what the wheel carries is read besides.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
VERDICTS = ("reproduced", "not-reproduced", "inconclusive", "needs-gpu")
SETTLED = ("reproduced", "not-reproduced")
SURFACE = ("cli", "report", "index", "evidence", "door")
"""Parts that show results and do not make them: a change of theirs leaves evidence standing."""


@dataclass(frozen=True)
class Result:
    """One claim, run. figure, interval, predicted: in the claim's unit. explained: the miss is
    understood and said. reason: why it missed, or what it waits for."""

    claim: str
    version: int
    verdict: str
    figure: float | None
    unit: str
    expected: float | tuple[float, float]
    interval: tuple[float, float] | None = None
    predicted: float | None = None
    details: Mapping[str, float | str] = field(default_factory=dict[str, float | str])
    reason: str = ""
    explained: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Evidence:
    """The results of a key on one machine. sources: hash of the code they rest on."""

    key: str
    machine: str
    date: str
    sources: str
    fingerprint: str
    versions: Mapping[str, str]
    commit: str
    command: str
    results: tuple[Result, ...]


def own() -> Path:
    """Where new evidence goes."""
    checkout = PACKAGE.parent
    if (checkout / "pyproject.toml").is_file():
        return checkout / "evidence"
    from platformdirs import user_data_dir

    return Path(user_data_dir("narrows")) / "evidence"


def folders() -> tuple[Path, ...]:
    """Where evidence is read from: one's own, and what the wheel carries."""
    return (own(), PACKAGE / "_evidence")


# --- what results rest on ----------------------------------------------------------------------


def _file(module: str) -> Path | None:
    path = PACKAGE.parent.joinpath(*module.split("."))
    for found in (path.with_suffix(".py"), path / "__init__.py"):
        if found.is_file():
            return found
    return None


@cache
def _code(file: Path) -> tuple[str, frozenset[str]]:
    """Hash of what a file does (comments and docstrings do not count), and modules it names."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    named: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            named.add(node.module)
            named.update(f"{node.module}.{alias.name}" for alias in node.names)
    named = {n for n in named if n.split(".")[0] == PACKAGE.name}
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]
                b for b in body
                if not (isinstance(b, ast.Expr) and isinstance(b.value, ast.Constant))
            ]  # fmt: skip
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), frozenset(named)


def reached(key: str) -> list[Path]:
    """Files of narrows that a key's claims reach by import, sorted."""
    todo, seen = [f"narrows.claims.{key}"], set[Path]()
    while todo:
        module = todo.pop()
        if module.split(".")[1:2] and module.split(".")[1] in SURFACE:
            continue
        file = _file(module)
        if file is None or file in seen:
            continue
        seen.add(file)
        todo.extend(_code(file)[1])
    return sorted(seen)


def sources(key: str) -> str:
    """Hash of all code that a key's results rest on."""
    whole = hashlib.sha256()
    for file in reached(key):
        whole.update(f"{file.relative_to(PACKAGE)} {_code(file)[0]}\n".encode())
    return whole.hexdigest()


def versions() -> dict[str, str]:
    """Python and the packages that figures can depend on."""
    found = {"python": platform.python_version()}
    for package in ("numpy", "scipy", "numba", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def machine() -> str:
    """A name for this machine in file names: its GPU where there is one, else its processor."""
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return _slug(done.stdout.splitlines()[0])
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        model = found.group(1) if found else model
    return f"{_slug(model)}-{os.cpu_count()}core"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def fingerprint(key: str) -> str:
    """Hash of sources, package versions and machine: what a result stands under."""
    whole = json.dumps([sources(key), versions(), machine()], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


# --- files ---------------------------------------------------------------------------------------


def _result(row: dict[str, Any]) -> Result:
    """A result as it was before JSON made lists of its tuples."""
    pairs = {n: tuple(v) for n, v in row.items() if isinstance(v, list)}
    return Result(**{**row, **pairs})


def read(key: str) -> Iterator[Evidence]:
    """All evidence of a key, oldest first; files that cannot be read are passed over."""
    files = [f for folder in folders() for f in (folder / key).glob("*.json")]
    for file in sorted(files, key=lambda f: f.name.rsplit("-", 2)[-2]):
        try:
            data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            data["results"] = tuple(_result(row) for row in data["results"])
            yield Evidence(**data)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another version's file, or cut short: it stands for nothing


def write(found: Evidence) -> Path:
    """Write evidence atomically; the newest of a fingerprint takes the place of the one before."""
    folder = own() / found.key
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{found.machine}-{found.date}-{found.fingerprint[:8]}.json"
    with tempfile.NamedTemporaryFile(
        "w", dir=folder, prefix=".writing-", delete=False, encoding="utf-8"
    ) as part:
        json.dump(asdict(found), part, indent=1)
        part.write("\n")
    os.replace(part.name, path)
    for old in folder.glob(f"{found.machine}-*-{found.fingerprint[:8]}.json"):
        if old != path:
            old.unlink()
    return path


def now() -> str:
    """UTC, as file names have it."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")


def standing(key: str) -> dict[str, Result]:
    """The newest result of each claim under the current sources, from any machine.

    A settled result is not displaced by one that waits (a GPU claim asked on a CPU).
    """
    current = sources(key)
    found: dict[str, Result] = {}
    for evidence in read(key):
        if evidence.sources != current:
            continue
        for result in evidence.results:
            before = found.get(result.claim)
            if before is None or result.verdict in SETTLED or before.verdict not in SETTLED:
                found[result.claim] = result
    return found
