"""The engine of a computational drive: attention of one head over what its flash holds; no torch.

Keys lie twice, by token and by channel. The copy by channel is made of blocks: as many tokens as
`strip` channels of them fill a page, each strip of channels in a page of its own. A block is
written when all its tokens are there, from their pages by token, so that the drive's memory holds
one page of keys and one of values a head and no more; younger keys are scored from their pages
by token.
"""

from __future__ import annotations

import numpy as np

from narrows.kv.instinfer_flash import Flash, Vectors, packed

DTYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(np.uint16)}
"""How numbers lie: numpy knows no bf16, whose bits are the upper half of an fp32."""


class Stream:
    """Keys and values of one row and KV head.

    width, value_width: channels. strip: adjacent channels that share a page; 0: no copy by
    channel, which dense attention needs none of.
    """

    def __init__(
        self, flash: Flash, width: int, value_width: int, dtype: np.dtype, strip: int
    ) -> None:
        self.flash, self.strip = flash, min(strip, width)
        self.keys = Vectors(flash, width, dtype)
        self.values = Vectors(flash, value_width, dtype)
        self.total = np.zeros(value_width)
        """Sum of the values: their mean stands for those that are not read."""
        self.blocks: list[list[int]] = []
        size = dtype.itemsize * max(self.strip, 1)
        self.block = max(1, flash.page // size)
        self.strips = -(-width // self.strip) if strip else 0
        self.each = -(-self.block * size // flash.page)

    @property
    def count(self) -> int:
        """Tokens held."""
        return self.keys.count

    @property
    def held(self) -> int:
        """Pages it takes, those shared with copies included."""
        full = sum(len(x.slabs) * x.each for x in (self.keys, self.values))
        return full + len(self.blocks) * self.strips * self.each

    def pages(self, more: int) -> int:
        """Pages that so many more tokens would fill."""
        blocks = (self.count + more) // self.block - len(self.blocks) if self.strips else 0
        return self.keys.pages(more) + self.values.pages(more) + blocks * self.strips * self.each

    def append(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Add tokens, (count, width) each. Room was reserved before."""
        begun = len(self.blocks) * self.block
        held = self.keys.count
        self.keys.append(keys)
        self.values.append(values)
        self.total += numbers(values).sum(0, dtype=np.float64)
        due = (self.count - begun) // self.block if self.strips else 0
        if not due:
            return
        # a prompt is at hand; what came token by token is read back
        young = keys if begun == held else self.keys.span(begun)
        young = young[: due * self.block].reshape(due, self.block, -1)
        missing = self.strips * self.strip - young.shape[2]
        if missing:
            young = np.pad(young, ((0, 0), (0, 0), (0, missing)))
        by_channel = young.transpose(0, 2, 1).reshape(due * self.strips, -1)
        at = self.flash.write(packed(by_channel, len(by_channel), self.each, self.flash.page))
        self.blocks += [at[i : i + self.strips] for i in range(0, len(at), self.strips)]

    def channels(self, chosen: np.ndarray) -> np.ndarray:
        """Chosen channels of the keys in blocks, (len(chosen), tokens in blocks)."""
        strips, where = np.unique(chosen // self.strip, return_inverse=True)
        size = self.strip * self.keys.dtype.itemsize * self.block
        at = [block[i] for i in strips.tolist() for block in self.blocks]
        asked = len(chosen) * len(self.blocks) * size // self.strip
        found = np.ascontiguousarray(self.flash.read(at, self.each, asked)[:, :size])
        found = found.view(self.keys.dtype)
        found = found.reshape(len(strips), len(self.blocks), self.strip, self.block)
        return found[where, :, chosen % self.strip].reshape(len(chosen), -1)

    def truncate(self, count: int) -> None:
        """Forget all but the first `count` tokens."""
        if count < self.count:
            self.total -= numbers(self.values.span(count)).sum(0, dtype=np.float64)
        self.keys.truncate(count)
        self.values.truncate(count)
        full = count // self.block
        self.flash.free([at for block in self.blocks[full:] for at in block], self.each)
        del self.blocks[full:]

    def copy(self) -> Stream:
        """The same tokens, flash shared."""
        made = Stream(
            self.flash, self.keys.width, self.values.width, self.keys.dtype, self.strip
        )  # fmt: skip
        made.keys, made.values = self.keys.copy(), self.values.copy()
        made.total[:] = self.total
        made.blocks = [list(block) for block in self.blocks]
        self.flash.share([at for block in made.blocks for at in block])
        return made

    def free(self) -> None:
        """Let go of everything."""
        self.keys.free()
        self.values.free()
        self.flash.free([at for block in self.blocks for at in block], self.each)
        self.blocks = []


def numbers(x: np.ndarray) -> np.ndarray:
    """Stored numbers as fp32."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32, copy=False)


def stored(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """fp32 as it is stored, to nearest even."""
    if dtype != np.uint16:
        return x.astype(dtype)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def softmax(x: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def dense(stream: Stream, queries: np.ndarray, scale: float) -> np.ndarray:
    """Attention over all tokens; queries: (queries of the KV head, width) fp32."""
    scores = queries @ numbers(stream.keys.span(0)).T * scale
    return softmax(scores) @ numbers(stream.values.span(0))


def sparf(
    stream: Stream, queries: np.ndarray, scale: float, r: int, k: int, pages: bool = False
) -> np.ndarray:
    """SparF: scores from the r largest channels of the queries, attention over the k best tokens.

    Queries that share a KV head share what is read: channels by the sum of their sizes, tokens by
    the sum of their approximate weights. pages: the pages whose tokens weigh most together are
    chosen instead, as many as k tokens fill, and all that lies on them is attended.
    """
    tokens = stream.count
    sizes = np.abs(queries)
    chosen = np.sort(np.argsort(-sizes.sum(0), kind="stable")[:r])
    part = sizes[:, chosen].sum(1, keepdims=True) / np.maximum(
        sizes.sum(1, keepdims=True), np.finfo(np.float32).tiny
    )
    begun = len(stream.blocks) * stream.block
    old = numbers(stream.channels(chosen))
    young = numbers(stream.keys.span(begun))
    asked = queries[:, chosen] * (scale / np.sqrt(np.maximum(part, 1e-12)))
    weights = softmax(np.concatenate([asked @ old, asked @ young[:, chosen].T], 1))
    best = (_best_pages if pages else _best)(weights.sum(0), min(k, tokens), stream.keys.per)
    share = weights[:, best].sum(1, keepdims=True)
    # pages of young keys are here already
    keys = np.concatenate(
        [numbers(stream.keys.take(best[best < begun])), young[best[best >= begun] - begun]]
    )
    values = numbers(stream.values.take(best))
    exact = softmax(queries @ keys.T * scale) @ values
    mean = (stream.total / tokens).astype(np.float32)
    return share * exact + (1 - share) * mean


def _best(weights: np.ndarray, k: int, _: int) -> np.ndarray:
    """The k heaviest tokens, ascending."""
    return np.sort(np.argpartition(-weights, k - 1)[:k])


def _best_pages(weights: np.ndarray, k: int, per: int) -> np.ndarray:
    """Tokens of the heaviest pages, ascending; `per` to a page, as many pages as k fill."""
    sums = np.add.reduceat(weights, np.arange(0, len(weights), per))
    chosen = np.sort(np.argsort(-sums, kind="stable")[: -(-k // per)])
    tokens = (chosen[:, None] * per + np.arange(per)).reshape(-1)
    return tokens[tokens < len(weights)]
