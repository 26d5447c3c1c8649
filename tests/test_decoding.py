"""Every way of decoding against plain loops over the uncached model and NumPy (against transformers: test_parity_hf.py)."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mpt_jax.config import T5Config
from mpt_jax.decoding import _Beams, _extend, beam, greedy, label_scores, restrict, sample
from mpt_jax.models import T5, init_params, param_shapes

CONFIG = T5Config(vocab_size=7, d_model=16, d_kv=4, num_heads=2, d_ff=24, num_encoder_layers=1, num_decoder_layers=2)
STEPS = 4


@functools.cache
def setting(seed: int = 0) -> tuple[T5, Any, np.ndarray, np.ndarray]:
    """A model whose outputs end at different lengths, with the encoder's output of five inputs."""
    model, params = T5(CONFIG), init_params(CONFIG, jax.random.key(seed))
    inputs = np.random.default_rng(seed).integers(2, 7, (5, 6))
    mask = (np.arange(6)[None] < np.array([[6], [5], [3], [2], [1]])).astype(np.int32)
    variables = {"params": params}
    encode = jax.jit(lambda tokens: model.apply(variables, model.apply(variables, tokens, method="embed"), mask, method="encode"))
    return model, params, np.asarray(encode(inputs).output), mask


@functools.partial(jax.jit, static_argnames="model")
def log_probabilities(model: T5, params: Any, encoded: Any, mask: Any, targets: jax.Array) -> jax.Array:
    """Of each token of the targets [B, L], given those before it; by one pass without cache."""
    inputs = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    logits = model.apply({"params": params}, inputs, encoded, mask, method="decode").logits
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, :, None], axis=-1)[..., 0]


def test_greedy_equals_a_loop_without_cache() -> None:
    model, params, encoded, mask = setting()
    found = jax.jit(lambda e, m: greedy(model, params, e, m, STEPS))(encoded, mask)
    tokens, scores = np.zeros((5, STEPS), np.int32), np.zeros(5)
    finished = np.zeros(5, bool)
    decode = jax.jit(lambda inputs: model.apply({"params": params}, inputs, encoded, mask, method="decode").logits)
    for step in range(STEPS):  # what stands after `step` cannot matter: the decoder is causal
        logits = decode(np.pad(tokens, ((0, 0), (1, 0)))[:, :-1])[:, step]
        chosen = np.asarray(jnp.argmax(logits, axis=-1))
        best = np.asarray(jax.nn.log_softmax(logits).max(axis=-1))
        tokens[:, step] = np.where(finished, 0, chosen)
        scores += np.where(finished, 0, best)
        finished |= chosen == 1
    np.testing.assert_array_equal(found.tokens, tokens)
    np.testing.assert_allclose(found.scores, scores, atol=1e-4)
    assert found.tokens.dtype == jnp.int32
    assert 0 < finished.sum() < 5  # rows that end and rows that do not


@pytest.mark.parametrize("search", ["greedy", "sample", "beam"])
def test_a_row_is_decoded_as_if_alone(search: str) -> None:
    model, params, encoded, mask = setting()

    @jax.jit
    def run(encoded: jax.Array, mask: jax.Array, keys: jax.Array) -> Any:
        if search == "beam":
            return beam(model, params, encoded, mask, STEPS, num_beams=3)
        if search == "greedy":
            return greedy(model, params, encoded, mask, STEPS)
        return sample(model, params, encoded, mask, STEPS, keys)

    keys = jax.random.split(jax.random.key(3), 5)
    together = run(encoded, mask, keys)
    for row in range(5):
        alone = run(encoded[row : row + 1], mask[row : row + 1], keys[row : row + 1])
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
        np.testing.assert_allclose(together.scores[row], alone.scores[0], atol=1e-5)


