"""What recall-lm learns from: sequences and the places that carry loss, functions of a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .writing import KEY_TOKENS, Alphabet, distinct_keys, scatter, statement, walk, window


@dataclass(frozen=True)
class Lesson:
    """Sequences to train on.

    ids: ``(n, length + 1)``. answer: same shape, the number of the answer a token belongs to within
    its row, or -1. text: same shape, true where a token is natural text to be predicted.
    """

    ids: np.ndarray
    answer: np.ndarray
    text: np.ndarray


def copy_lesson(
    rng,
    alphabet: Alphabet,
    length: int,
    n: int,
    segment: tuple[int, int] = (6, 32),
    pool: int = 4,
    gap: int = 8,
) -> Lesson:
    """Random segments of random length, tiled with random gaps; every repeated token carries loss.

    The offset between repeats is random, so only a lookup by content solves it.
    """
    ids = rng.integers(0, alphabet.size, (n, length + 1))
    answer = np.full(ids.shape, -1, np.int32)
    for row in range(n):
        segments = [
            rng.integers(0, alphabet.size, rng.integers(segment[0], segment[1] + 1))
            for _ in range(pool)
        ]
        seen, at, number = set(), 0, 0
        while at < length + 1:
            pick = int(rng.integers(pool))
            piece = segments[pick][: length + 1 - at]
            ids[row, at : at + len(piece)] = piece
            if pick in seen and len(piece) > KEY_TOKENS:
                answer[row, at + KEY_TOKENS : at + len(piece)] = number
                number += 1
            seen.add(pick)
            at += len(piece) + int(rng.integers(gap + 1))
    return Lesson(ids, answer, np.zeros(ids.shape, bool))


def pair_lesson(
    rng,
    alphabet: Alphabet,
    text_ids: np.ndarray,
    length: int,
    n: int,
    count: int = 8,
    value_tokens: tuple[int, int] = (1, 4),
    asked: int = 16,
    spread: float = 0.5,
) -> Lesson:
    """``count`` statements in text and ``asked`` questions with their answers.

    A share ``spread`` of the questions stands anywhere after their statement, the rest at the end.
    """
    rows = [
        _pair_row(rng, alphabet, text_ids, length + 1, count, value_tokens, asked, spread)
        for _ in range(n)
    ]
    return Lesson(*(np.stack(part) for part in zip(*rows, strict=True)))


def chain_lesson(
    rng,
    alphabet: Alphabet,
    text_ids: np.ndarray,
    length: int,
    n: int,
    hops: int = 2,
    count: int = 4,
) -> Lesson:
    """Chains in text; every chain is walked at the end (the answers carry loss)."""
    rows = []
    for _ in range(n):
        nodes = distinct_keys(rng, alphabet, count * (hops + 1)).reshape(
            count, hops + 1, KEY_TOKENS
        )
        items = [statement(alphabet, c[i], c[i + 1]) for c in nodes for i in range(hops)]
        tail, marks = [], []
        for number, chain in enumerate(nodes[rng.permutation(count)]):
            path = walk(alphabet, chain)
            tail += [[alphabet.chase], chain[0], [alphabet.equals], path, [alphabet.end]]
            marks += [[-1] * (KEY_TOKENS + 2), [number] * len(path), [-1]]
        tail, marks = np.concatenate(tail), np.concatenate(marks)
        ids, places = scatter(rng, text_ids, items, tail, length + 1)
        text = _text_mask(length + 1, places, items, len(tail))
        rows.append((ids, np.concatenate([np.full(length + 1 - len(tail), -1), marks]), text))
    return Lesson(*(np.stack(part) for part in zip(*rows, strict=True)))


def text_lesson(rng, text_ids: np.ndarray, length: int, n: int) -> Lesson:
    """Windows of plain text."""
    ids = np.stack([window(rng, text_ids, length + 1) for _ in range(n)])
    return Lesson(ids, np.full(ids.shape, -1, np.int32), np.ones(ids.shape, bool))


def _pair_row(rng, alphabet, text_ids, total, count, value_tokens, asked, spread):
    size = int(rng.integers(value_tokens[0], value_tokens[1] + 1))
    keys, values = distinct_keys(rng, alphabet, count), rng.choice(alphabet.words, (count, size))
    item = KEY_TOKENS + size + 3
    early = min(int(asked * spread), max(0, (total // 2) // item - count))
    late = min(asked - early, max(1, (total // 2) // item))
    # the first time a key comes up it states its value; later ones are questions with their answer
    order = np.concatenate([np.arange(count), rng.integers(0, count, early)])
    order = order[rng.permutation(len(order))]
    last = rng.permutation(np.resize(rng.permutation(count), late))
    items = [statement(alphabet, keys[i], values[i]) for i in order]
    tail = np.concatenate([statement(alphabet, keys[i], values[i]) for i in last])
    ids, places = scatter(rng, text_ids, items, tail, total)
    answer, seen, number = np.full(total, -1), set(), 0
    ends = total - len(tail) + item * np.arange(late)
    for place, i in sorted(zip([*places, *ends], [*order, *last], strict=True)):
        if i in seen:
            answer[place + KEY_TOKENS + 2 : place + item - 1] = number
            number += 1
        seen.add(i)
    return ids, answer, _text_mask(total, places, items, len(tail))


def _text_mask(total, places, items, tail):
    """True on natural text that follows natural text."""
    text = np.ones(total, bool)
    for place, item in zip(places, items, strict=True):
        text[place : place + len(item) + 1] = False
    text[total - tail :] = False
    return text
