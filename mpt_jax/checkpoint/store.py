"""Checkpoints of a run (Orbax): what a step changes, the best so far, and the loader's place. Never the frozen backbone.

    <MODEL_DIR>/checkpoints/<step>/state   step, trainable, opt_state, key
                                  /best    the best trainable of each group, with score [G] and step [G], when there is validation
                                  /meta    JSON: fingerprints of the backbone and of the training data, and what `save` was given
                                  /files.json    size and checksum of each of these files
            damaged/<step>                what was a checkpoint

Orbax writes into a temporary folder and renames it, so a killed run leaves whole checkpoints, and perhaps a partial one that the
next call deletes. `files.json` is written after that; it finds files that were damaged later, before Orbax reads them. The run
then goes on from the checkpoint before.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from mpt_jax import distributed
from mpt_jax.errors import UserError
from mpt_jax.files import write_text

Tree = Any
PARTIAL = "*.orbax-checkpoint-tmp*"  # what Orbax calls a checkpoint that is not yet whole
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space on the disk, of the user's quota, or of a file (ulimit -f)

logger = logging.getLogger("mpt_jax")


class Damaged(Exception):
    """A checkpoint cannot be read: why, with the file's name."""


class Restored(NamedTuple):
    """A checkpoint read back. `best` is None when it has none or none was asked for."""

    state: Tree
    best: Tree | None
    meta: dict[str, Any]


