"""Batched prediction gives each example what it would get alone, in few compiled shapes, generated, drawn or ranked."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mpt_jax import decoding, setup
from mpt_jax.config import DecodeConfig
from mpt_jax.data.cache import LabelSet
from mpt_jax.errors import UserError
from mpt_jax.predict import _in_batches, make_generate, make_rank, predict_texts, predict_tokens, rank_labels
from mpt_jax.prompted_t5 import forward, inject
from mpt_jax.prompts import build_prompt

LENGTHS = {"inputs": 128, "targets": 6}
LABEL_SETS = (
    LabelSet(("a", "b", "c"), ((5, 1), (6, 7, 8, 9, 1), (5, 5, 1))),
    LabelSet(("maybe", "no"), ((40, 41, 1), (3, 1))),
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    config = tiny.experiment(tiny.make(tmp_path_factory.mktemp("predict")), "x")
    return setup.open_backbone(config, setup.mesh_of(config))


@pytest.fixture(scope="module")
def bank():
    """Three prompts that make the tiny T5 say different things, and their module."""
    prompts = 3 * jax.random.normal(jax.random.key(5), (3, 4, tiny.CONFIG.d_model))
    return build_prompt(tiny.experiment(Path(), "x").prompt, (0, 1, 2), tiny.CONFIG.d_model), {"prompt": prompts}


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    sizes = [3, 128, 60, 32, 33, 65]
    return [rng.integers(3, 70, size).astype(np.int32) for size in sizes]


def test_a_mixed_batch_gives_each_example_what_it_gets_alone(backbone, bank, inputs):
    """Tasks, lengths and batch sizes mixed, against one unpadded example at a time through the pure functions."""
    module, trainable = bank
    task_ids = [n % 3 for n in range(len(inputs))]

    @jax.jit
    def alone(tokens, prompt):
        x = backbone.model.apply({"params": backbone.params}, tokens[None], method="embed")
        x, mask = inject(prompt[None], x, jnp.ones((1, len(tokens))))
        encoded = backbone.model.apply({"params": backbone.params}, x, mask, method="encode").output
        return decoding.greedy(backbone.model, backbone.params, encoded, mask, LENGTHS["targets"]).tokens[0]

    expected = [alone(tokens, trainable["prompt"][task]) for tokens, task in zip(inputs, task_ids, strict=True)]
    assert len({tuple(np.asarray(one).tolist()) for one in expected}) > 3
    for size in (4, 64):
        decode = DecodeConfig(batch_size=size)
        outputs = predict_tokens(backbone, module, trainable, inputs, task_ids, lengths=LENGTHS, decode=decode)
        np.testing.assert_array_equal(outputs.tokens, expected)


def test_few_shapes_are_compiled(backbone, bank, inputs):
    """Inputs are padded to T, T/2 or T/4 and batches filled up: three programs at most, whatever comes."""
    module, trainable = bank
    decode = DecodeConfig(batch_size=4, max_length=5)
    generate = make_generate(backbone.model, module, dataclasses.replace(decode, batch_size=1))
    for part in (inputs, inputs[:1], inputs[::2], inputs[3:], inputs * 2):
        predict_tokens(backbone, module, trainable, part, [0] * len(part), lengths=LENGTHS, decode=decode)
    assert generate._cache_size() <= 3


def test_batches_hold_inputs_of_like_length_and_results_keep_their_order():
    """Short and long inputs in turns: sorted, half of the batches need a quarter of the length."""
    inputs = [np.full(5 if n % 2 else 120, n + 1, np.int32) for n in range(16)]
    shapes = []

    def first_tokens(batch):
        shapes.append(batch["encoder_tokens"].shape)
        return batch["encoder_tokens"][:, 0], batch["numbers"]

    first, numbers = _in_batches(first_tokens, inputs, {"numbers": range(100, 116)}, 128, 4, None)
    assert first.tolist() == list(range(1, 17)) and numbers.tolist() == list(range(100, 116))
    assert shapes == [(4, 32), (4, 32), (4, 128), (4, 128)]


def test_beam_search_is_reached(backbone, bank, inputs):
    module, trainable = bank
    decode = DecodeConfig(batch_size=4, num_beams=3)
    beams = predict_tokens(backbone, module, trainable, inputs[:1], [1], lengths=LENGTHS, decode=decode)
    assert beams.tokens.shape == (1, LENGTHS["targets"])
    nothing = predict_tokens(backbone, module, trainable, [], [], lengths=LENGTHS, decode=decode)
    assert nothing.tokens.shape == (0, LENGTHS["targets"]) and nothing.scores.shape == (0,)
    assert rank_labels(backbone, module, trainable, [], [], [], lengths=LENGTHS, decode=decode) == []


def test_what_is_drawn_does_not_depend_on_the_batch(backbone, bank, inputs):
    """Batch sizes, order, company and another compiled length; what counts is the seed and the example's own number."""
    common = {"lengths": LENGTHS}
    numbers = [11, 5, 0, 7, 3, 12]

    def draw(rows, batch_size, seed=0, numbers=numbers):
        decode = DecodeConfig(batch_size=batch_size, temperature=1.0, seed=seed)
        chosen = [inputs[row] for row in rows], [row % 3 for row in rows]
        return predict_tokens(backbone, *bank, *chosen, decode=decode, numbers=[numbers[row] for row in rows], **common)

    rows = list(range(len(inputs)))
    first = draw(rows, 4)
    for order, size in ((rows, 1), (rows[::-1], 3), ([3, 0, 5, 1, 4, 2], 64), ([4], 4)):
        again = draw(order, size)
        np.testing.assert_array_equal(again.tokens, first.tokens[order])
        np.testing.assert_allclose(again.scores, first.scores[order], rtol=1e-4)
    assert not (draw(rows, 4, seed=1).tokens == first.tokens).all(axis=1).any()
    assert not (draw(rows, 4, numbers=[n + 1 for n in numbers]).tokens == first.tokens).all(axis=1).any()


