"""Peers that pin other versions, each in an environment of its own beside the project's.

python -m benchmarks.peers kvpress      makes .venv-kvpress from benchmarks/peers/kvpress.txt
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def names() -> list[str]:
    """The peers that have a lock file."""
    return sorted(file.stem for file in HERE.glob("*.txt"))


def interpreter(name: str) -> Path:
    """Where a peer's python is, whether or not it was made."""
    return ROOT / f".venv-{name}" / "bin" / "python"


def make(name: str) -> Path:
    """A peer's python; its environment is made first where it is missing (some minutes, once)."""
    lock = HERE / f"{name}.txt"
    if not lock.is_file():
        raise SystemExit(f"no peer named {name!r}; there is {', '.join(names())}")
    python = interpreter(name)
    ready = python.parents[1] / ".ready"
    if not (ready.is_file() and ready.read_text() == lock.read_text()):
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", lock], check=True)
        ready.write_text(lock.read_text())
    return python
