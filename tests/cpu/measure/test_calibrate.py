"""Fitting and validating: planted constants come back, unseen rows stay unseen."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from narrows.core import law
from narrows.core.calibration import Calibration
from narrows.core.errors import NarrowsError
from narrows.machines.load import load
from narrows.measure.calibrate import fit, predicted, split, validate
from narrows.measure.layouts.rows import Rows
from narrows.measure.profiles import Profile, read

A100 = replace(load("a100-80"), calibrations={})


def products(noise: float = 0.0, seed: int = 0, count: int = 400) -> tuple[Profile, Calibration]:
    """Rows that a machine with known constants would have measured."""
    rng = np.random.default_rng(seed)
    m = np.ceil(np.exp(rng.uniform(0, np.log(8192), count)))
    n, k = (128.0 * rng.integers(4, 128, count) for _ in range(2))
    shape = {"m": m, "n": n, "k": k, "batch": 1.0}
    moved = 2 * (m * k + k * n + m * n)
    rows = Rows.of("matmul", "fp16", np.ones(count), np.arange(count) + 2, 2 * m * n * k, moved,
                   0.0, "planted", shape)  # fmt: skip
    truth = Calibration("matmul", 0.8, 0.7, 7e-6, law.GEMM_TILES)
    seconds = predicted(rows, A100.calibrated(truth)) * np.exp(noise * rng.standard_normal(count))
    return Profile(replace(rows, seconds=seconds), ("planted.csv",)), truth


def test_planted_constants_come_back():
    profile, truth = products()
    found = fit(profile, A100).calibrations["matmul"]
    assert found.tiles == truth.tiles
    for name in ("compute", "memory", "fixed"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.02)
    assert found.error is not None
    assert found.error.p90 < 0.01
    assert found.n + found.error.n == len(profile)


def test_planted_plain_constants_are_not_given_tiles():
    profile, _ = products()
    truth = Calibration("matmul", 0.6, 0.9, 2e-5)
    seconds = predicted(profile.rows, A100.calibrated(truth))
    found = fit(replace(profile, rows=replace(profile.rows, seconds=seconds)), A100)
    assert found.calibrations["matmul"].tiles == ()
    assert found.calibrations["matmul"].compute == pytest.approx(0.6, rel=0.02)


def test_noise_is_reported_as_error():
    profile, _ = products(noise=0.1)
    error = fit(profile, A100).calibrations["matmul"].error
    assert error is not None
    assert 0.04 < error.median < 0.12


def test_wild_rows_do_not_sway_the_fit():
    profile, truth = products()
    seconds = profile.rows.seconds.copy()
    seconds[::20] *= 30
    found = fit(replace(profile, rows=replace(profile.rows, seconds=seconds)), A100)
    assert found.calibrations["matmul"].compute == pytest.approx(truth.compute, rel=0.05)


def test_one_shape_is_never_on_both_sides():
    profile, _ = products(count=100)
    rows = Rows.joined([profile.rows] * 3)
    chosen = split(rows, 0.3, seed=1)
    same = rows.same()
    assert not set(same[chosen]) & set(same[~chosen])
    assert chosen.sum() == 90
    assert not np.array_equal(chosen, split(rows, 0.3, seed=2))
    assert np.array_equal(chosen, split(rows, 0.3, seed=1))


def test_too_few_shapes_are_refused():
    profile, _ = products(count=6)
    with pytest.raises(NarrowsError, match="8 are needed"):
        fit(profile, A100, share=1.0)
    with pytest.raises(NarrowsError, match="share"):
        fit(profile, A100, share=1.5)


def test_precisions_are_classes_and_halves_are_one():
    profile, _ = products(count=60)
    parts = []
    for precision in ("fp16", "bf16", "fp32"):
        count = len(profile)
        parts.append(replace(profile.rows, precision=np.full(count, precision, object)))
    machine = fit(Profile(Rows.joined(parts), ("x.csv",)), A100)
    assert set(machine.calibrations) == {"matmul", "matmul.fp32"}


def test_progress_is_told():
    told: list[tuple[float, str]] = []
    fit(products(count=60)[0], A100, progress=lambda done, what: told.append((done, what)))
    assert told[0] == (0.0, "fitting matmul")
    assert told[-1][0] == 1.0


def test_validation_counts_by_class_and_beside_the_datasheet():
    profile, truth = products()
    checked = validate(profile, A100.calibrated(truth)).as_dict()
    assert checked["n"] == len(profile)
    assert checked["median_ape"] < 1e-9
    assert checked["naive"]["median_ape"] > 0.2
    assert checked["by_class"]["matmul"]["calibrated"] is True
    bare = validate(profile, A100).as_dict()
    assert bare["median_ape"] == pytest.approx(bare["naive"]["median_ape"])
    assert bare["calibrated"] is False


def write(path: Path, profile: Profile, precision: str = "fp16") -> Path:
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["op", "precision", "m", "n", "k", "seconds"])
        r = profile.rows
        for m, n, k, s in zip(r.m, r.n, r.k, r.seconds, strict=True):
            out.writerow(["matmul", precision, m, n, k, s])
    return path


def test_the_shell_fits_a_file_and_validates_another(tmp_path):
    from narrows.cli import main

    first = write(tmp_path / "first.csv", products(noise=0.05)[0])
    second = write(tmp_path / "second.csv", products(noise=0.05, seed=1)[0])
    with second.open("a") as file:
        file.write("matmul,fp16,4096,4096,4096,1e-9\n")
    out = tmp_path / "mine.toml"
    done = CliRunner().invoke(main, ["calibrate", str(first), "--machine", "a100-80",
                                     "--out", str(out), "--json"])  # fmt: skip
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(main, ["validate", str(second), "--machine", str(out), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert told["median_ape"] < 0.08
    assert [r["row"] for r in told["refused"]] == [402]
    assert "physical limit" in told["refused"][0]["reason"]
    assert read(second, load(out)).refused
