"""Task metrics and postprocessors in NumPy: percentages, with seqio's signatures, without TensorFlow.

A metric is `metric(targets, predictions) -> {name: value}`; a postprocessor is `fn(text, example=None, is_target=False)` and
makes of a decoded text what the metric compares. Tasks name them in `metric_fns` and `postprocess_fn`; a functools.partial with
keyword arguments serves where a task needs another setting. Where a correlation is undefined (one side is constant) it is 0.
"""

import collections
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Scores = dict[str, float]

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
    """Targets: {"answers": all right answers, "id": the question}; predictions: the text. For `squad`.

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
    """F1 of the class `positive` (MRPC, QQP); anything else that is predicted counts as the other class."""
    hit = sum(t == p == positive for t, p in zip(targets, predictions, strict=True))
    return {"f1": _f1(hit, sum(p == positive for p in predictions), sum(t == positive for t in targets))}


def f1_macro(targets: Sequence[str], predictions: Sequence[str], classes: Sequence[str] | None = None) -> Scores:
    """Unweighted mean of every class's F1 (CB); classes default to those of the targets."""
    scores = [f1(targets, predictions, positive=name)["f1"] for name in classes or sorted(set(targets))]
    return {"f1_macro": float(np.mean(scores)) if scores else 0.0}


def matthews_correlation(targets: Sequence[str], predictions: Sequence[str]) -> Scores:
    """Matthews correlation × 100 (CoLA), of any number of classes (Gorodkin 2004); an invalid prediction is one more class."""
    names = sorted({*targets, *predictions})
    index = {name: i for i, name in enumerate(names)}
    confusion = np.zeros((len(names), len(names)))
    for t, p in zip(targets, predictions, strict=True):
        confusion[index[t], index[p]] += 1
    true, predicted, total = confusion.sum(1), confusion.sum(0), confusion.sum()
    covariance = np.trace(confusion) * total - true @ predicted
    scale = np.sqrt((total**2 - predicted @ predicted) * (total**2 - true @ true))
    return {"matthews_correlation": float(100 * covariance / scale) if scale else 0.0}


# ---------------------------------------------------------------- metrics of numbers


def pearson(targets: Sequence[float], predictions: Sequence[float]) -> Scores:
    """Pearson correlation × 100 (STS-B)."""
    return {"pearson": _correlation(np.asarray(targets, float), np.asarray(predictions, float))}


def spearman(targets: Sequence[float], predictions: Sequence[float]) -> Scores:
    """Spearman correlation × 100 (STS-B): Pearson of the ranks, ties sharing their mean rank."""
    return {"spearman": _correlation(_ranks(targets), _ranks(predictions))}


# ---------------------------------------------------------------- metrics of answers


def squad(targets: Sequence[Any], predictions: Sequence[str]) -> Scores:
    """Exact match and token F1 against the best of the right answers (SQuAD, MRQA, ReCoRD).

    A target is a text, a list of texts or what `with_answers` makes. Texts are normalised as SQuAD's script does (case,
    punctuation, articles, spaces). Copies of one question (the same `id`: ReCoRD has one for each answer) count once.
    """
    seen: set[str] = set()
    exact, overlap = [], []
    for target, prediction in zip(targets, predictions, strict=True):
        if isinstance(target, Mapping):
            answers, ident = target["answers"], target["id"]
        else:
            answers, ident = [target] if isinstance(target, str) else target, None
        if ident in seen:
            continue
        if ident is not None:
            seen.add(ident)
        exact.append(_best(_exact_match, answers, prediction))
        overlap.append(_best(_token_f1, answers, prediction))
    return {"em": _percent(exact), "f1": _percent(overlap)}


def multirc(targets: Sequence[Mapping[str, str]], predictions: Sequence[str], positive: str = "1") -> Scores:
    """MultiRC's F1 over all answers, and share of questions whose answers are all judged right (targets of `with_group`)."""
    groups: dict[str, bool] = {}
    for target, prediction in zip(targets, predictions, strict=True):
        groups[target["group"]] = groups.get(target["group"], True) and target["label"] == prediction
    f1a = f1([target["label"] for target in targets], predictions, positive)["f1"]
    return {"f1a": f1a, "em": _percent(list(groups.values()))}


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


def _best(score: Callable[[str, str], float], answers: Sequence[str], prediction: str) -> float:
    return max(score(answer, prediction) for answer in answers)


def _f1(hit: float, predicted: float, true: float) -> float:
    """F1 × 100 from counts; 0 where there are none."""
    return 100.0 * 2 * hit / (predicted + true) if hit else 0.0


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
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
