"""Greedy and beam search over a T5, pure and jittable (`model`, `max_length`, `num_beams`, `length_penalty` static).

Both take the encoder's output with its mask, prompt included, decode with a cache and stop as soon as every row is finished.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpt_jax.models.t5 import T5, Cache, Params, start_cache

IMPOSSIBLE = -1e9  # a score below every real one, finite so that sums with it stay ordered


class Generated(NamedTuple):
    tokens: jax.Array  # [B, M] int32, ends with EOS where it fits, 0 after it
    scores: jax.Array  # [B] float32: sum of the tokens' log-probabilities, of beam search over length**length_penalty


def greedy(model: T5, params: Params, encoded: jax.Array, mask: jax.Array, max_length: int, eos_id: int = 1) -> Generated:
    """The likeliest token at each of at most `max_length` = M steps. encoded [B, S, D], mask [B, S]."""
    batch = encoded.shape[0]
    cache = start_cache(model, params, encoded, max_length)
    cross = {"cross_key": cache.cross_key, "cross_value": cache.cross_value}  # never changes: kept out of the loop's state

    def unfinished(state: tuple) -> jax.Array:
        step, _, finished, _, _ = state
        return (step < max_length) & ~jnp.all(finished)

    def advance(state: tuple) -> tuple:
        step, previous, finished, (tokens, scores), self_cache = state
        logits, cache = _next_logits(model, params, previous, mask, Cache(step, *self_cache, **cross))
        chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        log_probability = jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)
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
    mask = jnp.repeat(mask, num_beams, axis=0)
    cross = {"cross_key": _repeat_rows(once.cross_key, num_beams), "cross_value": _repeat_rows(once.cross_value, num_beams)}

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
        self_key=_repeat_rows(once.self_key, num_beams),
        self_value=_repeat_rows(once.self_value, num_beams),
    )
    beams = jax.lax.while_loop(lambda beams: (beams.step < max_length) & jnp.any(beams.open), advance, beams)
    return Generated(beams.finished[:, 0], beams.finished_scores[:, 0])


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
    """Logits [B, V] after the tokens previous [B]."""
    decoded = model.apply({"params": params}, previous[:, None], None, mask, cache=cache, method="decode")
    return decoded.logits[:, 0], decoded.cache


def _repeat_rows(x: jax.Array, times: int) -> jax.Array:
    """[layers, B, ...] → [layers, B * times, ...], a row's copies side by side."""
    return jnp.repeat(x, times, axis=1)