def test_a_seed_or_batch_size_makes_no_new_program(backbone, bank, inputs):
    programs = make_generate.cache_info().misses
    for seed, size in ((0, 4), (1, 4), (2, 8)):
        decode = DecodeConfig(batch_size=size, max_length=2, temperature=0.5, seed=seed)
        predict_tokens(backbone, *bank, inputs[:1], [0], lengths=LENGTHS, decode=decode)
    assert make_generate.cache_info().misses == programs + 1


def test_ranking_equals_a_pass_for_each_label(backbone, bank, inputs):
    """Label sets, tasks, lengths and batch sizes mixed; against one unpadded example and label at a time."""
    module, trainable = bank
    task_ids = [n % 3 for n in range(len(inputs))]
    labels = [LABEL_SETS[n % 2] for n in range(len(inputs))]

    @jax.jit
    def alone(tokens, target, prompt):
        batch = {"encoder_tokens": tokens[None], "decoder_input_tokens": jnp.pad(target, (1, 0))[None, :-1]}
        log_p = jax.nn.log_softmax(forward(backbone.model, backbone.params, batch, prompt[None]).logits[0])
        return jnp.take_along_axis(log_p, target[:, None], axis=1)[:, 0]

    def padded(target):  # what stands behind it does not count: one shape, one compilation
        return np.asarray([*target, *[2] * (5 - len(target))])

    expected = [
        [float(alone(tokens, padded(target), trainable["prompt"][task])[: len(target)].sum()) for target in label_set.tokens]
        for tokens, task, label_set in zip(inputs, task_ids, labels, strict=True)
    ]
    assert len({int(np.argmax(row)) for row in expected}) > 1
    for size in (4, 64):
        decode = DecodeConfig(method="rank", batch_size=size)
        scores = rank_labels(backbone, module, trainable, inputs, task_ids, labels, lengths=LENGTHS, decode=decode)
        for found, row in zip(scores, expected, strict=True):
            np.testing.assert_allclose(found, row, rtol=1e-5)
        answers = predict_texts(
            backbone, module, trainable, inputs, task_ids, vocabulary=None, lengths=LENGTHS, decode=decode, labels=labels
        )
        for answer, row, label_set in zip(answers, expected, labels, strict=True):
            assert answer.text == label_set.texts[int(np.argmax(row))]
            np.testing.assert_allclose(list(answer.scores.values()), row, rtol=1e-5)
    mean = DecodeConfig(method="rank", label_score="mean")
    scores = rank_labels(backbone, module, trainable, inputs, task_ids, labels, lengths=LENGTHS, decode=mean)
    for found, row, label_set in zip(scores, expected, labels, strict=True):
        np.testing.assert_allclose(found, np.array(row) / [len(tokens) for tokens in label_set.tokens], rtol=1e-5)


