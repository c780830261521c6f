"""Small whole models of the validation battery, in the plain style of published ones.

A language model in two styles (GPT-2's and Llama's), a residual and a separable convolutional
network, a vision transformer and a classifier. Written out here so that the battery needs
nothing but torch, and its shapes are its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a transformer. gated: Llama's style (RMS norm, rotary, SwiGLU), or GPT-2's."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    gated: bool = False


class Attention(nn.Module):
    """Grouped-query attention over the tokens given, or over an in-place cache."""

    keys: Tensor
    values: Tensor

    def __init__(self, shape: Shape, causal: bool = True) -> None:
        super().__init__()
        self.shape, self.channels, self.causal = shape, shape.width // shape.heads, causal
        kv = shape.kv_heads * self.channels
        self.q = nn.Linear(shape.width, shape.width, bias=not shape.gated)
        self.k = nn.Linear(shape.width, kv, bias=not shape.gated)
        self.v = nn.Linear(shape.width, kv, bias=not shape.gated)
        self.o = nn.Linear(shape.width, shape.width, bias=not shape.gated)
        self.cached: int = 0

    def reserve(self, batch: int, tokens: int) -> None:
        """A cache of `tokens` keys and values, filled with noise but for its last place."""
        for name in ("keys", "values"):
            room = torch.randn(batch, self.shape.kv_heads, tokens, self.channels)
            self.register_buffer(name, room.to(self.q.weight), persistent=False)
        self.cached = tokens

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """x: (batch, tokens, width)."""
        batch, tokens, _ = x.shape
        q, k, v = (
            made.view(batch, tokens, -1, self.channels).transpose(1, 2)
            for made in (self.q(x), self.k(x), self.v(x))
        )
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        grouped = self.shape.kv_heads != self.shape.heads
        if self.cached:
            self.keys[:, :, -1:] = k
            self.values[:, :, -1:] = v
            out = F.scaled_dot_product_attention(q, self.keys, self.values, enable_gqa=grouped)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=grouped)
        return self.o(out.transpose(1, 2).reshape(batch, tokens, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021), halves swapped. x: (batch, heads, tokens, channels)."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


class Block(nn.Module):
    """Attention and MLP, each after a norm and beside a residual."""

    def __init__(self, shape: Shape, causal: bool = True) -> None:
        super().__init__()
        norm = nn.RMSNorm if shape.gated else nn.LayerNorm
        self.before, self.after = norm(shape.width), norm(shape.width)
        self.attention = Attention(shape, causal)
        self.up = nn.Linear(shape.width, shape.inner, bias=not shape.gated)
        self.gate = nn.Linear(shape.width, shape.inner, bias=False) if shape.gated else None
        self.down = nn.Linear(shape.inner, shape.width, bias=not shape.gated)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """x: (batch, tokens, width)."""
        x = x + self.attention(self.before(x), angles)
        h = self.after(x)
        wide = F.gelu(self.up(h)) if self.gate is None else F.silu(self.gate(h)) * self.up(h)
        return x + self.down(wide)


class Language(nn.Module):
    """A decoder-only language model; the head ties to the embedding in GPT-2's style."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = (nn.RMSNorm if shape.gated else nn.LayerNorm)(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        channels = shape.width // shape.heads
        angle = torch.outer(torch.arange(tokens), 1e4 ** -torch.linspace(0, 1, channels // 2))
        if shape.gated:
            both = torch.cat((angle, angle), -1)
            self.register_buffer("cos", both.cos(), persistent=False)
            self.register_buffer("sin", both.sin(), persistent=False)
        else:
            self.positions = nn.Parameter(torch.randn(tokens, shape.width) * 0.02)
            self.head.weight = self.embedding.weight
        self.gated, self.labelled = shape.gated, False

    def decoding(self, batch: int, cached: int) -> Language:
        """This model with a cache of `cached` tokens: a call is one decode step."""
        for block in self.blocks:
            block.attention.reserve(batch, cached)  # pyright: ignore
        return self

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """ids: (batch, tokens). The logits, or the loss where targets are given."""
        x = self.embedding(ids)
        angles = None
        if self.gated:
            angles = (self.cos[-ids.shape[1] :], self.sin[-ids.shape[1] :])
        else:
            x = x + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, angles)
        logits = self.head(self.norm(x))
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets)


class Residual(nn.Module):
    """Two 3 by 3 convolutions beside a residual, with batch norms (He et al. 2016)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList((nn.BatchNorm2d(out), nn.BatchNorm2d(out)))
        self.skip = nn.Conv2d(channels, out, 1, stride, bias=False) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, channels, height, width)."""
        h = F.relu(self.norms[0](self.first(x)))
        h = self.norms[1](self.second(h))
        return F.relu(h + (x if self.skip is None else self.skip(x)))


class Separable(nn.Module):
    """A depthwise and a pointwise convolution (Howard et al. 2017)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.depth = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
        self.point = nn.Conv2d(channels, out, 1, bias=False)
        self.norms = nn.ModuleList((nn.BatchNorm2d(channels), nn.BatchNorm2d(out)))

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, channels, height, width)."""
        return F.relu6(self.norms[1](self.point(F.relu6(self.norms[0](self.depth(x))))))


class Images(nn.Module):
    """A convolutional classifier: a stem, stages of blocks that halve the side, a mean, a head."""

    def __init__(self, block: type[nn.Module], widths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        stem = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        stages = [block(a, b, 2) for a, b in pairwise(widths)]
        self.body = nn.Sequential(stem, block(widths[0], widths[0], 1), *stages)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """x: (batch, 3, side, side)."""
        logits = self.head(self.body(x).mean((2, 3)))
        return logits if targets is None else F.cross_entropy(logits, targets)


class Vision(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) over patches, without a class token."""

    def __init__(self, shape: Shape, patch: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, shape.width, patch, patch)
        self.blocks = nn.ModuleList(Block(shape, causal=False) for _ in range(shape.layers))
        self.norm, self.head = nn.LayerNorm(shape.width), nn.Linear(shape.width, shape.vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, 3, side, side)."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, None)
        return self.head(self.norm(x).mean(1))


class Classifier(nn.Module):
    """A perceptron with two hidden layers."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        pairs = pairwise(sizes)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """x: (batch, features)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        logits = self.layers[-1](x)
        return logits if targets is None else F.cross_entropy(logits, targets)
