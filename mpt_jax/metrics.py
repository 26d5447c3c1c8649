"""Task metrics and postprocessors in NumPy: percentages, with seqio's signatures, without TensorFlow.

A metric is `metric(targets, predictions) -> {name: value}`; a postprocessor is `fn(text, example=None, is_target=False)` and
makes of a decoded text what the metric compares. Tasks name them in `metric_fns` and `postprocess_fn`; a functools.partial with
keyword arguments serves where a task needs another setting. Where a correlation is undefined (one side is constant) it is 0.

A prediction that is no label is wrong everywhere. `invalid_rate` says how many there are; it is told beside a task's own metrics.
"""

import collections
import itertools
import re
import string
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

Scores = dict[str, float]
INVALID = "invalid"  # told with the metrics of a classification, but no score: no prompt is chosen by it

# ---------------------------------------------------------------- postprocessors


def strip(text: str, example: Mapping[str, Any] | None = None, is_target: bool = False) -> str:
    """The text without spaces around it."""
    return _text(text).strip()


def number(text: str, example: Mapping[str, Any] | None = None, is_target: bool = False) -> float:
    """The text as a number, -1 where it is none (as T5's `string_to_float`)."""
    try:
        value = float(_text(text))
    except ValueError:
        return -1.0
    return value if np.isfinite(value) else -1.0


def with_answers(text: str, example: Mapping[str, Any] | None = None, is_target: bool = False) -> Any:
    """Targets: {"answers": all right answers, "id": the question}; predictions: the text. For `squad`, `record`, `bleu`, `rouge`.

    The example's `answers` are the right answers (default: the target), its `id` joins copies of one question.
    """
    if not is_target:
        return _text(text).strip()
    example = example or {}
    answers = [_text(answer) for answer in example.get("answers", ())]
    return {"answers": answers or [_text(text)], "id": _text(example["id"]) if "id" in example else None}


def with_group(text: str, example: Mapping[str, Any] | None = None, is_target: bool = False) -> Any:
    """Targets: {"label": text, "group": example["group"]}; predictions: the text. For `multirc`."""
    if not is_target:
        return _text(text).strip()
    return {"label": _text(text).strip(), "group": _text((example or {})["group"])}


def referent(text: str, example: Mapping[str, Any] | None = None, is_target: bool = False) -> str:
    """WSC as T5 writes it (`wsc_simple`): targets: the label; predictions: "1" where the target's noun is named, else "0".

    One of the two must have all words of the other, without case and determiners; a possessive names another thing.
    """
    if is_target:
        return _text((example or {})["label"])
    said, meant = (_text(value).strip().lower() for value in (text, (example or {})["targets_pretokenized"]))
    words = [{word for word in phrase.split() if word not in _DETERMINERS} for phrase in (said, meant)]
    same_owner = ("'" in said) == ("'" in meant)
    return str(int(same_owner and bool(words[0]) and (words[0] <= words[1] or words[1] <= words[0])))


_DETERMINERS = set("a an few her his each every many much my our some that the their these this those which whose your".split())


# ---------------------------------------------------------------- metrics of labels


def accuracy(targets: Sequence[Any], predictions: Sequence[Any]) -> Scores:
    """Share of predictions that equal their target."""
    return {"accuracy": _percent([t == p for t, p in zip(targets, predictions, strict=True)])}


def f1(targets: Sequence[str], predictions: Sequence[str], positive: str = "1") -> Scores:
    """F1 of the class `positive` (MRPC, QQP).

    A prediction that is neither `positive` nor any of the targets is wrong: where the target is another class it counts as
    `positive`, as in T5's `f1_score_with_invalid` (t5/evaluation/metrics.py).
    """
    labels = {positive, *targets}
    hit = sum(t == p == positive for t, p in zip(targets, predictions, strict=True))
    claimed = sum(p == positive or (p not in labels and t != positive) for t, p in zip(targets, predictions, strict=True))
    return {"f1": _f1(hit, claimed, sum(t == positive for t in targets))}


