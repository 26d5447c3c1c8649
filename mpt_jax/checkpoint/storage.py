"""Checkpoint folders, local or gs://BUCKET/…, as TensorStore's key-value stores: the one place that knows how to read both."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import tensorstore as ts

from mpt_jax.checkpoint.leaves import reason
from mpt_jax.errors import UserError
from mpt_jax.files import replacing

DOWNLOADS = Path("~/.cache/mpt_jax/vocabularies")  # SentencePiece reads local files only
CHECKPOINT = "INITIAL_CHECKPOINT_PATH"  # what a path is, for errors, unless the caller says otherwise
# Seconds until a silent bucket is told of, and until it is given up: TensorStore itself tries again for many minutes.
PATIENCE, DEADLINE = 5.0, 50.0

logger = logging.getLogger("mpt_jax")


def is_remote(path: str) -> bool:
    """Whether the path is that of a bucket."""
    return path.startswith("gs://")


def kvstore_spec(folder: str) -> dict[str, Any]:
    """TensorStore's specification of a folder."""
    if is_remote(folder):
        bucket, _, path = folder.removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{path.rstrip('/')}/" if path else ""}
    return {"driver": "file", "path": f"{Path(folder).expanduser().absolute()}/"}


def open_store(folder: str, what: str = CHECKPOINT) -> ts.KvStore:
    """The folder's files by their names in it. UserError, which says `what` the path is, where no bucket can have the name."""
    try:
        return ts.KvStore.open(kvstore_spec(folder)).result()
    except ValueError as error:
        raise UserError(f"{folder} ({what}) cannot be opened ({reason(error)}); give gs://BUCKET/….") from None


def is_file(path: str) -> bool:
    """Whether a file, local or in a bucket, has just this name."""
    if not is_remote(path):
        return Path(path).is_file()
    parent, _, name = path.rpartition("/")
    return parent != "gs:/" and exists(open_store(parent), name)  # a bucket's name alone is none


def exists(store: ts.KvStore, key: str) -> bool:
    """Whether the folder has this file. UserError where it cannot be known."""
    found = _answered(store.read(key, byte_range=slice(0, 0)), store, key, CHECKPOINT)
    try:
        return found.result().state == "value"
    except Exception as error:  # no such bucket, no permission, no network
        raise _unreadable(store, key, error, CHECKPOINT) from None


def list_names(folder: str, store: ts.KvStore, prefix: str = "") -> set[str]:
    """The names of files and folders in a folder that begin with `prefix`."""
    if not is_remote(folder):
        path = Path(folder).expanduser()
        return {entry.name for entry in path.iterdir() if entry.name.startswith(prefix)} if path.is_dir() else set()
    after = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""  # "" is the end of all
    listed = _answered(store.list(range=ts.KvStore.KeyRange(prefix, after)), store, prefix, CHECKPOINT)
    try:
        keys = listed.result()
    except Exception as error:  # a bucket may be read but not listed
        raise UserError(
            f"{folder} ({CHECKPOINT}) cannot be listed ({reason(error)}); give the path of one checkpoint_<step>."
        ) from None
    return {key.decode().split("/")[0] for key in keys}


def read(store: ts.KvStore, key: str, what: str = CHECKPOINT) -> bytes | None:
    """The whole file, or None where there is none. UserError, which says `what` the path is, where it cannot be read."""
    answer = _answered(store.read(key), store, key, what)
    try:
        found = answer.result()
    except Exception as error:  # as in `exists`
        raise _unreadable(store, key, error, what) from None
    return found.value if found.state == "value" else None


def read_json(folder: str, name: str) -> dict[str, Any] | None:
    """The JSON object in a file of a folder, or None where there is no such file. UserError for anything else in it."""
    text = read(open_store(folder), name)
    values = json_object(text)
    if text is not None and values is None:
        raise UserError(f"{folder}/{name} is not valid JSON, or no object; copy the folder again.")
    return values


def json_object(text: bytes | None) -> dict[str, Any] | None:
    """The JSON object that a text is, None for any other text, and for none."""
    try:
        values = json.loads(text or b"")
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def fetch(store: ts.KvStore, key: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file, or what it has of them."""
    for stop in (offset + size, None):
        try:
            return store.read(key, byte_range=slice(offset, stop)).result().value
        except ValueError as error:
            if "OUT_OF_RANGE" not in str(error):
                raise
    return b""


def local_copy(path: str, what: str) -> Path:
    """The file itself or, of one in a bucket, a copy in `DOWNLOADS`, called by its content.

    Raises:
        UserError: there is none, or no copy can be made; says `what` the path is.
    """
    content = None
    if is_remote(path):
        folder, _, name = path.rpartition("/")
        content = read(open_store(folder, what), name, what)
    elif Path(path).expanduser().is_file():
        return Path(path).expanduser()
    if content is None:
        raise UserError(f"{what} '{path}' does not exist; give a SentencePiece .model file.")
    copy = DOWNLOADS.expanduser() / f"{hashlib.sha256(content).hexdigest()[:16]}-{name}"
    if not copy.exists():
        try:
            with replacing(copy) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            raise UserError(
                f"{path} ({what}) cannot be copied to {copy.parent} ({error.strerror}); set HOME to a folder that you may write "
                "to, or give a local file."
            ) from None
    return copy


def _answered(future: ts.Future[Any], store: ts.KvStore, key: str, what: str) -> ts.Future[Any]:
    """`future` once it is done, well or not. UserError when the bucket does not answer in time.

    For small requests: the first of every checkpoint are such, so what follows finds a bucket that answers.
    """
    try:
        future.exception(timeout=PATIENCE)
        return future
    except TimeoutError:
        logger.warning("waiting for %s%s …", store.url, key)
    try:
        future.exception(timeout=DEADLINE - PATIENCE)
        return future
    except TimeoutError:
        future.cancel()
        raise UserError(
            f"{store.url}{key} ({what}) has not answered for {DEADLINE:.0f} s; check the network, the bucket's "
            "name and your permissions (gcloud auth application-default login), or copy the checkpoint to a local folder."
        ) from None


def _unreadable(store: ts.KvStore, key: str, error: Exception, what: str) -> UserError:
    return UserError(f"{store.url}{key} ({what}) cannot be read ({reason(error)}); check the path and your permissions.")
