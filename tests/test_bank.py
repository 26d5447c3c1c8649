"""A bank of prompts is its prompts trained one by one: same examples, same start, same updates; who is absent does not move."""

from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from mpt_jax import setup
from mpt_jax.config import StreamConfig
from mpt_jax.prompts import build_prompt
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
