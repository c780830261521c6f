"""The store of ALISA: chosen tokens are attended, none is evicted, and where they lie changes.

Tokens of one layer are in slots, ascending: dropped (only their states are kept), on the host, on
the device, and a few that do not fill a group of the codec yet, in full precision. Whatever a
step chooses is gathered from where it lies. Scales of the codec stay on the device: half a bit an
element, and fetching them token by token would outweigh the codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from narrows.core.errors import NarrowsError
from narrows.kv._again import Recompute
from narrows.kv._away import Pieces
from narrows.kv._base import Prompt
from narrows.kv._lately import Handover, History, prompt_rows
from narrows.kv._phases import Phases, window
from narrows.kv.body import Tail
from narrows.kv.codec import Affine, unfold
from narrows.kv.store_torch import Store, as_bias, attend
from narrows.kv.tier import Host, Room, Tier


class SparseStore(Store):
    """A Store whose steps attend to few tokens, which lie where a plan says.

    layer: index. sparsity, split: see _phases.window. codec: of whole groups of tokens, None: as
    they come. plan: None: all on the device. host: tier of those that are not. handover: brings
    what the policy saw of the prompt. recompute: needed where the plan drops tokens.
    """

    def __init__(
        self, layer: int, sparsity: float, split: float, codec: Affine | None = None,
        plan: Phases | None = None, host: Tier | None = None, handover: Handover | None = None,
        recompute: Recompute | None = None, history: Callable[[], History] = History,
    ) -> None:  # fmt: skip
        self.layer, self.sparsity, self.split = layer, sparsity, split
        self.codec, self.plan = codec, plan
        self.host = Host() if host is None else host
        self.handover = handover or Handover()
        self.recompute = recompute
        self.rule = history
        super().__init__()

    def clear(self) -> None:
        """Forget everything."""
        super().clear()
        self.history = self.rule()
        self.recent, self.body, self.scales, self.states = (Tail(0) for _ in range(4))
        self.far: Pieces | None = None
        self.saved: Room | None = None
        self.dropped = self.away = self.known = self.width = self.padded = 0
        self.chosen: torch.Tensor | None = None
        self._reading = False
        self._begun: list[torch.Tensor] = []
        self._asked: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    # --- writing ----------------------------------------------------------------------------------

    @property
    def group(self) -> int:
        """Tokens that are coded, and move, together."""
        return 1 if self.codec is None else self.codec.block

    @property
    def coded(self) -> int:
        """Slots that have left the recent part."""
        return self.held - self.recent.tokens

    def fill(
        self, keys: torch.Tensor, values: torch.Tensor, columns: torch.Tensor | None,
        valid: torch.Tensor | None,
    ) -> None:  # fmt: skip
        """See Store. Padding takes the place of a row's first token: it must not widen groups."""
        handed = self.handover.take(self.layer, keys)
        if self.plan is not None and self.plan.beta and columns is not None:
            raise NarrowsError(
                "alisa: tokens of which each head keeps its own are not made again from states; "
                "take a plan with beta = 0"
            )
        if self.codec is not None and valid is not None:
            first = valid.int().argmax(1)[:, None, None, None]
            hidden = ~valid[:, None, :, None]
            keys, values = (
                torch.where(hidden, x.gather(2, first.expand(-1, x.shape[1], 1, x.shape[3])), x)
                for x in (keys, values)
            )
        super().fill(keys, values, columns, valid)
        if handed is not None and columns is None:
            self.history.begin(handed.rows, self._sizes(self.held + 1)[1])
            if handed.hidden is not None:
                self._save(handed.hidden)
        self.settle()

    def append(
        self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None
    ) -> None:
        """See Store; on an empty store the first chunk of a prompt."""
        if not self.seen:
            self._reading = True
        super().append(keys, values, valid)

    def _write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.width = keys.shape[3]
        self.recent.append(torch.cat([keys, values], -1))
        self._keys = self._values = self.recent.buffer
        self.held += keys.shape[2]

    def _replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.recent, self.held, self._begun = Tail(0), 0, []
        self._write(keys, values)

    def witness(self, chunk: Prompt) -> None:
        """A chunk of a prompt was attended: remember the weights of its last queries."""
        count = min(int(self._sizes(self.held + 1)[1].max()), chunk.queries.shape[2])
        keys = self.recent.view[..., : self.width]
        valid = None
        if self._first is not None:
            valid = torch.arange(self.held, device=keys.device) >= self._first[:, None]
        self._begun.append(prompt_rows(chunk.queries, keys, chunk.scaling, valid, count))
        if chunk.hidden is not None:
            self._save(chunk.hidden)

    def _save(self, hidden: torch.Tensor) -> None:
        """Keep states of the oldest tokens, on the host until they are needed."""
        want = 0 if self.plan is None or self.recompute is None else self.plan.saved
        count = min(want - self.known, hidden.shape[1])
        if count <= 0:
            return
        if self.saved is None:
            shape = hidden.shape[0], 1, want, hidden.shape[2]
            self.saved = self.host.room(shape, hidden.dtype, hidden.device)
        self.saved.write(self.known, hidden[:, None, :count])
        self.known += count
        self._check(hidden, self.known - count, count)

    def _check(self, hidden: torch.Tensor, begin: int, count: int) -> None:
        """That the keys of this model are what its states give, seen on one token.

        Positions may count padding or not, as the caller told the model; what fits is taken.
        """
        assert self.recompute is not None
        at = begin + count - 1
        slot = torch.full((hidden.shape[0], 1, 1), at, device=hidden.device)
        own = self.recent.view[:, :, at : at + 1]
        rows = slice(None) if self._first is None else self._first <= at
        for self.padded in (0, 1):
            place = self._place(slot)[:, 0]
            off = (self.recompute(self.layer, hidden[:, count - 1 : count], place) - own)[rows]
            if not off.numel() or float(off.abs().max()) <= 0.02 * float(own.abs().max()):
                return
        raise NarrowsError(
            "alisa: keys and values made again from the states of this model are not its own; "
            "take a plan with beta = 0"
        )

    def settle(self) -> None:
        """Code whole groups of new tokens, and move what the plan wants elsewhere."""
        if self._reading:
            self._reading = False
            if self._begun:
                pad = torch.nn.functional.pad
                rows = [pad(x, (0, self.held - x.shape[3])) for x in self._begun]
                self.history.begin(torch.cat(rows, 2), self._sizes(self.held + 1)[1])
                self._begun = []
        due = self.recent.tokens // self.group * self.group
        if due:
            fresh = self.recent.view[:, :, :due]
            if self.codec is not None:
                codes, scale, low = self.codec.pack(fresh).parts
                self.scales.append(torch.cat([scale, low], -1))
                fresh = codes
            self.body.append(fresh)
            self.recent.leave(due)
            self._keys = self._values = self.recent.buffer
        if self.plan is not None:
            self._move(self.plan)

    def _move(self, plan: Phases) -> None:
        """Tokens to the host and off it, whole groups, as the next step's phase wants them."""
        recent = int(self._sizes(self.held + 1)[1].max())
        dropped, away = (int(x) for x in plan.place(self.held, recent))
        away = max(min(away, self.coded) // self.group * self.group, self.away)
        if away > self.away:
            fresh = self.body.view[:, :, : away - self.away]
            if self.far is None:
                expected = int(plan.alpha * (plan.prompt + plan.generate))
                self.far = Pieces(self.host, self.group, expected)
            self.far.send(fresh, self.away)
            self.body.leave(away - self.away)
            self.away = away
        dropped = min(dropped, self.known) // self.group * self.group
        if dropped > self.dropped:
            assert self.saved is not None
            self.states.append(self.saved.read(self.dropped, dropped))
            if self.codec is not None:
                self.scales.leave((dropped - self.dropped) // self.group)
            self.dropped = dropped
            if self.far is not None:
                self.far.forget(dropped)

    # --- reading ----------------------------------------------------------------------------------

    def attend(
        self, queries: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
    ) -> torch.Tensor:
        """See Store: each query attends to what it chooses; a prompt in chunks to everything."""
        if not self.held:
            raise NarrowsError("the cache is empty: there is nothing to attend to")
        tokens = queries.shape[2]
        mask = self.mask(mask, tokens)
        if self._reading or not self.sparsity:
            everything = self._whole()
            keys, values = everything[..., : self.width], everything[..., self.width :]
            return attend(queries, keys.to(queries.dtype), values.to(queries.dtype), mask, scaling)
        scale = queries.shape[3] ** -0.5 if scaling is None else scaling
        made: list[torch.Tensor] = []
        for i in range(tokens):
            visible = self.held - tokens + 1 + i
            row = None if mask is None else mask[:, :, i : i + 1, :visible]
            made.append(self._step(queries[:, :, i : i + 1], row, scale, visible))
        return torch.cat(made, 2)

    def _step(
        self, queries: torch.Tensor, mask: torch.Tensor | None, scaling: float, visible: int
    ) -> torch.Tensor:
        """Attention of one query over its choice of the first `visible` slots."""
        batch, heads, _, size = queries.shape
        kv_heads = self.recent.view.shape[1]
        slots = self.chosen = self.choose(visible)
        taken = self.take(slots).float()
        asked = queries.float().reshape(batch, kv_heads, heads // kv_heads, size) * scaling
        scores = asked @ taken[..., : self.width].transpose(2, 3)
        bias = as_bias(mask, kv_heads, heads // kv_heads, 1)
        if bias is not None:
            at = slots.clamp(min=0)[:, :, None]
            shape = batch, max(bias.shape[1], slots.shape[1])
            bias = bias.expand(*shape, *bias.shape[2:])
            at = at.expand(*shape, bias.shape[2], -1)
            scores = scores + bias.gather(3, at)
        scores = scores.masked_fill((slots < 0)[:, :, None], -torch.inf)
        weights = scores.softmax(-1)
        mean = weights.mean(2)
        if slots.shape[1] == 1:
            mean = mean.mean(1, keepdim=True)
        self.history.push(slots, mean, self._sizes(visible + 1)[1])
        out = weights @ taken[..., self.width :]
        return out.to(queries.dtype).reshape(batch, heads, 1, out.shape[3])

    def choose(self, visible: int) -> torch.Tensor:
        """Slots that a step attends to, (batch, heads, k) int64 ascending, -1 where a row has less.

        From what earlier steps looked at; without any (another policy chose from the prompt) all.
        """
        total, recent = self._sizes(visible)
        begin = self._begins()
        length = torch.arange(visible, device=self._device)
        if not self.history.rows:
            slots = length.expand(*begin.shape, -1)
            return slots.masked_fill(slots < self._tensor(begin), -1)
        dynamic = total - recent
        most, near = int(dynamic.max()), int(recent.max())
        outside = (length < self._tensor(begin)) | (length >= self._tensor(visible - recent))
        ranks = self.history.ranks(visible).masked_fill(outside, -1)
        best = ranks.topk(most, -1).indices
        best = best.masked_fill(
            torch.arange(most, device=self._device) >= self._tensor(dynamic), -1
        )
        last = length[visible - near :].expand(*begin.shape, -1)
        last = last.masked_fill(last < self._tensor(visible - recent), -1)
        return torch.cat([best, last], -1).sort(-1).values

    def take(self, slots: torch.Tensor) -> torch.Tensor:
        """Keys beside values of these slots (batch, 1 or kv_heads, k ascending), from their tiers.

        (batch, kv_heads, k, 2 * head_dim); nothing in place of slots below 0. What is elsewhere is
        taken row by row, no more than is asked for. On the device runs are as long as the longest
        of any row: what is too much of one is overwritten by the next, which covers what follows.
        """
        batch, kv_heads = self.recent.view.shape[:2]
        shape = batch, kv_heads, slots.shape[2]
        at = slots.clamp(min=0)
        made: torch.Tensor | None = None
        for begin, end, read in (
            (self.away, self.coded, self._near), (self.coded, self.held, self._full)
        ):  # fmt: skip
            most = int(((at >= begin) & (at < end)).sum(-1).max()) if end > begin else 0
            if not most:
                continue
            run = (at < begin).sum(-1, keepdim=True) + torch.arange(most, device=at.device)
            run = run.clamp(max=shape[2] - 1)
            found = read(at.gather(-1, run).clamp(begin, end - 1))
            if made is None:
                made = found.new_zeros((*shape, found.shape[3]))
            to = run.expand(batch, kv_heads, -1)[..., None].expand(-1, -1, -1, found.shape[3])
            made.scatter_(2, to, found.expand(batch, kv_heads, -1, -1).to(made.dtype))
        for begin, end, read in (
            (0, self.dropped, self._made_again), (self.dropped, self.away, self._fetched)
        ):  # fmt: skip
            inside = (slots >= begin) & (slots < end)
            if end > begin and bool(inside.any()):
                found = read(inside, slots)
                if made is None:
                    made = found.new_zeros((*shape, found.shape[1]))
                made[inside.expand(shape)] = found.to(made.dtype)
        assert made is not None
        return made

    def _made_again(self, inside: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Rows of all heads for the slots that are dropped, (batch, kv_heads, k) flattened."""
        assert self.recompute is not None
        row, place = inside[:, 0].nonzero(as_tuple=True)
        states = self.states.view[row, 0, slots[row, 0, place]]
        positions = self._place(slots)[row, 0, place]
        found = self.recompute(self.layer, states[None], positions[None])[0]
        shape = *self.recent.view.shape[:2], slots.shape[2]
        made = found.new_empty((shape[0], shape[2], shape[1], found.shape[2]))
        made[row, place] = found.transpose(0, 1)
        return made.transpose(1, 2)[inside.expand(shape)]

    def _fetched(self, inside: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """As _made_again, for those on the host."""
        assert self.far is not None
        inside = inside.expand(*self.recent.view.shape[:2], -1)
        row, head, place = inside.nonzero(as_tuple=True)
        chosen = slots.expand(inside.shape)[row, head, place]
        codes = self.far.take(row * inside.shape[1] + head, chosen)
        if self.codec is None:
            return codes
        group = chosen // self.group - self.dropped // self.group
        scale, low = self.scales.view[row, head, group].float().chunk(2, -1)
        return unfold(codes, self.codec.bits).float() * scale + low

    def _near(self, slots: torch.Tensor) -> torch.Tensor:
        codes = _rows(self.body.view, slots - self.away)
        if self.codec is None:
            return codes
        rows = _rows(self.scales.view, slots // self.group - self.dropped // self.group)
        scale, low = rows.float().chunk(2, -1)
        return unfold(codes, self.codec.bits).float() * scale + low

    def _full(self, slots: torch.Tensor) -> torch.Tensor:
        return _rows(self.recent.view, slots - self.coded)

    def _place(self, slots: torch.Tensor) -> torch.Tensor:
        """The position each slot was given, padding counted where the caller counted it."""
        return (
            slots
            if self._first is None or self.padded
            else (slots - self._first[:, None, None]).clamp(min=0)
        )

    def _begins(self) -> np.ndarray:
        """The first slot that holds a token, (batch, 1 or kv_heads)."""
        if self.columns is not None:
            return (self.columns < 0).sum(-1).cpu().numpy()
        if self._first is not None:
            return self._first.cpu().numpy()[:, None]
        return np.zeros((self.batch, 1), np.int64)

    def _sizes(self, visible: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that a step attends to, and the recent ones of them, by row."""
        if visible not in self._asked:  # the same is asked a few times around each step
            self._asked = {n: x for n, x in self._asked.items() if abs(n - visible) < 3}
            self._asked[visible] = window(visible - self._begins(), self.sparsity, self.split)
        return self._asked[visible]

    def _tensor(self, x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x))[..., None].to(self._device)

    def _whole(self) -> torch.Tensor:
        """Everything, in order."""
        if self._reading:
            return self.recent.view
        slots = torch.arange(self.held, device=self._device)
        return self.take(slots.expand(self.batch, 1, -1))

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys held, unpacked, fetched and made again for inspection: a copy; None: empty."""
        return self._whole()[..., : self.width] if self.held else None

    @property
    def values(self) -> torch.Tensor | None:
        """The values held, as keys."""
        return self._whole()[..., self.width :] if self.held else None

    # --- bookkeeping ------------------------------------------------------------------------------

    def tiers(self) -> dict[str, int]:
        """See Store: codes, scales, full tokens and states that serve; what waits on the host."""
        near = sum(x.nbytes() for x in (self.recent, self.body, self.scales, self.states))
        far = 0 if self.far is None else self.far.nbytes(self.dropped, self.away)
        if self.saved is not None:
            far += self.saved.nbytes() // self.saved.shape[2] * (self.known - self.dropped)
        told = {"device": near}
        told[self.host.name] = told.get(self.host.name, 0) + far
        return told

    def nbytes(self) -> int:
        """Bytes held in all tiers (history, spare room and column numbers not counted)."""
        return sum(self.tiers().values())

    def reserved_bytes(self) -> int:
        """Bytes really allocated, the history included."""
        parts = sum(x.reserved_bytes() for x in (self.recent, self.body, self.scales, self.states))
        rooms = 0 if self.saved is None else self.saved.nbytes()
        rooms += 0 if self.far is None else self.far.reserved_bytes()
        columns = 0 if self.columns is None else self.columns.numel() * self.columns.element_size()
        return parts + rooms + columns + self.history.nbytes()

    def crop(self, tokens: int) -> None:
        """Take back the last `tokens`, of those that are in full precision and on the device.

        Steps that had left the history to make room for theirs are not there again.
        """
        free = self.recent.tokens + (self.body.tokens if self.codec is None else 0)
        if tokens > free:
            raise NarrowsError(
                f"{tokens} tokens were to be taken back, but only {free} are not packed or moved "
                "yet; start a new cache instead"
            )
        super().crop(tokens)
        some = min(tokens, self.recent.tokens)
        self.recent.end -= some
        self.body.end -= tokens - some
        self.history.crop(tokens, self._sizes(self.held + 1)[1])

    def rows(self, index: torch.Tensor) -> None:
        """Take (also several times) or reorder rows of the batch."""
        if self._keys is None:
            return
        index, self._asked = index.to(self._device), {}
        if self.saved is not None:
            self.saved = self.saved.select(index)
        if self.far is not None:
            self.far = self.far.selected(index, self.dropped, self.away)
        for part in (self.recent, self.body, self.scales, self.states, self.history):
            part.select(index)
        self._keys = self._values = self.recent.buffer
        self._rows(index)

    def state(self) -> dict[str, Any]:
        """See Store."""
        told: dict[str, Any] = {
            "seen": self.seen, "held": self.held, "dropped": self.dropped, "away": self.away,
            "known": self.known, "width": self.width, "padded": self.padded,
        }  # fmt: skip
        for name in ("recent", "body", "scales", "states"):
            if getattr(self, name).buffer is not None:
                told[name] = getattr(self, name).view
        if self.far is not None and self.away > self.dropped:
            told["far"] = self.far.read(self.dropped, self.away)
        if self.saved is not None:
            told["saved"] = self.saved.read(0, self.known)
        rows = self.history.dense(self.held)
        if rows is not None:
            told["history"] = rows
        return told | self._told()

    def restore(self, state: dict[str, Any]) -> None:
        """See Store."""
        self.clear()
        for name in ("recent", "body", "scales", "states"):
            if name in state:
                getattr(self, name).append(state[name])
        self._keys = self._values = self.recent.buffer
        self._know(state)
        for name in ("dropped", "away", "known", "width", "padded"):
            setattr(self, name, state[name])
        if "far" in state:
            self.far = Pieces(self.host, self.group, self.away)
            self.far.send(state["far"], self.dropped)
        if "saved" in state:
            x = state["saved"]
            self.saved = self.host.room(tuple(x.shape), x.dtype, x.device)
            self.saved.write(0, x)
        if "history" in state:
            self.history.begin(state["history"], self._sizes(self.held + 1)[1])


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of (batch, kv_heads, rows, width) by index (batch, 1 or kv_heads, k)."""
    index = index.expand(*x.shape[:2], -1)
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]))
