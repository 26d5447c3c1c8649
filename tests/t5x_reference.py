"""Writes T5X checkpoints in the layouts of `checkpoint/t5x_files.py`, with msgpack, TensorStore and Orbax themselves."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from mpt_jax.config import T5Config
from mpt_jax.models.t5 import Params
from mpt_jax.trees import flatten, unflatten

Target = dict[str, np.ndarray]  # T5X's path → array


def assert_equal(left: Any, right: Any) -> None:
    """That two trees have the same paths, dtypes and values."""
    left, right = flatten(left), flatten(right)
    assert left.keys() == right.keys()
    for path in left:
        assert left[path].dtype == right[path].dtype, path
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)


def target_of(params: Params, *, scanned: str = "", heads: T5Config | None = None) -> Target:
    """Our tree under T5X's names: a leaf for each layer, or with `scanned` ("same" or "layers") the layers on axis 1.

    With `heads` the kernels of attention are [D,H,K], and [H,K,D] of `out`.
    """
    target: Target = {}
    for path, leaf in flatten(params).items():
        side, _, name = path.partition("/layers/")
        if not name:
            target[path] = np.asarray(leaf)
            if scanned and "relpos_bias" in path:  # a table for each layer, here the same in all
                side = path.split("/")[0]
                layers = np.stack([target.pop(path)] * len(params[side]["layers"]["mlp"]["wo"]["kernel"]), 1)
                target[f"{side}/{side}/relpos_bias/rel_embedding" if scanned == "same" else SCALABLE.format(side)] = layers
            continue
        leaf = np.asarray(leaf)
        if heads is not None and path.endswith(("query/kernel", "key/kernel", "value/kernel")):
            leaf = leaf.reshape(*leaf.shape[:2], heads.num_heads, heads.d_kv)
        elif heads is not None and path.endswith("out/kernel"):
            leaf = leaf.reshape(len(leaf), heads.num_heads, heads.d_kv, -1)
        if scanned:
            target[f"{side}/{side if scanned == 'same' else 'layers'}/{name}"] = np.swapaxes(leaf, 0, 1)
        else:
            target |= {f"{side}/layers_{n}/{name}": layer for n, layer in enumerate(leaf)}
    return target


SCALABLE = "{}/layers/relative_posemb/rel_embedding"


def slots(target: Target) -> dict[str, Any]:
    """An optimiser's state as T5X keeps it beside the target; nothing of it may be read."""
    return {"step": np.int32(3), "param_states": {path: {"v": np.full(leaf.shape[:1], np.nan)} for path, leaf in target.items()}}


def pack(tree: Any) -> bytes:
    """msgpack as flax writes it."""

    def extension(value: Any) -> msgpack.ExtType:
        array = np.asarray(value)
        body = msgpack.packb((array.shape, array.dtype.name, array.tobytes()), use_bin_type=True)
        return msgpack.ExtType(1 if isinstance(value, np.ndarray) else 3, body)

    return msgpack.packb(tree, default=extension, strict_types=True)


def chunks_of(shape: tuple[int, ...]) -> list[int]:
    """Chunks that divide nothing: the last one of each axis is partial."""
    return [max(1, size * 2 // 3) for size in shape]


def write_legacy(
    folder: Path,
    target: Target,
    *,
    driver: str = "gfile",
    chunks: Callable[[tuple[int, ...]], list[int]] = chunks_of,
    zarray: bool = True,
    version: int = 3,
    wrapped: bool = True,
) -> Path:
    """msgpack and zarr folders. Vectors and position biases lie in the msgpack, as T5X has it; `version` 2 had no bfloat16."""
    folder.mkdir(parents=True)
    leaves: dict[str, Any] = {}
    for path, array in target.items():
        if version == 2 and array.dtype.name == "bfloat16":
            array = array.view(np.uint16)
        if array.ndim == 1 or "rel" in path:
            leaves[path] = array
            continue
        name = f"target.{path.replace('/', '.')}"
        dtype = {"float32": "<f4", "bfloat16": "bfloat16", "uint16": "<u2", "int32": "<i4", "float16": "<f2"}[array.dtype.name]
        metadata = {
            "chunks": chunks(array.shape),
            "compressor": {"id": "gzip", "level": 1},
            "dtype": dtype,
            "shape": list(array.shape),
        }
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder / name)}, "metadata": metadata}
        ts.open(spec, create=True).result()[...] = array
        if not zarray:  # and the metadata has only what T5X gave, which tells TensorStore the dtype beside it
            (folder / name / ".zarray").unlink()
            del metadata["dtype"]
        place = {"driver": driver, "path": name} | ({"bucket": "t5x-dummy-bucket"} if driver == "gcs" else {})
        leaves[path] = {"driver": "zarr", "dtype": array.dtype.name, "kvstore": place, "metadata": metadata}
    tree = {"target": unflatten(leaves), "state": slots(target)}
    (folder / "checkpoint").write_bytes(pack({"version": version, "optimizer": tree} if wrapped else tree))
    return folder


def write_single(file: Path, target: Target, chunk_bytes: int) -> Path:
    """One msgpack by flax itself, which cuts arrays of more than `chunk_bytes`."""
    usual, flax.serialization.MAX_CHUNK_SIZE = flax.serialization.MAX_CHUNK_SIZE, chunk_bytes
    try:
        tree = {"optimizer": {"target": {"params": unflatten(target)}, "state": slots(target)}}
        file.write_bytes(flax.serialization.msgpack_serialize(tree))
    finally:
        flax.serialization.MAX_CHUNK_SIZE = usual
    return file


def write_orbax(folder: Path, target: Target, *, name: str = "target", ocdbt: bool = True) -> Path:
    """`folder/state`, an OCDBT database or a folder of zarr folders."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    tree = {name: unflatten(target), "state": slots(target)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)) as checkpointer:
        checkpointer.save(folder.absolute() / "state", jax.tree.map(np.asarray, tree))
    return folder


def write_first_orbax(folder: Path, target: Target) -> Path:
    """Zarr folders beside a msgpack that has their names, as Orbax's first versions wrote them."""
    write_legacy(folder / "state", target)
    names = {path: f"PLACEHOLDER://target.{path.replace('/', '.')}" for path in target}
    inline = {path: array for path, array in target.items() if array.ndim == 1 or "rel" in path}
    tree = {"target": unflatten(names | inline), "state": slots(target)}
    (folder / "state" / "checkpoint").write_bytes(pack(tree))
    return folder
