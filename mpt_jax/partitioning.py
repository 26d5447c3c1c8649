"""One mesh, three axes: the batch over "data" and "fsdp", the backbone's wide dimensions over "model".

The rules are T5X's `standard_logical_axis_rules` with one-dimensional activation partitioning (`t5x/partitioning.py`); with an
"fsdp" axis the parameters' other dimension is cut, too. A prompt is small and lies whole on every device. XLA derives the rest
from where the arguments lie, but for what `rows_sharding` tells it.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mpt_jax.config import PartitionConfig
from mpt_jax.errors import UserError

BATCH_AXES = ("data", "fsdp")
RULES: dict[str, str | None] = {
    "vocab": "model",
    "mlp": "model",
    "heads": "model",
    "joined_kv": "model",
    "embed": "fsdp",
    "kv": None,
    "relpos_buckets": None,
    "length": None,
    "layers": None,
    "prompt": None,
    "prompt_embed": None,
}


def make_mesh(config: PartitionConfig | None = None, devices: list[Any] | None = None) -> Mesh:
    """The mesh ("data", "fsdp", "model") over all devices; `config.num_partitions`, at least 1, are "model".

    Raises:
        UserError: the number of devices is not a multiple of `num_partitions` times `fsdp`.
    """
    config = config or PartitionConfig()
    # Those of a process together, so that it holds one run of the batch's rows and "model" spans no more processes than it must.
    devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    if len(devices) % (config.num_partitions * config.fsdp):
        product = config.num_partitions * config.fsdp
        factors = f" ({config.num_partitions}) times PartitionConfig.fsdp ({config.fsdp})" if config.fsdp > 1 else ""
        raise UserError(
            f"PartitionConfig.num_partitions{factors} is {product}, which does not divide the {len(devices)} devices; choose a "
            f"divisor of {len(devices)}."
        )
    return Mesh(np.asarray(devices).reshape(-1, config.fsdp, config.num_partitions), ("data", "fsdp", "model"))


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts a batch is cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def partition_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Where a parameter with these logical axes lies.

    A dimension that its mesh axis does not divide stays whole (t5-small's 6 heads on 4 devices), and a mesh axis is used once.
    """
    used: set[str] = set()
    spec: list[str | None] = []
    for axis, size in zip(axes, shape, strict=True):
        target = RULES[axis] if axis is not None else None
        if target is None or target in used or mesh.shape[target] == 1 or size % mesh.shape[target]:
            spec.append(None)
        else:
            used.add(target)
            spec.append(target)
    while spec and spec[-1] is None:  # as XLA writes the place of a result: an equal place with another name is compiled anew
        spec.pop()
    return PartitionSpec(*spec)


def tree_sharding(shapes: Any, logical_axes: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of `shapes` (arrays or ShapeDtypeStructs), from the equally built tree of axis names."""
    if isinstance(shapes, Mapping):
        return {name: tree_sharding(shapes[name], logical_axes[name], mesh) for name in shapes}
    return NamedSharding(mesh, partition_spec(logical_axes, shapes.shape, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis cut over all devices but those that compute one example together."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def rows_sharding(mesh: Mesh) -> NamedSharding | None:
    """Where a T5's activations [B,…] must be told to lie; None where XLA leaves them with the batch's rows by itself.

    Where "fsdp" cuts the width of the weights, XLA would cut that of the activations as well, and send these, of the whole batch,
    in place of the weights.
    """
    return batch_sharding(mesh) if mesh.shape["fsdp"] > 1 else None


def batch_shard(mesh: Mesh) -> tuple[int, int]:
    """(index, count): the batch has `count` equal runs of rows, and this process's devices hold run `index`.

    Where an example is computed by devices of several processes, these hold the same run.

    Raises:
        UserError: a process's devices hold rows that are no such run.
    """
    ways = batch_ways(mesh)
    held: dict[int, set[int]] = {}
    places: Mapping[Any, Any] = batch_sharding(mesh).devices_indices_map((ways,))
    for device, (rows,) in places.items():
        held.setdefault(device.process_index, set()).add(rows.indices(ways)[0])
    size = len(held[jax.process_index()])
    runs = {frozenset(range(start, start + size)) for start in range(0, ways, size)}
    if any(frozenset(parts) not in runs for parts in held.values()):
        sizes = {sum(device.process_index == process for device in mesh.devices.flat) for process in held}
        each = " and ".join(map(str, sorted(sizes)))
        raise UserError(
            f"PartitionConfig.num_partitions is {mesh.shape['model']}, with which processes of {each} devices cannot "
            "hold equal parts of a batch; choose a divisor of a process's devices, or a multiple."
        )
    return min(held[jax.process_index()]) // size, ways // size


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Put a batch on the devices that share it. Of several processes each gives the rows of its `batch_shard`."""
    sharding = batch_sharding(mesh)
    if sharding.is_fully_addressable:
        return {name: jax.device_put(value, sharding) for name, value in batch.items()}
    _, count = batch_shard(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value, (len(value) * count, *value.shape[1:]))
        for name, value in batch.items()
    }


def to_host(tree: Any) -> Any:
    """The arrays as NumPy arrays of their own. Those of which a process has only a part are gathered: all must ask."""

    def read(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.array(leaf, copy=True)

    return jax.tree.map(read, tree)


def check_batch_size(batch_size: int, mesh: Mesh, num_microbatches: int = 1) -> None:
    """UserError unless the devices can share a batch, or each of its microbatches, evenly."""
    ways, multiple = batch_ways(mesh), batch_ways(mesh) * num_microbatches
    if batch_size % multiple:
        shared = [f"shared evenly by {ways} devices"] * (ways > 1)
        cut = [f"cut into TrainConfig.num_microbatches={num_microbatches} equal parts"] * (num_microbatches > 1)
        fewer = ", or fewer microbatches" if num_microbatches > 1 else ""
        raise UserError(
            f"DataConfig.batch_size (BATCH_SIZE; of a stage, StageConfig.batch_size times its prompts) is {batch_size}, which "
            f"cannot be {' that are '.join(cut + shared)}; choose a multiple of {multiple}{fewer}."
        )


def split_batch(batch: Mapping[str, jax.Array], parts: int, mesh: Mesh) -> dict[str, jax.Array]:
    """The rows of a batch [B,…] as so many microbatches [parts,B/parts,…], row b in microbatch b modulo `parts`.

    A device that holds a run of the batch's rows thus has its share of every microbatch already, and nothing is sent. B is a
    multiple of `parts` times the devices that share it.
    """
    places = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))

    def split(leaf: jax.Array) -> jax.Array:
        rows = leaf.reshape(-1, parts, *leaf.shape[1:])
        return jax.lax.with_sharding_constraint(rows.swapaxes(0, 1), places)

    return {name: split(leaf) for name, leaf in batch.items()}
