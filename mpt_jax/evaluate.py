"""The scores of predictions: each task's own metrics, on the same examples every time."""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mpt_jax import distributed, setup
from mpt_jax.checkpoint.backbone import Backbone
from mpt_jax.checkpoint.folder import RunFolder
from mpt_jax.config import DecodeConfig, Experiment
from mpt_jax.data.cache import LabelSet, TokenCache
from mpt_jax.data.vocabulary import Vocabulary
from mpt_jax.metrics import INVALID
from mpt_jax.predict import predict_texts

Tree = Any

logger = logging.getLogger("mpt_jax")


def main_score(metrics: Mapping[str, float]) -> float:
    """The one number by which prompts are compared: the mean of the task's metrics (0-100), `INVALID` left out."""
    values = [value for name, value in metrics.items() if name != INVALID]
    return float(np.mean(values)) if values else math.nan


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
    labels: Sequence[LabelSet] | None = None,
) -> list[dict[str, float]]:
    """The metrics of each stream: cache n is decoded with prompt n of the bank and scored by its task's own `metric_fns`.

    Args:
        prompt_ids: the prompt of each cache, where it is not its own number.
        max_examples: of each cache, a random choice that is always the same; 0 = all.
        labels: of each cache, of `setup.open_labels`, with `decode.method="rank"`.

    Returns:
        Of each cache its metrics by name; of a classification with `metrics.INVALID` (see `TokenCache.score`).
    """
    chosen = [examined(len(cache), max_examples) for cache in caches]
    inputs = [cache.inputs(int(i)) for cache, rows in zip(caches, chosen, strict=True) for i in rows]
    task_ids = [n for n, rows in zip(prompt_ids or range(len(caches)), chosen, strict=True) for _ in rows]
    row_labels = labels and [label_set for label_set, rows in zip(labels, chosen, strict=True) for _ in rows]
    predictions = predict_texts(
        backbone,
        prompt_module,
        trainable,
        inputs,
        task_ids,
        vocabulary=vocabulary,
        lengths=lengths,
        decode=decode,
        numbers=np.concatenate(chosen).tolist(),
        labels=row_labels,
        mesh=mesh,
    )
    texts = iter([prediction.text for prediction in predictions])
    allowed = [label_set.texts for label_set in labels] if labels else [None] * len(caches)
    return [
        cache.score([next(texts) for _ in rows], rows, names) for cache, rows, names in zip(caches, chosen, allowed, strict=True)
    ]


def run_evaluate(experiment: Experiment) -> dict[str, Any]:
    """The `evaluate` command: score what MODEL_DIR holds on each task's `DataConfig.eval_split`.

    Prints a line for each prompt, writes `<MODEL_DIR>/evaluation_<split>.json` and returns what is in it: the scores, and all of
    `DecodeConfig` that they depend on. Of several processes all return it, and the first one prints and writes.

    Raises:
        UserError: nothing to evaluate, no such split, a prompt that does not fit the backbone, no labels to rank.
    """
    experiment.validate()
    data, mesh = experiment.data, setup.mesh_of(experiment)
    trained = setup.open_trained(experiment, mesh)
    vocabulary = setup.open_vocabulary(experiment, trained.backbone)
    streams = setup.find_streams(experiment)
    caches = setup.open_caches(experiment, streams.tasks, data.eval_split, vocabulary)
    labels = setup.open_labels(experiment, streams.tasks, vocabulary)
    numbers = trained.prompt_of(streams.tasks)
    for task, other in dict.fromkeys((t, trained.tasks[n]) for t, n in zip(streams.tasks, numbers, strict=True) if trained.tasks):
        if other not in ("", task):
            logger.warning("warning: %s was not trained on '%s', only on '%s'", trained.source, task, other)
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
        labels=labels,
    )
    rows = []
    for stream, number, cache, one in zip(streams.configs, numbers, caches, metrics, strict=True):
        examples = len(examined(len(cache), experiment.train.max_eval_examples))
        rows.append({"task": stream.task, "prompt": number, "score": main_score(one), "metrics": one, "examples": examples})
    score = float(np.mean([row["score"] for row in rows]))
    decode = {name: value for name, value in dataclasses.asdict(experiment.decode).items() if name != "batch_size"}
    result = {"source": trained.source, "split": data.eval_split, "decode": decode, "score": score, "tasks": rows}
    if distributed.is_first():
        _tell(result)
        RunFolder(experiment.train.model_dir).write(f"evaluation_{data.eval_split}.json", result)
    return result


def _tell(result: dict[str, Any]) -> None:
    """A line for each task, and one for the mean."""
    for row in result["tasks"]:
        numbers = "  ".join(f"{name} {value:.2f}" for name, value in row["metrics"].items())
        print(f"{row['task']}  {numbers}  ({row['examples']} examples)")
    if len(result["tasks"]) > 1:
        print(f"mean  {result['score']:.2f}")


def examined(length: int, max_examples: int) -> np.ndarray:
    """The rows to look at: all, or `max_examples` random ones, always the same.

    Evenly spread ones would not do: where labels alternate, every second or third row may have one and the same.
    """
    if not max_examples or max_examples >= length:
        return np.arange(length)
    return np.sort(np.random.default_rng(0).permutation(length)[:max_examples])
