"""What the claims of ZipVL share: its definition written out, states, controls, readings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch

from narrows.claims._snapkv import reference, unseen
from narrows.kv._base import Prompt
from narrows.kv.zipvl import ZipVL
from narrows.kv.zipvl_store import ZipStore
from narrows.kv.zipvl_torch import Chooser

SIZE = 16
"""Channels of a head in small states."""


def random_prompt(tokens: int, rows: int = 2, size: int = SIZE, seed: int = 0) -> Prompt:
    """Peaked random attention, 8 query heads over 2 KV heads."""
    made = torch.Generator().manual_seed(seed * 9973 + tokens)
    queries = 2 * torch.randn(rows, 8, tokens, size, generator=made)
    keys, values = (torch.randn(rows, 2, tokens, size, generator=made) for _ in range(2))
    return Prompt(0, queries, keys, values, None, size**-0.5)


def store_of(technique: ZipVL, size: int = SIZE) -> ZipStore:
    """A store as the technique makes it."""

    class Config:
        head_dim = size

    store = technique.store(Config())
    assert isinstance(store, ZipStore)
    return store


def by_definition(asked: Prompt, row: int, technique: ZipVL) -> tuple[list[int], int]:
    """Important positions of one row, ascending, and how many the sums ask for, float64.

    The number is found by trying 1, 2, 3, ... tokens; which probes are drawn is taken as given.
    """
    queries, keys = asked.queries[row].double().numpy(), asked.keys[row].double().numpy()
    (heads, tokens, _), group = queries.shape, queries.shape[0] // keys.shape[0]
    probes = technique.chooser.probes(tokens, asked.layer).tolist()
    sums, seen = np.zeros(tokens), np.zeros(tokens)
    for place in probes:
        seen[: place + 1] += 1
        for head in range(heads):
            scores = keys[head // group, : place + 1] @ queries[head, place] * asked.scaling
            weights = np.exp(scores - scores.max())
            sums[: place + 1] += weights / weights.sum() / heads
    largest, count = np.sort(sums)[::-1], 1
    while largest[:count].sum() < technique.tau * sums.sum():
        count += 1
    normalised = sums / seen
    normalised[-1] = np.inf  # the last token is always important
    return sorted(np.argsort(-normalised, kind="stable")[:count].tolist()), count


class FixedChooser(Chooser):
    """The control: the same probes and scores, a share of tokens that never changes."""

    share = 0.5

    def count(self, accumulated: torch.Tensor) -> int:
        """See Chooser."""
        return min(max(round(self.share * len(accumulated)), 1), len(accumulated))


def fixed(share: float) -> ZipVL:
    """ZipVL at a fixed share of important tokens."""
    technique = ZipVL()
    chooser = FixedChooser(technique.tau, technique.recent, technique.random)
    chooser.share = share
    technique._chooser = chooser
    return technique


TOKENS, PROMPTS = 1024, 16
"""Of a reading: 16 prompts with 16 pairs each, all asked after the text: 256 answers."""


@cache
def answers() -> tuple[Mapping[str, np.ndarray], dict[int, float]]:
    """Which answers are right, by candidate; and the ratios of the adaptive one, by layer.

    The fixed control gets the mean of the adaptive ratios over the last reading's rows.
    """
    from narrows.kv import quality

    model, tokenizer = reference()
    ours = ZipVL()

    def read(some: dict[str, Any]) -> dict[str, np.ndarray]:
        return quality.answered(
            model, tokenizer, some, unseen(), PROMPTS, TOKENS, 16, 2, seed=6, seen=False
        )

    told = read({
        "dense": None, "zipvl": ours, "8 bits": ZipVL(bits=(8, 8)), "tau 1": ZipVL(1.0),
    })  # fmt: skip
    told |= read({"fixed": fixed(float(np.mean(list(ours.ratios.values()))))})
    return told, ours.ratios


class Both(ZipVL):
    """Prefill of ZipVL's first layer on: what the probes choose beside what all queries would."""

    def __init__(self) -> None:
        super().__init__()
        self._found: list[tuple[int, int]] = []

    def attend_prompt(self, prompt: Prompt, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Exact attention, so that every layer sees what a dense model would."""
        every = Chooser(self.tau, prompt.keys.shape[2], 0)
        for mine, whole in zip(self.chooser.read(prompt), every.choose(prompt), strict=True):
            self._found.append((int((mine & whole).sum()), int(whole.sum())))
        return None


def read_through(technique: ZipVL, ids: np.ndarray) -> None:
    """One prompt read by the reference model under a technique."""
    from narrows.kv.adapter import KVCache
    from narrows.kv.reading import reading

    model = reference()[0]
    with reading(model):
        cache = KVCache(model.config, technique)
        model(torch.from_numpy(ids)[None], past_key_values=cache, use_cache=True, logits_to_keep=1)


@cache
def overlap(tokens: int = TOKENS, prompts: int = 3) -> float:
    """Share of the tokens that all queries would choose, which the probes choose."""
    technique = Both()
    for i in range(prompts):
        read_through(technique, unseen()[i * 50_000 : i * 50_000 + tokens])
    found = np.array(technique._found)
    return float(found[:, 0].sum() / found[:, 1].sum())


@cache
def ratios_of(kind: str, tokens: int = TOKENS) -> dict[int, float]:
    """Ratios by layer for `busy` text, or a `blank` one: eight tokens of it, again and again."""
    text = unseen()[:tokens]
    technique = ZipVL()
    read_through(technique, text if kind == "busy" else np.resize(text[:8], tokens))
    return technique.ratios
