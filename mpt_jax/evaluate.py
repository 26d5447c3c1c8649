"""The scores of predictions: each task's own metrics, on the same examples every time."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from mpt_jax import distributed, setup
from mpt_jax.checkpoint.backbone import Backbone
from mpt_jax.checkpoint.folder import RunFolder
from mpt_jax.config import DecodeConfig, Experiment, StreamConfig
from mpt_jax.data.cache import LabelSet, TokenCache
from mpt_jax.data.vocabulary import Vocabulary
from mpt_jax.ensemble import Member, find_ensembles, majority_vote, mean_log_likelihood, summary
from mpt_jax.metrics import INVALID
from mpt_jax.predict import Prediction, predict_texts

Tree = Any

# How the prompts of an ensemble answer together, and how that is told.
COMBINED = {"majority_vote": "majority vote", "mean_log_likelihood": "mean log-likelihood"}


def main_score(metrics: Mapping[str, float]) -> float:
    """The one number by which prompts are compared: the mean of the task's metrics (0-100), `INVALID` left out."""
    values = [value for name, value in metrics.items() if name != INVALID]
    return float(np.mean(values)) if values else math.nan


class Answered(NamedTuple):
    """What one prompt answered to examples of one cache.

    Attributes:
        rows: the examples' numbers, int64 [n].
        predictions: n of them.
        labels: what was ranked, or could have been; None = the different targets of the split.
    """

    cache: TokenCache
    rows: np.ndarray
    predictions: list[Prediction]
    labels: tuple[str, ...] | None

    def score(self, texts: Sequence[str] | None = None) -> dict[str, float]:
        """The task's own metrics (see `TokenCache.score`) of these answers [n], by default those of `predictions`."""
        answers = [prediction.text for prediction in self.predictions] if texts is None else list(texts)
        return self.cache.score(answers, self.rows, self.labels)


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
    check: Callable[[], None] = lambda: None,
) -> list[dict[str, float]]:
    """The metrics of each stream: cache n is answered with prompt n of the bank and scored by its task's own `metric_fns`.

    Arguments: see `answer`.

    Returns:
        Of each cache its metrics by name; of a classification with `metrics.INVALID` (see `TokenCache.score`).
    """
    answered = answer(
        backbone,
        prompt_module,
        trainable,
        caches,
        vocabulary=vocabulary,
        lengths=lengths,
        decode=decode,
        max_examples=max_examples,
        mesh=mesh,
        prompt_ids=prompt_ids,
        labels=labels,
        check=check,
    )
    return [one.score() for one in answered]


