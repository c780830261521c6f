"""Flash of a computational drive: one file, read and written in whole pages; no torch.

What is stored is slabs: a few pages one behind the other, written once and never changed, so that
copies of a cache share them. Every page moved is counted, and so are the bytes that were asked
for: the difference is what reading whole pages wastes. A rate is kept for real.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from dataclasses import dataclass
from time import monotonic, sleep

import numpy as np

GROW = 256
"""Pages that the file grows by at least."""

DIRECT = 512
"""Bytes that reads past the page cache are aligned to, at least."""


class Full(Exception):  # noqa: N818 - what happened; the host makes an error of it
    """No room for so many pages."""


@dataclass(slots=True)
class Wear:
    """Pages read and written, and the bytes of those read that anybody asked for."""

    read: int = 0
    written: int = 0
    asked: int = 0


class Flash:
    """Pages of one file without a name.

    page: bytes. capacity: bytes; None: what the folder holds. rate: bytes a second, reads and
    writes together. direct: read past the page cache, where the folder and the page allow it;
    else the file is mapped, and read from the page cache.
    """

    def __init__(
        self, folder: str, page: int, capacity: float | None = None, rate: float | None = None,
        direct: bool = True,
    ) -> None:  # fmt: skip
        self.page, self.rate = page, rate
        self.pages = None if capacity is None else int(capacity // page)
        self.wear = Wear()
        self._size = self._end = 0
        self._spare: dict[int, list[int]] = {}
        self._shared: dict[int, int] = {}
        self._due = 0.0
        self._map: np.ndarray | None = None
        self._writing, path = tempfile.mkstemp(prefix="narrows-drive-", dir=folder)
        flags = os.O_RDONLY | (getattr(os, "O_DIRECT", 0) if page % DIRECT == 0 and direct else 0)
        self._reading = -1
        try:
            self._reading = os.open(path, flags)
        except OSError:
            flags = os.O_RDONLY
            self._reading = os.open(path, flags)
        finally:
            os.unlink(path)
        self.direct = flags != os.O_RDONLY

    @property
    def used(self) -> int:
        """Pages that hold something."""
        return self._end - sum(size * len(at) for size, at in self._spare.items())

    def reserve(self, pages: int) -> None:
        """Make sure that so many more pages can be written, or raise Full and change nothing."""
        if self.pages is not None and self.used + pages > self.pages:
            raise Full(f"{pages} pages of {self.page} bytes are wanted, {self.pages} are all")
        least = self._end + pages - self._size
        if least > 0 and not self._grow(max(least, GROW)) and not self._grow(least):
            raise Full(f"{least} more pages of {self.page} bytes do not fit into the folder")

    def _grow(self, pages: int) -> bool:
        """Whether the folder has room for so many more pages, which then are the file's."""
        try:
            os.posix_fallocate(self._writing, self._size * self.page, pages * self.page)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                return False
            raise
        self._size += pages
        return True

    def write(self, slabs: np.ndarray) -> list[int]:
        """Store slabs, (count, bytes of whole pages) uint8; where each begins, in pages.

        Room was reserved before.
        """
        count, each = slabs.shape[0], slabs.shape[1] // self.page
        spare = self._spare.get(each, [])
        at = [spare.pop() for _ in range(min(count, len(spare)))]
        fresh = count - len(at)
        at += range(self._end, self._end + fresh * each, each)
        self._end += fresh * each
        for i in range(count - fresh):
            self._put(at[i], slabs[i])
        if fresh:
            self._put(at[count - fresh], slabs[count - fresh :])
        self.wear.written += count * each
        self._owe(count * each)
        return at

    def _put(self, at: int, what: np.ndarray) -> None:
        left, place = np.ascontiguousarray(what).data.cast("B"), at * self.page
        while left:
            done = os.pwrite(self._writing, left, place)
            left, place = left[done:], place + done

    def read(self, at: list[int], each: int, asked: int) -> np.ndarray:
        """Slabs of `each` pages that begin at these pages, (count, each * page) uint8.

        asked: bytes of them that are wanted. Slabs one behind the other are one read.
        """
        size = each * self.page
        if not at:
            return np.empty((0, size), np.uint8)
        self.wear.read += len(at) * each
        self.wear.asked += asked
        self._owe(len(at) * each)
        places = np.asarray(at, np.int64)
        if not self.direct:
            return self._mapped(places, each).reshape(len(at), size)
        # an anonymous map starts at a page, as O_DIRECT wants it; the array keeps it alive
        held = mmap.mmap(-1, len(at) * size)
        edges = np.flatnonzero(np.diff(places) != each) + 1
        view = memoryview(held)
        for begin, end in zip([0, *edges.tolist()], [*edges.tolist(), len(at)], strict=True):
            into, place = view[begin * size : end * size], int(places[begin]) * self.page
            while into:
                done = os.preadv(self._reading, [into], place)
                if not done:
                    raise OSError(errno.EIO, "the file of the drive ended early")
                into, place = into[done:], place + done
        return np.frombuffer(held, np.uint8).reshape(len(at), size)

    def _mapped(self, places: np.ndarray, each: int) -> np.ndarray:
        """Pages from the page cache; one behind the other they are not even copied."""
        if self._map is None or len(self._map) < self._size:
            held = mmap.mmap(self._reading, self._size * self.page, prot=mmap.PROT_READ)
            self._map = np.frombuffer(held, np.uint8).reshape(-1, self.page)
        if bool((np.diff(places) == each).all()):
            return self._map[places[0] : places[0] + len(places) * each]
        return self._map[places if each == 1 else places[:, None] + np.arange(each)]

    def share(self, at: list[int]) -> None:
        """One more stream holds these slabs."""
        for place in at:
            self._shared[place] = self._shared.get(place, 0) + 1

    def free(self, at: list[int], each: int) -> None:
        """A stream lets go of these slabs."""
        for place in at:
            others = self._shared.pop(place, 0)
            if others > 1:
                self._shared[place] = others - 1
            elif not others:
                self._spare.setdefault(each, []).append(place)

    def _owe(self, pages: int) -> None:
        if self.rate is not None:
            self._due += pages * self.page / self.rate

    def settle(self, begin: float) -> None:
        """Let as much time pass since `begin` (monotonic) as the pages moved since then take."""
        left, self._due = begin + self._due - monotonic(), 0.0
        if left > 0:
            sleep(left)


