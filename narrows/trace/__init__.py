"""How a torch module, a Hugging Face configuration or a training step becomes a Workload.

config.py      TransformerConfig         any Hugging Face config.json of a decoder-only transformer
shapes.toml    shape, shapes             the shipped catalogue of public configurations
llm.py         llm                       the closed form: no torch, one case or thousands
weights.py     weight_tensors            the weights of a configuration as tensors
blocks.py      Builder                   the kernels of a layer, as eager frameworks run them
training.py    training_step             forward, backward and optimiser in closed form
module.py      trace                     any torch module or callable, on meta tensors
aten.py        describe                  op class and flops of a torch kernel
fold.py        fold                      repeated layers become one block that runs so many times
generation.py  trace_generation          prefill and decode of a causal language model

Only module.py, aten.py and generation.py need torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from narrows.trace.config import TransformerConfig, shape, shapes
    from narrows.trace.llm import llm

_HOMES = {
    "TransformerConfig": "narrows.trace.config",
    "shape": "narrows.trace.config",
    "shapes": "narrows.trace.config",
    "llm": "narrows.trace.llm",
}

__all__ = ["TransformerConfig", "llm", "shape", "shapes"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'narrows.trace' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
