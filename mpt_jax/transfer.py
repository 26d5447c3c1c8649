"""Which source prompt suits a target task: the start of SPoT (Vu et al. 2022).

SPoT tries every source prompt and takes the best, or ranks them by similarity. Here the source prompt is taken that, before any
training, has the lowest loss on the target's own training examples: nothing but those examples is looked at, so that a
few-shot target stays one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.checkpoint.backbone import Backbone
from mpt_jax.config import Experiment, StreamConfig
from mpt_jax.data.cache import TokenCache
from mpt_jax.data.layout import Examples, assemble
from mpt_jax.data.sampling import k_shot_rows
from mpt_jax.data.vocabulary import Vocabulary
from mpt_jax.evaluate import examined
from mpt_jax.losses import cross_entropy
from mpt_jax.models.t5 import T5
from mpt_jax.prompted_t5 import forward
from mpt_jax.setup import open_caches

MAX_EXAMPLES = 256  # of a target's training set that are looked at


class Choice(NamedTuple):
    """The source chosen for one target run, and the loss of each source's prompt, in nats per target token."""

    source: str
    losses: dict[str, float]


def choose_sources(
    experiment: Experiment, backbone: Backbone, vocabulary: Vocabulary, prompts: np.ndarray, sources: Sequence[str]
) -> list[Choice]:
    """For each stream of `experiment`, the source prompt with the lowest loss on the stream's training examples.

    Args:
      prompts: [K,P,D], one for each of `sources`.
    """
    streams = experiment.data.streams
    caches = open_caches(experiment, [stream.task for stream in streams], experiment.data.train_split, vocabulary)
    batch_size, lengths = experiment.decode.batch_size, experiment.data.lengths
    choices = []
    for stream, cache in zip(streams, caches, strict=True):
        losses = prompt_losses(backbone, prompts, cache, training_rows(stream, cache), lengths, batch_size)
        choices.append(Choice(sources[int(np.argmin(losses))], dict(zip(sources, losses.tolist(), strict=True))))
    return choices


def training_rows(stream: StreamConfig, cache: TokenCache) -> np.ndarray:
    """The stream's training examples, or MAX_EXAMPLES of them."""
    rows = k_shot_rows(cache, stream.k_shot, stream.seed)
    return rows[examined(len(rows), MAX_EXAMPLES)]


def prompt_losses(
    backbone: Backbone, prompts: np.ndarray, cache: TokenCache, rows: np.ndarray, lengths: dict[str, int], batch_size: int
) -> np.ndarray:
    """Mean cross-entropy per target token of examples `rows` under each prompt [K,P,D] → [K] float64."""
    total, tokens = np.zeros(len(prompts)), 0.0
    evaluate = _make_losses(backbone.model)
    batch_size = min(batch_size, 1 << (len(rows) - 1).bit_length())  # a few examples fill no large batch
    for begin in range(0, len(rows), batch_size):
        part = rows[begin : begin + batch_size]
        filled = np.concatenate([part, np.full(batch_size - len(part), part[-1])])  # one shape, one compilation
        batch = assemble(Examples([cache], np.zeros(batch_size, np.int32), filled), lengths)
        batch["loss_weights"][len(part) :] = 0
        total += np.asarray(evaluate(backbone.params, jnp.asarray(prompts), batch), np.float64)
        tokens += float(batch["loss_weights"].sum())
    return total / max(tokens, 1.0)


@functools.lru_cache(maxsize=8)
def _make_losses(model: T5) -> Callable[[Any, jax.Array, dict[str, np.ndarray]], jax.Array]:
    """The compiled (params, prompts [K,P,D], batch) → summed cross-entropy of each prompt [K]."""

    def losses(params: Any, prompts: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
        size = batch["encoder_tokens"].shape[0]

        def one(prompt: jax.Array) -> jax.Array:
            output = forward(model, params, batch, jnp.repeat(prompt[None], size, axis=0))
            return cross_entropy(output.logits, batch["decoder_target_tokens"], batch["loss_weights"]).sum()

        return jax.lax.map(one, prompts)

    return jax.jit(losses)
