"""The network and its tokenizer: made, grown, saved, loaded (torch is imported inside)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from narrows.core.errors import NarrowsError

from .recipe import Shape

END_OF_TEXT = "<|endoftext|>"
OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def make_tokenizer(texts, vocabulary: int):
    """A byte-level BPE of ``vocabulary`` tokens trained on ``texts``; digits stay single."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END_OF_TEXT],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(shape: Shape, layers: int, seed: int) -> Any:
    """A fresh ``LlamaForCausalLM`` of ``shape`` with ``layers`` blocks, fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def grow(model: Any, shape: Shape, layers: int, seed: int) -> Any:
    """A copy of ``model`` with ``layers`` blocks that computes the same function.

    The old blocks stay lowest, in order; each new block's two output projections are zero, so it
    adds nothing to the residual stream until it is trained.
    """
    import torch

    old = model.config.num_hidden_layers
    if layers < old:
        raise NarrowsError(
            f"the network has {old} blocks and was asked to grow to {layers}: "
            f"ask for {old} or more."
        )
    grown = make_model(shape, layers, seed)
    missing = grown.load_state_dict(model.state_dict(), strict=False)
    if missing.unexpected_keys:
        raise NarrowsError(
            f"the network has weights the shape lacks: {missing.unexpected_keys[:3]}."
        )
    with torch.no_grad():
        for name, weight in grown.named_parameters():
            if name.endswith(OUTPUTS) and int(name.split(".")[2]) >= old:
                weight.zero_()
    return grown


def load(folder: str | Path, dtype=None):
    """``(model, tokenizer)`` of a saved directory; ``dtype`` None means float32."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(
        folder, dtype=dtype or torch.float32, local_files_only=True
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def save(model, tokenizer, folder: str | Path, dtype=None) -> None:
    """Write an ordinary ``LlamaForCausalLM`` directory; ``dtype`` None means bfloat16."""
    import copy

    import torch

    copy.deepcopy(model).to(dtype or torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = Path(folder) / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    for key in ("is_local", "local_files_only", "model_max_length"):
        settings.pop(key, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(settings, indent=2) + "\n")
