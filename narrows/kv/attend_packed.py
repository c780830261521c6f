"""Attention over packed keys and values as they lie, and the merge with what is not packed.

Each part of a cache gives its attention and the log of its sum of exponentials; `merge` joins
them to the softmax over all (Milakov and Gimelshein, arXiv 1805.02867). A few queries go through
attend_packed.c, built once a shape with the system's C compiler and kept in the user's cache
folder; many queries, other devices and systems without a compiler go block by block through
torch. Neither unpacks the whole cache.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

from narrows.kv.codec import Affine, Packed

FEW = 16
"""Most queries a KV head for which the C loops beat unpacked blocks and a matrix product."""

BLOCK = 2048
"""Tokens that the block by block path unpacks at a time."""

FLAGS = (
    "-O3", "-march=native", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros", "-fassociative-math", "-ffp-contract=fast",
)  # fmt: skip
"""Sums in any order; not -ffast-math, which would flush subnormals in the whole process."""

SOURCE = Path(__file__).with_suffix(".c")

Partial = tuple[torch.Tensor, torch.Tensor]
"""Attention over a part, (batch, kv_heads, rows, head_dim) fp32, and its log sum, (..., rows)."""


def packed(
    queries: torch.Tensor,
    keys: Packed,
    values: Packed,
    tokens: int,
    bias: torch.Tensor | None,
    scaling: float,
) -> Partial:
    """Attention over the first `tokens` of packed keys and values.

    queries: (batch, kv_heads, rows, head_dim) fp32, all that share a KV head. keys may hold more
    tokens. bias: added to the scores, (batch or 1, kv_heads or 1, rows or 1, >= tokens) fp32.
    """
    if queries.device.type == "cpu" and queries.shape[2] <= FEW and loops(keys, values):
        run = compiled(queries.shape[3], queries.shape[2], keys.codec, values.codec)
        if run is not None:
            return _threads(run, queries, keys, values, tokens, bias, scaling)
    return blocks(queries, keys, values, tokens, bias, scaling)


def loops(keys: Packed, values: Packed) -> bool:
    """Whether there are loops for these codecs: keys by channel, values by token."""
    of = keys.codec, values.codec
    return all(isinstance(c, Affine) for c in of) and [c.axis for c in of] == ["channel", "token"]


def blocks(
    queries: torch.Tensor,
    keys: Packed,
    values: Packed,
    tokens: int,
    bias: torch.Tensor | None,
    scaling: float,
) -> Partial:
    """`packed` in plain torch, BLOCK tokens unpacked at a time."""
    block = max(keys.codec.block, values.codec.block)
    step = max(BLOCK // block, 1) * block
    parts: list[Partial] = []
    for begin in range(0, tokens, step):
        end = min(begin + step, tokens)
        key, value = (
            x.span(begin, -(-end // x.codec.block) * x.codec.block) for x in (keys, values)
        )
        scores = key.codec.scores(queries * scaling, key)[..., : end - begin]
        weights, total = _softmax(scores, None if bias is None else bias[..., begin:end])
        weights = torch.nn.functional.pad(weights, (0, value.tokens - (end - begin)))
        parts.append((value.codec.mix(weights, value), total))
    return merge(parts)


def dense(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
) -> Partial:
    """Attention over plain keys and values; shapes as in `packed`. Zero where all is hidden."""
    weights, total = _softmax((queries * scaling) @ keys.float().transpose(2, 3), bias)
    return weights @ values.float(), total


def _softmax(scores: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, zero where all is hidden, and the log of the sum of exponentials."""
    if bias is not None:
        scores = scores + bias
    total = scores.logsumexp(-1)
    return (scores - total.unsqueeze(-1).clamp(min=torch.finfo(torch.float32).min)).exp(), total


def merge(parts: Sequence[Partial]) -> Partial:
    """Attention over several parts together."""
    if len(parts) == 1:
        return parts[0]
    totals = torch.stack([total for _, total in parts])
    total = totals.logsumexp(0)
    weights = (totals - total.clamp(min=torch.finfo(torch.float32).min)).exp().unsqueeze(-1)
    out = (torch.stack([out for out, _ in parts]) * weights).sum(0)
    return out, total


