"""How prompts start: random numbers, vocabulary, class labels, a text (Lester et al. 2021, §3.2) or a trained prompt.

A group's start depends on the run's key and the group's own seed, never on its place in the bank: the same group trained
alone starts from the same numbers.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mpt_jax.config import PromptConfig
from mpt_jax.errors import UserError
from mpt_jax.prompts.base import Groups, Params, compose, method_class, number_of_groups, pad_tokens
from mpt_jax.prompts.files import check_prompts, load_prompts

Tokenize = Callable[[str], list[int]]
Embed = Callable[[jax.Array], Any]  # ids [n] → their embeddings [n,D]

logger = logging.getLogger("mpt_jax")


def initial_prompt(
    cfg: PromptConfig,
    *,
    groups: Sequence[int],
    seeds: Sequence[int],
    lengths: Sequence[int] = (),
    inits: Sequence[str] = (),
    labels: Sequence[Sequence[str]] = (),
    key: jax.Array,
    embed: Embed,
    d_model: int,
    tokenize: Tokenize,
    vocab_size: int,
    fingerprint: str = "",
) -> Params:
    """The parameters that a prompt module starts from.

    Args:
      cfg: method, length and `init`:
        "uniform"           U(-init_scale, init_scale), Lester et al.
        "uniform_positive"  U(0, init_scale), what T5X's gin files do
        "vocab"             embeddings of different random ids below init_population, pad, EOS and unknown among them, as
                            prompt-tuning's `from_sample_of_embeddings` draws them; none that no text has, of which ByT5 has many
        "labels"            the mean embedding of each label's sub-tokens, then "vocab"; labels beyond P are left out, with a
                            warning, as by prompt-tuning's `from_embedded_list`
        "text"              the embeddings of the text's tokens, cut to P, then "vocab"
        "file"              a prompt file, or that of another tool (`load_prompts`). One prompt in it (or chosen by
                            PATH#TASK, PATH#NUMBER) starts every group; PATH#* starts a bank from an equal one, entry by entry.
                            To MPT from MPT: P* of the file's one group, u and v as `factor_source` says. To MPT from a
                            plain prompt: P* is that prompt. To a plain prompt from MPT: the composed one.
      groups: [N] group of each stream.
      seeds: [G] seed of each group.
      lengths: [G] length of each group's prompt; () = `cfg.length`.
      inits: [G] as `cfg.init`, which stands for all with (); "file" is for all groups or none.
      labels: [G] what "labels" starts each group from; () = `cfg.init_labels`.
      key: the run's random key.
      embed: looks up rows of the backbone's embedding [V,D].
      d_model: D.
      tokenize: text → ids, without EOS.
      vocab_size: number of the vocabulary's ids, at most V.
      fingerprint: of the backbone, compared with the file's.

    Returns:
      float32 leaves, see the method.

    Raises:
      UserError: a file that does not fit, a label without a token, a prompt longer than the vocabulary it is drawn from.
    """
    groups = tuple(groups)
    if len(seeds) != number_of_groups(groups):
        raise ValueError(f"{len(seeds)} seeds for {number_of_groups(groups)} groups")
    lengths, inits = lengths or [cfg.length] * len(seeds), inits or [cfg.init] * len(seeds)
    keys = jnp.stack([jax.random.fold_in(key, seed) for seed in seeds])
    base_keys, factor_keys = jax.vmap(lambda one: tuple(jax.random.split(one)))(keys)
    method = method_class(cfg.method)
    if cfg.init == "file":
        params, meta = _trained(cfg, groups, lengths, d_model, fingerprint)
        resumed = None
        if meta["method"] == cfg.method:
            resumed = params if cfg.init_file.endswith("#*") else method.resume(cfg, params, meta, groups)
        fresh = method.initial(cfg, _one_per_group(params, meta, groups), groups, factor_keys, lengths)
        return _floats(fresh if resumed is None else _same_shapes(resumed, fresh, cfg.init_file))
    labels = labels or [cfg.init_labels] * len(seeds)
    own = [
        dataclasses.replace(cfg, length=length, init=init, init_labels=tuple(words))
        for length, init, words in zip(lengths, inits, labels, strict=True)
    ]
    _tell_labels_left_out(own)
    starts = [_start(one, key, embed, d_model, tokenize, vocab_size) for one, key in zip(own, base_keys, strict=True)]
    base = jnp.stack([pad_tokens(start, cfg.length) for start in starts])
    return _floats(method.initial(cfg, base, groups, factor_keys, lengths))


def _tell_labels_left_out(own: Sequence[PromptConfig]) -> None:
    """Once for all prompts of one length that have the same labels."""
    known = {(cfg.init_labels, cfg.length) for cfg in own if cfg.init == "labels" and len(cfg.init_labels) > cfg.length}
    for words, length in sorted(known, key=lambda one: (-len(one[0]), one)):
        tokens = "1 token starts" if length == 1 else f"{length} tokens start"
        kept, left = (", ".join(map(repr, part)) for part in (words[:length], words[length:]))
        logger.warning("warning: a prompt of %s from the labels %s; there is no room for %s", tokens, kept, left)


def _start(cfg: PromptConfig, key: jax.Array, embed: Embed, d_model: int, tokenize: Tokenize, vocab_size: int) -> jax.Array:
    """One plain prompt [P,D]."""
    shape = (cfg.length, d_model)
    if cfg.init == "uniform":
        return jax.random.uniform(key, shape, minval=-cfg.init_scale, maxval=cfg.init_scale)
    if cfg.init == "uniform_positive":
        return jax.random.uniform(key, shape, maxval=cfg.init_scale)
    given: list[jax.Array] = []
    if cfg.init == "labels":
        words = cfg.init_labels[: cfg.length]
        given = [_embed(embed, tokenize, label, "init_labels").mean(axis=0) for label in words]
    elif cfg.init == "text":
        given = list(_embed(embed, tokenize, cfg.init_text, "init_text")[: cfg.length])
    return jnp.stack([*given, *_sample(cfg, key, embed, vocab_size, cfg.length - len(given))])


def _embed(embed: Embed, tokenize: Tokenize, text: str, field: str) -> jax.Array:
    ids = tokenize(text)
    if not ids:
        raise UserError(f"PromptConfig.{field} has '{text}', which the vocabulary turns into no token; give another text.")
    return jnp.asarray(embed(jnp.asarray(ids)), jnp.float32)


def _sample(cfg: PromptConfig, key: jax.Array, embed: Embed, vocab_size: int, amount: int) -> jax.Array:
    """Embeddings of `amount` different ids below `init_population` (SentencePiece ids are sorted by frequency)."""
    population = min(cfg.init_population, vocab_size)
    if amount > population:
        raise UserError(
            f"PROMPT_LENGTH is {cfg.length} but PromptConfig.init_population has only {population} tokens to draw from; "
            "raise init_population or use init='uniform'."
        )
    return jnp.asarray(embed(jax.random.choice(key, population, (amount,), replace=False)), jnp.float32)


def _trained(
    cfg: PromptConfig, groups: Groups, lengths: Sequence[int], d_model: int, fingerprint: str
) -> tuple[Params, dict[str, Any]]:
    """The prompt file's parameters and metadata, known to fit."""
    params, meta = load_prompts(cfg.init_file)
    check_prompts(meta, d_model=d_model, backbone=fingerprint, length=cfg.length, max_length=cfg.max_length)
    file, whole = cfg.init_file, cfg.init_file.endswith("#*")
    held, wanted = list(meta["groups"]), list(groups)
    if whole and held != wanted:
        raise UserError(
            f"PromptConfig.init_file is {file}, a bank with groups {held}, but this run's are {wanted}; "
            "'#*' needs equal banks, choose one prompt with PATH#TASK or PATH#NUMBER."
        )
    if not whole and len(seen := set(held)) > 1:
        raise UserError(
            f"PromptConfig.init_file is {file}, which holds {len(seen)} prompts for "
            f"{', '.join(sorted(set(meta['tasks'])))}; choose one with PATH#TASK or PATH#NUMBER."
        )
    given = list(meta["lengths"]) if whole else list(meta["lengths"]) * len(lengths)
    if given != list(lengths):
        raise UserError(
            f"PromptConfig.init_file is {file}, whose prompts have {given} tokens, but this run's have {list(lengths)}; "
            "set the lengths of DataConfig.streams alike."
        )
    return params, meta


def _one_per_group(params: Params, meta: dict[str, Any], groups: Groups) -> jax.Array:
    """Composed prompts [G,P,D]: the file's bank group by group, or its one prompt for every group.

    Where one MPT group of the file has several streams, their composed prompts are averaged.
    """
    plain = compose(meta["method"], params, tuple(meta["groups"]))
    held = jnp.asarray(meta["groups"])
    total = int(held.max()) + 1
    means = jnp.stack([plain[held == group].mean(axis=0) for group in range(total)])
    return means if total == number_of_groups(groups) else jnp.repeat(means, number_of_groups(groups), axis=0)


def _same_shapes(params: Params, expected: Params, path: str) -> Params:
    """`params`, or a UserError when the file's leaves do not have the shapes of this configuration's (MPT: its rank)."""
    for name, leaf in expected.items():
        if params[name].shape != leaf.shape:
            raise UserError(
                f"PromptConfig.init_file is {path}, whose '{name}' has shape {params[name].shape}, but this run's has "
                f"{leaf.shape}; set PromptConfig.rank as the file was trained."
            )
    return params


def _floats(params: Params) -> Params:
    return {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