def restricted(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The distribution [V] to draw from, token by token from the likeliest down."""
    probabilities = np.exp(logits.astype(np.float64) / temperature)
    probabilities /= probabilities.sum()
    kept: list[int] = []
    for token in np.argsort(-probabilities):
        if (top_k and len(kept) == top_k) or (top_p and probabilities[kept].sum() >= top_p):
            break
        kept.append(int(token))
    result = np.zeros_like(probabilities)
    result[kept] = probabilities[kept] / probabilities[kept].sum()
    return result


RESTRICTIONS = [
    (1.0, 0, 0.0),
    (0.5, 0, 0.0),
    (3.0, 3, 0.0),
    (1.0, 1, 0.0),
    (1.0, 99, 0.0),
    (2.0, 0, 0.7),
    (1.0, 0, 1e-6),
    (1.0, 0, 1.0),
]


@pytest.mark.parametrize("temperature, top_k, top_p", RESTRICTIONS)
def test_restrictions_equal_numpy(temperature: float, top_k: int, top_p: float) -> None:
    logits = 3 * np.random.default_rng(0).standard_normal((20, 11)).astype(np.float32)
    found = jax.nn.softmax(jax.jit(lambda x: restrict(x, temperature, top_k, top_p))(logits))
    np.testing.assert_allclose(found, [restricted(row, temperature, top_k, top_p) for row in logits], atol=1e-6)


def test_equally_likely_tokens_stay_together() -> None:
    logits = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.2]]))
    for kept in ({"top_k": 2}, {"top_p": 0.5}):
        assert np.isfinite(restrict(logits, 1.0, **kept)).tolist() == [[True] * 4]


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 0.0), (0.6, 0, 0.0), (1.5, 3, 0.0), (1.5, 0, 0.8)])
def test_samples_are_distributed_as_the_model_says(temperature: float, top_k: int, top_p: float) -> None:
    """Two tokens of one input, drawn 6,000 times: their joint frequencies fit the exact product of two restricted softmaxes."""
    model, params, encoded, mask = setting()
    draws, steps, vocab = 6000, 2, CONFIG.vocab_size
    prefixes = np.array([[first, 0] for first in range(vocab)])
    sources = np.repeat(encoded[:1], vocab, axis=0), np.repeat(mask[:1], vocab, axis=0)
    logits = model.apply({"params": params}, np.pad(prefixes, ((0, 0), (1, 0)))[:, :-1], *sources, method="decode").logits
    exact = np.zeros((vocab, vocab))  # of (first, second) token; after EOS the second is 0
    for first, p in enumerate(restricted(np.asarray(logits[0, 0]), temperature, top_k, top_p)):
        exact[first] = p * (
            np.eye(vocab)[0] if first == 1 else restricted(np.asarray(logits[first, 1]), temperature, top_k, top_p)
        )

    @jax.jit
    def run(keys: jax.Array) -> Any:
        rows = jnp.repeat(encoded[:1], draws, axis=0), jnp.repeat(mask[:1], draws, axis=0)
        return sample(model, params, *rows, steps, keys, temperature, top_k, top_p)

    found = run(jax.random.split(jax.random.key(0), draws))
    counts = np.zeros((vocab, vocab))
    np.add.at(counts, tuple(np.asarray(found.tokens).T), 1)
    assert not counts[exact == 0].any()  # what is masked is never drawn
    frequent = exact * draws >= 5  # the usual rule for this test; the rest is one class
    observed = np.append(counts[frequent], counts[~frequent].sum())
    expected = np.append(exact[frequent], exact[~frequent].sum()) * draws
    real = expected > 0
    assert real.sum() > 4
    assert stats.chisquare(observed[real], expected[real]).pvalue > 1e-3
    # The scores are the model's own, whatever the temperature and the tokens left out.
    log_p = np.asarray(jax.nn.log_softmax(logits))
    first, second = np.asarray(found.tokens).T
    np.testing.assert_allclose(found.scores, log_p[0, 0, first] + np.where(first == 1, 0, log_p[first, 1, second]), atol=1e-4)


def test_cold_samples_and_the_top_one_are_greedy() -> None:
    model, params, encoded, mask = setting()
    expected = jax.jit(lambda e, m: greedy(model, params, e, m, STEPS))(encoded, mask)
    keys = jax.random.split(jax.random.key(0), 5)
    for temperature, top_k, top_p in ((1e-4, 0, 0.0), (5.0, 1, 0.0), (1.0, 0, 1e-6)):
        found = sample(model, params, jnp.asarray(encoded), jnp.asarray(mask), STEPS, keys, temperature, top_k, top_p)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)


def test_labels_score_as_each_alone() -> None:
    """[B, C, L] with padding in L and in C, which is cut into parts, against one unpadded label of one input at a time."""
    model, params, encoded, mask = setting()
    many = [(token, 1) for token in range(2, 7)] + [(token, 4, token, 3, 1) for token in range(2, 6)]
    labels = [[(2, 1), (3, 4, 5, 1)], [(6, 1)], [(4, 4, 1), (4, 1), (3,)], many, [(5, 6), (6, 5)]]
    table = np.zeros((5, 11, 6), np.int32)
    for row, choices in enumerate(labels):
        for c, tokens in enumerate(choices):
            table[row, c, : len(tokens)] = tokens
    found = np.asarray(jax.jit(lambda e, m, t: label_scores(model, params, e, m, t))(encoded, mask, table))
    for row, choices in enumerate(labels):
        source = encoded[row : row + 1], mask[row : row + 1]
        alone = [float(log_probabilities(model, params, *source, np.array([tokens])).sum()) for tokens in choices]
        np.testing.assert_allclose(found[row, : len(choices)], alone, atol=1e-5)
        assert (found[row, len(choices) :] == -np.inf).all()


def test_memory_does_not_grow_with_the_labels() -> None:
    """What the compiled program needs beside its arguments, in which logits over a large vocabulary are by far the most."""
    config = dataclasses.replace(CONFIG, vocab_size=20_000)
    model, params = T5(config), param_shapes(config)
    encoded, mask = jax.ShapeDtypeStruct((16, 6, config.d_model), jnp.float32), jax.ShapeDtypeStruct((16, 6), jnp.int32)

    def temporaries(classes: int) -> int:
        labels = jax.ShapeDtypeStruct((16, classes, 3), jnp.int32)
        program = jax.jit(lambda *arguments: label_scores(model, *arguments)).lower(params, encoded, mask, labels).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(32) < 1.1 * temporaries(4)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_wide_beam_search_finds_the_best_of_all_outputs(length_penalty: float) -> None:
    """With as many beams as there are prefixes nothing is pruned, so the result is the optimum over all 3-token outputs."""
    model, params, encoded, mask = setting(seed=1)
    steps, vocab = 3, CONFIG.vocab_size
    found = jax.jit(lambda e, m: beam(model, params, e, m, steps, num_beams=64, length_penalty=length_penalty))(encoded, mask)
    outputs = [
        row
        for row in itertools.product(range(vocab), repeat=steps)
        if 1 not in row or not any(row[row.index(1) + 1 :])  # nothing but padding after EOS
    ]
    targets = np.array(outputs)
    lengths = np.array([row.index(1) + 1 if 1 in row else steps for row in outputs])
    counted = np.arange(steps)[None] < lengths[:, None]
    for row in range(3):
        repeated = np.repeat(encoded[row : row + 1], len(targets), axis=0)
        repeated_mask = np.repeat(mask[row : row + 1], len(targets), axis=0)
        totals = (log_probabilities(model, params, repeated, repeated_mask, targets) * counted).sum(
            axis=1
        ) / lengths**length_penalty
        assert found.tokens[row].tolist() == list(outputs[int(totals.argmax())])
        best = int(totals.argmax())
        np.testing.assert_allclose(found.scores[row], totals[best] * lengths[best] ** length_penalty, atol=1e-5)


def test_one_beam_without_penalty_is_greedy_until_it_ends() -> None:
    model, params, encoded, mask = setting()
    narrow = jax.jit(lambda e, m: beam(model, params, e, m, STEPS, num_beams=1, length_penalty=0.0))(encoded, mask)
    plain = jax.jit(lambda e, m: greedy(model, params, e, m, STEPS))(encoded, mask)
    np.testing.assert_array_equal(narrow.tokens, plain.tokens)
    np.testing.assert_allclose(narrow.scores, plain.scores, atol=1e-5)


def test_decoding_stops_when_every_row_is_finished() -> None:
    """With EOS certain, one step is run out of a million; otherwise this test would not end."""
    model, params, encoded, mask = setting()
    params = jax.tree.map(lambda leaf: leaf, params)
    params["decoder"]["decoder_norm"]["scale"] = jnp.zeros(CONFIG.d_model).at[0].set(1.0)
    kernel = params["decoder"]["logits_dense"]["kernel"]
    params["decoder"]["logits_dense"]["kernel"] = jnp.zeros_like(kernel)  # all equal: argmax takes id 0, our "EOS" here
    found = jax.jit(lambda e, m: greedy(model, params, e, m, 20_000, eos_id=0))(encoded, mask)
    assert not found.tokens.any()
    np.testing.assert_allclose(found.scores, -np.log(CONFIG.vocab_size), rtol=1e-5)


def test_only_the_first_beams_continuations_may_end() -> None:
    """Of the 2W best continuations, one that ends but ranks behind W is dropped, not finished (as in transformers)."""
    width = 2
    start = _Beams(
        step=jnp.int32(1),
        running=jnp.array([[[2, 0, 0], [3, 0, 0]]]),
        running_scores=jnp.array([[-1.0, -1.5]]),
        finished=jnp.zeros((1, width, 3), jnp.int32),
        finished_scores=jnp.full((1, width), -1e9),
        is_finished=jnp.zeros((1, width), bool),
        open=jnp.ones((1,), bool),
        self_key=jnp.arange(2.0).reshape(1, 2, 1, 1, 1),
        self_value=jnp.arange(2.0).reshape(1, 2, 1, 1, 1),
    )

    def after(probabilities: list[list[float]]) -> _Beams:
        return _extend(start, jnp.log(jnp.array(probabilities)), width, max_length=3, length_penalty=1.0, eos_id=1)

    even = [0.02, 0.02, 0.02, 0.02, 0.02, 0.9]
    third = after([[0.01, 0.2, 0.01, 0.01, 0.47, 0.3], even])  # EOS of beam 0 comes after 5 of beam 1 and 4 of beam 0
    assert not third.is_finished.any()
    assert third.running[0].tolist() == [[3, 5, 0], [2, 4, 0]]
    assert third.self_key[0, :, 0, 0, 0].tolist() == [1.0, 0.0]  # the cache's rows follow their beams
    second = after([[0.01, 0.47, 0.01, 0.01, 0.2, 0.3], even])
    assert second.is_finished[0].tolist() == [True, False]
    assert second.finished[0, 0].tolist() == [2, 1, 0]
    np.testing.assert_allclose(second.finished_scores[0, 0], (-1.0 + np.log(0.47)) / 2, rtol=1e-5)
    assert second.running[0].tolist() == [[3, 5, 0], [2, 5, 0]]
