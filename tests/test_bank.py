"""A bank of prompts is its prompts trained one by one: same examples, same start, same updates; who is absent does not move."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from mpt_jax import setup
from mpt_jax.checkpoint.backbone import find_vocabulary
from mpt_jax.config import StreamConfig
from mpt_jax.data.vocabulary import load_vocabulary
from mpt_jax.errors import UserError
from mpt_jax.predict import predict_tokens
from mpt_jax.prompts import build_prompt
from mpt_jax.prompts.base import has_tokens
from mpt_jax.prompts.files import choose_stream, load_prompts
from mpt_jax.train import run_training
from mpt_jax.train_state import create_state, make_train_step

ADAMW = {"name": "adamw", "clip_norm": 0.5, "schedule": "linear", "warmup_steps": 2}
OPTIMIZERS = {"adafactor": {"clip_norm": 0.5}, "adamw": ADAMW}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("bank"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_plain_bank_equals_separate_runs(folder, name):
    """Three tasks with different k and seeds, together and alone."""
    streams = [StreamConfig("tiny_colour", 0), StreamConfig("tiny_mood", 1, 4, 1), StreamConfig("tiny_animal", 2, 2, 2)]
    settings = {"steps": 5, "optimizer": {"rules": ((".*", 0.3),)} | OPTIMIZERS[name], "train": {"log_period": 1}}
    together = run_training(tiny.experiment(folder, f"together_{name}", streams=tuple(streams), batch_size=12, **settings))
    for n, stream in enumerate(streams):
        alone = StreamConfig(stream.task, 0, stream.k_shot, stream.seed)
        result = run_training(tiny.experiment(folder, f"alone_{name}_{n}", streams=(alone,), batch_size=4, **settings))
        np.testing.assert_allclose(together.params["prompt"][n], result.params["prompt"][0], rtol=1e-4, atol=1e-5)
        losses = [record["losses"][n] for record in together.history]
        np.testing.assert_allclose(losses, [record["loss"] for record in result.history], rtol=1e-4)


def test_mpt_bank_equals_separate_runs(folder):
    """Two groups of two streams, each with its own P*, together and alone, with clipping."""
    settings = {"method": "mpt", "steps": 4, "optimizer": ADAMW | {"rules": (("shared", 0.3), ("task_.*", 0.1))}}
    tasks = ("tiny_colour", "tiny_mood", "tiny_animal", "tiny_colour")
    streams = tuple(StreamConfig(task, n // 2, seed=n // 2) for n, task in enumerate(tasks))
    together = run_training(tiny.experiment(folder, "mpt_together", streams=streams, batch_size=16, **settings)).params
    for group in range(2):
        alone = tuple(StreamConfig(stream.task, 0, seed=stream.seed) for stream in streams[2 * group : 2 * group + 2])
        result = run_training(tiny.experiment(folder, f"mpt_alone_{group}", streams=alone, batch_size=8, **settings)).params
        np.testing.assert_allclose(together["shared"][group], result["shared"][0], rtol=1e-4, atol=1e-5)
        for name in ("task_u", "task_v"):
            np.testing.assert_allclose(together[name][2 * group : 2 * group + 2], result[name], rtol=1e-4, atol=1e-5)


MIXED = (
    StreamConfig("tiny_mood", 0, length=2, init="labels", rate_factor=0.1),
    StreamConfig("tiny_mood", 1, length=3, init="uniform"),
    StreamConfig("tiny_colour", 2, seed=5, rate_factor=3.0),
)


@pytest.mark.parametrize("method", ["plain", "mpt"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bank_of_different_prompts_equals_separate_runs(folder, name, method):
    """Shorter prompts beside longer ones, other starts and other rates: each is what a run with its own values trains.

    Normal factors: from ones, all of u would take the same step, and its mean over masked tokens, too, would not show.
    """
    labels, rate = ("good", "bad"), 0.03
    optimizer = OPTIMIZERS[name] | {"weight_decay": 1e-3}
    common = {"method": method, "steps": 5, "train": {"log_period": 1}}
    prompt = {"factor_init": "normal", "factor_scale": 0.5, "init_labels": labels}
    run = f"mixed_{name}_{method}"
    rules = {"rules": ((".*", rate),)}
    config = tiny.experiment(folder, run, streams=MIXED, batch_size=12, prompt=prompt, optimizer=optimizer | rules, **common)
    together = run_training(config)
    params, meta = load_prompts(together.path)
    for n, stream in enumerate(MIXED):
        length = stream.length or config.prompt.length
        own = prompt | {"length": length, "init": stream.init or config.prompt.init}
        alone = (StreamConfig(stream.task, seed=stream.seed),)
        rules = {"rules": ((".*", rate * stream.rate_factor),)}
        result = run_training(
            tiny.experiment(folder, f"{run}_{n}", streams=alone, batch_size=4, prompt=own, optimizer=optimizer | rules, **common)
        )
        chosen, its_meta = choose_stream(params, meta, n)
        assert its_meta["length"] == length
        for path, value in result.params.items():
            np.testing.assert_allclose(chosen[path], value, rtol=1e-4, atol=1e-5, err_msg=path)
            if has_tokens(path):
                np.testing.assert_array_equal(params[path][n, : config.prompt.length - length], 0.0)
        losses = [record["losses"][n] for record in together.history]
        np.testing.assert_allclose(losses, [record["loss"] for record in result.history], rtol=1e-4)


def test_a_shorter_prompt_of_a_bank_is_evaluated_and_started_from_as_alone(folder):
    """Its predictions, by its place in the bank and alone, and what a run that starts from PATH#TASK or PATH#* trains first."""
    streams = (StreamConfig("tiny_mood", 0, length=2), StreamConfig("tiny_colour", 1))
    config = tiny.experiment(folder, "mixed_source", streams=streams)
    path = run_training(config).path
    mesh = setup.mesh_of(config)
    bank = setup.open_trained(config, mesh)
    single = tiny.experiment(folder, "none", prompt={"length": 2, "init": "file", "init_file": f"{path}#tiny_mood"})
    alone = setup.open_trained(single, mesh)
    assert alone.trainable["prompt"].shape == (1, 2, tiny.CONFIG.d_model)
    inputs = [np.array([5, 6, 7, 1]), np.array([9, 1])]
    common = {"lengths": tiny.LENGTHS, "decode": config.decode}
    outputs = [predict_tokens(one.backbone, one.prompt_module, one.trainable, inputs, [0, 0], **common) for one in (bank, alone)]
    np.testing.assert_array_equal(outputs[0].tokens, outputs[1].tokens)
    np.testing.assert_allclose(outputs[0].scores, outputs[1].scores, rtol=1e-5)
    params, _ = load_prompts(path)
    whole = tiny.experiment(folder, "again", streams=streams, prompt={"init": "file", "init_file": f"{path}#*"})
    first = setup.initial_trainable(whole, setup.find_streams(whole), bank.backbone, setup.open_vocabulary(whole, bank.backbone))
    np.testing.assert_array_equal(first["prompt"], params["prompt"])
    wrong = tiny.replace(whole, data={"streams": tuple(StreamConfig(stream.task, stream.group) for stream in streams)})
    found, vocabulary = setup.find_streams(wrong), setup.open_vocabulary(wrong, bank.backbone)
    with pytest.raises(UserError, match=r"whose prompts have \[2, 4\] tokens, but this run's have \[4, 4\]"):
        setup.initial_trainable(wrong, found, bank.backbone, vocabulary)


