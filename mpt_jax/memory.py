"""The programs of a run as shapes alone, and what they need of a device's memory before anything is compiled or loaded."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mpt_jax.config import DecodeConfig, Experiment, PartitionConfig, T5Config
from mpt_jax.costs import kept_for_gradient
from mpt_jax.distill import make_loss
from mpt_jax.errors import UserError
from mpt_jax.models.t5 import T5, logical_axes, param_shapes
from mpt_jax.partitioning import batch_sharding, batch_ways, check_batch_size, make_mesh, replicated, rows_sharding, tree_sharding
from mpt_jax.predict import make_generate
from mpt_jax.prompts import build_prompt
from mpt_jax.shapes import BATCH_SHAPES
from mpt_jax.train_state import TrainState, make_train_step, place_shape, state_shapes

Tree = Any
HEADROOM = 0.1  # of a device's memory, which is left where nobody chose the mesh: the estimate may be too low
INTEGER_FIELDS = {"loss_weights": jnp.float32}  # of a batch; all others are int32


class DoesNotFit(UserError):
    """No mesh has the memory for a job; `mesh` is the one that needs least."""

    def __init__(self, sentence: str, mesh: Mesh):
        super().__init__(sentence)
        self.mesh = mesh


class Programs(NamedTuple):
    """A run's compiled functions and the shapes, with their places, of what they are called with."""

    model: T5
    prompt_module: Any
    groups: tuple[int, ...]
    mesh: Mesh
    train: Any  # jitted, called with `train_arguments`
    train_arguments: tuple[TrainState, Tree, dict[str, jax.ShapeDtypeStruct]]
    decode: Any
    decode_arguments: tuple[Any, ...]


def programs_of(experiment: Experiment, groups: tuple[int, ...], mesh: Mesh) -> Programs:
    """The training step and greedy (or whatever `DecodeConfig` says) decoding of a run with these streams on this mesh.

    Args:
        groups: of each stream, `setup.Streams.groups`.
    """
    architecture, data = experiment.backbone.architecture, experiment.data
    model = T5(architecture, rows_sharding(mesh))
    shapes = param_shapes(architecture)
    params = jax.tree.map(place_shape, shapes, tree_sharding(shapes, logical_axes(architecture), mesh))
    module = build_prompt(experiment.prompt, groups, architecture.d_model)
    whole, cut = replicated(mesh), batch_sharding(mesh)

    frozen: dict[str, Any] = {"backbone": params if module else {}}
    trainable = _trainable(module, architecture) if module else {"backbone": params}
    if experiment.loss.teachers:
        teachers = (len(groups), experiment.prompt.length, architecture.d_model)
        frozen["teacher"] = jax.ShapeDtypeStruct(teachers, jnp.float32, sharding=whole)
    recipe = (experiment.optimizer, experiment.train.steps, groups)
    state = state_shapes(trainable, model, *recipe, mesh)
    parts = experiment.train.num_microbatches
    step = make_train_step(model, module, experiment.loss, *recipe, mesh, num_microbatches=parts)
    sizes = {"B": data.batch_size, "T": data.lengths["inputs"], "L": data.lengths["targets"]}
    batch = {
        name: jax.ShapeDtypeStruct(tuple(sizes[axis] for axis in axes.split()), INTEGER_FIELDS.get(name, jnp.int32), sharding=cut)
        for name, axes in BATCH_SHAPES.items()
    }

    rows = -(-experiment.decode.batch_size // batch_ways(mesh)) * batch_ways(mesh)
    decode = make_generate(model, module, _program(experiment.decode, decoded_length(experiment)))
    column = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=cut)
    tokens = jax.ShapeDtypeStruct((rows, data.lengths["inputs"]), jnp.int32, sharding=cut)
    asked = {"encoder_tokens": tokens, "task_ids": column, "numbers": column}
    decode_arguments = (state.trainable, params, asked, jax.ShapeDtypeStruct((), jnp.uint32, sharding=whole))
    return Programs(model, module, groups, mesh, step, (state, frozen, batch), decode, decode_arguments)


def left_out(experiment: Experiment) -> list[str]:
    """What of a configuration `programs_of` does not follow, a sentence each."""
    found = []
    if experiment.data.pack_lengths:
        found.append("DataConfig.pack_lengths: a row is taken as one padded example")
    if experiment.decode.method == "rank":
        found.append("DecodeConfig.method='rank': decoding is taken as writing answers")
    return found


def decoded_length(experiment: Experiment) -> int:
    """The most tokens that decoding writes, M."""
    return experiment.decode.max_length or experiment.data.lengths["targets"]


def _program(decode: DecodeConfig, length: int) -> DecodeConfig:
    """As `predict_tokens` compiles it."""
    return dataclasses.replace(decode, method="generate", max_length=length, batch_size=1, seed=0)


def _trainable(module: Any, architecture: T5Config) -> Tree:
    x = jnp.zeros((1, 1, architecture.d_model))
    ids = jnp.zeros((1,), jnp.int32)
    return jax.eval_shape(lambda: module.init(jax.random.key(0), ids, x, x[..., 0]))["params"]


class Estimate(NamedTuple):
    """Bytes of one device during a training step."""

    weights: int
    state: int  # what is trained, its optimiser's state, teachers
    kept: float  # of the forward pass, for the gradient
    working: float  # of the layer that is being computed, of the logits, and the gradient (of a microbatch, and their sum)

    @property
    def total(self) -> float:
        return sum(self)


