"""The GPU kernel, run by triton's interpreter, attends as plain torch does."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

KERNEL = """
import torch
from narrows.kv import attend_packed, attend_triton
from narrows.kv.codec import Affine

made = torch.Generator().manual_seed(0)
told = 0
for bits, group, size, rows, tokens in (
    ((2, 2), 32, 64, 2, 300), ((4, 2), 16, 32, 1, 64), ((8, 1), 32, 16, 20, 513),
    ((2, 4), 64, 128, 4, 700),
):
    room = -(-tokens // group) * group
    keys, values = (torch.randn(2, 2, room, size, generator=made) for _ in "kv")
    key, value = Affine(bits[0], "channel", group), Affine(bits[1], "token", min(group, size))
    held = key.pack(keys * 3), value.pack(values)
    queries = torch.randn(2, 2, rows, size, generator=made)
    assert attend_triton.reads(queries, *held)
    visible = torch.rand(2, 1, rows, tokens, generator=made) > 0.4
    visible[0, :, 0, :270] = False  # a whole run hidden
    if rows > 1:
        visible[1, :, 1] = False  # a row that sees nothing
    for bias in (None, torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)):
        found = attend_triton.packed(queries, *held, tokens, bias, 0.1)
        wanted = attend_packed.blocks(queries, *held, tokens, bias, 0.1)
        for mine, plain in zip(found, wanted):
            torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)
        told += 1
assert not attend_triton.reads(torch.zeros(1, 1, 1, 48), *held)
print(told, "agree")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_is_the_block_by_block_path():
    # a process of its own: triton decides at import whether it interprets
    done = subprocess.run(
        [sys.executable, "-c", KERNEL], env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert "8 agree" in done.stdout, done.stderr[-3000:]