class Vectors:
    """Vectors of one head in order: full slabs in flash, the rest in the drive's memory."""

    def __init__(self, flash: Flash, width: int, dtype: np.dtype) -> None:
        self.flash, self.width, self.dtype = flash, width, dtype
        self.bytes = width * dtype.itemsize
        self.per = max(1, flash.page // self.bytes)
        """Vectors in a slab: those of one page, or one that takes several."""
        self.each = -(-self.per * self.bytes // flash.page)
        self.slabs: list[int] = []
        self.rest = np.empty((self.per, width), dtype)
        self.left = 0

    @property
    def count(self) -> int:
        """Vectors held."""
        return len(self.slabs) * self.per + self.left

    def pages(self, more: int) -> int:
        """Pages that so many more vectors would fill."""
        return (self.left + more) // self.per * self.each

    def append(self, x: np.ndarray) -> None:
        """Add (count, width); slabs that fill are written. Room was reserved before."""
        whole = np.concatenate([self.rest[: self.left], x]) if self.left else x
        full = len(whole) // self.per
        if full:
            self.slabs += self.flash.write(packed(whole[: full * self.per], full, self.each,
                                                  self.flash.page))  # fmt: skip
            whole = whole[full * self.per :]
            self.left = 0
        if len(whole):
            fresh = whole[self.left :]
            self.rest[self.left : self.left + len(fresh)] = fresh
            self.left = len(whole)

    def slab(self, which: list[int]) -> np.ndarray:
        """Vectors of these slabs, (len(which), per, width): all of them were asked for."""
        found = self.flash.read([self.slabs[i] for i in which], self.each,
                                len(which) * self.per * self.bytes)  # fmt: skip
        return self._cut(found)

    def span(self, begin: int) -> np.ndarray:
        """Vectors from `begin` on, (count - begin, width); whole slabs are read."""
        first = begin // self.per
        asked = max(len(self.slabs) * self.per - begin, 0) * self.bytes
        found = self.flash.read(self.slabs[first:], self.each, asked)
        full = self._cut(found).reshape(-1, self.width)
        skipped = begin - first * self.per
        return np.concatenate([full, self.rest[: self.left]])[skipped:]

    def take(self, index: np.ndarray) -> np.ndarray:
        """Vectors by ascending index, (len(index), width): their slabs are read, once each."""
        of = index // self.per
        stored = of < len(self.slabs)
        which, where = np.unique(of[stored], return_inverse=True)
        found = self.flash.read([self.slabs[i] for i in which.tolist()], self.each,
                                int(stored.sum()) * self.bytes)  # fmt: skip
        out = np.empty((len(index), self.width), self.dtype)
        out[stored] = self._cut(found)[where, index[stored] % self.per]
        out[~stored] = self.rest[index[~stored] % self.per]
        return out

    def _cut(self, found: np.ndarray) -> np.ndarray:
        useful = found[:, : self.per * self.bytes]
        if useful.shape[1] != found.shape[1]:
            useful = np.ascontiguousarray(useful)
        return useful.view(self.dtype).reshape(-1, self.per, self.width)

    def truncate(self, count: int) -> None:
        """Forget all but the first `count`; a slab that is cut comes back to memory."""
        full, left = divmod(count, self.per)
        if full < len(self.slabs):
            if left:
                self.rest[:left] = self.slab([full])[0, :left]
            self.flash.free(self.slabs[full:], self.each)
            del self.slabs[full:]
        self.left = left

    def copy(self) -> Vectors:
        """The same vectors, slabs shared."""
        made = Vectors(self.flash, self.width, self.dtype)
        made.slabs, made.left = list(self.slabs), self.left
        made.rest[:] = self.rest
        self.flash.share(made.slabs)
        return made

    def free(self) -> None:
        """Let go of everything."""
        self.flash.free(self.slabs, self.each)
        self.slabs, self.left = [], 0


def packed(x: np.ndarray, count: int, each: int, page: int) -> np.ndarray:
    """Numbers as `count` slabs of whole pages, uint8; the end of a slab may be empty."""
    told = np.ascontiguousarray(x).view(np.uint8).reshape(count, -1)
    if told.shape[1] == each * page:
        return told
    made = np.zeros((count, each * page), np.uint8)
    made[:, : told.shape[1]] = told
    return made
