"""The tensors of a Hugging Face folder, local or in a bucket: safetensors (one file or shards) or PyTorch's `.bin` files."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from mpt_jax.checkpoint import storage
from mpt_jax.checkpoint.leaves import Index, Leaf, file_leaf, reason, some
from mpt_jax.errors import UserError

Tensors = dict[str, Leaf]  # by Hugging Face's name
INDEX = ".index.json"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"} | {
    f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}


def find_weights(folder: str) -> str | None:
    """The name of the folder's weights file or index of shards, None where it has neither."""
    store = storage.open_store(folder)
    names = (f"{stem}{end}" for stem in READERS for end in ("", INDEX))
    return next((name for name in names if storage.exists(store, name)), None)


def open_weights(folder: str) -> tuple[Tensors, str]:
    """The tensors of the folder by name, and the file to name in errors."""
    name = find_weights(folder)
    if name is None:
        raise UserError(f"{folder} has no model.safetensors, nor an index of shards; give a Hugging Face folder with weights.")
    stem = name.removesuffix(INDEX)
    return (_open_shards(folder, name, READERS[stem]) if name != stem else READERS[stem](folder, name)), f"{folder}/{name}"


def _open_shards(folder: str, name: str, read: Callable[[str, str], Tensors]) -> Tensors:
    index = f"{folder}/{name}"
    try:
        weight_map: dict[str, str] = (storage.read_json(folder, name) or {})["weight_map"]
        files = sorted(set(weight_map.values()))
    except (UserError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index} is not a readable index with a 'weight_map'; copy the folder again.") from None
    shards = {file: read(folder, file) for file in files}
    for key, name in weight_map.items():
        if key not in shards[name]:
            raise UserError(f"{index} says that {key} is in {name}, but it is not; copy the folder again.")
    if unlisted := {key for shard in shards.values() for key in shard} - weight_map.keys():
        raise UserError(f"The shards of {index} hold {some(unlisted)}, which the index does not list; copy the folder again.")
    return {key: shards[name][key] for key, name in weight_map.items()}


def _open_safetensors(folder: str, name: str) -> Tensors:
    if storage.is_remote(folder):
        return _open_remote_safetensors(folder, name)
    file = Path(folder) / name

    def leaf(handle: Any, key: str) -> Leaf:
        def read(index: Index) -> np.ndarray:
            # Opened for each part: the pages of a file that stays mapped count as this process's memory.
            with safe_open(file, framework="numpy") as handle:
                return handle.get_slice(key)[index]

        found = handle.get_slice(key)
        return file_leaf(f"{file}: the tensor {key}", found.get_shape(), _dtype(found.get_dtype()), read)

    try:
        with safe_open(file, framework="numpy") as handle:
            return {key: leaf(handle, key) for key in handle.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); it is missing or truncated, so copy it again.") from None


def _open_remote_safetensors(folder: str, name: str) -> Tensors:
    """The same in a bucket, which is read by ranges of whole rows: its library maps local files only.

    The format: eight bytes with the size of a header in JSON, the header, then the tensors' bytes at the offsets that it says
    (safetensors, README).
    """
    store, file = storage.open_store(folder), f"{folder}/{name}"
    try:
        size = int.from_bytes(storage.fetch(store, name, 0, 8), "little")
        header = json.loads(storage.fetch(store, name, 8, size))
        header.pop("__metadata__", None)
        end = 8 + size + max(entry["data_offsets"][1] for entry in header.values())
        if len(storage.fetch(store, name, end - 1, 2)) != 1:
            raise ValueError(f"it does not end after {end} bytes")
    except Exception as error:  # bytes that are no safetensors can fail in any way
        raise UserError(f"{file} cannot be read ({reason(error)}); it is missing or truncated, so copy it again.") from None

    def leaf(key: str, entry: dict[str, Any]) -> Leaf:
        dtype, shape, start = _dtype(entry["dtype"]), tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]
        row = math.prod(shape[1:]) * dtype.itemsize

        def read(index: Index) -> np.ndarray:
            rows = index[0].stop - index[0].start
            data = storage.fetch(store, name, start + index[0].start * row, rows * row)
            return np.frombuffer(data, dtype).reshape(rows, *shape[1:])[(slice(None), *index[1:])]

        return file_leaf(f"{file}: the tensor {key}", shape, dtype, read, (1, *shape[1:]))

    return {key: leaf(key, entry) for key, entry in header.items()}


def _dtype(name: str) -> np.dtype:
    return np.dtype(_DTYPES.get(name, "object"))


def _open_bin(folder: str, name: str) -> Tensors:
    if storage.is_remote(folder):
        raise UserError(f"{folder}/{name} is a PyTorch file, which can only be read locally; copy the folder, and give the copy.")
    file = Path(folder) / name
    try:
        import torch
    except ImportError:
        raise UserError(f"{file} is a PyTorch file; pip install 'mpt-jax[torch]' or save the model as safetensors.") from None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a broken file
        raise UserError(
            f"{file} cannot be read ({str(error).splitlines()[0]}); it is missing or truncated, so copy it again."
        ) from None

    def leaf(key: str, tensor: Any) -> Leaf:
        def read(index: Index) -> np.ndarray:
            part = tensor[index]
            return part.float().numpy().astype(ml_dtypes.bfloat16) if part.dtype == torch.bfloat16 else part.numpy()

        dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
        return file_leaf(f"{file}: the tensor {key}", tensor.shape, dtype, read)

    others = (
        [str(key) for key, value in state.items() if not isinstance(value, torch.Tensor)]
        if isinstance(state, dict)
        else ["no dict"]
    )
    if others:
        raise UserError(f"{file} holds {some(others)} beside tensors; save the model's state_dict alone.")
    return {key: leaf(key, tensor) for key, tensor in state.items()}


READERS: dict[str, Callable[[str, str], Tensors]] = {"model.safetensors": _open_safetensors, "pytorch_model.bin": _open_bin}
