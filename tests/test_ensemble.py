"""Several prompts of one task as one predictor: votes and means by hand, what cannot matter, and the command."""

import collections
import itertools
import json
import math
import statistics
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from mpt_jax import metrics, setup
from mpt_jax.checkpoint.export_hf import export_hf
from mpt_jax.config import StreamConfig, TaskConfig
from mpt_jax.ensemble import Member, find_ensembles, majority_vote, mean_log_likelihood, summary
from mpt_jax.evaluate import Answered, answer, ensembles, run_evaluate
from mpt_jax.models.t5 import init_params
from mpt_jax.predict import Prediction
from mpt_jax.prompts.files import load_prompts, save_prompts
from mpt_jax.train import run_training

SEEDS = tuple(StreamConfig("tiny_colour", group=n, seed=n) for n in range(3))


def said(*answers: tuple[str, float]) -> list[list[Prediction]]:
    """What m prompts generated for one example, [m][1]."""
    return [[Prediction(text, score, {})] for text, score in answers]


def ranked(*scores: dict[str, float]) -> list[list[Prediction]]:
    """How m prompts ranked the labels of one example, [m][1]."""
    best = [max(sorted(one), key=lambda label: one[label]) for one in scores]
    return [[Prediction(label, one[label], one)] for label, one in zip(best, scores, strict=True)]


@pytest.mark.parametrize(
    "answers, expected",
    [
        ([("yes", -3.0), ("no", -0.1), ("yes", -3.0)], "yes"),  # votes count, however unlikely each is
        ([("yes", -3.0), ("no", -0.1)], "no"),  # as many votes: the higher log-probability
        ([("yes", -1.0), ("no", -0.9), ("yes", -1.0), ("no", -1.2)], "yes"),  # as a sum: -2.0 above -2.1
        ([("yes", -1.0), ("no", -1.0)], "no"),  # and as likely: the first in alphabetical order
        ([("no", -1.0), ("yes", -1.0)], "no"),
        ([("babble", -5.0), ("babble", -5.0), ("yes", -0.1)], "babble"),  # no label, but what most answer
        ([("babble", -0.1), ("no", -0.3), ("yes", -0.2)], "babble"),
        ([("yes", -2.0)], "yes"),  # m = 1
        ([("Ann Lee", -2.0), ("Ann", -0.1), ("Ann Lee", -2.0), ("Lee", -0.1)], "Ann Lee"),  # whole answers, not words
        ([("", -2.0), ("", -2.0), ("yes", -0.1)], ""),
        ([("yes", -math.inf), ("no", -math.inf)], "no"),
    ],
)
def test_vote_by_hand(answers, expected):
    assert majority_vote(said(*answers)) == [expected]


@pytest.mark.parametrize(
    "scores, expected",
    [
        # Two prompts lean towards "no", one is sure of "yes": the vote is "no", the mean "yes".
        ([{"no": -0.6, "yes": -0.8}, {"no": -0.6, "yes": -0.8}, {"no": -5.0, "yes": -0.1}], "yes"),
        ([{"no": -0.6, "yes": -0.8}, {"no": -0.6, "yes": -0.8}, {"no": -0.8, "yes": -0.6}], "no"),
        ([{"no": -1.0, "yes": -2.0}, {"no": -2.0, "yes": -1.0}], "no"),  # equal: the first in alphabetical order
        ([{"yes": -1.0, "no": -2.0}, {"yes": -2.0, "no": -1.0}], "no"),
        ([{"no": -2.0, "yes": -1.0}], "yes"),  # m = 1
    ],
)
def test_mean_log_likelihood_by_hand(scores, expected):
    assert mean_log_likelihood(ranked(*scores)) == [expected]


def test_together_they_are_right_where_each_is_wrong_somewhere():
    targets = ["yes", "no", "yes"]
    singles = [["no", "no", "yes"], ["yes", "yes", "yes"], ["yes", "no", "no"]]
    assert all(metrics.accuracy(targets, texts)["accuracy"] == pytest.approx(200 / 3) for texts in singles)
    predictions = [[Prediction(text, -1.0, {}) for text in texts] for texts in singles]
    assert metrics.accuracy(targets, majority_vote(predictions)) == {"accuracy": 100.0}


