"""What recipes that train a part of a technique share: a run that was cut short goes on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def remember(path: Path, step: int, optimizer: Any, weights: Sequence[torch.Tensor]) -> None:
    """Keep the steps done, the weights and what Adam knows of them, whole or not at all."""
    from safetensors.torch import save_file

    told = {"step": torch.tensor(step)}
    for i, weight in enumerate(weights):
        state = optimizer.state[weight]
        told |= {f"{i}.weight": weight.detach(), f"{i}.mean": state["exp_avg"],
                 f"{i}.square": state["exp_avg_sq"]}  # fmt: skip
    spare = path.with_suffix(".new")
    save_file(told, spare)
    os.replace(spare, path)


def resumed(path: Path | None, optimizer: Any, weights: Sequence[torch.Tensor]) -> int:
    """Take up what was kept, if anything was; returns the steps done."""
    if path is None or not path.is_file():
        return 0
    from safetensors.torch import load_file

    told = load_file(path)
    for i, weight in enumerate(weights):
        weight.data.copy_(told[f"{i}.weight"])
        optimizer.state[weight] = {
            "step": told["step"].float(), "exp_avg": told[f"{i}.mean"],
            "exp_avg_sq": told[f"{i}.square"],
        }  # fmt: skip
    return int(told["step"])
