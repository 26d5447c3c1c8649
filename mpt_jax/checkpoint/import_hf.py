"""Import of a Hugging Face T5 folder: `config.json` with safetensors (one file or shards) or PyTorch `.bin` files.

Strict: every leaf is filled from the file, every tensor of the file is used or listed in `hf_format`, shapes must agree.
Nothing is ever filled with random numbers.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from mpt_jax.checkpoint import hf_format
from mpt_jax.checkpoint.leaves import FLOATS, Index, Leaf, Leaves, equal, file_leaf, some, stack, to_numpy, transposed
from mpt_jax.config import T5Config
from mpt_jax.errors import UserError
from mpt_jax.models.t5 import Params, param_shapes
from mpt_jax.trees import flatten, unflatten

Tensors = dict[str, Leaf]  # by Hugging Face's name
NUMERICS = ("dropout_rate", "dtype", "param_dtype", "remat")  # of T5Config; the other fields are the architecture
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"} | {
    f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}


def import_hf(folder: str | Path, config: T5Config | None = None) -> tuple[T5Config, Params]:
    """Reads a Hugging Face T5 folder → (configuration, parameters as NumPy arrays of `config.param_dtype`).

    With `config`, the folder's architecture must equal it, and its dtypes and remat policy are kept; without, the folder's
    architecture comes with T5Config's defaults. Raises UserError for missing, unexpected, misshapen or unreadable tensors.
    """
    config, leaves = open_hf(folder, config)
    return config, unflatten({path: to_numpy(leaf, config.param_dtype) for path, leaf in leaves.items()})


def open_hf(folder: str | Path, config: T5Config | None = None) -> tuple[T5Config, Leaves]:
    """What `import_hf` reads, with names and shapes checked and no weight read yet (but copies of the embedding compared)."""
    folder = Path(folder)
    values = read_config(folder)
    tensors, weights_file = _open_weights(folder)
    found = hf_format.parse_config(values, _is_tied(values, tensors, folder), str(folder / "config.json"))
    found.validate()
    if config is None:
        config = found
    check_architecture(config, found, str(folder))
    sources = hf_format.leaf_sources(config)
    _check_names(sources, tensors, config, weights_file)

    leaves: Leaves = {}
    for path, leaf in flatten(param_shapes(config)).items():
        source, is_stacked = sources[path], "/layers/" in path
        shape = leaf.shape[1:] if is_stacked else leaf.shape
        keys = source.keys(leaf.shape[0] if is_stacked else 1)
        layers = [_check_tensor(tensors[key], key, shape, source.transpose, weights_file) for key in keys]
        leaves[path] = stack(layers) if is_stacked else layers[0]
    return config, leaves


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json as a dict."""
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}); give a Hugging Face folder with config.json and weights."
        ) from None
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); copy the folder again.") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no JSON object; copy the folder again.")
    return values


def check_architecture(wanted: T5Config, found: T5Config, where: str) -> None:
    """UserError naming every field in which the configured architecture differs from the checkpoint's."""
    fields = [field.name for field in dataclasses.fields(T5Config) if field.name not in NUMERICS]
    wrong = [
        f"{name}={getattr(found, name)!r}, not {getattr(wanted, name)!r}"
        for name in fields
        if getattr(wanted, name) != getattr(found, name)
    ]
    if wrong:
        raise UserError(
            f"The checkpoint {where} has {'; '.join(wrong)} as T5Config says; choose the matching gin/backbones file."
        )


def _is_tied(values: dict[str, Any], tensors: Tensors, folder: Path) -> bool:
    """Tied (1.0) or untied (1.1) by what is in the file: `tie_word_embeddings` alone is true in both under transformers 5."""
    scaled = hf_format.outputs_are_scaled(values)
    if "lm_head.weight" not in tensors:
        if not scaled:
            raise UserError(
                f"{folder} has no lm_head.weight, but its config.json has scale_decoder_outputs (or tie_word_embeddings) false, "
                "as models with their own output layer do; the weights are incomplete."
            )
        return True
    if not scaled:
        return False
    if "shared.weight" in tensors and equal(tensors["lm_head.weight"], tensors["shared.weight"]):
        return True
    raise UserError(
        f"{folder} has its own lm_head.weight, but its config.json has scale_decoder_outputs (or tie_word_embeddings) = true; "
        "set scale_decoder_outputs to false there if this is a T5 1.1."
    )