def random_rankings(m: int, n: int, rounded: bool) -> list[list[Prediction]]:
    """Of m prompts and n examples, with float32's values as the model gives them, or rounded, with many ties."""
    rng = np.random.default_rng(m * n)
    values = -rng.exponential(2.0, (m, n, 4)).astype(np.float32)
    if rounded:
        values = np.ceil(values).astype(np.float64) / 10  # a sum of tenths depends on their order where each step is rounded
    labels = ("a", "b", "c", "d")
    return [[ranked(dict(zip(labels, row.tolist(), strict=True)))[0][0] for row in rows] for rows in values]


@pytest.mark.parametrize("combine", [majority_vote, mean_log_likelihood])
@pytest.mark.parametrize("rounded", [False, True])
def test_copies_answer_as_one_and_order_does_not_matter(combine, rounded):
    predictions = random_rankings(4, 60, rounded)
    for single, m in itertools.product(predictions, (1, 2, 3, 7)):
        assert combine([single] * m) == [prediction.text for prediction in single]
    answers = {tuple(combine(order)) for order in itertools.permutations(predictions)}
    assert len(answers) == 1
    assert combine([[]] * 3) == []


def test_an_ensemble_differs_in_its_seeds_only():
    few = [StreamConfig("tiny_colour", group=3 + n, seed=n, k_shot=16) for n in range(2)]
    streams = [SEEDS[0], StreamConfig("b", group=1), few[0], SEEDS[1], few[1], StreamConfig("b", group=2, length=2)]
    assert find_ensembles(streams, range(6)) == [[0, 3], [2, 4]]
    assert find_ensembles(streams, [0, 1, 2, 0, 4, 5]) == [[2, 4]]  # the same prompt twice is no ensemble
    assert find_ensembles(SEEDS, [0, 0, 2]) == [[0, 2]]
    assert find_ensembles([], []) == []


def members(validation: list[float | None]) -> list[Member]:
    values = [(80.0, 60.0), (90.0, 70.0), (70.0, 80.0)]
    return [
        Member(n, (accuracy + f1) / 2, {"accuracy": accuracy, "f1": f1}, validation[n]) for n, (accuracy, f1) in enumerate(values)
    ]


def test_summary_by_hand():
    found = summary(members([50.0, 40.0, 60.0]), "test", "validation")
    assert found["prompts"] == [0, 1, 2]
    assert found["average"] == {
        "score": 75.0,
        "std": pytest.approx(math.sqrt(25.0)),  # 70, 80, 75
        "metrics": {"accuracy": 80.0, "f1": 70.0},
        "metrics_std": {"accuracy": pytest.approx(10.0), "f1": pytest.approx(10.0)},
    }
    assert found["best"] == {"prompt": 2, "chosen_on": "validation", "score": 75.0, "metrics": {"accuracy": 70.0, "f1": 80.0}}
    assert summary(members([50.0, 40.0, 60.0]), "test", None)["best"]["chosen_on"] is None


@pytest.mark.parametrize("validation", [[None] * 3, [99.0, None, None]])
def test_without_validation_scores_the_best_is_chosen_on_the_scored_split(validation):
    best = summary(members(validation), "test", "validation")["best"]
    assert (best["prompt"], best["chosen_on"], best["score"]) == (1, "test", 80.0)


def test_of_equally_good_ones_the_first_is_best():
    assert summary(members([50.0, 60.0, 60.0]), "test", "validation")["best"]["prompt"] == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("ensemble"))


@pytest.fixture(scope="module")
def bank(folder):
    """Five prompts that make the T5 of `folder/wild` rank differently, whose weights are so large that they matter to it."""
    wild = jax.tree.map(lambda x: 6 * x, init_params(tiny.CONFIG, jax.random.key(1)))
    export_hf(wild, tiny.CONFIG, folder / "wild", vocabulary=folder / "vocabulary.model")
    prompts = 3 * jax.random.normal(jax.random.key(5), (8, 4, tiny.CONFIG.d_model))
    return np.asarray(prompts)[[0, 2, 3, 0, 7]]


