"""The text recall-lm is trained and judged on.

Four public files, read where the user keeps them (the repository ships none):

=========================  ==========================  =====================
file                       content                     licence
=========================  ==========================  =====================
king-james-bible.txt.gz    4.3 MB, GITenberg 10900     public domain (USA)
tinyshakespeare.txt.gz     1.1 MB, karpathy/char-rnn   public domain
wikitext2-valid.txt.gz     1.1 MB, WikiText-2 valid    CC BY-SA 3.0
wikitext2-test.txt.gz      1.3 MB, WikiText-2 test     CC BY-SA 3.0
=========================  ==========================  =====================

The last 5 % of each training file is held out; WikiText-2 test is never trained on.
"""

from __future__ import annotations

import gzip
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from narrows.core.errors import NarrowsError

ENVIRONMENT_VARIABLE = "NARROWS_DATA"
HELD_OUT_SHARE = 0.05


@dataclass(frozen=True)
class Source:
    """One file of the corpus: its name under ``text/`` and the start of its SHA-256."""

    key: str
    file: str
    sha256: str
    trained_on: bool


SOURCES = (
    Source("bible", "king-james-bible.txt.gz", "09e5995992c7", True),
    Source("shakespeare", "tinyshakespeare.txt.gz", "13125fe8f490", True),
    Source("wikitext2-valid", "wikitext2-valid.txt.gz", "3cdd8cb5bb34", True),
    Source("wikitext2-test", "wikitext2-test.txt.gz", "688887879b4b", False),
)


class MissingDataError(NarrowsError):
    """The corpus, or one file of it, is not where it was looked for."""


def folder(path: str | Path | None = None) -> Path:
    """The folder of the text files: ``path``, else ``$NARROWS_DATA``; itself or its ``text/``."""
    given = path if path is not None else os.environ.get(ENVIRONMENT_VARIABLE)
    if not given:
        raise MissingDataError(
            f"recall-lm needs its text corpus: set {ENVIRONMENT_VARIABLE} to the folder whose "
            f"text/ holds {SOURCES[0].file}, or pass that path."
        )
    root = Path(given)
    return root / "text" if (root / "text").is_dir() else root


def read(source: Source, path: str | Path | None = None) -> str:
    """The text of one source, after its SHA-256 is checked."""
    file = folder(path) / source.file
    if not file.is_file():
        raise MissingDataError(
            f"recall-lm's text {source.file} is not in {file.parent}: fetch it, or set "
            f"{ENVIRONMENT_VARIABLE} to the folder that has it."
        )
    raw = file.read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if not found.startswith(source.sha256):
        raise NarrowsError(
            f"{file} has SHA-256 {found[:12]}..., expected {source.sha256}...: "
            "it is another version of the text; fetch the one named in the model card."
        )
    return gzip.decompress(raw).decode("utf-8")


def training(path: str | Path | None = None) -> dict[str, str]:
    """Key -> text that may be trained on (each without its held-out tail)."""
    return {s.key: _split(read(s, path))[0] for s in SOURCES if s.trained_on}


def unseen(path: str | Path | None = None) -> dict[str, str]:
    """Key -> text never trained on: WikiText-2 test whole, and the tail of each training file."""
    return {s.key: (_split(read(s, path))[1] if s.trained_on else read(s, path)) for s in SOURCES}


def _split(text: str) -> tuple[str, str]:
    """Head and held-out tail, cut at a line end."""
    cut = text.rfind("\n", 0, int(len(text) * (1 - HELD_OUT_SHARE))) + 1
    return text[:cut], text[cut:]
