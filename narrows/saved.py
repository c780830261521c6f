"""Models saved with a technique: `narrows apply --save DIR`, and `narrows.load(DIR)`."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import narrows
from narrows.core.errors import NarrowsError
from narrows.core.method import Applied
from narrows.door import Progress, spelled, technique
from narrows.target import read_json, resolve

FORMAT = 2
RECORD = "narrows.json"
MODEL_FILES = ("*.json", "*.safetensors", "tokenizer*", "*.model", "merges.txt", "vocab.*")


def save(model: str, key: str, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Write MODEL with a technique into a new directory that `load` opens.

    The model's files are stored as they are, the technique's settings beside them, after one short
    generation has shown that the two go together. The directory appears whole or not at all.
    Returns the record.
    """
    chosen = technique(key)
    target = resolve(model)
    if not target.runnable or target.path is None:
        raise NarrowsError(
            f"{model} is a shape without weights; apply takes 'reference' or a directory that "
            "holds config.json and .safetensors files"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise NarrowsError(f"{folder} exists already; --save takes a new directory")
    folder.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "format": FORMAT, "model": target.name, "technique": spelled(chosen, whole=True),
        "narrows": narrows.__version__,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".narrows-") as holder:
        made = Path(holder) / "model"
        made.mkdir()
        if progress:
            progress(0.1, "copying the model")
        for pattern in MODEL_FILES:
            for file in target.path.glob(pattern):
                if not (made / file.name).exists():
                    shutil.copyfile(file, made / file.name)
        (made / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        if progress:
            progress(0.5, f"trying {chosen.key} on it")
        with load(made) as applied:
            _try(applied.model)
        if folder.exists():
            folder.rmdir()
        made.rename(folder)
    return record


def _try(model: Any) -> None:
    """One short generation, so that a model the technique cannot take fails before it is saved."""
    import torch

    ids = torch.arange(1, 9, device=model.device).unsqueeze(0) % model.config.vocab_size
    model.generate(ids, max_new_tokens=2, do_sample=False)


@contextmanager
def load(folder: str | Path, **options: Any) -> Iterator[Applied]:
    """Open a directory written by `narrows apply --save`: the model with its technique at work.

    options: for transformers' from_pretrained (dtype, device_map, ...).
    """
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        raise NarrowsError(f"{folder} has no {RECORD}; it was not written by narrows apply --save")
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise NarrowsError(f"{folder / RECORD} is not of format {FORMAT}; save it again")
    chosen = technique(str(record.get("technique")))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with chosen.apply(model) as applied:
        yield applied
