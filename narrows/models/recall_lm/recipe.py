"""How recall-lm is trained, as data.

Recall forms late and suddenly. So: a shallow net first learns to copy random segments by content,
then to answer pairs in short text, then ever more pairs in ever longer text; then it grows in depth
(the function unchanged) and learns text beside the tasks.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Shape:
    """The network: widths in units, positions in tokens."""

    vocabulary: int = 1024
    width: int = 256
    feed_forward: int = 688
    query_heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    rope_theta: float = 1e6
    positions: int = 8192


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum.

    lengths: tokens of a sequence; each step draws one of them. mix: share of the steps by task
    (copy, pairs, needle, chain, text). gate: (task, share of the last `GATE_ANSWERS` answers wholly
    right; of tokens for copy) that ends the stage early, or None. pairs, values: least and most
    statements, and tokens of a value. text_weight: weight of the mean text loss beside the mean
    answer loss. decay: the share of the stage, at its end, over which the rate falls linearly to a
    tenth. workers: threads that share the batch, a sequence each at least.
    """

    name: str
    layers: int
    lengths: tuple[int, ...]
    max_tokens: int
    mix: dict[str, float] = field(default_factory=lambda: {"copy": 0.5, "pairs": 0.5})
    gate: tuple[str, float] | None = ("pairs", 0.93)
    pairs: tuple[int, int] = (2, 4)
    values: tuple[int, int] = (1, 4)
    batch_tokens: int = 2048
    workers: int = 1
    rate: float = 1e-3
    warmup_steps: int = 20
    decay: float = 0.0
    text_weight: float = 0.1


@dataclass(frozen=True)
class Recipe:
    """A shape, a seed and the stages in order."""

    name: str
    seed: int
    shape: Shape
    stages: tuple[Stage, ...]
    draft_lookup: bool = True


GATE_ANSWERS = 512

RECALL = {"copy": 0.1, "pairs": 0.9}
MIXED = {"text": 0.42, "pairs": 0.48, "needle": 0.03, "chain": 0.05, "copy": 0.02}
LONG = {"text": 0.3, "pairs": 0.5, "needle": 0.15, "chain": 0.03, "copy": 0.02}

CPU = Recipe(
    "cpu",
    20261123,
    Shape(),
    (
        Stage(
            "copy", 2, (256,), 1_000_000, mix={"copy": 1.0}, gate=("copy", 0.93), warmup_steps=10
        ),
        Stage("pairs-128", 2, (128,), 500_000, pairs=(2, 4), mix=RECALL),
        Stage("pairs-256", 2, (256,), 500_000, pairs=(2, 8), mix=RECALL),
        Stage("pairs-512", 2, (512,), 500_000, pairs=(4, 16), mix=RECALL),
        Stage("pairs-1024", 2, (1024,), 400_000, pairs=(4, 16), mix=RECALL),
        Stage("pairs-2048", 2, (2048,), 120_000, pairs=(4, 16), values=(1, 8), mix=RECALL),
        Stage(
            "text-4",
            4,
            (512, 512, 1024, 2048),
            1_400_000,
            rate=8e-4,
            pairs=(1, 16),
            values=(1, 8),
            gate=None,
            mix=MIXED,
            text_weight=0.5,
            workers=2,
            decay=0.6,
        ),
        Stage(
            "long-4",
            4,
            (512, 1024, 2048, 2048, 2048, 4096),
            1_800_000,
            rate=6e-4,
            pairs=(1, 16),
            values=(1, 8),
            gate=None,
            mix=LONG,
            text_weight=0.5,
            batch_tokens=4096,
            workers=2,
            decay=0.8,
        ),
    ),
)

GPU = Recipe(
    "gpu",
    20261123,
    Shape(query_heads=8),
    (
        Stage("copy", 2, (256,), 4_000_000, mix={"copy": 1.0}, gate=("copy", 0.93)),
        Stage("pairs-256", 2, (256,), 4_000_000, pairs=(2, 8), mix=RECALL, batch_tokens=8192),
        Stage("pairs-1024", 2, (1024,), 8_000_000, pairs=(4, 16), mix=RECALL, batch_tokens=16384),
        Stage("pairs-2048", 2, (2048,), 8_000_000, pairs=(4, 16), mix=RECALL, batch_tokens=16384),
        Stage(
            "text-4",
            4,
            (512, 1024, 2048),
            40_000_000,
            pairs=(1, 16),
            values=(1, 8),
            gate=None,
            mix=MIXED,
            text_weight=0.5,
            batch_tokens=32768,
        ),
        Stage(
            "text-6",
            6,
            (512, 1024, 2048, 4096),
            80_000_000,
            pairs=(1, 24),
            values=(1, 8),
            gate=None,
            mix=MIXED,
            text_weight=0.5,
            batch_tokens=32768,
            decay=0.6,
        ),
    ),
)
"""The larger net (6 blocks, 8 query heads, 5.4 M parameters); not yet run."""

RECIPES = {recipe.name: recipe for recipe in (CPU, GPU)}
