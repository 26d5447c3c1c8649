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
    """By hand: 2 × 2 right, one invalid prediction for each class, which differ from each other."""
    targets, predictions = ["1", "1", "1", "0", "0", "0"], ["1", "1", "banana", "0", "0", ""]
    assert metrics.accuracy(targets, predictions)["accuracy"] == pytest.approx(100 * 4 / 6)
    assert metrics.f1(targets, predictions)["f1"] == pytest.approx(100 * 2 * 2 / (3 + 3))  # claimed: 2 and the "" for a 0
    assert metrics.f1(targets, predictions, positive="0")["f1"] == pytest.approx(100 * 2 * 2 / (3 + 3))
    assert metrics.f1_macro(targets, predictions)["f1_macro"] == pytest.approx(100 * 4 / 5)  # 2·2 / (2 + 3) for each class
    # Gorodkin: (c·s − Σ t·p) / √((s² − Σ p²)(s² − Σ t²)), c = 4, s = 6, t = (3, 3, 0), p = (2, 2, 2)
    assert metrics.matthews_correlation(targets, predictions)["matthews_correlation"] == pytest.approx(
        100 * (4 * 6 - 12) / np.sqrt((36 - 12) * (36 - 18))
    )
    # As T5's evaluation has it: scikit-learn on numbers, where what is invalid is -1 (or for F1, the other class).
    numbers = [int(p) if p in ("0", "1") else -1 for p in predictions]
    flipped = [p if p >= 0 else 1 - int(t) for t, p in zip(targets, numbers, strict=True)]
    true = [int(t) for t in targets]
    assert metrics.f1(targets, predictions)["f1"] == pytest.approx(100 * reference.f1_score(true, flipped))
    macro = reference.f1_score(true, numbers, labels=[0, 1], average="macro")
    assert metrics.f1_macro(targets, predictions)["f1_macro"] == pytest.approx(100 * macro)
    expected = 100 * reference.matthews_corrcoef(true, numbers)
    assert metrics.matthews_correlation(targets, predictions)["matthews_correlation"] == pytest.approx(expected)
    classes = [("0", "1")] * 6
    assert metrics.invalid_rate(classes, predictions) == {"invalid": pytest.approx(100 / 3)}
    assert metrics.invalid_rate(classes, targets) == {"invalid": 0.0} == metrics.invalid_rate([], [])


def test_three_classes_by_hand():
    """Confusion (rows: targets a, b, c): a → a a b; b → b c; c → c."""
    targets, predictions = list("aaabbc"), list("aabbcc")
    # F1: a 2·2/(2+3), b 2·1/(2+2), c 2·1/(2+1)
    assert metrics.f1_macro(targets, predictions)["f1_macro"] == pytest.approx(100 * (4 / 5 + 1 / 2 + 2 / 3) / 3)
    # c = 4, s = 6, t = (3, 2, 1), p = (2, 2, 2): (24 − 12) / √((36 − 12)(36 − 14))
    assert metrics.matthews_correlation(targets, predictions)["matthews_correlation"] == pytest.approx(
        100 * 12 / np.sqrt(24 * 22)
    )
    # A class that was never predicted counts with 0, as long as it is asked for.
    assert metrics.f1_macro(["a", "b"], ["a", "a"], classes=("a", "b", "c"))["f1_macro"] == pytest.approx(100 * (2 / 3) / 3)


def test_spearman_ties_by_hand():
    """Ranks 1, 2.5, 2.5, 4 and 1, 2, 3.5, 3.5; less their mean: (−1.5, 0, 0, 1.5) and (−1.5, −0.5, 1, 1), of norm √4.5 both."""
    assert metrics.spearman([1, 2, 2, 5], [0, 3, 9, 9])["spearman"] == pytest.approx(100 * (2.25 + 1.5) / 4.5)


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
    for metric in (
        metrics.accuracy,
        metrics.f1,
        metrics.f1_macro,
        metrics.matthews_correlation,
        metrics.pearson,
        metrics.spearman,
    ):
        assert list(metric([], []).values()) == [0.0]
    for metric in (metrics.squad, metrics.record, metrics.multirc, metrics.bleu, metrics.rouge):
        assert set(metric([], []).values()) == {0.0}


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


