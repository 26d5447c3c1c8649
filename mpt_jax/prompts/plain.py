"""Prompt Tuning (Lester et al. 2021, §2): each group learns one matrix [P,D] that is put before the input."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from mpt_jax.config import PromptConfig
from mpt_jax.prompts.base import Groups, Params, Prompt, register


@register("plain")
class PlainPrompt(Prompt):
    """Parameter `prompt` [G,P,D]."""

    @nn.compact
    def __call__(self, task_ids: jax.Array, x: jax.Array, mask: jax.Array) -> jax.Array:
        prompt = self.param("prompt", nn.initializers.zeros, (self.num_groups, self.length, self.d_model))
        return prompt[jnp.asarray(self.groups)[task_ids]]

    @staticmethod
    def compose(params: Params, groups: Groups) -> jax.Array:
        return jnp.asarray(params["prompt"])[jnp.asarray(groups)]

    @staticmethod
    def initial(cfg: PromptConfig, base: jax.Array, groups: Groups, keys: jax.Array, lengths: Sequence[int]) -> Params:
        return {"prompt": base}
