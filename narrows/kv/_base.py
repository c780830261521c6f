"""What members of `kv/` share: a policy that chooses tokens, and how it is put to work.

A *policy* is asked at up to four moments: when a chunk of a prompt was read, when the prompt was
read, when a decode step was attended, and (for pricing) how many tokens it keeps; everything else
(storage, positions, padding, the seam to transformers) is the substrate's. A policy also says
what its tokens are stored in, so that a codec is a policy with a store of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from narrows.core.method import Applied, Change, Technique

if TYPE_CHECKING:
    import torch

    from narrows.core.case import Case
    from narrows.core.tensor import Number
    from narrows.kv.store_torch import Store


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a policy may look at when a layer has read the whole prompt, or a chunk of it.

    layer: index. queries: (batch, heads, tokens, head_dim) and keys, values: (batch, kv_heads,
    tokens, head_dim), positions already applied. valid: (batch, tokens) bool, False on padding;
    None where nothing is padded. scaling: what attention multiplies its scores by. module: the
    model's attention. hidden: what came into it, (batch, tokens, width), where the policy
    `needs_hidden`. start: column of the first token, 0 unless the prompt came in chunks. last:
    whether the prompt ends here. At the end of a prompt that came in chunks, keys and values are
    all that is held (start is then 0 and columns are slots), queries and hidden the last chunk's.
    """

    layer: int
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    valid: torch.Tensor | None
    scaling: float
    module: Any = None
    hidden: torch.Tensor | None = None
    start: int = 0
    last: bool = True


class Policy(ABC):
    """Chooses what a layer keeps of a prompt, and what it is stored in."""

    stepwise: ClassVar[bool] = False
    """Whether tokens that come one at a time are read otherwise than the same tokens at once."""

    needs_hidden: ClassVar[bool] = False
    """Whether it looks at what comes into a layer's attention (Prompt.hidden)."""

    chunk: int | None = None
    """Tokens of a prompt that are read at a time; None: all."""

    def store(self, config: Any, layer: int = 0) -> Store:
        """An empty store for one layer; config: of the model's decoder.

        Raises NarrowsError for a model whose cache cannot be stored so.
        """
        from narrows.kv.store_torch import Store

        return Store()

    def attend_prompt(self, prompt: Prompt, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Attention over a whole prompt, (batch, heads, tokens, head_dim); None: plain attention.

        mask: the model's, (batch, 1, tokens, tokens) bool or additive; None where it is causal.
        """
        return None

    def on_prefill_chunk(self, chunk: Prompt, store: Store) -> torch.Tensor | None:
        """After a chunk was attended and stored: slots of the store to keep; None to keep all.

        (batch, kv_heads, kept) int64 ascending, -1 in front where a row or head keeps fewer.
        """
        return None

    def on_decode_step(self, layer: int, store: Store) -> None:  # noqa: B027 - optional
        """After new tokens were attended and settled."""

    def budget(self, tokens: Number) -> Number:
        """Tokens kept of a prompt of so many; all of them where nothing is evicted."""
        return tokens

    @abstractmethod
    def on_prefill_end(self, prompt: Prompt) -> torch.Tensor | None:
        """Columns to keep, (batch, kv_heads, kept) int64 ascending; None to keep all.

        A row or head that keeps fewer than the widest one is filled up with -1, in front.
        """


class KVTechnique(Technique, Policy):
    """A technique that is a policy on the shared substrate; wraps its model, undone on exit."""

    change = Change.WRAP

    @classmethod
    def ladder(cls, case: Case) -> tuple[Technique, ...]:
        """Settings that a search tries, gentle to harsh; its variants where it says nothing else.

        Settings scale with the prompt where they can: quality is judged on shorter ones.
        """
        return cls.variants(case)

    def of(self, model: Any, state: Any = None) -> Self:
        """This technique with what it needs of a model: what it reads from the weights, what was
        trained for them. Itself where it needs nothing.

        model: a transformers decoder-only model. state: what a fit gave; None: what is shipped
        for this model, if anything is. Raises NarrowsError where neither is there.
        """
        return self

    def apply(self, target: Any, state: Any = None) -> AbstractContextManager[Applied]:
        """`with technique.apply(model) as applied: applied.model.generate(...)`.

        target: a transformers decoder-only model. Inside the context every cache that `generate`
        or a hand-written loop starts with (none, or an empty DynamicCache) follows the policy;
        `applied.cache` is the latest one. state: see `of`.
        """
        from narrows.kv.adapter import known, wrap

        return wrap(target, self.of(known(target), state))

    def cache(self, config: Any) -> Any:
        """A cache to pass as `past_key_values` yourself.

        config: of the model, which must run the attention that reads it:
        `model.set_attn_implementation(narrows.kv.adapter.ATTENTION)` or load it so. A technique
        that needs something of its model is asked `of(model)` for it first.
        """
        from narrows.kv.adapter import KVCache

        return KVCache(config, self)
