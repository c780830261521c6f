"""The weights of a transformer configuration as tensors, one for each role."""

from __future__ import annotations

from narrows.core.errors import NarrowsError
from narrows.core.tensor import Codec, Number, Tensor
from narrows.trace.config import TransformerConfig


def kv_heads_per_device(config: TransformerConfig, tp: int) -> float:
    """Key-value heads a device holds; fewer heads than devices are copied, never split."""
    return max(config.kv_heads / tp, 1.0)


def weight_tensors(
    config: TransformerConfig, dtype: str = "bf16", tp: int = 1
) -> dict[str, Tensor]:
    """All weights held by one device of `tp`, by name.

    Axes: `layer` (layers that have it), then `out` and `in` of the product, or `vocab` and
    `channel`, and `expert`. Heads, MLP width and vocabulary are split as Megatron-LM does
    (Shoeybi et al. 2019, section 3); norms and biases after a sum are whole on each device.
    Raises NarrowsError where `tp` does not divide the heads.
    """
    if tp < 1 or config.heads % tp:
        raise NarrowsError(
            f"tp={tp} does not divide the {config.heads} attention heads of {config.name!r}"
        )
    codec = Codec.of(dtype)
    found: dict[str, Tensor] = {}
    layers, hidden, dim = config.layers, config.hidden, config.head_dim

    def add(name: str, **axes: Number) -> None:
        found[name] = Tensor(name, "weight", axes, codec)

    def linear(name: str, out: Number, into: Number, bias: bool, layer: int = layers) -> None:
        add(name, layer=layer, out=out, **{"in": into})
        if bias:
            add(f"{name}.bias", layer=layer, out=out)

    def norm(name: str, layer: int, width: Number = hidden) -> None:
        add(name, layer=layer, channel=width)
        if config.norm_bias:
            add(f"{name}.bias", layer=layer, channel=width)

    width = config.embed_dim or hidden
    add("embed", vocab=config.vocab / tp, channel=width)
    if config.positions == "learned":
        add("positions", token=config.position_rows, channel=hidden)
    if config.embed_dim:
        linear("project_in", hidden, width, False, 1)
        linear("project_out", width, hidden, False, 1)

    queries = config.heads * dim / tp
    keys = kv_heads_per_device(config, tp) * dim
    norm("attention_norm", layers)
    if config.fused_qkv:
        linear("qkv", queries + 2 * keys, hidden, config.qkv_bias)
    else:
        linear("q", queries, hidden, config.qkv_bias)
        linear("k", keys, hidden, config.qkv_bias)
        linear("v", keys, hidden, config.qkv_bias)
    if config.qk_norm:
        add("q_norm", layer=layers, channel=dim)
        add("k_norm", layer=layers, channel=dim)
    linear("o", hidden, queries, config.out_bias)
    if config.norms == 4:
        norm("attention_post_norm", layers)
    if config.norms > 1:
        norm("mlp_norm", layers)
    if config.norms == 4:
        norm("mlp_post_norm", layers)

    plain = layers if not config.experts else config.dense_layers
    if plain:
        _mlp(add, linear, config, plain, config.ffn / tp)
    if config.experts:
        sparse = layers - config.dense_layers
        add("router", layer=sparse, out=config.experts, **{"in": hidden})
        shape = {"layer": sparse, "expert": config.experts}
        inner = config.expert_ffn / tp
        add("experts.gate_up", **shape, out=2 * inner, **{"in": hidden})
        add("experts.down", **shape, out=hidden, **{"in": inner})
        if config.shared_ffn:
            inner = config.shared_ffn / tp
            linear("shared.gate", inner, hidden, False, sparse)
            linear("shared.up", inner, hidden, False, sparse)
            linear("shared.down", hidden, inner, False, sparse)
            add("shared.router", layer=sparse, out=1, **{"in": hidden})
    if config.final_norm:
        norm("final_norm", 1)
    if not config.tied:
        add("lm_head", vocab=config.vocab / tp, channel=width)
    if config.head_bias:
        add("lm_head.bias", vocab=config.vocab / tp)
    return found


def _mlp(add, linear, config: TransformerConfig, layers: int, inner: Number) -> None:
    hidden, bias = config.hidden, config.mlp_bias
    if config.gated and config.fused_gate_up:
        linear("gate_up", 2 * inner, hidden, bias, layers)
    elif config.gated:
        linear("gate", inner, hidden, bias, layers)
        linear("up", inner, hidden, bias, layers)
    else:
        linear("up", inner, hidden, bias, layers)
    linear("down", hidden, inner, bias, layers)
