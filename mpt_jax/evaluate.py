"""Predictions and their scores: batched decoding, early stop, several tasks (and prompts) in one batch."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mpt_jax import decoding, setup
from mpt_jax.checkpoint.backbone import Backbone
from mpt_jax.checkpoint.folder import RunFolder
from mpt_jax.config import DecodeConfig, Experiment
from mpt_jax.data.cache import TokenCache
from mpt_jax.data.vocabulary import Vocabulary
from mpt_jax.models.t5 import T5
from mpt_jax.partitioning import make_mesh, place_batch
from mpt_jax.prompted_t5 import inject

Tree = Any
SHORTEST = 32  # inputs are padded to T, T/2 or T/4, but to no less than this: few shapes, few compilations


def main_score(metrics: dict[str, float]) -> float:
    """The one number by which prompts are compared: the mean of the task's metrics (0-100)."""
    return float(np.mean(list(metrics.values()))) if metrics else math.nan


@functools.lru_cache(maxsize=64)
def make_predict(
    model: T5, prompt_module: Any, max_length: int, num_beams: int, length_penalty: float
) -> Callable[[Tree, Tree, jax.Array, jax.Array], jax.Array]:
    """The compiled `predict(trainable, params, encoder_tokens [B,T], task_ids [B]) -> tokens [B, max_length]`, 0 after EOS.

    `params` are the backbone's; with `prompt_module=None`, `trainable["backbone"]` takes their place when it is there.
    """

    def predict(trainable: Tree, params: Tree, encoder_tokens: jax.Array, task_ids: jax.Array) -> jax.Array:
        if prompt_module is None:
            params = trainable.get("backbone", params)
        mask = (encoder_tokens > 0).astype(jnp.int32)
        x = model.apply({"params": params}, encoder_tokens, method="embed")
        if prompt_module is not None:
            x, mask = inject(prompt_module.apply({"params": trainable}, task_ids, x, mask), x, mask)
        encoded = model.apply({"params": params}, x, mask, method="encode").output
        if num_beams == 1:
            return decoding.greedy(model, params, encoded, mask, max_length).tokens
        return decoding.beam(model, params, encoded, mask, max_length, num_beams=num_beams, length_penalty=length_penalty).tokens

    return jax.jit(predict)


