"""Scores are the tasks' own, on the same examples every time, of generated texts and of ranked labels."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from mpt_jax import setup
from mpt_jax.config import DecodeConfig, StreamConfig
from mpt_jax.errors import UserError
from mpt_jax.evaluate import evaluate, examined, main_score, run_evaluate
from mpt_jax.predict import predict_tokens, rank_labels
from mpt_jax.prompts import build_prompt
from mpt_jax.prompts.files import load_prompts, save_prompts

LENGTHS = {"inputs": 128, "targets": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def backbone(folder):
    config = tiny.experiment(folder, "x")
    return setup.open_backbone(config, setup.mesh_of(config))


@pytest.fixture(scope="module")
def bank():
    """Three prompts that make the tiny T5 say different things, and their module."""
    prompts = 3 * jax.random.normal(jax.random.key(5), (3, 4, tiny.CONFIG.d_model))
    return build_prompt(tiny.experiment(Path(), "x").prompt, (0, 1, 2), tiny.CONFIG.d_model), {"prompt": prompts}


class Answers:
    """Reads an untrained model's babble as one of the tasks' answers, so that scores are neither 0 nor 100."""

    def decode(self, tokens):
        return ("red", "yes", "cat", "blue", "no", "dog")[sum(tokens) % 6]


def test_scores_are_the_tasks_own(folder, backbone, bank):
    """Each stream's metric, computed here from its own predictions one stream at a time; prompts chosen by `prompt_ids`."""
    module, trainable = bank
    config = tiny.experiment(folder, "x")
    caches = setup.open_caches(config, tiny.TASKS, "validation", setup.open_vocabulary(config, backbone))
    decode = DecodeConfig(batch_size=16)

    def expected(cache, prompt, rows):
        inputs = [cache.inputs(int(i)) for i in rows]
        parts = (backbone, module, trainable, inputs, [prompt] * len(rows))
        tokens = predict_tokens(*parts, lengths=tiny.LENGTHS, decode=decode).tokens
        texts = [Answers().decode(one.tolist()) for one in tokens]
        right = [text == cache.target_text(int(i)) for i, text in zip(rows, texts, strict=True)]
        return {"accuracy": 100 * np.mean(right), "invalid": 100 * np.mean([text not in cache.labels for text in texts])}

    common = {"vocabulary": Answers(), "lengths": tiny.LENGTHS, "decode": decode}
    found = {}
    for prompts in ([0, 1, 2], [2, 0, 1]):
        metrics = evaluate(backbone, module, trainable, caches, prompt_ids=prompts, **common)
        found[tuple(prompts)] = [one["accuracy"] for one in metrics]
        for one, cache, prompt in zip(metrics, caches, prompts, strict=True):
            assert one == pytest.approx(expected(cache, prompt, range(len(cache))))
        assert 0 < np.mean([one["invalid"] for one in metrics]) < 100
    assert found[0, 1, 2] != found[2, 0, 1] and 0 < np.mean(list(found.values())) < 100
    part = evaluate(backbone, module, trainable, caches[:1], **common, max_examples=7)  # against its own targets
    assert part[0] == pytest.approx(expected(caches[0], 0, examined(len(caches[0]), 7)))


def test_draws_are_an_example_s_own(folder, backbone, bank):
    """Whatever other tasks are evaluated with it."""
    config = tiny.experiment(folder, "x")
    caches = setup.open_caches(config, tiny.TASKS, "validation", setup.open_vocabulary(config, backbone))
    decode = DecodeConfig(batch_size=16, temperature=1.0)
    common = {"vocabulary": Answers(), "lengths": tiny.LENGTHS, "decode": decode}
    together = evaluate(backbone, *bank, caches, **common)
    assert together[1:] == [evaluate(backbone, *bank, caches[n : n + 1], prompt_ids=[n], **common)[0] for n in (1, 2)]
    assert together != evaluate(backbone, *bank, caches, **common | {"decode": DecodeConfig(temperature=1.0, seed=1)})


