"""What native code writes to the process's own streams, and how to be spared of it."""

import contextlib
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path


@contextlib.contextmanager
def stderr_into(handle: int) -> Iterator[None]:
    """What anything, native code too, writes to standard error goes to an open file. Exceptions pass."""
    sys.stderr.flush()
    saved = os.dup(2)
    os.dup2(handle, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Drops what native code writes to standard error: start-up lines of TensorFlow and libtpu heed no log level."""
    with open(os.devnull, "wb") as nowhere, stderr_into(nowhere.fileno()):
        yield


def leave_libtpu_alone() -> None:
    """On a machine without a TPU, tells JAX not to look for one where only `plan`'s libtpu is installed.

    libtpu would write five lines of warnings at the start of every command. A GPU's plugin is looked for as ever.
    """
    has_tpu = any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    has_gpu_plugin = any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    if find_spec("libtpu") and not has_tpu and not has_gpu_plugin:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
