"""Configurations of any kind are read or refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from narrows.core.errors import NarrowsError
from narrows.trace.config import TransformerConfig, published, shapes
from narrows.trace.families import FAMILIES, LARGEST

FIELDS = sorted({key for name in shapes() for key in published(name)} | {
    "n_inner", "n_head_kv", "num_local_experts", "mlp_only_layers", "decoder_sparse_step",
    "layer_types", "use_bias", "attention_bias", "enable_bias", "rope_parameters", "text_config",
    "shared_expert_intermediate_size", "ffn_hidden_size", "max_window_layers", "hidden_act",
    "sliding_window_pattern", "num_ln_in_parallel_attn", "hidden_activation", "use_sliding_window",
})  # fmt: skip

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner,
                                                                max_size=3),
    max_leaves=5,
)  # fmt: skip

SANE = st.integers(1, 64) | ANYTHING

# What is tested is the result, not how long a busy machine takes for it.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def read(source: object) -> TransformerConfig | None:
    """The configuration, or nothing where it was refused; any other failure is a failure."""
    said = ""
    try:
        config = TransformerConfig.from_json(source)  # type: ignore[arg-type]
    except NarrowsError as error:
        config, said = None, str(error)
    if config is None:
        assert "\n" not in said
        assert len(said) > 20
        return None
    sizes = (config.layers, config.hidden, config.heads, config.kv_heads, config.head_dim,
             config.ffn, config.vocab)  # fmt: skip
    assert all(1 <= n <= 4 * LARGEST for n in sizes)
    assert 0 <= config.windowed_layers <= config.layers
    assert config.heads % config.kv_heads == 0
    assert config.parameters > 0
    return config


@PATIENT
@given(st.sampled_from(sorted(FAMILIES)), st.dictionaries(st.sampled_from(FIELDS), SANE))
def test_any_fields(family: str, fields: dict[str, object]):
    read({**fields, "model_type": family})


@PATIENT
@given(st.sampled_from(shapes()), st.sampled_from(FIELDS), ANYTHING)
def test_one_field_spoilt(name: str, field: str, value: object):
    read({**published(name), field: value})


@PATIENT
@given(st.dictionaries(st.text(max_size=8), ANYTHING))
def test_any_mapping(fields: dict[str, object]):
    read(fields)


@PATIENT
@given(st.binary(max_size=200) | ANYTHING.map(lambda v: json.dumps(v).encode()))
def test_any_file(content: bytes):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_bytes(content)
        read(path)
        read(folder)


@pytest.mark.parametrize("name", shapes())
def test_a_published_configuration_reads_the_same_from_a_file(name: str, tmp_path: Path):
    fields = {k: v for k, v in published(name).items() if k != "source"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert read(tmp_path) == TransformerConfig.from_json(published(name), tmp_path.name)


def test_a_missing_or_odd_file(tmp_path: Path):
    assert read(tmp_path / "nowhere.json") is None
    assert read(tmp_path) is None
    (tmp_path / "config.json").mkdir()
    assert read(tmp_path) is None


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("num_hidden_layers", 0, "whole number from 1"),
        ("num_hidden_layers", True, "whole number"),
        ("num_hidden_layers", 2.0, "whole number"),
        ("hidden_size", 10**30, "whole number"),
        ("num_key_value_heads", 5, "do not divide"),
        ("hidden_size", 4097, "do not divide the hidden size"),
        ("hidden_act", 3, "must be a word"),
        ("tie_word_embeddings", "yes", "true or false"),
        ("model_type", "deepseek_v3", "can be traced from their module"),
        ("vocab_size", None, "missing"),
    ],
)
def test_what_is_said(field: str, value: object, says: str):
    with pytest.raises(NarrowsError, match=says):
        TransformerConfig.from_json({**published("llama-2-7b"), field: value}, "llama-2-7b")


def test_words_of_other_families():
    gpt2 = TransformerConfig.from_json(published("gpt2"), "gpt2")
    assert (gpt2.layers, gpt2.hidden, gpt2.heads, gpt2.ffn) == (12, 768, 12, 3072)
    falcon = TransformerConfig.from_json(published("falcon-7b"), "f")
    assert (falcon.kv_heads, falcon.norms, falcon.parallel, falcon.tied) == (1, 1, True, True)
    newer = TransformerConfig.from_json(published("falcon-40b"), "f")
    assert (newer.kv_heads, newer.norms) == (8, 2)
    gemma = TransformerConfig.from_json(published("gemma-2-9b"), "g")
    assert (gemma.head_dim, gemma.windowed_layers, gemma.window, gemma.norms) == (256, 21, 4096, 4)
    assert TransformerConfig.from_json(published("qwen2-7b"), "q").window == 0
    assert TransformerConfig.from_json(published("mistral-7b"), "m").windowed_layers == 32
    wrapped = {"model_type": "shell", "text_config": dict(published("gemma-2-9b"))}
    assert TransformerConfig.from_json(wrapped, "g") == gemma
