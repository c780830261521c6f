"""KV prediction: a small model reads the prompt and predicts the large one's cache (2410.08391).

Narrow point: prefill computes about two operations for every parameter and prompt token, so on
machines that are weak in compute the first token waits for it (time to first token, TTFT).

Mechanism. An auxiliary model reads the prompt but for its last token. From the keys and values
that it caches (keys before positions) one linear map for each layer of the model predicts that
layer's keys, another one its values. The model turns predicted keys to their positions, as it
does its own, and runs on the last prompt token alone; from then on it generates over that cache,
and the auxiliary is not asked again. Of the auxiliary's last block only keys and values are
computed: nothing reads what comes after them. The auxiliary is a smaller model of the same family
(KVP-C) or a layer-pruned copy (KVP-LP); a Llama's blocks, here (arXiv 2410.08391).

It hurts where answers need what the auxiliary did not understand of the prompt, where little is
read and much is generated (the cache, and so decode, is as large as before), where memory is
full (there are more weights), and without a trained predictor it does not work at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from narrows.core.case import Case
from narrows.core.errors import NarrowsError
from narrows.core.method import Change, Price, Technique

if TYPE_CHECKING:
    from narrows.kv.adapter import AppliedCache
    from narrows.kv.kvprediction_torch import KVPredictor

WEIGHTS = Path(__file__).parent / "weights" / "kvprediction-recall-lm.safetensors"

TRAIN = "python -m narrows.kv.kvprediction_train"


class KVPrediction(Technique):
    """Prefill by an auxiliary model of `layers` and `width`, shares of the model's own.

    The predictor itself (auxiliary, maps, layer map) is trained for one model: `of` finds what
    is shipped, or takes a `KVPredictor` that your own training gave.
    """

    key = "kvprediction"
    paper = "arXiv:2410.08391"
    relieves = "compute"
    change = Change.WRAP
    price = Price(
        quality="the prompt is understood as well as the auxiliary does: recall and perplexity",
        training="an auxiliary and its maps, trained for one model",
        memory="the auxiliary's weights beside the model's",
    )

    def __init__(self, layers: float = 0.5, width: float = 1.0) -> None:
        for name, share in (("layers", layers), ("width", width)):
            number = isinstance(share, int | float | np.number) and not isinstance(share, bool)
            if not number or not 0 < share <= 1:
                raise NarrowsError(
                    f"kvprediction: {name} is a share of the model's, above 0 and at most 1, not "
                    f"{share!r}"
                )
        self.layers, self.width = float(layers), float(width)
        self._predictor: KVPredictor | None = None

    @classmethod
    def variants(cls, case: Case) -> tuple[KVPrediction, ...]:
        """Half of the layers, a quarter, three quarters: KVP-LP of the paper."""
        return cls(), cls(0.25), cls(0.75)

    def of(self, model: Any, state: KVPredictor | None = None) -> KVPrediction:
        """With the predictor of a model. state: one that was trained; None: what is shipped.

        Raises NarrowsError where there is none, or where its shape is another than asked for.
        """
        from narrows.kv.kvprediction_torch import blocks, load

        total = len(blocks(model))
        wanted = max(1, round(self.layers * total))
        if state is None:
            state = load(WEIGHTS, model, wanted)
        have, config = len(blocks(state.auxiliary)), state.auxiliary.config
        wide = max(1, round(self.width * model.config.hidden_size))
        if len(state.layer_map) != total:
            raise NarrowsError(
                f"this predictor is for a model of {len(state.layer_map)} layers, the model has "
                f"{total}: {TRAIN} trains one"
            )
        if (have, config.hidden_size) != (wanted, wide):
            raise NarrowsError(
                f"the auxiliary has {have} layers of width {config.hidden_size}, asked for were "
                f"{wanted} of {wide}; use KVPrediction({have / total:g}, "
                f"{config.hidden_size / model.config.hidden_size:g}).of(model, state)"
            )
        made = copy(self)
        made._predictor = state
        return made

    @contextmanager
    def apply(self, target: Any, state: KVPredictor | None = None) -> Iterator[AppliedCache]:
        """`with technique.apply(model) as applied: applied.model.generate(...)`.

        target: a transformers model. Inside the context prompts that a run with an empty cache
        starts with are read by the auxiliary; logits are then of the last prompt token alone.
        `applied.cache` is the latest cache. A codec (KIVI) may be at work on the model already:
        what is predicted is stored in it. state: see `of`.
        """
        from narrows.kv.adapter import known
        from narrows.kv.kvprediction_torch import at_work

        ready = self if self._predictor is not None and state is None else self.of(
            known(target), state
        )  # fmt: skip
        assert ready._predictor is not None
        with at_work(target, ready._predictor) as applied:
            yield applied

    def predict(self, case: Case) -> Case:
        """The case with its prefill read by the auxiliary, mapped, and finished by the model.

        The cache and decode stay as they are. Facts may be arrays. The same case where no prompt
        is longer than one token, or a predictor is at work already.
        """
        facts = self._facts(case)
        if np.max(facts["prompt"]) < 2 or "prefill" in case.plan.policies:
            return case
        from narrows.kv._predicted import predicted

        work = predicted(case.workload, self.layers, self.width)
        plan = case.plan.with_policy("prefill", self.key, layers=self.layers, width=self.width)
        return replace(case, workload=work, plan=plan)

    def why(self, case: Case) -> str:
        """One sentence with prefill's operations before and after."""
        after = self.predict(case)
        if after is case:
            return "no prompt is long enough to be read by another model, or it is already"
        before, less = (float(np.max(c.workload.flops("prefill"))) for c in (case, after))
        return (
            f"an auxiliary of {self.layers:.0%} of the layers cuts prefill from {before / 1e12:.3g}"
            f" to {less / 1e12:.3g} TFLOP; decode and the cache stay whole; "
            "it must be trained for the model (recall-lm's are shipped)"
        )

    def _facts(self, case: Case) -> Any:
        """What is known of the load; NarrowsError where a cache cannot be predicted."""
        work = case.workload
        needed = ("prompt", "config", "batch", "dtype", "kv_dtype", "devices")
        missing = [n for n in needed if n not in work.facts]
        if missing or "kv.prompt.key" not in work.tensors:
            raise NarrowsError(
                f"{work.name} is no decoder that reads a prompt into a cache, of known shape, so "
                "there is nothing for kvprediction to predict"
            )
        config = work.facts["config"]
        for has, what in ((config.window, "layers with a sliding window"),
                          (config.experts, "a mixture of experts"),
                          (config.softcap, "scores that pass a tanh")):  # fmt: skip
            if has:
                raise NarrowsError(
                    f"{work.name} has {what}, which kvprediction does not do; it works on decoders "
                    "of Llama's shape"
                )
        changed = [t.name for t in work.role("kv") if t.kept or t.codec.name not in _PLAIN]
        if changed and "prefill" not in case.plan.policies:
            raise NarrowsError(
                f"the cache of {work.name} is compressed already; ask kvprediction first, then "
                "the technique that stores what was predicted"
            )
        return work.facts


_PLAIN = ("fp64", "fp32", "bf16", "fp16", "fp8", "int8")
