"""Soft prompts in front of a T5's input: injection, and the whole forward pass from a batch to logits."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpt_jax.models.layers import RMSNorm
from mpt_jax.models.t5 import T5
from mpt_jax.prompts.base import Prompt


class Output(NamedTuple):
    """What losses and distillation look at. S = P + T (T without a prompt); with packed rows, the positions of a row."""

    logits: jax.Array  # [B,L,V] float32
    encoder_hidden: jax.Array | None  # [layers,B,S,D] after each block, with hidden="all"
    encoder_output: jax.Array  # [B,S,D] after the final norm
    encoder_mask: jax.Array  # [B,S] bool
    decoder_hidden: jax.Array | None  # [layers,B,L,D] after each block, with hidden="all"
    decoder_output: jax.Array | None = None  # [B,L,D] after the final norm, with hidden="last" or "all"


def inject(prompt: jax.Array, x: jax.Array, mask: jax.Array, prompt_mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Put soft tokens before embedded inputs; embeddings and mask come back together, so they cannot disagree.

    Args:
      prompt: [B,P,D]; P is read here and bound nowhere else.
      x: [B,T,D] embedded inputs; the result has its dtype.
      mask: [B,T], 1 = attend.
      prompt_mask: [B,P], for prompts that are shorter than P (padded on the left, next to nothing but themselves, so
        that distances between prompt and text do not depend on P). Default: all ones.

    Returns:
      (x [B,P+T,D], mask [B,P+T] bool)
    """
    if prompt_mask is None:
        prompt_mask = jnp.ones(prompt.shape[:2], bool)
    return (
        jnp.concatenate([prompt.astype(x.dtype), x], axis=1),
        jnp.concatenate([prompt_mask.astype(bool), mask.astype(bool)], axis=1),
    )


def inject_packed(prompt: jax.Array, x: jax.Array, segments: jax.Array) -> jax.Array:
    """Put each example's soft tokens where its segment of a packed row begins.

    Args:
      prompt: [B,E,P,D], of the E examples of a row.
      x: [B,S,D] embedded inputs, with P positions before each text that are replaced; the result has its dtype.
      segments: [B,S], see `shapes.PACKED_SHAPES`.
    """
    length = prompt.shape[2]
    here = jnp.arange(segments.shape[1])[None]
    begins = jnp.diff(segments, axis=1, prepend=0) != 0
    within = here - jax.lax.cummax(jnp.where(begins, here, 0), axis=1)  # position in the segment
    soft = (segments > 0) & (within < length)
    index = jnp.where(soft, (segments - 1) * length + within, 0)
    tokens = prompt.reshape(prompt.shape[0], -1, prompt.shape[-1])
    return jnp.where(soft[..., None], jnp.take_along_axis(tokens, index[..., None], axis=1).astype(x.dtype), x)


def encoder_mask(batch: Mapping[str, jax.Array], prompt_length: int, prompt_mask: jax.Array | None = None) -> jax.Array:
    """`Output.encoder_mask` before anything is computed: bool [B,S], with a prompt of so many tokens before each input.

    `prompt_mask` [B,P] as in `inject`.
    """
    if "encoder_segments" in batch:
        return batch["encoder_segments"] > 0
    real = batch["encoder_tokens"] > 0
    if prompt_mask is None:
        prompt_mask = jnp.ones((len(real), prompt_length), bool)
    return jnp.concatenate([prompt_mask, real], axis=1)


def batch_prompts(
    module: Prompt, trainable: Any, model: T5, params: Any, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array | None]:
    """The prompts of the batch's examples and their mask (see `inject`): [B,P,D] and [B,P], packed [B,E,P,D] and [B,E,P]."""
    tokens, task_ids = batch["encoder_tokens"], batch["task_ids"]
    x, mask = model.apply({"params": params}, tokens, method="embed"), tokens > 0
    if "encoder_segments" in batch:  # each example sees its row with nothing but its own text in it
        segments, number = batch["encoder_segments"][:, None], jnp.arange(1, task_ids.shape[1] + 1)[None, :, None]
        mask = (mask[:, None] & (segments == number)).reshape(-1, tokens.shape[1])
        x = jnp.repeat(x, task_ids.shape[1], axis=0)
    prompts: jax.Array = module.apply({"params": trainable}, task_ids.reshape(-1), x, mask)
    return prompts.reshape(*task_ids.shape, *prompts.shape[1:]), module.mask(task_ids)


def forward(
    model: T5,
    params: Any,
    batch: dict[str, jax.Array],
    prompt: jax.Array | None,
    *,
    prompt_mask: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    hidden: str = "none",
) -> Output:
    """Teacher-forced pass of a batch through the prompted model.

    Args:
      model, params: the backbone.
      batch: `encoder_tokens` [B,T] (0 = padding) and `decoder_input_tokens` [B,L]; packed rows have their segments, too.
      prompt: [B,P,D], one per example (packed: [B,E,P,D]), or None for the bare model.
      prompt_mask: [B,P], see `inject`; not of packed rows.
      dropout_key: random key; None switches dropout off.
      hidden: which hidden states to return, "none", "last" (each stack's normed output) or "all" (also every block's).
    """
    variables = {"params": params}
    x, masks = _prepare(model.apply(variables, batch["encoder_tokens"], method="embed"), batch, prompt, prompt_mask)
    every = hidden == "all"
    deterministic = dropout_key is None
    encoder_rngs = decoder_rngs = None
    if dropout_key is not None:
        encoder_rngs, decoder_rngs = ({"dropout": key} for key in jax.random.split(dropout_key))
    encoded = model.apply(
        variables, x, masks.encoder, deterministic=deterministic, return_hidden=every, rngs=encoder_rngs, method="encode"
    )
    decoded = model.apply(
        variables,
        batch["decoder_input_tokens"],
        encoded.output,
        masks.cross,
        self_mask=masks.decoder,
        deterministic=deterministic,
        return_hidden=hidden != "none",
        rngs=decoder_rngs,
        method="decode",
    )
    decoder_output = None
    if hidden != "none":
        norm = RMSNorm(model.config)
        decoder_output = norm.apply({"params": params["decoder"]["decoder_norm"]}, decoded.hidden[-1])
    return Output(decoded.logits, encoded.hidden, encoded.output, masks.real, decoded.hidden if every else None, decoder_output)


class _Masks(NamedTuple):
    """Which positions are no padding, and what each stack's queries may attend to."""

    real: jax.Array  # [B,S]
    encoder: jax.Array  # [B,S] of keys, packed [B,S,S] of queries and keys
    cross: jax.Array  # [B,S], packed [B,L,S]
    decoder: jax.Array | None  # packed [B,L,L]; causal besides


def _prepare(
    x: jax.Array, batch: dict[str, jax.Array], prompt: jax.Array | None, prompt_mask: jax.Array | None
) -> tuple[jax.Array, _Masks]:
    """The encoder's input [B,S,D], with prompts, from embedded tokens, and all masks."""
    mask = batch["encoder_tokens"] > 0
    if "encoder_segments" not in batch:
        if prompt is not None:
            x, mask = inject(prompt, x, mask, prompt_mask)
        return x, _Masks(mask, mask, mask, None)
    keys, queries = batch["encoder_segments"], batch["decoder_segments"]
    x = x if prompt is None else inject_packed(prompt, x, keys)
    masks = (one[:, :, None] == other[:, None, :] for one, other in ((keys, keys), (queries, keys), (queries, queries)))
    # Padding has a segment of its own, number 0: what happens there is never looked at, and stays finite.
    return x, _Masks(keys > 0, *masks)
