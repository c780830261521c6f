"""The shape of a decoder-only transformer, read from any Hugging Face config.json."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from narrows.core.errors import NarrowsError, unknown


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    """What the closed form needs to know of a decoder-only transformer.

    ffn: width of the MLP. expert_ffn: width of one expert; shared_ffn: of the expert all tokens
    take. dense_layers: layers with a plain MLP in a mixture of experts. gated: two projections
    up. norm: `rms`, `gemma` (RMS in fp32 with 1 + weight) or `layer`. norms: in one block: 2 before
    attention and MLP, 4 before and after both, 1 shared by both (parallel blocks). qkv, gate_up:
    one fused projection. positions: `rotary` or `learned`; rotary: share of the head that
    turns; position_rows: rows of the learned table. embed_dim: width of the embedding where
    it is projected to `hidden`. window: tokens a windowed layer attends, 0 for none;
    windowed_layers: how many do. softcap: scores and logits pass a tanh. query_scale: queries
    are scaled by a kernel of their own. embed_scale: the
    embedding is multiplied. max_positions: longest context of the training.
    """

    name: str
    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    gated: bool = True
    activation: str = "silu"
    norm: str = "rms"
    norms: int = 2
    norm_bias: bool = False
    parallel: bool = False
    fused_qkv: bool = False
    fused_gate_up: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    query_scale: bool = False
    final_norm: bool = True
    positions: str = "rotary"
    rotary: float = 1.0
    position_rows: int = 0
    embed_dim: int = 0
    embed_scale: bool = False
    softcap: bool = False
    window: int = 0
    windowed_layers: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    dense_layers: int = 0
    max_positions: int = 0

    @property
    def parameters(self) -> int:
        """Trainable values; tied embeddings count once."""
        from narrows.trace.weights import weight_tensors

        return round(float(sum(t.elements() for t in weight_tensors(self).values())))

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any], name: str = "") -> TransformerConfig:
        """Read a config.json (its path, the folder that holds it, or what it parses to).

        Raises NarrowsError on a file that is missing or malformed, a field that is missing or
        out of range, and on architectures that the closed form does not cover.
        """
        from narrows.trace.families import read

        if not isinstance(source, Mapping):
            path = Path(source)
            name = name or (path.parent.name if path.name == "config.json" else path.stem)
            source = load_fields(path)
        return read(source, name)


def load_fields(path: Path) -> Mapping[str, Any]:
    """What a config.json holds, given its path or folder; NarrowsError where it is malformed."""
    path = path / "config.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NarrowsError(
            f"no model configuration at {str(path)!r}; give a config.json or its folder"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise NarrowsError(f"{str(path)!r} cannot be read as JSON: {error}") from None
    if not isinstance(found, Mapping):
        raise NarrowsError(f"{str(path)!r} should hold a JSON object with the model's fields")
    return found


@cache
def _catalogue() -> Mapping[str, Mapping[str, Any]]:
    text = files("narrows.trace").joinpath("shapes.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def shapes() -> tuple[str, ...]:
    """Names of the shipped configurations, in catalogue order."""
    return tuple(_catalogue())


def published(name: str) -> Mapping[str, Any]:
    """The fields of a shipped configuration as its publisher gives them, and `source`."""
    found = _catalogue()
    if name not in found:
        raise unknown("model", name, found, f"shipped are {', '.join(found)}")
    return found[name]


@cache
def shape(name: str) -> TransformerConfig:
    """A shipped configuration by name; see shapes() for all of them."""
    return TransformerConfig.from_json(published(name), name)
