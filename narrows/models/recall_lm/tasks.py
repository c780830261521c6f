"""Recall tasks in real text: how recall-lm and the methods that squeeze its cache are judged.

Every generator is a pure function of its ``numpy.random.Generator``. A statement is written
``{ lord god= king men}`` (key, value: words of one token each) at a random place of a haystack;
the question is the same form left open, ``{ lord god=``, at the very end of the prompt. A chain is
asked with ``[`` and follows the links: ``[ a b=`` is answered `` c d= e f``. Prompts have exactly
``length`` tokens; the haystack is any array of token ids, a corpus or `random_words`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from narrows.core.errors import NarrowsError

from .writing import (
    KEY_TOKENS,
    Alphabet,
    distinct_keys,
    random_words,
    scatter,
    statement,
    walk,
)

__all__ = ["Alphabet", "Batch", "chains", "needle", "pairs", "random_words"]


@dataclass(frozen=True)
class Batch:
    """Prompts and the tokens that must follow them.

    ids: ``(n, length)``, the prompt, its question last. answers: ``(n, a)``, right only if all are.
    answer_start: ``(n,)``, index in ``ids`` of the first token of the (last) stated value.
    """

    ids: np.ndarray
    answers: np.ndarray
    answer_start: np.ndarray


def needle(
    rng: np.random.Generator,
    alphabet: Alphabet,
    text_ids: np.ndarray,
    length: int,
    n: int,
    value_tokens: int = 6,
    depth: float | None = None,
) -> Batch:
    """One statement in ``length`` tokens of text; its value is asked at the end."""
    return pairs(rng, alphabet, text_ids, length, n, 1, value_tokens, depth)


def pairs(
    rng: np.random.Generator,
    alphabet: Alphabet,
    text_ids: np.ndarray,
    length: int,
    n: int,
    count: int = 16,
    value_tokens: int = 2,
    depth: float | None = None,
    asked: int = 1,
) -> Batch:
    """``count`` statements scattered in text, one of them asked at the end of each prompt.

    ``depth`` in [0, 1] fixes where in the text the asked statement stands (None: at random).
    ``asked`` consecutive prompts share their text and ask different statements of it: cheaper to
    judge (see `evaluate.answers_right`), not quite independent.
    """
    if asked > count or n % asked or (depth is not None and asked > 1):
        raise NarrowsError(
            f"asked={asked} of count={count} statements in n={n} prompts: expected asked <= count, "
            "n a multiple of asked, and asked=1 where depth is given."
        )
    ids = np.empty((n, length), np.int64)
    answers = np.empty((n, value_tokens), np.int64)
    start = np.empty(n, np.int64)
    for first in range(0, n, asked):
        keys = distinct_keys(rng, alphabet, count)
        values = rng.choice(alphabet.words, (count, value_tokens))
        items = [statement(alphabet, k, v) for k, v in zip(keys, values, strict=True)]
        for row, pick in enumerate(rng.permutation(count)[:asked], first):
            question = np.concatenate([[alphabet.open], keys[pick], [alphabet.equals]])
            if row == first:
                ids[row], places = scatter(rng, text_ids, items, question, length, pick, depth)
            else:
                ids[row] = np.concatenate([ids[first, : length - len(question)], question])
            answers[row] = values[pick]
            start[row] = places[pick] + KEY_TOKENS + 2
    return Batch(ids, answers, start)


def chains(
    rng,
    alphabet: Alphabet,
    text_ids: np.ndarray,
    length: int,
    n: int,
    hops: int = 2,
    count: int = 4,
) -> Batch:
    """``count`` chains of ``hops`` links scattered in text; the answer walks one to its end."""
    answers = np.empty((n, hops * (KEY_TOKENS + 1) - 1), np.int64)
    ids, start = np.empty((n, length), np.int64), np.empty(n, np.int64)
    for row in range(n):
        nodes = distinct_keys(rng, alphabet, count * (hops + 1)).reshape(
            count, hops + 1, KEY_TOKENS
        )
        items = [statement(alphabet, c[i], c[i + 1]) for c in nodes for i in range(hops)]
        asked = int(rng.integers(count))
        question = np.concatenate([[alphabet.chase], nodes[asked, 0], [alphabet.equals]])
        ids[row], places = scatter(rng, text_ids, items, question, length)
        answers[row] = walk(alphabet, nodes[asked])
        start[row] = places[asked * hops + hops - 1] + KEY_TOKENS + 2
    return Batch(ids, answers, start)
