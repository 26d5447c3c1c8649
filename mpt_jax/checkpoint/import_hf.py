"""Import of a Hugging Face T5 folder: `config.json` with safetensors (one file or shards) or PyTorch `.bin` files.

Strict: every leaf is filled from the file, every tensor of the file is used or listed in `hf_format`, shapes must agree.
Nothing is ever filled with random numbers.
"""

import dataclasses
from pathlib import Path
from typing import Any

from mpt_jax.checkpoint import hf_format, storage
from mpt_jax.checkpoint.hf_files import Tensors, open_weights
from mpt_jax.checkpoint.leaves import FLOATS, Leaf, Leaves, equal, some, stack, to_numpy, transposed
from mpt_jax.config import NUMERICS, T5Config
from mpt_jax.errors import UserError
from mpt_jax.models.t5 import Params, param_shapes
from mpt_jax.trees import flatten, unflatten


def import_hf(folder: str | Path, config: T5Config | None = None) -> tuple[T5Config, Params]:
    """Reads a Hugging Face T5 folder → (configuration, parameters as NumPy arrays of `config.param_dtype`).

    With `config`, the folder's architecture must equal it, and its dtypes and remat policy are kept; without, the folder's
    architecture comes with T5Config's defaults. Raises UserError for missing, unexpected, misshapen or unreadable tensors.
    """
    config, leaves = open_hf(folder, config)
    return config, unflatten({path: to_numpy(leaf, config.param_dtype, path) for path, leaf in leaves.items()})


def open_hf(folder: str | Path, config: T5Config | None = None) -> tuple[T5Config, Leaves]:
    """What `import_hf` reads, with names and shapes checked and no weight read yet (but copies of the embedding compared)."""
    folder = str(folder)
    values = storage.read_json(folder, "config.json")
    if values is None:
        raise UserError(f"{folder}/config.json does not exist; give a Hugging Face folder with config.json and weights.")
    tensors, weights_file = open_weights(folder)
    found = hf_format.parse_config(values, _is_tied(values, tensors, folder), f"{folder}/config.json")
    found.validate()
    if config is None:
        config = found
    check_architecture(config, found, folder)
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


def _is_tied(values: dict[str, Any], tensors: Tensors, folder: str) -> bool:
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
