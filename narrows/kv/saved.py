"""Caches on disk: a prompt read once, gone on from later, by the same model and technique.

A file is safetensors: the tensors of each layer, and a header that says which version of the
format, which model and which technique it belongs to. What does not belong is refused before
anything is changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrows.core.errors import NarrowsError

if TYPE_CHECKING:
    from narrows.kv._base import Policy

FORMAT = "narrows-cache-1"


def save(cache: Any, path: str | os.PathLike[str], model: Any, technique: Policy | None) -> None:
    """Write a cache of ours, whole or not at all.

    model: whose keys and values they are. technique: under which it was filled, None: dense.
    """
    from safetensors.torch import save_file

    from narrows.kv.adapter import KVLayer

    header = {"format": FORMAT, "model": fingerprint(model), "technique": spelled(technique)}
    tensors: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, KVLayer):
            raise NarrowsError(
                f"layer {i} of this cache is transformers' own {type(layer).__name__}, which "
                "cannot be saved"
            )
        for name, x in layer.store.state().items():
            if isinstance(x, int):
                counts[f"{i}.{name}"] = x
            else:
                tensors[f"{i}.{name}"] = x.detach().cpu().contiguous().clone()
    header |= {"counts": json.dumps(counts), "layers": str(len(cache.layers))}
    path = Path(path)
    try:
        with tempfile.TemporaryDirectory(prefix=path.name, dir=path.parent) as folder:
            save_file(tensors, Path(folder) / path.name, metadata=header)
            os.replace(Path(folder) / path.name, path)
    except OSError as error:
        raise NarrowsError(f"{path} could not be written: {error.strerror or error}") from error


def restore(path: str | os.PathLike[str], model: Any, technique: Policy | None) -> Any:
    """The cache that was saved, to pass as `past_key_values`.

    Raises NarrowsError for a file of another version, model or technique, and for one cut short.
    """
    from safetensors import SafetensorError, safe_open

    from narrows.kv.adapter import KVCache, KVLayer

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise NarrowsError(f"there is no saved cache at {path}") from error
    except (SafetensorError, OSError) as error:
        raise NarrowsError(f"{path} is not a whole saved cache (cut short?): {error}") from error
    if header.get("format") != FORMAT:
        raise NarrowsError(
            f"{path} is of the format {header.get('format')!r}, this version reads {FORMAT!r}; "
            "read the prompt again"
        )
    for name, mine, of in (
        ("model", fingerprint(model), "another model"),
        ("technique", spelled(technique), "another technique or other settings"),
    ):
        if header.get(name) != mine:
            raise NarrowsError(
                f"{path} was saved by {of}: it says {header.get(name)}, here it is {mine}"
            )
    cache = KVCache(model.config, technique)
    counts = json.loads(header["counts"])
    for i, layer in enumerate(cache.layers):
        assert isinstance(layer, KVLayer)
        start = f"{i}."
        found = {**counts, **tensors}
        layer.store.restore(
            {
                n.removeprefix(start): _placed(x, model)
                for n, x in found.items()
                if n.startswith(start)
            }
        )
    return cache


def fingerprint(model: Any) -> str:
    """What tells models apart: shape and a digest of some weights of every layer."""
    told = hashlib.sha256(
        json.dumps(
            {k: v for k, v in model.config.to_dict().items() if not k.startswith(("_", "torch"))
             and k not in ("transformers_version", "use_cache", "attn_implementation", "dtype")},
            sort_keys=True, default=str,
        ).encode()
    )  # fmt: skip
    for name, weight in model.named_parameters():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            told.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return f"{model.config.model_type}-{told.hexdigest()[:16]}"


def spelled(technique: Policy | None) -> str:
    """A technique and its settings in one line."""
    if technique is None:
        return "dense"
    told: dict[str, Any] = {}
    for name, x in sorted(vars(technique).items()):
        if hasattr(x, "on_prefill_end"):
            told[name] = spelled(x)
        elif not name.startswith("_") and isinstance(x, int | float | str | type(None)):
            told[name] = x
    return f"{type(technique).__name__}({', '.join(f'{n}={x}' for n, x in told.items())})"


def _placed(x: Any, model: Any) -> Any:
    return x.to(model.device) if hasattr(x, "to") else x
