"""Export of a T5 to a Hugging Face folder that `transformers` and `import_hf` load."""

import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from mpt_jax.checkpoint import hf_format
from mpt_jax.config import T5Config
from mpt_jax.errors import UserError
from mpt_jax.models.t5 import Params
from mpt_jax.trees import flatten

_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def export_hf(
    params: Params, config: T5Config, folder: str | Path, *, dtype: str = "float32", vocabulary: str | Path | None = None
) -> Path:
    """Writes `config.json` and `model.safetensors` (and `spiece.model`, a copy of `vocabulary`) into `folder`, which it returns.

    `dtype` is that of the file, "float32" or "bfloat16". A file is complete before it gets its name.
    """
    folder = Path(folder)
    tensors: dict[str, np.ndarray] = {}
    leaves = flatten(params)
    for path, source in hf_format.leaf_sources(config).items():
        array = np.asarray(leaves[path]).astype(_DTYPES[dtype])
        layers = array if "/layers/" in path else array[None]
        for key, one in zip(source.keys(len(layers)), layers, strict=True):
            # safetensors writes memory as it lies, so a transposed view must become an array of its own
            tensors[key] = np.ascontiguousarray(one.T if source.transpose else one)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / "model.safetensors.partial"
        save_file(tensors, partial, metadata={"format": "pt"})  # without it, transformers 4 refuses the file
        os.replace(partial, folder / "model.safetensors")
        text = json.dumps(hf_format.to_hf_config(config, dtype), indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        if vocabulary is not None:
            shutil.copyfile(vocabulary, folder / "spiece.model")
    except OSError as error:
        raise UserError(f"The model cannot be written to {folder} ({error.strerror}); choose another folder.") from None
    return folder
