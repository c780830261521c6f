"""A message in the symbols of a model: what sender and receiver each hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from narrows.core.errors import NarrowsError
from narrows.information._base import law

Link = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""p(message, symbol) from the belief (messages,) and the law of the next symbol (symbols,)."""


class Courier:
    """A model that carries a message in its symbols, whose law stays what the model says.

    Sender and receiver have one each, over the same model; both see every observation and symbol.
    """

    def __init__(self, target: Callable[[Any], Any], prior: np.ndarray, link: Link) -> None:
        self.target, self.prior, self.link = target, prior, link
        self.belief = prior

    def __call__(self, observation: Any) -> np.ndarray:
        """The law of the next symbol: the target's own."""
        out = self.target(observation)
        out = getattr(out, "logits", out)
        if not hasattr(out, "detach"):
            return law(out, "the target's output")
        logits = np.asarray(out.detach().double().cpu().numpy(), np.float64)
        logits = logits.reshape(-1, logits.shape[-1])[-1]
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    def table(self, observation: Any) -> np.ndarray:
        """p(message, symbol), (messages, symbols): what both ends agree on."""
        return self.link(self.belief, self(observation))

    def send(self, message: int, observation: Any, rng: np.random.Generator) -> int:
        """The symbol to emit for a message; updates the belief as the receiver will."""
        if not 0 <= message < len(self.prior):
            raise NarrowsError(f"mecb: message must be below {len(self.prior)}, not {message!r}")
        table = self.table(observation)
        own = table[message]
        symbol = int(rng.choice(len(own), p=own / own.sum()))
        self._update(table, symbol)
        return symbol

    def receive(self, observation: Any, symbol: int) -> np.ndarray:
        """The belief about the message (messages,) after a symbol was seen."""
        self._update(self.table(observation), symbol)
        return self.belief

    def reset(self) -> None:
        """Forget what was seen: the next message begins."""
        self.belief = self.prior

    def _update(self, table: np.ndarray, symbol: int) -> None:
        seen = table[:, symbol]
        if not seen.sum() > 0:
            raise NarrowsError(
                f"mecb: symbol {symbol} cannot follow here: model, prior or order of observations "
                "differ between sender and receiver"
            )
        self.belief = seen / seen.sum()


@dataclass
class Working:
    """A courier at work: `.model`."""

    model: Courier


@contextmanager
def at_work(courier: Courier) -> Iterator[Working]:
    """The context that `apply` gives; there is nothing to undo on exit."""
    yield Working(courier)
