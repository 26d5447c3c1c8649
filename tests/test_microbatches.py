"""A step in microbatches is the step of the whole batch: losses, gradients, state, and what is found bad."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from caches import random_cache

from mpt_jax import setup
from mpt_jax.config import DataConfig, LossConfig, OptimizerConfig, PromptConfig, T5Config, TrainConfig
from mpt_jax.costs import work_of
from mpt_jax.data.sampling import make_loader, stream_data
from mpt_jax.distill import count_amounts, make_loss
from mpt_jax.errors import UserError
from mpt_jax.models.t5 import T5, init_params
from mpt_jax.partitioning import make_mesh, replicated, split_batch
from mpt_jax.prompts import build_prompt
from mpt_jax.shapes import PACKED_SHAPES
from mpt_jax.train import run_training
from mpt_jax.train_state import accumulate, create_state, make_train_step

B, P, D, V, N = 16, 3, 8, 30, 3
GROUPS = (0, 0, 1)
CONFIG = T5Config(V, D, d_kv=4, num_heads=2, d_ff=16, num_encoder_layers=2, num_decoder_layers=2)
LONGEST = {"inputs": 11, "targets": 4}
LAYOUTS = {"padded": {}, "trimmed": {"trim_lengths": (11, 13)}, "packed": {"pack_lengths": {"inputs": 28, "targets": 8}}}
LOSSES = {
    "sum": LossConfig(z_loss=0.1, label_smoothing=0.1),
    "mean": LossConfig(normalization="mean", z_loss=0.1, label_smoothing=0.1),
    "distilled, mean": LossConfig(normalization="mean", teachers="yes", temperature=2.0),
    "distilled, sum": LossConfig(teachers="yes", hidden_layers="all", z_loss=0.1),
}
CASES = [
    ("plain", "sum", "padded"),
    ("plain", "mean", "trimmed"),
    ("plain", "distilled, sum", "trimmed"),
    ("mpt", "distilled, mean", "packed"),
    ("none", "sum", "trimmed"),
    ("none", "mean", "packed"),
]
# An update that is smooth in the gradient, unlike Adafactor's first, which is nearly its sign.
SMOOTH = OptimizerConfig("adamw", ((".*", 0.1),), eps=1.0, clip_norm=0.5)
MESH = make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """Of each layout, examples of all lengths; one microbatch of four has no target at all where rows are not packed."""
    folder = tmp_path_factory.mktemp("caches")
    streams = [stream_data(random_cache(folder / f"task{n}", f"task{n}", 40, LONGEST, n, V)) for n in range(N)]
    made = {}
    for layout, fields in LAYOUTS.items():
        config = DataConfig("x", {"inputs": 16, "targets": 4}, B, sampling="proportional", **fields)
        batch = make_loader(config, streams, P, row_multiple=4).batch(1)
        batch["loss_weights"][1::4] *= layout == "packed"
        made[layout] = {name: jnp.asarray(array) for name, array in batch.items() if name in PACKED_SHAPES}
    assert len(made["packed"]["task_ids"]) < B
    return made


def module_of(method):
    return None if method == "none" else build_prompt(PromptConfig(method=method, length=P), GROUPS, D)


def start_of(method, params, loss="sum"):
    """(trainable, frozen)"""
    if method == "none":
        return {"backbone": params}, {"backbone": {}}
    rng = np.random.default_rng(0)
    shapes = {
        "plain": {"prompt": (2, P, D)},
        "mpt": {"shared": (2, P, D), "task_u": (N, P, 1), "task_v": (N, 1, D)},
    }[method]
    frozen = {"backbone": params}
    if LOSSES[loss].teachers:
        frozen["teacher"] = jnp.asarray(rng.normal(size=(N, P + 1 if method == "plain" else P, D)), jnp.float32)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}, frozen


def in_parts(loss_fn, method, parts, trainable, frozen, batch, key=None):
    """Gradient and aux as the step has them."""
    places = jax.tree.map(lambda _: replicated(MESH), trainable)
    whole = count_amounts(frozen, batch, module_of(method), GROUPS)
    return accumulate(loss_fn, trainable, frozen, split_batch(batch, parts, MESH), key, whole, places)


def deterministic(loss_fn):
    return lambda trainable, frozen, batch, key, amounts=None: loss_fn(trainable, frozen, batch, None, amounts)


def assert_close(tree, expected, message=""):
    """To 1e-5, of arrays whose elements are sums relative to the largest of them."""
    for (path, want), got in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(tree), strict=True):
        most = float(jnp.abs(want).max())
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * most, err_msg=message + jax.tree_util.keystr(path))


@pytest.mark.parametrize("method, loss, layout", CASES)
def test_losses_and_gradients_are_those_of_the_whole_batch(params, batches, method, loss, layout):
    batch, (trainable, frozen) = batches[layout], start_of(method, params, loss)
    loss_fn = deterministic(make_loss(T5(CONFIG), module_of(method), LOSSES[loss], GROUPS))
    expected = jax.jit(jax.grad(loss_fn, has_aux=True))(trainable, frozen, batch, None)
    assert (expected[1]["loss"] > 0).all() and all(jnp.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(expected[0]))
    for parts in (2, 4):
        got = jax.jit(functools.partial(in_parts, loss_fn, method, parts))(trainable, frozen, batch, jax.random.key(0))
        assert_close(got, expected, f"{parts} parts: ")


@pytest.mark.parametrize("loss", ["mean", "distilled, sum"])
def test_denominators_of_each_part_would_be_wrong(params, batches, loss):
    """What the test above must see: a mean over each part's own tokens or positions."""
    (trainable, frozen), whole = start_of("plain", params, loss), make_loss(T5(CONFIG), module_of("plain"), LOSSES[loss], GROUPS)
    right, wrong = (
        jax.jit(functools.partial(in_parts, loss_fn, "plain", 4))(trainable, frozen, batches["padded"], jax.random.key(0))
        for loss_fn in (deterministic(whole), lambda *arguments: whole(*arguments[:3], None))
    )
    for good, bad in ((right[1]["loss"], wrong[1]["loss"]), (right[0]["prompt"], wrong[0]["prompt"])):
        assert jnp.abs(bad - good).max() > 1e-3 * jnp.abs(good).max()