def f1_macro(targets: Sequence[str], predictions: Sequence[str], classes: Sequence[str] | None = None) -> Scores:
    """Unweighted mean of every class's F1 (CB); classes default to those of the targets.

    As scikit-learn's `f1_score(labels=classes, average="macro")`: an invalid prediction is missed by its target's class, and
    claimed by none.
    """
    scores = []
    for name in classes or sorted(set(targets)):
        hit = sum(t == p == name for t, p in zip(targets, predictions, strict=True))
        scores.append(_f1(hit, sum(p == name for p in predictions), sum(t == name for t in targets)))
    return {"f1_macro": float(np.mean(scores)) if scores else 0.0}


def matthews_correlation(targets: Sequence[str], predictions: Sequence[str]) -> Scores:
    """Matthews correlation × 100 (CoLA), of any number of classes (Gorodkin 2004).

    All invalid predictions, those that are none of the targets, together are one more class, as T5's postprocessor makes them.
    """
    names = sorted(set(targets))
    index = {name: i for i, name in enumerate(names)}
    confusion = np.zeros((len(names) + 1, len(names) + 1))
    for t, p in zip(targets, predictions, strict=True):
        confusion[index[t], index.get(p, len(names))] += 1
    true, predicted, total = confusion.sum(1), confusion.sum(0), confusion.sum()
    covariance = np.trace(confusion) * total - true @ predicted
    scale = np.sqrt((total**2 - predicted @ predicted) * (total**2 - true @ true))
    return {"matthews_correlation": float(100 * covariance / scale) if scale else 0.0}


def invalid_rate(labels: Sequence[Collection[Any]], predictions: Sequence[Any]) -> Scores:
    """Share of predictions that are none of their example's labels."""
    return {INVALID: _percent([p not in names for names, p in zip(labels, predictions, strict=True)])}


# ---------------------------------------------------------------- metrics of numbers


def pearson(targets: Sequence[float], predictions: Sequence[float]) -> Scores:
    """Pearson correlation × 100 (STS-B)."""
    return {"pearson": _correlation(np.asarray(targets, float), np.asarray(predictions, float))}


def spearman(targets: Sequence[float], predictions: Sequence[float]) -> Scores:
    """Spearman correlation × 100 (STS-B): Pearson of the ranks, ties sharing their mean rank."""
    return {"spearman": _correlation(_ranks(targets), _ranks(predictions))}


# ---------------------------------------------------------------- metrics of answers


def squad(targets: Sequence[Any], predictions: Sequence[str]) -> Scores:
    """Exact match and token F1 against the best of the right answers (SQuAD, MRQA).

    A target is a text, a list of texts or what `with_answers` makes. Texts are normalised as SQuAD's script does (case,
    punctuation, articles, spaces). Where nothing is left of either text F1 is 100, of one of them 0 (SQuAD 2.0's script).
    """
    pairs = [(_answers(target), prediction) for target, prediction in zip(targets, predictions, strict=True)]
    return {
        "em": _percent([_best(_exact_match, answers, prediction) for answers, prediction in pairs]),
        "f1": _percent([_best(_token_f1, answers, prediction) for answers, prediction in pairs]),
    }


def record(targets: Sequence[Mapping[str, Any]], predictions: Sequence[str]) -> Scores:
    """ReCoRD's exact match and token F1 against the best of a query's answers, each query counted once (SuperGLUE).

    Targets are those of `with_answers`. A task has a copy of a query for each answer, to train on; the first copy's prediction
    counts.
    """
    return squad(*_once(targets, predictions))


def multirc(targets: Sequence[Mapping[str, str]], predictions: Sequence[str], positive: str = "1") -> Scores:
    """MultiRC's F1 over all answers, and share of questions whose answers are all judged right (targets of `with_group`)."""
    groups: dict[str, bool] = {}
    for target, prediction in zip(targets, predictions, strict=True):
        groups[target["group"]] = groups.get(target["group"], True) and target["label"] == prediction
    f1a = f1([target["label"] for target in targets], predictions, positive)["f1"]
    return {"f1a": f1a, "em": _percent(list(groups.values()))}


