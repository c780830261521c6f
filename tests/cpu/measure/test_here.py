"""This machine measured: what is found, how long it takes, the cache, interrupts, no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest

from narrows.core.errors import NarrowsError
from narrows.core.machine import Machine
from narrows.machines.load import load, save
from narrows.measure import here, probes
from narrows.measure.fit import Sample, fit, keys
from narrows.measure.kernels import compiled, ring
from narrows.measure.micro_numpy import one_op
from narrows.measure.probes import MB, Stream, knee
from narrows.measure.quiet import Quiet, Watch


@pytest.fixture(scope="module")
def measured() -> Machine:
    """Measured hastily: figures are rough, everything else is real."""
    told: list[tuple[float, str]] = []
    begin = perf_counter()
    machine = here.measure(lambda done, what: told.append((done, what)), seconds=9.0)
    took = perf_counter() - begin
    assert took < (11.0 if "not quiet" not in machine.note else 120.0)
    fractions = [done for done, _ in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert len({what for _, what in told}) > 5
    return machine


def test_all_rates_are_there_and_sane(measured: Machine):
    have = measured.resources
    for name, low, high in (
        ("compute.fp32", 1e9, 1e14), ("compute.fp64", 5e8, 1e14), ("dram", 1e9, 2e12),
        ("dispatch", 1e4, 1e8), ("reference", 1, 1e6), ("random", 1e5, 1e9),
    ):  # fmt: skip
        assert low < have[name].capacity < high, name
    assert measured.kind == "cpu"
    assert measured.name == "here"
    assert have["compute.fp32"].capacity > have["compute.fp64"].capacity
    assert measured.bandwidth("host") == measured.bandwidth("device")
    for cache, beyond in zip(measured.caches, (*measured.caches[1:], "dram"), strict=True):
        size = have[f"{beyond}.capacity"].capacity
        assert have[f"{cache}.capacity"].capacity < size


def test_classes_are_calibrated_with_errors_on_rows_left_out(measured: Machine):
    for kind in ("matmul", "conv", "attention_prefill", "attention_decode", "norm", "softmax",
                 "pointwise", "reduce", "gather", "copy", "optimizer"):  # fmt: skip
        found = measured.calibrations[kind]
        assert found.error is not None
        assert found.error.n == found.n >= 4


def test_the_note_says_how_quiet_it_was_and_what_is_missing(measured: Machine):
    assert "quiet" in measured.note
    assert "spin kernel" in measured.note
    assert here.fingerprint() in measured.source
    if "compute.fp16" not in measured.resources:
        assert "compute.fp16" in measured.note


def test_a_measured_machine_survives_its_file(measured: Machine, tmp_path: Path):
    save(measured, tmp_path / "here.toml")
    assert load(tmp_path / "here.toml") == measured


def test_the_cache_is_used_and_goes_stale_with_the_software(
    measured: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NARROWS_CACHE", str(tmp_path / "deep" / "folder"))
    runs: list[str] = []

    def measure(progress=None, seconds: float = 30.0, device: str = "cpu") -> Machine:
        runs.append(device)
        return measured

    monkeypatch.setattr(here, "measure", measure)
    assert here.load_or_measure() == measured
    assert here.load_or_measure() == measured
    assert runs == ["cpu"]
    here.load_or_measure(fresh=True)
    assert len(runs) == 2
    old = replace(measured, source=measured.source.replace("threads", "threads, torch 1.0"))
    save(old, here.cache_file())
    assert here.cached() is None
    here.load_or_measure()
    assert len(runs) == 3
    here.cache_file().write_text("name = 'here'\n[tiers", encoding="utf-8")
    assert here.load_or_measure() == measured
    assert len(runs) == 4
    assert [p.name for p in here.cache_folder().iterdir()] == ["here.toml"]


def test_a_cache_that_cannot_be_written_is_one_sentence(
    measured: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NARROWS_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(here, "measure", lambda progress=None, device="cpu": measured)
    with pytest.raises(NarrowsError, match="NARROWS_CACHE"):
        here.load_or_measure()


INTERRUPTED = """
import sys
from narrows.measure.here import load_or_measure
def progress(done, what):
    print(what, flush=True)