def step_of(method, loss, parts, architecture=CONFIG):
    groups = GROUPS if method != "none" else (0, 0, 0)
    recipe = (T5(architecture), module_of(method), LOSSES[loss], SMOOTH, 9, groups, MESH)
    return groups, make_train_step(*recipe, num_microbatches=parts)


def take_steps(method, loss, parts, params, batch, steps=2):
    trainable, frozen = start_of(method, params, loss)
    groups, step = step_of(method, loss, parts)
    state = create_state(trainable, T5(CONFIG), SMOOTH, 9, groups, 0, MESH, spike_window=2)
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
    return state, metrics


@pytest.mark.parametrize("method, loss, layout", [("mpt", "distilled, mean", "packed"), ("none", "mean", "trimmed")])
def test_steps_move_the_state_alike(params, batches, method, loss, layout):
    """Prompts or weights, the optimiser's moments, counters, the guard's window, and metrics."""
    expected = take_steps(method, loss, 1, params, batches[layout])
    for parts in (2, 4):
        got = take_steps(method, loss, parts, params, batches[layout])
        assert_close((got[0].replace(key=0), got[1]), (expected[0].replace(key=0), expected[1]), f"{parts} parts: ")


@pytest.mark.parametrize("parts", [1, 4])
def test_a_row_that_is_not_finite_spoils_the_step_of_its_group(params, batches, parts):
    """The word is in one row, of group 1: only that group's prompt stays where it was, whatever the other parts have."""
    batch, word = batches["padded"], 2
    row = int(np.flatnonzero(np.asarray(batch["task_ids"]) == 2)[0])
    tokens = jnp.where(batch["encoder_tokens"] == word, 3, batch["encoder_tokens"]).at[row, 0].set(word)
    embedding = params["token_embedder"]["embedding"].at[word].set(jnp.nan)
    broken = params | {"token_embedder": {"embedding": embedding}}
    weights = jnp.ones_like(batch["loss_weights"])
    state, metrics = take_steps("plain", "mean", parts, broken, batch | {"encoder_tokens": tokens, "loss_weights": weights}, 1)
    before = start_of("plain", params)[0]["prompt"]
    assert metrics["bad"].tolist() == [False, True]
    np.testing.assert_array_equal(state.trainable["prompt"][1], before[1])
    assert jnp.abs(state.trainable["prompt"][0] - before[0]).max() > 1e-4


def test_dropout_of_each_part_is_its_own(params, batches):
    """As a plain loop over the parts has it, with the key of the step and the part's number."""
    batch, (trainable, frozen) = batches["padded"], start_of("plain", params)
    model, key = T5(dataclasses.replace(CONFIG, dropout_rate=0.3)), jax.random.key(5)
    loss_fn = make_loss(model, module_of("plain"), LOSSES["mean"], GROUPS)
    got = jax.jit(functools.partial(in_parts, loss_fn, "plain", 4))(trainable, frozen, batch, key)
    gradient, whole = jax.jit(jax.grad(loss_fn, has_aux=True)), count_amounts(frozen, batch, module_of("plain"), GROUPS)
    parts = [
        gradient(trainable, frozen, {name: leaf[m::4] for name, leaf in batch.items()}, jax.random.fold_in(key, m), whole)
        for m in range(4)
    ]
    assert_close(got, jax.tree.map(lambda *leaves: sum(leaves), *parts))
    alike = [
        gradient(trainable, frozen, {n: leaf[0::4] for n, leaf in batch.items()}, jax.random.fold_in(key, m)) for m in (0, 1)
    ]
    assert not np.allclose(alike[0][0]["prompt"], alike[1][0]["prompt"], rtol=0.01)


