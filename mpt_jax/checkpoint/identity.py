"""Which weights a checkpoint holds, told without loading them."""

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpt_jax.checkpoint import storage
from mpt_jax.checkpoint.backbone import load_backbone, locate, open_checkpoint
from mpt_jax.checkpoint.leaves import blocks
from mpt_jax.config import BackboneConfig, DataConfig
from mpt_jax.data.cache import cache_root
from mpt_jax.data.fingerprint import digest
from mpt_jax.files import write_text
from mpt_jax.trees import LeafDigest, combine


def fingerprint_of(cfg: BackboneConfig, data: DataConfig, key: jax.Array) -> str:
    """`Backbone.fingerprint` of what `load_backbone` would load; of random weights from `key`, which are drawn for it.

    What `import` wrote says so itself. Of other files each weight is read once, a few rows at a time, and the answer is kept
    beside the token caches until a file's size or times change; what is in a bucket is taken to stay as it was when last loaded.

    Raises:
        UserError: as `load_backbone`.
    """
    if cfg.checkpoint == "scratch":
        return load_backbone(cfg, key).fingerprint
    note = _note(cfg, data)
    if note.exists():
        return note.read_text().strip()
    opened = open_checkpoint(cfg.checkpoint, dataclasses.replace(cfg.architecture, param_dtype="float32"))  # as the files have it
    if opened.card is not None:
        return opened.card.fingerprint
    print(f"reading the weights in {opened.folder} once, to know them again", file=sys.stderr, flush=True)
    digests = {}
    for path, leaf in opened.leaves.items():
        of_leaf = LeafDigest(leaf.shape)
        for _, values in blocks(leaf):
            of_leaf.add(values.astype(np.float32))
        digests[path] = of_leaf.result()
    found = combine(digests)
    _keep(note, found)
    return found


def remember(cfg: BackboneConfig, data: DataConfig, fingerprint: str) -> None:
    """Spares `fingerprint_of` the reading of a checkpoint that has just been loaded."""
    if cfg.checkpoint != "scratch":
        _keep(_note(cfg, data), fingerprint)


def _keep(note: Path, fingerprint: str) -> None:
    with contextlib.suppress(OSError):  # token caches may be others', and only to be read
        write_text(note, fingerprint + "\n")


def _note(cfg: BackboneConfig, data: DataConfig) -> Path:
    """The file that keeps the answer for the checkpoint's files as they are now."""
    state: list[Any] = [cfg.checkpoint]
    if not storage.is_remote(cfg.checkpoint):
        place = locate(cfg.checkpoint).resolve()
        files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
        stats = [(str(path), path.stat()) for path in files]
        state = [(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]
    return cache_root(data) / "_backbones" / digest(repr(state))