def test_record_by_hand():
    """Two queries, the first with two right answers and so two copies: the best answer counts, each query once."""
    copies = [metrics.with_answers(text, {"answers": ["New York", "York City"], "id": "1-2"}, True) for text in ("Ann", "Bob")]
    other = metrics.with_answers("Eve Smith", {"answers": ["Eve Smith"], "id": "1-3"}, True)
    scores = metrics.record([*copies, other], ["the City of York", "x", "eve smith."])
    assert scores["em"] == 50.0
    assert scores["f1"] == pytest.approx(100 * (2 * 2 / (3 + 2) + 1) / 2)  # "city of york" against "york city": 2 of 3, 2 of 2
    assert metrics.record([other], [""]) == {"em": 0.0, "f1": 0.0}


def test_only_record_drops_copies():
    """An `id` that was given twice by mistake must not make an example of SQuAD disappear."""
    twice = [metrics.with_answers(text, {"answers": [text], "id": "0"}, True) for text in ("Ann", "Bob")]
    assert metrics.squad(twice, ["Ann", "Eve"]) == {"em": 50.0, "f1": 50.0}
    assert metrics.record(twice, ["Ann", "Eve"]) == {"em": 100.0, "f1": 100.0}


def test_bleu_by_hand():
    """The geometric mean of the shares of 1- to 4-grams that a reference has, each as often as it has them, by length."""
    references = ["the cat sat on a mat", "there is a cat on the mat today"]
    prediction = "the cat sat on the mat"
    found = metrics.bleu([references], [prediction])["bleu"]  # no reference has "the" twice; together they have every bigram
    assert found == pytest.approx(100 * ((5 / 6) * (5 / 5) * (3 / 4) * (1 / 3)) ** 0.25)
    one = metrics.bleu(references[:1], [prediction])["bleu"]  # "on the" and "the mat" are missing
    assert one == pytest.approx(100 * ((5 / 6) * (3 / 5) * (2 / 4) * (1 / 3)) ** 0.25)
    short = metrics.bleu(["a b c d e f g h"], ["a b c d"])["bleu"]
    assert short == pytest.approx(100 * np.exp(1 - 8 / 4))
    assert metrics.bleu(["a b c d"], [""]) == {"bleu": 0.0}


def test_bleu_counts_the_copies_of_an_input_once_and_takes_any_number_of_references():
    many = metrics.with_answers("a b c d", {"answers": ["a b c d", "e f g h i"], "id": "1"}, True)
    assert metrics.bleu([many, many, "x y z v w"], ["a b c d", "nothing", "x y z v w"])["bleu"] == pytest.approx(100)
    assert metrics.bleu([["a b c d"], ["x", "x y z v w"]], ["a b c d", "x y z v w"])["bleu"] == pytest.approx(100)


def test_rouge_by_hand():
    target, prediction = "the cat sat . a dog ran away", "a dog ran . the cat sat"
    scores = metrics.rouge([target], [prediction])
    assert scores["rouge1"] == pytest.approx(100 * 2 * 6 / (6 + 7))  # 6 words of 6 and of 7; punctuation is no word
    assert scores["rouge2"] == pytest.approx(100 * 2 * 4 / (5 + 6))  # the cat, cat sat, a dog, dog ran
    assert scores["rougeLsum"] == pytest.approx(100 * 2 * 6 / (6 + 7))  # as sentences: in another order, all there
    assert metrics.rouge([target.replace(" . ", " ")], [prediction.replace(" . ", " ")])["rougeLsum"] == pytest.approx(
        100 * 2 * 3 / (6 + 7)
    )  # as one sentence: "the cat sat" or "a dog ran", not both
    assert metrics.rouge([target.replace(" . ", "\n")], [prediction.replace(" . ", "\n")]) == pytest.approx(scores)
    assert metrics.rouge([["zebra", target]], [prediction]) == pytest.approx(scores)  # the best of the references
    assert metrics.rouge([target, "x"], [prediction, ""])["rouge1"] == pytest.approx(scores["rouge1"] / 2)
    assert metrics.rouge(["he runs"], ["he running"])["rouge1"] == pytest.approx(50)
    assert metrics.rouge(["he runs"], ["he running"], stemmer=True)["rouge1"] == pytest.approx(100)


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

    partial = functools.partial(metrics.f1, positive="yes")
    for function in (metrics.accuracy, metrics.f1, partial, metrics.squad, metrics.multirc, metrics.bleu, metrics.rouge):
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
    code = "import sys, mpt_jax.metrics; assert not {'tensorflow', 'seqio', 'jax', 'sacrebleu', 'nltk'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
