"""What there is to try: single techniques from gentle to harsh, pairs of them, and their price.

The bound is the fast judge: it says what each holds and how fast it decodes, before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from narrows import index
from narrows.core.bound import Bound, bound
from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.door import spelled
from narrows.kv._base import KVTechnique
from narrows.kv.stack import Stack


@dataclass(frozen=True)
class Priced:
    """A candidate as the bound sees it. bytes: of the cache when all is generated.

    seconds: of one decode step. tokens_per_second: of all requests together. error: p90 of the
    prediction, None where nothing is calibrated. technique: None for the case as it is.
    """

    technique: KVTechnique | None
    bound: Bound
    bytes: float
    seconds: float
    tokens_per_second: float
    error: float | None

    @property
    def name(self) -> str:
        """As `--with` takes it."""
        return "dense" if self.technique is None else spelled(self.technique)

    @property
    def stacked(self) -> bool:
        """Whether it is more than one technique."""
        return isinstance(self.technique, Stack)


def priced(case: Case, technique: KVTechnique | None = None) -> Priced:
    """What the bound says of a technique on a case that generates from a prompt."""
    rewritten = case if technique is None else case.with_(technique)
    found = bound(rewritten)
    phase = found.phase("decode")
    seconds = phase.seconds / phase.steps
    batch = float(case.workload.facts["batch"])
    held = float(rewritten.workload.bytes("kv"))
    return Priced(technique, found, held, seconds, batch / seconds, phase.error)


def singles(case: Case, *models: Any) -> tuple[list[Priced], dict[str, str]]:
    """Every registered cache technique at every step of its ladder; and why others are not here.

    models: that judge quality or are to be run, on which every candidate must be able to run: one
    that is to be trained for a model, and was not, is left out with what it asks for. Those that
    change nothing about the case, or decode no faster, are left out too.
    """
    dense = priced(case)
    found: list[Priced] = []
    left: dict[str, str] = {}
    for entry in index.built("technique"):
        made = index.load(entry.key)
        if not issubclass(made, KVTechnique):
            if entry.folder == "kv":
                left[entry.key] = "it changes how a prompt is read; caches are what is compared"
            continue
        try:
            ladder = made.ladder(case)
        except NarrowsError as error:
            left[entry.key] = str(error)
            continue
        for technique in ladder:
            assert isinstance(technique, KVTechnique), entry.key
            try:
                rewritten = case.with_(technique)
                if rewritten is case:
                    left[spelled(technique)] = technique.why(case)
                    continue
                if rewritten.machine is not case.machine:
                    left[spelled(technique)] = f"it needs hardware beside {case.machine.name}"
                    continue
                one = priced(case, technique)
                if one.seconds >= dense.seconds:
                    left[spelled(technique)] = (
                        f"a step would take {one.seconds / dense.seconds:.3g} times as long as "
                        "with the dense cache"
                    )
                    continue
                can_run(technique, *models)
                found.append(one)
            except NarrowsError as error:
                left[spelled(technique)] = str(error)
    return found, left


def can_run(technique: KVTechnique, *models: Any) -> None:
    """Raises NarrowsError where a technique cannot run on one of the models as it is."""
    for model in models:
        technique.of(model).store(model.config)


def pairs(case: Case, parts: Iterable[Priced], *models: Any) -> list[Priced]:
    """Every stack of two of these that can be built: one chooses tokens, the other stores them."""
    techniques = [p.technique for p in parts if p.technique is not None and not p.stacked]
    found: list[Priced] = []
    for choose in techniques:
        for code in techniques:
            # those that do not go together, because one of them is no such part, are no stack
            with suppress(NarrowsError):
                stack = Stack(choose, code)
                can_run(stack, *models)
                found.append(priced(case, stack))
    return found
