"""Projections of MatryoshkaKV: bases and means of every head, their files, and which ranks."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from narrows.core.errors import NarrowsError

FORMAT = "narrows-matryoshkakv-1"
STEPS = 8
"""Steps from no channel to all of them, in which ranks are lowered."""

Ranks = tuple[tuple[tuple[int, ...], ...], ...]
"""Channels kept: by layer, then keys and values, then KV head."""


@dataclass(frozen=True, eq=False)
class Projection:
    """What a fit gives.

    basis: (layers, 2, kv_heads, head_dim, head_dim) fp32, keys then values, orthogonal, the
    channels that matter most first. mean: (layers, 2, kv_heads, head_dim). order: entries
    (layer, keys or values, head, flattened), in the order in which their ranks are lowered by an
    eighth of head_dim; empty where no order was searched for.
    """

    basis: torch.Tensor
    mean: torch.Tensor
    order: torch.Tensor

    @property
    def digest(self) -> str:
        """Tells projections apart, so that caches saved under others are refused."""
        told = hashlib.sha256()
        for part in (self.basis, self.mean, self.order):
            told.update(part.detach().contiguous().cpu().numpy().tobytes())
        return told.hexdigest()[:16]

    def uniform(self, budget: float) -> Ranks:
        """The same rank for every head: this share of its channels, at least one."""
        layers, parts, heads, size = self.mean.shape
        rank = max(1, int(budget * size + 1e-9))
        return (((rank,) * heads,) * parts,) * layers

    def allocate(self, budget: float) -> Ranks:
        """Ranks of which the mean is within this share: the start of the greedy order.

        Raises NarrowsError where there is no order, or none that goes so far.
        """
        size = self.mean.shape[-1]
        flat = torch.full((self.mean[..., 0].numel(),), size)
        aim = budget * size * len(flat) + 1e-6
        if size % STEPS or (not len(self.order) and budget < 1):
            raise NarrowsError(
                "matryoshkakv: this projection has no order in which to lower ranks; fit with a "
                "search, or use adaptive=False"
            )
        for entry in self.order.tolist():
            if int(flat.sum()) <= aim:
                break
            flat[entry] -= size // STEPS
        if int(flat.sum()) > aim:
            raise NarrowsError(
                f"matryoshkakv: no head goes below {size // STEPS} of {size} channels, so a budget "
                f"of {budget:g} cannot be met by lowering them; give at least {1 / STEPS:g}"
            )
        shaped = flat.reshape(self.mean.shape[:-1]).tolist()
        return tuple(tuple(tuple(heads) for heads in layer) for layer in shaped)


def cayley(free: torch.Tensor) -> torch.Tensor:
    """Orthogonal matrices of any square ones (..., d, d): (I - A/2)^-1 (I + A/2), A = X - X^T."""
    half = (free - free.transpose(-1, -2)) / 2
    eye = torch.eye(free.shape[-1], dtype=free.dtype, device=free.device)
    return torch.linalg.solve(eye - half, eye + half)


def principal(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and principal axes of samples (..., samples, d), the largest first, determinant +1."""
    x = x.double()
    mean = x.mean(-2)
    centred = x - mean.unsqueeze(-2)
    axes = torch.linalg.eigh(centred.transpose(-1, -2) @ centred).eigenvectors.flip(-1)
    # the last axis is turned where a reflection came out: it is the first that is dropped
    last = axes[..., -1:] * torch.linalg.det(axes).sign()[..., None, None]
    return mean.float(), torch.cat([axes[..., :-1], last], -1).float()


def save(made: Projection, path: str | os.PathLike[str], model: Any) -> None:
    """Write a projection, whole or not at all. model: whose it is.

    In fp32: halves would not be orthogonal to what fp32 tells.
    """
    from safetensors.torch import save_file

    from narrows.kv.saved import fingerprint

    tensors = {n: getattr(made, n).contiguous() for n in ("basis", "mean", "order")}
    path = Path(path)
    header = {"format": FORMAT, "model": fingerprint(model)}
    with tempfile.TemporaryDirectory(prefix=path.name, dir=path.parent) as folder:
        save_file(tensors, Path(folder) / path.name, metadata=header)
        os.replace(Path(folder) / path.name, path)


def load(path: str | os.PathLike[str], model: Any) -> Projection:
    """A projection from a file; NarrowsError where there is none, or it is another model's."""
    from safetensors import SafetensorError, safe_open

    from narrows.kv.saved import fingerprint

    how = (
        "fit one: python -m narrows.kv.matryoshkakv_train --out FILE (or MatryoshkaKV().fit), then "
        "of(model, load(FILE, model))"
    )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise NarrowsError(f"there is no projection at {path}; {how}") from error
    except (SafetensorError, OSError) as error:
        raise NarrowsError(f"{path} is not a whole file of a projection: {error}") from error
    if header.get("format") != FORMAT:
        raise NarrowsError(f"{path} is of the format {header.get('format')!r}, not {FORMAT!r}")
    if header.get("model") != fingerprint(model):
        raise NarrowsError(
            f"the projection of {path} was trained for {header.get('model')}, this model is "
            f"{fingerprint(model)}; {how}"
        )
    return Projection(tensors["basis"], tensors["mean"], tensors["order"])


def spread(ranks: Ranks | Sequence[Any], size: int) -> torch.Tensor:
    """Masks over channels, (layers, 2, kv_heads, head_dim) fp32: one where kept."""
    return (torch.arange(size) < torch.tensor(ranks)[..., None]).float()
