"""The leaves of a checkpoint, read in parts: what lies in a file, seen as our tree has it, and brought to its devices.

An importer opens a checkpoint as one `Leaf` for each path of our tree. It takes what the files hold (`file_leaf`) through
views, which read no more of the file than is asked of them: `stack` puts layers in front, `transposed` changes the order of
axes, `joined` makes one axis of two. `load` brings all leaves into their shardings, a few rows at a time.
"""

import contextlib
import ctypes
import dataclasses
import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from mpt_jax.distributed import barrier
from mpt_jax.errors import UserError
from mpt_jax.models.quantize import quantized, scale_of
from mpt_jax.trees import LeafDigest, combine

Index = tuple[slice, ...]  # one slice for each axis, with its start and stop and no step
Box = tuple[tuple[int, int], ...]  # the same as (start, stop), which has a hash

FLOATS = ("float32", "bfloat16", "float16", "float64")
BLOCK = 2**23  # scalars read at once: 32 MiB in float32


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array that is read in parts.

    Attributes:
        shape: of the whole array.
        dtype: as it is stored.
        chunks: of each axis how much is stored together: reading less costs as much.
        read: the part of the array within an index, in `dtype`. UserError for a part that cannot be read or is not finite.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]
    read: Callable[[Index], np.ndarray]


Leaves = dict[str, Leaf]  # path in our tree → leaf


def whole(shape: Sequence[int]) -> Index:
    """The index of everything."""
    return tuple(slice(0, size) for size in shape)


def file_leaf(
    name: str, shape: Sequence[int], dtype: np.dtype, read: Callable[[Index], np.ndarray], chunks: Sequence[int] | None = None
) -> Leaf:
    """A leaf as it lies in a file. `name` is that of the file and of the array in it, for errors."""

    def checked(index: Index) -> np.ndarray:
        try:
            values = read(index)
        except Exception as error:  # safetensors, TensorStore and the file system each have their own
            raise UserError(f"{name} cannot be read ({reason(error)}); copy the checkpoint again.") from None
        finite = np.isfinite(values)
        if not finite.all():
            place = [int(at[0]) + part.start for at, part in zip(np.nonzero(~finite), index, strict=True)]
            raise UserError(
                f"{name} holds {float(values[~finite][0])} at {place}, where weights must be finite; take another checkpoint."
            )
        return values

    return Leaf(tuple(shape), dtype, tuple(chunks or (1,) * len(shape)), checked)


def reason(error: Exception) -> str:
    """The first words of a library's message, without the specification that TensorStore appends."""
    return " ".join(str(error).split(" [tensorstore_spec")[0].split())[:300] or type(error).__name__


def some(names: Iterable[str]) -> str:
    """At most five names, for an error."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def stack(layers: Sequence[Leaf]) -> Leaf:
    """Equal leaves [...] → one leaf [layers, ...]."""
    first = layers[0]

    def read(index: Index) -> np.ndarray:
        rows, rest = index[0], index[1:]
        if rows.stop - rows.start == 1:
            return layers[rows.start].read(rest)[None]
        return np.stack([layer.read(rest) for layer in layers[rows]])

    return Leaf((len(layers), *first.shape), first.dtype, (1, *first.chunks), read)


def layer(leaf: Leaf, number: int) -> Leaf:
    """One layer of a leaf [layers, ...]."""
    return Leaf(leaf.shape[1:], leaf.dtype, leaf.chunks[1:], lambda index: leaf.read((slice(number, number + 1), *index))[0])


def transposed(leaf: Leaf, axes: Sequence[int]) -> Leaf:
    """`np.transpose(leaf, axes)`."""

    def read(index: Index) -> np.ndarray:
        return leaf.read(tuple(index[axes.index(axis)] for axis in range(len(axes)))).transpose(axes)

    return Leaf(tuple(leaf.shape[axis] for axis in axes), leaf.dtype, tuple(leaf.chunks[axis] for axis in axes), read)


def joined(leaf: Leaf, axis: int) -> Leaf:
    """[..., A, B, ...] → [..., A*B, ...], where A is `axis`: heads and their width."""
    width = leaf.shape[axis + 1]

    def merge(sizes: tuple[int, ...], size: int) -> tuple[int, ...]:
        return (*sizes[:axis], size, *sizes[axis + 2 :])

    def read(index: Index) -> np.ndarray:
        start, stop = index[axis].start, index[axis].stop
        first = start // width
        part = leaf.read((*index[:axis], slice(first, -(-stop // width)), slice(0, width), *index[axis + 1 :]))
        part = part.reshape(merge(part.shape, part.shape[axis] * width))
        return part[(slice(None),) * axis + (slice(start - first * width, stop - first * width),)]

    return Leaf(merge(leaf.shape, leaf.shape[axis] * width), leaf.dtype, merge(leaf.chunks, leaf.chunks[axis] * width), read)


def equal(left: Leaf, right: Leaf) -> bool:
    """Whether both hold the same values, compared a few rows at a time."""
    return left.shape == right.shape and all(np.array_equal(values, right.read(index)) for index, values in blocks(left))


def in_memory(arrays: Mapping[str, Any]) -> Leaves:
    """Arrays (NumPy's or JAX's) as leaves."""

    def leaf(array: Any) -> Leaf:
        return Leaf(array.shape, np.dtype(array.dtype), (1,) * array.ndim, lambda index: np.asarray(array[index]))

    return {path: leaf(array) for path, array in arrays.items()}


def blocks(leaf: Leaf) -> Iterator[tuple[Index, np.ndarray]]:
    """The whole leaf in C order, in parts of whole rows: (index, values)."""
    for index in _blocks(leaf, _box(whole(leaf.shape), leaf.shape)):
        yield index, leaf.read(index)


def cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`values` in `dtype`, C-contiguous; rounded where that is narrower. UserError, with `name`, for one beyond its range."""
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(values, dtype)
    most = float(ml_dtypes.finfo(dtype).max)
    if most < float(ml_dtypes.finfo(values.dtype).max):
        largest = max(float(values.max()), -float(values.min()))
        if largest > most and not np.isfinite(found).all():  # what is hardly larger is rounded to `most`
            raise UserError(f"{name} has a weight of size {largest:g}, which {dtype} cannot hold; take another checkpoint.")
    return found