@cache
def compiled(head_dim: int, rows: int, keys: Affine, values: Affine) -> Any:
    """The C loops for one shape and codecs; None where there is no compiler that builds them."""
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")
    if compiler is None:
        return None
    sizes = {
        "HEAD_DIM": head_dim, "ROWS": rows, "KEY_BITS": keys.bits, "VALUE_BITS": values.bits,
        "KEY_GROUP": keys.group, "VALUE_GROUP": values.group,
    }  # fmt: skip
    options = [*FLAGS, *(f"-D{name}={value}" for name, value in sizes.items())]
    try:
        library = ctypes.CDLL(str(_built(compiler, options)))
    except (OSError, subprocess.SubprocessError):
        return None
    run = library.attend
    address = ctypes.c_void_p
    run.argtypes = [
        *[address] * 8, ctypes.c_long, ctypes.c_float, ctypes.c_long, ctypes.c_long, address,
        address,
    ]  # fmt: skip
    run.restype = None
    return run


def _built(compiler: str, options: list[str]) -> Path:
    """The library for these options on this processor: found, or built and put there whole."""
    from platformdirs import user_cache_path

    told = "\n".join([compiler, *options, _processor(), SOURCE.read_text()])
    folder = user_cache_path("narrows") / "kernels"
    path = folder / f"{hashlib.sha256(told.encode()).hexdigest()[:24]}.so"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        new = Path(made) / path.name
        subprocess.run(
            [compiler, *options, str(SOURCE), "-o", str(new), "-lm"],
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
    return ThreadPoolExecutor(workers, "narrows-packed")


if hasattr(os, "register_at_fork"):  # threads do not follow into a child
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _threads(
    run: Any, queries: torch.Tensor, keys: Packed, values: Packed, tokens: int,
    bias: torch.Tensor | None, scaling: float,
) -> Partial:  # fmt: skip
    """The C loops over all heads, as many at once as torch would use threads.

    Where heads are fewer than threads, each head's tokens are divided and merged.
    """
    batch, heads, rows, size = queries.shape
    workers = torch.get_num_threads()
    queries = queries.contiguous()
    bias = None if bias is None else bias.contiguous()
    per = keys.codec.group
    parts = min(-(-workers // (batch * heads)), max(tokens // (8 * per), 1))
    each = -(-tokens // (parts * per)) * per
    parts = -(-tokens // each)
    out = torch.empty(parts, batch, heads, rows, size)
    totals = torch.empty(parts, batch, heads, rows)
    held = [(t, _steps(t)) for t in (queries, *keys.parts, *values.parts)]

    def task(index: int) -> None:
        part, at = divmod(index, batch * heads)
        b, h = divmod(at, heads)
        row, start = 0, None
        if bias is not None:
            row = bias.stride(2) if bias.shape[2] > 1 else 0
            at_b, at_h = b if bias.shape[0] > 1 else 0, h if bias.shape[1] > 1 else 0
            start = bias.data_ptr() + 4 * (at_b * bias.stride(0) + at_h * bias.stride(1))
        run(
            *(t.data_ptr() + b * by_b + h * by_h for t, (by_b, by_h) in held), start, row,
            scaling, part * each, min((part + 1) * each, tokens),
            out[part, b, h].data_ptr(), totals[part, b, h].data_ptr(),
        )  # fmt: skip

    count = parts * batch * heads
    workers = min(workers, count)
    if workers == 1:
        for index in range(count):
            task(index)
    else:

        def share(worker: int) -> None:
            for index in range(worker, count, workers):
                task(index)

        list(_pool(workers).map(share, range(workers)))
    return merge([(out[i], totals[i]) for i in range(parts)])


def _steps(t: torch.Tensor) -> tuple[int, int]:
    """Bytes from one row of the batch to the next, and from one head; the rest is contiguous."""
    size = t.element_size()
    return t.stride(0) * size, t.stride(1) * size
