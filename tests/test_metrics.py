"""Metrics against scikit-learn, SciPy and counting by hand."""

import functools
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as reference

from mpt_jax import metrics


@pytest.fixture(params=range(4))
def labels(request):
    rng = np.random.default_rng(request.param)
    names = np.array(["0", "1", "2", "entailment"])[: 2 + request.param % 3]
    targets = rng.choice(names, 200)
    return list(targets), [str(t if rng.random() < 0.6 else rng.choice(names)) for t in targets]


def test_label_metrics_equal_scikit_learn(labels):
    targets, predictions = labels
    assert metrics.accuracy(*labels)["accuracy"] == pytest.approx(100 * reference.accuracy_score(targets, predictions))
    assert metrics.f1_macro(*labels)["f1_macro"] == pytest.approx(100 * reference.f1_score(targets, predictions, average="macro"))
    for name in set(targets):
        expected = reference.f1_score([t == name for t in targets], [p == name for p in predictions])
        assert metrics.f1(*labels, positive=name)["f1"] == pytest.approx(100 * expected)
    expected = reference.matthews_corrcoef(targets, predictions)
    assert metrics.matthews_correlation(*labels)["matthews_correlation"] == pytest.approx(100 * expected)


def test_invalid_predictions_are_wrong_everywhere():
    targets, predictions = ["1", "0", "1", "0"], ["1", "0", "banana", "banana"]
    assert metrics.accuracy(targets, predictions) == {"accuracy": 50.0}
    assert metrics.f1(targets, predictions)["f1"] == pytest.approx(200 / 3)  # precision 1, recall 1/2
    assert metrics.f1_macro(targets, predictions)["f1_macro"] == pytest.approx(200 / 3)
    assert 0 < metrics.matthews_correlation(targets, predictions)["matthews_correlation"] < 100


def test_correlations_equal_scipy():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 20, 300) / 5  # with ties
    y = x + rng.normal(size=300)
    y[:50] = np.round(y[:50])
    assert metrics.pearson(x, y)["pearson"] == pytest.approx(100 * stats.pearsonr(x, y).statistic)
    assert metrics.spearman(x, y)["spearman"] == pytest.approx(100 * stats.spearmanr(x, y).statistic)


def test_undefined_is_zero():
    assert metrics.pearson([1, 2, 3], [4, 4, 4]) == {"pearson": 0.0}
    assert metrics.spearman([1, 2, 3], [4, 4, 4]) == {"spearman": 0.0}
    assert metrics.matthews_correlation(["0", "1"], ["1", "1"]) == {"matthews_correlation": 0.0}
    assert metrics.f1(["0"], ["0"]) == {"f1": 0.0}
    assert metrics.accuracy([], []) == {"accuracy": 0.0}


@pytest.mark.parametrize(
    "answers, prediction, em, f1",
    [
        ("The Eiffel Tower", "eiffel tower!", 100, 100),
        (["308", "308 points"], "308 points", 100, 100),
        ("in the city of Paris", "Paris", 0, 40),  # 1 of 1 predicted, 1 of 4 expected
        ("red red blue", "red blue blue", 0, 200 / 3),  # words count as often as they occur
        ("yes", "", 0, 0),
        ("the", "a", 100, 100),  # nothing is left of either
    ],
)
def test_squad_by_hand(answers, prediction, em, f1):
    assert metrics.squad([answers], [prediction]) == pytest.approx({"em": em, "f1": f1})


def test_copies_of_a_question_count_once():
    copies = [metrics.with_answers(text, {"answers": ["Ann", "Bob"], "id": "1-2"}, True) for text in ("Ann", "Bob")]
    other = metrics.with_answers("Eve", {"answers": ["Eve"], "id": "1-3"}, True)
    assert metrics.squad([*copies, other], ["Ann", "Ann", "Bob"]) == {"em": 50.0, "f1": 50.0}


def test_answers_default_to_the_target_and_may_be_bytes():
    assert metrics.with_answers("Ann", {}, True) == {"answers": ["Ann"], "id": None}
    seen_by_seqio = {"answers": np.array([b"Ann", b"Bob"], object), "id": b"7"}
    assert metrics.with_answers("Ann", seen_by_seqio, True) == {"answers": ["Ann", "Bob"], "id": "7"}


def test_multirc_by_hand():
    rows = [("1", "1", "q1"), ("0", "1", "q1"), ("1", "1", "q2"), ("0", "0", "q2"), ("1", "0", "q3")]
    targets = [metrics.with_group(true, {"group": group}, is_target=True) for true, _, group in rows]
    scores = metrics.multirc(targets, [predicted for _, predicted, _ in rows])
    assert scores["f1a"] == pytest.approx(200 / 3)  # 2 hits, 3 predicted, 3 true
    assert scores["em"] == pytest.approx(100 / 3)  # only q2 is all right


def test_numbers():
    assert [metrics.number(text) for text in ("3.8", " 5 ", "five", "nan", "")] == [3.8, 5.0, -1.0, -1.0, -1.0]


def test_seqio_accepts_the_signatures():
    """seqio tells the kind of a metric from its positional arguments."""
    import inspect

    for function in (metrics.accuracy, metrics.f1, functools.partial(metrics.f1, positive="yes"), metrics.squad, metrics.multirc):
        positional = [
            name
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        assert positional == ["targets", "predictions"]


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="zip"):
        metrics.accuracy(["1"], ["1", "0"])


def test_needs_numpy_only():
    code = "import sys, mpt_jax.metrics; assert not {'tensorflow', 'seqio', 'jax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
