"""The arrays of a T5X checkpoint's target as its files hold them, in each of the layouts that T5X has written.

    checkpoint_<step>/checkpoint    flax msgpack with the small arrays; for each of the others, where it lies and its metadata
    checkpoint_<step>/target.…      zarr arrays, a file for each chunk
    checkpoint_<step>/state/        Orbax: zarr arrays, in an OCDBT database or in folders beside a msgpack
    checkpoint_<step>               one msgpack file with all arrays in it

Folders are local or gs://BUCKET/…. Optimiser slots are never opened. Format: t5x `checkpoints.py`.
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import tensorstore as ts

from mpt_jax.checkpoint.flax_msgpack import Packed, read_index
from mpt_jax.checkpoint.leaves import Index, Leaf, Leaves, file_leaf, reason
from mpt_jax.checkpoint.storage import exists, fetch, is_file, kvstore_spec, list_names, open_store
from mpt_jax.errors import UserError

TARGETS = (("optimizer", "target"), ("target",), ("params",))  # where a checkpoint keeps its weights
_DRIVERS = ("file", "gfile", "gcs")  # of T5X's kvstores; all mean a folder beside the msgpack
_PLACEHOLDER = "PLACEHOLDER://"  # Orbax's first layouts: the array lies in the folder of this name
_CACHE = 2**25  # bytes of an OCDBT database's nodes that TensorStore keeps; of arrays it keeps nothing


class Place(NamedTuple):
    """A checkpoint that was found: `file` is its msgpack, or "" where Orbax keeps arrays in `folder` alone."""

    folder: str
    file: str

    @property
    def name(self) -> str:
        return f"{self.folder}/{self.file}" if self.file else self.folder


def find_t5x(path: str) -> Place | None:
    """The T5X checkpoint that lies at `path`, or alone as `checkpoint_<step>` within it; None when there is none.

    Raises:
        UserError: the folder has several, or cannot be read.
    """
    path = path.rstrip("/") if path.strip("/") not in ("", "gs:") else path
    if not path.startswith("gs://") and Path(path).suffix in (".safetensors", ".bin"):
        raise UserError(f"{path} (INITIAL_CHECKPOINT_PATH) is a file of a Hugging Face folder; give the folder.")
    if is_file(path):
        parent, _, name = path.rpartition("/")
        return Place(parent or ("/" if path.startswith("/") else "."), name)
    store = open_store(path)
    for folder, prefix in ((path, ""), (f"{path}/state", "state/")):
        if exists(store, f"{prefix}checkpoint"):
            return Place(folder, "checkpoint")
        if exists(store, f"{prefix}manifest.ocdbt") or exists(store, f"{prefix}_METADATA"):
            return Place(folder, "")
    found = (re.fullmatch(r"checkpoint_(\d+)", name) for name in list_names(path, store, "checkpoint_"))
    steps = sorted((int(match[1]), match[0]) for match in found if match)
    if len(steps) > 1:
        newest = ", ".join(name for _, name in steps[:-4:-1])
        raise UserError(
            f"{path} (INITIAL_CHECKPOINT_PATH) holds {len(steps)} T5X checkpoints, the newest {newest}; give the path of one."
        )
    return find_t5x(f"{path}/{steps[0][1]}") if steps else None


def open_target(place: Place) -> Leaves:
    """T5X's path of each array of the target ("encoder/layers_0/mlp/wo/kernel") → the array; nothing of it is read yet.

    Raises:
        UserError: a file that is damaged, an array that is missing or not in a format of T5X's, no target at all.
    """
    leaves = _open_msgpack(place) if place.file else _open_orbax(place)
    if all(path.startswith("params/") for path in leaves):  # flax's collection of that name
        return {path.removeprefix("params/"): leaf for path, leaf in leaves.items()}
    return leaves


def _open_msgpack(place: Place) -> Leaves:
    store = open_store(place.folder)
    try:
        tree = read_index(lambda offset, size: fetch(store, place.file, offset, size))
    except Exception as error:  # bytes that are no msgpack can fail in any way
        raise UserError(f"{place.name} is no whole T5X checkpoint ({reason(error)}); copy it again.") from None
    target = _target_of(tree, place)
    leaves: Leaves = {}
    folders: dict[str, tuple[str, dict[str, Any]]] = {}
    for path, value in _walk(target, ""):
        name = f"{place.name}: target/{path}"
        if isinstance(value, Packed):
            leaves[path] = _packed_leaf(store, place.file, value, name)
        elif isinstance(value, str) and value.startswith(_PLACEHOLDER):
            folders[path] = value.removeprefix(_PLACEHOLDER), {}
        else:
            folders[path] = _zarr_of(value, name)
    return leaves | _open_zarrs(place, folders)


def _target_of(tree: Any, place: Place) -> dict[str, Any]:
    for keys in TARGETS:
        node = tree
        for key in keys:
            node = node.get(key) if isinstance(node, dict) else None
        if isinstance(node, dict) and node:
            return node
    found = ", ".join(sorted(map(str, tree))) if isinstance(tree, dict) and tree else "no names at all"
    raise UserError(f"{place.name} is no T5X checkpoint, for it has no 'target' but {found}; give one that holds a model.")


def _walk(node: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    """(path, array or where it lies) of each leaf."""
    found = []
    for name, value in node.items():
        if isinstance(value, dict) and "driver" not in value:
            found += _walk(value, f"{prefix}{name}/")
        else:
            found.append((f"{prefix}{name}", value))
    return found


def _zarr_of(value: Any, name: str) -> tuple[str, dict[str, Any]]:
    """(folder, dtype and metadata) of an array beside the msgpack, from TensorStore's specification in it."""
    store = value.get("kvstore", {}) if isinstance(value, dict) else {}
    path = store.get("path") or (value.get("path") if isinstance(value, dict) else None)  # beside kvstore in TensorStore < 0.1.14
    if not path or value.get("driver") != "zarr" or store.get("driver") not in _DRIVERS:
        raise UserError(f"{name} is {str(value)[:100]!r}, which is no array of T5X's; take another checkpoint.")
    return path.rstrip("/").rsplit("/", 1)[-1], {key: value[key] for key in ("dtype", "metadata") if key in value}


