"""recall-lm: the model recalls, its tasks are what they say, its training can be trusted."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from narrows.core.errors import NarrowsError  # noqa: E402
from narrows.models import recall_lm  # noqa: E402
from narrows.models.recall_lm import corpus, evaluate, lessons, network, tasks, train  # noqa: E402
from narrows.models.recall_lm.recipe import RECIPES, Recipe, Shape, Stage  # noqa: E402

TINY = Shape(
    vocabulary=300,
    width=32,
    feed_forward=48,
    query_heads=2,
    kv_heads=1,
    head_size=16,
    positions=256,
)
WORDS = [
    "the",
    "lord",
    "and",
    "all",
    "men",
    "of",
    "that",
    "house",
    "shall",
    "come",
    "unto",
    "him",
    "with",
    "many",
    "words",
    "for",
    "his",
    "good",
    "name",
]


@pytest.fixture(scope="module")
def shipped():
    if not (recall_lm.WEIGHTS / "model.safetensors").is_file():
        pytest.skip("the weights of recall-lm are not in this checkout")
    return recall_lm.load()


@pytest.fixture(scope="module")
def prose() -> str:
    """Text-like lines from a fixed seed: the tests need no corpus."""
    rng = np.random.default_rng(0)
    return "\n".join(" ".join(rng.choice(WORDS, 9)) + " [{=}]" for _ in range(400))


@pytest.fixture(scope="module")
def alphabet(prose) -> tasks.Alphabet:
    return tasks.Alphabet.of(network.make_tokenizer([prose], TINY.vocabulary))


@pytest.fixture(scope="module")
def sampled(shipped) -> np.ndarray:
    """A haystack the model wrote itself, ``(2048,)``."""
    torch.manual_seed(0)
    with torch.inference_mode():
        ids = shipped[0].generate(
            torch.zeros(16, 1, dtype=torch.long),
            do_sample=True,
            max_new_tokens=128,
            min_new_tokens=128,
        )
    return ids[:, 1:].reshape(-1).numpy()


def test_the_shipped_model_has_the_shape_it_claims(shipped):
    model, tokenizer = shipped
    config = model.config
    assert type(model).__name__ == "LlamaForCausalLM"
    assert config.num_attention_heads > config.num_key_value_heads, "grouped-query attention"
    assert config.head_dim == 64
    assert config.tie_word_embeddings
    assert config.max_position_embeddings >= 4096
    assert len(tokenizer) == config.vocab_size
    assert (recall_lm.WEIGHTS / "model.safetensors").stat().st_size <= 16_000_000
    text = "And he said unto them, 12:34 fear not {x}.\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_shipped_model_recalls(shipped, sampled):
    model, tokenizer = shipped
    alphabet = tasks.Alphabet.of(tokenizer)
    rng = np.random.default_rng(3)
    assert (
        evaluate.recall(model, tasks.needle(rng, alphabet, sampled, 512, 128), batch_size=16).share
        >= 0.9
    )
    one = tasks.needle(rng, alphabet, sampled, 512, 8)
    assert evaluate.window_share(model, one, 1 / 8).share <= 0.5, (
        "the answer must come from the needle"
    )


def test_recall_through_a_cache_equals_recall_without(shipped, sampled):
    from transformers import DynamicCache

    model, tokenizer = shipped
    batch = tasks.pairs(np.random.default_rng(5), tasks.Alphabet.of(tokenizer), sampled, 384, 16, 4)
    plain = evaluate.answers_right(model, batch)
    cached = evaluate.answers_right(model, batch, cache=DynamicCache)
    assert (plain == cached).all()
    one = evaluate.perplexity(model, sampled, 128, scored=16, windows=4)
    two = evaluate.perplexity(model, sampled, 128, cache=DynamicCache, scored=16, windows=4)
    assert one.tokens == two.tokens
    assert one.loss == pytest.approx(two.loss, abs=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda rng, a, t: tasks.needle(rng, a, t, 200, 5),
        lambda rng, a, t: tasks.pairs(rng, a, t, 301, 5, count=16),
        lambda rng, a, t: tasks.pairs(rng, a, t, 64, 5, count=1, depth=0.0),
        lambda rng, a, t: tasks.chains(rng, a, t, 257, 5, hops=3, count=2),
    ],
)
def test_prompts_are_exact_deterministic_and_hold_their_answer(make, alphabet):
    text = tasks.random_words(np.random.default_rng(1), alphabet, 2000)
    batch, again = (make(np.random.default_rng(2), alphabet, text) for _ in range(2))
    assert (batch.ids == again.ids).all()
    assert (batch.answers == again.answers).all()
    assert (batch.ids != make(np.random.default_rng(3), alphabet, text).ids).any()
    assert batch.ids.shape[1] in (200, 301, 64, 257)
    for ids, answer, start in zip(batch.ids, batch.answers, batch.answer_start, strict=True):
        stated = answer[-2:] if ids[-4] == alphabet.chase else answer
        assert (ids[start : start + len(stated)] == stated).all()
        assert ids[start - 1] == alphabet.equals
        assert ids[-1] == alphabet.equals
        if ids[-4] == alphabet.open:
            assert (ids[-4:] == ids[start - 4 : start]).all(), (
                "the question is the statement left open"
            )


def test_depth_places_the_needle(alphabet):
    text = tasks.random_words(np.random.default_rng(1), alphabet, 2000)
    starts = [
        tasks.pairs(np.random.default_rng(2), alphabet, text, 400, 3, 1, depth=d).answer_start
        for d in (0, 0.5, 1)
    ]
    assert (starts[0] == 4).all()
    assert (starts[0] < starts[1]).all()
    assert (starts[1] < starts[2]).all()


def test_lessons_put_loss_only_on_what_was_stated_before(alphabet):
    text = tasks.random_words(np.random.default_rng(1), alphabet, 4000)
    for lesson in (
        lessons.copy_lesson(np.random.default_rng(0), alphabet, 256, 4),
        lessons.pair_lesson(np.random.default_rng(0), alphabet, text, 256, 4, 4),
        lessons.chain_lesson(np.random.default_rng(0), alphabet, text, 256, 4),
    ):
        assert lesson.ids.shape == lesson.answer.shape == lesson.text.shape == (4, 257)
        assert not (lesson.text & (lesson.answer >= 0)).any()
        for ids, answer in zip(lesson.ids, lesson.answer, strict=True):
            assert answer.max() >= 0
            for number in range(answer.max() + 1):
                place = np.flatnonzero(answer == number)
                words = [i for i in ids[place] if i != alphabet.equals]
                assert all((ids[: place[0]] == word).any() for word in words)


def test_too_many_statements_are_refused(alphabet):
    with pytest.raises(NarrowsError, match="do not fit in 64"):
        tasks.pairs(np.random.default_rng(0), alphabet, np.zeros(500, int), 64, 1, count=16)


def test_growth_leaves_the_function_unchanged():
    small = network.make_model(TINY, 2, seed=0)
    large = network.grow(small, TINY, 4, seed=1)
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(small(ids).logits, large(ids).logits)
    assert large.model.layers[3].mlp.gate_proj.weight.abs().sum() > 0
    with pytest.raises(NarrowsError, match="asked to grow to 2"):
        network.grow(large, TINY, 2, seed=0)


def tiny_recipe() -> Recipe:
    first = Stage("copy", 2, (64,), 4 * 128, mix={"copy": 1.0}, gate=None, batch_tokens=128)
    second = Stage(
        "pairs", 3, (64,), 6 * 128, pairs=(1, 2), gate=None, batch_tokens=128, workers=2, decay=0.5
    )
    stages = (first, second)
    return Recipe("tiny", 7, TINY, stages)


def test_a_resumed_run_gives_the_weights_of_an_uninterrupted_one(tmp_path, prose):
    text = {"prose": prose}
    whole = train.Trainer(tiny_recipe(), tmp_path / "whole", text)
    whole.run()
    assert whole.done
    assert [h["steps"] for h in whole.progress.history] == [4, 6]
    for cut in (2, 7):
        folder = tmp_path / f"cut{cut}"
        first = train.Trainer(tiny_recipe(), folder, text)

        def stop(run, _figures, cut=cut):
            run.stopping = run.progress.tokens >= cut * 128

        first.run(report=stop)
        assert not first.done
        second = train.Trainer(tiny_recipe(), folder, text)
        second.resume()
        second.run()
        assert (
            json.loads((folder / "progress.json").read_text())["progress"]["tokens"]
            == whole.progress.tokens
        )
        for (name, one), two in zip(
            whole.model.named_parameters(), second.model.parameters(), strict=True
        ):
            assert torch.equal(one, two), name


def test_missing_data_is_said_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.delenv(corpus.ENVIRONMENT_VARIABLE, raising=False)
    with pytest.raises(corpus.MissingDataError, match="set NARROWS_DATA"):
        corpus.training()
    with pytest.raises(corpus.MissingDataError, match=r"king-james-bible\.txt\.gz is not in"):
        corpus.training(tmp_path)
    (tmp_path / corpus.SOURCES[0].file).write_bytes(b"not it")
    with pytest.raises(NarrowsError, match="SHA-256"):
        corpus.training(tmp_path)
    with pytest.raises(NarrowsError, match="holds no recall-lm"):
        recall_lm.load(folder=tmp_path)


def test_wilson_intervals():
    share = evaluate.Share.of(95, 100)
    assert (share.low, share.high) == pytest.approx((0.8882, 0.9785), abs=1e-4)
    assert evaluate.Share.of(10, 10).high == pytest.approx(1.0)
    assert evaluate.Share.of(0, 10).low == pytest.approx(0.0)


def test_every_recipe_is_sound():
    for recipe in RECIPES.values():
        layers = [stage.layers for stage in recipe.stages]
        assert layers == sorted(layers), "depth only grows"
        assert all(max(stage.lengths) <= recipe.shape.positions for stage in recipe.stages)
        assert len({stage.name for stage in recipe.stages}) == len(recipe.stages)