def test_ranked_labels_are_those_of_the_training_split(folder, backbone, bank):
    """Two tasks with 3 and 2 labels at once; each stream's accuracy from its labels' scores, one stream at a time."""
    module, trainable = bank
    config = tiny.replace(tiny.experiment(folder, "x", tasks=tiny.TASKS), decode={"method": "rank"})
    vocabulary = setup.open_vocabulary(config, backbone)
    caches = setup.open_caches(config, tiny.TASKS, "validation", vocabulary)
    labels = setup.open_labels(config, tiny.TASKS, vocabulary)
    assert [label_set.texts for label_set in labels] == [("blue", "green", "red"), ("no", "yes"), ("bird", "cat", "dog")]
    assert setup.open_labels(tiny.experiment(folder, "x"), ["tiny_free"], vocabulary) is None  # nothing is to be ranked
    common = {"lengths": tiny.LENGTHS, "decode": config.decode}
    expected = []
    for number, (cache, label_set) in enumerate(zip(caches, labels, strict=True)):
        inputs = [cache.inputs(i) for i in range(len(cache))]
        scores = rank_labels(backbone, module, trainable, inputs, [number] * len(inputs), [label_set] * len(inputs), **common)
        right = [label_set.texts[int(np.argmax(row))] == cache.target_text(i) for i, row in enumerate(scores)]
        expected.append(100 * np.mean(right))
    assert 0 < np.mean(expected) < 100
    found = evaluate(backbone, module, trainable, caches, vocabulary=vocabulary, labels=labels, **common)
    np.testing.assert_allclose([one["accuracy"] for one in found], expected)
    assert [one["invalid"] for one in found] == [0.0] * 3
    with pytest.raises(ValueError, match="needs the labels"):
        evaluate(backbone, module, trainable, caches, vocabulary=vocabulary, **common)


def test_examined_rows_are_a_fixed_random_part():
    assert examined(10, 0).tolist() == list(range(10)) == examined(10, 99).tolist()
    rows, more = examined(1000, 200), examined(1000, 300)
    assert set(rows.tolist()) < set(more.tolist()) and len(set(more.tolist())) == 300
    np.testing.assert_array_equal(rows, examined(1000, 200))
    for period in (2, 3):  # labels that alternate are met in proportion
        assert abs((rows % period == 0).mean() - 1 / period) < 0.1


def test_main_score_is_the_mean():
    assert main_score({"accuracy": 80.0, "f1": 60.0}) == 70.0 == main_score({"accuracy": 80.0, "f1": 60.0, "invalid": 100.0})
    assert np.isnan(main_score({}))


def test_command_scores_what_the_folder_holds(folder, backbone, bank, capsys):
    """From a prompt file: one prompt per task, found by name; the result is printed, written and returned."""
    prompts = np.asarray(bank[1]["prompt"])
    meta = {"tasks": list(tiny.TASKS[::-1]), "groups": [0, 1, 2], "backbone": backbone.fingerprint}
    save_prompts(folder / "served" / "prompts.safetensors", {"prompt": prompts}, meta)
    config = tiny.replace(tiny.experiment(folder, "served", tasks=tiny.TASKS[:2]), train={"max_eval_examples": 10})
    result = run_evaluate(config)
    assert [(row["task"], row["prompt"], row["examples"]) for row in result["tasks"]] == [
        ("tiny_colour", 2, 10),
        ("tiny_mood", 1, 10),
    ]
    assert json.loads((folder / "served" / "evaluation_validation.json").read_text()) == result
    assert capsys.readouterr().out.splitlines()[-1] == f"mean  {result['score']:.2f}"
    vocabulary = setup.open_vocabulary(config, backbone)
    caches = setup.open_caches(config, tiny.TASKS[:2], "validation", vocabulary)
    direct = evaluate(
        backbone,
        *bank,
        caches,
        vocabulary=vocabulary,
        lengths=tiny.LENGTHS,
        decode=config.decode,
        max_examples=10,
        prompt_ids=[2, 1],
    )
    assert [row["metrics"] for row in result["tasks"]] == direct


def test_command_tells_prompts_of_several_lengths_apart(folder, backbone, bank, capsys):
    prompts = np.asarray(bank[1]["prompt"])[:2].copy()
    longest = prompts.shape[1]
    prompts[1, :-2] = 0
    meta = {"tasks": ["tiny_mood"] * 2, "groups": [0, 1], "lengths": [longest, 2], "backbone": backbone.fingerprint}
    save_prompts(folder / "lengths" / "prompts.safetensors", {"prompt": prompts}, meta)
    streams = tuple(StreamConfig("tiny_mood", group=n, seed=n) for n in range(2))
    config = tiny.experiment(folder, "lengths", tasks=("tiny_mood",), streams=streams, train={"max_eval_examples": 4})
    result = run_evaluate(config)
    assert [row["length"] for row in result["tasks"]] == [longest, 2]
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"tiny_mood, prompt 0, {longest} tokens  ")
    assert second.startswith("tiny_mood, prompt 1, 2 tokens  ")


