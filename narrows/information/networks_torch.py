"""Small fully connected networks, several seeds trained side by side, read as they train.

The paper's network (12-10-7-5-4-3-2) costs more in dispatch than in arithmetic; seeds are one
more axis of every product, so ten of them train in little more time than one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from narrows.core.errors import NarrowsError, unknown
from narrows.information.information_plane import InformationPlane
from narrows.information.source import Source

WIDTHS = (12, 10, 7, 5, 4, 3, 2)
"""The paper's network, inputs and outputs included."""

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}


@dataclass(frozen=True)
class History:
    """What was read of S networks at E epochs.

    epochs: (E,). x, y, of_rule: by ruler, (E, S, layers), bits; the last layer is the softmax.
    y counts drawn labels, of_rule the rule's posterior (nan where it is not known). null: I(T; Y)
    of shuffled labels. train_error, test_error: (E, S), fractions. drift, diffusion: (E, S,
    layers), norms of the mean and of the standard deviation of a layer's gradient over the
    mini-batches of the epoch, over the norm of its weights. seeds: (S,).
    """

    epochs: np.ndarray
    x: Mapping[str, np.ndarray]
    y: Mapping[str, np.ndarray]
    of_rule: Mapping[str, np.ndarray]
    null: Mapping[str, np.ndarray]
    train_error: np.ndarray
    test_error: np.ndarray
    drift: np.ndarray
    diffusion: np.ndarray
    seeds: tuple[int, ...]


def log_spaced(epochs: int, each: int = 3) -> tuple[int, ...]:
    """Epochs 0, 1, ..., `epochs`, `each` to a doubling, whole and each once."""
    count = int(each * np.log2(max(epochs, 1))) + 1
    return tuple(sorted({0, *np.round(2 ** (np.arange(count) / each)).astype(int), epochs}))


class Networks:
    """S networks of equal shape. weights[l]: (S, in, out), biases[l]: (S, 1, out).

    Weights are drawn from a normal of standard deviation 1 / sqrt(in), cut off at two of them;
    biases start at 0 (as in the authors' code).
    """

    def __init__(self, widths: tuple[int, ...], activation: str, seeds: tuple[int, ...]) -> None:
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        if len(widths) < 2 or not seeds:
            raise NarrowsError("networks need at least inputs, outputs and one seed")
        self.activation = ACTIVATIONS[activation]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.weights, self.biases = [], []
        for fan_in, fan_out in pairwise(widths):
            sd = fan_in**-0.5
            drawn = [
                torch.nn.init.trunc_normal_(
                    torch.empty(fan_in, fan_out), std=sd, a=-2 * sd, b=2 * sd, generator=g
                )
                for g in self.generators
            ]
            self.weights.append(torch.stack(drawn).requires_grad_())
            self.biases.append(torch.zeros(len(seeds), 1, fan_out, requires_grad=True))

    def layers(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Outputs (S, n, units) of all layers for x (S, n, d); the last one are logits."""
        out: list[torch.Tensor] = []
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            x = x if i == last else self.activation(x)
            out.append(x)
        return out


def train(
    source: Source,
    rulers: Mapping[str, InformationPlane],
    widths: tuple[int, ...] = WIDTHS,
    activation: str = "tanh",
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    epochs: int = 1500,
    rate: float = 0.1,
    batch: int = 512,
    share: float = 0.85,
    at: tuple[int, ...] | None = None,
) -> History:
    """Plain SGD on cross-entropy; every ruler reads all inputs at the epochs `at` (log-spaced).

    share: of the inputs that are trained on; each seed draws its own weights, split and order.
    batch 0: the whole training set at once. Epoch 0 is before any training.
    """
    nets = Networks(widths, activation, seeds)
    at = log_spaced(epochs) if at is None else at
    x = torch.as_tensor(source.x, dtype=torch.float32)
    y = torch.as_tensor(source.y, dtype=torch.long)
    n, count = len(x), int(share * len(x))
    split = torch.stack([torch.randperm(n, generator=g) for g in nets.generators])
    optimizer = torch.optim.SGD([*nets.weights, *nets.biases], lr=rate)
    rows: dict[str, list[np.ndarray]] = {
        k: [] for k in ("train_error", "test_error", "drift", "diffusion")
    }
    read: dict[str, list[np.ndarray]] = {name: [] for name in rulers}
    for epoch in range(epochs + 1):
        if epoch in at:
            _read(nets, source, x, y, split, count, rulers, rows, read)
        order = torch.stack([torch.randperm(count, generator=g) for g in nets.generators])
        order = split[:, :count].gather(1, order)
        seen: list[list[torch.Tensor]] = []
        for chosen in order.split(batch or count, dim=1):
            logits = nets.layers(x[chosen])[-1]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), y[chosen].flatten(), reduction="sum"
            )
            optimizer.zero_grad()
            # networks share no weight: the gradient of the sum is each one's own
            (loss / chosen.shape[1]).backward()
            if epoch in at:
                seen.append([_gradient(w) for w in nets.weights])
            if epoch < epochs:
                optimizer.step()
        if epoch in at:
            stacked = [torch.stack(g) for g in zip(*seen, strict=True)]
            norm = [w.detach().flatten(1).norm(dim=1) for w in nets.weights]
            mean = [g.mean(0).norm(dim=1) / s for g, s in zip(stacked, norm, strict=True)]
            std = [
                g.std(0, correction=0).norm(dim=1) / s for g, s in zip(stacked, norm, strict=True)
            ]
            rows["drift"].append(torch.stack(mean, dim=1).numpy())
            rows["diffusion"].append(torch.stack(std, dim=1).numpy())
    # (E, S, layers, 4): x, y, of_rule, null
    tables = {name: np.stack(found) for name, found in read.items()}
    part = [{name: table[..., k] for name, table in tables.items()} for k in range(4)]
    error, unseen, drift, diffusion = (np.stack(rows[k]) for k in rows)
    return History(
        np.array(sorted(at)), part[0], part[1], part[2], part[3],
        error, unseen, drift, diffusion, tuple(seeds),
    )  # fmt: skip


def _gradient(weight: torch.Tensor) -> torch.Tensor:
    assert weight.grad is not None
    return weight.grad.detach().flatten(1).clone()


def _read(
    nets: Networks,
    source: Source,
    x: torch.Tensor,
    y: torch.Tensor,
    split: torch.Tensor,
    count: int,
    rulers: Mapping[str, InformationPlane],
    rows: dict[str, list[np.ndarray]],
    read: dict[str, list[np.ndarray]],
) -> None:
    """Append errors and every ruler's plane of all networks as they are now."""
    with torch.no_grad():
        outputs = nets.layers(x.expand(len(split), *x.shape))
        wrong = (outputs[-1].argmax(-1) != y).double()
        outputs[-1] = torch.softmax(outputs[-1], dim=-1)
    rows["train_error"].append(wrong.gather(1, split[:, :count]).mean(1).numpy())
    rows["test_error"].append(wrong.gather(1, split[:, count:]).mean(1).numpy())
    for name, ruler in rulers.items():
        table = np.empty((len(split), len(outputs), 4))
        for s in range(len(split)):
            given = {str(k): h[s].double().numpy() for k, h in enumerate(outputs)}
            for k, layer in enumerate(ruler.plane(given, source).layers):
                facts = layer.y.facts
                table[s, k] = (
                    layer.x.value, layer.y.value, facts.get("of_rule", np.nan), facts["null"],
                )  # fmt: skip
        read[name].append(table)
