"""The accuracy promised for GPUs, on measured rows that no constant was fitted to.

Needs NARROWS_DATA; the thresholds are those of the issue, with those of the law of tiles beside.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from narrows.core.calibration import Error
from narrows.core.machine import Machine
from narrows.machines.load import load
from narrows.measure.calibrate import fit, predicted, split, validate
from narrows.measure.profiles import Profile, read

if "NARROWS_DATA" not in os.environ:
    pytest.skip("NARROWS_DATA is not set: no measured profiles here", allow_module_level=True)

SERVING = Path(os.environ["NARROWS_DATA"]) / "serving"
NAMES = {"a100": "a100-80", "h100": "h100-sxm"}


@cache
def bare(gpu: str) -> Machine:
    return replace(load(NAMES[gpu]), calibrations={})


@cache
def models(gpu: str) -> tuple[Profile, Profile]:
    """Llama-2-7B and the other models."""
    files = sorted((SERVING / "vidur").glob(f"mlp-{gpu}-*.csv.gz"))
    first = [f for f in files if "llama2-7b" in f.name]
    return read(first, bare(gpu)), read([f for f in files if f not in first], bare(gpu))


@cache
def fitted(gpu: str) -> Machine:
    return fit(models(gpu)[0], bare(gpu), share=1.0)


@pytest.mark.parametrize(("gpu", "median", "p90", "naive"), [
    ("a100", 0.055, 0.14, (0.30, 0.34)), ("h100", 0.07, 0.20, (0.35, 0.39)),
])  # fmt: skip
def test_linear_layers_of_other_models(gpu, median, p90, naive):
    """The issue asks for 7 and 18 % on the A100, 10 and 25 % on the H100."""
    told = validate(models(gpu)[1].only("matmul"), fitted(gpu)).total
    assert told.error.n > 9000
    assert told.error.median <= median
    assert told.error.p90 <= p90
    assert naive[0] < told.naive.median < naive[1]


@pytest.mark.parametrize("gpu", ["a100", "h100"])
def test_tiles_and_waves_beat_the_plain_law_with_as_many_constants(gpu):
    first, rest = (p.only("matmul") for p in models(gpu))
    plain = fit(first, bare(gpu), share=1.0, tiled=False)
    ours = validate(rest, fitted(gpu)).total.error
    theirs = validate(rest, plain).total.error
    assert ours.median < 0.85 * theirs.median
    assert ours.p90 < 0.85 * theirs.p90


@pytest.mark.parametrize(("gpu", "median", "p90"), [("a100", 0.07, 0.18), ("h100", 0.10, 0.25)])
def test_all_operators_of_other_models(gpu, median, p90):
    told = validate(models(gpu)[1], fitted(gpu)).total
    assert told.error.median <= median
    assert told.error.p90 <= p90


def test_constants_move_from_one_gpu_to_the_other():
    for here, there in (("a100", "h100"), ("h100", "a100")):
        moved = replace(bare(there), calibrations=fitted(here).calibrations)
        assert validate(models(there)[1].only("matmul"), moved).total.error.median < 0.08


def test_shuffled_times_give_a_large_error():
    rows = models("a100")[1].only("matmul").rows
    shuffled = np.random.default_rng(0).permutation(rows.seconds)
    assert Error.of(predicted(rows, fitted("a100")), shuffled).median > 0.5


def test_linear_layers_are_never_refused_and_residual_sums_seldom():
    for gpu in NAMES:
        for profile in models(gpu):
            assert all(": add took" in r.reason for r in profile.refused)
            assert len(profile.refused) < 0.01 * len(profile)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("kind", "median", "naive"), [
    ("attention_decode", 0.08, (0.36, 0.38)), ("attention_prefill", 0.055, (0.74, 0.79)),
])  # fmt: skip
def test_attention_of_the_a100_from_a_tenth_of_its_shapes(kind, median, naive, seed):
    """The issue asks for 9 %."""
    profile = read(SERVING / "vidur" / "attention-a100-llama2-70b-tp2.csv.gz", bare("a100"))
    chosen = profile.only(kind)
    machine = fit(chosen, bare("a100"), share=0.1, seed=seed)
    told = validate(chosen.take(~split(chosen.rows, 0.1, seed)), machine).total
    assert told.error.n > 0.88 * len(chosen)
    assert told.error.median <= median
    assert naive[0] < told.naive.median < naive[1]


@pytest.mark.parametrize(("gpu", "naive"), [("a100", 0.63), ("h100", 0.48)])
def test_all_reduce_pooled_over_ranks(gpu, naive):
    """The issue asks for 9 %."""
    profile = read(SERVING / "vidur" / f"net-{gpu}-dgx-all-reduce.csv", bare(gpu))
    assert set(profile.rows.peers) == {2, 4, 8}
    machine = fit(profile, bare(gpu), share=0.1)
    told = validate(profile.take(~split(profile.rows, 0.1, 0)), machine).total
    assert told.error.median <= 0.07
    assert told.naive.median > naive


def test_attention_of_the_h100():
    for name, median in (("decode", 0.04), ("prefill", 0.05)):
        profile = read(SERVING / f"mha-{name}-h100.csv", bare("h100"))
        error = fit(profile, bare("h100"), share=0.5).calibrations[f"attention_{name}"].error
        assert error is not None
        assert error.median <= median


@pytest.mark.parametrize("gpu", ["a100", "h100"])
def test_the_catalogue_ships_what_the_profiles_give(gpu):
    """Errors in the machine files are those of the shipped constants on the unseen rows."""
    shipped = load(NAMES[gpu])
    for name, found in shipped.calibrations.items():
        assert found.error is not None, name
        assert found.n > 0
        assert found.source
        assert found.era
    rest = models(gpu)[1].only("matmul")
    error = validate(rest, shipped).total.error
    told = shipped.calibrations["matmul"].error
    assert told is not None
    assert told.median == pytest.approx(error.median, rel=0.01)
    assert told.p90 == pytest.approx(error.p90, rel=0.01)


def test_milliseconds_given_as_microseconds_are_refused(tmp_path):
    text = (SERVING / "mha-decode-h100.csv").read_text().splitlines()
    header = text[0].split(",")
    at = header.index("latency_us")
    lines = [text[0]]
    for line in text[1:]:
        cells = line.split(",")
        cells[at] = str(float(cells[at]) / 1000)
        lines.append(",".join(cells))
    wrong = tmp_path / "mha-decode-h100.csv"
    wrong.write_text("\n".join(lines))
    with pytest.raises(Exception, match="milliseconds given as microseconds"):
        read(wrong, bare("h100"))
