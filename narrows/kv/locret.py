"""Locret: small trained heads say what to keep while a long prompt is read (arXiv 2410.01805).

Narrow point: the cache of a long prompt, and the activations of reading it at once, do not fit a
small GPU. What evicts when the prompt has been read comes too late: the peak has passed.

Mechanism. The prompt is read in chunks. Beside each layer's attention stands a retaining head,
`W2 act(W1 [q; k; v])`, from the projections of a token before positions: one score for each KV
head, which never changes, so it is made once and travels with the token. After a chunk each KV
head keeps its `budget` best tokens; the last `stabilizers` stay in any case while more chunks
come, and the last `local` tokens of the prompt for good. Heads are trained on the frozen model
to say the largest score before the softmax that an answer's rows will give a token (`fit`).
Kept keys stay at their absolute positions: with a budget of the whole prompt nothing changes. The
paper turns them to positions 0..kept-1 before each chunk, which lets a model read further than it
was trained for but changes its logits even where nothing is evicted; that is not done here.

It hurts where what matters cannot be told from a token alone, before the question is known: heads
cannot know which of many needles is asked for. It hurts on text unlike what heads were trained
on, and on the way: what was evicted early is gone for later chunks too. It does nothing for a
prompt no longer than the budget but read it in chunks.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.core.method import Price
from narrows.core.tensor import Number
from narrows.kv._base import KVTechnique, Prompt

if TYPE_CHECKING:
    import torch

    from narrows.kv.locret_torch import Heads
    from narrows.kv.store_torch import Store

SHIPPED = Path(__file__).parent / "weights" / "locret-recall-lm.safetensors"
WIDTH = 1024
"""Hidden size of the paper's heads, which predictions count."""


