"""From tokenised inputs to predictions: batches of like length, few compilations, several tasks (and prompts) in one batch."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mpt_jax import decoding
from mpt_jax.checkpoint.backbone import Backbone
from mpt_jax.config import DecodeConfig
from mpt_jax.data.cache import LabelSet
from mpt_jax.data.vocabulary import Vocabulary
from mpt_jax.models.t5 import T5
from mpt_jax.partitioning import batch_shard, batch_ways, make_mesh, place_batch, replicated
from mpt_jax.prompted_t5 import batch_prompts, inject

Tree = Any
Batch = Mapping[str, jax.Array]
SHORTEST = 32  # inputs are padded to T, T/2 or T/4, but to no less than this: few shapes, few compilations


class Prediction(NamedTuple):
    """The answer to one input.

    Attributes:
        score: sum of the answer's token log-probabilities under the model, EOS included, in nats; of a label with
            `DecodeConfig.label_score="mean"`, their mean.
        scores: of each label by its text, where labels were ranked; {} where text was generated.
    """

    text: str
    score: float
    scores: dict[str, float]


def predict_texts(
    backbone: Backbone,
    prompt_module: Any,
    trainable: Tree,
    inputs: Sequence[np.ndarray],
    task_ids: Sequence[int],
    *,
    vocabulary: Vocabulary,
    lengths: dict[str, int],
    decode: DecodeConfig,
    numbers: Sequence[int] | None = None,
    labels: Sequence[LabelSet] | None = None,
    mesh: Mesh | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[Prediction]:
    """The answer to each input by `decode.method`: a generated text, or the label with the highest score.

    Of labels with equal scores, which have different tokens, the first one is taken, by the order of their texts.

    Args:
        numbers: see `predict_tokens`.
        labels: of each input, for "rank".
        check: is called before each batch, and stops the work by what it raises.
    Other arguments: see `predict_tokens`.

    Raises:
        ValueError: "rank" without labels.
    """
    common: dict[str, Any] = {"lengths": lengths, "decode": decode, "mesh": mesh, "check": check}
    if decode.method == "generate":
        outputs = predict_tokens(backbone, prompt_module, trainable, inputs, task_ids, numbers=numbers, **common)
        pairs = zip(outputs.tokens, outputs.scores, strict=True)
        return [Prediction(vocabulary.decode(tokens.tolist()), float(score), {}) for tokens, score in pairs]
    if labels is None:
        raise ValueError("DecodeConfig.method='rank' needs the labels of each input")
    predictions = []
    scored = rank_labels(backbone, prompt_module, trainable, inputs, task_ids, labels, **common)
    for scores, label_set in zip(scored, labels, strict=True):
        best = int(np.argmax(scores))
        by_text = dict(zip(label_set.texts, scores.tolist(), strict=True))
        predictions.append(Prediction(label_set.texts[best], float(scores[best]), by_text))
    return predictions


class Outputs(NamedTuple):
    """What was generated, in the order of the n inputs."""

    tokens: np.ndarray  # [n, M] int32, 0 after EOS
    scores: np.ndarray  # [n] float32: sum of the tokens' log-probabilities


def predict_tokens(
    backbone: Backbone,
    prompt_module: Any,
    trainable: Tree,
    inputs: Sequence[np.ndarray],
    task_ids: Sequence[int],
    *,
    lengths: dict[str, int],
    decode: DecodeConfig,
    numbers: Sequence[int] | None = None,
    mesh: Mesh | None = None,
    check: Callable[[], None] = lambda: None,
) -> Outputs:
    """Decode tokenised inputs, in any order of length and task, to at most M = `decode.max_length` tokens.

    Args:
        backbone: its parameters are used unless `trainable` has "backbone".
        prompt_module: of `prompts.build_prompt`, or None.
        trainable: the module's parameters, or {} or {"backbone": parameters} without one.
        inputs: token ids with EOS, each at most lengths["inputs"] long.
        task_ids: number of each input's prompt in the bank.
        numbers: each input's own number, which with `decode.seed` decides what is drawn for it; default: its place in `inputs`.
        check: see `predict_texts`.
    """
    length = decode.max_length or lengths["targets"]
    if not len(inputs):
        return Outputs(np.zeros((0, length), np.int32), np.zeros(0, np.float32))
    # Batch size and seed are no part of the program: another one compiles nothing anew.
    program = dataclasses.replace(decode, max_length=length, batch_size=1, seed=0)
    generate = make_generate(backbone.model, prompt_module, program)
    columns = {"task_ids": task_ids, "numbers": range(len(inputs)) if numbers is None else numbers}
    seed = np.uint32(decode.seed)

    def run(batch: Batch) -> decoding.Generated:
        return generate(trainable, backbone.params, batch, seed)

    return Outputs(*_in_batches(run, inputs, columns, lengths["inputs"], decode.batch_size, mesh, check))


def rank_labels(
    backbone: Backbone,
    prompt_module: Any,
    trainable: Tree,
    inputs: Sequence[np.ndarray],
    task_ids: Sequence[int],
    labels: Sequence[LabelSet],
    *,
    lengths: dict[str, int],
    decode: DecodeConfig,
    mesh: Mesh | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[np.ndarray]:
    """The score of every label of each input, float32 [labels of that input], by `decode.label_score`.

    Inputs with different label sets may lie in one batch. Arguments: see `predict_tokens`; `labels` are those of each input.
    """
    if not inputs:
        return []
    rank = make_rank(backbone.model, prompt_module)
    number_of = {label_set: n for n, label_set in enumerate(dict.fromkeys(labels))}
    table = label_table(list(number_of))

    def run(batch: Batch) -> jax.Array:
        return rank(trainable, backbone.params, batch, table)

    columns = {"task_ids": task_ids, "label_sets": [number_of[label_set] for label_set in labels]}
    sums = _in_batches(run, inputs, columns, lengths["inputs"], decode.batch_size, mesh, check)
    sums = [row[: len(label_set.texts)] for row, label_set in zip(sums, labels, strict=True)]
    if decode.label_score == "sum":
        return sums
    sizes = {label_set: np.asarray([len(tokens) for tokens in label_set.tokens], np.float32) for label_set in number_of}
    return [row / sizes[label_set] for row, label_set in zip(sums, labels, strict=True)]


def label_table(label_sets: Sequence[LabelSet]) -> np.ndarray:
    """The labels' tokens [label sets, C, L] int32, 0 where a label is shorter than L or a set has fewer than C."""
    most = max(len(label_set.tokens) for label_set in label_sets)
    longest = max(len(tokens) for label_set in label_sets for tokens in label_set.tokens)
    table = np.zeros((len(label_sets), most, longest), np.int32)
    for n, label_set in enumerate(label_sets):
        for c, tokens in enumerate(label_set.tokens):
            table[n, c, : len(tokens)] = tokens
    return table