def estimate_training(programs: Programs, experiment: Experiment) -> Estimate:
    """What a training step needs, from shapes: no compiler is asked, so this also serves GPUs and the choice of a mesh.

    For prompt tuning of T5 1.1 base on a v5e, `kept` and `working` were 0.9 to 1.2 times what libtpu's compiler calls
    temporaries in bfloat16 (remat "none", "dots", "full"), and two thirds of them in float32.
    """
    state, frozen, batch = programs.train_arguments
    kept = _kept(programs, experiment, experiment.backbone.architecture)
    working = _logits(experiment, programs.mesh) + device_bytes(state.trainable)
    if experiment.train.num_microbatches > 1:
        working += device_bytes(jax.tree.map(lambda leaf: leaf.update(dtype=jnp.float32), state.trainable))
    if experiment.backbone.architecture.remat != "none":  # one layer is computed again, with all that it keeps
        architecture = dataclasses.replace(
            experiment.backbone.architecture, remat="none", num_encoder_layers=1, num_decoder_layers=1
        )
        working += _kept(programs, experiment, architecture)
    return Estimate(
        weights=device_bytes(frozen["backbone"]),
        state=device_bytes(state) + device_bytes({**frozen, "backbone": {}}) + device_bytes(batch),
        kept=kept,
        working=working,
    )


def _kept(programs: Programs, experiment: Experiment, architecture: T5Config) -> float:
    """Bytes of a device that the backward pass of a microbatch waits for, of a model with this architecture."""
    state, frozen, batch = programs.train_arguments
    rows = experiment.data.batch_size // experiment.train.num_microbatches
    batch = {name: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype) for name, leaf in batch.items()}
    shapes = param_shapes(architecture)
    backbone, trainable = shapes, state.trainable
    if programs.prompt_module is None:
        backbone, trainable = {}, {"backbone": shapes}
    loss = make_loss(T5(architecture), programs.prompt_module, experiment.loss, programs.groups)
    key = jax.eval_shape(lambda: jax.random.key(0)) if architecture.dropout_rate else None
    leaves = kept_for_gradient(
        lambda t, f, b: loss(t, f, b, None if key is None else jax.random.key(0)),
        trainable,
        {**frozen, "backbone": backbone},
        batch,
    )
    split = {architecture.num_heads, architecture.d_ff, architecture.vocab_size}
    ways, model = batch_ways(programs.mesh), programs.mesh.shape["model"]

    def share(leaf: jax.ShapeDtypeStruct) -> float:
        cut = ways if rows in leaf.shape else 1
        return cut * (model if any(size in split and size % model == 0 for size in leaf.shape) else 1)

    return sum(_size(leaf) / share(leaf) for leaf in leaves)


def _logits(experiment: Experiment, mesh: Mesh) -> float:
    """Logits and their gradient in float32."""
    data, vocabulary = experiment.data, experiment.backbone.architecture.vocab_size
    positions = data.batch_size // experiment.train.num_microbatches * data.lengths["targets"]
    return 2 * 4 * positions * vocabulary / batch_ways(mesh) / math.gcd(vocabulary, mesh.shape["model"])


def device_bytes(tree: Tree) -> int:
    """What one device holds of arrays, or shapes, that have a place."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _size(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape) * (np.dtype(leaf.dtype).itemsize if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else 8)


def mesh_over(experiment: Experiment, groups: tuple[int, ...], devices: Sequence[Any], memory: float) -> Mesh:
    """The mesh of a run on these devices, of `memory` bytes each; with `num_partitions=0` the smallest model axis that fits.

    Raises:
        UserError: none fits, the devices are no multiple of the mesh, or they cannot share the batch.
    """
    partition = experiment.partition
    if partition.num_partitions == 0:
        partition = PartitionConfig(choose_partitions(experiment, groups, devices, memory), partition.fsdp)
    mesh = make_mesh(partition, list(devices))
    check_batch_size(experiment.data.batch_size, mesh, experiment.train.num_microbatches)
    return mesh


def choose_partitions(experiment: Experiment, groups: tuple[int, ...], devices: Sequence[Any], memory: float) -> int:
    """The smallest size of "model" with which the estimate fits `memory` bytes of a device, and leaves HEADROOM of them.

    Raises:
        DoesNotFit: none fits.
        UserError: with none the devices can share the batch.
    """
    tried: dict[int, tuple[float, Mesh]] = {}
    fsdp, heads = experiment.partition.fsdp, experiment.backbone.architecture.num_heads
    mesh = make_mesh(PartitionConfig(1, fsdp), list(devices))
    for partitions in range(1, len(devices) // fsdp + 1):
        if len(devices) % (partitions * fsdp) or heads % partitions:
            continue
        mesh = make_mesh(PartitionConfig(partitions, fsdp), list(devices))
        if experiment.data.batch_size % (batch_ways(mesh) * experiment.train.num_microbatches):
            continue
        needed = estimate_training(programs_of(experiment, groups, mesh), experiment).total
        if needed <= memory * (1 - HEADROOM):
            return partitions
        tried[partitions] = needed, mesh
    if not tried:
        check_batch_size(experiment.data.batch_size, mesh, experiment.train.num_microbatches)
    needs = ", ".join(f"{n}: {needed / 2**30:.1f} GiB" for n, (needed, _) in tried.items())
    raise DoesNotFit(
        f"PartitionConfig.num_partitions=0 finds no size of the mesh's model axis with which {len(devices)} devices of "
        f"{memory / 2**30:.1f} GiB hold the job and {HEADROOM:.0%} are left ({needs}); take T5Config.remat='full', a larger "
        "TrainConfig.num_microbatches, a smaller BATCH_SIZE or more devices.",
        min(tried.values(), key=lambda one: one[0])[1],
    )
