"""Multitask prompt tuning (Wang et al. 2023): P_n = P* ∘ (U_n V_n), rank 1 in the paper.

The streams of a group share P* ("shared"); U_n [P,R] and V_n [R,D] are the stream's own.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mpt_jax.config import PromptConfig, nearest
from mpt_jax.errors import UserError
from mpt_jax.prompts.base import Groups, Params, Prompt, number_of_groups, pad_tokens, register


def hadamard(shared: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """shared [...,P,D] ∘ (u [...,P,R] v [...,R,D]) → [...,P,D]."""
    # The product of the factors is tiny but sets the prompt's scale: full precision even where matmuls default to bfloat16.
    return shared * jnp.einsum("...pr,...rd->...pd", u, v, precision=jax.lax.Precision.HIGHEST)


@register("mpt")
class MPTPrompt(Prompt):
    """Parameters `shared` [G,P,D], `task_u` [N,P,R], `task_v` [N,R,D]."""

    rank: int = 1  # R

    @classmethod
    def build(cls, cfg: PromptConfig, groups: Groups, d_model: int, lengths: tuple[int, ...]) -> "MPTPrompt":
        return cls(groups=groups, length=cfg.length, d_model=d_model, lengths=lengths, rank=cfg.rank)

    @nn.compact
    def __call__(self, task_ids: jax.Array, x: jax.Array, mask: jax.Array) -> jax.Array:
        streams = len(self.groups)
        shared = self.param("shared", nn.initializers.zeros, (self.num_groups, self.length, self.d_model))
        u = self.param("task_u", nn.initializers.ones, (streams, self.length, self.rank))
        v = self.param("task_v", nn.initializers.ones, (streams, self.rank, self.d_model))
        return hadamard(shared[jnp.asarray(self.groups)[task_ids]], u[task_ids], v[task_ids])

    @staticmethod
    def compose(params: Params, groups: Groups) -> jax.Array:
        shared, u, v = (jnp.asarray(params[name]) for name in ("shared", "task_u", "task_v"))
        return hadamard(shared[jnp.asarray(groups)], u, v)

    @staticmethod
    def initial(cfg: PromptConfig, base: jax.Array, groups: Groups, keys: jax.Array, lengths: Sequence[int]) -> Params:
        """`base` becomes P*; see `initial_factors` for u and v."""
        u, v = zip(*_factors_in_order(cfg, base.shape[-1], groups, keys, lengths), strict=True)
        return {"shared": base, "task_u": jnp.stack(u), "task_v": jnp.stack(v)}

    @staticmethod
    def resume(cfg: PromptConfig, source: Params, meta: dict[str, Any], groups: Groups) -> Params | None:
        """P* of the source's one group, and the mean of its streams' u, v or those of the task `factor_source`."""
        chosen = _chosen_streams(cfg.factor_source, meta)
        streams = len(groups)
        return {
            "shared": jnp.repeat(source["shared"][:1], number_of_groups(groups), axis=0),
            "task_u": jnp.repeat(source["task_u"][chosen].mean(axis=0, keepdims=True), streams, axis=0),
            "task_v": jnp.repeat(source["task_v"][chosen].mean(axis=0, keepdims=True), streams, axis=0),
        }


def initial_factors(cfg: PromptConfig, d_model: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One stream's u [P,R] and v [R,D].

    "ones": every rank starts as 1 ⊗ 1/R, so that the product is 1 and the prompt starts as P*. Ranks above the first
    would get equal gradients for ever, so v gets noise of deviation `factor_scale` that sums to 0 over the ranks.
    "normal": both N(0, factor_scale), as PEFT starts them; the prompt then starts near 0. Measured in docs/tuning.md: it needs
    a higher rate than "ones" and then comes as far, no farther.
    """
    key_u, key_v = jax.random.split(key)
    u_shape, v_shape = (cfg.length, cfg.rank), (cfg.rank, d_model)
    if cfg.factor_init == "normal":
        return cfg.factor_scale * jax.random.normal(key_u, u_shape), cfg.factor_scale * jax.random.normal(key_v, v_shape)
    noise = cfg.factor_scale * jax.random.normal(key_v, v_shape)
    noise = noise - noise.mean(axis=0, keepdims=True)  # exactly 0 for rank 1
    return jnp.ones(u_shape), 1.0 / cfg.rank + noise


def _factors_in_order(
    cfg: PromptConfig, d_model: int, groups: Groups, keys: jax.Array, lengths: Sequence[int]
) -> list[tuple[jax.Array, jax.Array]]:
    """The factors of each stream, which depend on its group's key and length and its place within the group only."""
    factors, places = [], [0] * len(keys)
    for group in groups:
        own = dataclasses.replace(cfg, length=lengths[group])
        u, v = initial_factors(own, d_model, jax.random.fold_in(keys[group], places[group]))
        factors.append((pad_tokens(u, cfg.length), v))
        places[group] += 1
    return factors


def _chosen_streams(factor_source: str, meta: dict[str, Any]) -> list[int]:
    """Indices of the source streams whose u, v are averaged."""
    tasks = list(meta["tasks"])
    if factor_source == "mean":
        return list(range(len(tasks)))
    chosen = [index for index, task in enumerate(tasks) if task == factor_source]
    if not chosen:
        raise UserError(
            f"PromptConfig.factor_source is '{factor_source}', but {meta['path']} has the tasks {', '.join(tasks)}; "
            f"choose one of them or 'mean'.{nearest(factor_source, tasks)}"
        )
    return chosen
