"""Stacks: one policy chooses the tokens, another says what they are stored in, in some tier.

They touch different axes of one tensor (tokens, bits, place), so their bytes multiply; whether
their errors add up or hide each other is measured, never assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.core.method import Price
from narrows.kv._base import KVTechnique, Policy, Prompt

if TYPE_CHECKING:
    import torch

    from narrows.core.tensor import Number
    from narrows.kv.store_torch import Store
    from narrows.kv.tier import Tier


class Stack(KVTechnique):
    """Techniques at work together.

    choose: evicts (SnapKV). code: stores (KIVI); its store must be a PackedStore where a tier is
    given. tier: where packed tokens lie; None: on the device.
    """

    paper = ""
    relieves = "memory bandwidth"

    def __init__(self, choose: KVTechnique, code: KVTechnique, tier: Tier | None = None) -> None:
        for part, moment, what in ((choose, "on_prefill_end", "chooses tokens"),
                                   (code, "store", "stores them")):  # fmt: skip
            if getattr(type(part), moment) is getattr(Policy, moment):
                raise NarrowsError(f"{part.key} is not a technique that {what}")
        if type(choose).store is not Policy.store:
            raise NarrowsError(
                f"{choose.key} brings a store of its own, so {code.key} cannot store its tokens"
            )
        self.choose, self.code, self.tier = choose, code, tier
        self.key = f"{choose.key}+{code.key}"  # pyright: ignore[reportAttributeAccessIssue]
        self.paper = f"{choose.paper}, {code.paper}"  # pyright: ignore[reportAttributeAccessIssue]
        self.stepwise = choose.stepwise or code.stepwise  # pyright: ignore[reportAttributeAccessIssue]
        self.needs_hidden = choose.needs_hidden or code.needs_hidden  # pyright: ignore[reportAttributeAccessIssue]
        self.chunk = choose.chunk
        both = choose.price, code.price
        self.price = Price(  # pyright: ignore[reportAttributeAccessIssue]
            quality="; ".join(p.quality for p in both if p.quality),
            memory="; ".join(p.memory for p in both if p.memory),
        )

    @classmethod
    def variants(cls, case: Case) -> tuple[Stack, ...]:
        """None by itself: stacks are searched for by `relieve`."""
        return ()

    def of(self, model: Any, state: Mapping[str, Any] | None = None) -> Stack:
        """Both parts with what they need of a model. state: what their fits gave, by key."""
        choose, code = (p.of(model, (state or {}).get(p.key)) for p in (self.choose, self.code))
        return Stack(choose, code, self.tier)

    def store(self, config: Any, layer: int = 0) -> Store:
        """The coding technique's store, in the tier."""
        made = self.code.store(config, layer)
        if self.tier is None:
            return made
        from narrows.kv.store_packed import PackedStore

        if type(made) is not PackedStore:
            raise NarrowsError(f"{self.code.key} cannot be put in the tier {self.tier.name}")
        return PackedStore(*made.codecs, residual=made.residual, tier=self.tier)

    def attend_prompt(self, prompt: Prompt, mask: torch.Tensor | None) -> torch.Tensor | None:
        """See Policy."""
        return self.choose.attend_prompt(prompt, mask)

    def on_prefill_chunk(self, chunk: Prompt, store: Store) -> torch.Tensor | None:
        """See Policy."""
        return self.choose.on_prefill_chunk(chunk, store)

    def on_prefill_end(self, prompt: Prompt) -> torch.Tensor | None:
        """See Policy."""
        return self.choose.on_prefill_end(prompt)

    def on_decode_step(self, layer: int, store: Store) -> None:
        """See Policy."""
        self.choose.on_decode_step(layer, store)
        self.code.on_decode_step(layer, store)

    def budget(self, tokens: Number) -> Number:
        """See Policy."""
        return self.choose.budget(tokens)

    def predict(self, case: Case) -> Case:
        """Fewer tokens, each of fewer bits."""
        return self.code.predict(self.choose.predict(case))

    def why(self, case: Case) -> str:
        """What each does."""
        return f"{self.choose.why(case)}; {self.code.why(self.choose.predict(case))}"