def predict_tokens(
    backbone: Backbone,
    prompt_module: Any,
    trainable: Tree,
    inputs: Sequence[np.ndarray],
    task_ids: Sequence[int],
    *,
    lengths: dict[str, int],
    decode: DecodeConfig,
    mesh: Mesh | None = None,
) -> list[np.ndarray]:
    """Decode tokenised inputs, in any order of length and task.

    Args:
        backbone: its parameters are used unless `trainable` has "backbone".
        prompt_module: of `prompts.build_prompt`, or None.
        trainable: the module's parameters, or {} or {"backbone": parameters} without one.
        inputs: token ids with EOS, each at most lengths["inputs"] long.
        task_ids: number of each input's prompt in the bank.
    Returns:
        One int32 array [max_length] for each input, in the given order, 0 after EOS.
    """
    mesh = mesh or make_mesh()
    predict = make_predict(
        backbone.model, prompt_module, decode.max_length or lengths["targets"], decode.num_beams, decode.length_penalty
    )
    ways = mesh.shape["data"]
    size = -(-decode.batch_size // ways) * ways
    outputs: list[np.ndarray] = [np.zeros(0, np.int32)] * len(inputs)
    order = np.argsort([len(tokens) for tokens in inputs], kind="stable")
    pending: list[tuple[np.ndarray, jax.Array]] = []

    def collect() -> None:
        rows, tokens = pending.pop(0)
        for row, output in zip(rows, np.asarray(tokens), strict=False):  # the filling rows at the end fall away
            outputs[row] = output

    for begin in range(0, len(order), size):
        rows = order[begin : begin + size]
        # Fill up with copies of the last example: an empty row might never end, and would keep the others waiting.
        filled = np.concatenate([rows, np.full(size - len(rows), rows[-1])])
        tokens = np.zeros((size, _bucket(max(len(inputs[row]) for row in rows), lengths["inputs"])), np.int32)
        for place, row in enumerate(filled):
            tokens[place, : len(inputs[row])] = inputs[row]
        batch = {"encoder_tokens": tokens, "task_ids": np.asarray([task_ids[row] for row in filled], np.int32)}
        placed = place_batch(batch, mesh)
        pending.append((rows, predict(trainable, backbone.params, placed["encoder_tokens"], placed["task_ids"])))
        if len(pending) > 1:  # read a batch back while the next one is decoded
            collect()
    while pending:
        collect()
    return outputs


def evaluate(
    backbone: Backbone,
    prompt_module: Any,
    trainable: Tree,
    caches: Sequence[TokenCache],
    *,
    vocabulary: Vocabulary,
    lengths: dict[str, int],
    decode: DecodeConfig,
    max_examples: int = 0,
    mesh: Mesh | None = None,
    prompt_ids: Sequence[int] | None = None,
) -> list[dict[str, float]]:
    """The metrics of each stream: cache n is decoded with prompt n of the bank and scored by its task's own `metric_fns`.

    Args:
        prompt_ids: the prompt of each cache, where it is not its own number.
        max_examples: of each cache, a random choice that is always the same; 0 = all.
    """
    chosen = [examined(len(cache), max_examples) for cache in caches]
    inputs = [cache.inputs(int(i)) for cache, rows in zip(caches, chosen, strict=True) for i in rows]
    task_ids = [n for n, rows in zip(prompt_ids or range(len(caches)), chosen, strict=True) for _ in rows]
    outputs = predict_tokens(backbone, prompt_module, trainable, inputs, task_ids, lengths=lengths, decode=decode, mesh=mesh)
    texts = iter([vocabulary.decode(tokens.tolist()) for tokens in outputs])
    return [cache.score([next(texts) for _ in rows], rows) for cache, rows in zip(caches, chosen, strict=True)]


def run_evaluate(experiment: Experiment) -> dict[str, Any]:
    """The `evaluate` command: score what MODEL_DIR holds on each task's `DataConfig.eval_split`.

    Prints a line for each prompt, writes `<MODEL_DIR>/evaluation_<split>.json` and returns what is in it.

    Raises:
        UserError: nothing to evaluate, no such split, a prompt that does not fit the backbone.
    """
    experiment.validate()
    data, mesh = experiment.data, setup.mesh_of(experiment)
    trained = setup.open_trained(experiment, mesh)
    vocabulary = setup.open_vocabulary(experiment, trained.backbone)
    streams = setup.find_streams(experiment)
    caches = setup.open_caches(experiment, streams.tasks, data.eval_split, vocabulary)
    numbers = trained.prompt_of(streams.tasks)
    metrics = evaluate(
        trained.backbone,
        trained.prompt_module,
        trained.trainable,
        caches,
        vocabulary=vocabulary,
        lengths=data.lengths,
        decode=experiment.decode,
        max_examples=experiment.train.max_eval_examples,
        mesh=mesh,
        prompt_ids=numbers,
    )
    rows = []
    for stream, number, cache, one in zip(streams.configs, numbers, caches, metrics, strict=True):
        examples = len(examined(len(cache), experiment.train.max_eval_examples))
        rows.append({"task": stream.task, "prompt": number, "score": main_score(one), "metrics": one, "examples": examples})
        print(f"{stream.task}  {'  '.join(f'{name} {value:.2f}' for name, value in one.items())}  ({examples} examples)")
    score = float(np.mean([row["score"] for row in rows]))
    if len(rows) > 1:
        print(f"mean  {score:.2f}")
    result = {"source": trained.source, "split": data.eval_split, "score": score, "tasks": rows}
    RunFolder(experiment.train.model_dir).write(f"evaluation_{data.eval_split}.json", result)
    return result


def examined(length: int, max_examples: int) -> np.ndarray:
    """The rows to look at: all, or `max_examples` random ones, always the same.

    Evenly spread ones would not do: where labels alternate, every second or third row may have one and the same.
    """
    if not max_examples or max_examples >= length:
        return np.arange(length)
    return np.sort(np.random.default_rng(0).permutation(length)[:max_examples])


def _bucket(length: int, longest: int) -> int:
    """The padded length: `longest`, or its half or quarter where the batch fits."""
    for parts in (4, 2):
        size = -(-longest // parts)
        if length <= size and size >= SHORTEST:
            return size
    return longest
