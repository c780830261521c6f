"""A decode step with cache techniques beside dense and packed ones, predicted, then measured.

    python -m benchmarks.kv [--with KEY[:name=value,...]]... [--batch 8] [--prompt 8192]
                            [--repeats 31] [--device cuda]

Techniques and stacks as `narrows apply` takes them; an eighth by SnapKV, KIVI, and the stack of
the two where none are named. recall-lm in fp32 on this machine, or its GPU. `dense, in place`
shares its attention with ours and is the one to beat: transformers' DynamicCache copies the whole
cache at every step, its StaticCache masks and repeats it, its QuantizedCache (with the hqq package:
pip install 'narrows[bench]') unpacks all of it. All take turns in one run.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib.util import find_spec
from time import perf_counter
from typing import Any

from narrows.measure.timing import Timings, interleave, passive_openmp

passive_openmp()

DENSE = "dense, in place"
WORTH = 1.05
"""Least predicted gain of which the share that was reached says anything."""


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
    model: Any, batch: int, prompt: int, steps: int, techniques: Mapping[str, Any], machine: str
) -> tuple[dict[str, float], str]:
    """Seconds of a decode step by the bound on this machine, and how far to trust them."""
    import narrows
    from narrows.trace.config import TransformerConfig
    from narrows.trace.llm import llm

    config = TransformerConfig.from_json(model.config.to_dict())
    case = narrows.case(llm(config, prompt, steps, batch, dtype="fp32"), machine)
    dense = case.bound()
    bounds = {DENSE: dense} | {n: case.with_(t).bound() for n, t in techniques.items()}
    return {n: b.phase("decode").seconds / steps for n, b in bounds.items()}, dense.trust


def filled(
    model: Any, ids: Any, techniques: Mapping[str, Any], steps: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """Caches that hold the prompt, and seconds of prefill. Ours read it; the others are copies."""
    import torch

    from narrows.kv.adapter import ATTENTION, KVCache

    model.set_attn_implementation(ATTENTION)
    caches: dict[str, Any] = {DENSE: KVCache(model.config)}
    caches |= {
        name: technique.of(model).cache(model.config) for name, technique in techniques.items()
    }
    prefill: dict[str, float] = {}
    with torch.inference_mode():
        for name, cache in caches.items():
            begin = perf_counter()
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            if ids.is_cuda:
                torch.cuda.synchronize()
            prefill[name] = perf_counter() - begin
        dense = caches[DENSE].layers
        for name, cache in transformers_own(model, ids.shape[1] + steps).items():
            caches[name] = cache
            for i, layer in enumerate(dense):
                cache.update(layer.keys, layer.values, i)
    return caches, prefill


def transformers_own(model: Any, length: int) -> dict[str, Any]:
    """Empty caches of transformers to compare with; what is not installed is said."""
    from transformers import DynamicCache, QuantizedCache, StaticCache

    found: dict[str, Any] = {
        "DynamicCache": DynamicCache(config=model.config),
        "StaticCache": StaticCache(model.config, max_cache_len=length),
    }
    if find_spec("hqq") is None:
        print("QuantizedCache is left out: hqq is not installed (pip install 'narrows[bench]')")
    else:
        # keys by channel, values by token, as KIVI has them; its defaults have both by token
        found["QuantizedCache hqq"] = QuantizedCache(
            "hqq", model.config, nbits=2, axis_key=0, axis_value=1, q_group_size=32,
            residual_length=128,
        )  # fmt: skip
    return found


def measured(model: Any, ids: Any, caches: dict[str, Any], repeats: int, device: str) -> Timings:
    """Decode steps through each cache in turn; each step appends a token."""
    import torch

    token = ids[:, :1]

    def step(cache: Any) -> Any:
        return lambda: model(token, past_key_values=cache, use_cache=True)

    with torch.inference_mode():
        steps = {name: step(cache) for name, cache in caches.items()}
        return interleave(steps, repeats, device=device)


def held(cache: Any) -> float | None:
    """Megabytes of keys and values that a cache holds; None where it does not tell."""
    from narrows.kv.adapter import nbytes, stores

    if stores(cache):
        return nbytes(cache) / 1e6
    if any(hasattr(layer, "_quantized_keys") for layer in cache.layers):
        return None
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 1e6


def main() -> None:
    """Predict, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--with", dest="techniques", action="append", metavar="KEY")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    import torch

    from narrows.door import technique

    eighth = f"snapkv:capacity={options.prompt // 8}"
    named = options.techniques or [eighth, "kivi", f"{eighth}+kivi"]
    techniques = {text: technique(text) for text in named}
    model, what = reference()
    model = model.to(options.device)
    machine = "here" if options.device == "cpu" else "here-gpu"
    steps = options.repeats + 8
    told, trust = predicted(model, options.batch, options.prompt, steps, techniques, machine)
    print(f"{what}, fp32, {options.batch} x {options.prompt} tokens, "
          f"{torch.get_num_threads()} threads; predictions: {trust}", flush=True)  # fmt: skip
    ids = torch.randint(3, 1024, (options.batch, options.prompt), device=options.device)
    caches, prefill = filled(model, ids, techniques, steps)
    print("prefill, once each: " + ", ".join(f"{n} {s:.1f} s" for n, s in prefill.items()))
    timings = measured(model, ids, caches, options.repeats, options.device)
    wide = max(map(len, caches))
    print(f"{'':{wide}}{'ms a step':>11}{'spread':>8}{'times as fast as dense':>24}"
          f"{'predicted':>11}{'of the gain':>13}{'cache MB':>10}")  # fmt: skip
    for name, cache in caches.items():
        ratio = timings.speedup(name, over=DENSE)
        hoped = told[DENSE] / told[name] if name in told else 0.0
        reached = f"{(ratio.median - 1) / (hoped - 1):.0%}" if hoped > WORTH else ""
        megabytes = held(cache)
        print(
            f"{name:{wide}}{timings[name].median * 1e3:11.2f}{timings[name].spread:8.0%}"
            f"{ratio.median:10.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
            f"{f'{hoped:.2f}' if hoped else '':>11}{reached:>13}"
            f"{'' if megabytes is None else f'{megabytes:.1f}':>10}"
            + ("" if ratio.quiet or name == DENSE else "  noisy")
        )
    print(f"dense: measured over predicted {timings[DENSE].median / told[DENSE]:.2f}")


if __name__ == "__main__":
    main()
