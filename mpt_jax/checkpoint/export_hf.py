"""Export of a T5 to a Hugging Face folder that `transformers` and `import_hf` load."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from mpt_jax.checkpoint import hf_format
from mpt_jax.checkpoint.leaves import Leaf, Leaves, in_memory, whole
from mpt_jax.config import T5Config
from mpt_jax.data.vocabulary import BYTES
from mpt_jax.errors import UserError
from mpt_jax.files import replacing, write_text
from mpt_jax.models.t5 import Params
from mpt_jax.trees import flatten

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SHARD = 5 * 10**9  # bytes of one file at most, as transformers has had it

Tensor = tuple[str, Leaf, bool]  # Hugging Face's key, a leaf of one layer, whether it is transposed


def export_hf(
    params: Params, config: T5Config, folder: str | Path, *, dtype: str = "float32", vocabulary: str | Path = ""
) -> Path:
    """`write_hf` of a tree of arrays."""
    return write_hf(in_memory(flatten(params)), config, folder, dtype=dtype, vocabulary=vocabulary)


def write_hf(
    leaves: Leaves,
    config: T5Config,
    folder: str | Path,
    *,
    dtype: str = "float32",
    vocabulary: str | Path = "",
    shard_bytes: int = SHARD,
) -> Path:
    """Writes `config.json` and `model.safetensors`, or shards of it with their index, into `folder`, which it returns.

    A file is complete before it gets its name; one shard is in memory at a time.

    Args:
        dtype: that of the files, "float32" or "bfloat16".
        vocabulary: a SentencePiece file, copied as `spiece.model`; "bytes" names ByT5's tokenizer instead; "" writes neither.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(folder)
    shards = list(_shards(_tensors(leaves, config), _DTYPES[dtype].itemsize, shard_bytes))
    names = ["model.safetensors"] if len(shards) == 1 else [_shard_name(n, len(shards)) for n in range(len(shards))]
    try:
        for name, shard in zip(names, shards, strict=True):
            arrays = {key: _read(leaf, transpose).astype(_DTYPES[dtype]) for key, leaf, transpose in shard}
            with replacing(folder / name) as temporary:
                save_file(arrays, temporary, metadata={"format": "pt"})  # without it, transformers 4 refuses the file
        if len(shards) > 1:
            weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key, _, _ in shard}
            size = sum(math.prod(leaf.shape) for shard in shards for _, leaf, _ in shard) * _DTYPES[dtype].itemsize
            _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
        _write_json(folder / "config.json", hf_format.to_hf_config(config, dtype))
        if str(vocabulary) == BYTES:
            _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer"})
        elif vocabulary:
            shutil.copyfile(vocabulary, folder / "spiece.model")
    except OSError as error:
        raise UserError(f"The model cannot be written to {folder} ({error.strerror}); choose another folder.") from None
    return folder


def _tensors(leaves: Leaves, config: T5Config) -> Iterator[Tensor]:
    """Every tensor of the file, in the order of our tree."""
    for path, source in hf_format.leaf_sources(config).items():
        leaf = leaves[path]
        if "/layers/" not in path:
            yield source.key, leaf, source.transpose
            continue
        for number, key in enumerate(source.keys(leaf.shape[0])):
            yield key, _layer(leaf, number), source.transpose


def _layer(leaf: Leaf, number: int) -> Leaf:
    """One layer of a leaf [layers, ...]."""
    return Leaf(leaf.shape[1:], leaf.dtype, leaf.chunks[1:], lambda index: leaf.read((slice(number, number + 1), *index))[0])


def _read(leaf: Leaf, transpose: bool) -> np.ndarray:
    # safetensors writes memory as it lies, so a transposed view must become an array of its own
    array = leaf.read(whole(leaf.shape))
    return np.ascontiguousarray(array.T if transpose else array)


def _shards(tensors: Iterator[Tensor], itemsize: int, limit: int) -> Iterator[list[Tensor]]:
    """The tensors in files of at most `limit` bytes, or of one tensor that is larger."""
    shard: list[Tensor] = []
    size = 0
    for tensor in tensors:
        more = math.prod(tensor[1].shape) * itemsize
        if shard and size + more > limit:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += more
    yield shard


def _shard_name(number: int, shards: int) -> str:
    return f"model-{number + 1:05}-of-{shards:05}.safetensors"


def _write_json(file: Path, values: dict[str, object]) -> None:
    write_text(file, json.dumps(values, indent=2, sort_keys=True) + "\n")
