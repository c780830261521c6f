"""Tiers: where stored tokens lie, and what it takes to read them.

A tier makes rooms; a room holds one part of one layer's tokens, (batch, kv_heads, rows, width),
and gives rows back on the device that computes. Everything that moves is counted in the tier's
traffic, and a rate is kept for real: a read takes at least its bytes over the rate.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, ClassVar

import torch

from narrows.core.errors import NarrowsError

PAGE = 4096
"""Bytes that a drive reads at once."""


@dataclass(slots=True)
class Traffic:
    """What was moved to the device that computes: bytes, reads, seconds they took."""

    bytes: int = 0
    reads: int = 0
    seconds: float = 0.0


class Room(ABC):
    """Rows of one part of one layer's tokens."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    @abstractmethod
    def write(self, begin: int, x: torch.Tensor) -> None:
        """Store rows from `begin` on; x: (batch, kv_heads, n, width)."""

    @abstractmethod
    def read(self, begin: int, end: int) -> torch.Tensor:
        """Rows `begin` to `end` on the device that computes."""

    @abstractmethod
    def take(self, index: torch.Tensor) -> torch.Tensor:
        """Chosen rows, index (batch, kv_heads, k)."""

    @abstractmethod
    def select(self, rows: torch.Tensor) -> Room:
        """A room with these rows of the batch, in this order."""

    def nbytes(self) -> int:
        """Bytes allocated."""
        return math.prod(self.shape) * self.dtype.itemsize


