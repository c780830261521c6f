"""recall-lm: a small Llama that recalls, so that quality figures of cache methods mean something.

``load()`` gives the shipped model and tokenizer; `tasks` makes prompts, `evaluate` judges answers
and perplexity (also through a given cache), `recipe` and `train` are how it was made.
"""

from __future__ import annotations

from pathlib import Path

from narrows.core.errors import NarrowsError

WEIGHTS = Path(__file__).parent / "weights"


def load(dtype=None, folder: str | Path = WEIGHTS):
    """``(model, tokenizer)``: a `LlamaForCausalLM` in eval mode and its tokenizer.

    ``dtype`` is a torch dtype (None: float32, into which the bfloat16 file is widened exactly).
    """
    if not (Path(folder) / "config.json").is_file():
        raise NarrowsError(
            f"{folder} holds no recall-lm (no config.json): train one with "
            "`python -m narrows.models.recall_lm.train --out DIR`."
        )
    from .network import load as load_directory

    return load_directory(folder, dtype)
