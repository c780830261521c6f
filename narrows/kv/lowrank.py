"""A codec of few channels: keys or values in an orthogonal basis of each head, its first r of d.

Ranks are a head's own and stored so: a token is one row of all heads' channels side by side, with
nothing in between. Products are taken in the basis: queries go there, mixed values come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from narrows.core.errors import NarrowsError
from narrows.kv.codec import Codec, Packed


@dataclass(frozen=True, slots=True, eq=False)
class LowRank(Codec):
    """The first `ranks[h]` of the channels `(x - mean[h]) basis[h]` of each KV head h.

    basis: (kv_heads, head_dim, head_dim) fp32, columns orthogonal. mean: (kv_heads, head_dim).
    dtype: of what is stored; None: the tokens' own.

    One part, (batch, 1, tokens, sum of ranks), head after head. Queries' products with the mean
    are the same for all keys of a codec, not for those that are kept beside it in full: they are
    part of the scores, so that both merge.
    """

    basis: torch.Tensor
    mean: torch.Tensor
    ranks: tuple[int, ...]
    dtype: torch.dtype | None = None

    @property
    def per(self) -> tuple[int, ...]:
        """See Codec."""
        return (1,)

    def check(self, head_dim: int) -> None:
        """See Codec."""
        size = self.basis.shape[-1]
        if head_dim != size:
            raise NarrowsError(
                f"a basis of {size} channels was given for heads of {head_dim}; fit one to this "
                "model"
            )
        if len(self.ranks) != len(self.basis) or not all(1 <= r <= size for r in self.ranks):
            raise NarrowsError(
                f"{len(self.basis)} heads of {size} channels need as many ranks from 1 to {size}, "
                f"not {self.ranks}"
            )

    def element_bits(self, head_dim: int) -> float:
        """Of an element of a whole head: what is kept, over all heads."""
        width = torch.empty(0, dtype=self.dtype or torch.float32).element_size()
        return 8.0 * width * sum(self.ranks) / (len(self.ranks) * head_dim)

    def pack(self, x: torch.Tensor) -> Packed:
        """See Codec."""
        self.check(x.shape[3])
        if x.shape[1] != len(self.ranks):
            raise NarrowsError(
                f"a basis for {len(self.ranks)} KV heads cannot code {x.shape[1]} of them"
            )
        basis, mean = self.basis.to(x.device), self.mean.to(x.device)
        turned = [(x[:, h].float() - mean[h]) @ basis[h, :, :r] for h, r in enumerate(self.ranks)]
        codes = torch.cat(turned, -1).unsqueeze(1).to(self.dtype or x.dtype)
        if not bool(codes.isfinite().all()):
            raise NarrowsError(
                "the cache holds keys or values that are infinite, not a number, or more than "
                f"{codes.dtype} can hold, so they cannot be projected"
            )
        return Packed(self, (codes,))

    def unpack(self, packed: Packed) -> torch.Tensor:
        """See Codec."""
        made = [
            codes.float() @ self._kept(h, codes.device).T + self.mean[h].to(codes.device)
            for h, codes in enumerate(self._heads(packed))
        ]
        return torch.stack(made, 1)

    def scores(self, queries: torch.Tensor, packed: Packed) -> torch.Tensor:
        """See Codec: products of r channels, and of the mean once."""
        mean = self.mean.to(queries.device)
        made = [
            (queries[:, h] @ self._kept(h, queries.device)) @ codes.float().transpose(1, 2)
            + (queries[:, h] @ mean[h]).unsqueeze(-1)
            for h, codes in enumerate(self._heads(packed))
        ]
        return torch.stack(made, 1)

    def mix(self, weights: torch.Tensor, packed: Packed) -> torch.Tensor:
        """See Codec: r channels are mixed, then turned back; the mean by the sum of weights."""
        mean = self.mean.to(weights.device)
        made = [
            (weights[:, h] @ codes.float()) @ self._kept(h, weights.device).T
            + weights[:, h].sum(-1, keepdim=True) * mean[h]
            for h, codes in enumerate(self._heads(packed))
        ]
        return torch.stack(made, 1)

    def _heads(self, packed: Packed) -> Sequence[torch.Tensor]:
        """Codes of each head, views (batch, tokens, rank)."""
        codes = packed.parts[0][:, 0]
        ends = tuple(accumulate(self.ranks))
        return [codes[..., end - r : end] for end, r in zip(ends, self.ranks, strict=True)]

    def _kept(self, head: int, device: torch.device) -> torch.Tensor:
        return self.basis[head, :, : self.ranks[head]].to(device)
