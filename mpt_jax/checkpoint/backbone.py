"""Where the frozen T5 comes from: the embedded one, a folder, or random weights when asked for by name."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpt_jax.checkpoint.import_hf import import_hf
from mpt_jax.config import BackboneConfig, nearest
from mpt_jax.errors import UserError
from mpt_jax.models.t5 import T5, Params, init_params, mimetic
from mpt_jax.trees import fingerprint

ASSETS = Path(__file__).resolve().parent.parent / "assets"
VOCABULARY_NAMES = ("sentencepiece.model", "spiece.model")


class Backbone(NamedTuple):
    model: T5
    params: Params  # jax.Arrays of `model.config.param_dtype`
    fingerprint: str  # of the checkpoint in float32: the same whatever param_dtype it is loaded with
    vocabulary: Path  # SentencePiece file


def load_backbone(cfg: BackboneConfig, key: jax.Array | None = None) -> Backbone:
    """Loads the backbone that `cfg` names; its architecture must be exactly `cfg.architecture`.

    `cfg.checkpoint` is "embedded:NAME", a Hugging Face folder, a run of ours that tuned a model, or "scratch", which draws
    random weights from `key` and happens for no other value. Raises UserError for whatever does not fit.
    """
    config = cfg.architecture
    config.validate()
    if cfg.checkpoint == "scratch":
        if key is None:
            raise UserError("BackboneConfig.checkpoint='scratch' is for training only; give the folder of a trained model.")
        vocabulary = _vocabulary(cfg, None)
        params = mimetic(init_params(dataclasses.replace(config, param_dtype="float32"), key), config, cfg.mimetic_heads)
    else:
        folder = locate(cfg.checkpoint)
        _check_holds_model(folder)
        vocabulary = _vocabulary(cfg, folder)
        params = import_hf(folder, dataclasses.replace(config, param_dtype="float32"))[1]
    digest = fingerprint(params)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.dtype(config.param_dtype)), params)
    return Backbone(T5(config), params, digest, vocabulary)


def locate(checkpoint: str) -> Path:
    """The folder that a checkpoint's name stands for."""
    if checkpoint.startswith("embedded:"):
        name = checkpoint.removeprefix("embedded:")
        folder = ASSETS / name
        if not name or not folder.is_dir():
            names = sorted(path.name for path in ASSETS.iterdir() if path.is_dir()) if ASSETS.is_dir() else []
            raise UserError(
                f"There is no embedded checkpoint '{name}'; the package has: {', '.join(names) or 'none'}.{nearest(name, names)}"
            )
        return folder
    folder = Path(checkpoint).expanduser()
    if not checkpoint or not folder.is_dir():
        raise UserError(
            f"The checkpoint folder '{checkpoint}' (INITIAL_CHECKPOINT_PATH) does not exist; "
            "give a Hugging Face folder, 'embedded:mini', or 'scratch' to train from random weights."
        )
    if (folder / "model" / "config.json").exists() and not (folder / "model.safetensors").exists():
        return folder / "model"  # a run of ours that tuned the whole model; its own config.json is the run's
    return folder


def _check_holds_model(folder: Path) -> None:
    if (folder / "checkpoint").exists() or (folder / "state").exists():
        raise UserError(f"{folder} is a T5X checkpoint, which cannot be read yet; convert it to a Hugging Face folder first.")
    if not any(path.is_file() for pattern in ("model.safetensors*", "pytorch_model.bin*") for path in folder.glob(pattern)):
        raise UserError(
            f"The checkpoint folder {folder} (INITIAL_CHECKPOINT_PATH) holds no model; give a Hugging Face folder with weights "
            "or a finished run that tuned a model."
        )


def _vocabulary(cfg: BackboneConfig, folder: Path | None) -> Path:
    if cfg.vocabulary:
        path = Path(cfg.vocabulary).expanduser()
        if not path.is_file():
            raise UserError(f"BackboneConfig.vocabulary '{cfg.vocabulary}' does not exist; give a SentencePiece .model file.")
        return path
    for name in VOCABULARY_NAMES if folder else ():
        if folder is not None and (folder / name).is_file():
            return folder / name
    where = (
        f"{folder} has no {' or '.join(VOCABULARY_NAMES)}" if folder else "A backbone from scratch has no vocabulary of its own"
    )
    raise UserError(f"{where}; set BackboneConfig.vocabulary to the SentencePiece file.")
