"""What members of `kv/` share: a policy that chooses tokens, and how it is put to work.

A *policy* is asked once a layer, at the end of prefill, which prompt tokens to keep; everything
else (storage, positions, padding, the seam to transformers) is the substrate's. A policy
also says what its tokens are stored in, so that a codec is a policy with a store of its own.
Further moments (a prefill chunk, a decode step) and tiers join here with their members.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from narrows.core.method import Applied, Change, Technique

if TYPE_CHECKING:
    import torch

    from narrows.kv.store_torch import Store


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a policy may look at when a layer has read the whole prompt.

    layer: index. queries: (batch, heads, tokens, head_dim) and keys, values: (batch, kv_heads,
    tokens, head_dim), positions already applied. valid: (batch, tokens) bool, False on padding;
    None where nothing is padded. scaling: what attention multiplies its scores by.
    """

    layer: int
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    valid: torch.Tensor | None
    scaling: float


class Policy(ABC):
    """Chooses what a layer keeps of a prompt, and what it is stored in."""

    stepwise: ClassVar[bool] = False
    """Whether tokens that come one at a time are read otherwise than the same tokens at once."""

    def store(self, config: Any) -> Store:
        """An empty store for one layer; config: of the model's decoder.

        Raises NarrowsError for a model whose cache cannot be stored so.
        """
        from narrows.kv.store_torch import Store

        return Store()

    @abstractmethod
    def on_prefill_end(self, prompt: Prompt) -> torch.Tensor | None:
        """Columns to keep, (batch, kv_heads, kept) int64 ascending; None to keep all.

        A row or head that keeps fewer than the widest one is filled up with -1, in front.
        """


class KVTechnique(Technique, Policy):
    """A technique that is a policy on the shared substrate; wraps its model, undone on exit."""

    change = Change.WRAP

    def apply(self, target: Any, state: Any = None) -> AbstractContextManager[Applied]:
        """`with technique.apply(model) as applied: applied.model.generate(...)`.

        target: a transformers decoder-only model. Inside the context every cache that `generate`
        or a hand-written loop starts with (none, or an empty DynamicCache) follows the policy;
        `applied.cache` is the latest one.
        """
        from narrows.kv.adapter import wrap

        return wrap(target, self)

    def cache(self, config: Any) -> Any:
        """A cache to pass as `past_key_values` yourself.

        config: of the model, which must run the attention that reads it:
        `model.set_attn_implementation(narrows.kv.adapter.ATTENTION)` or load it so.
        """
        from narrows.kv.adapter import KVCache

        return KVCache(config, self)
