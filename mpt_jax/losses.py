"""Cross-entropy as T5X computes it (t5x `losses.py`), and sums or means within each group of a bank."""

import math

import jax
import jax.numpy as jnp


def cross_entropy(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, *, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> jax.Array:
    """Loss of each target token, already multiplied by its weight.

    With smoothing s the target distribution is 1 - s on the target and s / (V - 1) on every other token, and the
    distribution's own entropy is subtracted, so that a perfect prediction costs 0. `z_loss` · (log Σ exp logits)² is added.

    Args:
      logits: [B,L,V]; computed in float32.
      targets: [B,L] int.
      weights: [B,L], 0 where nothing is to be predicted.

    Returns:
      [B,L] float32.
    """
    logits = logits.astype(jnp.float32)
    vocabulary = logits.shape[-1]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    at_target = target_logits(logits, targets) - log_z
    if label_smoothing:
        confidence, low = 1.0 - label_smoothing, label_smoothing / (vocabulary - 1)
        over_all = logits.sum(axis=-1) - vocabulary * log_z
        entropy = -(confidence * math.log(confidence) + (vocabulary - 1) * low * math.log(low + 1e-20))
        loss = -((confidence - low) * at_target + low * over_all) - entropy
    else:
        loss = -at_target
    if z_loss:
        loss = loss + z_loss * jnp.square(log_z)
    return loss * weights.astype(jnp.float32)


def target_logits(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The logit of each target: [B,L,V], [B,L] → [B,L].

    By comparison with every id and not by a gather, whose gradient, a scatter into [B,L,V], nothing is fused with.
    """
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    return jnp.where(ids == targets[..., None], logits, 0.0).sum(axis=-1)


def of_positions(values: jax.Array, segments: jax.Array | None) -> jax.Array:
    """For each position what its example has: values [B,E] of the examples of packed rows, segments [B,S] → [B,S].

    Without segments a row is one example, and its values [B] are returned as they are. Padding gets those of the first example.
    """
    return values if segments is None else jnp.take_along_axis(values, jnp.maximum(segments - 1, 0), axis=1)


def group_sum(values: jax.Array, group_ids: jax.Array, num_groups: int) -> jax.Array:
    """Sum of `values` [B] or [B,...] over all that is of a group → [G]; 0 for an absent group.

    `group_ids` are the rows' [B], or of the shape of `values`.
    """
    values = values.astype(jnp.float32)
    if group_ids.ndim == 1:
        values = values.reshape(values.shape[0], -1).sum(axis=1)
    return jax.ops.segment_sum(values.reshape(-1), group_ids.reshape(-1), num_segments=num_groups)


def safe_divide(total: jax.Array, amount: jax.Array) -> jax.Array:
    """total / amount, and 0 (with gradient 0) where the amount is 0."""
    return jnp.where(amount > 0, total / jnp.where(amount > 0, amount, 1.0), 0.0)


def group_reduce(per_token: jax.Array, tokens: jax.Array, group_ids: jax.Array, normalization: str) -> jax.Array:
    """[B,L] losses (already weighted) → [G]: each group's "sum", or "mean" over its own weights; 0 for an absent group.

    `tokens` [G] are the sums of the groups' weights; where `per_token` is only a part of the batch, those of the whole batch,
    so that the parts' losses add up to the batch's. `group_ids` are [B] or [B,L], as in `group_sum`.
    The loss of a bank is the sum over its groups, so that no group's loss, and hence gradient, depends on another group.
    """
    total = group_sum(per_token, group_ids, len(tokens))
    return total if normalization == "sum" else safe_divide(total, tokens)


def present_streams(task_ids: jax.Array, weights: jax.Array, num_streams: int) -> jax.Array:
    """[N] bool: the streams with at least one weighted target token in the batch (a row of padding makes none present).

    `task_ids` are the rows' [B], or the tokens' [B,L]; `weights` are [B,L].
    """
    counted = weights > 0
    if task_ids.ndim == 1:
        counted = counted.any(axis=-1)
    return jax.ops.segment_max(counted.astype(jnp.int32).reshape(-1), task_ids.reshape(-1), num_segments=num_streams) > 0
