"""Judging several caches from one reading equals reading with each of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from narrows.core.errors import NarrowsError
from narrows.kv import quality, reading
from narrows.kv._base import Policy, Prompt
from narrows.kv.adapter import wrap
from narrows.kv.baselines import RandomEviction, WindowOnly
from narrows.kv.snapkv import SnapKV
from tests.cpu.kv.tiny import llama, prompt

POLICIES = {
    "dense": None, "snapkv": SnapKV(50), "random": RandomEviction(50), "window": WindowOnly(50),
}  # fmt: skip


class Chunks(Policy):
    """Another policy, after a prompt that is read in chunks."""

    chunk = 64

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def on_prefill_end(self, prompt: Prompt) -> torch.Tensor | None:
        return self.policy.on_prefill_end(prompt)


@dataclass(frozen=True)
class Batch:
    """The fields of recall_lm.tasks.Batch that are read."""

    ids: np.ndarray
    answers: np.ndarray


def test_one_reading_serves_every_candidate():
    model, ids, rest = llama(), prompt(3, 120), prompt(3, 6, seed=4)
    told = quality.through(model, POLICIES, ids, rest)
    assert model.config._attn_implementation == "sdpa"
    for name in ("snapkv", "random", "window"):
        policy = POLICIES[name]

        with wrap(model, policy), torch.inference_mode():
            out = model(ids)
            expected = [out.logits[:, -1:]]
            for i in range(6):
                out = model(rest[:, i : i + 1], past_key_values=out.past_key_values)
                expected.append(out.logits)
        torch.testing.assert_close(told[name], torch.cat(expected, 1), rtol=1e-3, atol=1e-3)
    with torch.inference_mode():
        whole = model(torch.cat([ids, rest], 1)).logits[:, 119:]
    torch.testing.assert_close(told["dense"], whole, rtol=1e-3, atol=1e-3)
    assert (told["snapkv"] - told["dense"]).abs().max() > 0.1
    assert (told["random"] - told["window"]).abs().max() > 0.1


def test_questions_share_the_reading_of_their_text():
    model, text, rest = llama(), prompt(3, 116), prompt(3, 3, seed=4)
    policies = {**POLICIES, "chunked": Chunks(SnapKV(50))}
    questions = [prompt(3, 4, seed=seed) for seed in (7, 8)]
    with reading.reading(model):
        for question, told in zip(
            questions, reading.questions_read(model, policies, text, questions), strict=True
        ):
            whole = torch.cat([text, question], 1)
            alone = reading.prompts_read(model, policies, whole)
            for name, (cache, first) in told.items():
                torch.testing.assert_close(first, alone[name][1], rtol=1e-3, atol=1e-3)
                said = reading.continued(model, policies[name], cache, rest)
                expected = reading.continued(model, policies[name], alone[name][0], rest)
                torch.testing.assert_close(said, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("later", [False, True])
def test_right_answers_are_those_greedy_decoding_gives(later):
    model, ids = llama(), prompt(9, 120)
    cut = 120 - (quality.QUESTION if later else 0)

    with wrap(model, POLICIES["snapkv"]), torch.inference_mode():
        out = model(ids[:, :cut])
        if later:
            out = model(ids[:, cut:], past_key_values=out.past_key_values)
        said = [out.logits[:, -1:].argmax(-1)]
        for _ in range(4):
            out = model(said[-1], past_key_values=out.past_key_values)
            said.append(out.logits[:, -1:].argmax(-1))
    answers = torch.cat(said, 1).numpy()
    answers[2, 3] = (answers[2, 3] + 1) % 128
    told = quality.right(model, POLICIES, Batch(ids.numpy(), answers), asked_later=later)
    assert told["snapkv"].right == 8
    assert told["snapkv"].total == 9
    assert told["random"].right < 8


def test_perplexity_of_the_dense_cache_is_the_models_own():
    model = llama()
    text = prompt(1, 400)[0].numpy()
    told = quality.perplexity(model, POLICIES, text, context=100, scored=20, windows=11)
    losses = []
    for start in np.linspace(0, 400 - 121, 11).astype(int):
        row = torch.from_numpy(text[start : start + 121])[None]
        with torch.inference_mode():
            logits = model(row).logits[0, 100:-1]
        losses.append(F.cross_entropy(logits, row[0, 101:]).item())
    assert told["dense"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-3)
    assert abs(told["snapkv"] / told["dense"] - 1) > 1e-3
    with pytest.raises(NarrowsError, match="too short"):
        quality.perplexity(model, POLICIES, text[:100])


def test_sampled_text_is_tokens_of_the_model():
    text = quality.sampled_text(llama(), 300, seed=3)
    assert text.shape == (300,)
    assert text.min() >= 0
    assert text.max() < 128
    assert np.array_equal(text, quality.sampled_text(llama(), 300, seed=3))
