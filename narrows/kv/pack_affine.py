"""Affine codes packed by C loops: one token that leaves the recent part costs one call."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

from narrows.kv import native

SOURCE = Path(__file__).with_suffix(".c")

ALONE = 1 << 16
"""Elements up to which a second thread costs more than it saves."""

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def packed(x: torch.Tensor, bits: int, by_token: bool, group: int) -> Parts | None:
    """Codes, scales and minima of (batch, kv_heads, tokens, head_dim) fp32; see codec.Affine.

    None where the loops cannot say: on another device, without a compiler, and where something
    does not fit fp16, which the plain form tells.
    """
    batch, heads, tokens, size = x.shape
    if x.device.type != "cpu" or not x.numel():
        return None
    run = compiled(size, bits, group, by_token)
    if run is None:
        return None
    if x.stride(3) != 1 or x.stride(2) != size:
        x = x.contiguous()
    rows, width = (tokens, size // group) if by_token else (tokens // group, size)
    codes = torch.empty(batch, heads, tokens, size * bits // 8, dtype=torch.uint8)
    scale, low = (torch.empty(batch, heads, rows, width, dtype=torch.float16) for _ in range(2))
    wrong: list[int] = []

    def share(first: int, last: int) -> None:
        wrong.append(run(
            x.data_ptr(), x.stride(0), x.stride(1), heads, tokens, first, last,
            codes.data_ptr(), scale.data_ptr(), low.data_ptr(),
        ))  # fmt: skip

    native.shared(share, batch * heads, torch.get_num_threads() if x.numel() > ALONE else 1)
    return None if any(wrong) else (codes, scale, low)


@cache
def compiled(head_dim: int, bits: int, group: int, by_token: bool) -> Any:
    """The loops for one shape; None where there is no compiler that builds them."""
    built = native.library(
        SOURCE, HEAD_DIM=head_dim, BITS=bits, GROUP=group, BY_TOKEN=int(by_token)
    )
    if built is None:
        return None
    address, count = ctypes.c_void_p, ctypes.c_long
    built.pack.argtypes = [address, *[count] * 6, *[address] * 3]
    built.pack.restype = ctypes.c_int
    return built.pack
