"""A start from which recall forms at once: the content lookup, drafted by hand, then trained.

A two-block net must find three things together before its loss moves: heads that look one and two
tokens back, a match of the present tokens with those, and a way to write out what follows the match
(Olsson et al. 2022, "In-context Learning and Induction Heads"). From an ordinary random start this
net had not found them after 1.6 M tokens. So, as mimetic initialisation does (Trockman and Kolter
2023), the start already has that shape, roughly; every weight is then trained as usual.
"""

from __future__ import annotations

from narrows.core.errors import NarrowsError

OFFSET_PAIRS = 8
SLOW_FROM_PAIR = 18
SHARPNESS = 30.0
MATCH = 8.0


def draft_lookup(model, seed: int) -> None:
    """Rewrite the first two blocks of a fresh ``LlamaForCausalLM`` in place.

    Embeddings get one common direction (heads that look by position need something constant to
    attend with). Block 0, heads 0 and 1: one and two tokens back, by the fast rotary pairs; each
    writes a signature of what it saw. Block 1, the first query head of each KV head: keys are the
    signatures of the two tokens before, queries those of the present token and the one before, on
    the slow rotary pairs so that distance hardly counts; the output is the token found.
    """
    import torch

    config = model.config
    width, size = config.hidden_size, config.head_dim
    half, group = size // 2, config.num_attention_heads // config.num_key_value_heads
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    random = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=random))[0].T
    constant, own = basis[0], basis[1 : 1 + size]
    seen = [torch.linalg.qr(torch.randn(width, size, generator=random))[0] for _ in range(2)]
    if config.num_hidden_layers < 2 or group < 2 or width < 1 + config.num_key_value_heads * size:
        raise NarrowsError(
            f"{config.num_hidden_layers} blocks, {group} query heads a KV head, width {width}: the "
            "drafted lookup needs 2 blocks, groups of 2 and width above KV heads times head size."
        )
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding -= embedding.mean(0)
        embedding -= torch.outer(embedding @ constant, constant)
        embedding += constant * embedding.std() * width**0.5
        for block in model.model.layers:
            block.mlp.down_proj.weight *= 0.3

        look_back = model.model.layers[0].self_attn
        fast = (torch.arange(half) < OFFSET_PAIRS).float()
        scale = (SHARPNESS * size**0.5 / OFFSET_PAIRS) ** 0.5 / (width / 2) ** 0.5
        look_back.k_proj.weight[:size] = scale * torch.outer(torch.cat([fast, 0 * fast]), constant)
        look_back.v_proj.weight[:size] = 0.3 * own
        for head in range(2):
            turn = -(head + 1) * frequency
            query = torch.cat([fast * torch.cos(turn), fast * torch.sin(turn)])
            rows = slice(size * head, size * head + size)
            look_back.q_proj.weight[rows] = scale * torch.outer(query, constant)
            look_back.o_proj.weight[:, rows] = 0.3 * seen[head]

        match = model.model.layers[1].self_attn
        slow = torch.arange(half) >= SLOW_FROM_PAIR
        places = torch.cat([slow, slow]).nonzero()[:, 0]
        part = len(places) // 2
        for kv in range(config.num_key_value_heads):
            signature = slice(kv * part, kv * part + part)
            key, query = torch.zeros(size, width), torch.zeros(size, width)
            key[places[:part]], key[places[part:]] = seen[0].T[signature], seen[1].T[signature]
            query[places[:part]], query[places[part:]] = own[signature], seen[0].T[signature] / 3
            found = basis[1 + kv * size : 1 + kv * size + size]
            rows, head = slice(kv * size, kv * size + size), kv * group * size
            match.k_proj.weight[rows], match.v_proj.weight[rows] = MATCH**0.5 * key, found
            match.q_proj.weight[head : head + size] = MATCH**0.5 * query
            match.o_proj.weight[:, head : head + size] = 0.25 * found.T
