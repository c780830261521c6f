"""How each family of models words its config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from narrows.core.errors import NarrowsError, unknown
from narrows.trace.config import TransformerConfig

LARGEST = 10**9
"""No extent of a model is larger; a bigger figure in a file is a mistake."""


class Fields:
    """Checked access to the fields of a configuration; every failure names field and model."""

    def __init__(self, raw: Mapping[str, Any], name: str) -> None:
        self.raw = raw
        self.name = name

    def fail(self, text: str) -> NarrowsError:
        return NarrowsError(f"model {self.name!r}: {text}")

    def get(self, *keys: str) -> Any:
        """The first of these fields that is there and not null."""
        return next((self.raw[k] for k in keys if self.raw.get(k) is not None), None)

    def whole(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """A whole number from `least` up to LARGEST; the first of `keys` names it in errors."""
        value = self.get(*keys)
        if value is None:
            if default is None:
                raise self.fail(f"field {keys[0]!r} is missing; the configuration is incomplete")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
            raise self.fail(
                f"field {keys[0]!r} must be a whole number from {least} to {LARGEST}, "
                f"not {str(value)[:60]!r}"
            )
        return value

    def flag(self, *keys: str, default: bool) -> bool:
        """True or false."""
        value = self.get(*keys)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(f"field {keys[0]!r} must be true or false, not {str(value)[:60]!r}")
        return value

    def text(self, *keys: str, default: str) -> str:
        """A word."""
        value = self.get(*keys)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.fail(f"field {keys[0]!r} must be a word, not {str(value)[:60]!r}")
        return value

    def share(self, key: str, default: float) -> float:
        """A fraction in (0, 1], also looked for among the rotary parameters."""
        value = self.get(key)
        for holder in ("rope_parameters", "rope_scaling"):
            inside = self.raw.get(holder)
            if value is None and isinstance(inside, Mapping):
                value = inside.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise self.fail(f"field {key!r} must lie in (0, 1], not {str(value)[:60]!r}")
        return float(value)


def _common(f: Fields, **known: Any) -> TransformerConfig:
    """The fields nearly all families word as Llama does; `known` are those that differ."""
    hidden = known.get("hidden") or f.whole("hidden_size", "n_embd", "d_model")
    heads = f.whole("num_attention_heads", "n_head", "n_heads")
    kv_heads = known.get("kv_heads") or f.whole("num_key_value_heads", default=heads)
    head_dim = f.whole("head_dim", default=0, least=0)
    if not head_dim:
        if hidden % heads:
            raise f.fail(f"{heads} attention heads do not divide the hidden size {hidden}")
        head_dim = hidden // heads
    if heads % kv_heads:
        raise f.fail(f"{kv_heads} key-value heads do not divide {heads} attention heads")
    settings: dict[str, Any] = {
        "activation": f.text("hidden_act", "activation_function", default="silu"),
        "max_positions": f.whole("max_position_embeddings", "n_positions", "n_ctx", default=0,
                                 least=0),
        **known,
    }  # fmt: skip
    settings.pop("kv_heads", None)
    settings.pop("hidden", None)
    ffn = settings.pop("ffn", None) or f.whole("intermediate_size")
    tied = f.flag("tie_word_embeddings", default=settings.pop("tied", False))
    return TransformerConfig(
        name=f.name,
        family=f.text("model_type", default="llama"),
        layers=f.whole("num_hidden_layers", "n_layer", "n_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn,
        vocab=f.whole("vocab_size"),
        tied=tied,
        **settings,
    )


def _windowed(f: Fields, config: TransformerConfig, default: bool) -> TransformerConfig:
    """Sliding windows: which layers have one, from `layer_types`, a period, or all of them."""
    window = f.whole("sliding_window", default=0, least=0)
    if not window or not f.flag("use_sliding_window", default=default):
        return config
    kinds = f.get("layer_types")
    if isinstance(kinds, list):
        count = sum(kind == "sliding_attention" for kind in kinds[: config.layers])
    elif config.family == "gemma2":
        count = (config.layers + 1) // 2
    elif f.get("sliding_window_pattern") is not None:
        count = config.layers - config.layers // f.whole("sliding_window_pattern")
    elif f.get("max_window_layers") is not None:
        count = max(config.layers - f.whole("max_window_layers", least=0), 0)
    else:
        count = config.layers
    return replace(config, window=window if count else 0, windowed_layers=count)


def _llama(f: Fields) -> TransformerConfig:
    bias = f.flag("attention_bias", "bias", default=False)
    return _common(
        f, qkv_bias=bias, out_bias=bias, mlp_bias=f.flag("mlp_bias", default=False), tied=False
    )


def _mistral(f: Fields) -> TransformerConfig:
    return _windowed(f, _common(f, tied=False), default=True)


def _qwen2(f: Fields) -> TransformerConfig:
    return _windowed(f, _common(f, qkv_bias=True, tied=False), default=False)


def _qwen3(f: Fields) -> TransformerConfig:
    bias = f.flag("attention_bias", default=False)
    config = _common(f, qkv_bias=bias, out_bias=bias, qk_norm=True, tied=False)
    return _windowed(f, config, default=False)


def _gemma(f: Fields) -> TransformerConfig:
    # Gemma's first configuration files said "gelu" where the code ran the tanh form.
    activation = f.text("hidden_activation", default="gelu_pytorch_tanh")
    return _common(f, activation=activation, norm="gemma", embed_scale=True, tied=True)


def _gemma2(f: Fields) -> TransformerConfig:
    capped = f.get("attn_logit_softcapping") is not None
    config = replace(_gemma(f), norms=4, softcap=capped)
    return _windowed(f, config, default=True)


def _falcon(f: Fields) -> TransformerConfig:
    if f.flag("alibi", default=False):
        raise f.fail("attention with linear biases (alibi) is not covered by the closed form")
    heads = f.whole("num_attention_heads", "n_head")
    hidden = f.whole("hidden_size", "n_embed")
    newer = f.flag("new_decoder_architecture", default=False)
    if newer:
        kv_heads = f.whole("num_kv_heads", "n_head_kv", default=heads)
    else:
        kv_heads = 1 if f.flag("multi_query", default=True) else heads
    parallel = newer or f.flag("parallel_attn", default=True)
    split_norms = newer and f.whole("num_ln_in_parallel_attn", default=2) == 2
    bias = f.flag("bias", default=False)
    return _common(
        f, hidden=hidden, kv_heads=kv_heads, ffn=f.whole("ffn_hidden_size", default=4 * hidden),
        activation=f.text("activation", default="gelu"), gated=False, norm="layer", norm_bias=True,
        norms=1 if parallel and not split_norms else 2, parallel=parallel, fused_qkv=True,
        qkv_bias=bias, out_bias=bias, mlp_bias=bias, tied=True,
    )  # fmt: skip


def _opt(f: Fields) -> TransformerConfig:
    bias = f.flag("enable_bias", default=True)
    if not f.flag("do_layer_norm_before", default=True):
        raise f.fail("norms after the residual (do_layer_norm_before false) are not covered")
    hidden = f.whole("hidden_size")
    embed = f.whole("word_embed_proj_dim", default=hidden)
    rows = f.whole("max_position_embeddings", default=2048)
    return _common(
        f, ffn=f.whole("ffn_dim", "intermediate_size"), gated=False, norm="layer",
        activation=f.text("activation_function", default="relu"), norm_bias=True, qkv_bias=bias,
        out_bias=bias, mlp_bias=bias, positions="learned", position_rows=rows + 2,
        embed_dim=embed if embed != hidden else 0, query_scale=True, tied=True,
    )  # fmt: skip


def _gpt2(f: Fields) -> TransformerConfig:
    hidden = f.whole("n_embd", "hidden_size")
    rows = f.whole("n_positions", "n_ctx", "max_position_embeddings", default=1024)
    return _common(
        f, hidden=hidden, ffn=f.whole("n_inner", default=4 * hidden), gated=False, norm="layer",
        activation=f.text("activation_function", default="gelu_new"), norm_bias=True,
        fused_qkv=True, qkv_bias=True, out_bias=True, mlp_bias=True, positions="learned",
        position_rows=rows, tied=True,
    )  # fmt: skip


def _gpt_neox(f: Fields) -> TransformerConfig:
    bias = f.flag("attention_bias", default=True)
    return _common(
        f, gated=False, norm="layer", activation=f.text("hidden_act", default="gelu"),
        norm_bias=True, parallel=f.flag("use_parallel_residual", default=True), fused_qkv=True,
        qkv_bias=bias, out_bias=bias, mlp_bias=True,
        rotary=f.share("partial_rotary_factor", f.share("rotary_pct", 0.25)), tied=False,
    )  # fmt: skip


def _phi(f: Fields) -> TransformerConfig:
    return _common(
        f, gated=False, norm="layer", activation=f.text("hidden_act", default="gelu_new"),
        norm_bias=True, norms=1, parallel=True, qkv_bias=True, out_bias=True, mlp_bias=True,
        head_bias=True, rotary=f.share("partial_rotary_factor", 0.5), tied=False,
    )  # fmt: skip


def _phi3(f: Fields) -> TransformerConfig:
    config = _common(
        f, fused_qkv=True, fused_gate_up=True, rotary=f.share("partial_rotary_factor", 1.0),
        tied=False,
    )  # fmt: skip
    return _windowed(f, config, default=True)


def _starcoder2(f: Fields) -> TransformerConfig:
    bias = f.flag("use_bias", default=True)
    config = _common(
        f, gated=False, norm="layer", activation=f.text("hidden_act", default="gelu_pytorch_tanh"),
        norm_bias=True, qkv_bias=bias, out_bias=bias, mlp_bias=bias, tied=True,
    )  # fmt: skip
    return _windowed(f, config, default=True)


def _experts(f: Fields, config: TransformerConfig, width: int) -> TransformerConfig:
    experts = f.whole("num_local_experts", "num_experts")
    chosen = f.whole("num_experts_per_tok")
    if chosen > experts:
        raise f.fail(f"{chosen} experts a token out of {experts}")
    plain = f.get("mlp_only_layers") or []
    step = f.whole("decoder_sparse_step", default=1)
    if not isinstance(plain, list):
        raise f.fail("field 'mlp_only_layers' must be a list of layer numbers")
    dense = sum(i in plain or (i + 1) % step != 0 for i in range(min(config.layers, 10_000)))
    return replace(
        config, experts=experts, experts_per_token=chosen, expert_ffn=width, dense_layers=dense,
        shared_ffn=f.whole("shared_expert_intermediate_size", default=0, least=0),
    )  # fmt: skip


def _mixtral(f: Fields) -> TransformerConfig:
    return _experts(f, _mistral(f), f.whole("intermediate_size"))


def _qwen2_moe(f: Fields) -> TransformerConfig:
    return _experts(f, _qwen2(f), f.whole("moe_intermediate_size"))


def _qwen3_moe(f: Fields) -> TransformerConfig:
    return _experts(f, _qwen3(f), f.whole("moe_intermediate_size"))


FAMILIES: Mapping[str, Callable[[Fields], TransformerConfig]] = {
    "llama": _llama, "internlm": _llama, "internlm2": _llama, "mistral": _mistral,
    "mixtral": _mixtral, "qwen2": _qwen2, "qwen2_moe": _qwen2_moe, "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe, "gemma": _gemma, "gemma2": _gemma2, "falcon": _falcon,
    "RefinedWeb": _falcon, "RefinedWebModel": _falcon, "opt": _opt, "gpt2": _gpt2,
    "gpt_neox": _gpt_neox, "phi": _phi, "phi3": _phi3, "starcoder2": _starcoder2,
}  # fmt: skip
"""Readers by `model_type`."""


def read(raw: Mapping[str, Any], name: str = "") -> TransformerConfig:
    """The shape behind the fields of a config.json; see TransformerConfig.from_json."""
    inner = raw.get("text_config")
    if isinstance(inner, Mapping) and "hidden_size" not in raw:
        raw = {**inner, "model_type": inner.get("model_type", raw.get("model_type"))}
    given = raw.get("model_type")
    if not isinstance(given, str) or not given:
        raise NarrowsError(
            f"model {name or 'configuration'!r}: field 'model_type' is missing; "
            "is this a Hugging Face config.json?"
        )
    if given not in FAMILIES:
        raise unknown(
            "closed form for the model type", given, FAMILIES,
            f"covered are {', '.join(FAMILIES)}; other models can be traced from their module",
        )  # fmt: skip
    return FAMILIES[given](Fields(raw, name or given))
