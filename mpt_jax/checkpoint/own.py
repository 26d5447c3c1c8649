"""Our own form of a backbone: what the `import` command writes, once, and every later run streams into its sharding.

    card.json               architecture, source, the digest of each leaf, the fingerprint of all
    params/                 an Orbax checkpoint of our tree (zarr, a folder for each leaf) in the source's dtype
    sentencepiece.model     where the source has one or one was given

Local or gs://BUCKET/…. The card is written last, so a folder with a card is whole. Chunks hold parts of one layer, so that a
device that has a part of the model reads that part.
"""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

import mpt_jax
from mpt_jax.checkpoint import storage
from mpt_jax.checkpoint.leaves import Leaves, some, to_numpy
from mpt_jax.checkpoint.t5x_files import find_t5x, open_target
from mpt_jax.config import NUMERICS, T5Config
from mpt_jax.errors import UserError
from mpt_jax.models.t5 import param_shapes
from mpt_jax.trees import LeafDigest, combine, flatten, unflatten

CARD, PARAMS, VOCABULARY = "card.json", "params", "sentencepiece.model"
FORMAT = "mpt_jax backbone 1"
CHUNK = 2**26  # bytes that lie together in a file: what a reader can take at once


class Card(NamedTuple):
    """What `card.json` says."""

    architecture: T5Config
    source: str  # what was imported
    dtype: str  # of the weights in the files
    digests: dict[str, str]  # `trees.LeafDigest` of each leaf
    vocabulary: str  # the file's name, "bytes", or "" for none
    fingerprint: str


def read_card(folder: str) -> Card | None:
    """The card of a folder of ours, None for any other. UserError for a damaged one."""
    values = storage.read_json(folder, CARD)
    if values is None or values.get("format") != FORMAT:
        return None
    try:
        architecture = T5Config(**values["architecture"])
        card = Card(architecture, *(values[name] for name in Card._fields[1:]))
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}/{CARD} is damaged ({error}); import the backbone again.") from None
    if combine(card.digests) != card.fingerprint:
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


def write_own(folder: str, config: T5Config, leaves: Leaves, source: str, vocabulary: str | Path) -> Card:
    """Writes a backbone as a folder of ours; one leaf after another is in memory.

    Args:
        config: the architecture; its numerics are not kept, for they belong to a run.
        source: what the leaves come from, for the card.
        vocabulary: a local SentencePiece file, "bytes", or "" for none.

    Raises:
        UserError: the folder is not empty or cannot be written; a leaf that cannot be read.
    """
    dtype = stored_dtype(leaves)
    _check_empty(folder)
    digests: dict[str, str] = {}
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every leaf otherwise
    try:
        for path, array in _arrays(leaves, dtype, digests):
            with _context(path):
                ocp.partial.save(f"{folder}/{PARAMS}", {"params": unflatten({path: array})})
        with ocp.Context():
            ocp.partial.finalize(f"{folder}/{PARAMS}")
        name = str(vocabulary)
        if Path(name).is_file():
            storage.write(folder, VOCABULARY, Path(name).read_bytes())
            name = VOCABULARY
        architecture = {field: value for field, value in dataclasses.asdict(config).items() if field not in NUMERICS}
        card = Card(T5Config(**architecture), source, dtype, digests, name, combine(digests))
        values = {"format": FORMAT, **card._asdict(), "architecture": architecture}
        storage.write_json(folder, CARD, values | {"versions": {"mpt_jax": mpt_jax.__version__}})
    except OSError as error:
        raise UserError(f"The backbone cannot be written to {folder} ({error}); choose another folder.") from None
    return card


def stored_dtype(leaves: Leaves) -> str:
    """The dtype that holds every leaf exactly: "bfloat16" where all are that, else "float32"."""
    return "bfloat16" if all(leaf.dtype == "bfloat16" for leaf in leaves.values()) else "float32"


def _arrays(leaves: Leaves, dtype: str, digests: dict[str, str]) -> Iterator[tuple[str, np.ndarray]]:
    """Each leaf whole; its digest is added to `digests`."""
    for path in sorted(leaves):
        digest = LeafDigest(leaves[path].shape)
        yield path, to_numpy(leaves[path], dtype, digest)
        digests[path] = digest.result()


def _context(path: str) -> ocp.Context:
    """How a leaf is written."""
    context = ocp.Context()
    saving = context.array.saving
    saving.use_zarr3 = saving.use_compression = False  # zarr is what the reader knows, and weights hardly shrink
    saving.use_ocdbt = False  # a database would be copied at each addition
    saving.storage_options.chunk_byte_size = CHUNK
    saving.storage_options.shard_axes = (0,) if "/layers/" in path else ()
    return context


def _check_empty(folder: str) -> None:
    if storage.list_names(folder, storage.open_store(folder)):
        raise UserError(f"{folder} is not empty; give a new folder for the backbone.")