load_or_measure(fresh=True, progress=progress)
"""


@pytest.mark.parametrize("stage", ["memory and caches", "op classes, round 1"])
def test_an_interrupt_leaves_no_process_and_no_broken_cache(stage: str, tmp_path: Path):
    kept = tmp_path / "here.toml"
    kept.write_text("what was there before", encoding="utf-8")
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "NARROWS_CACHE": str(tmp_path)}, start_new_session=True,
    )  # fmt: skip
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == stage:
            break
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=30)
    assert child.returncode != 0
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["here.toml"]
    assert kept.read_text(encoding="utf-8") == "what was there before"


def test_a_gpu_that_is_not_there_is_one_sentence():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(NarrowsError, match="no CUDA GPU"):
        here.measure(device="cuda")


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from narrows.measure.here import measure
from narrows.machines.load import dumps
print(dumps(measure(seconds=6.0)))
"""


def test_without_torch_numpy_is_measured_and_it_is_said():
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=True,
        timeout=120,
    )  # fmt: skip
    assert "torch is not installed" in found.stdout
    assert "[calibrations.matmul]" in found.stdout
    assert "compute.fp32" in found.stdout


def test_the_fit_finds_constants_that_made_the_rows(measured: Machine):
    bare = replace(measured, calibrations={})
    bare = replace(bare, resources={k: v for k, v in bare.resources.items() if k != "wake"})
    rng = np.random.default_rng(0)
    truth = (0.4, 0.5, 2e-5)
    samples: list[Sample] = []
    for i in range(12):
        m, k, n = (int(x) for x in rng.integers(2, 2000, 3))
        work = one_op(f"p{i}", "matmul", {"a": (m, k), "b": (k, n)}, (m, n), 2.0 * m * k * n,
                      {"m": m, "k": k, "n": n})  # fmt: skip
        known = bare.calibrated(fitted := _calibration(truth))
        samples.append(Sample(work.name, work, _seconds(work, known)))
        assert fitted.compute == truth[0]
    assert keys(samples) == ["matmul"]
    found = fit(samples, "matmul", bare, "test", "now")
    assert found is not None
    assert found.error is not None
    assert found.compute == pytest.approx(truth[0], rel=0.1)
    assert found.error.median < 0.05
    assert fit(samples[:3], "matmul", bare, "test", "now") is None


def _calibration(truth: tuple[float, float, float]):
    from narrows.core.calibration import Calibration

    return Calibration("matmul", *truth)


def _seconds(work, machine: Machine) -> float:
    from narrows.core.price import price

    return sum(float(p.total_seconds) for p in price(work, machine))


def test_the_last_cache_ends_where_reads_slow_down():
    def curve(end: float) -> list[Stream]:
        return [Stream(s * MB, 100.0 if s < end else 25.0, 0.0) for s in (4, 8, 12, 16, 24)]

    assert 8 * MB <= knee(curve(10), 100.0, 25.0, 16 * MB) <= 12 * MB
    assert knee(curve(99), 100.0, 25.0, 16 * MB) == 16 * MB


def test_a_ring_visits_every_line_once():
    found = ring(37)
    at, seen = 0, []
    for _ in range(37):
        seen.append(at)
        at = int(found[at])
    assert at == 0
    assert sorted(seen) == [i * 8 for i in range(37)]
    loops = compiled()
    if loops is not None:
        assert loops.chase(found, 37) == 0


def test_probes_clean_up_and_answer(tmp_path: Path):
    try:
        assert probes.drive(tmp_path, size=8 * MB) > 1e6
    except OSError as error:
        pytest.skip(f"no direct reads on this file system: {error}")
    assert not list(tmp_path.iterdir())
    bandwidth, latency = probes.loopback(size=MB, messages=10)
    assert bandwidth > 1e6
    assert 0 < latency < 1.0
    assert probes.cores() >= 1
    assert probes.processor()


def test_quiet_is_told_in_words():
    assert Quiet(0.01, 0.0, 0.02, 0.1).quiet
    assert not Quiet(0.30, 0.0, 0.02, 0.1).quiet
    assert not Quiet(0.01, None, 0.5, None).quiet
    seen = Watch().start().stop()
    assert "quiet" in str(seen)
    assert seen.variation >= 0
