"""Our own form of a backbone: what the `import` command writes, once, and every later run streams into its sharding.

    card.json               architecture, source, the digest of each leaf and of the vocabulary, the fingerprint of all leaves
    params/                 an Orbax checkpoint of our tree (zarr, a folder for each leaf) in `stored_dtype`
    sentencepiece.model     where the source has one or one was given

Written locally, read there or from gs://BUCKET/…. A chunk is always read whole: the matrix of a layer or, of one beyond CHUNK
bytes, a part of it. A host whose devices have a part of each matrix thus reads nearly everything of a T5 below XXL.
"""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

import mpt_jax
from mpt_jax.checkpoint import storage
from mpt_jax.checkpoint.leaves import Leaves, some, to_numpy
from mpt_jax.checkpoint.t5x_files import find_t5x, open_target
from mpt_jax.config import NUMERICS, T5Config
from mpt_jax.data.vocabulary import BYTES, FILE_NAMES
from mpt_jax.errors import UserError
from mpt_jax.files import write_text
from mpt_jax.models.t5 import param_shapes
from mpt_jax.trees import LeafDigest, combine, flatten, unflatten

CARD, PARAMS = "card.json", "params"
FORMAT = "mpt_jax backbone 1"
CHUNK = 2**26  # bytes that lie together in a file: what a reader can take at once


class Card(NamedTuple):
    """What `card.json` says."""

    architecture: T5Config
    source: str  # what was imported
    dtype: str  # of the weights in the files
    digests: dict[str, str]  # `trees.LeafDigest` of each leaf
    vocabulary: str  # the file's name, "bytes", or "" for none
    vocabulary_sha256: str  # of the file; "" where there is none
    assumed: str  # what of the architecture the source did not say (`import_t5x.ASSUMED`); "" for nothing
    fingerprint: str


def read_card(folder: str) -> Card | None:
    """The card of a folder of ours, None for any other. UserError for a damaged one."""
    text = storage.read(storage.open_store(folder), CARD)
    values = storage.json_object(text)
    if values is None and FORMAT.encode() in (text or b""):
        raise UserError(f"{folder}/{CARD} is damaged (it is no whole JSON); import the backbone again.")
    if values is None or values.get("format") != FORMAT:
        return None
    try:
        architecture = T5Config(**values["architecture"])
        card = Card(architecture, *(values[name] for name in Card._fields[1:]))
        fingerprint = combine(card.digests)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}/{CARD} is damaged ({error}); import the backbone again.") from None
    if fingerprint != card.fingerprint:
        raise UserError(f"{folder}/{CARD} is damaged (its digests do not make its fingerprint); import the backbone again.")
    return card


def open_own(folder: str, card: Card) -> Leaves:
    """The leaves of a folder of ours, with names and shapes checked and nothing read yet. UserError for what does not fit."""
    place = find_t5x(f"{folder}/{PARAMS}")
    if place is None:
        raise UserError(f"{folder} has a {CARD} but no whole Orbax checkpoint in {PARAMS}; import the backbone again.")
    leaves = open_target(place)
    shapes = {path: leaf.shape for path, leaf in flatten(param_shapes(card.architecture)).items()}
    if wrong := {path for path in shapes.keys() | leaves.keys() if path not in leaves or leaves[path].shape != shapes.get(path)}:
        raise UserError(f"{place.name} does not hold what {folder}/{CARD} says of {some(wrong)}; import the backbone again.")
    return leaves


def check_digests(card: Card, fingerprint: str, digests: dict[str, str], folder: str) -> None:
    """UserError when what was read is not what was written. Processes that read only parts have no `digests` to name leaves."""
    if fingerprint != card.fingerprint:
        changed = some(path for path, digest in digests.items() if card.digests[path] != digest) or "some leaf"
        raise UserError(f"{folder} was changed after it was written: {changed}; import the backbone again.")


def check_vocabulary_file(card: Card, file: Path, folder: str) -> None:
    """UserError when this is not the vocabulary that was written."""
    if hashlib.sha256(file.read_bytes()).hexdigest() != card.vocabulary_sha256:
        raise UserError(f"{folder}/{card.vocabulary} was changed after it was written; import the backbone again.")


def write_own(folder: Path, config: T5Config, leaves: Leaves, source: str, vocabulary: str, assumed: str = "") -> Card:
    """Writes a backbone as a folder of ours, one leaf after another, the card last.

    Args:
        folder: an absolute path.
        config: the architecture; its numerics are not kept, for they belong to a run.
        source: what the leaves come from, for the card; `assumed` as there.
        vocabulary: a local SentencePiece file, "bytes", or "" for none.

    Raises:
        OSError: the folder cannot be written.
        UserError: a leaf that cannot be read.
    """
    dtype, digests = stored_dtype(leaves), {}
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells of every leaf otherwise, and of a full disk in each thread
    for path in sorted(leaves):
        digest = LeafDigest(leaves[path].shape)
        _write_leaf(folder / PARAMS, path, to_numpy(leaves[path], dtype, path, digest))
        digests[path] = digest.result()
    with ocp.Context():
        ocp.partial.finalize(folder / PARAMS)
    name, sha256 = vocabulary, ""
    if vocabulary not in ("", BYTES):
        content, name = Path(vocabulary).read_bytes(), FILE_NAMES[0]
        (folder / name).write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
    architecture = {field: value for field, value in dataclasses.asdict(config).items() if field not in NUMERICS}
    card = Card(T5Config(**architecture), source, dtype, digests, name, sha256, assumed, combine(digests))
    values = {"format": FORMAT, **card._asdict(), "architecture": architecture, "versions": {"mpt_jax": mpt_jax.__version__}}
    write_text(folder / CARD, json.dumps(values, indent=1) + "\n")
    return card


def stored_dtype(leaves: Leaves) -> str:
    """The dtype that a converted model gets: "bfloat16" where all leaves have it, else "float32".

    It holds every leaf exactly but those in float64, which are rounded.
    """
    return "bfloat16" if all(leaf.dtype == "bfloat16" for leaf in leaves.values()) else "float32"


def _write_leaf(folder: Path, path: str, array: np.ndarray) -> None:
    """Adds a leaf to an Orbax checkpoint that is not final yet. OSError where that is impossible."""
    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False  # nobody changes it
    saving = context.array.saving
    saving.use_zarr3 = saving.use_compression = False  # zarr is what the reader knows, and weights hardly shrink
    saving.use_ocdbt = False  # a database would be copied at each addition
    saving.storage_options.chunk_byte_size = CHUNK
    saving.storage_options.shard_axes = (0,) if "/layers/" in path else ()
    try:
        with context:
            ocp.partial.save(folder, {"params": unflatten({path: array})})
    except ValueError as error:
        told, is_system, _ = str(error).partition(" [os_error_code")
        if not is_system:
            raise
        raise OSError(told.rpartition(": ")[2]) from None  # TensorStore's, of a full disk, which ends with the system's words