def test_of_equal_scores_the_first_label_wins(backbone, bank, inputs):
    """Of a T5 to which every token is as likely as any other."""
    decoder = backbone.params["decoder"] | {"logits_dense": {"kernel": jnp.zeros((tiny.CONFIG.d_model, tiny.CONFIG.vocab_size))}}
    backbone = backbone._replace(params=backbone.params | {"decoder": decoder})
    labels = [LabelSet(("first", "second", "third"), ((9, 1), (8, 1), (7, 1)))] * 2
    common = {"vocabulary": None, "lengths": LENGTHS, "decode": DecodeConfig(method="rank")}
    answers = predict_texts(backbone, *bank, inputs[:2], [0, 1], labels=labels, **common)
    assert [answer.text for answer in answers] == ["first", "first"]
    assert len(set(answers[0].scores.values())) == 1


def test_ranking_compiles_few_shapes(backbone, bank, inputs):
    decode = DecodeConfig(method="rank", batch_size=5)
    rank = make_rank(backbone.model, bank[0])
    before = rank._cache_size()
    for part in (inputs, inputs[:1], inputs[3:], inputs * 2):
        labels = [LABEL_SETS[0]] * len(part)
        rank_labels(backbone, *bank, part, [0] * len(part), labels, lengths=LENGTHS, decode=decode)
    assert rank._cache_size() - before <= 3


WRONG = {
    "temperature and beams": ({"temperature": 0.7, "num_beams": 4}, "temperature is 0.7 and DecodeConfig.num_beams is 4"),
    "top_k and top_p": ({"temperature": 1.0, "top_k": 5, "top_p": 0.9}, "top_k is 5 and DecodeConfig.top_p is 0.9"),
    "top_k of nothing": ({"top_k": 5}, "top_k is 5, but DecodeConfig.temperature=0 draws nothing"),
    "ranked samples": ({"method": "rank", "temperature": 1.0}, "temperature is 1.0, but DecodeConfig.method='rank'"),
    "ranked length": ({"method": "rank", "max_length": 3}, "max_length is 3, but DecodeConfig.method='rank'"),
    "ranked penalty": (
        {"method": "rank", "length_penalty": 0.6},
        "length_penalty is 0.6, but DecodeConfig.num_beams=1 leaves no",
    ),
    "penalty": ({"length_penalty": 0.0}, "length_penalty is 0.0, but DecodeConfig.num_beams=1 leaves no"),
    "labels' score": ({"label_score": "mean"}, "label_score is 'mean', but DecodeConfig.method='generate' scores no labels"),
    "seed of nothing": ({"seed": 3}, "seed is 3, but DecodeConfig.temperature=0 draws nothing"),
    "ranked beams": ({"method": "rank", "num_beams": 2}, "num_beams is 2, but DecodeConfig.method='rank'"),
    "freezing": ({"temperature": 1e-6}, "temperature must be 0 .* or at least 0.0001, not 1e-06"),
    "infinite": ({"temperature": float("inf")}, "temperature must be 0 .* not inf"),
    "no probability": ({"temperature": 1.0, "top_p": 1.5}, "top_p must be from 0 to 1, not 1.5"),
    "negative": ({"temperature": 1.0, "top_k": -1}, "top_k must not be negative, not -1"),
    "seed": ({"seed": -1}, "seed must be from 0 to 2147483647, not -1"),
    "method": ({"method": "ranks"}, "method must be one of generate, rank, not 'ranks'.* Did you mean 'rank'"),
    "score": ({"label_score": "max"}, "label_score must be one of sum, mean, not 'max'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_contradict_each_other(name):
    settings, message = WRONG[name]
    with pytest.raises(UserError, match=rf"^DecodeConfig\.{message}.*[.?]$"):
        DecodeConfig(**settings).validate()
