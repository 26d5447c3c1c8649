"""Import of a Hugging Face T5 folder: `config.json` with safetensors (one file or shards) or PyTorch `.bin` files.

Strict: every leaf is filled from the file, every tensor of the file is used or listed in `hf_format`, shapes must agree.
Nothing is ever filled with random numbers.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from mpt_jax.checkpoint import hf_format
from mpt_jax.config import T5Config
from mpt_jax.errors import UserError
from mpt_jax.models.t5 import Params, param_shapes
from mpt_jax.trees import flatten, unflatten

Tensors = dict[str, Callable[[], np.ndarray]]  # name → reads that tensor
NUMERICS = ("dropout_rate", "dtype", "param_dtype", "remat")  # of T5Config; the other fields are the architecture
_FLOATS = (np.float32, np.float16, np.float64, ml_dtypes.bfloat16)


def import_hf(folder: str | Path, config: T5Config | None = None) -> tuple[T5Config, Params]:
    """Reads a Hugging Face T5 folder → (configuration, parameters as NumPy arrays of `config.param_dtype`).

    With `config`, the folder's architecture must equal it, and its dtypes and remat policy are kept; without, the folder's
    architecture comes with T5Config's defaults. Raises UserError for missing, unexpected, misshapen or unreadable tensors.
    """
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

    params: dict[str, np.ndarray] = {}
    for path, leaf in flatten(param_shapes(config)).items():
        layers = leaf.shape[0] if "/layers/" in path else 1
        shape = leaf.shape[1:] if "/layers/" in path else leaf.shape
        array = np.empty((layers, *shape), jnp.dtype(config.param_dtype))
        for layer, key in enumerate(sources[path].keys(layers)):
            array[layer] = _read(tensors, key, shape, sources[path].transpose, weights_file)
        params[path] = array if "/layers/" in path else array[0]
    return config, unflatten(params)


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
    if "shared.weight" in tensors and np.array_equal(tensors["lm_head.weight"](), tensors["shared.weight"]()):
        return True
    raise UserError(
        f"{folder} has its own lm_head.weight, but its config.json has scale_decoder_outputs (or tie_word_embeddings) = true; "
        "set scale_decoder_outputs to false there if this is a T5 1.1."
    )


def _check_names(sources: dict[str, hf_format.Source], tensors: Tensors, config: T5Config, file: str) -> None:
    layers = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers, "token_embedder": 1}
    wanted = {key for path, source in sources.items() for key in source.keys(layers[path.split("/")[0]])}
    if missing := wanted - tensors.keys():
        raise UserError(f"{file} lacks {_some(missing)}; the file is incomplete or of another model.")
    repeats = [key for key in (*hf_format.COPIES_OF_EMBEDDING, "lm_head.weight") if key in tensors and key not in wanted]
    if extra := tensors.keys() - wanted - set(repeats) - set(hf_format.IGNORED):
        raise UserError(f"{file} holds {_some(extra)}, which this T5 has no place for; it is of another model.")
    for key in repeats:
        if not np.array_equal(tensors[key](), tensors["shared.weight"]()):
            raise UserError(
                f"{file} holds a {key} that differs from shared.weight; models with several embeddings are not supported."
            )


def _read(tensors: Tensors, key: str, shape: tuple[int, ...], transpose: bool, file: str) -> np.ndarray:
    try:
        array = tensors[key]()
    except (SafetensorError, OSError, TypeError) as error:
        raise UserError(f"{file}: the tensor {key} cannot be read ({error}); copy the file again.") from None
    expected = shape[::-1] if transpose else shape
    if array.shape != expected:
        raise UserError(
            f"{file}: {key} has the shape {list(array.shape)}, but config.json wants {list(expected)}; copy both again."
        )
    if array.dtype not in _FLOATS:
        raise UserError(f"{file}: {key} is {array.dtype}, but weights must be float32, float16 or bfloat16.")
    return array.T if transpose else array


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
        raise UserError(f"The shards of {index} hold {_some(unlisted)}, which the index does not list; copy the folder again.")
    return {key: shards[name][key] for key, name in weight_map.items()}


def _open_safetensors(file: Path) -> Tensors:
    try:
        handle = safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); it is missing or truncated, so copy it again.") from None
    return {key: partial(handle.get_tensor, key) for key in handle.keys()}  # noqa: SIM118 (it is no dict)


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

    def to_numpy(tensor: Any) -> np.ndarray:
        if tensor.dtype == torch.bfloat16:
            return tensor.float().numpy().astype(ml_dtypes.bfloat16)
        return tensor.numpy()

    return {key: partial(to_numpy, tensor) for key, tensor in state.items()}


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
