"""Machines by name from the catalogue, by path from a user's own file, and back to a file."""

from __future__ import annotations

import os
import secrets
from functools import lru_cache
from pathlib import Path

from narrows.core.errors import NarrowsError, unknown
from narrows.core.machine import Machine
from narrows.machines.form import MAX_BYTES, loads
from narrows.machines.write import dumps

__all__ = ["catalogue", "dumps", "load", "loads", "names", "save"]

CATALOGUE = Path(__file__).parent


def names() -> list[str]:
    """Names of all machines of the catalogue, sorted."""
    return sorted(path.stem for path in CATALOGUE.glob("*.toml"))


def catalogue() -> dict[str, Machine]:
    """Every machine of the catalogue by its name; files are read when first asked for."""
    return {name: _read(CATALOGUE / f"{name}.toml") for name in names()}


def load(name_or_path: str | Path) -> Machine:
    """A machine of the catalogue by its name, or a user's own by the path of its .toml file.

    Raises NarrowsError for a name that is not in the catalogue (with the nearest ones), for a
    file that cannot be read or is not wholly a machine, and for `here`, which is measured.
    """
    given = os.fspath(name_or_path)
    separators = (os.sep, os.altsep or os.sep)
    if isinstance(name_or_path, Path) or given.endswith(".toml") or any(
        s in given for s in separators
    ):  # fmt: skip
        return _read(Path(given).expanduser())
    name = given.strip().lower()
    if name == "here":
        raise NarrowsError(
            "machine 'here' is this computer and has to be measured, not looked up: run "
            "'narrows machine --fresh', or give a name of the catalogue or a .toml file"
        )
    known = names()
    if name not in known:
        hint = "'narrows machines' lists the catalogue; a path to a .toml file will do too"
        raise unknown("machine", given, known, hint)
    return _read(CATALOGUE / f"{name}.toml")


def save(machine: Machine, path: str | Path) -> None:
    """Write a machine to a .toml file, wholly or not at all.

    Raises NarrowsError when the form cannot hold the machine or the file cannot be written; an
    older file is then still what it was.
    """
    target = Path(path).expanduser()
    if target.suffix != ".toml":
        raise NarrowsError(f"{target}: a machine file must end in .toml")
    text = dumps(machine)
    target = target.resolve()
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with beside.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except OSError as error:
        raise NarrowsError(f"{target}: cannot be written ({error.strerror or error})") from None
    finally:
        beside.unlink(missing_ok=True)


@lru_cache(maxsize=256)
def _parsed(path: Path, _stamp: tuple[int, int]) -> Machine:
    return loads(path.read_bytes(), str(path))


def _read(path: Path) -> Machine:
    """The machine of a file, read again only when the file has changed."""
    try:
        if not path.is_file():
            raise NarrowsError(f"{path}: there is no such machine file")
        stat = path.stat()
        if stat.st_size > MAX_BYTES:
            raise NarrowsError(f"{path}: larger than {MAX_BYTES:,} bytes, so not a machine")
        return _parsed(path, (stat.st_mtime_ns, stat.st_size))
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or error
        raise NarrowsError(f"{path}: cannot be read ({told})") from None