def _open_orbax(place: Place) -> Leaves:
    """Orbax's arrays, by the names of their metadata files: "target.encoder.…/.zarray"."""
    store = open_store(place.folder)
    in_database = exists(store, "manifest.ocdbt")
    folders: dict[str, tuple[str, dict[str, Any]]] = {}
    try:
        if in_database:
            store = ts.KvStore.open({"driver": "ocdbt", "base": kvstore_spec(place.folder)}).result()
        for prefix in ("target", "params"):
            keys = store.list(range=ts.KvStore.KeyRange(f"{prefix}.", f"{prefix}/")).result()  # / follows .
            names = [key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray")]
            folders = folders or {name.removeprefix(f"{prefix}.").replace(".", "/"): (name, {}) for name in names}
    except Exception as error:  # TensorStore has one for each status
        raise UserError(f"{place.name} is no whole T5X checkpoint ({reason(error)}); copy it again.") from None
    if not folders:
        raise UserError(
            f"{place.name} is no T5X checkpoint, for it has no zarr array of a 'target'; give one that holds a model."
        )
    return _open_zarrs(place, folders, in_database)


def _open_zarrs(place: Place, folders: dict[str, tuple[str, dict[str, Any]]], in_database: bool = False) -> Leaves:
    """Opens all arrays at once, each from (folder, what the msgpack says of it), which must do where `.zarray` is missing."""
    context = ts.Context({"cache_pool#nodes": {"total_bytes_limit": _CACHE}})

    def begin(folder: str, known: dict[str, Any], assume: bool = False) -> Any:
        store = kvstore_spec(f"{place.folder}/{folder}")
        if in_database:
            store = {
                "driver": "ocdbt",
                "base": kvstore_spec(place.folder),
                "path": f"{folder}/",
                "cache_pool": "cache_pool#nodes",
            }
        # A chunk that is missing would be read as zeros otherwise.
        spec = {"driver": "zarr", "kvstore": store, "fill_missing_data_reads": False}
        return ts.open(spec | known, open=True, assume_metadata=assume, context=context)

    opening = {path: begin(*which) for path, which in folders.items()}
    leaves: Leaves = {}
    for path, (folder, known) in folders.items():
        name = f"{place.folder}/{folder}"
        try:
            try:
                array = opening[path].result()
            except ValueError as error:
                # What is left out would be assumed to be TensorStore's default, such as another compressor.
                if "NOT_FOUND" not in str(error) or not known.get("metadata", {}).keys() >= {"chunks", "compressor", "shape"}:
                    raise
                array = begin(folder, known, assume=True).result()
        except Exception as error:  # TensorStore has one for each status
            raise UserError(f"{name} cannot be read ({reason(error)}); copy the checkpoint again.") from None
        chunks = array.chunk_layout.read_chunk.shape
        leaves[path] = _leaf(name, array.shape, array.dtype.numpy_dtype, _reader(array), chunks)
    return leaves


def _reader(array: ts.TensorStore) -> Callable[[Index], np.ndarray]:
    return lambda index: array[index].read().result()


def _packed_leaf(store: ts.KvStore, file: str, packed: Packed, name: str) -> Leaf:
    """An array that lies in the msgpack itself; whole rows of it are read."""
    try:
        dtype = np.dtype(packed.dtype)
    except TypeError:
        raise UserError(f"{name} is {packed.dtype}, but weights must be float32 or bfloat16; take another checkpoint.") from None
    row = math.prod(packed.shape[1:]) * dtype.itemsize
    if sum(size for _, size in packed.pieces) != math.prod(packed.shape) * dtype.itemsize:
        raise UserError(f"{name} has not the bytes of its shape {list(packed.shape)}; the file is damaged, so copy it again.")

    def read(index: Index) -> np.ndarray:
        first, last = index[0].start * row, index[0].stop * row
        data, before = [], 0
        for offset, size in packed.pieces:
            start, stop = max(first - before, 0), min(last - before, size)
            if start < stop:
                data.append(fetch(store, file, offset + start, stop - start))
            before += size
        values = np.frombuffer(b"".join(data) if len(data) > 1 else data[0], dtype).reshape(-1, *packed.shape[1:])
        return values[(slice(None), *index[1:])]

    return _leaf(name, packed.shape, dtype, read, (1, *packed.shape[1:]))


def _leaf(name: str, shape: Sequence[int], dtype: np.dtype, read: Callable[[Index], np.ndarray], chunks: Sequence[int]) -> Leaf:
    if dtype == np.uint16:  # so T5X's version 2 kept the bits of bfloat16
        return file_leaf(name, shape, np.dtype(ml_dtypes.bfloat16), lambda index: read(index).view(ml_dtypes.bfloat16), chunks)
    return file_leaf(name, shape, dtype, read, chunks)