# ---------------------------------------------------------------- metrics of running text


def bleu(targets: Sequence[Any], predictions: Sequence[str], tokenize: str = "13a") -> Scores:
    """Corpus BLEU, 0 to 100, of sacrebleu (Post 2018; exponential smoothing).

    A target is a text, a list of references or what `with_answers` makes; of copies with one `id` the first one counts.

    Args:
        tokenize: a tokeniser of sacrebleu's: "13a" is WMT's, T5's own evaluation has "intl".
    """
    import sacrebleu

    targets, predictions = _once(targets, predictions)
    references = [_answers(target) for target in targets]
    if not predictions:
        return {"bleu": 0.0}
    columns = [list(column) for column in itertools.zip_longest(*references)]  # None where a prediction has fewer
    return {"bleu": float(sacrebleu.corpus_bleu(predictions, columns, tokenize=tokenize, force=True).score)}


def rouge(targets: Sequence[Any], predictions: Sequence[str], stemmer: bool = False) -> Scores:
    """Mean F of ROUGE-1, ROUGE-2 and ROUGE-Lsum, 0 to 100, of rouge-score (Lin 2004), each against the best of the references.

    Targets and copies as in `bleu`. ROUGE-Lsum compares sentence by sentence; as in T5's evaluation, a new one begins after
    " . " and at line breaks. T5 has the median of a random bootstrap where this is the mean itself.
    """
    from rouge_score import rouge_scorer  # loads nltk, which takes two seconds

    def lines(text: str) -> str:
        return text.replace(" . ", " .\n")

    names = ("rouge1", "rouge2", "rougeLsum")
    scorer = rouge_scorer.RougeScorer(names, use_stemmer=stemmer)
    pairs = zip(*_once(targets, predictions), strict=True)
    scores = [scorer.score_multi([lines(text) for text in _answers(target)], lines(prediction)) for target, prediction in pairs]
    return {name: _percent([score[name].fmeasure for score in scores]) for name in names}


# ---------------------------------------------------------------- parts


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, without punctuation and the articles a, an, the; single spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _exact_match(answer: str, prediction: str) -> float:
    return float(normalize_answer(answer) == normalize_answer(prediction))


def _token_f1(answer: str, prediction: str) -> float:
    expected, got = normalize_answer(answer).split(), normalize_answer(prediction).split()
    if not expected or not got:
        return float(expected == got)
    shared = sum((collections.Counter(expected) & collections.Counter(got)).values())
    return _f1(shared, len(got), len(expected)) / 100


def _answers(target: Any) -> Sequence[str]:
    if isinstance(target, Mapping):
        target = target["answers"]
    return [target] if isinstance(target, str) else target


def _once(targets: Sequence[Any], predictions: Sequence[str]) -> tuple[list[Any], list[str]]:
    """Without the further copies of what has one `id`; targets without one all stay."""
    seen: set[str] = set()
    kept: tuple[list[Any], list[str]] = [], []
    for target, prediction in zip(targets, predictions, strict=True):
        ident = target["id"] if isinstance(target, Mapping) else None
        if ident is None or ident not in seen:
            kept[0].append(target)
            kept[1].append(prediction)
        if ident is not None:
            seen.add(ident)
    return kept


def _best(score: Callable[[str, str], float], answers: Sequence[str], prediction: str) -> float:
    return max(score(answer, prediction) for answer in answers)


def _f1(hit: float, predicted: float, true: float) -> float:
    """F1 × 100 from counts; 0 where there are none."""
    return 100.0 * 2 * hit / (predicted + true) if hit else 0.0


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    if not len(x):
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(100 * (x @ y) / scale) if scale else 0.0


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, inverse, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _percent(values: Sequence[float]) -> float:
    return float(100 * np.mean(np.asarray(values, float))) if len(values) else 0.0


def _text(value: Any) -> str:
    """seqio gives bytes where our cache gives str."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
