"""TFDS datasets, downloaded where they are not there yet.

TFDS tries a server that it cannot reach for more than three minutes: ten times, with growing pauses. Whether there is a network
at all is therefore asked first; a slow one answers that, too.
"""

import logging
import os
import queue
import re
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Collection
from typing import Any

from mpt_jax.errors import UserError

PATIENCE = 15.0  # seconds in which one of the servers has to accept a connection
BUCKETS = "storage.googleapis.com"
SHOWN = 3  # hosts in a message

logger = logging.getLogger("mpt_jax")


class _Unreachable(Exception):
    """No server answers."""


def open_tfds(loader: Any, asked_by: str, instead: str = "") -> Any:
    """The builder of a TFDS dataset, whose data are there then.

    Args:
      loader: seqio's, `TfdsDataSource.tfds_dataset`. It looks where `DataConfig.tfds_data_dir` or TFDS_DATA_DIR say.
      asked_by: what names the dataset, for messages.
      instead: what else than TFDS there is, for messages: ", or …".

    Raises:
      UserError: TFDS does not have the dataset; or it cannot be read or downloaded, at once where no server can be reached.
    """
    try:
        folder = loader.data_dir or os.environ.get("TFDS_DATA_DIR", "")
        if folder.startswith("gs://"):  # which TensorFlow would try to read for a minute
            _require_one_of({BUCKETS})
        builder = loader.builder
        if not builder.data_path.exists():
            _require_one_of(_servers(builder))
            logger.info("TFDS downloads %s to %s", loader.name, builder.data_dir)
            builder.download_and_prepare()
    except Exception as error:
        raise unreadable(loader.name, error, asked_by, instead) from error
    return builder


def unreadable(name: str, error: Exception, asked_by: str, instead: str = "") -> UserError:
    """What TFDS, TensorFlow or the network raised for the dataset, in a sentence."""
    kind = "" if isinstance(error, _Unreachable) else f"{type(error).__name__}: "
    reason = kind + " ".join(str(error).split())[:300]
    return UserError(
        f"The TFDS dataset '{name}' of {asked_by} could not be read ({reason}); check the network, set DataConfig.tfds_data_dir "
        f"or the variable TFDS_DATA_DIR to a folder that has it{instead}."
    )


def _servers(builder: Any) -> set[str]:
    """The hosts that TFDS downloads from for a dataset in all its configurations, as far as it knows them beforehand."""
    urls = [urllib.parse.urlsplit(url) for url in builder.url_infos or ()]
    return {BUCKETS if url.scheme == "gs" else url.hostname for url in urls if url.hostname}


def _require_one_of(hosts: Collection[str]) -> None:
    """_Unreachable where none of the hosts can be connected to; behind a proxy only that one knows."""
    if not hosts or urllib.request.getproxies():
        return
    answers: queue.Queue[str] = queue.Queue()
    for host in hosts:
        threading.Thread(target=lambda host=host: answers.put(_connect(host)), daemon=True).start()
    failures: list[str] = []
    while len(failures) < len(hosts):
        try:
            failure = answers.get(timeout=PATIENCE)
        except queue.Empty:
            failure = f"no answer within {PATIENCE:g} seconds"
            failures += [failure] * len(hosts)
        if not failure:
            return
        failures.append(failure)
    shown = " or ".join(sorted(hosts)[:SHOWN]) + (" …" if len(hosts) > SHOWN else "")
    raise _Unreachable(f"it is not there, and there is no connection to {shown}, to download it: {failures[0]}")


def _connect(host: str) -> str:
    """Why there is no connection to the host, "" where there is one."""
    try:
        socket.create_connection((host, 443), PATIENCE).close()
    except OSError as error:
        return re.sub(r"\[Errno -?\d+\] ", "", str(error))
    return ""