@pytest.mark.parametrize("scores, best", [([1.0, 7.0, None, 3.0], 1), ([None] * 4, 0)])
def test_of_several_seeds_the_best_serves_a_task(tmp_path, scores, best):
    """The same one that PATH#TASK chooses; a bank that is asked for all its prompts gives them one by one."""
    tasks = ["tiny_mood", "tiny_mood", "tiny_colour", "tiny_mood"]
    prompts = np.random.default_rng(0).standard_normal((4, 3, 8)).astype(np.float32)
    path = tmp_path / "prompts.safetensors"
    save_prompts(path, {"prompt": prompts}, {"tasks": tasks, "groups": [0, 1, 2, 3], "scores": scores})
    meta = load_prompts(path)[1]
    assert setup.match_tasks(["tiny_colour", "tiny_mood"], meta, "x") == [2, best]
    np.testing.assert_array_equal(load_prompts(f"{path}#tiny_mood")[0]["prompt"][0], prompts[best])
    assert setup.match_tasks(tasks, meta, "x") == [0, 1, 2, 3]


def test_command_ranks(folder, backbone, bank):
    """A task that no label set can be found for is named, and what is drawn stays the same from call to call."""
    prompts = {"prompt": np.asarray(bank[1]["prompt"][:2])}
    meta = {"tasks": ["tiny_colour", "tiny_free"], "groups": [0, 1], "backbone": backbone.fingerprint}
    save_prompts(folder / "ranked" / "prompts.safetensors", prompts, meta)
    config = tiny.replace(tiny.experiment(folder, "ranked"), decode={"method": "rank"})
    vocabulary = setup.open_vocabulary(config, backbone)
    caches = setup.open_caches(config, ["tiny_colour"], "validation", vocabulary)
    common = {"vocabulary": vocabulary, "lengths": tiny.LENGTHS, "decode": config.decode}
    labels = setup.open_labels(config, ["tiny_colour"], vocabulary)
    [direct] = evaluate(backbone, *bank, caches, labels=labels, **common)
    assert run_evaluate(config)["tasks"][0]["metrics"] == direct
    both = tiny.experiment(folder, "ranked", tasks=("tiny_colour", "tiny_free"))
    with pytest.raises(UserError, match=r"Task 'tiny_free' has no label set to rank: its 18 targets of the split 'train'"):
        run_evaluate(tiny.replace(both, decode={"method": "rank"}))
    run_evaluate(both)
    drawn = tiny.replace(both, decode={"temperature": 1.0, "batch_size": 7})
    written = run_evaluate(drawn)["decode"]
    assert DecodeConfig(**written, batch_size=7) == drawn.decode and "batch_size" not in written
    assert run_evaluate(drawn) == run_evaluate(tiny.replace(drawn, decode={"batch_size": 16}))


def test_command_mistakes(folder, backbone, bank):
    with pytest.raises(UserError, match=r"has no prompts\.safetensors; train into it first"):
        run_evaluate(tiny.experiment(folder, "empty"))
    prompts = {"prompt": np.asarray(bank[1]["prompt"][:2])}
    meta = {"tasks": list(tiny.TASKS[:2]), "groups": [0, 1], "backbone": "0" * 16}
    save_prompts(folder / "foreign" / "prompts.safetensors", prompts, meta)
    with pytest.raises(UserError, match=r"trained on the backbone 0{16} but this one is \w+"):
        run_evaluate(tiny.experiment(folder, "foreign"))
    save_prompts(folder / "two" / "prompts.safetensors", prompts, meta | {"backbone": backbone.fingerprint})
    with pytest.raises(UserError, match=r"no prompt for task 'tiny_animal'; it has tiny_colour, tiny_mood\."):
        run_evaluate(tiny.experiment(folder, "two", tasks=("tiny_animal",)))
    with pytest.raises(UserError, match=r"has 4 tokens but PromptConfig\.max_length is 3"):
        run_evaluate(tiny.experiment(folder, "two", prompt={"length": 3, "max_length": 3}))


def test_a_prompt_of_another_task_is_told(folder, caplog):
    prompt = {"prompt": np.zeros((1, 4, tiny.CONFIG.d_model), np.float32)}
    path = save_prompts(folder / "other" / "prompts.safetensors", prompt, {"tasks": ["tiny_mood"]})
    for task, told in (("tiny_mood", False), ("tiny_colour", True)):
        caplog.clear()
        run_evaluate(tiny.experiment(folder, "other", tasks=(task,), train={"max_eval_examples": 2}))
        assert (f"{path} was not trained on '{task}', only on 'tiny_mood'" in caplog.text) == told