def to_numpy(leaf: Leaf, dtype: str, name: str, digest: LeafDigest | None = None) -> np.ndarray:
    """The whole leaf in host memory, in `dtype` as by `cast`. The values as they then are are added to `digest`."""
    array = np.empty(leaf.shape, jax.numpy.dtype(dtype))
    for index, values in blocks(leaf):
        array[index] = cast(values, array.dtype, name)
        if digest is not None:
            digest.add(array[index])
    return array


class Loaded(NamedTuple):
    arrays: dict[str, jax.Array]
    fingerprint: str  # `trees.fingerprint` of the float32 values that the files hold
    digests: dict[str, str]  # of each leaf (`trees.LeafDigest`); {} in all processes but the first


def load(leaves: Mapping[str, Leaf], shardings: Mapping[str, Sharding], dtypes: Mapping[str, Any]) -> Loaded:
    """Every leaf in its sharding and dtype.

    A leaf whose dtype is int8 is quantised on the way (`models/quantize.py`), with its scales as the leaf `<path>_scale`; what
    the devices hold of it is read once more, before.

    The host holds about `BLOCK` scalars of one leaf as stored, or one row of its chunks where that is more (of a scanned leaf
    whose layers lie in one chunk, all of it), and its own devices' parts of that leaf in `dtype`. Of several processes, the
    first one reads everything, for the fingerprint; the others read what their devices hold, in whole chunks, and wait for it.

    Raises:
        UserError: a part that cannot be read or is not finite.
    """
    digests: dict[str, str] = {}
    arrays: dict[str, jax.Array] = {}
    with _frugal_malloc(sum(math.prod(leaf.shape) for leaf in leaves.values())):
        for path in sorted(leaves):
            digest = LeafDigest(leaves[path].shape) if jax.process_index() == 0 else None
            leaf, dtype = leaves[path], np.dtype(dtypes[path])
            scale = _scales(leaf, shardings[path], path) if dtype == np.int8 else None
            arrays[path] = _place(leaf, shardings[path], dtype, path, digest, scale)
            if scale is not None:
                arrays[f"{path}_scale"] = _from_each(scale, shardings[f"{path}_scale"])
            if digest is not None:
                digests[path] = digest.result()
            gc.collect(0)  # JAX lets go of the host arrays that it has copied when Python collects garbage of any generation
    if jax.process_count() == 1:
        return Loaded(arrays, combine(digests), digests)
    barrier("loading the backbone")  # which may take the first one minutes longer; an exchange has shorter time-outs of its own
    mine = np.frombuffer(bytes.fromhex(combine(digests)), np.uint8)  # the others' is of nothing, and is not asked for
    return Loaded(arrays, bytes(np.asarray(multihost_utils.broadcast_one_to_all(mine))).hex(), digests)


