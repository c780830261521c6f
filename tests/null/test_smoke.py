"""The one-second smoke test of the pre-commit hook."""

from __future__ import annotations

import subprocess
import sys

import narrows
from tests.null import toys


def test_the_front_door_is_light():
    code = (
        "import sys, narrows; heavy = {'torch', 'numpy', 'rich', 'pandas', 'scipy', 'matplotlib'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_front_door_names_what_it_has():
    assert set(narrows.__all__) <= set(dir(narrows))
    for name in narrows.__all__:
        assert getattr(narrows, name) is not None


def test_a_bound_by_hand():
    found = narrows.bound(narrows.core.case.Case(toys.product(), toys.machine()))
    # weights 8*4*2 B, input 16 B, output 8 B over 10 B/s; 64 flop over 100 flop/s is less
    assert found.seconds == (64 + 16 + 8) / 10
    assert found.narrowest == "dram"
