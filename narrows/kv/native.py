"""C loops built for one shape and one processor with the system's compiler, kept between runs."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

FLAGS = (
    "-O3", "-march=native", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros", "-fassociative-math", "-ffp-contract=fast",
)  # fmt: skip
"""Sums in any order; not -ffast-math, which would flush subnormals in the whole process."""


@cache
def library(source: Path, **sizes: int) -> ctypes.CDLL | None:
    """The source built with these macros; None where there is no compiler that builds it."""
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")
    if compiler is None:
        return None
    options = [*FLAGS, *(f"-D{name}={value}" for name, value in sizes.items())]
    try:
        return ctypes.CDLL(str(_built(compiler, source, options)))
    except (OSError, subprocess.SubprocessError):
        return None


def _built(compiler: str, source: Path, options: list[str]) -> Path:
    """The library for these options on this processor: found, or built and put there whole."""
    from platformdirs import user_cache_path

    told = "\n".join([compiler, *options, _processor(), source.read_text()])
    folder = user_cache_path("narrows") / "kernels"
    path = folder / f"{hashlib.sha256(told.encode()).hexdigest()[:24]}.so"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        new = Path(made) / path.name
        subprocess.run(
            [compiler, *options, str(source), "-o", str(new), "-lm"],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        os.replace(new, path)
    return path


def _processor() -> str:
    """What tells processors apart: libraries are built for the one at hand."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return " ".join(os.uname()) if hasattr(os, "uname") else ""
    return "\n".join(dict.fromkeys(s for s in lines if s.startswith(("model name", "flags"))))


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "narrows-loops")


if hasattr(os, "register_at_fork"):  # threads do not follow into a child
    os.register_at_fork(after_in_child=_pool.cache_clear)


def shared(task: Callable[[int, int], object], count: int, workers: int) -> None:
    """Calls of `task(first, last)` that together do all of `count`, as many at once as workers."""
    workers = min(workers, count)
    if workers < 2:
        task(0, count)
        return
    edges = [count * i // workers for i in range(workers + 1)]
    list(_pool(workers).map(task, edges, edges[1:]))
