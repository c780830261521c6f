"""A CSV file, plain or gzipped, as named columns; nothing half read."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from narrows.core.errors import NarrowsError

MAX_BYTES = 512_000_000
"""Larger files (unpacked) are not profiles."""

GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Table:
    """Columns of text by name; `lines` holds the line of the file each row ends at (header 1)."""

    path: Path
    columns: dict[str, list[str]]
    lines: np.ndarray

    def __len__(self) -> int:
        return len(self.lines)

    def need(self, *names: str) -> None:
        """Raise NarrowsError unless the file has all these columns."""
        missing = [n for n in names if n not in self.columns]
        if missing:
            raise NarrowsError(
                f"{self.path}: no column {', '.join(repr(n) for n in missing)}, which this layout "
                "needs; see docs/profile-format.md"
            )

    def numbers(self, name: str, default: float = np.nan) -> np.ndarray:
        """A column as floats, NaN where it is not a number; `default` without the column."""
        if name not in self.columns:
            return np.full(len(self), default)
        values = self.columns[name]
        try:
            return np.array(values, float)
        except ValueError:
            return np.array([_number(v) for v in values])

    def words(self, name: str, default: str = "") -> np.ndarray:
        """A column as stripped text in lower case; `default` without the column."""
        if name not in self.columns:
            return np.full(len(self), default, object)
        return np.array([v.strip().lower() for v in self.columns[name]], object)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan


def _text(path: Path) -> str:
    try:
        if not path.is_file():
            raise NarrowsError(f"{path}: there is no such profile; give a CSV file")
        raw = path.read_bytes()
        if raw.startswith(GZIP):
            with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
                raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        told = getattr(error, "strerror", None) or error
        raise NarrowsError(f"{path}: cannot be read ({told}); give a CSV file") from None
    if len(raw) > MAX_BYTES:
        raise NarrowsError(f"{path}: larger than {MAX_BYTES:,} bytes, so not a profile")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise NarrowsError(f"{path}: not UTF-8 text; give a CSV file, plain or gzipped") from None


def read(path: Path) -> Table:
    """The table of a file.

    Raises NarrowsError for what cannot be read, has no header or no rows, names a column twice,
    or has rows of another length than its header.
    """
    reader = csv.reader(io.StringIO(_text(path), newline=""))
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        header = [name.strip() for name in next(reader, [])]
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append(row)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise NarrowsError(f"{path}: line {reader.line_num}: not CSV ({error})") from None
    if not any(header):
        raise NarrowsError(f"{path}: empty; give a CSV file with a header line")
    twice = {n for n in header if n and header.count(n) > 1}
    if twice:
        raise NarrowsError(f"{path}: column {sorted(twice)[0]!r} is there twice; keep one")
    if not rows:
        raise NarrowsError(f"{path}: has a header but no rows")
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(header):
            raise NarrowsError(
                f"{path}: line {line}: {len(row)} fields where the header has {len(header)}"
            )
    columns = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))
    return Table(path, columns, np.array(lines, int))