def _scales(leaf: Leaf, sharding: Sharding, name: str) -> np.ndarray:
    """The scale of each output channel of a kernel [..., in, out]: [..., out] float32.

    A process reads what its devices hold; the processes' largest weights are then compared.
    """
    largest = np.zeros((*leaf.shape[:-2], leaf.shape[-1]), np.float32)
    for index in _blocks(leaf, _region(_boxes(leaf, sharding))):
        part = (*index[:-2], index[-1])  # a kernel without layers is cut along `in`
        largest[part] = np.maximum(largest[part], np.abs(leaf.read(index).astype(np.float32)).max(axis=-2))
    if jax.process_count() > 1:
        barrier(f"loading the backbone's {name}")
        largest = np.asarray(multihost_utils.process_allgather(largest)).max(axis=0)
    return scale_of(largest)


def _from_each(values: np.ndarray, sharding: Sharding) -> jax.Array:
    """An array that all processes have. `device_put` would compare theirs, an exchange to which the first one would come late."""
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def _place(
    leaf: Leaf, sharding: Sharding, dtype: np.dtype, name: str, digest: LeafDigest | None, scale: np.ndarray | None = None
) -> jax.Array:
    """One leaf on its devices, quantised where it has a scale.

    With a digest it is read whole, else only what this process's devices hold; all of it once.
    """
    boxes = _boxes(leaf, sharding)
    buffers = {box: np.empty([stop - start for start, stop in box], dtype) for box in boxes}
    for index in _blocks(leaf, _region(boxes) if digest is None else _box(whole(leaf.shape), leaf.shape)):
        values = cast(leaf.read(index), np.dtype(np.float32), name)
        if digest is not None:
            digest.add(values)
        values = cast(values, dtype, name) if scale is None else quantized(values, scale[*index[:-2], index[-1]])
        for box, buffer in buffers.items():
            _copy_overlap(values, index, buffer, box)
    array = jax.make_array_from_callback(leaf.shape, sharding, lambda index: buffers[_box(index, leaf.shape)])
    return jax.block_until_ready(array)  # else the next leaf's buffers are made before this one's are free


@contextlib.contextmanager
def _frugal_malloc(scalars: int) -> Iterator[None]:
    """While a large model is loaded, what is freed goes back to the system.

    glibc learns to keep freed blocks of up to 32 MiB, for each thread that had one; the readers' threads kept a tenth of a T5
    large. Learning ends once anything is set, so the values that it would have ended at are set afterwards.
    """
    if scalars < 2**28:
        yield
        return
    trim_threshold, mmap_threshold = -1, -3  # M_… of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        yield
        return
    mallopt(mmap_threshold, 2**22)
    try:
        yield
    finally:
        mallopt(mmap_threshold, 2**25)
        mallopt(trim_threshold, 2**26)


def _copy_overlap(values: np.ndarray, index: Index, buffer: np.ndarray, box: Box) -> None:
    """Copies what of `values`, which lie at `index`, belongs into `buffer`, which lies at `box`."""
    both = [(max(part.start, start), min(part.stop, stop)) for part, (start, stop) in zip(index, box, strict=True)]
    if all(start < stop for start, stop in both):
        source = tuple(slice(a - part.start, b - part.start) for (a, b), part in zip(both, index, strict=True))
        target = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(both, box, strict=True))
        buffer[target] = values[source]


def _blocks(leaf: Leaf, region: Box) -> Iterator[Index]:
    """The region cut along axis 0 into whole chunks of about `BLOCK` scalars."""
    (start, stop), *rest = region
    chunk = leaf.chunks[0] * math.prod(b - a for a, b in rest)
    rows = leaf.chunks[0] * max(1, BLOCK // chunk)
    for row in range(start, stop, rows):
        yield slice(row, min(row + rows, stop)), *(slice(a, b) for a, b in rest)


def _boxes(leaf: Leaf, sharding: Sharding) -> set[Box]:
    """The different parts of a leaf that this process's devices hold."""
    return {_box(index, leaf.shape) for index in sharding.addressable_devices_indices_map(leaf.shape).values()}


def _region(boxes: Iterable[Box]) -> Box:
    """The smallest part of a leaf that holds all of these.

    It holds no more, since a process's devices are neighbours on the mesh, and is read at once, so that a chunk in which several
    devices have a part is not read for each of them.
    """
    return tuple((min(start for start, _ in axis), max(stop for _, stop in axis)) for axis in zip(*boxes, strict=True))


def _box(index: Index | None, shape: Sequence[int]) -> Box:
    """JAX's index of a shard, in which None stands for everything."""
    return tuple(part.indices(size)[:2] for part, size in zip(index or whole(shape), shape, strict=True))
