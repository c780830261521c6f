"""The command line: the contract for scripts, bad input, and that no torch is needed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from narrows.cli import main

BLOCK = """
import sys
HEAVY = "torch", "transformers", "pandas", "scipy", "matplotlib", "numba"
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
from narrows.cli import main
main()
"""
"""Runs the shell as where only the base dependencies are installed."""


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def data(*arguments: str) -> dict:
    return json.loads(run(*arguments, "--json"))


def without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK, *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("bound", "llama-3-70b", "--machine", "h100-sxm", "--set", "tp=8"),
        ("find", "llama-3-8b", "--machine", "h100-sxm", "--prompt", "16384"),
        ("machines",),
        ("machine", "a100-80"),
        ("methods", "kv", "cache", "bytes"),
    ],
)
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_answers_come_without_torch(arguments: tuple[str, ...], form: tuple[str, ...]):
    begin = time.perf_counter()
    done = without_torch(*arguments, *form)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    # "about a second" is recorded in benchmarks/; this only catches a heavy import
    assert time.perf_counter() - begin < 20


def test_the_block_blocks():
    done = subprocess.run(
        [sys.executable, "-c", BLOCK.replace("main()", "import torch")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert "No module named 'torch'" in done.stderr


def test_bound_keeps_its_contract():
    found = data("bound", "llama-2-7b", "--machine", "a100-80", "--prompt", "1024", "--batch", "2")
    assert [p["name"] for p in found["phases"]] == ["prefill", "decode"]
    for phase in found["phases"]:
        wanted = {"name", "seconds", "limit_seconds", "measured_seconds", "narrowest", "share",
                  "flops", "bytes", "fits", "energy_joules", "error"}  # fmt: skip
        assert wanted <= phase.keys()
        assert phase["limit_seconds"] <= phase["seconds"]
        assert phase["narrowest"] == max(phase["share"], key=phase["share"].get)
        assert sum(phase["share"].values()) == pytest.approx(1.0)
    decode = found["phases"][1]
    assert decode["narrowest"] == "hbm"
    assert decode["bytes"]["hbm"] > 128 * 2 * 6.6e9  # every step reads all weights


def test_limit_is_the_sum_over_ops_of_the_largest_need_over_have():
    found = data("bound", "llama-2-7b", "--machine", "v100-32", "--prompt", "64")
    for phase in found["phases"]:
        assert phase["limit_seconds"] == pytest.approx(phase["seconds"])  # not calibrated
        assert phase["error"] is None


def test_a_model_that_does_not_fit_says_so():
    found = data("bound", "llama-3-70b", "--machine", "h100-sxm")
    assert found["fits"] is False
    assert "does not fit" in run("bound", "llama-3-70b", "--machine", "h100-sxm").lower()


def test_find_knows_when_snapkv_does_nothing():
    short = data("find", "llama-3-8b", "--machine", "h100-sxm", "--prompt", "256")
    assert {o["gain"] for o in short["options"] if o["key"] == "snapkv"} == {1.0}
    prefill = data(
        "find", "llama-3-8b", "--machine", "h100-sxm", "--prompt", "16384", "--generate", "0"
    )
    assert all(o["gain"] <= 1.0 for o in prefill["options"] if o["key"] == "snapkv")
    long = data(
        "find", "llama-2-7b", "--machine", "h100-sxm", "--prompt", "16384", "--generate", "512"
    )
    best = next(o for o in long["options"] if o["key"] == "snapkv")
    assert best["gain"] > 1.2
    assert {"key", "gain", "seconds", "price", "reason"} <= best.keys()


def test_measured_run():
    args = ("bound", "llama-2-7b", "--machine", "a100-80", "--generate", "0")
    limit = data(*args)["limit_seconds"]
    found = data(*args, "--measured", str(2 * limit))
    assert found["phases"][0]["measured_seconds"] == pytest.approx(2 * limit)
    assert "limit" in run(*args, "--measured", str(limit / 2), code=2)


def test_methods_lists_all_systems():
    found = data("methods")["methods"]
    assert len(found) >= 96
    assert {"key", "title", "folder", "role", "relieves", "status"} <= found[0].keys()
    assert data("methods", "what helps against KV cache bytes?")["methods"][0]["folder"] == "kv"


@pytest.mark.parametrize(
    "arguments",
    [
        ("bound", "llama-3-7b", "--machine", "h100-sxm"),
        ("bound", "llama-3-8b", "--machine", "h100"),
        ("bound", "llama-3-8b", "--machine", "nowhere.toml"),
        ("bound", "nowhere/config.json", "--machine", "h100-sxm"),
        ("bound", "nowhere.py:make", "--machine", "h100-sxm"),
        ("bound", "nowhere.py", "--machine", "h100-sxm"),
        ("bound", "llama-3-8b", "--machine", "h100-sxm", "--prompt", "-1"),
        ("bound", "llama-3-8b", "--machine", "h100-sxm", "--prompt", "0", "--generate", "0"),
        ("bound", "llama-3-8b", "--machine", "h100-sxm", "--batch", "0"),
        ("bound", "llama-3-8b", "--machine", "h100-sxm", "--dtype", "fp17"),
        ("bound", "llama-3-8b", "--machine", "h100-sxm", "--set", "tp"),
        ("bound", "llama-3-8b", "--machine", "h100-sxm", "--set", "tp=3"),
        ("bound", "llama-3-8b", "--machine", "h100-sxm", "--set", "tp=x"),
        ("bound", "llama-3-8b", "--machine", "h100-sxm", "--set", "speed=9"),
        ("bound", "llama-3-8b", "--machine", "h100-sxm", "--set", "fusion=warp"),
        ("bound", "llama-3-8b", "--machine", "h100-sxm", "--set", "kv_dtype=x"),
        ("bound", "llama-3-8b", "--machine", "h100-sxm", "--measured", "soon"),
        ("bound", "llama-3-8b", "--machine", "h100-sxm", "--colour"),
        ("machine", "h100"),
        ("apply", "llama-3-8b", "--with", "snapkv", "--save", "x"),
        ("apply", "reference", "--with", "distserve", "--save", "x"),
        ("apply", "reference", "--with", "snapkv:size=3", "--save", "x"),
        ("apply", "reference", "--with", "snapkv:capacity", "--save", "x"),
        ("apply", "reference", "--with", "fusemax", "--save", "x"),
        ("validate",),
        ("validate", "nowhere.csv", "--machine", "a100-80"),
        ("validate", "nowhere.csv"),
        ("validate", "nowhere.csv", "--here"),
        ("calibrate", "nowhere.csv", "--machine", "a100-80", "--out", "x.toml"),
        ("relieve", "llama-9", "--machine", "h100-sxm"),
        ("melt",),
    ],
    ids=" ".join,
)
def test_bad_input_ends_in_one_sentence(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    told = run(*arguments, code=2)
    assert told.strip()
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_a_directory_or_config_of_the_users(tmp_path: Path):
    from narrows.trace.config import published

    fields = {k: v for k, v in published("llama-3-8b").items() if k != "source"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    named = data("bound", "llama-3-8b", "--machine", "h100-sxm")
    for given in (tmp_path, tmp_path / "config.json"):
        mine = data("bound", str(given), "--machine", "h100-sxm")
        assert mine["seconds"] == named["seconds"]


def test_python_and_shell_agree():
    import narrows

    case = narrows.case("llama-3-8b", "h200", prompt=8192, generate=64, batch=4)
    shell = data("bound", "llama-3-8b", "--machine", "h200", "--prompt", "8192", "--generate", "64",
                 "--batch", "4")  # fmt: skip
    assert case.bound().seconds == shell["seconds"]
    found = data("find", "llama-3-8b", "--machine", "h200", "--prompt", "8192", "--generate", "64",
                 "--batch", "4")  # fmt: skip
    assert [o.key for o in case.find()] == [o["key"] for o in found["options"]]


def test_interrupted(monkeypatch: pytest.MonkeyPatch):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("narrows.door.machine", stop)
    assert "stopped" in run("machine", "h200", code=130)
