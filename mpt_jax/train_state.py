"""What a training step changes, and the step.

The backbone is an argument of the step: it is not differentiated, not donated, and no part of the state. A run that tunes
the whole model has the same step; there, `trainable` is `{"backbone": parameters}` and the frozen side is empty.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mpt_jax.config import LossConfig, OptimizerConfig
from mpt_jax.distill import Amounts, Batch, LossFn, count_amounts, make_loss
from mpt_jax.guard import finite_gradients, judge
from mpt_jax.losses import of_positions, present_streams
from mpt_jax.models.t5 import T5, logical_axes
from mpt_jax.optim import ALIKE, GroupScales, make_optimizer
from mpt_jax.partitioning import replicated, split_batch, tree_sharding
from mpt_jax.prompts.base import number_of_groups

Tree = Any


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes.

    Attributes:
        step: int32, steps taken.
        trainable: a prompt module's parameters, or `{"backbone": parameters}`.
        opt_state: the optimiser's, of the same bank.
        key: uint32 key data; the step's own key is `fold_in(key, step)`, so that nothing needs to be drawn in order.
        recent: [W,G] float32, losses of each group's last steps, by which `guard.judge` finds a spike; NaN where there is none.
    """

    step: jax.Array
    trainable: Tree
    opt_state: Tree
    key: jax.Array
    recent: jax.Array


TrainStep = jax.stages.Wrapped  # (TrainState, Tree, dict[str, jax.Array]) -> (TrainState, dict[str, jax.Array]), compiled


def make_train_step(
    model: T5,
    prompt_module: Any,
    loss_config: LossConfig,
    optimizer_config: OptimizerConfig,
    total_steps: int,
    groups: tuple[int, ...],
    mesh: Mesh,
    spike_factor: float = 0.0,
    num_microbatches: int = 1,
    scales: GroupScales = ALIKE,
) -> TrainStep:
    """The compiled `step(state, frozen, batch) -> (state, metrics)`; `state` is donated, `frozen` is only read.

    A group that `guard.judge` finds bad is left as it is, as if it were absent from the batch.

    Args:
        prompt_module: of `prompts.build_prompt`, or None when the backbone is trained.
        groups: group of each stream.
        spike_factor: see `guard.judge`.
        num_microbatches: parts of a batch that are computed one after the other, see `accumulate`; 1 = none.
        scales: of the groups.
    Returns:
        One function for all runs whose arguments here are equal, so that a second run with equal shapes compiles nothing.
        Its metrics are the loss function's `aux` and `judge`'s: arrays [G] from before the update.
    """
    # A run's path to its teachers and, with a constant rate, its length do not shape the program.
    loss_config = dataclasses.replace(loss_config, teachers="teachers" if loss_config.teachers else "")
    if optimizer_config.schedule == "constant":
        total_steps = 0
    recipe = (optimizer_config, total_steps, groups)
    return _make_train_step(model, prompt_module, loss_config, *recipe, mesh, spike_factor, num_microbatches, scales)


@functools.lru_cache(maxsize=64)
def _make_train_step(
    model: T5,
    prompt_module: Any,
    loss_config: LossConfig,
    optimizer_config: OptimizerConfig,
    total_steps: int,
    groups: tuple[int, ...],
    mesh: Mesh,
    spike_factor: float,
    num_microbatches: int,
    scales: GroupScales,
) -> TrainStep:
    loss_fn = make_loss(model, prompt_module, loss_config, groups)

    def step(state: TrainState, frozen: Tree, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        optimizer = make_optimizer(optimizer_config, total_steps, groups, jax.tree.map(_shape, state.trainable), scales)
        places = state_sharding(state, model, mesh)
        if num_microbatches == 1:
            grads, metrics = jax.grad(loss_fn, has_aux=True)(state.trainable, frozen, batch, key)
        else:
            whole = count_amounts(frozen, batch, prompt_module, groups)
            parts = split_batch(batch, num_microbatches, mesh)
            grads, metrics = accumulate(loss_fn, state.trainable, frozen, parts, key, whole, places.trainable)
        task_ids = of_positions(batch["task_ids"], batch.get("decoder_segments"))
        present = present_streams(task_ids, batch["loss_weights"], len(groups))
        finite = finite_gradients(grads, groups, number_of_groups(groups))
        recent, verdict = judge(metrics, finite, state.recent, loss_config.normalization, spike_factor)
        moving = present & ~verdict["bad"][jnp.asarray(groups)]
        trainable, opt_state = optimizer.update(grads, state.opt_state, state.trainable, moving)
        new = TrainState(state.step + 1, trainable, opt_state, state.key, recent)
        # Leave the state where it came from, or the second step would be compiled anew for its new place.
        # The metrics lie whole on every device, for every process to read them.
        metrics = metrics | verdict
        return jax.lax.with_sharding_constraint((new, metrics), (places, jax.tree.map(lambda _: replicated(mesh), metrics)))

    return jax.jit(step, donate_argnums=0)


def accumulate(
    loss_fn: LossFn, trainable: Tree, frozen: Tree, microbatches: Batch, key: jax.Array, amounts: Amounts, places: Tree
) -> tuple[Tree, dict[str, jax.Array]]:
    """Gradient and aux of a batch whose parts are computed one after the other, so that only one part is in memory at a time.

    But for rounding they are those of the whole batch; with dropout, microbatch m draws its own masks, with `fold_in(key, m)`.

    Args:
        microbatches: of `partitioning.split_batch`.
        amounts: of the whole batch.
        places: where the gradient's leaves lie; between the parts its sum is kept there, in float32.
    """
    gradient = jax.grad(loss_fn, has_aux=True)

    def add(total: Tree, part: tuple[jax.Array, Batch]) -> tuple[Tree, dict[str, jax.Array]]:
        number, rows = part
        grads, aux = gradient(trainable, frozen, rows, jax.random.fold_in(key, number), amounts)
        total = jax.tree.map(lambda before, grad: before + grad.astype(jnp.float32), total, grads)
        return jax.lax.with_sharding_constraint(total, places), aux

    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trainable)
    numbers = jnp.arange(len(microbatches["task_ids"]))
    total, aux = jax.lax.scan(add, jax.lax.with_sharding_constraint(start, places), (numbers, microbatches))
    grads = jax.tree.map(lambda leaf, grad: grad.astype(leaf.dtype), trainable, total)
    return grads, jax.tree.map(lambda parts: parts.sum(axis=0), aux)