def test_class_labels_are_those_of_each_prompts_own_task_unless_given(folder):
    """The mean embedding of each label's pieces, label by label, as "labels" starts from when they are given."""
    streams = (
        StreamConfig("tiny_mood", 0, init="labels"),
        StreamConfig("tiny_animal", 1, init="labels"),
        StreamConfig("tiny_mood", 2),
    )
    config = tiny.experiment(folder, "labels", streams=streams)
    mesh = setup.mesh_of(config)
    backbone = setup.open_backbone(config, mesh)
    vocabulary = setup.open_vocabulary(config, backbone)
    start = setup.initial_trainable(config, setup.find_streams(config), backbone, vocabulary)["prompt"]
    embedding = np.asarray(backbone.params["token_embedder"]["embedding"])
    caches = setup.open_caches(config, ["tiny_mood", "tiny_animal"], "train", vocabulary)
    for group, cache in enumerate(caches):
        for place, text in enumerate(cache.label_set.texts[: config.prompt.length]):
            np.testing.assert_allclose(start[group, place], embedding[vocabulary.encode(text)].mean(axis=0), rtol=1e-6)
    assert caches[0].label_set.texts != caches[1].label_set.texts


def test_words_are_given_to_a_task_without_class_labels_and_only_to_it(folder):
    """ReCoRD and WSC among SuperGLUE's tasks: what stands for their labels is the task's own, and others keep theirs."""
    words = ("red", "good")
    streams = (StreamConfig("tiny_free", 0), StreamConfig("tiny_mood", 1), StreamConfig("tiny_free", 2, length=1))
    prompt = {"init": "labels", "init_labels_of": {"tiny_free": words}}
    config = tiny.experiment(folder, "words", streams=streams, batch_size=6, prompt=prompt)
    vocabulary = load_vocabulary(find_vocabulary(config.backbone))
    assert setup.init_labels(config, setup.find_streams(config), vocabulary) == [words, ("no", "yes"), words]
    both = tiny.replace(config, prompt={"init_labels": ("blue",)})
    assert setup.init_labels(both, setup.find_streams(both), vocabulary) == [words, ("blue",), words]
    shared = tiny.replace(config, data={"streams": tuple(dataclasses.replace(one, group=0, length=0) for one in streams)})
    assert setup.init_labels(shared, setup.find_streams(shared), vocabulary) == [(*words, "no", "yes")]
    without = tiny.replace(config, prompt={"init_labels_of": {}})
    with pytest.raises(UserError, match=r"'tiny_free' has no class labels .*init_labels_of\['tiny_free'\]") as error:
        run_training(without)
    assert "rank" not in str(error.value) and "DecodeConfig" not in str(error.value)
    result = run_training(tiny.replace(config, train={"steps": 1}))
    assert load_prompts(result.path)[1]["lengths"] == [4, 4, 1]


