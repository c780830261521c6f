"""Against NVIDIA/kvpress 0.5.5, and on the oldest transformers, in its own environment."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import ROOT, interpreter

PYTHON = interpreter("kvpress")
HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    not PYTHON.is_file(),
    reason="no environment for kvpress; make it with: python -m benchmarks.peers kvpress",
)


def run(*arguments: str) -> str:
    """Standard output of the peer's python, with this repository importable."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [PYTHON, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return done.stdout


def compare(*arguments: str) -> dict[str, Any]:
    return json.loads(run(str(HERE / "kvpress_indices.py"), *arguments).splitlines()[-1])


@pytest.fixture(scope="module")
def compared() -> dict[str, Any]:
    return compare()


def test_the_same_indices_as_kvpress(compared):
    assert len(compared["rows"]) == 5
    for row in compared["rows"]:
        assert row["kept"][0] == row["kept"][1], row
    common = sum(row["common"] for row in compared["rows"])
    total = sum(row["total"] for row in compared["rows"])
    assert total > 40_000
    assert common / total >= 0.999


def test_padding_changes_nothing_here_and_does_there(compared):
    padding = compared["padding"]
    assert padding["ours"] == [75, 75]
    assert padding["ours_common"] / padding["ours_total"] >= 0.999
    assert padding["theirs"] == [75, 100]


def test_the_same_indices_on_the_reference_model():
    from narrows.target import reference_path

    if not (reference_path() / "model.safetensors").is_file():
        pytest.skip("the reference model has no weights here")
    rows = compare(str(reference_path()))["rows"]
    assert sum(r["common"] for r in rows) / sum(r["total"] for r in rows) >= 0.999


@pytest.mark.slow
def test_the_cache_on_the_oldest_transformers():
    run("-m", "pytest", "tests/cpu/kv", "-q", "-x", "-p", "no:cacheprovider")
