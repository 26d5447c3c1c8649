"""Greedy search, sampling, beam search and label ranking over a T5, pure and jittable.

All take the encoder's output with its mask, prompt included. The first three decode with a cache and stop as soon as every row
is finished; `model`, `max_length` and what steers the search (`temperature`, `top_k`, `top_p`, `num_beams`, `length_penalty`)
are static.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpt_jax.losses import cross_entropy
from mpt_jax.models.t5 import T5, Cache, Params, start_cache

IMPOSSIBLE = -1e9  # a score below every real one, finite so that sums with it stay ordered
LABELS_AT_ONCE = 4  # of an input: all labels' logits together would take several times the memory of a large model


class Generated(NamedTuple):
    tokens: jax.Array  # [B, M] int32, ends with EOS where it fits, 0 after it
    scores: jax.Array  # [B] float32: sum of the tokens' log-probabilities under the model, EOS included; nats


def greedy(model: T5, params: Params, encoded: jax.Array, mask: jax.Array, max_length: int, eos_id: int = 1) -> Generated:
    """The likeliest token at each of at most `max_length` = M steps. encoded [B, S, D], mask [B, S]."""

    def likeliest(logits: jax.Array, step: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1)

    return _one_by_one(likeliest, model, params, encoded, mask, max_length, eos_id)


def sample(
    model: T5,
    params: Params,
    encoded: jax.Array,
    mask: jax.Array,
    max_length: int,
    keys: jax.Array,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    eos_id: int = 1,
) -> Generated:
    """A token drawn from the model's distribution, sharpened by `restrict`, at each of at most `max_length` = M steps.

    t5x `decoding.py:temperature_sample`, with two differences. Each row draws by a key of its own and the step, so that its
    sample depends neither on the batch nor on its place there. And the scores are those of the model itself, untempered and
    with all tokens (T5X's `rescale_log_probs=False`), so that they compare with those of other searches.

    Args:
        encoded: [B, S, D], with its mask [B, S].
        keys: [B] random keys, one for each row.
        temperature, top_k, top_p: see `restrict`.
    """

    def draw(logits: jax.Array, step: jax.Array) -> jax.Array:
        now = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
        return jax.vmap(jax.random.categorical)(now, restrict(logits, temperature, top_k, top_p))

    return _one_by_one(draw, model, params, encoded, mask, max_length, eos_id)


def restrict(logits: jax.Array, temperature: float, top_k: int = 0, top_p: float = 0.0) -> jax.Array:
    """logits [B, V] / temperature, -inf for tokens that must not be drawn (t5x `binary_search.py:topk_mask`, `topp_mask`).

    Args:
        temperature: above 0; 1 leaves the model's probabilities as they are.
        top_k: keep the k likeliest tokens; 0 = all.
        top_p: keep the likeliest tokens that together first reach this probability, after the temperature; 0 or 1 = all.
            Tokens as likely as the last one kept stay, too, of both.
    """
    logits = logits / temperature
    if top_k:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if 0 < top_p < 1:
        falling = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(falling, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        least = jnp.min(jnp.where(before < top_p, falling, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def label_scores(model: T5, params: Params, encoded: jax.Array, mask: jax.Array, labels: jax.Array) -> jax.Array:
    """Log-probability of every one of an input's C labels, teacher-forced (t5x `models.py:score_batch`).

    `LABELS_AT_ONCE` labels of each input are decoded at a time; the encoder's keys and values are made once for all.

    Args:
        encoded: [B, S, D], with its mask [B, S]; it is not copied for the labels.
        labels: [B, C, L] int32 tokens, with EOS where targets have one, 0 after them; all 0 where an input has fewer labels.

    Returns:
        [B, C] float32: sum of the tokens' log-probabilities in nats, -inf where there is no label.
    """
    batch, classes, length = labels.shape
    parts = -(-classes // LABELS_AT_ONCE)
    size = -(-classes // parts)
    filled = jnp.pad(labels, ((0, 0), (0, parts * size - classes), (0, 0)))
    cache = start_cache(model, params, encoded, length)
    empty = jnp.repeat(cache.self_key, size, axis=1)
    cache = cache._replace(self_key=empty, self_value=empty)

    def score(part: jax.Array) -> jax.Array:
        """[B, size, L] -> [B, size]."""
        targets = part.reshape(-1, length)
        inputs = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
        logits = model.apply({"params": params}, inputs, None, mask, cache=cache, method="decode").logits
        return -cross_entropy(logits, targets, targets > 0).sum(axis=-1).reshape(batch, size)

    scores = jax.lax.map(score, filled.reshape(batch, parts, size, length).swapaxes(0, 1))
    scores = scores.swapaxes(0, 1).reshape(batch, -1)[:, :classes]
    return jnp.where(labels[:, :, 0] > 0, scores, -jnp.inf)


def _one_by_one(
    choose: Callable[[jax.Array, jax.Array], jax.Array],
    model: T5,
    params: Params,
    encoded: jax.Array,
    mask: jax.Array,
    max_length: int,
    eos_id: int,
) -> Generated:
    """The tokens that `choose(logits [B, V], step)` -> [B] takes, until EOS or `max_length`."""
    batch = encoded.shape[0]
    cache = start_cache(model, params, encoded, max_length)
    cross = {"cross_key": cache.cross_key, "cross_value": cache.cross_value}  # never changes: kept out of the loop's state

    def unfinished(state: tuple) -> jax.Array:
        step, _, finished, _, _ = state
        return (step < max_length) & ~jnp.all(finished)

    def advance(state: tuple) -> tuple:
        step, previous, finished, (tokens, scores), self_cache = state
        logits, cache = _next_logits(model, params, previous, mask, Cache(step, *self_cache, **cross))
        chosen = choose(logits, step).astype(jnp.int32)
        log_probability = jnp.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
        scores = scores + jnp.where(finished, 0.0, log_probability)
        chosen = jnp.where(finished, 0, chosen)
        tokens = jax.lax.dynamic_update_slice(tokens, chosen[:, None], (0, step))
        return step + 1, chosen, finished | (chosen == eos_id), (tokens, scores), (cache.self_key, cache.self_value)

    start = (
        jnp.zeros((), jnp.int32),
        jnp.zeros((batch,), jnp.int32),
        jnp.zeros((batch,), bool),
        (jnp.zeros((batch, max_length), jnp.int32), jnp.zeros((batch,), jnp.float32)),
        (cache.self_key, cache.self_value),
    )
    tokens, scores = jax.lax.while_loop(unfinished, advance, start)[3]
    return Generated(tokens, scores)


class _Beams(NamedTuple):
    """State of beam search; W = num_beams. Running beams can still grow; finished ones are the best complete outputs so far."""

    step: jax.Array
    running: jax.Array  # [B, W, M] tokens
    running_scores: jax.Array  # [B, W] sums of log-probabilities
    finished: jax.Array  # [B, W, M] tokens
    finished_scores: jax.Array  # [B, W] normalised by length; best first
    is_finished: jax.Array  # [B, W] whether that place is taken
    open: jax.Array  # [B] whether a running beam may still beat the finished ones
    self_key: jax.Array
    self_value: jax.Array


def beam(
    model: T5,
    params: Params,
    encoded: jax.Array,
    mask: jax.Array,
    max_length: int,
    num_beams: int = 4,
    length_penalty: float = 1.0,
    eos_id: int = 1,
) -> Generated:
    """The best of `num_beams` beams by log-probability / length**length_penalty, length with EOS. encoded [B, S, D], mask [B, S].

    Same search as transformers' `generate(num_beams=W, early_stopping=False)`: each step looks at the 2W best continuations;
    those of the first W that end enter the finished ones; a row is done when its best running beam, taken at its present
    length, is below its worst finished one.
    """
    batch = encoded.shape[0]
    once = start_cache(model, params, encoded, max_length)
    cross = {"cross_key": once.cross_key, "cross_value": once.cross_value}  # the beams of an input share them

    def advance(beams: _Beams) -> _Beams:
        previous = jax.lax.dynamic_index_in_dim(beams.running, jnp.maximum(beams.step - 1, 0), axis=2, keepdims=False)
        previous = jnp.where(beams.step == 0, 0, previous).reshape(-1)
        cache = Cache(beams.step, beams.self_key, beams.self_value, **cross)
        logits, cache = _next_logits(model, params, previous, mask, cache)
        beams = beams._replace(self_key=cache.self_key, self_value=cache.self_value)
        return _extend(beams, logits, num_beams, max_length, length_penalty, eos_id)

    tokens = jnp.zeros((batch, num_beams, max_length), jnp.int32)
    first_only = jnp.where(jnp.arange(num_beams) == 0, 0.0, IMPOSSIBLE)[None]  # all beams are equal at the start
    beams = _Beams(
        step=jnp.zeros((), jnp.int32),
        running=tokens,
        running_scores=jnp.broadcast_to(first_only, (batch, num_beams)),
        finished=tokens,
        finished_scores=jnp.full((batch, num_beams), IMPOSSIBLE),
        is_finished=jnp.zeros((batch, num_beams), bool),
        open=jnp.ones((batch,), bool),
        self_key=jnp.repeat(once.self_key, num_beams, axis=1),
        self_value=jnp.repeat(once.self_value, num_beams, axis=1),
    )
    beams = jax.lax.while_loop(lambda beams: (beams.step < max_length) & jnp.any(beams.open), advance, beams)
    best = beams.finished[:, 0]
    ends = best == eos_id
    lengths = jnp.where(jnp.any(ends, axis=1), jnp.argmax(ends, axis=1) + 1, max_length)
    return Generated(best, beams.finished_scores[:, 0] * lengths.astype(jnp.float32) ** length_penalty)


def _extend(beams: _Beams, logits: jax.Array, num_beams: int, max_length: int, length_penalty: float, eos_id: int) -> _Beams:
    """One step of the search, given the next tokens' logits [B*W, V]."""
    batch, vocab = beams.open.shape[0], logits.shape[-1]
    scores = jax.nn.log_softmax(logits, axis=-1).reshape(batch, num_beams, vocab) + beams.running_scores[:, :, None]
    scores, flat = jax.lax.top_k(scores.reshape(batch, -1), 2 * num_beams)
    parents, chosen = flat // vocab, (flat % vocab).astype(jnp.int32)
    tokens = jnp.take_along_axis(beams.running, parents[:, :, None], axis=1)
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, chosen[:, :, None], beams.step, axis=2)
    length = beams.step + 1
    ends = (chosen == eos_id) | (length == max_length)

    running_scores, kept = jax.lax.top_k(jnp.where(ends, scores + IMPOSSIBLE, scores), num_beams)
    rows = jnp.arange(batch)[:, None] * num_beams + jnp.take_along_axis(parents, kept, axis=1)

    penalty = length.astype(jnp.float32) ** length_penalty
    enters = ends & (jnp.arange(2 * num_beams) < num_beams)[None] & beams.open[:, None]
    candidates = jnp.concatenate([beams.finished_scores, jnp.where(enters, scores / penalty, IMPOSSIBLE)], axis=1)
    finished_scores, best = jax.lax.top_k(candidates, num_beams)
    finished = jnp.take_along_axis(jnp.concatenate([beams.finished, tokens], axis=1), best[:, :, None], axis=1)
    is_finished = jnp.take_along_axis(jnp.concatenate([beams.is_finished, enters], axis=1), best, axis=1)

    full = jnp.all(is_finished, axis=1)
    hopeless = running_scores[:, 0] / penalty <= finished_scores[:, -1]
    return _Beams(
        step=length,
        running=jnp.take_along_axis(tokens, kept[:, :, None], axis=1),
        running_scores=running_scores,
        finished=finished,
        finished_scores=finished_scores,
        is_finished=is_finished,
        open=beams.open & ~(full & hopeless),
        self_key=jnp.take(beams.self_key, rows.reshape(-1), axis=1),
        self_value=jnp.take(beams.self_value, rows.reshape(-1), axis=1),
    )


def _next_logits(model: T5, params: Params, previous: jax.Array, mask: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Logits [rows, V] after the tokens previous [rows]; rows = B, or B * W with the W beams of an input side by side."""
    decoded = model.apply({"params": params}, previous[:, None], None, mask, cache=cache, method="decode")
    return decoded.logits[:, 0], decoded.cache
