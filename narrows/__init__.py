"""narrows finds what limits a learning system, and relieves it.

    case(model, machine, ...)   what you ask about
    bound(case)                 the narrowest resource, and the distance from its limit
    find(case)                  published techniques ranked by what they would gain here
    apply(model, technique)     the technique itself, on your model
    load(folder)                a model that `narrows apply --save` wrote, technique at work

Nothing heavy is imported until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from narrows.core.bound import bound
    from narrows.door import apply, case, find
    from narrows.saved import load

_DOOR = {
    "case": "narrows.door:case",
    "find": "narrows.door:find",
    "apply": "narrows.door:apply",
    "load": "narrows.saved:load",
    "bound": "narrows.core.bound:bound",
}

__all__ = ["__version__", "apply", "bound", "case", "find", "load"]


def __getattr__(name: str) -> Any:
    if name not in _DOOR:
        raise AttributeError(f"module 'narrows' has no attribute {name!r}")
    from importlib import import_module

    module, _, attribute = _DOOR[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
