"""Several prompts of one task as one predictor (Lester et al. 2021, section 6 and Table 3), from what each of them predicts."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mpt_jax.config import StreamConfig
from mpt_jax.predict import Prediction

Metrics = Mapping[str, float]


def find_ensembles(streams: Sequence[StreamConfig], prompts: Sequence[int]) -> list[list[int]]:
    """The places of the streams that differ in their seed (and group) only; of no prompt twice, and of two prompts at least.

    Args:
        prompts: of each stream the number of its prompt; equal ones are the same prompt.
    """
    alike: dict[StreamConfig, dict[int, int]] = {}
    for place, (stream, prompt) in enumerate(zip(streams, prompts, strict=True)):
        alike.setdefault(dataclasses.replace(stream, group=0, seed=0), {}).setdefault(prompt, place)
    return [list(places.values()) for places in alike.values() if len(places) > 1]


def majority_vote(predictions: Sequence[Sequence[Prediction]]) -> list[str]:
    """The text that most prompts answer, of each of n examples. An answer that is no label counts like any other.

    Of texts with equally many votes, that with the highest sum of the log-probabilities of those who gave it
    (`Prediction.score`), then the first in alphabetical order. The order of the prompts has no influence.

    Args:
        predictions: [m prompts][n examples], whole answers.
    """
    return [_most_voted(votes) for votes in zip(*predictions, strict=True)]


def _most_voted(votes: Iterable[Prediction]) -> str:
    scores: dict[str, list[float]] = {}
    for vote in votes:
        scores.setdefault(vote.text, []).append(vote.score)
    # fsum rounds once, so that the order of the terms cannot decide a tie.
    return min(scores, key=lambda text: (-len(scores[text]), -math.fsum(scores[text]), text))


def mean_log_likelihood(predictions: Sequence[Sequence[Prediction]]) -> list[str]:
    """The label with the highest log-probability in the mean over the prompts, of each of n examples.

    Of equal ones, the first in alphabetical order. With `DecodeConfig.label_score="mean"` a label's log-probability is itself
    the mean over its tokens.

    Args:
        predictions: [m prompts][n examples], of ranked labels; the prompts have ranked the same ones.
    """
    return [_likeliest([vote.scores for vote in votes]) for votes in zip(*predictions, strict=True)]


def _likeliest(scores: Sequence[Mapping[str, float]]) -> str:
    means = {label: math.fsum(one[label] for one in scores) / len(scores) for label in scores[0]}
    return min(means, key=lambda label: (-means[label], label))


class Member(NamedTuple):
    """One prompt of an ensemble and how it scores by itself.

    Attributes:
        prompt: its number.
        score: of `evaluate.main_score`.
        validation: its score in the prompt file, by which training chose its best state; None where there is none.
    """

    prompt: int
    score: float
    metrics: Metrics
    validation: float | None


def summary(members: Sequence[Member], split: str, selection_split: str | None) -> dict[str, Any]:
    """The average over the m > 1 single prompts, with sample standard deviations (m − 1 in the denominator), and the best one.

    The best is chosen by the validation scores where all have one, else by the scores on `split` themselves, which flatters it;
    of equal ones, the first. `chosen_on` says on which split: where it is `split`, the choice has seen the answers.

    Args:
        split: the scored one.
        selection_split: that of the validation scores; None if unknown.

    Returns:
        {"prompts": [m], "average": {"score", "std", "metrics": {name: value}, "metrics_std": {name: value}},
        "best": {"prompt", "chosen_on": a split or None, "score", "metrics"}}.
    """
    validated = [member.validation for member in members if member.validation is not None]
    blind = len(validated) == len(members)
    keys = validated if blind else [member.score for member in members]
    best = members[keys.index(max(keys))]
    columns = {name: [member.metrics[name] for member in members] for name in members[0].metrics}
    scores = [member.score for member in members]
    return {
        "prompts": [member.prompt for member in members],
        "average": {
            "score": statistics.fmean(scores),
            "std": statistics.stdev(scores),
            "metrics": {name: statistics.fmean(column) for name, column in columns.items()},
            "metrics_std": {name: statistics.stdev(column) for name, column in columns.items()},
        },
        "best": {
            "prompt": best.prompt,
            "chosen_on": selection_split if blind else split,
            "score": best.score,
            "metrics": dict(best.metrics),
        },
    }
