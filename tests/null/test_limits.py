"""Limits of quality and the load as people type them; nothing is measured before they are right."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from narrows.cli import main
from narrows.core.errors import NarrowsError
from narrows.relieve.limits import parsed


def test_limits_are_read_in_per_cent_and_as_fractions():
    assert parsed(["ppl=1%", "recall=0.02", "later=.5 %"]) == {
        "ppl": pytest.approx(0.01), "recall": 0.02, "later": pytest.approx(0.005),
    }  # fmt: skip
    assert parsed(["ppl=0"]) == {"ppl": 0.0}
    assert parsed([]) == {}


@pytest.mark.parametrize(
    "wrong",
    ["ppl", "ppl=", "ppl=1%%", "ppl=-1%", "ppl=nan", "ppl=inf", "ppl=1e9%", "ppl=2000%", "ppl=a%"],
)
def test_what_is_no_limit_is_refused(wrong):
    with pytest.raises(NarrowsError, match="--within"):
        parsed([wrong])


def test_an_unknown_or_repeated_measure_is_refused():
    with pytest.raises(NarrowsError, match="recall"):
        parsed(["recal=1%"])
    with pytest.raises(NarrowsError, match="twice"):
        parsed(["ppl=1%", "ppl=2%"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--within", "ppl=1%%"], "ppl=1%"),
        (["--text", "none.txt"], "--within"),
        (["--within", "ppl=1%", "--text", "none.txt"], "cannot be read"),
        (["--within", "ppl=1%", "--generate", "0"], "--generate 1"),
        (["--prompt", "0", "--generate", "0"], "nothing to bound"),
    ],
)
def test_bad_input_ends_before_anything_is_measured(arguments, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["relieve", "llama-3-8b", "--machine", "h100-sxm", *arguments])
    assert done.exit_code == 2, done.output
    assert told in done.output
    assert not list(tmp_path.iterdir())
