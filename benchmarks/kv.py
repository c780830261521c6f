"""A decode step with SnapKV beside dense caches, predicted before it is measured.

    python -m benchmarks.kv [--batch 8] [--prompt 8192] [--share 8] [--repeats 31] [--device cuda]

recall-lm in fp32 on this machine, or its GPU. `dense, in place` shares its attention with SnapKV
and is the one to beat: transformers' DynamicCache copies the whole cache at every step, its
StaticCache masks and repeats it. All take turns in one run.
"""

from __future__ import annotations

import argparse
from time import perf_counter
from typing import Any

from narrows.measure.timing import Timings, interleave, passive_openmp

passive_openmp()

DENSE, OURS = "dense, in place", "snapkv"


def reference() -> tuple[Any, str]:
    """The reference model, or its shape with random weights: the speed is the same."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from narrows.target import reference_path

    if (reference_path() / "model.safetensors").is_file():
        model = LlamaForCausalLM.from_pretrained(reference_path(), dtype=torch.float32)
        return model.eval(), "recall-lm"
    config = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=688, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=8192,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), "recall-lm's shape with random weights"


def predicted(
    model: Any, batch: int, prompt: int, steps: int, technique: Any, machine: str
) -> tuple[dict[str, float], str]:
    """Seconds of a decode step by the bound on this machine, and how far to trust them."""
    import narrows
    from narrows.trace.config import TransformerConfig
    from narrows.trace.llm import llm

    config = TransformerConfig.from_json(model.config.to_dict())
    work = llm(config, prompt, steps, batch, dtype="fp32")
    case = narrows.case(work, machine)
    dense, ours = case.bound(), case.with_(technique).bound()
    seconds = {DENSE: dense.phase("decode").seconds, OURS: ours.phase("decode").seconds}
    return {name: s / steps for name, s in seconds.items()}, dense.trust


def filled(model: Any, ids: Any, technique: Any, steps: int) -> tuple[dict[str, Any], dict]:
    """Caches that hold the prompt, and seconds of prefill. Ours read it; the others are copies."""
    import torch
    from transformers import DynamicCache, StaticCache

    from narrows.kv.adapter import ATTENTION, KVCache

    model.set_attn_implementation(ATTENTION)
    caches: dict[str, Any] = {
        DENSE: KVCache(model.config),
        OURS: technique.cache(model.config),
        "transformers DynamicCache": DynamicCache(config=model.config),
        "transformers StaticCache": StaticCache(model.config, max_cache_len=ids.shape[1] + steps),
    }
    prefill: dict[str, float] = {}
    with torch.inference_mode():
        for name in (DENSE, OURS):
            begin = perf_counter()
            model(ids, past_key_values=caches[name], use_cache=True, logits_to_keep=1)
            if ids.is_cuda:
                torch.cuda.synchronize()
            prefill[name] = perf_counter() - begin
        for name in list(caches)[2:]:
            for i, layer in enumerate(caches[DENSE].layers):
                caches[name].update(layer.keys, layer.values, i)
    return caches, prefill


def measured(model: Any, ids: Any, caches: dict[str, Any], repeats: int, device: str) -> Timings:
    """Decode steps through each cache in turn; each step appends a token."""
    import torch

    token = ids[:, :1]

    def step(cache: Any) -> Any:
        return lambda: model(token, past_key_values=cache, use_cache=True)

    with torch.inference_mode():
        steps = {name: step(cache) for name, cache in caches.items()}
        return interleave(steps, repeats, device=device)


def held(cache: Any) -> int:
    """Bytes of keys and values that a cache holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def main() -> None:
    """Predict, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--share", type=int, default=8, help="keep one in so many tokens")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    import torch

    from narrows.kv.snapkv import SnapKV

    technique = SnapKV(capacity=options.prompt // options.share)
    model, what = reference()
    model = model.to(options.device)
    machine = "here" if options.device == "cpu" else "here-gpu"
    steps = options.repeats + 8
    print(f"{what}, fp32, {options.batch} x {options.prompt} tokens, "
          f"{technique.capacity} kept, {torch.get_num_threads()} threads")  # fmt: skip
    told, trust = predicted(model, options.batch, options.prompt, steps, technique, machine)
    hoped = told[DENSE] / told[OURS]
    print(f"predicted: dense {told[DENSE] * 1e3:.2f} ms, snapkv {told[OURS] * 1e3:.2f} ms a step, "
          f"{hoped:.2f}x ({trust})")  # fmt: skip
    ids = torch.randint(3, 1024, (options.batch, options.prompt), device=options.device)
    caches, prefill = filled(model, ids, technique, steps)
    print(f"prefill: dense {prefill[DENSE]:.1f} s, snapkv {prefill[OURS]:.1f} s (once each)")
    timings = measured(model, ids, caches, options.repeats, options.device)
    print(f"{'':28}{'ms a step':>10}{'spread':>8}{'dense over it':>22}{'cache MB':>10}")
    for name, cache in caches.items():
        ratio = timings.speedup(name, over=DENSE)
        print(
            f"{name:28}{timings[name].median * 1e3:10.2f}{timings[name].spread:8.0%}"
            f"{ratio.median:10.2f} [{ratio.low:.2f}, {ratio.high:.2f}]{held(cache) / 1e6:10.1f}"
        )
    got = timings.speedup(OURS, over=DENSE)
    print(
        f"measured over predicted: dense {timings[DENSE].median / told[DENSE]:.2f}, "
        f"snapkv {timings[OURS].median / told[OURS]:.2f}, speed-up {got.median / hoped:.2f}"
    )
    noise = "" if got.quiet else f" (noisy: ratios spread {got.spread:.0%})"
    print(f"reached {(got.median - 1) / (hoped - 1):.0%} of the predicted gain{noise}")


if __name__ == "__main__":
    main()