def two_tasks(folder, bank, run: str, order=range(3), **meta):
    """The run of a bank with three prompts of one task and two of another; `order` is that of the three."""
    streams = (*SEEDS, *(StreamConfig("tiny_mood", group=3 + n, seed=n) for n in range(2)))
    meta = {"tasks": [stream.task for stream in streams], "groups": [*range(5)]} | meta
    save_prompts(folder / run / "prompts.safetensors", {"prompt": bank[[*order, 3, 4]]}, meta)
    config = tiny.experiment(folder, run, tasks=("tiny_colour", "tiny_mood"), streams=streams, checkpoint=str(folder / "wild"))
    return tiny.replace(config, decode={"method": "rank"})


def test_command_tells_ensembles(folder, bank, capsys):
    """Ranked one prompt and one example at a time, then voted here: the same answers, scores, file and lines."""
    config = two_tasks(folder, bank, "both", scores=[10.0, 30.0, 20.0, None, None], selection_split="train")
    result = run_evaluate(config)
    printed = capsys.readouterr().out
    assert json.loads((folder / "both" / "evaluation_validation.json").read_text()) == result
    trained = setup.open_trained(config, setup.mesh_of(config))
    vocabulary = setup.open_vocabulary(config, trained.backbone)
    source = (trained.backbone, trained.prompt_module, trained.trainable)
    for one, prompts, task in zip(result["ensembles"], ([0, 1, 2], [3, 4]), ("tiny_colour", "tiny_mood"), strict=True):
        [cache] = setup.open_caches(config, [task], "validation", vocabulary)
        labels = setup.open_labels(config, [task], vocabulary)
        common = {"vocabulary": vocabulary, "lengths": tiny.LENGTHS, "decode": config.decode, "labels": labels}
        alone = [answer(*source, [cache], prompt_ids=[prompt], **common)[0].predictions for prompt in prompts]
        right = collections.Counter()
        accuracies = [100 * np.mean([p.text == cache.target_text(i) for i, p in enumerate(predictions)]) for predictions in alone]
        for i, votes in enumerate(zip(*alone, strict=True)):
            counts, sums = collections.Counter(vote.text for vote in votes), collections.Counter()
            for vote in votes:
                sums[vote.text] += vote.score
            voted = max(counts, key=lambda text: (counts[text], sums[text]))
            likeliest = max(votes[0].scores, key=lambda label: np.mean([vote.scores[label] for vote in votes]))
            right["majority_vote"] += voted == cache.target_text(i)
            right["mean_log_likelihood"] += likeliest == cache.target_text(i)
        assert (one["task"], one["prompts"], one["examples"]) == (task, prompts, len(cache))
        for name in ("majority_vote", "mean_log_likelihood"):
            assert one[name]["score"] == one[name]["metrics"]["accuracy"] == pytest.approx(100 * right[name] / len(cache))
        assert one["average"]["score"] == pytest.approx(statistics.mean(accuracies))
        assert one["average"]["std"] == pytest.approx(statistics.stdev(accuracies)) and one["average"]["std"] > 0
        chosen = 1 if task == "tiny_colour" else int(np.argmax(accuracies))
        assert one["best"]["score"] == pytest.approx(accuracies[chosen])
        assert f"  majority vote                 accuracy {one['majority_vote']['score']:.2f}" in printed
        assert f"accuracy {statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}" in printed
    assert [one["best"]["chosen_on"] for one in result["ensembles"]] == ["train", "validation"]
    assert "(chosen on 'train')" in printed and "(chosen on 'validation' itself, which flatters it)" in printed
    mean = np.mean([one["mean_log_likelihood"]["score"] for one in result["ensembles"]])
    assert printed.splitlines()[-1].split() == ["mean", "log-likelihood", f"{mean:.2f}"]


def test_order_of_the_bank_does_not_matter_to_the_command(folder, bank):
    first, other = (run_evaluate(two_tasks(folder, bank, name, order)) for name, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])))
    scores = [[row["score"] for row in result["tasks"]] for result in (first, other)]
    assert scores[0] != scores[1] and sorted(scores[0]) == sorted(scores[1])
    for one, two in zip(first["ensembles"], other["ensembles"], strict=True):
        assert all(two[name] == one[name] for name in ("majority_vote", "mean_log_likelihood"))
        assert two["average"]["score"] == pytest.approx(one["average"]["score"])
        assert two["best"]["score"] == one["best"]["score"]


