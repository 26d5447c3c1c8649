"""Where the frozen T5 comes from: the embedded one, files of several kinds, or random weights when asked for by name."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from mpt_jax.checkpoint.import_hf import open_hf
from mpt_jax.checkpoint.import_t5x import open_t5x
from mpt_jax.checkpoint.leaves import Leaves, load
from mpt_jax.checkpoint.t5x_files import find_t5x
from mpt_jax.config import BackboneConfig, T5Config, nearest
from mpt_jax.errors import UserError
from mpt_jax.models.t5 import T5, Params, init_params, logical_axes, mimetic, param_shapes
from mpt_jax.partitioning import tree_sharding
from mpt_jax.trees import fingerprint, flatten, unflatten

ASSETS = Path(__file__).resolve().parent.parent / "assets"
WEIGHTS = ("model.safetensors*", "pytorch_model.bin*")  # of a Hugging Face folder
VOCABULARY_NAMES = ("sentencepiece.model", "spiece.model")


class Backbone(NamedTuple):
    model: T5
    params: Params  # jax.Arrays of `model.config.param_dtype`
    fingerprint: str  # of the checkpoint in float32: the same whatever param_dtype it is loaded with
    vocabulary: Path  # SentencePiece file


def load_backbone(cfg: BackboneConfig, key: jax.Array | None = None, mesh: Mesh | None = None) -> Backbone:
    """Loads the backbone that `cfg` names; its architecture must be exactly `cfg.architecture`.

    `cfg.checkpoint` is "embedded:NAME", a T5X checkpoint, a Hugging Face folder, a run of ours that tuned a model, or
    "scratch", which draws random weights from `key` and happens for no other value. The parameters lie on `mesh` by their
    logical axes, or without one on the first device; from files they are streamed there. Raises UserError for whatever does
    not fit.
    """
    config = cfg.architecture
    config.validate()
    if cfg.checkpoint != "scratch":
        leaves, vocabulary = _open(cfg)
        params, digest = load(leaves, flatten(_shardings(config, mesh)), config.param_dtype)
        return Backbone(T5(config), unflatten(params), digest, vocabulary)
    if key is None:
        raise UserError("BackboneConfig.checkpoint='scratch' is for training only; give the folder of a trained model.")
    vocabulary = _vocabulary(cfg, None)
    drawn = mimetic(init_params(dataclasses.replace(config, param_dtype="float32"), key), config, cfg.mimetic_heads)
    digest = fingerprint(drawn)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.dtype(config.param_dtype)), drawn)
    return Backbone(T5(config), jax.device_put(drawn, _shardings(config, mesh)), digest, vocabulary)


def _shardings(config: T5Config, mesh: Mesh | None) -> Any:
    """The place of each parameter, as a tree."""
    shapes = param_shapes(config)
    if mesh is not None:
        return tree_sharding(shapes, logical_axes(config), mesh)
    device = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda _: device, shapes)


def _open(cfg: BackboneConfig) -> tuple[Leaves, Path]:
    """The checkpoint's leaves, by the kind of its files, and the vocabulary; no weight is in memory yet."""
    folder = None if cfg.checkpoint.startswith("gs://") else locate(cfg.checkpoint)
    if folder is not None and any(file.is_file() for pattern in WEIGHTS for file in folder.glob(pattern)):
        vocabulary = _vocabulary(cfg, folder)
        return open_hf(folder, cfg.architecture)[1], vocabulary
    place = find_t5x(str(folder or cfg.checkpoint))
    if place is None:
        raise UserError(
            f"The checkpoint folder {folder or cfg.checkpoint} (INITIAL_CHECKPOINT_PATH) holds no model; give a T5X checkpoint "
            "(checkpoint_<step>), a local Hugging Face folder with weights or a finished run that tuned a model."
        )
    vocabulary = _vocabulary(cfg, folder)
    return open_t5x(place, cfg.architecture), vocabulary


def locate(checkpoint: str) -> Path:
    """The local folder (or single file) that a checkpoint's name stands for."""
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
    if not checkpoint or not folder.exists():
        raise UserError(
            f"The checkpoint folder '{checkpoint}' (INITIAL_CHECKPOINT_PATH) does not exist; "
            "give a T5X checkpoint, a Hugging Face folder, 'embedded:mini', or 'scratch' to train from random weights."
        )
    if (folder / "model" / "config.json").exists() and not (folder / "model.safetensors").exists():
        return folder / "model"  # a run of ours that tuned the whole model; its own config.json is the run's
    return folder


def _vocabulary(cfg: BackboneConfig, folder: Path | None) -> Path:
    if cfg.vocabulary:
        path = Path(cfg.vocabulary).expanduser()
        if not path.is_file():
            raise UserError(f"BackboneConfig.vocabulary '{cfg.vocabulary}' does not exist; give a SentencePiece .model file.")
        return path
    for name in VOCABULARY_NAMES if folder else ():
        if folder is not None and (folder / name).is_file():
            return folder / name
    where = f"{folder or cfg.checkpoint} has no {' or '.join(VOCABULARY_NAMES)}"
    if cfg.checkpoint == "scratch":
        where = "A backbone from scratch has no vocabulary of its own"
    raise UserError(f"{where}; set BackboneConfig.vocabulary to the SentencePiece file.")