class Locret(KVTechnique):
    """Keeps `capacity` tokens of a prompt in every layer and KV head, while it is read.

    capacity: tokens kept after each chunk, the paper's budget. chunk: tokens read at a time.
    stabilizers: last tokens that stay on every chunk but the last. local: last tokens of the
    prompt, never evicted.
    """

    key = "locret"
    paper = "arXiv:2410.01805"
    relieves = "memory capacity"
    needs_hidden = True
    price = Price(
        quality="tokens are judged before the question is known; what is evicted is gone",
        memory="heads of a few hundred kilobytes to a few megabytes a layer, and a score a token",
    )

    def __init__(
        self, capacity: int = 6000, chunk: int = 3072, stabilizers: int = 2500, local: int = 100
    ) -> None:
        given = {"capacity": capacity, "chunk": chunk, "stabilizers": stabilizers, "local": local}
        for name, value in given.items():
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
                raise NarrowsError(
                    f"locret: {name} must be a whole number of tokens from 1 up, not {value!r}"
                )
        if not local <= stabilizers < capacity:
            raise NarrowsError(
                "locret: local <= stabilizers < capacity is needed, as all of them are kept; they "
                f"are {local}, {stabilizers} and {capacity}"
            )
        self.capacity, self.chunk = int(capacity), int(chunk)
        self.stabilizers, self.local = int(stabilizers), int(local)
        self.trained = ""  # a digest of the heads, so that saved caches tell heads apart
        self._heads: Heads | None = None
        self._scores: WeakKeyDictionary[Store, torch.Tensor] = WeakKeyDictionary()

    @classmethod
    def scaled(cls, capacity: int) -> Locret:
        """Another capacity, the rest in the paper's proportions."""
        part = capacity / 6000
        stabilizers = max(1, int(2500 * part))
        local = min(stabilizers, max(32, int(100 * part)))
        return cls(capacity, max(1, int(3072 * part)), stabilizers, local)

    @classmethod
    def variants(cls, case: Case) -> tuple[Locret, ...]:
        """The default; and an eighth of prompts, where that is another budget."""
        eighth = int(np.max(case.workload.facts.get("prompt", 0))) // 8
        if eighth < 64 or eighth == 6000:
            return (cls(),)
        return cls(), cls.scaled(eighth)

    def at(self, share: float) -> Locret:
        """The same for prompts of 2,048 tokens, of which a share is kept."""
        made = self.scaled(max(round(share * 2048), 64))
        made._heads, made.trained = self._heads, self.trained
        return made

    def of(self, model: Any, state: Heads | None = None) -> Locret:
        """With heads. state: what `fit` gave; None: its own, or those shipped for recall-lm."""
        from narrows.kv import locret_torch

        made = copy(self)
        heads = self._heads if state is None else state
        made._heads = locret_torch.load(SHIPPED, model) if heads is None else heads
        made.trained = made._heads.digest
        made._scores = WeakKeyDictionary()
        return made

    def fit(self, target: Any, data: Any, seed: int = 0) -> Any:
        """Heads for a model: data is its tokenizer and a text of tokens, (tokenizer, int64).

        The recipe is locret_train.train; it takes minutes for recall-lm.
        """
        from narrows.kv.locret_train import train

        tokenizer, text = data
        return train(target, tokenizer, text, seed=seed)

    def cache(self, config: Any) -> Any:
        """See KVTechnique; the model must be read so that what comes into attention is seen."""
        self._trained()
        return super().cache(config)

    def budget(self, tokens: Number) -> Number:
        """Tokens kept of prompts of so many tokens."""
        return np.minimum(tokens, self.capacity)

    def on_prefill_chunk(self, chunk: Prompt, store: Store) -> torch.Tensor | None:
        """The best slots and those that stay; see Policy."""
        import torch

        from narrows.kv.locret_torch import best

        scores = self._score(chunk)
        before = self._scores.get(store) if chunk.start else None
        if before is not None:
            scores = torch.cat([before, scores], 2)
        real = store.positions() >= 0
        if scores.shape != real.shape:
            raise NarrowsError(
                f"locret: {scores.shape[2]} scores for {real.shape[2]} tokens held: the cache was "
                "copied or changed between two chunks; read the prompt again"
            )
        forced = self.local if chunk.last else self.stabilizers
        slots = best(scores, real, forced, self.capacity)
        if chunk.last:
            self._scores.pop(store, None)
        elif slots is None:
            self._scores[store] = scores
        else:
            self._scores[store] = scores.gather(2, slots.clamp(min=0))
        return slots

    def on_prefill_end(self, prompt: Prompt) -> torch.Tensor | None:
        """Of a prompt that was read at once; chunks have been chosen from already."""
        from narrows.kv.locret_torch import best

        tokens = prompt.keys.shape[2]
        if tokens <= self.capacity:
            return None
        scores = self._score(prompt)
        real = scores.isfinite()
        if prompt.valid is not None:
            real = real & prompt.valid[:, None]
        return best(scores, real, self.local, self.capacity)

    def predict(self, case: Case) -> Case:
        """The case with the prompt read in chunks over a cache of the budget; see _locret_case.

        The same case where the prompt fits the budget, or a former step cut it below.
        """
        from narrows.kv import _locret_case

        facts = _locret_case.facts(case)
        made = _locret_case.chunked(
            case.workload, self.budget(facts["prompt"]), float(self.chunk or 1), WIDTH
        )
        if made is case.workload:
            return case
        plan = case.plan.with_policy(
            "evict", self.key, capacity=self.capacity, chunk=self.chunk,
            stabilizers=self.stabilizers, local=self.local,
        )  # fmt: skip
        return replace(case, workload=made, plan=plan)

    def why(self, case: Case) -> str:
        """One sentence with the tokens kept and the memory of prefill."""
        from narrows.kv import _locret_case

        prompt = float(np.max(_locret_case.facts(case)["prompt"]))
        after = self.predict(case)
        if after is case:
            return f"{prompt:.0f} tokens fit the capacity of {self.capacity}: nothing is evicted"
        old, new = (float(np.max(c.workload.bytes("kv"))) for c in (case, after))
        return (
            f"never holds more than {self.capacity + int(self.chunk or 0)} of {prompt:.0f} "
            f"prompt tokens: the cache shrinks from {old / 1e9:.3g} to {new / 1e9:.3g} GB, and "
            "activations are of a chunk"
        )

    def _score(self, prompt: Prompt) -> torch.Tensor:
        if prompt.hidden is None:
            raise NarrowsError(
                "locret: what comes into attention was not seen; use technique.apply(model), or "
                "put narrows.kv.adapter.hidden_states(model) around a cache of your own"
            )
        return self._trained().score(prompt.layer, prompt.module, prompt.hidden)

    def _trained(self) -> Heads:
        if self._heads is None:
            raise NarrowsError(
                "locret: retaining heads are trained for a model, and there are none yet; use "
                "Locret(...).of(model), or of(model, state) with what fit gave"
            )
        return self._heads