def test_gradients_add_up_in_float32():
    """256 + 15 · 1 stays 256 in bfloat16, of which the sum is rounded only once."""
    trainable = {"w": jnp.zeros(1, jnp.bfloat16)}
    batch = {"x": jnp.array([256.0] + [1.0] * 15, jnp.bfloat16), "task_ids": jnp.zeros(16, jnp.int32)}

    def loss_fn(trainable, frozen, rows, key, amounts):
        return (trainable["w"] * rows["x"]).sum(), {}

    places = {"w": replicated(MESH)}
    grads, _ = accumulate(loss_fn, trainable, {}, split_batch(batch, 16, MESH), jax.random.key(0), None, places)
    assert grads["w"].dtype == jnp.bfloat16 and abs(float(grads["w"][0]) - 271) <= 1


def test_rows_go_round_the_microbatches():
    batch = {"x": jnp.arange(12).reshape(6, 2)}
    np.testing.assert_array_equal(split_batch(batch, 3, MESH)["x"][1], batch["x"][1::3])


def loops(jaxpr):
    """How deep loops are nested."""
    depth = 0
    for equation in jaxpr.eqns:
        inner = [value for value in jax.tree.leaves(tuple(equation.params.values())) if hasattr(value, "eqns")]
        depth = max([depth, *(loops(one) + (equation.primitive.name == "scan") for one in inner)])
    return depth


def test_one_microbatch_is_no_loop_and_more_are_one(params, batches):
    """And the work is that of the batch, with the weights read as often as there are parts."""
    trainable, frozen = start_of("plain", params)
    work = {}
    for parts in (1, 4):
        groups, step = step_of("plain", "sum", parts)
        state = create_state(trainable, T5(CONFIG), SMOOTH, 9, groups, 0, MESH)
        traced = step.trace(state, frozen, batches["padded"])
        assert loops(traced.jaxpr.jaxpr) == (1 if parts == 1 else 2)
        work[parts] = work_of(traced)
    assert work[4].flops == pytest.approx(work[1].flops, rel=1e-3)
    assert work[4].weight_bytes == pytest.approx(4 * work[1].weight_bytes, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("microbatches"))


def run(folder, name, steps=6, data=None, **train):
    loss = {"normalization": "mean"}
    optimizer = {"name": "adamw", "rules": ((".*", 0.03),)}
    settings = {"loss": loss, "optimizer": optimizer, "train": {"checkpoint_period": 3, "log_period": 1} | train}
    config = tiny.experiment(folder, name, tasks=tiny.TASKS, steps=steps, batch_size=12, **settings)
    return run_training(tiny.replace(config, data=data or {}))


def test_a_run_in_microbatches_is_the_run_and_may_change_their_number(folder):
    plain = run(folder, "plain")
    run(folder, "changed", steps=3, num_microbatches=2)
    packing = {"pack_lengths": {"inputs": 64, "targets": 24}}
    results = {
        "parts": run(folder, "parts", num_microbatches=4),
        "changed": run(folder, "changed", num_microbatches=6),
        "packed": run(folder, "packed", data=packing, num_microbatches=3),
    }
    for name, result in results.items():
        ours, theirs = ([record["loss"] for record in r.history if record["kind"] == "train"] for r in (result, plain))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, err_msg=name)
        # AdamW's first steps are signs of gradients: a gradient near 0 may step otherwise.
        np.testing.assert_allclose(result.params["prompt"], plain.params["prompt"], rtol=1e-3, atol=1e-3, err_msg=name)


def test_packed_rows_are_a_multiple_of_the_microbatches(folder):
    config = tiny.experiment(folder, "rows", tasks=tiny.TASKS, batch_size=12, train={"num_microbatches": 3})
    config = tiny.replace(config, data={"pack_lengths": {"inputs": 64, "targets": 24}, "pack_rows": (4,)})
    mesh = setup.mesh_of(config)
    backbone = setup.open_backbone(config, mesh)
    loader = setup.make_loader(config, setup.find_streams(config), setup.open_vocabulary(config, backbone), mesh)
    assert loader.packing.row_counts == (6, 12)


def test_mistakes(folder):
    with pytest.raises(
        UserError,
        match=r"\(BATCH_SIZE; of a stage, StageConfig.batch_size times its prompts\) is 12, which cannot be cut into "
        r"TrainConfig.num_microbatches=8 equal parts; choose a multiple of 8, or fewer microbatches",
    ):
        run(folder, "wrong", num_microbatches=8)
    with pytest.raises(UserError, match=r"TrainConfig.num_microbatches must be positive, not 0"):
        TrainConfig(steps=1, model_dir="x", num_microbatches=0).validate()
