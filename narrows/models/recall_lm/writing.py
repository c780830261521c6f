"""How statements are written into text: what the tasks and the lessons share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from narrows.core.errors import NarrowsError

KEY_TOKENS = 2


@dataclass(frozen=True)
class Alphabet:
    """Token ids the tasks write with: the five marks and the words (one token each, ``(w,)``)."""

    open: int
    equals: int
    close: int
    chase: int
    end: int
    words: np.ndarray
    size: int

    @staticmethod
    def of(tokenizer) -> Alphabet:
        """A byte-level tokenizer's alphabet; words are its tokens `` aa...``, two letters up."""
        vocabulary = tokenizer.get_vocab()
        missing = [mark for mark in "{=}[]" if mark not in vocabulary]
        if missing:
            raise NarrowsError(
                f"the tokenizer has no single token for {missing}: give a byte-level one."
            )
        words = sorted(
            i
            for token, i in vocabulary.items()
            if len(token) > 2 and token[0] == "Ġ" and token[1:].isascii() and token[1:].islower()
        )
        return Alphabet(
            *(vocabulary[mark] for mark in "{=}[]"), words=np.array(words), size=len(vocabulary)
        )


def random_words(rng: np.random.Generator, alphabet: Alphabet, length: int) -> np.ndarray:
    """A haystack without any corpus: ``(length,)`` words drawn at random."""
    return rng.choice(alphabet.words, length)


def distinct_keys(rng, alphabet, count):
    """``(count, KEY_TOKENS)`` keys, all different."""
    size = len(alphabet.words)
    flat = rng.choice(size**KEY_TOKENS, count, replace=False, shuffle=True)
    return alphabet.words[np.stack([flat // size, flat % size], 1)]


def statement(alphabet, key, value):
    return np.concatenate([[alphabet.open], key, [alphabet.equals], value, [alphabet.close]])


def walk(alphabet, chain):
    """The answer to a chain: its nodes after the first, with the equals mark between."""
    return np.concatenate([part for node in chain[1:] for part in (node, [alphabet.equals])][:-1])


def window(rng, text_ids, length):
    if len(text_ids) < length:
        raise NarrowsError(
            f"the haystack has {len(text_ids)} tokens, the prompt needs {length}: give more text."
        )
    at = int(rng.integers(len(text_ids) - length + 1))
    return text_ids[at : at + length]


def scatter(rng, text_ids, items, tail, total, fixed=None, depth=None):
    """Text ``(total,)`` with ``items`` at random cuts and ``tail`` last; where each item starts."""
    room = total - len(tail) - sum(map(len, items))
    if room < 0:
        raise NarrowsError(
            f"{len(items)} statements and the question do not fit in {total} tokens: ask for fewer."
        )
    text = window(rng, text_ids, room)
    cuts = rng.integers(0, room + 1, len(items))
    if depth is not None:
        cuts[fixed] = round(depth * room)
    order = np.argsort(cuts, kind="stable")
    pieces, places, at, before = [], np.empty(len(items), np.int64), 0, 0
    for i in order:
        pieces += [text[before : cuts[i]], items[i]]
        at += cuts[i] - before
        places[i], before = at, cuts[i]
        at += len(items[i])
    return np.concatenate([*pieces, text[before:], tail]), places
