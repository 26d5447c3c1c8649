"""Export of a T5 to a Hugging Face folder that `transformers` and `import_hf` load."""

import functools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mpt_jax.checkpoint import hf_format
from mpt_jax.checkpoint.leaves import Index, Leaf, Leaves, cast, in_memory, layer, reason, whole
from mpt_jax.config import T5Config
from mpt_jax.data.vocabulary import BYTES, FILE_NAMES, SentencePieceVocabulary
from mpt_jax.errors import UserError
from mpt_jax.files import replacing, write_text
from mpt_jax.models.t5 import Params
from mpt_jax.trees import flatten

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
CONFIG = "config.json"
_TOKENIZER = "tokenizer_config.json"
SHARD = 5 * 10**9  # bytes of one file at most, as transformers has had it

Tensor = tuple[str, Leaf, bool]  # Hugging Face's key, a leaf of one layer, whether it is transposed


def export_hf(
    params: Params, config: T5Config, folder: str | Path, *, dtype: str = "float32", vocabulary: str | Path = ""
) -> Path:
    """`write_hf` of a tree of arrays. Returns the folder. UserError where it cannot be written."""
    try:
        write_hf(in_memory(flatten(params)), config, Path(folder), dtype=dtype, vocabulary=vocabulary)
    except (OSError, SafetensorError) as error:
        raise UserError(f"The model cannot be written to {folder} ({reason(error)}); choose another folder.") from None
    return Path(folder)


def write_hf(
    leaves: Leaves,
    config: T5Config,
    folder: Path,
    *,
    dtype: str = "float32",
    vocabulary: str | Path = "",
    shard_bytes: int = SHARD,
) -> None:
    """Writes `config.json`, `model.safetensors` (or shards of it with their index) and what names the tokenizer.

    A file is complete before it gets its name; one shard is in memory at a time, and the layers that lie together in a leaf.

    Args:
        dtype: that of the files, "float32" or "bfloat16".
        vocabulary: a SentencePiece file, copied as `spiece.model`; "bytes" names ByT5's tokenizer instead; "" writes neither.

    Raises:
        OSError, SafetensorError: the folder cannot be written.
        UserError: a weight that cannot be read, or that `dtype` cannot hold.
    """
    numpy_dtype = _DTYPES[dtype]
    shards = list(_shards(_tensors(leaves, config), numpy_dtype.itemsize, shard_bytes))
    names = ["model.safetensors"] if len(shards) == 1 else [_shard_name(n, len(shards)) for n in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, numpy_dtype)
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key, _, _ in shard}
        size = sum(math.prod(leaf.shape) for shard in shards for _, leaf, _ in shard) * numpy_dtype.itemsize
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    _write_tokenizer(folder, str(vocabulary))
    _write_json(folder / CONFIG, hf_format.to_hf_config(config, dtype))


def _write_tokenizer(folder: Path, vocabulary: str) -> None:
    """Files by which `transformers` makes the tokenizer; it adds 100 sentinels to a T5's unless it is told not to."""
    if vocabulary == BYTES:
        _write_json(folder / _TOKENIZER, {"tokenizer_class": "ByT5Tokenizer"})
    elif vocabulary:
        with replacing(folder / FILE_NAMES[1]) as temporary:
            shutil.copyfile(vocabulary, temporary)
        extra_ids = SentencePieceVocabulary(vocabulary).extra_ids
        _write_json(folder / _TOKENIZER, {"tokenizer_class": "T5Tokenizer", "extra_ids": extra_ids})


def _tensors(leaves: Leaves, config: T5Config) -> Iterator[Tensor]:
    """Every tensor of the file, in the order of our tree. Layers that lie together are read once and kept until others are."""

    @functools.lru_cache(maxsize=1)
    def together(path: str, first: int) -> np.ndarray:
        leaf = leaves[path]
        return leaf.read((slice(first, min(first + leaf.chunks[0], leaf.shape[0])), *whole(leaf.shape[1:])))

    def one(path: str, number: int) -> Leaf:
        leaf = leaves[path]

        def read(index: Index) -> np.ndarray:
            first = number - number % leaf.chunks[0]
            return together(path, first)[number - first][index]

        return layer(leaf, number) if leaf.chunks[0] == 1 else Leaf(leaf.shape[1:], leaf.dtype, leaf.chunks[1:], read)

    for path, source in hf_format.leaf_sources(config).items():
        leaf = leaves[path]
        if "/layers/" not in path:
            yield source.key, leaf, source.transpose
            continue
        for number, key in enumerate(source.keys(leaf.shape[0])):
            yield key, one(path, number), source.transpose


def _write_shard(file: Path, shard: list[Tensor], dtype: np.dtype) -> None:
    arrays = {key: _read(leaf, transpose, dtype, key) for key, leaf, transpose in shard}
    with replacing(file) as temporary:
        save_file(arrays, temporary, metadata={"format": "pt"})  # without it, transformers 4 refuses the file


def _read(leaf: Leaf, transpose: bool, dtype: np.dtype, name: str) -> np.ndarray:
    array = cast(leaf.read(whole(leaf.shape)), dtype, name)
    # A copy: safetensors writes memory as it lies, and a view would keep all layers that were read together.
    return np.array(array.T if transpose else array, order="C")


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
