"""The host's end of computational drives: processes, pipes, counts of what crossed the link.

A drive is a process that lives as long as anybody holds it: it is ended when the last store or
technique lets go, when the program ends, and by itself when its pipe breaks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count, pairwise
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO

from narrows.core.errors import NarrowsError
from narrows.kv.instinfer_drive import SIZE, Message, Verb, put, receive

WAIT = 5.0
"""Seconds a drive is given to end by itself."""


@dataclass(slots=True)
class Crossed:
    """Bytes that crossed the link: data to the drive, data back, and headers both ways.

    Numbers of caches to forget count as headers: no tokens, queries or answers.
    """

    sent: int = 0
    received: int = 0
    headers: int = 0

    @property
    def data(self) -> int:
        """Data both ways."""
        return self.sent + self.received


class ComputationalDrive:
    """One drive: a worker process that owns a file and computes over it.

    folder: where the file is made. page: bytes of a flash page. strip: channels that share a page
    of the keys' copy by channel. capacity: bytes of flash, None: what the folder holds. link,
    internal: bytes a second that are kept to, None: as fast as it goes. direct: whether flash is
    read past the page cache (where the folder allows it).
    """

    def __init__(
        self, folder: str, page: int = 4096, strip: int = 2, capacity: float | None = None,
        link: float | None = None, internal: float | None = None, direct: bool = True,
    ) -> None:  # fmt: skip
        settings = {"folder": folder, "page": page, "strip": strip, "capacity": capacity,
                    "link": link, "rate": internal, "direct": direct}  # fmt: skip
        self.link = link
        self.crossed = Crossed()
        self._names = count(1)
        self._gone: deque[int] = deque()
        self._waiting = False
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "narrows.kv.instinfer_drive", json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=-1,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1",
                 "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to: BinaryIO = self._process.stdin  # type: ignore[assignment]
        self._from: BinaryIO = self._process.stdout  # type: ignore[assignment]
        self._end = weakref.finalize(self, _ended, self._process)
        ready = self._received()
        if ready.verb is Verb.BROKEN:
            self.close()
            raise NarrowsError(f"no drive can be made in {folder}: {ready.data.decode()}")

    def __deepcopy__(self, memo: dict[int, Any]) -> ComputationalDrive:
        return self  # caches share a drive, and its counts

    @property
    def pid(self) -> int:
        """The process that is the drive."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can be asked anything."""
        return self._end.alive and self._process.poll() is None

    def name(self) -> int:
        """A number for a new session."""
        return next(self._names)

    def forget(self, session: int) -> None:
        """Let a session go with the next command: this may be called while one is under way."""
        self._gone.append(session)

    def send(self, asked: Message) -> None:
        """Give a command; its answer is to be received before the next one."""
        if not self.alive:
            raise _lost()
        if self._waiting:
            self.close()
            raise NarrowsError(
                "a command to the drive was interrupted, so what its file holds is not known; "
                "start a new cache"
            )
        if self._gone:
            names = [self._gone.popleft() for _ in range(len(self._gone))]
            self._put(Message(Verb.FREE, data=b"".join(n.to_bytes(4, "little") for n in names)))
            self._received()
            self.crossed.sent -= 4 * len(names)
            self.crossed.headers += 4 * len(names)
        self._put(asked)

    def receive(self) -> Message:
        """The answer; NarrowsError where the drive could not do it, and then nothing changed."""
        told = self._received()
        if told.verb is Verb.FULL:
            raise NarrowsError(
                f"the drive is full: {told.data.decode()}; the layer is as it was. Give a larger "
                "capacity or another folder, or take the step back with instinfer.mended(cache)"
            )
        if told.verb is Verb.BROKEN:
            raise NarrowsError(f"the drive failed: {told.data.decode()}; start a new cache")
        return told

    def ask(self, asked: Message) -> Message:
        """Give a command and wait for its answer."""
        self.send(asked)
        return self.receive()

    def status(self, session: int = 0) -> dict[str, Any]:
        """Pages read and written and what of them was asked for; see instinfer_drive."""
        before = Crossed(self.crossed.sent, self.crossed.received, self.crossed.headers)
        told = json.loads(self.ask(Message(Verb.STATUS, session)).data)
        self.crossed = before  # looking is free
        return told

    def _put(self, asked: Message) -> None:
        if self.link:
            arrival = monotonic() + (len(asked.data) + SIZE) / self.link
            asked = replace(asked, arrival=arrival)
        self._waiting = True
        try:
            put(self._to, asked)
            self._to.flush()
        except OSError as error:
            self.close()
            raise _lost() from error
        self.crossed.sent += len(asked.data)
        self.crossed.headers += SIZE

    def _received(self) -> Message:
        told = receive(self._from)
        if told is None:
            self.close()
            raise _lost()
        self._waiting = False
        self.crossed.received += len(told.data)
        self.crossed.headers += SIZE
        return told

    def close(self) -> None:
        """End the process; its file goes with it."""
        self._end()


def _ended(process: subprocess.Popen[bytes]) -> None:
    """Close the pipes, which ends the drive; make sure that it does."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # what was on its way to a drive that is gone
                pipe.close()
    try:
        process.wait(WAIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _lost() -> NarrowsError:
    return NarrowsError(
        "the process of the drive has ended, and what it held is lost; start a new cache (the "
        "technique makes a new drive for it)"
    )


def share_heads(heads: int, drives: Sequence[Any]) -> list[slice]:
    """Which KV heads each drive holds: as even as it goes, none where there are more drives."""
    edges = [heads * i // len(drives) for i in range(len(drives) + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]