def test_a_group_is_trained_no_more_when_its_score_has_not_risen_for_patience(folder):
    """It stays what it then was while the others go on; the run ends with the last, at once when it is called again."""
    streams = tuple(StreamConfig(task, n) for n, task in enumerate(tiny.TASKS))
    train = {"eval_period": 1, "max_eval_examples": 4, "patience": 2, "log_period": 1, "checkpoint_period": 1}
    config = tiny.experiment(folder, "patience", streams=streams, batch_size=12, steps=30, train=train)
    config = tiny.replace(config, decode={"method": "rank"})  # a T5 that was never trained generates no label
    result = run_training(config)
    validations = [record for record in result.history if record["kind"] == "validation"]
    scores = np.asarray([record["scores"] for record in validations])
    ends = []
    for group in range(3):
        step, stale, best = 0, 0, -np.inf
        while stale < 2:
            score, step = scores[step, group], step + 1
            stale, best = (0, score) if score > best else (stale + 1, best)
        ends.append(step)
        np.testing.assert_array_equal(scores[step:, group], scores[step - 1, group])
    losses = np.asarray([[np.nan if x is None else x for x in r["losses"]] for r in result.history if r["kind"] == "train"])
    assert [int(np.isfinite(losses[:, group]).sum()) for group in range(3)] == ends
    assert len(scores) == max(ends) < 30
    assert len(set(ends)) > 1, "choose other rates: all groups stopped together, which proves little"
    again = run_training(config)
    assert again.history == result.history


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"length": 5}, "a stream of 'tiny_mood' with the length 5, but it must be from 1 to PromptConfig.length"),
        ({"rate_factor": 0.0}, "with the rate_factor 0.0; it must be positive"),
        ({"init": "text"}, "PromptConfig.init='text' needs PromptConfig.init_text"),
        ({"init": "file"}, "all of a bank starts from a file or nothing"),
    ],
)
def test_a_stream_that_cannot_be_is_named(folder, changes, sentence):
    config = tiny.experiment(folder, "wrong", streams=(StreamConfig("tiny_mood", **changes),))
    with pytest.raises(UserError, match=sentence):
        config.validate()


