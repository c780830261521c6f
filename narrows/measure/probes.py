"""Rates of the host itself: caches, main memory, random access, drive, loopback."""

from __future__ import annotations

import os
import platform
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from threading import Thread
from time import perf_counter

import numpy as np

from narrows.measure.kernels import Loops, plain_pages, ring, together

MB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Cache:
    """A cache as the system describes it. size: bytes of all instances the cores here can use."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Stream:
    """Bytes per second over a footprint of `size` bytes: read alone, and as STREAM counts triad."""

    size: int
    read: float
    triad: float


def processor() -> str:
    """The processor's name as it tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_available() -> float | None:
    """Bytes a new process could take, from /proc/meminfo; None elsewhere."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    return None


def memory_total() -> float | None:
    """Bytes of main memory; None where the platform does not tell."""
    with suppress(AttributeError, OSError, ValueError):
        return float(os.sysconf("SC_PAGE_SIZE")) * float(os.sysconf("SC_PHYS_PAGES"))
    return None


def caches(threads: int) -> list[Cache]:
    """Data caches from sysfs, nearest first; empty where they are not listed.

    A private cache counts once for each of the threads, a shared one once for its sharers.
    """
    found: list[Cache] = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with suppress(OSError, ValueError):
            kind = (index / "type").read_text().strip()
            if kind == "Instruction":
                continue
            level = int((index / "level").read_text())
            text = (index / "size").read_text().strip()
            size = int(text.rstrip("KMG")) * {"K": 1024, "M": MB, "G": 1024 * MB}.get(text[-1], 1)
            sharers = _count((index / "shared_cpu_list").read_text())
            found.append(Cache(f"l{level}", size * max(threads // sharers, 1)))
    return found


def _count(cpus: str) -> int:
    """How many processors a list such as `0-3,8` names."""
    total = 0
    for part in cpus.strip().split(","):
        first, _, last = part.partition("-")
        total += int(last or first) - int(first) + 1
    return total


def streams(loops: Loops, sizes: list[int], threads: int, seconds: float) -> list[Stream]:
    """Bandwidth over footprints of so many bytes in all, split evenly over the threads.

    seconds: for each footprint. The best of its rounds counts: what was reached can be reached.
    """
    room = [plain_pages(max(sizes) // threads // 4, np.float32) for _ in range(threads)]
    found: list[Stream] = []
    for size in sizes:
        share = max(size // threads // 12, 16) * 3
        parts = [(a[: share // 3], a[share // 3 : share // 3 * 2], a[share // 3 * 2 : share])
                 for a in room]  # fmt: skip
        rates: dict[str, float] = {}
        for name in ("read", "triad"):

            def work(i: int, times: int, name: str = name, share: int = share,
                     parts: list[tuple[np.ndarray, ...]] = parts) -> None:  # fmt: skip
                if name == "read":
                    loops.read(room[i][:share], times)
                else:
                    loops.triad(*parts[i], times)

            rates[name] = _rate(work, share * 4 * threads, threads, seconds / 2)
        found.append(Stream(size, rates["read"], rates["triad"]))
    return found


def _rate(work: Callable[[int, int], None], moved: int, threads: int, seconds: float) -> float:
    """Bytes per second at best of work(thread, times), which moves `moved` bytes a time."""
    end, times, best = perf_counter() + seconds, 1, 0.0
    while True:
        took = together(lambda i: work(i, times), threads)  # noqa: B023  # run at once
        best = max(best, moved * times / took)
        if took < min(seconds / 5, 5e-3):  # starting threads must not count
            times = max(times * 2, int(times * 5e-3 / took))
        elif perf_counter() > end:
            return best


def knee(streams: list[Stream], near: float, far: float, nominal: float) -> float:
    """Bytes of the last cache that can be relied on, from read rates over growing footprints.

    The footprint at which a byte costs the mean of what it costs near and far (rates of the
    plateaus); never more than the nominal size. Neighbours on the same chip take their part.
    """
    middle = (1 / near + 1 / far) / 2
    before: Stream | None = None
    for at in streams:
        if 1 / at.read >= middle:
            if before is None:
                return float(min(at.size, nominal))
            a, b = 1 / before.read, 1 / at.read
            part = (middle - a) / (b - a) if b > a else 1.0
            size = before.size * (at.size / before.size) ** part
            return float(min(size, nominal))
        before = at
    return float(nominal)


def random_access(loops: Loops, size: int, seconds: float) -> float:
    """Seconds of one load that depends on the load before it, over `size` bytes."""
    successor = ring(max(size // 64, 2))
    steps = 1000
    while True:
        begin = perf_counter()
        loops.chase(successor, steps)
        took = perf_counter() - begin
        if took >= seconds / 4:
            break
        steps = max(steps * 2, int(steps * seconds / 4 / max(took, 1e-6) / 2))
    times = [took]
    for _ in range(2):
        begin = perf_counter()
        loops.chase(successor, steps)
        times.append(perf_counter() - begin)
    return min(times) / steps


def drive(folder: Path, size: int = 64 * MB, block: int = 4 * MB) -> float:
    """Bytes per second of reading a fresh file past the page cache; the file is removed.

    Raises OSError where the file system does not take O_DIRECT, or there is no such thing.
    """
    direct = getattr(os, "O_DIRECT", None)
    if direct is None:
        raise OSError("this system has no O_DIRECT")
    handle, name = tempfile.mkstemp(prefix=".narrows-drive-", dir=folder)
    try:
        with os.fdopen(handle, "wb", buffering=0) as file:
            chunk = os.urandom(block)
            for _ in range(size // block):
                file.write(chunk)
            os.fsync(file.fileno())
        rates: list[float] = []

        def past_the_cache(path: str, flags: int) -> int:
            return os.open(path, flags | direct)

        # mmap gives pages: O_DIRECT wants aligned memory
        with mmap(-1, block) as buffer:
            for _ in range(3):
                with open(name, "rb", buffering=0, opener=past_the_cache) as file:
                    begin = perf_counter()
                    read = 0
                    while (got := file.readinto(buffer)) > 0:
                        read += got
                    rates.append(read / (perf_counter() - begin))
        return max(rates)
    finally:
        Path(name).unlink(missing_ok=True)


def loopback(size: int = 32 * MB, messages: int = 200) -> tuple[float, float]:
    """Bytes per second one way and seconds of an empty message over TCP to this host itself."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5.0)
        failed: list[BaseException] = []

        def answer() -> None:
            try:
                peer, _ = server.accept()
                with peer:
                    peer.settimeout(5.0)
                    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    for _ in range(messages):
                        peer.sendall(peer.recv(1))
                    left, room = size, bytearray(MB)
                    while left > 0:
                        got = peer.recv_into(room, min(len(room), left))
                        if not got:
                            return
                        left -= got
                    peer.sendall(b"x")
            except OSError as error:
                failed.append(error)

        helper = Thread(target=answer, daemon=True)
        helper.start()
        try:
            with socket.create_connection(server.getsockname(), timeout=5.0) as line:
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                trips: list[float] = []
                for _ in range(messages):
                    begin = perf_counter()
                    line.sendall(b"x")
                    line.recv(1)
                    trips.append(perf_counter() - begin)
                chunk, left = bytes(MB), size
                begin = perf_counter()
                while left > 0:
                    line.sendall(chunk)
                    left -= len(chunk)
                line.recv(1)
                took = perf_counter() - begin
        finally:
            helper.join(timeout=5.0)
    if failed:
        raise failed[0]
    return size / took, float(np.median(trips)) / 2
