"""Files that are written whole."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary file beside `file`, to be written within the block, which then takes its name; folders are made.

    Whatever happens, `file` is afterwards what it was or all that it should be. Raises OSError.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Writes a text file whole."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _umask() -> int:
    """The process's umask; a temporary file is private, the finished one is as any other file."""
    current = os.umask(0)
    os.umask(current)
    return current
