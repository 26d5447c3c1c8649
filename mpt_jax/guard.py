"""Which groups' part of a step must not be taken: a loss or a gradient that is not finite, or a loss far above what it was."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpt_jax import trees
from mpt_jax.prompts.base import bank_axis


class Verdict(NamedTuple):
    """Of a step.

    Attributes:
        recent: [W,G] float32, the losses of each group's last W good steps after this one.
        metrics: arrays [G]: "bad" (bool), and what it was judged by, "token_loss" and "median" (NaN until W steps were good).
    """

    recent: jax.Array
    metrics: dict[str, jax.Array]


def judge(aux: Mapping[str, jax.Array], finite: jax.Array, recent: jax.Array, normalization: str, spike_factor: float) -> Verdict:
    """Each group's loss per target token against the median of its last W good steps. Groups that are absent are never bad.

    Args:
        aux: of the loss: "loss" and "tokens" [G].
        finite: bool [G], whether the group's gradient is; see `finite_gradients`.
        recent: [W,G] as the step before left it, NaN where there was none yet.
        normalization: `LossConfig.normalization`; under "sum" a loss is a sum over tokens.
        spike_factor: a loss above so many times the median is bad; 0 = none is.
    """
    loss, tokens = aux["loss"], aux["tokens"]
    token_loss = loss / jnp.maximum(tokens, 1) if normalization == "sum" else loss
    median = jnp.median(recent, axis=0) if len(recent) else jnp.full_like(loss, jnp.nan)
    spike = token_loss > spike_factor * median if spike_factor else jnp.zeros_like(finite)  # nothing is above NaN
    present = tokens > 0
    bad = present & (spike | ~finite | ~jnp.isfinite(loss))
    if len(recent):
        newer = jnp.concatenate([recent[1:], token_loss[None]])
        recent = jnp.where((present & ~bad)[None], newer, recent)
    return Verdict(recent, {"bad": bad, "token_loss": token_loss, "median": median})


def finite_gradients(grads: Any, groups: tuple[int, ...], num_groups: int) -> jax.Array:
    """bool [G]: whether every number in the gradient of a group's prompts is finite; a backbone's counts for all groups."""
    finite = jnp.ones(num_groups, bool)
    for path, grad in trees.flatten(grads).items():
        if path.startswith("backbone/"):
            finite &= jnp.isfinite(grad).all()
            continue
        entries = jnp.isfinite(grad).reshape(grad.shape[0], -1).all(axis=1)
        if bank_axis(path) == "stream":
            entries = jax.ops.segment_min(entries.astype(jnp.int32), jnp.asarray(groups), num_segments=num_groups) > 0
        finite &= entries
    return finite