def _check_names(sources: dict[str, hf_format.Source], tensors: Tensors, config: T5Config, file: str) -> None:
    layers = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers, "token_embedder": 1}
    wanted = {key for path, source in sources.items() for key in source.keys(layers[path.split("/")[0]])}
    if missing := wanted - tensors.keys():
        raise UserError(f"{file} lacks {some(missing)}; the file is incomplete or of another model.")
    repeats = [key for key in (*hf_format.COPIES_OF_EMBEDDING, "lm_head.weight") if key in tensors and key not in wanted]
    if extra := tensors.keys() - wanted - set(repeats) - set(hf_format.IGNORED):
        raise UserError(f"{file} holds {some(extra)}, which this T5 has no place for; it is of another model.")
    for key in repeats:
        if not equal(tensors[key], tensors["shared.weight"]):
            raise UserError(
                f"{file} holds a {key} that differs from shared.weight; models with several embeddings are not supported."
            )


def _check_tensor(tensor: Leaf, key: str, shape: tuple[int, ...], transpose: bool, file: str) -> Leaf:
    """The tensor as one layer of our tree has it, of this shape."""
    expected = shape[::-1] if transpose else shape
    if tensor.shape != expected:
        raise UserError(
            f"{file}: {key} has the shape {list(tensor.shape)}, but config.json wants {list(expected)}; copy both again."
        )
    if tensor.dtype not in FLOATS:
        raise UserError(f"{file}: {key} is {tensor.dtype}, but weights must be float32, float16 or bfloat16.")
    return transposed(tensor, (1, 0)) if transpose else tensor


def _open_weights(folder: Path) -> tuple[Tensors, str]:
    """The tensors of the folder by name, and the file to name in errors."""
    for stem, read in (("model.safetensors", _open_safetensors), ("pytorch_model.bin", _open_bin)):
        if (folder / stem).exists():
            return read(folder / stem), str(folder / stem)
        index = folder / f"{stem}.index.json"
        if index.exists():
            return _open_shards(index, read), str(index)
    raise UserError(f"{folder} has no model.safetensors, nor an index of shards; give a Hugging Face folder with weights.")


def _open_shards(index: Path, read: Callable[[Path], Tensors]) -> Tensors:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{index} is not a readable index with a 'weight_map'; copy the folder again.") from None
    shards = {name: read(index.parent / name) for name in sorted(set(weight_map.values()))}
    for key, name in weight_map.items():
        if key not in shards[name]:
            raise UserError(f"{index} says that {key} is in {name}, but it is not; copy the folder again.")
    if unlisted := {key for shard in shards.values() for key in shard} - weight_map.keys():
        raise UserError(f"The shards of {index} hold {some(unlisted)}, which the index does not list; copy the folder again.")
    return {key: shards[name][key] for key, name in weight_map.items()}


def _open_safetensors(file: Path) -> Tensors:
    def leaf(handle: Any, key: str) -> Leaf:
        def read(index: Index) -> np.ndarray:
            # Opened for each part: the pages of a file that stays mapped count as this process's memory.
            with safe_open(file, framework="numpy") as handle:
                return handle.get_slice(key)[index]

        found = handle.get_slice(key)
        dtype = np.dtype(_DTYPES.get(found.get_dtype(), "object"))
        return file_leaf(f"{file}: the tensor {key}", found.get_shape(), dtype, read)

    try:
        with safe_open(file, framework="numpy") as handle:
            return {key: leaf(handle, key) for key in handle.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); it is missing or truncated, so copy it again.") from None


def _open_bin(file: Path) -> Tensors:
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
