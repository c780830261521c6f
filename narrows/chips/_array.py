"""The spatial array: what it is made of, what its actions cost, and the networks it is asked about.

Figures: Nayak et al. 2024, "FuseMax", section VI, and the architectures and energy tables of its
artifact (FPSG-UIUC/micro24-fusemax-artifact, f543beb: `yamls/*/arch-*.yaml`, `area_energy/`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from narrows.core.errors import NarrowsError, unknown


@dataclass(frozen=True, slots=True)
class Array:
    """A square array of multiply-add units, a row of vector units, one buffer, main memory.

    pe: units along an edge, and in the row. buffer: bytes of the global buffer. bandwidth: bytes
    per second of main memory. clock: cycles per second. word: bytes of an element.
    """

    pe: int
    buffer: int
    bandwidth: float
    clock: float
    word: int = 2

    def __post_init__(self) -> None:
        if min(self.pe, self.buffer, self.bandwidth, self.clock, self.word) <= 0:
            raise NarrowsError(f"every figure of a spatial array must be above zero: {self}")


@dataclass(frozen=True, slots=True)
class Energy:
    """Picojoules of an action (Accelergy tables `ert-*.yaml` of the artifact).

    dram: of 8 bytes. read, write: of a row of the buffer, 256 words. pe, row: (read, write) of a
    register of the 2D and of the 1D array. compute: of one operation.
    """

    pe: tuple[float, float]
    row: tuple[float, float]
    compute: Mapping[str, float]
    dram: float = 249.6
    read: float = 484.97271
    write: float = 451.30271


OPERATIONS: Mapping[str, float] = {
    "mac": 17.1645, "mul": 17.1645, "add": 8.3395, "max": 0.028036, "div": 36.251153,
    "exp": 94.6475,
}  # fmt: skip
FUSEMAX_ENERGY = Energy((0.653431, 0.56957), (0.653431, 0.56957), OPERATIONS)
FLAT_ENERGY = Energy((0.291512, 0.225259), (0.385026, 0.336188), OPERATIONS)
DRAM_BYTES, ROW_WORDS = 8, 256
"""Bytes of a main memory access and words of a buffer row, to which the energies refer."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A transformer layer: heads, channels of a head, of the model and of the hidden layer."""

    heads: int
    head_dim: int
    width: int
    hidden: int


SHAPES: Mapping[str, Shape] = {
    "BERT": Shape(12, 64, 768, 3072),
    "TrXL": Shape(16, 64, 1024, 4096),
    "T5": Shape(8, 64, 512, 2048),
    "XLM": Shape(16, 128, 2048, 8192),
}
"""The paper's four (section VI): BERT-base, Transformer-XL, T5-small, XLM."""


@dataclass(frozen=True, slots=True)
class Part:
    """One Einsum on the array: cycles where it runs, bytes of main memory, picojoules by kind."""

    name: str
    wide: bool
    cycles: float
    bytes: float
    joules: Mapping[str, float] = field(default_factory=dict[str, float])
    utilised: float = 1.0


def shape_of(model: str | Shape) -> Shape:
    """A shape, or the one of that name."""
    if isinstance(model, Shape):
        return model
    if model not in SHAPES:
        raise unknown("network of the paper", model, SHAPES)
    return SHAPES[model]
