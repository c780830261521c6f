"""The cache of one layer in computational drives: tokens go there and only answers come back."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from narrows.core.errors import NarrowsError
from narrows.kv.instinfer_drive import Message, Verb
from narrows.kv.instinfer_host import ComputationalDrive, share_heads
from narrows.kv.store_torch import Store

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class InStorageStore(Store):
    """A Store whose tokens lie in drives, KV heads shared out over them.

    r, k, share, pages: of SparF; see instinfer_drive.Session. r = 0: dense attention. Padding is
    never sent: what a drive holds of a row is its tokens, of a head those that were kept of it.
    """

    def __init__(
        self, drives: Sequence[ComputationalDrive], r: int = 0, k: int = 0, share: float = 0.0,
        pages: bool = False,
    ) -> None:  # fmt: skip
        self.drives = tuple(drives)
        self.settings = r, k, share, pages
        self._sessions: _Sessions | None = None
        super().__init__()

    def clear(self) -> None:
        """Forget everything, in the drives too."""
        self._pending: tuple[torch.Tensor, torch.Tensor] | None = None
        self._drop()
        super().clear()

    def _drop(self) -> None:
        if self._sessions is not None:
            self._sessions.free()
        self._sessions = None

    def _parts(self) -> Iterator[tuple[ComputationalDrive, slice, int]]:
        """Drives that hold something, their KV heads and session."""
        assert self._sessions is not None
        yield from self._sessions.parts

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys held, pulled over the link for inspection: a copy, zeros in empty slots."""
        return None if self._sessions is None else self.pulled()[0]

    @property
    def values(self) -> torch.Tensor | None:
        """The values held, as keys."""
        return None if self._sessions is None else self.pulled()[1]

    def fill(
        self, keys: torch.Tensor, values: torch.Tensor, columns: torch.Tensor | None,
        valid: torch.Tensor | None,
    ) -> None:  # fmt: skip
        """See Store. What a row or head keeps goes to its drive; NarrowsError where it is full."""
        self.clear()
        first = None
        if valid is not None:
            first = valid.int().argmax(1)
            place = torch.arange(valid.shape[1], device=valid.device)
            if not torch.equal(valid, place >= first[:, None]):
                raise NarrowsError("padding lies between tokens, which a drive does not store; "
                                   "pad on the left")  # fmt: skip
        seen, counts = keys.shape[2], None
        if columns is not None:
            index = columns.long().clamp(min=0).unsqueeze(-1)
            keys, values = (
                x.gather(2, index.expand(*columns.shape, x.shape[3])) for x in (keys, values)
            )
            counts = (columns >= 0).sum(2)
        elif first is not None:
            counts = (seen - first)[:, None].expand(keys.shape[:2])
        self._ship(keys, values, counts)
        self.seen, self.held, self._first = seen, keys.shape[2], first
        if columns is not None:
            self.columns, self._holes = columns.int(), bool((columns < 0).any())

    def _ship(self, keys: torch.Tensor, values: torch.Tensor, counts: torch.Tensor | None) -> None:
        """New sessions with the last `counts` (batch, kv_heads) of these tokens; None: all."""
        if keys.dtype not in DTYPES:
            raise NarrowsError(f"a drive stores {', '.join(DTYPES.values())}, not {keys.dtype}")
        batch, heads, tokens, width = keys.shape
        every = torch.full((batch, heads), tokens) if counts is None else counts.cpu()
        each = every.int()
        r, k, share, pages = self.settings
        made = _Sessions(self.drives, heads)
        asked: list[Message] = []
        for _, own, session in made.parts:
            some = each[:, own]
            data = some.contiguous().numpy().tobytes() + b"".join(
                _ragged(x[:, own], some) for x in (keys, values)
            )
            asked.append(Message(
                Verb.FILL, session, batch, some.shape[1], width, values.shape[3],
                k, 2 * min(r, width) + pages, DTYPES[keys.dtype], share, data=data,
            ))  # fmt: skip
        try:
            _together(made.parts, asked)
        except NarrowsError:
            made.free()
            raise
        self._sessions = made
        self._keys, self._values = keys[:, :, :0].clone(), values[:, :, :0].clone()
        self._stored, self._least = int(each.sum()), int(each.min())

    def append(
        self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None
    ) -> None:
        """Tokens that follow: they wait for the queries that go to the drives with them."""
        if self._sessions is None:
            self.fill(keys, values, None, valid)
            return
        self._flush()
        self._pending = keys, values
        self.seen += keys.shape[2]
        self.held += keys.shape[2]

    def attend(
        self, queries: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
    ) -> torch.Tensor:
        """See Store: queries, keys and values of new tokens go, one vector a query comes back.

        NarrowsError where a drive is full or gone; this layer is then as before the tokens.
        """
        if self._sessions is None:
            raise NarrowsError("the cache is empty: there is nothing to attend to")
        batch, _, new, width = queries.shape
        if self._pending is None or self._pending[0].shape[2] != new:
            raise NarrowsError("a drive answers the queries of the tokens that were added last")
        try:
            self._follows(mask, new)
            told = self._step(queries, width**-0.5 if scaling is None else scaling)
        except NarrowsError:
            self._take_back()
            raise
        self._settled(new)
        assert self._values is not None
        shape = batch, -1, new, self._values.shape[3]
        parts = [
            torch.frombuffer(bytearray(t.data), dtype=queries.dtype).reshape(shape) for t in told
        ]
        return torch.cat(parts, 1).to(queries.device)

    def _step(self, queries: torch.Tensor | None, scale: float) -> list[Message]:
        assert self._pending is not None
        keys, values = self._pending
        new, group = keys.shape[2], 0 if queries is None else queries.shape[1] // keys.shape[1]
        asked: list[Message] = []
        for _, own, session in self._parts():
            data = b"" if queries is None else _bytes(
                queries[:, own.start * group : own.stop * group].to(keys.dtype)
            )  # fmt: skip
            data += _bytes(keys[:, own]) + _bytes(values[:, own])
            asked.append(Message(Verb.STEP, session, new, group * (own.stop - own.start),
                                 scale=scale, data=data))  # fmt: skip
        return _together(list(self._parts()), asked, undo=lambda s: Message(Verb.TRUNCATE, s, new))

    def _settled(self, new: int) -> None:
        assert self._keys is not None
        self._pending = None
        self._stored += new * self._keys.shape[0] * self._keys.shape[1]
        self._least += new

    def _take_back(self) -> None:
        assert self._pending is not None
        new, self._pending = self._pending[0].shape[2], None
        self.seen -= new
        self.held -= new

    def _flush(self) -> None:
        """Tokens that nothing attended go to the drives all the same."""
        if self._pending is None:
            return
        new = self._pending[0].shape[2]
        try:
            self._step(None, 0.0)
        except NarrowsError:
            self._take_back()
            raise
        self._settled(new)

    def _follows(self, mask: torch.Tensor | None, new: int) -> None:
        """NarrowsError where a mask hides more than padding and what comes later."""
        if mask is None:
            if self._first is not None and bool((self._first > 0).any()):
                raise NarrowsError("the prompt was padded, but no mask says so now: pass the same "
                                   "attention_mask, one column longer for each token")  # fmt: skip
            return
        given = mask[..., : self.seen]
        given = given if given.dtype == torch.bool else given > torch.finfo(given.dtype).min / 2
        column = torch.arange(self.seen, device=given.device)
        row = column[self.seen - new :]
        sees = (column <= row[:, None])[None, None]
        if self._first is not None:
            sees = sees & (column >= self._first.to(given.device)[:, None, None, None])
        if not bool((given == sees).all()):
            raise NarrowsError("the attention mask hides tokens other than padding on the left "
                               "and later ones, which a drive cannot follow")  # fmt: skip

    def keep(self, slots: torch.Tensor) -> None:
        """Not here: flash is written once."""
        raise NarrowsError(
            "tokens that lie in a drive are not chosen from again; let a policy choose at the end "
            "of the prompt"
        )

    def pulled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values over the link, (batch, kv_heads, held, width); see keys."""
        self._flush()
        assert self._keys is not None
        assert self._values is not None
        made = [x.new_zeros((*x.shape[:2], self.held, x.shape[3])).cpu()
                for x in (self._keys, self._values)]  # fmt: skip
        parts = list(self._parts())
        told = _together(parts, [Message(Verb.PULL, session) for _, _, session in parts])
        for (_, own, _), answer in zip(parts, told, strict=True):
            rows, heads = made[0].shape[0], own.stop - own.start
            counts = np.frombuffer(answer.data, np.int32, rows * heads)
            data, at = bytearray(answer.data), counts.nbytes
            for x in made:
                for i, count in enumerate(counts.tolist()):
                    size = count * x.shape[3]
                    if size:
                        found = torch.frombuffer(data, dtype=x.dtype, count=size, offset=at)
                        row, head = divmod(i, heads)
                        x[row, own.start + head, self.held - count :] = found.view(count, -1)
                    at += size * x.element_size()
        return made[0].to(self._device), made[1].to(self._device)

    def nbytes(self) -> int:
        """Bytes of keys and values held, padding not stored (nor the keys' second copy counted)."""
        if self._keys is None or self._values is None:
            return 0
        waiting = 0 if self._pending is None else self._pending[0].shape[2]
        waiting *= self._keys.shape[0] * self._keys.shape[1]
        width = self._keys.shape[3] + self._values.shape[3]
        return (self._stored + waiting) * width * self._keys.element_size()

    def tiers(self) -> dict[str, int]:
        """See Store."""
        return {"drive": self.nbytes()}

    def reserved_bytes(self) -> int:
        """Bytes of flash taken, the keys' second copy included, and of column numbers."""
        columns = 0 if self.columns is None else self.columns.numel() * self.columns.element_size()
        if self._sessions is None:
            return columns
        told = (drive.status(session) for drive, _, session in self._parts())
        return columns + sum(t["session_pages"] * t["page"] for t in told)

    def crop(self, tokens: int) -> None:
        """Take back the last `tokens`; of a prompt that was cut or padded, not beyond its rows."""
        if self._sessions is None:
            super().crop(tokens)
            return
        self._flush()
        if self.columns is None and tokens > self._least:
            raise NarrowsError(
                f"{tokens} tokens were to be taken back, but a row has only {self._least}; start a "
                "new cache instead"
            )
        before = self.seen, self.held
        super().crop(tokens)
        parts = list(self._parts())
        try:
            _together(parts, [Message(Verb.TRUNCATE, s, tokens) for _, _, s in parts])
        except NarrowsError:
            self.seen, self.held = before
            raise
        self._settled(-tokens)

    def rows(self, index: torch.Tensor) -> None:
        """Take (also several times) or reorder rows of the batch: flash is shared, not copied."""
        if self._keys is None or self._values is None or self._sessions is None:
            return
        self._flush()
        index = index.to(self._device)
        counts = self._counts()[index.cpu()]
        made = self._sessions.rows(index)
        self._drop()
        self._sessions = made
        self._keys = self._keys.index_select(0, index)
        self._values = self._values.index_select(0, index)
        self._stored, self._least = int(counts.sum()), int(counts.min())
        self._rows(index)

    def _counts(self) -> torch.Tensor:
        """Tokens of each stream, (batch, kv_heads)."""
        return (self.positions() >= 0).sum(2).cpu()

    def __deepcopy__(self, memo: dict[int, Any]) -> InStorageStore:
        self._flush()
        made = InStorageStore(self.drives, *self.settings)
        own = {n: x for n, x in vars(self).items() if n not in ("drives", "_sessions")}
        vars(made).update({n: x.clone() if isinstance(x, torch.Tensor) else x
                           for n, x in own.items()})  # fmt: skip
        if self._sessions is not None:
            made._sessions = self._sessions.rows(torch.arange(self.batch))
        return made

    def state(self) -> dict[str, Any]:
        """See Store."""
        told: dict[str, Any] = {"seen": self.seen, "held": self.held}
        if self._sessions is not None:
            keys, values = self.pulled()
            told |= {"keys": keys, "values": values, "counts": self._counts()}
        return told | self._told()

    def restore(self, state: dict[str, Any]) -> None:
        """See Store."""
        self.clear()
        if "keys" in state:
            self._ship(state["keys"], state["values"], state["counts"])
        self._know(state)


class _Sessions:
    """What a store holds in its drives; let go of when the store is."""

    def __init__(self, drives: Sequence[ComputationalDrive], heads: int) -> None:
        self.heads = heads
        self.parts = [
            (drive, own, drive.name())
            for drive, own in zip(drives, share_heads(heads, drives), strict=True)
            if own.stop > own.start
        ]
        self.free = weakref.finalize(self, _forget, [(d, s) for d, _, s in self.parts])
        self.free.atexit = False  # drives end then, with all they hold

    def rows(self, index: torch.Tensor) -> _Sessions:
        """Sessions with these rows of every stream."""
        made = _Sessions([d for d, _, _ in self.parts], self.heads)
        data = index.cpu().int().contiguous().numpy().tobytes()
        asked = [
            Message(Verb.ROWS, old, other=new, data=data)
            for (_, _, old), (_, _, new) in zip(self.parts, made.parts, strict=True)
        ]
        _together(made.parts, asked)
        return made


def _forget(sessions: list[tuple[ComputationalDrive, int]]) -> None:
    for drive, session in sessions:
        drive.forget(session)


def _together(
    parts: Sequence[tuple[ComputationalDrive, slice, int]], asked: Sequence[Message],
    undo: Any = None,
) -> list[Message]:  # fmt: skip
    """Answers of drives that work at the same time; where one fails the others undo theirs."""
    sent: list[ComputationalDrive] = []
    failed: NarrowsError | None = None
    for (drive, _, _), message in zip(parts, asked, strict=True):
        try:
            drive.send(message)
        except NarrowsError as error:
            failed = error
            break
        sent.append(drive)
    told: list[Message] = []
    done: list[tuple[ComputationalDrive, int]] = []
    for drive, (_, _, session) in zip(sent, parts, strict=False):
        try:
            told.append(drive.receive())
            done.append((drive, session))
        except NarrowsError as error:
            failed = failed or error
    if failed is not None:
        for drive, session in done if undo else ():
            drive.ask(undo(session))
        raise failed
    return told


def _bytes(x: torch.Tensor) -> bytes:
    return x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _ragged(x: torch.Tensor, counts: torch.Tensor) -> bytes:
    """The last `counts` (batch, heads) of the tokens of each stream, one behind the other."""
    if bool((counts == x.shape[2]).all()):
        return _bytes(x)
    return b"".join(
        _bytes(x[b, h, x.shape[2] - n :])
        for b, row in enumerate(counts.tolist()) for h, n in enumerate(row)
    )  # fmt: skip
