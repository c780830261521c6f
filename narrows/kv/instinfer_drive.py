"""A computational drive as a process of its own: the only one that reads the cache's file.

It gets commands through a pipe and answers through another: headers of 64 bytes, as NVMe's
commands are, and data behind them. Each header says when its data would be through a link of the
given rate; whoever receives it waits until then. The process ends when its pipe does, whatever
became of the other end, and its file has no name, so nothing is left behind. No torch here.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import IntEnum
from time import monotonic, sleep
from typing import BinaryIO

import numpy as np

from narrows.kv.instinfer_engine import DTYPES, Stream, dense, numbers, sparf, stored
from narrows.kv.instinfer_flash import Flash, Full

HEADER = struct.Struct("<4sHHIIIIIIIQdd")
"""Mark, verb, dtype, session, six numbers, bytes behind, scale, arrival."""

MARK = b"nrwd"
SIZE = 64
"""Bytes of a header; what the fields do not fill is empty."""


class Verb(IntEnum):
    """What the host asks, and how the drive answers."""

    FILL = 1
    STEP = 2
    PULL = 3
    TRUNCATE = 4
    ROWS = 5
    FREE = 6
    STATUS = 7
    DONE = 8
    FULL = 9
    BROKEN = 10


@dataclass(frozen=True, slots=True)
class Message:
    """A command or an answer.

    a, b, c, d, e, other: what the verb needs; see the functions below.
    """

    verb: Verb
    session: int = 0
    a: int = 0
    b: int = 0
    c: int = 0
    d: int = 0
    e: int = 0
    other: int = 0
    dtype: str = "fp32"
    scale: float = 0.0
    arrival: float = 0.0
    data: bytes = b""

    def head(self) -> bytes:
        """The 64 bytes in front."""
        names = list(DTYPES)
        told = HEADER.pack(
            MARK, self.verb, names.index(self.dtype), self.session, self.a, self.b, self.c,
            self.d, self.e, self.other, len(self.data), self.scale, self.arrival,
        )  # fmt: skip
        return told.ljust(SIZE, b"\0")


def receive(pipe: BinaryIO) -> Message | None:
    """The next message, when its data is through the link; None where the other end is gone."""
    head = exactly(pipe, SIZE)
    if head is None:
        return None
    mark, verb, dtype, session, a, b, c, d, e, other, size, scale, arrival = HEADER.unpack(
        head[: HEADER.size]
    )
    if mark != MARK:
        return None
    data = exactly(pipe, size)
    if data is None:
        return None
    left = arrival - monotonic()
    if left > 0:
        sleep(left)
    return Message(
        Verb(verb), session, a, b, c, d, e, other, list(DTYPES)[dtype], scale, arrival, data
    )


def exactly(pipe: BinaryIO, size: int) -> bytes | None:
    """So many bytes, or None where the pipe ends before."""
    if not size:
        return b""
    found = pipe.read(size)
    return found if found is not None and len(found) == size else None


@dataclass(slots=True)
class Session:
    """The streams of one layer of one cache, by row and KV head of this drive.

    r: channels of the queries, 0 where attention is dense. k: tokens, where it is 0 this share of
    those held. pages: whether whole pages are chosen instead of tokens.
    """

    streams: list[list[Stream]]
    dtype: str
    r: int
    k: int
    share: float
    pages: bool

    def each(self) -> list[Stream]:
        """All streams."""
        return [stream for row in self.streams for stream in row]


@dataclass
class Drive:
    """What the process holds and does."""

    flash: Flash
    strip: int
    sessions: dict[int, Session] = field(default_factory=dict[int, Session])

    def answer(self, asked: Message) -> Message:
        """Do what a command says; a command that finds no room changes nothing."""
        verbs: dict[Verb, Callable[[Message], Message]] = {
            Verb.FILL: self.fill, Verb.STEP: self.step, Verb.PULL: self.pull,
            Verb.TRUNCATE: self.truncate, Verb.ROWS: self.rows, Verb.FREE: self.free,
            Verb.STATUS: self.status,
        }  # fmt: skip
        begin = monotonic()
        try:
            told = verbs[asked.verb](asked)
        except Full as full:
            told = Message(Verb.FULL, data=str(full).encode())
        except Exception as error:  # the host must be told, whatever it is
            told = Message(Verb.BROKEN, data=f"{type(error).__name__}: {error}".encode())
        self.flash.settle(begin)
        return told

    def fill(self, asked: Message) -> Message:
        """A new session. a: rows, b: KV heads, c, d: widths of keys and values, e: k, other: twice
        r, and one more where pages are chosen, scale: share; see Session.

        Data: tokens of each stream (int32), then their keys, then their values.
        """
        rows, heads, width, value_width = asked.a, asked.b, asked.c, asked.d
        r = asked.other >> 1
        dtype = DTYPES[asked.dtype]
        counts = np.frombuffer(asked.data, np.int32, rows * heads)
        tokens = int(counts.sum())
        at = counts.nbytes
        keys = np.frombuffer(asked.data, dtype, tokens * width, at).reshape(-1, width)
        at += keys.nbytes
        values = np.frombuffer(asked.data, dtype, tokens * value_width, at)
        values = values.reshape(-1, value_width)
        strip = self.strip if r else 0
        streams = [
            [Stream(self.flash, width, value_width, dtype, strip) for _ in range(heads)]
            for _ in range(rows)
        ]
        made = Session(streams, asked.dtype, r, asked.e, asked.scale, bool(asked.other & 1))
        self.flash.reserve(sum(s.pages(int(n)) for s, n in zip(made.each(), counts, strict=True)))
        ends = np.cumsum(counts)
        for stream, end, count in zip(made.each(), ends, counts, strict=True):
            stream.append(keys[end - count : end], values[end - count : end])
        self.sessions[asked.session] = made
        return Message(Verb.DONE)

    def step(self, asked: Message) -> Message:
        """New tokens, and attention of their queries. a: tokens, b: query heads; none: store only.

        Data: queries (rows, heads, tokens, width), keys, values (rows, KV heads, tokens, width),
        as the model had them. Returns one vector for each query. Token by token, so that a query
        sees what came before it and nothing else.
        """
        session, new, heads = self.sessions[asked.session], asked.a, asked.b
        streams, dtype = session.streams, DTYPES[session.dtype]
        rows, kv_heads = len(streams), len(streams[0])
        width, value_width = streams[0][0].keys.width, streams[0][0].values.width
        shapes = [(rows, heads, new, width), (rows, kv_heads, new, width),
                  (rows, kv_heads, new, value_width)]  # fmt: skip
        parts: list[np.ndarray] = []
        at = 0
        for shape in shapes:
            parts.append(np.frombuffer(asked.data, dtype, int(np.prod(shape)), at).reshape(shape))
            at += parts[-1].nbytes
        queries, keys, values = numbers(parts[0]), parts[1], parts[2]
        self.flash.reserve(sum(s.pages(new) for s in session.each()))
        out = np.empty((rows, heads, new, value_width), np.float32)
        group = heads // kv_heads
        for b, row in enumerate(streams):
            for h, stream in enumerate(row):
                own = slice(h * group, (h + 1) * group)
                if not heads:
                    stream.append(keys[b, h], values[b, h])
                for i in range(new if heads else 0):
                    stream.append(keys[b, h, i : i + 1], values[b, h, i : i + 1])
                    out[b, own, i] = self._attend(session, stream, queries[b, own, i], asked.scale)
        return Message(Verb.DONE, data=stored(out, dtype).tobytes())

    def _attend(
        self, session: Session, stream: Stream, queries: np.ndarray, scale: float
    ) -> np.ndarray:
        if not session.r:
            return dense(stream, queries, scale)
        k = session.k or max(1, -int(-stream.count * session.share // 1))
        r = min(session.r, queries.shape[1])
        return sparf(stream, queries, scale, r, k, session.pages)

    def pull(self, asked: Message) -> Message:
        """All that a session holds, laid out as FILL's data is."""
        each = self.sessions[asked.session].each()
        counts = np.array([s.count for s in each], np.int32).tobytes()
        keys = b"".join(s.keys.span(0).tobytes() for s in each)
        return Message(
            Verb.DONE, data=counts + keys + b"".join(s.values.span(0).tobytes() for s in each)
        )

    def truncate(self, asked: Message) -> Message:
        """Forget the last tokens of every stream. a: how many."""
        for stream in self.sessions[asked.session].each():
            stream.truncate(stream.count - asked.a)
        return Message(Verb.DONE)

    def rows(self, asked: Message) -> Message:
        """A new session, `other`, with these rows of a session; flash is shared. Data: int32."""
        old = self.sessions[asked.session]
        order = np.frombuffer(asked.data, np.int32)
        streams = [[s.copy() for s in old.streams[i]] for i in order]
        self.sessions[asked.other] = replace(old, streams=streams)
        return Message(Verb.DONE)

    def free(self, asked: Message) -> Message:
        """Forget sessions. Data: int32."""
        for name in np.frombuffer(asked.data, np.int32).tolist():
            gone = self.sessions.pop(name, None)
            for stream in gone.each() if gone else ():
                stream.free()
        return Message(Verb.DONE)

    def status(self, asked: Message) -> Message:
        """Pages read and written, bytes asked for, what is held (by a session, where one is named)
        and whether reads are direct.
        """
        wear, named = self.flash.wear, self.sessions.get(asked.session)
        told = {
            "pages_read": wear.read, "pages_written": wear.written, "asked_bytes": wear.asked,
            "pages_used": self.flash.used,
            "session_pages": sum(s.held for s in named.each()) if named else 0,
            "page": self.flash.page, "direct": self.flash.direct,
        }  # fmt: skip
        return Message(Verb.DONE, data=json.dumps(told).encode())


def main(settings: str) -> None:
    """Serve until the host's end of the pipe is closed. settings: of the flash and link, JSON."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the host's to answer
    told = json.loads(settings)
    link, strip = told.pop("link"), told.pop("strip")
    # the answers' pipe is ours alone: what anybody prints goes elsewhere
    out = os.fdopen(os.dup(1), "wb", 0)
    os.dup2(2, 1)
    try:
        drive = Drive(Flash(**told), strip)
        ready = Message(Verb.DONE)
    except OSError as error:
        drive, ready = None, Message(Verb.BROKEN, data=str(error.strerror).encode())
    source = sys.stdin.buffer
    try:
        put(out, ready)
        while drive is not None:
            asked = receive(source)
            if asked is None:
                return
            answer = drive.answer(asked)
            if link:
                arrival = monotonic() + (len(answer.data) + SIZE) / link
                answer = Message(answer.verb, data=answer.data, arrival=arrival)
            put(out, answer)
    except BrokenPipeError:
        return


def put(pipe: BinaryIO, message: Message) -> None:
    """Write all of a message."""
    for part in (message.head(), message.data):
        left = memoryview(part)
        while left:
            left = left[pipe.write(left) :]


if __name__ == "__main__":
    main(sys.argv[1])