@functools.lru_cache(maxsize=64)
def make_generate(
    model: T5, prompt_module: Any, decode: DecodeConfig
) -> Callable[[Tree, Tree, Batch, np.uint32], decoding.Generated]:
    """The compiled `generate(trainable, params, batch, seed)` of B examples and at most `decode.max_length` tokens each.

    `params` are the backbone's; with `prompt_module=None`, `trainable["backbone"]` takes their place when it is there.
    `batch` has encoder_tokens [B, T], task_ids [B] and numbers [B].
    """

    def generate(trainable: Tree, params: Tree, batch: Batch, seed: jax.Array) -> decoding.Generated:
        params, encoded, mask = _encode(model, prompt_module, trainable, params, batch)
        source = (model, params, encoded, mask, decode.max_length)
        if decode.num_beams > 1:
            return decoding.beam(*source, num_beams=decode.num_beams, length_penalty=decode.length_penalty)
        if not decode.temperature:
            return decoding.greedy(*source)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), batch["numbers"])
        return decoding.sample(*source, keys, decode.temperature, decode.top_k, decode.top_p)

    return jax.jit(generate)


@functools.lru_cache(maxsize=64)
def make_rank(model: T5, prompt_module: Any) -> Callable[[Tree, Tree, Batch, np.ndarray], jax.Array]:
    """The compiled `rank(trainable, params, batch, table)` -> log-probability of each label [B, C]; parameters: `make_generate`.

    `batch` has encoder_tokens [B, T], task_ids [B] and label_sets [B], rows of the `label_table` [label sets, C, L].
    """

    def rank(trainable: Tree, params: Tree, batch: Batch, table: jax.Array) -> jax.Array:
        params, encoded, mask = _encode(model, prompt_module, trainable, params, batch)
        return decoding.label_scores(model, params, encoded, mask, jnp.take(table, batch["label_sets"], axis=0))

    return jax.jit(rank)


