"""Which scores are above chance, judged by their spread over seeds and by the number of test examples."""

import math
from collections.abc import Sequence

from mpt_jax.studies import results
from mpt_jax.studies.results import Record, Spread

CORRELATIONS = {"matthews_correlation", "pearson", "spearman"}  # 0 by chance, whatever the labels
STANDARD_ERRORS = 2.0  # what is above or below chance is so by more than this


def above(records: Sequence[Record], score: Spread | None, tasks: Sequence[str]) -> bool | None:
    """Whether a score, the mean over `tasks`, is above chance; None where there is no score or chance is not known."""
    limits = _limits(records, score, tasks)
    return None if score is None or limits is None else score.mean > limits[1]


def below(records: Sequence[Record], score: Spread | None, tasks: Sequence[str]) -> bool | None:
    """Whether it is below chance by as much; None as for `above`."""
    limits = _limits(records, score, tasks)
    return None if score is None or limits is None else score.mean < limits[0]


def _limits(records: Sequence[Record], score: Spread | None, tasks: Sequence[str]) -> tuple[float, float] | None:
    """Chance less and plus STANDARD_ERRORS.

    The error has two independent parts: the mean's over n seeds, s²/n, and that of a test split of N examples, which all seeds
    share. With accuracy a guesser's score has the variance c (100 − c) / N, a correlation's 100² / N; for other metrics the
    former stands in for the unknown one. That part alone holds a guesser back, from one seed on (one who says the same word
    always has the same score in all seeds); s²/n is for those that have learned in some seeds only, and is no t-test.
    """
    chance = results.reference(records, "chance", tasks)
    if score is None or chance is None:
        return None
    variance = 0.0 if math.isnan(score.std) else score.std**2 / score.n
    for task in tasks:
        level, size = results.reference(records, "chance", [task]), examples(records, task)
        if level is not None and size:
            spread = 100.0**2 if _is_correlation(records, task) else level * (100.0 - level)
            variance += spread / size / len(tasks) ** 2
    error = STANDARD_ERRORS * math.sqrt(variance)
    return chance - error, chance + error


def _is_correlation(records: Sequence[Record], task: str) -> bool:
    return any(CORRELATIONS & set(record.get("metrics", ())) for record in results.select(records, task=task))


def examples(records: Sequence[Record], task: str) -> int | None:
    """How many test examples of the task were scored (the fewest, should its runs differ); None where no record says it."""
    sizes = [record["num_examples"] for record in results.select(records, task=task) if record.get("num_examples")]
    return min(sizes, default=None)