def test_what_lengths_of_their_own_cannot_go_with(folder):
    streams = (StreamConfig("tiny_mood", 0, length=2), StreamConfig("tiny_colour", 1))
    config = tiny.experiment(folder, "wrong", streams=streams)
    with pytest.raises(UserError, match=r"scale_by_parameter take means over whole prompts.*\[2\]"):
        tiny.replace(config, optimizer={"factored": True}).validate()
    with pytest.raises(UserError, match=r"packs prompts of one length.*\[2\]"):
        tiny.replace(config, data={"pack_lengths": {"inputs": 64, "targets": 12}}).validate()
    shared = tuple(dataclasses.replace(stream, group=0) for stream in streams)
    with pytest.raises(UserError, match="gives group 0, whose streams share a prompt, several values of length: 2, 0"):
        setup.find_streams(tiny.replace(config, data={"streams": shared}))


@pytest.mark.parametrize("method", ["plain", "mpt"])
def test_absent_streams_do_not_move_and_do_not_age(folder, method):
    """Batches of stream 1 alone: every array of the others, prompt or optimiser, is bit for bit what it was."""
    groups = (0, 1, 2)
    config = tiny.experiment(folder, "absent", method=method, tasks=tiny.TASKS, optimizer={"weight_decay": 0.1})
    mesh = setup.mesh_of(config)
    backbone = setup.open_backbone(config, mesh)
    vocabulary = setup.open_vocabulary(config, backbone)
    streams = setup.Streams(tuple(StreamConfig(task, n) for n, task in enumerate(tiny.TASKS)), (1.0,) * 3)
    start = setup.initial_trainable(config, streams, backbone, vocabulary)
    recipe = (config.optimizer, 10, groups)
    module = build_prompt(config.prompt, groups, tiny.CONFIG.d_model)
    step = make_train_step(backbone.model, module, config.loss, *recipe, mesh)
    state = create_state(start, backbone.model, *recipe, 0, mesh)
    before = jax.device_get(state)
    rng = np.random.default_rng(0)
    for _ in range(2):
        tokens = rng.integers(3, 60, (4, 6)).astype(np.int32)
        batch = {
            "encoder_tokens": tokens,
            "decoder_input_tokens": np.zeros((4, 3), np.int32),
            "decoder_target_tokens": tokens[:, :3],
            "loss_weights": np.ones((4, 3), np.float32),
            "task_ids": np.full(4, 1, np.int32),
        }
        state, _ = step(state, {"backbone": backbone.params}, batch)
    after = jax.device_get(state)
    moved = 0
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path((before.trainable, before.opt_state)),
        jax.tree.leaves((after.trainable, after.opt_state)),
        strict=True,
    ):
        if np.ndim(old) and len(old) == 3:
            np.testing.assert_array_equal(old[[0, 2]], new[[0, 2]], err_msg=jax.tree_util.keystr(path))
            moved += not np.array_equal(old[1], new[1])
    assert moved >= len(before.trainable) + 1