def create_state(
    trainable: Tree,
    model: T5,
    optimizer_config: OptimizerConfig,
    total_steps: int,
    groups: tuple[int, ...],
    seed: int,
    mesh: Mesh,
    spike_window: int = 0,
) -> TrainState:
    """The state of step 0, on its devices. `trainable` is copied: a donated state must not take the backbone with it.

    `spike_window` is W, of how many steps the losses are remembered.
    """
    trainable = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), trainable)
    state = _initial_state(trainable, optimizer_config, total_steps, groups, seed, spike_window)
    places = state_sharding(state, model, mesh)
    # Made in its place: of several processes, `device_put` compares what each one gives, and NaN is not equal to NaN.
    recent = jax.jit(lambda: jnp.full(state.recent.shape, jnp.nan, state.recent.dtype), out_shardings=places.recent)()
    placed: TrainState = jax.device_put(state.replace(recent=()), places.replace(recent=()), may_alias=False)
    return placed.replace(recent=recent)


def state_shapes(
    trainable: Tree, model: T5, optimizer_config: OptimizerConfig, total_steps: int, groups: tuple[int, ...], mesh: Mesh
) -> TrainState:
    """What `create_state` would return for a trainable of these shapes, as `jax.ShapeDtypeStruct`s with their places."""
    start = functools.partial(_initial_state, optimizer_config=optimizer_config, total_steps=total_steps, groups=groups, seed=0)
    state = jax.eval_shape(start, trainable)
    return jax.tree.map(place_shape, state, state_sharding(state, model, mesh))


def place_shape(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """The shape of an array that lies as `sharding` says."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _initial_state(
    trainable: Tree,
    optimizer_config: OptimizerConfig,
    total_steps: int,
    groups: tuple[int, ...],
    seed: int,
    spike_window: int = 0,
) -> TrainState:
    optimizer = make_optimizer(optimizer_config, total_steps, groups, jax.tree.map(_shape, trainable))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        opt_state=optimizer.init(trainable),
        key=jax.random.key_data(jax.random.key(seed)),
        recent=jnp.full((spike_window, number_of_groups(groups)), jnp.nan, jnp.float32),
    )


def state_sharding(state: TrainState, model: T5, mesh: Mesh) -> TrainState:
    """The state's place: a prompt's is whole everywhere; a backbone's leaf, and the optimiser's of its shape, by logical axes."""
    whole = replicated(mesh)
    if "backbone" not in state.trainable:
        return jax.tree.map(lambda _: whole, state)
    sharding = tree_sharding(state.trainable["backbone"], logical_axes(model.config), mesh)
    places = dict(jax.tree_util.tree_leaves_with_path(sharding, is_leaf=lambda x: isinstance(x, jax.sharding.Sharding)))
    shapes = {path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(state.trainable["backbone"])}

    def place_of(path: tuple[Any, ...], leaf: Any) -> Any:
        # The optimiser keeps a parameter's state under the parameter's path, with more before and after it.
        for start in range(len(path)):
            for end in range(len(path), start, -1):
                if shapes.get(path[start:end]) == leaf.shape:
                    return places[path[start:end]]
        return whole

    return jax.tree_util.tree_map_with_path(place_of, state)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


@jax.jit
def all_finite(tree: Tree) -> jax.Array:
    """Whether every number of the tree is finite; bool []."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))
