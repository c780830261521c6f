"""The front door: what `narrows.case`, `narrows.find` and `narrows.apply` do."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from narrows import index
from narrows.core.bound import Bound, bound
from narrows.core.case import Case
from narrows.core.errors import NarrowsError, unknown
from narrows.core.machine import Machine
from narrows.core.method import Applied, Price, Technique
from narrows.core.plan import Plan
from narrows.core.workload import Workload
from narrows.target import Target, build, resolve

SETTINGS: Mapping[str, str] = {
    "tp": "tensor-parallel degree",
    "kv_dtype": "number format of the key-value cache",
    "fusion": "eager, or a comma-separated list of flash, compiled",
}
"""What `--set key=value` may name."""

Progress = Callable[[float, str], None]
"""Called with the fraction done and what is being done."""


def machine(
    name: str | Machine = "here", *, fresh: bool = False, progress: Progress | None = None
) -> Machine:
    """A machine by catalogue name or TOML path; `here` measures this one (once, then cached)."""
    if isinstance(name, Machine):
        return name
    if name in ("here", "here-gpu"):
        from narrows.measure.here import load_or_measure

        device = "cpu" if name == "here" else "cuda"
        return load_or_measure(fresh=fresh, progress=progress, device=device)
    from narrows.machines.load import load

    return load(name)


def case(
    model: str | Workload = "reference",
    machine: str | Machine = "here",
    *,
    prompt: int = 4096,
    generate: int = 128,
    batch: int = 1,
    dtype: str | None = None,
    train: bool = False,
    settings: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Case:
    """A model, the load it gets and a machine: what you ask narrows about.

    model: `reference`, a catalogue name (`llama-3-70b`), a Hugging Face directory or
    `config.json`, `file.py:factory`, or a Workload of your own.
    prompt, generate: tokens a request. batch: requests at a time. dtype: of weights and cache.
    train: a training step of `batch` sequences of `prompt` tokens instead. settings: see SETTINGS.
    """
    chosen = _settings(settings or {})
    for what, value, least in (
        ("prompt", prompt, 0),
        ("generate", generate, 0),
        ("batch", batch, 1),
    ):
        if value < least:
            raise NarrowsError(f"{what} must be at least {least}, not {value}")
    if prompt + generate == 0:
        raise NarrowsError("prompt and generate are both 0: there is nothing to bound")
    target = None if isinstance(model, Workload) else resolve(model)
    where = globals()["machine"](machine, progress=progress)
    fusion = chosen.get("fusion", None)
    plan = Plan(
        fusion=_default_fusion(where) if fusion is None else fusion,
        parallel={"tp": chosen.get("tp", 1)},
    )
    if isinstance(model, Workload):
        return Case(model, where, plan)
    assert target is not None
    if target.config is None:
        return Case(_traced(target, train), where, plan)
    from narrows.trace.llm import llm

    work = llm(
        target.config, prompt=prompt, generate=generate, batch=batch,
        dtype=dtype or target.dtype, kv_dtype=chosen.get("kv_dtype"),
        tp=chosen.get("tp", 1), train=train,
    )  # fmt: skip
    return Case(work, where, plan)


def _default_fusion(where: Machine) -> tuple[str, ...]:
    """How models are usually run there: compiled with flash attention; eager PyTorch on a CPU."""
    return (
        ("flash",)
        if where.name.startswith("here") or where.kind == "cpu"
        else ("flash", "compiled")
    )


def _settings(given: Mapping[str, str]) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for key, value in given.items():
        if key not in SETTINGS:
            raise unknown("setting", key, SETTINGS)
        if key == "tp":
            if not value.isdecimal() or int(value) < 1:
                raise NarrowsError(f"setting tp must be a whole number from 1, not {value!r}")
            chosen[key] = int(value)
        elif key == "fusion":
            names = tuple(v for v in value.split(",") if v)
            chosen[key] = () if names == ("eager",) else names
        else:
            chosen[key] = value
    return chosen


def _traced(target: Target, train: bool) -> Workload:
    module, inputs = build(target)
    from narrows.trace.module import trace

    return trace(module, inputs, training=train, name=target.name)


@dataclass(frozen=True)
class Option:
    """What one technique would do to a case.

    gain: old over new seconds of the whole request. seconds: of the request with it. reason:
    what it does here, or why it does not help. technique: ready to apply, with its settings.
    """

    key: str
    settings: str
    gain: float
    seconds: float
    price: Price
    reason: str
    relieves: str
    bytes_held: float
    technique: Technique


def find(
    case: Case,
    techniques: Iterable[Technique] | None = None,
    progress: Progress | None = None,
) -> list[Option]:
    """Every registered technique asked to rewrite the case, ranked by gain.

    techniques: ask these instead. A technique that cannot be asked about this case (another kind
    of workload) is listed with gain 1 and its reason.
    """
    before = bound(case)
    asked = list(techniques) if techniques is not None else _registered(case)
    options: list[Option] = []
    for i, technique in enumerate(asked):
        if progress:
            progress(i / len(asked), technique.key)
        try:
            rewritten = case.with_(technique)
            after = before if rewritten is case else bound(rewritten)
            reason = technique.why(case)
        except NarrowsError as error:
            after, reason = before, str(error)
        options.append(
            Option(
                technique.key,
                _given(technique),
                before.seconds / after.seconds,
                after.seconds,
                technique.price,
                reason,
                technique.relieves,
                _held(after),
                technique,
            )
        )
    return sorted(options, key=lambda o: -o.gain)


def _held(found: Bound) -> float:
    """Bytes of the fullest memory at the worst moment."""
    return max(level.need for phase in found.phases for level in phase.levels)


def _registered(case: Case) -> list[Technique]:
    asked: list[Technique] = []
    for entry in index.built("technique"):
        found = index.load(entry.key)
        assert issubclass(found, Technique), entry.key
        asked.extend(found.variants(case))
    return asked


def parameters(method: type[Any]) -> dict[str, inspect.Parameter]:
    """The constructor's parameters: the paper's hyper-parameters."""
    return dict(list(inspect.signature(method.__init__).parameters.items())[1:])


def _given(technique: Technique, whole: bool = False) -> str:
    """Settings that differ from the defaults (or all), as `--with` takes them.

    What cannot be typed (a plan, a drive) is left out: it is given in Python.
    """
    parts: list[str] = []
    for name, parameter in parameters(type(technique)).items():
        value = getattr(technique, name, parameter.default)
        if not isinstance(value, bool | int | float | str | tuple | None):
            continue
        if whole or value != parameter.default:
            parts.append(f"{name}={_text(value)}")
    return ",".join(parts)


def spelled(technique: Technique, whole: bool = False) -> str:
    """A technique as `--with` takes it: KEY, KEY:name=value,... or two of these joined by +.

    whole: with the settings that are the defaults, too.
    """
    from narrows.kv.stack import Stack

    if isinstance(technique, Stack):
        return f"{spelled(technique.choose, whole)}+{spelled(technique.code, whole)}"
    settings = _given(technique, whole)
    return f"{technique.key}:{settings}" if settings else technique.key


def technique(text: str) -> Technique:
    """`KEY` or `KEY:name=value,...` to a ready technique; `A+B` to the stack of the two."""
    parts = re.split(r"\+(?=\s*[a-z])", text)
    if len(parts) > 1:
        return _stacked(parts)
    key, _, rest = text.partition(":")
    entry = index.get(key)
    if entry.role != "technique":
        raise NarrowsError(
            f"{key} is {entry.role}, not a technique: it cannot be applied to a model"
        )
    if not entry.target:
        built = ", ".join(e.key for e in index.built("technique"))
        raise NarrowsError(f"{key} is planned, not built yet; built today: {built}")
    found = index.load(key)
    known = parameters(found)
    given: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise NarrowsError(f"{part!r} is not name=value (settings of {key})")
        if name not in known:
            raise unknown(f"setting of {key}", name, known)
        given[name] = _value(value)
    try:
        made = found(**given)
    except TypeError as error:
        raise NarrowsError(f"{key} does not take these settings: {error}") from error
    assert isinstance(made, Technique), key
    return made


def _stacked(texts: list[str]) -> Technique:
    """Two cache techniques, of which the first chooses tokens and the second stores them."""
    from narrows.kv._base import KVTechnique
    from narrows.kv.stack import Stack

    if len(texts) != 2:
        raise NarrowsError(
            f"a stack is of two techniques, CHOOSES+STORES, not of {len(texts)}: {'+'.join(texts)}"
        )
    parts = [technique(part.strip()) for part in texts]
    for part in parts:
        if not isinstance(part, KVTechnique):
            raise NarrowsError(f"{part.key} is not a technique of caches, which stacks are made of")
    return Stack(*parts)  # type: ignore[arg-type]


def _text(value: Any) -> str:
    """A setting as `_value` reads it; several values are joined by a slash."""
    if isinstance(value, tuple):
        return "/".join(_text(part) for part in value)
    return "none" if value is None else str(value)


def _value(text: str) -> Any:
    if "/" in text:
        return tuple(_value(part) for part in text.split("/"))
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def apply(
    model: Any, technique_: Technique | str, state: Any = None
) -> AbstractContextManager[Applied]:
    """A technique on a real model: `with narrows.apply(model, "snapkv") as applied: applied.model`.

    model: a torch module. technique_: an object, or `KEY[:name=value,...]`. state: what its fit
    gave, where one is needed.
    """
    ready = technique(technique_) if isinstance(technique_, str) else technique_
    return ready.apply(model, state)