def test_copies_of_a_prompt_score_as_it(folder, bank):
    one = run_evaluate(two_tasks(folder, bank, "copies", order=[1, 1, 1]))["ensembles"][0]
    assert one["average"]["std"] == 0.0
    for name in ("best", "majority_vote", "mean_log_likelihood"):
        assert one[name]["metrics"] == one["average"]["metrics"]


def test_one_prompt_is_no_ensemble(folder, bank, capsys):
    config = two_tasks(folder, bank, "single")
    streams = (SEEDS[0], StreamConfig("tiny_mood", group=1))
    single = tiny.experiment(folder, "single", tasks=("tiny_colour", "tiny_mood"), streams=streams)
    assert run_evaluate(single)["ensembles"] == [] and "ensemble" not in capsys.readouterr().out
    # Streams of one group share a plain prompt.
    shared = {"tasks": ["tiny_colour"] * 2, "groups": [0, 0]}
    save_prompts(folder / "shared" / "prompts.safetensors", {"prompt": bank[:1]}, shared)
    streams = tuple(StreamConfig("tiny_colour", seed=seed) for seed in range(2))
    assert run_evaluate(tiny.experiment(folder, "shared", streams=streams))["ensembles"] == []
    assert len(run_evaluate(config)["ensembles"]) == 2


def test_whole_answers_are_voted_and_scored_by_the_task_s_own_metrics(folder):
    """Questions: no label set, two metrics, and answers of several words."""
    rows = [{"question": "who wrote it", "answer": "Ann Lee"}, {"question": "and when", "answer": "in May"}]
    (folder / "questions").mkdir()
    for split in ("train", "validation", "test"):
        (folder / "questions" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TaskConfig("{question}", target="answer", metrics=("squad",), folder=str(folder / "questions"))
    config = tiny.replace(
        tiny.experiment(folder, "x", tasks=("questions",)), data={"own_tasks": {"questions": task}, "task_modules": ("tasks",)}
    )
    vocabulary = setup.open_vocabulary(config, setup.open_backbone(config, setup.mesh_of(config)))
    [cache] = setup.open_caches(config, ["questions"], "validation", vocabulary)
    texts = [("Ann Lee", "in May"), ("Ann", "in June"), ("Ann Lee", "June")]  # of which the last is the likeliest
    answered = [
        Answered(cache, np.arange(2), [Prediction(text, n - 9.0, {}) for text in pair], None) for n, pair in enumerate(texts)
    ]
    scored = [{"prompt": n, "metrics": one.score(), "score": 0.0} for n, one in enumerate(answered)]
    streams = [StreamConfig("questions", group=n, seed=n) for n in range(3)]
    meta = {"method": "plain", "groups": [0, 1, 2], "scores": [None] * 3}
    [found] = ensembles(streams, answered, scored, meta, "validation")
    assert found["majority_vote"] == {"score": 50.0, "metrics": {"em": 50.0, "f1": 50.0}}  # "Ann Lee" and "June"
    assert found["average"]["metrics"] == pytest.approx({"em": 50.0, "f1": 100 * (2 + 2 / 3 + 1 / 2 + 1) / 6})
    assert "mean_log_likelihood" not in found


def test_a_trained_bank_says_where_its_best_was_chosen(folder, capsys):
    """The split that training validated on stays known, whichever is scored later."""
    config = tiny.experiment(folder, "trained", streams=SEEDS, steps=2, batch_size=12, train={"eval_period": 1})
    run_training(config)
    meta = load_prompts(folder / "trained")[1]
    assert meta["selection_split"] == "validation"
    [flattered] = run_evaluate(config)["ensembles"]
    assert flattered["best"]["chosen_on"] == "validation" and "which flatters it" in capsys.readouterr().out
    [other] = run_evaluate(tiny.replace(config, data={"eval_split": "train"}))["ensembles"]
    assert other["best"] | {"score": 0, "metrics": 0} == flattered["best"] | {"score": 0, "metrics": 0}
    assert "(chosen on 'validation')" in capsys.readouterr().out
    assert other["best"]["prompt"] == int(np.argmax(meta["scores"]))
