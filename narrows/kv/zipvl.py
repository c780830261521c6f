"""ZipVL: prefill over the few tokens that carry the attention (arXiv 2410.08584).

Narrow point: attention over a long (visual) prompt is quadratic in computing, and every decoded
token reads the whole cache, so compute limits prefill and memory bandwidth limits decode.

Mechanism. In every layer probe queries (the last `probes[0]` tokens and `probes[1]` random ones)
attend to all keys. Their weights, summed by token, say how many tokens are important: the fewest
that hold `tau` of the sum, so the number follows the layer and the input. Which ones: those with
the largest sum over the number of probes that see a token, else early tokens would win by being
seen more often. Attention runs among the important tokens alone; the others get zero and pass on
the residual stream. The cache holds important tokens in `bits[0]` bits and the others in `bits[1]`
(keys by channel, values by token once channels are of one size); decode attends to all of them.
Every `refresh` new tokens the same choice is made among the last `refresh`.

The last token of a prompt is always important here: the paper's rule could leave it out, and the
answer would come from a token that attended to nothing.

It hurts where attention is spread (nothing to leave out, and the probes cost), where a token that
no probe looks at must itself gather something for a later one, in batches of rows that differ
much (rows are attended one by one), and where long answers make many small packed pieces. A
prompt that comes in chunks is read in full and only packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.core.method import Price
from narrows.core.tensor import Codec, Number, Tensor
from narrows.kv._base import KVTechnique, Prompt
from narrows.kv._coded import cached, coded, in_full
from narrows.kv._zipvl_case import sparse

if TYPE_CHECKING:
    import torch

    from narrows.kv.store_torch import Store

BITS = (1, 2, 4, 8)

WHATS: tuple[str, ...] = ("key", "value")

KEY_GROUP = 1024
"""Tokens that share the scale of a key channel, as zipvl_store.py packs them."""


class ZipVL(KVTechnique):
    """Sparse prefill and a cache of two precisions, in every layer that attends to all tokens.

    tau: share of the accumulated scores that important tokens hold, above 0; 1 leaves prefill as
    it is. bits: of important and of other tokens. probes: queries that judge, most recent and
    random. refresh: new tokens that are judged and packed at once. share: of tokens that `predict`
    takes to be important (the paper's tables: 0.44 to 0.53); `ratios` tells what came out. seed:
    of the random probes.
    """

    key = "zipvl"
    paper = "arXiv:2410.08584"
    relieves = "compute"
    stepwise = True
    price = Price(
        quality="tokens that no probe looks at gather nothing in prefill and keep two bits",
        memory="new tokens and their queries in full precision until they are packed",
    )

    def __init__(
        self,
        tau: float = 0.975,
        bits: tuple[int, int] = (4, 2),
        probes: tuple[int, int] = (64, 64),
        refresh: int = 100,
        share: float = 0.5,
        seed: int = 0,
    ) -> None:
        for name, value in (("tau", tau), ("share", share)):
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
                raise NarrowsError(f"zipvl: {name} must lie in (0, 1], not {value!r}")
        if not _pair(bits) or any(b not in BITS for b in bits) or bits[0] < bits[1]:
            raise NarrowsError(
                "zipvl: bits must be two of 1, 2, 4 or 8, of important tokens and of the others, "
                f"not fewer for the important; not {bits!r}"
            )
        if not _pair(probes) or probes[0] < 1 or probes[1] < 0:
            raise NarrowsError(
                "zipvl: probes must be two whole numbers, at least one recent query and none or "
                f"more random ones; not {probes!r}"
            )
        for name, value, least in (("refresh", refresh, 1), ("seed", seed, 0)):
            if not _whole(value) or value < least:
                raise NarrowsError(
                    f"zipvl: {name} must be a whole number from {least} up, not {value!r}"
                )
        self.tau, self.share, self.refresh, self.seed = tau, share, int(refresh), int(seed)
        self.bits, self.probes = (bits[0], bits[1]), (probes[0], probes[1])
        # single numbers too, by which saved caches tell settings apart
        self.important_bits, self.other_bits = self.bits
        self.recent, self.random = self.probes
        self._chooser: Any = None

    @classmethod
    def variants(cls, case: Case) -> tuple[ZipVL, ...]:
        """The default; and the paper's faster one."""
        return cls(), cls(tau=0.96, share=0.44)

    @classmethod
    def ladder(cls, case: Case) -> tuple[ZipVL, ...]:
        """More bits and more of the scores, then fewer."""
        return cls(0.99, (8, 4), share=0.65), cls(0.975, (4, 4)), cls(), cls(0.96, share=0.44)

    @property
    def ratios(self) -> dict[int, float]:
        """Share of tokens that were important in the latest prompt, mean over rows, by layer."""
        return dict(self.chooser.ratios)

    @property
    def chooser(self) -> Any:
        """The rule at work; see zipvl_torch.py."""
        if self._chooser is None:
            from narrows.kv.zipvl_torch import Chooser

            self._chooser = Chooser(self.tau, self.recent, self.random, self.seed)
        return self._chooser

    def attend_prompt(self, prompt: Prompt, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Attention among the important tokens; plain where all of them are."""
        from narrows.kv.zipvl_torch import attend_among

        chosen = self.chooser.read(prompt)
        if self.chooser.ratios[prompt.layer] == 1:
            return None
        return attend_among(prompt, chosen)

    def on_prefill_end(self, prompt: Prompt) -> torch.Tensor | None:
        """Nothing is dropped. A prompt that came in chunks is judged now, for its bits."""
        if prompt.layer not in self.chooser.pending:
            self.chooser.read(prompt)
        return None

    def store(self, config: Any, layer: int = 0) -> Store:
        """A store of two precisions; NarrowsError where the model's heads cannot be coded."""
        from narrows.kv.zipvl_store import ZipStore

        size = getattr(config, "head_dim", None)
        self._check(size or config.hidden_size // config.num_attention_heads)
        return ZipStore(self.chooser, self.bits, self.refresh, layer)

    def _check(self, head_dim: int) -> None:
        if head_dim * self.other_bits % 8:
            raise NarrowsError(
                f"zipvl: heads of {head_dim} channels do not fill whole bytes at "
                f"{self.other_bits} bits; give more bits"
            )

    def element_bits(
        self, tokens: Number, share: Number, kv_heads: Number, head_dim: int
    ) -> dict[str, Any]:
        """Bits an element of packed keys and values takes, scales and factors included.

        A group of keys is KEY_GROUP tokens of one kind; a value's token has one scale over all
        heads, a run one factor a channel; which token is of which kind is a byte, told half to
        each.
        """
        tokens = np.maximum(np.asarray(tokens, float), 1.0)
        codes = self.important_bits * share + self.other_bits * (1 - np.asarray(share))
        important, other = np.ceil(tokens * share), np.floor(tokens * (1 - np.asarray(share)))
        groups = np.ceil(important / KEY_GROUP) + np.ceil(other / KEY_GROUP)
        runs = (important > 0).astype(float) + (other > 0)
        width = np.asarray(kv_heads, float) * head_dim
        kinds = 4.0 / width
        return {
            "key": codes + 32.0 * groups / tokens + kinds,
            "value": codes + 32.0 / width + 16.0 * runs / tokens + kinds,
        }

    def predict(self, case: Case) -> Case:
        """The case with sparse attention in prefill, its probes, and the cache coded.

        `share` of all tokens is taken to be important. Facts may be arrays. The same case where
        the cache is packed already.
        """
        facts, work = self._facts(case), case.workload
        prompt, generate = np.broadcast_arrays(
            np.asarray(facts["prompt"], float), np.asarray(facts["generate"], float)
        )
        shares = in_full(
            prompt, generate,
            lambda seen: dict.fromkeys(WHATS, (seen - prompt[..., None]) % self.refresh),
        )  # fmt: skip
        kv_heads = work.tensors["kv.prompt.key"].extent("head")
        bits = self.element_bits(prompt, self.share, kv_heads, int(facts["head_dim"]))
        # bits differ by case where prompts do: what unpacking costs does not, so it is asked with
        # the codes' own, and the means are set here
        codes: dict[str, float] = dict.fromkeys(WHATS, float(self.other_bits))
        made = coded(work, self.key, shares, codes)
        if made is work:
            return case
        means: list[Tensor] = []
        for (part, what), full in shares.items():
            name = f"kv.{part}.{what}"
            if name in made.tensors and made.tensors[name] is not work.tensors[name]:
                before = work.tensors[name].codec.bits_per_element
                mean = np.minimum(bits[what], before) * (1 - full) + before * np.asarray(full)
                means.append(made.tensors[name].with_(codec=Codec(self.key, mean)))
        made = made.with_tensors(means)
        if self.tau < 1 and self.share < 1:
            made = sparse(made, self.share, self.recent + self.random)
        told = {n: getattr(self, n) for n in ("tau", "bits", "probes", "refresh", "share")}
        return replace(case, workload=made, plan=case.plan.with_policy("code", self.key, **told))

    def why(self, case: Case) -> str:
        """One sentence with the attention and the bytes saved."""
        self._facts(case)
        before, after = (float(np.max(c.workload.bytes("kv"))) for c in (case, self.predict(case)))
        if after >= before:
            return "the cache is packed already, or too short to be: nothing changes"
        return (
            f"attends among {self.share:.0%} of the prompt's tokens, {self.share**2:.0%} of the "
            f"work, and packs the cache from {before / 1e9:.3g} to {after / 1e9:.3g} GB; the "
            f"share is assumed: it follows the input"
        )

    def _facts(self, case: Case) -> Mapping[str, Any]:
        """What is known of the load; NarrowsError where there is no cache that this can pack."""
        facts = cached(case, self.key, "pack")
        if facts.get("window"):
            raise NarrowsError(
                f"layers of {case.workload.name} have a sliding window, which bounds their cache "
                "already; zipvl works on models whose layers attend to everything"
            )
        self._check(int(facts["head_dim"]))
        return facts


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(_whole, value))