def _encode(model: T5, prompt_module: Any, trainable: Tree, params: Tree, batch: Batch) -> tuple[Tree, jax.Array, jax.Array]:
    """The backbone's parameters, the encoder's output [B, S, D] and its mask [B, S], prompt included."""
    if prompt_module is None:
        params = trainable.get("backbone", params)
    tokens = batch["encoder_tokens"]
    mask = (tokens > 0).astype(jnp.int32)
    x = model.apply({"params": params}, tokens, method="embed")
    if prompt_module is not None:
        prompt, prompt_mask = batch_prompts(prompt_module, trainable, model, params, batch)
        x, mask = inject(prompt, x, mask, prompt_mask)
    return params, model.apply({"params": params}, x, mask, method="encode").output, mask


def _in_batches(
    run: Callable[[Batch], Any],
    inputs: Sequence[np.ndarray],
    columns: Mapping[str, Sequence[int]],
    longest: int,
    batch_size: int,
    mesh: Mesh | None,
    check: Callable[[], None] = lambda: None,
) -> Any:
    """What `run` makes of batches with the `encoder_tokens` of the n inputs and their entries of the `columns`.

    A batch holds inputs of like length. All have one size, a multiple of the devices that share it, and few lengths. Of several
    processes, which are given the same inputs, each places its part of a batch, and all get the whole result.

    Returns:
        The tree that `run` returns of arrays [B, ...], as NumPy arrays [n, ...] in the order of the inputs, n > 0.
    """
    mesh = mesh or make_mesh()
    ways = batch_ways(mesh)
    size = -(-batch_size // ways) * ways
    index, count = batch_shard(mesh)
    share = size // count
    arrays = {name: np.asarray(column, np.int32) for name, column in columns.items()}
    order = np.argsort([len(tokens) for tokens in inputs], kind="stable")
    results: list[Any] = []
    for begin in range(0, len(order), size):
        check()
        rows = order[begin : begin + size]
        # Fill up with copies of the last example: an empty row might never end, and would keep the others waiting.
        filled = np.concatenate([rows, np.full(size - len(rows), rows[-1])])[index * share : (index + 1) * share]
        tokens = np.zeros((share, _bucket(max(len(inputs[row]) for row in rows), longest)), np.int32)
        for place, row in enumerate(filled):
            tokens[place, : len(inputs[row])] = inputs[row]
        batch = {"encoder_tokens": tokens} | {name: array[filled] for name, array in arrays.items()}
        results.append(_on_every_device(run(place_batch(batch, mesh)), mesh))
        if len(results) > 1:  # read a batch back while the next one is decoded
            results[-2] = jax.device_get(results[-2])
    back = np.argsort(order)  # the filling rows at the end fall away
    return jax.tree.map(lambda *parts: np.concatenate(parts)[back], *jax.device_get(results))


def _on_every_device(tree: Any, mesh: Mesh) -> Any:
    """The tree, in a place where this process can read all of it."""
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
        return tree
    return _gather(mesh)(tree)


@functools.lru_cache(maxsize=8)
def _gather(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def _bucket(length: int, longest: int) -> int:
    """The padded length: `longest`, or its half or quarter where the batch fits."""
    for parts in (4, 2):
        size = -(-longest // parts)
        if length <= size and size >= SHORTEST:
            return size
    return longest