class Store:
    """The checkpoints of one run, opened to train it. Partial ones, which a killed call or a full disk left, are deleted.

    Args:
        folder: the run's folder (MODEL_DIR); checkpoints lie in its `checkpoints/`.
        keep: how many of the newest remain.
        fingerprint: the backbone's; restoring under another one is an error.
        data: of each task, the digest of its training examples; restoring under another one is an error.
    """

    def __init__(self, folder: Path, *, keep: int, fingerprint: str, data: Mapping[str, str]):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file otherwise
        self._folder = Path(folder) / "checkpoints"
        self._fingerprint, self._data = fingerprint, dict(data)
        if distributed.is_first():  # without which no process of this run saves, and a run has one call at a time
            for partial in self._folder.glob(PARTIAL):
                shutil.rmtree(partial, ignore_errors=True)
        self._manager = ocp.CheckpointManager(
            self._folder.absolute(),
            # Synchronous: a prompt's checkpoint takes some 50 ms, and the donated state may be written over once `save` returns.
            options=ocp.CheckpointManagerOptions(max_to_keep=max(keep, 1), enable_async_checkpointing=False),
            item_names=("state", "best", "meta"),
        )

    def latest(self) -> int | None:
        """The newest checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Tree, best: Tree | None, meta: dict[str, Any]) -> None:
        """Write the checkpoint of `step` and delete those beyond `keep`. A step that is there already is left as it is.

        Raises:
            UserError: the disk is full. What had been written is whole.
        """
        if step in self._manager.all_steps():
            return
        meta = meta | {"backbone": self._fingerprint, "data": self._data, "has_best": best is not None, "arrays": _shapes(state)}
        items = {"state": ocp.args.StandardSave(_as_dict(state)), "meta": ocp.args.JsonSave(meta)}
        if best is not None:
            items["best"] = ocp.args.StandardSave(best)
        kept = self.latest()
        try:
            self._manager.save(step, args=ocp.args.Composite(**items))
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                folder = self._folder / str(step)
                write_text(folder / "files.json", json.dumps(_file_sums(folder), indent=1))
            distributed.barrier("writing a checkpoint")  # a process that left now would end process 0 before it is done
        except Exception as error:  # Orbax and TensorStore have their own, with the system's words in them
            reason = next((os.strerror(number) for number in FULL if os.strerror(number) in str(error)), None)
            if reason is None:
                raise
            whole = f"; the checkpoint of step {kept} is whole" if kept is not None else ""
            raise UserError(
                f"Cannot write the checkpoint of step {step} into '{self._folder}' ({reason}); make room there and run the same "
                f"command again{whole}."
            ) from None

    def restore(self, state: Tree, best: Tree | None) -> Restored | None:
        """The newest whole checkpoint in the shapes and places of `state`, and of `best`; None when the run has none yet.

        Newer ones that are damaged are told and put aside, into `damaged/`, so that their steps can be written again.

        Raises:
            UserError: all are damaged; another backbone, other training data or other shapes.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged: dict[int, Damaged] = {}
        for step in steps:
            try:
                restored = self._restore(step, state, best)
            except Damaged as error:
                damaged[step] = error
                continue
            for newer, reason in damaged.items():
                self._put_aside(newer, reason, step)
            return restored
        if damaged:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise UserError(
                f"No checkpoint in {self._folder} can be read ({reasons}); restore one, or delete all to begin again."
            )
        return None

    def _restore(self, step: int, state: Tree, best: Tree | None) -> Restored:
        path = self._folder / str(step)
        self._check(step)
        meta = self._read(step, {"meta": ocp.args.JsonRestore()})["meta"]
        if meta["backbone"] != self._fingerprint:
            raise UserError(
                f"The checkpoint {path} belongs to the backbone {meta['backbone']}, but this run's is {self._fingerprint}; "
                "give the backbone that the run began with (INITIAL_CHECKPOINT_PATH) or another MODEL_DIR."
            )
        data = meta.get("data", self._data)
        for task in sorted(data.keys() | self._data.keys()):
            if data.get(task) != self._data.get(task):
                raise UserError(
                    f"The checkpoint {path} was trained on other examples of the task '{task}' than there are now; "
                    "restore its data, or give another MODEL_DIR."
                )
        expected = _shapes(state)
        for name in sorted(expected.keys() | meta["arrays"].keys()):
            if expected.get(name) != meta["arrays"].get(name):
                raise UserError(
                    f"The checkpoint {path} has {meta['arrays'].get(name, 'nothing')} for '{name}', where this run has "
                    f"{expected.get(name, 'nothing')}; give the configuration that the run began with, or another MODEL_DIR."
                )
        items = {"state": ocp.args.StandardRestore(jax.tree.map(_abstract, _as_dict(state)))}
        if best is not None and meta["has_best"]:
            items["best"] = ocp.args.StandardRestore(jax.tree.map(_abstract, best))
        read = self._read(step, items)
        return Restored(_like(state, read["state"]), read["best"] if "best" in items else None, meta)

    def close(self) -> None:
        self._manager.close()

    def _check(self, step: int) -> None:
        """As `_check_files`, which process 0 does for all: they go on from the same checkpoint, and share its files."""
        damage = None
        if distributed.is_first():
            try:
                self._check_files(step)
            except Damaged as error:
                damage = error
        if distributed.any_process(damage is not None):
            raise damage or Damaged("process 0 found it so")

    def _check_files(self, step: int) -> None:
        folder = self._folder / str(step)
        if not (folder / "files.json").exists():  # killed between Orbax's rename and ours: the rename vouches for it
            return
        try:
            expected = json.loads((folder / "files.json").read_text())
        except ValueError:
            raise Damaged("files.json is no JSON any more") from None
        found = _file_sums(folder)
        for name, (size, digest) in expected.items():
            if name not in found:
                raise Damaged(f"{name}, which files.json has, is missing")
            if found[name][0] != size:
                raise Damaged(f"{name} has {found[name][0]} bytes instead of the {size} in files.json")
            if found[name][1] != digest:
                raise Damaged(f"{name} differs from its checksum in files.json")

    def _read(self, step: int, items: dict[str, Any]) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax, TensorStore and the file system each have their own
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            folder = self._folder / str(step)
            if not (folder / "files.json").exists():
                raise Damaged(reason) from error
            raise UserError(f"The checkpoint {folder} cannot be read ({reason}), though its files are as written.") from error

    def _put_aside(self, step: int, reason: Damaged, whole: int) -> None:
        path, aside = self._folder / str(step), self._folder.parent / "damaged" / str(step)
        logger.warning(
            "warning: the checkpoint %s is damaged (%s); it is now in %s, and the run goes on from step %d",
            path,
            reason,
            aside,
            whole,
        )
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            path.rename(aside)
        distributed.barrier("putting a damaged checkpoint aside")
        self._manager.reload()


def _file_sums(folder: Path) -> dict[str, list[Any]]:
    """Relative path → [bytes, BLAKE2b] of every file of a checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "files.json")
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, _digest(path)] for path in files}


def _digest(path: Path) -> str:
    """BLAKE2b, read in pieces: a file may be as large as a tuned model."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _shapes(tree: Tree) -> dict[str, str]:
    return {name: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for name, leaf in _as_dict(tree).items()}


def _as_dict(tree: Tree) -> Tree:
    """The same leaves in plain dicts and lists: Orbax gives back named tuples and state classes in its own containers."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _like(tree: Tree, flat: dict[str, Any]) -> Tree:
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[jax.tree_util.keystr(path, simple=True, separator="/")], tree)


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return np.asarray(leaf)
