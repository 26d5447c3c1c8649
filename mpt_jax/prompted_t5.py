"""Soft prompts in front of a T5's input: injection, and the whole forward pass from a batch to logits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpt_jax.models.layers import RMSNorm
from mpt_jax.models.t5 import T5


class Output(NamedTuple):
    """What losses and distillation look at. S = P + T (T without a prompt)."""

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
      batch: `encoder_tokens` [B,T] (0 = padding) and `decoder_input_tokens` [B,L].
      prompt: [B,P,D], one per example, or None for the bare model.
      prompt_mask: [B,P], see `inject`.
      dropout_key: random key; None switches dropout off.
      hidden: which hidden states to return, "none", "last" (each stack's normed output) or "all" (also every block's).
    """
    tokens = batch["encoder_tokens"]
    variables = {"params": params}
    x, mask = model.apply(variables, tokens, method="embed"), tokens > 0
    if prompt is not None:
        x, mask = inject(prompt, x, mask, prompt_mask)
    every = hidden == "all"
    deterministic = dropout_key is None
    encoder_rngs = decoder_rngs = None
    if dropout_key is not None:
        encoder_rngs, decoder_rngs = ({"dropout": key} for key in jax.random.split(dropout_key))
    encoded = model.apply(
        variables, x, mask, deterministic=deterministic, return_hidden=every, rngs=encoder_rngs, method="encode"
    )
    decoded = model.apply(
        variables,
        batch["decoder_input_tokens"],
        encoded.output,
        mask,
        deterministic=deterministic,
        return_hidden=hidden != "none",
        rngs=decoder_rngs,
        method="decode",
    )
    decoder_output = None
    if hidden != "none":
        norm = RMSNorm(model.config)
        decoder_output = norm.apply({"params": params["decoder"]["decoder_norm"]}, decoded.hidden[-1])
    return Output(decoded.logits, encoded.hidden, encoded.output, mask, decoded.hidden if every else None, decoder_output)