class Tier(ABC):
    """A place for tokens."""

    name: ClassVar[str]

    def __init__(self, rate: float | None = None) -> None:
        if rate is not None and not rate > 0:
            raise NarrowsError(f"a tier's rate is in bytes a second, above 0, not {rate!r}")
        self.rate = rate
        self.traffic = Traffic()

    @abstractmethod
    def room(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> Room:
        """An empty room; what is read from it goes to `device`."""

    def count(self, moved: int, begin: float) -> None:
        """Enter what was moved since `begin` (perf_counter), and keep to the rate."""
        if self.rate is not None:
            left = moved / self.rate - (perf_counter() - begin)
            if left > 0:
                sleep(left)
        self.traffic.bytes += moved
        self.traffic.reads += 1
        self.traffic.seconds += perf_counter() - begin

    def __deepcopy__(self, memo: dict[int, Any]) -> Tier:
        return self  # caches share a place, and its count


class Device(Tier):
    """The memory of the device that computes: rows are views, nothing moves."""

    name = "device"

    def room(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> Room:
        """See Tier."""
        return _Tensor(torch.empty(shape, dtype=dtype, device=device))


class Host(Tier):
    """The memory of the host; pinned where a GPU computes. Reads copy to the device.

    rate: bytes a second at most, to stand for a link on a machine that has none.
    """

    name = "host"

    def room(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> Room:
        """See Tier."""
        held = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
        return _Tensor(held, self, device)


class Drive(Tier):
    """Files of a folder, read past the page cache (O_DIRECT) in whole pages.

    folder: on a file system that allows O_DIRECT; the system's folder for temporary files if
    None. rate: bytes a second at most. Files have no name while they are open, so nothing is left
    behind however the program ends.
    """

    name = "drive"

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, rate: float | None = None,
        page: int = PAGE,
    ) -> None:  # fmt: skip
        super().__init__(rate)
        if page < PAGE or page % PAGE:
            raise NarrowsError(f"pages of a drive are multiples of {PAGE} bytes, not {page!r}")
        self.folder = Path(tempfile.gettempdir() if folder is None else folder)
        self.page = page

    def room(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> Room:
        """See Tier. NarrowsError where the folder is full or does not allow O_DIRECT."""
        return _File(self, shape, dtype, device)


class _Tensor(Room):
    """Rows in memory; with a tier they are copied to the device when read."""

    def __init__(
        self, held: torch.Tensor, tier: Tier | None = None, device: torch.device | None = None
    ) -> None:
        super().__init__(tuple(held.shape), held.dtype)  # type: ignore[arg-type]
        self.held, self.tier, self.device = held, tier, device

    def write(self, begin: int, x: torch.Tensor) -> None:
        self.held[:, :, begin : begin + x.shape[2]].copy_(x)

    def read(self, begin: int, end: int) -> torch.Tensor:
        return self._moved(self.held[:, :, begin:end])

    def take(self, index: torch.Tensor) -> torch.Tensor:
        at = index.to(self.held.device).unsqueeze(-1).expand(*index.shape, self.held.shape[3])
        begin = perf_counter()
        return self._moved(self.held.gather(2, at), begin)

    def select(self, rows: torch.Tensor) -> Room:
        chosen = self.held.index_select(0, rows.to(self.held.device))
        return _Tensor(chosen, self.tier, self.device)

    def _moved(self, x: torch.Tensor, begin: float | None = None) -> torch.Tensor:
        if self.tier is None:
            return x
        begin = perf_counter() if begin is None else begin
        moved = torch.empty(x.shape, dtype=x.dtype, device=self.device).copy_(x)
        self.tier.count(x.numel() * x.element_size(), begin)
        return moved


class _File(Room):
    """Rows of each head one behind the other in an extent of whole pages of one file."""

    def __init__(
        self, tier: Drive, shape: tuple[int, int, int, int], dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        super().__init__(shape, dtype)
        self.tier, self.device = tier, device
        self.row = shape[3] * dtype.itemsize
        self.extent = -(-shape[2] * self.row // tier.page) * tier.page
        self.writing = self.reading = -1
        try:
            self.writing, path = tempfile.mkstemp(prefix="narrows-", dir=tier.folder)
        except OSError as error:
            raise NarrowsError(f"no file can be made in {tier.folder}: {error.strerror}") from error
        try:
            self.reading = os.open(path, os.O_RDONLY | os.O_DIRECT)
            if self.extent:
                os.posix_fallocate(self.writing, 0, shape[0] * shape[1] * self.extent)
        except (OSError, AttributeError) as error:
            self.close()
            told = getattr(error, "strerror", None) or str(error)
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise NarrowsError(
                    f"the drive is full: {shape[0] * shape[1] * self.extent} bytes do not fit in "
                    f"{tier.folder}; the cache is as it was"
                ) from error
            raise NarrowsError(
                f"{tier.folder} does not allow reading past the page cache (O_DIRECT): {told}; "
                "give a folder on a disk"
            ) from error
        finally:
            os.unlink(path)

    def write(self, begin: int, x: torch.Tensor) -> None:
        told = x.detach().to("cpu").contiguous().view(torch.uint8).numpy()
        for b in range(x.shape[0]):
            for h in range(x.shape[1]):
                at = (b * self.shape[1] + h) * self.extent + begin * self.row
                left = memoryview(told[b, h]).cast("B")
                try:
                    while left:
                        done = os.pwrite(self.writing, left, at)
                        left, at = left[done:], at + done
                except OSError as error:
                    raise NarrowsError(
                        f"writing to {self.tier.folder} failed: {error.strerror}; the cache is "
                        "as it was"
                    ) from error

    def read(self, begin: int, end: int) -> torch.Tensor:
        batch, heads, _, width = self.shape
        made = torch.empty((batch, heads, end - begin, width), dtype=self.dtype)
        if end == begin:
            return made.to(self.device)
        into = made.view(torch.uint8).view(batch * heads, -1).numpy()
        for i in range(batch * heads):
            into[i] = self._bytes(i * self.extent + begin * self.row, into.shape[1])
        return made.to(self.device)

    def take(self, index: torch.Tensor) -> torch.Tensor:
        batch, heads, _, width = self.shape
        index = index.expand(batch, heads, -1).cpu()
        made = torch.empty((*index.shape, width), dtype=self.dtype)
        into = made.view(torch.uint8).numpy()
        for b in range(batch):
            for h in range(heads):
                start = (b * heads + h) * self.extent
                for k, row in enumerate(index[b, h].tolist()):
                    into[b, h, k] = self._bytes(start + row * self.row, self.row)
        return made.to(self.device)

    def select(self, rows: torch.Tensor) -> Room:
        order = [int(r) for r in rows]
        made = _File(self.tier, (len(order), *self.shape[1:]), self.dtype, self.device)
        per = self.shape[1] * self.extent
        for to, row in enumerate(order):
            for at in range(0, per, self.tier.page * 256):
                count = min(self.tier.page * 256, per - at)
                os.pwrite(
                    made.writing, os.pread(self.writing, count, row * per + at), to * per + at
                )
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Room:
        return self.select(torch.arange(self.shape[0]))

    def _bytes(self, at: int, count: int) -> Any:
        """Bytes at any place: the whole pages around them are read."""
        import numpy as np

        begin, page = perf_counter(), self.tier.page
        first = at // page * page
        size = -(-(at + count - first) // page) * page
        # an anonymous map starts at a page, as O_DIRECT wants it; arrays that look at it keep it
        # alive, so nothing is closed by hand
        pages = mmap.mmap(-1, size)
        got = 0
        try:
            while got < at + count - first:
                done = os.preadv(self.reading, [memoryview(pages)[got:]], first + got)
                if not done:
                    raise NarrowsError(
                        f"a file of the cache in {self.tier.folder} ended early; it was cut "
                        "from outside: start a new cache"
                    )
                got += done
        except OSError as error:
            raise NarrowsError(
                f"reading from {self.tier.folder} failed: {error.strerror}"
            ) from error
        found = np.frombuffer(pages, np.uint8)[at - first : at - first + count]
        self.tier.count(size, begin)
        return found

    def close(self) -> None:
        """Give the file back."""
        for handle in (self.writing, self.reading):
            if handle >= 0:
                os.close(handle)
        self.writing = self.reading = -1

    def __del__(self) -> None:
        self.close()
