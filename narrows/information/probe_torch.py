"""Activations of a torch module's layers by hooks, at once or along a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from narrows.core.errors import NarrowsError, unknown
from narrows.information.source import Source

if TYPE_CHECKING:
    from narrows.information.information_plane import InformationPlane, Plane


def hidden(model: torch.nn.Module) -> tuple[str, ...]:
    """Names of the modules whose output is a layer: the activation functions, else the products."""
    home = torch.nn.modules.activation.__name__
    named = [(n, m) for n, m in model.named_modules() if n and not list(m.children())]
    found = tuple(n for n, m in named if type(m).__module__ == home)
    return found or tuple(n for n, m in named if isinstance(m, torch.nn.Linear))


def activations(
    model: torch.nn.Module, x: np.ndarray, layers: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """Outputs (n, units) of layers for inputs x (n, d), in the order they ran.

    The model is run once in evaluation mode, without gradients; mode and hooks are as before
    afterwards. Further axes of an output are counted as units.
    """
    known = dict(model.named_modules())
    chosen = layers or hidden(model)
    if not chosen:
        raise NarrowsError(
            "this model has no activation function and no Linear to read; name its layers"
        )
    found: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, torch.Tensor):
                raise NarrowsError(f"layer {name!r} gives {type(output).__name__}, not a tensor")
            found[name] = output.detach().reshape(len(x), -1).double().cpu().numpy()

        return hook

    for name in chosen:
        if name not in known:
            raise unknown("layer of the model", name, [n for n in known if n])
    handles = [known[name].register_forward_hook(keep(name)) for name in chosen]
    modes = {m: m.training for m in model.modules()}
    try:
        first = next(iter(model.parameters()), torch.zeros(()))
        with torch.no_grad():
            model.eval()
            model(torch.as_tensor(x).to(first.device, first.dtype))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return found


class Recorder:
    """Planes of a model along its training, at step 0 and then `each` times closer than doubled.

    with Recorder(instrument, model, source).attach(optimizer) as seen:
        ...                    # train as usual
    seen.planes                # step -> Plane
    """

    def __init__(
        self,
        instrument: InformationPlane,
        model: torch.nn.Module,
        source: Source,
        layers: tuple[str, ...] = (),
        each: int = 4,
    ) -> None:
        if each < 1:
            raise NarrowsError(f"recorder: at least 1 snapshot a doubling, not {each!r}")
        self.instrument, self.model, self.source, self.layers = instrument, model, source, layers
        self.each, self.step = each, 0
        self.planes: dict[int, Plane] = {}

    def read(self) -> Plane:
        """Read the plane now, whatever the step."""
        found = self.instrument.plane(self.model, self.source, self.layers)
        self.planes[self.step] = found
        return found

    @contextmanager
    def attach(self, optimizer: torch.optim.Optimizer) -> Iterator[Recorder]:
        """Count the optimiser's steps and read at log-spaced ones; the hook is gone on exit."""

        def after(*_: Any) -> None:
            self.step += 1
            if self.step >= self._next:
                self.read()
                self._next = max(self.step + 1, round(self.step * 2 ** (1 / self.each)))

        self.read()
        self._next = 1
        handle = optimizer.register_step_post_hook(after)
        try:
            yield self
        finally:
            handle.remove()
            self.read()
