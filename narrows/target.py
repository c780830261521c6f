"""What a MODEL argument names: the reference, a catalogue shape, a directory, or a factory."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrows.core.errors import NarrowsError

if TYPE_CHECKING:
    from narrows.trace.config import TransformerConfig

REFERENCE = "reference"


@dataclass(frozen=True)
class Target:
    """A resolved MODEL.

    config: set for transformers (reference, catalogue, directory or config.json). path: the
    directory whose weights can be loaded, where there is one. factory: returns a module, or
    (module, inputs), for any other network.
    """

    name: str
    config: TransformerConfig | None = None
    path: Path | None = None
    factory: Callable[[], Any] | None = None

    @property
    def runnable(self) -> bool:
        """Whether weights are at hand, so that the model can be run and not only priced."""
        return self.path is not None and any(self.path.glob("*.safetensors"))

    @property
    def dtype(self) -> str:
        """The number format to price in when none is given."""
        return "fp32" if self.name == REFERENCE else "bf16"


def reference_path() -> Path:
    """The directory of the reference model, recall-lm."""
    from narrows.models.recall_lm import WEIGHTS

    return WEIGHTS


def resolve(model: str) -> Target:
    """Find out what MODEL names.

    Raises NarrowsError for a name that is neither `reference`, a catalogue shape, a Hugging Face
    directory, a `config.json`, nor `file.py:factory`.
    """
    from narrows.trace.config import TransformerConfig, shape

    if model == REFERENCE:
        path = reference_path()
        return Target(REFERENCE, TransformerConfig.from_json(path, "recall-lm"), path)
    file, colon, factory = model.rpartition(":")
    if colon and file.endswith(".py"):
        return Target(model, factory=_factory(Path(file), factory))
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise NarrowsError(
                f"{model} is a directory without config.json; give a Hugging Face model directory"
            )
        return Target(path.resolve().name, TransformerConfig.from_json(path), path)
    if path.suffix == ".json":
        if not path.is_file():
            raise NarrowsError(f"no file {model}; give a config.json of a transformer")
        return Target(path.parent.resolve().name or path.stem, TransformerConfig.from_json(path))
    if path.suffix == ".py":
        raise NarrowsError(f"{model} needs the factory's name too: {model}:FUNCTION")
    return Target(model, shape(model))


def _factory(file: Path, name: str) -> Callable[[], Any]:
    """The callable NAME of a Python file of the user's."""
    if not file.is_file():
        raise NarrowsError(f"no file {file}; give file.py:factory")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise NarrowsError(f"{file} cannot be imported as a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise NarrowsError(
            f"{file} could not be imported: {type(error).__name__}: {error}"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise NarrowsError(f"{file} has no function {name!r}; it must return (module, inputs)")
    return found


def build(target: Target) -> tuple[Any, Any]:
    """Call a factory: (module, inputs), inputs as Workload.of takes them."""
    assert target.factory is not None
    try:
        made = target.factory()
    except Exception as error:
        raise NarrowsError(
            f"{target.name} raised {type(error).__name__}: {error}; it must return (module, inputs)"
        ) from error
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0])):
        raise NarrowsError(f"{target.name} must return (module, inputs), not {type(made).__name__}")
    return made


def read_json(path: Path) -> Any:
    """A JSON file, or a NarrowsError that names it."""
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise NarrowsError(f"{path} is not readable JSON: {error}") from error
