"""Where the frozen T5 comes from: the embedded one, files of several kinds, or random weights when asked for by name."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from mpt_jax.checkpoint import storage
from mpt_jax.checkpoint.hf_files import find_weights
from mpt_jax.checkpoint.import_hf import check_architecture, open_hf
from mpt_jax.checkpoint.import_t5x import ASSUMED, open_t5x, t5x_architecture
from mpt_jax.checkpoint.leaves import Leaves, load
from mpt_jax.checkpoint.own import Card, check_digests, check_vocabulary_file, open_own, read_card
from mpt_jax.checkpoint.t5x_files import find_t5x
from mpt_jax.config import BackboneConfig, T5Config, nearest
from mpt_jax.data.vocabulary import BYTES, FILE_NAMES
from mpt_jax.errors import UserError
from mpt_jax.models.t5 import T5, Params, init_params, logical_axes, mimetic, param_shapes
from mpt_jax.partitioning import tree_sharding
from mpt_jax.trees import fingerprint, flatten, unflatten

ASSETS = Path(__file__).resolve().parent.parent / "assets"


class Backbone(NamedTuple):
    model: T5
    params: Params  # jax.Arrays of `model.config.param_dtype`
    fingerprint: str  # of the checkpoint in float32: the same whatever param_dtype it is loaded with
    vocabulary: str  # local SentencePiece file, or "bytes"


class Opened(NamedTuple):
    """A checkpoint of which no weight is in memory yet."""

    folder: str
    config: T5Config
    leaves: Leaves
    card: Card | None = None  # of a folder of ours
    assumed: str = ""  # what of `config` neither the files nor the user say


def load_backbone(cfg: BackboneConfig, key: jax.Array | None = None, mesh: Mesh | None = None) -> Backbone:
    """Loads the backbone that `cfg` names; its architecture must be exactly `cfg.architecture`.

    `cfg.checkpoint` is "embedded:NAME", a T5X checkpoint, a Hugging Face folder, one that `import` wrote, a run of ours that
    tuned a model, or "scratch", which draws random weights from `key` and happens for no other value. The parameters lie on
    `mesh` by their logical axes, or without one on the first device; from files they are streamed there. Raises UserError for
    whatever does not fit.
    """
    config = cfg.architecture
    config.validate()
    if cfg.checkpoint != "scratch":
        opened = open_checkpoint(cfg.checkpoint, dataclasses.replace(config, param_dtype="float32"))  # the tree of the files
        vocabulary = _vocabulary(cfg, opened)
        dtypes = {path: shape.dtype for path, shape in flatten(param_shapes(config)).items()}
        loaded = load(opened.leaves, flatten(_shardings(config, mesh)), dtypes)
        if opened.card is not None:
            check_digests(opened.card, loaded.fingerprint, loaded.digests, opened.folder)
        return Backbone(T5(config), unflatten(loaded.arrays), loaded.fingerprint, vocabulary)
    if key is None:
        raise UserError("BackboneConfig.checkpoint='scratch' is for training only; give the folder of a trained model.")
    vocabulary = _vocabulary(cfg, None)
    drawn = mimetic(init_params(dataclasses.replace(config, param_dtype="float32"), key), config, cfg.mimetic_heads)
    digest = fingerprint(drawn)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.dtype(config.param_dtype)), drawn)
    return Backbone(T5(config), jax.device_put(drawn, _shardings(config, mesh)), digest, vocabulary)


def open_checkpoint(checkpoint: str, config: T5Config | None = None) -> Opened:
    """Opens a checkpoint by the kind of its files.

    With `config`, the checkpoint's architecture must equal it, and its numerics are kept; without, the architecture is what the
    checkpoint says or shows. Raises UserError for what is no checkpoint or does not fit.
    """
    folder = checkpoint.rstrip("/") if storage.is_remote(checkpoint) else str(locate(checkpoint))
    is_folder = storage.is_remote(folder) or Path(folder).is_dir()
    card = read_card(folder) if is_folder else None
    if card is not None:
        if config is not None:
            check_architecture(config, card.architecture, folder)
        return Opened(folder, config or card.architecture, open_own(folder, card), card, card.assumed)
    if is_folder and find_weights(folder) is not None:
        found, leaves = open_hf(folder, config)
        return Opened(folder, found, leaves)
    place = find_t5x(folder)
    if place is None:
        raise UserError(
            f"The checkpoint folder {folder} (INITIAL_CHECKPOINT_PATH) holds no model; give a T5X checkpoint "
            "(checkpoint_<step>), a Hugging Face folder with weights, one that `import` wrote, or a finished run that "
            "tuned a model."
        )
    if config is not None:
        return Opened(folder, config, open_t5x(place, config))
    shown = t5x_architecture(place)
    return Opened(folder, shown, open_t5x(place, shown), assumed=ASSUMED[shown.activation])


def _shardings(config: T5Config, mesh: Mesh | None) -> Any:
    """The place of each parameter, as a tree."""
    shapes = param_shapes(config)
    if mesh is not None:
        return tree_sharding(shapes, logical_axes(config), mesh)
    device = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda _: device, shapes)


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
            "give a T5X checkpoint, a Hugging Face folder, one that `import` wrote, 'embedded:mini', or 'scratch' to train from "
            "random weights."
        )
    if (folder / "model" / "config.json").exists() and not (folder / "model.safetensors").exists():
        return folder / "model"  # a run of ours that tuned the whole model; its own config.json is the run's
    return folder


def own_vocabulary(opened: Opened) -> str:
    """The vocabulary that lies in a checkpoint's folder, copied here from a bucket: a local file, "bytes", or "" for none.

    Raises:
        UserError: it is not the one that `import` wrote.
    """
    folder, card = opened.folder, opened.card
    if card is not None:
        if card.vocabulary in ("", BYTES):
            return card.vocabulary
        file = storage.local_copy(f"{folder}/{card.vocabulary}", storage.CHECKPOINT)
        check_vocabulary_file(card, file, folder)
        return str(file)
    if not storage.is_remote(folder) and not Path(folder).is_dir():  # a single file
        return ""
    store = storage.open_store(folder)
    for name in FILE_NAMES:
        if storage.exists(store, name):
            return str(storage.local_copy(f"{folder}/{name}", storage.CHECKPOINT))
    tokenizer = storage.json_object(storage.read(store, "tokenizer_config.json")) or {}
    return BYTES if tokenizer.get("tokenizer_class") == "ByT5Tokenizer" else ""


def find_vocabulary(cfg: BackboneConfig) -> str:
    """The vocabulary that `load_backbone` would find, without reading a weight. UserError as there."""
    needed = not cfg.vocabulary and cfg.checkpoint != "scratch"
    return _vocabulary(cfg, open_checkpoint(cfg.checkpoint, cfg.architecture) if needed else None)


def _vocabulary(cfg: BackboneConfig, opened: Opened | None) -> str:
    """The configured vocabulary or, where none is, the checkpoint's own. UserError for a missing one."""
    if cfg.vocabulary == BYTES:
        return BYTES
    if cfg.vocabulary:
        return str(storage.local_copy(cfg.vocabulary, "BackboneConfig.vocabulary"))
    if opened is None:
        raise UserError(
            "A backbone from scratch has no vocabulary of its own; set BackboneConfig.vocabulary to the SentencePiece file."
        )
    vocabulary = own_vocabulary(opened)
    if not vocabulary:
        raise UserError(
            f"{opened.folder} has no {' or '.join(FILE_NAMES)}; set BackboneConfig.vocabulary to the SentencePiece file "
            "(or to 'bytes' for a ByT5)."
        )
    return vocabulary