def answer(
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
    check: Callable[[], None] = lambda: None,
) -> list[Answered]:
    """The answers of each stream: prompt n of the bank to the examples of cache n, those of all prompts in the same batches.

    Args:
        prompt_ids: the prompt of each cache, where it is not its own number.
        max_examples: of each cache, a random choice that is always the same; 0 = all.
        labels: of each cache, of `setup.open_labels`, with `decode.method="rank"`.
        check: see `predict_texts`.
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
        check=check,
    )
    following = iter(predictions)
    allowed = [label_set.texts for label_set in labels] if labels else [None] * len(caches)
    return [
        Answered(cache, rows, [next(following) for _ in rows], names)
        for cache, rows, names in zip(caches, chosen, allowed, strict=True)
    ]


def run_evaluate(experiment: Experiment) -> dict[str, Any]:
    """The `evaluate` command: score what MODEL_DIR holds on each task's `DataConfig.eval_split`.

    Prints a line for each prompt, writes `<MODEL_DIR>/evaluation_<split>.json` and returns what is in it: the scores, those of
    `ensembles`, and all of `DecodeConfig` that they depend on. Of several processes all return it, and the first one prints and
    writes.

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
    trained.warn_of_others(streams.tasks, numbers)
    answered = answer(
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
    for stream, number, one in zip(streams.configs, numbers, answered, strict=True):
        metrics = one.score()
        row = {"task": stream.task, "prompt": number, "length": trained.length_of(number), "score": main_score(metrics)}
        rows.append(row | {"metrics": metrics, "examples": len(one.rows)})
    score = float(np.mean([row["score"] for row in rows]))
    decode = {name: value for name, value in dataclasses.asdict(experiment.decode).items() if name != "batch_size"}
    result = {"source": trained.source, "split": data.eval_split, "decode": decode, "score": score, "tasks": rows}
    result["ensembles"] = ensembles(streams.configs, answered, rows, trained.meta, data.eval_split)
    if distributed.is_first():
        _tell(result)
        RunFolder(experiment.train.model_dir).write(f"evaluation_{data.eval_split}.json", result)
    return result


def ensembles(
    streams: Sequence[StreamConfig],
    answered: Sequence[Answered],
    rows: Sequence[Mapping[str, Any]],
    meta: Mapping[str, Any],
    split: str,
) -> list[dict[str, Any]]:
    """Of prompts of one task that differ in their seed only: their average, the best one, and what they answer together.

    No example is predicted again. A task without metrics has no ensemble to compare.

    Args:
        rows: of each stream its "task", "prompt", "score", "metrics" and "examples".
        meta: of the prompt file; {} where there are no prompts.

    Returns:
        Of each ensemble its "task", its `summary`, "examples", and "score" and "metrics" of the "majority_vote" and, where
        labels were ranked, of the "mean_log_likelihood".
    """
    numbers = [row["prompt"] for row in rows]
    # A plain prompt is its group's, one of MPT its stream's.
    distinct = [meta["groups"][number] for number in numbers] if meta.get("method") == "plain" else numbers
    found = []
    for places in find_ensembles(streams, distinct):
        first = answered[places[0]]
        if not first.cache.has_metrics:
            continue
        members = []
        for row in (rows[place] for place in places):
            validation = meta["scores"][meta["groups"][row["prompt"]]]
            members.append(Member(row["prompt"], row["score"], row["metrics"], validation))
        predictions = [answered[place].predictions for place in places]
        texts = {"majority_vote": majority_vote(predictions)}
        if first.predictions and first.predictions[0].scores:
            texts["mean_log_likelihood"] = mean_log_likelihood(predictions)
        one = {"task": streams[places[0]].task} | summary(members, split, meta.get("selection_split"))
        for name, answers in texts.items():
            metrics = first.score(answers)
            one[name] = {"score": main_score(metrics), "metrics": metrics}
        found.append(one | {"examples": len(first.rows)})
    return found


def _tell(result: dict[str, Any]) -> None:
    """A line for each task, or for each of its prompts where it has several, and one for the mean; then the ensembles."""
    tasks = [row["task"] for row in result["tasks"]]
    several_lengths = len({row["length"] for row in result["tasks"]}) > 1
    for row in result["tasks"]:
        which = f", prompt {row['prompt']}" if tasks.count(row["task"]) > 1 else ""
        which += f", {row['length']} tokens" if several_lengths else ""
        print(f"{row['task']}{which}  {_numbers(row['metrics'])}  ({row['examples']} examples)")
    if len(result["tasks"]) > 1:
        print(f"mean  {result['score']:.2f}")
    for one in result["ensembles"]:
        _tell_ensemble(one, result["split"])
    if len(result["ensembles"]) > 1:
        print(f"mean of {len(result['ensembles'])} ensembles")
        for name, told in {"average": "average", "best": "best", **COMBINED}.items():
            scores = [one[name]["score"] for one in result["ensembles"] if name in one]
            if scores:  # labels are ranked for all tasks or for none
                _tell_line(told, f"{np.mean(scores):.2f}")


def _tell_ensemble(one: dict[str, Any], split: str) -> None:
    average, best = one["average"], one["best"]
    print(f"{one['task']}, ensemble of {len(one['prompts'])} prompts ({', '.join(map(str, one['prompts']))})")
    _tell_line("average ± standard deviation", _numbers(average["metrics"], average["metrics_std"]))
    if best["chosen_on"] == split:
        how = f"chosen on '{split}' itself, which flatters it"
    elif best["chosen_on"] is None:
        how = "chosen by the validation scores in the prompt file"
    else:
        how = f"chosen on '{best['chosen_on']}'"
    _tell_line(f"best, prompt {best['prompt']}", f"{_numbers(best['metrics'])}  ({how})")
    for name, told in COMBINED.items():
        if name in one:
            _tell_line(told, _numbers(one[name]["metrics"]))


def _tell_line(name: str, numbers: str) -> None:
    print(f"  {name:<28}  {numbers}")


def _numbers(metrics: Mapping[str, float], std: Mapping[str, float] | None = None) -> str:
    return "  ".join(f"{name} {value:.2f}" + (f" ± {std[name]:.2f}" if std else "") for name, value in metrics.items())


def examined(length: int, max_examples: int) -> np.ndarray:
    """The rows to look at: all, or `max_examples` random ones, always the same.

    Evenly spread ones would not do: where labels alternate, every second or third row may have one and the same.
    """
    if not max_examples or max_examples >= length:
        return np.arange(length)
    return np.sort(np.random.default_rng(0).permutation(length)[:max_examples])
