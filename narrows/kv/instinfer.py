"""InstInfer: attention inside the storage drive, over flash pages (arXiv 2409.04992).

Narrow point: a cache too large for memory lies in drives, and every decoded token pulls all of it
over their link to the host; capacity is cheap there, the link is not.

Mechanism. Computational drives hold the cache, KV heads shared out over them. Prefill runs where
the model is, and each layer's keys and values go to the drives as they are made. At decode the
query, key and value of the new token go there and one vector a head comes back: bytes of
activations instead of bytes of the cache; what limits is flash inside the drive. SparF reads less
of it: the r largest channels of the query are multiplied with a copy of the keys that lies by
channel (softmax at a temperature that makes up for the other channels); of the k heaviest tokens
keys and values are read, in whole pages, and attended exactly; the mean of all values stands for
the weight of the others. Pages are written when they are full.

It hurts wherever the cache fits a faster memory (flash is a hundred times slower than HBM), with
few sequences, in prompts whose pages never fill, where chosen tokens are spread so that nearly
every page is touched (`pages=True` chooses pages instead), and where attention is flat, because
what is not chosen is told by its mean only. Keys are stored twice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.core.method import Price
from narrows.kv._base import KVTechnique, Prompt
from narrows.kv._coded import PARTS, cached, in_full
from narrows.kv._instinfer import CLUSTERED, CSD, FLASH, offloaded, per_page, reads

if TYPE_CHECKING:
    import torch

    from narrows.kv.store_torch import Store


class InstInfer(KVTechnique):
    """Keeps the cache of every layer that attends to all tokens in computational drives.

    compression: share of channels and of tokens that SparF reads, as one over it; 1: dense
    attention, everything is read. r, k: channels and tokens themselves, instead. pages: choose
    whole pages. drives: how many. drive: what they are; its pages, strips and capacity hold when
    run here, its rates too where `throttled`. folder: where run here the file of a drive is made
    (it has no name and goes with its process); the system's for temporary files if None.
    direct: read it past the page cache, where the folder allows that.
    """

    key = "instinfer"
    paper = "arXiv:2409.04992"
    relieves = "link"
    stepwise = True
    price = Price(
        quality="tokens that are not chosen are told by the mean of their values; none if dense",
        memory="in the drives: keys twice; a page of keys and one of values a head in their DRAM",
    )

    def __init__(
        self,
        compression: float = 8,
        r: int | None = None,
        k: int | None = None,
        pages: bool = False,
        drives: int = 1,
        drive: CSD | None = None,
        folder: str | None = None,
        throttled: bool = False,
        direct: bool = True,
    ) -> None:
        number = isinstance(compression, int | float | np.number)
        if not number or isinstance(compression, bool) or not 1 <= compression < float("inf"):
            raise NarrowsError(
                f"instinfer: compression must be a number from 1 (dense) up, not {compression!r}"
            )
        for name, value in (("r", r), ("k", k), ("drives", drives)):
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if value is None and name != "drives":
                continue
            if not whole or not 1 <= int(value or 0) < 2**31:
                raise NarrowsError(
                    f"instinfer: {name} must be a whole number from 1 up, not {value!r}"
                )
        if drive is not None and not isinstance(drive, CSD):
            raise NarrowsError(f"instinfer: drive must be a CSD, not {drive!r}")
        self.compression, self.r, self.k, self.pages = float(compression), r, k, bool(pages)
        self.drives, self.drive = int(drives), drive or CSD()
        self.folder, self.throttled, self.direct = folder, bool(throttled), bool(direct)
        self._running: tuple[Any, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_running": ()}  # a copy elsewhere starts drives of its own

    @classmethod
    def variants(cls, case: Case) -> tuple[InstInfer, ...]:
        """The default; whole pages; dense attention, which loses nothing; four drives."""
        return cls(), cls(pages=True), cls(1), cls(drives=4)

    @classmethod
    def ladder(cls, case: Case) -> tuple[InstInfer, ...]:
        """Less and less read."""
        return cls(1), cls(4), cls(8), cls(8, pages=True), cls(16, pages=True)

    @property
    def dense(self) -> bool:
        """Whether everything is read."""
        return self.compression == 1 and self.r is None and self.k is None

    def channels(self, head_dim: int) -> int:
        """Channels of a query that are scored; 0 where attention is dense."""
        if self.dense:
            return 0
        return min(self.r or max(1, round(head_dim / self.compression)), head_dim)

    def on_prefill_end(self, prompt: Prompt) -> torch.Tensor | None:
        """Nothing is dropped."""
        return None

    def running(self) -> tuple[Any, ...]:
        """The drives, as processes here; made when first asked for, and anew where one ended."""
        if not self._running or not all(drive.alive for drive in self._running):
            from narrows.kv.instinfer_host import ComputationalDrive

            told, machine = {}, self.drive
            if self.throttled:
                told = {"link": machine.link, "internal": machine.internal}
            folder = self.folder or tempfile.gettempdir()
            self._running = tuple(
                ComputationalDrive(folder, machine.page, machine.strip, machine.capacity,
                                   direct=self.direct, **told)
                for _ in range(self.drives)
            )  # fmt: skip
        return self._running

    def store(self, config: Any, layer: int = 0) -> Store:
        """A store in the drives."""
        from narrows.kv.instinfer_torch import InStorageStore

        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        share = 0.0 if self.k else 1 / self.compression
        return InStorageStore(self.running(), self.channels(size), self.k or 0, share, self.pages)

    def predict(self, case: Case) -> Case:
        """The case with its cache and decode attention in drives beside the machine.

        Bytes of flash are of whole pages. Nothing overlaps: an upper bound of prefill. The same
        case where the cache does not lie on the device.
        """
        facts, work = self._facts(case), case.workload
        if work.tensors[f"kv.{PARTS[0]}.key"].tier != "device":
            return case
        cache = work.tensors[f"kv.{PARTS[0]}.key"]
        size, bits = int(facts["head_dim"]), cache.codec.bits_per_element
        seen = np.asarray(cache.extent("token") + np.asarray(facts["generate"]) / 2)
        r = self.channels(size)
        share = 1 / self.compression
        if self.k:
            share = min(1.0, self.k / max(float(np.mean(seen)), 1.0))
        block = int(per_page(self.drive.page, self.drive.strip, bits))
        young = in_full(cache.extent("token"), facts["generate"],
                        lambda seen: {"key": seen % block})  # fmt: skip
        found = reads(self.drive, size, bits, r, share, self.pages, CLUSTERED)
        work = offloaded(work, found, r, share, young)
        parameters = {"compression": self.compression, "r": r, "k": self.k or 0,
                      "pages": self.pages, "drives": self.drives}  # fmt: skip
        plan = case.plan.with_policy("place", self.key, **parameters)
        return replace(
            case, workload=work, plan=plan, machine=self.drive.beside(case.machine, self.drives)
        )

    def why(self, case: Case) -> str:
        """One sentence with the bytes that leave the device and the seconds flash takes."""
        facts, after = self._facts(case), self.predict(case)
        if after is case:
            return "the cache does not lie on the device: nothing changes"
        held = float(np.max(sum(t.bytes() for t in after.workload.role("kv") if t.tier == FLASH)))
        told = (
            f"moves the cache, {held / 1e9:.3g} GB with the keys' second copy, into the drives "
            f"({self.drives} that compute, hardware of their own)"
        )
        if float(np.max(facts["generate"])) < 1:
            return f"{told}; nothing is decoded, so only memory is saved"
        before, then = (c.bound().phase("decode").seconds for c in (case, after))
        fits = case.bound().fits
        if fits and then > before:
            return (f"{told}, but it fits the device, where a decoded token takes "
                    f"{before / then:.1%} of what flash takes")  # fmt: skip
        return f"{told}; decode then takes {then / before:.3g} times what device memory would take"

    def _facts(self, case: Case) -> Mapping[str, Any]:
        """What is known of the load; NarrowsError where there is no cache to move."""
        return cached(case, self.key, "move")


def mended(cache: Any) -> int:
    """Take a cache whose step failed part-way (a full drive) back to what all layers hold.

    Returns the tokens held then. NarrowsError where a drive is gone.
    """
    from narrows.kv.adapter import stores

    layers = stores(cache)
    least = min((store.seen for store in layers), default=0)
    for store in layers:
        if store.seen > least:
            store.crop(store.seen - least)
    return least
