"""Files and folders that are written whole, and files that may not be."""

import contextlib
import json
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

UNFINISHED = ".mpt_jax_unfinished"  # the folder in which `filling` collects what it is given


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary file beside `file`, to be written within the block, which then takes its name; folders are made.

    Whatever happens, `file` is afterwards what it was or all that it should be. Raises OSError.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode  # as the umask has it; some libraries that write the file make it private
    try:
        yield temporary
        temporary.chmod(mode)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def filling(folder: Path, last: str) -> Iterator[Path]:
    """A folder within `folder`, to be filled within the block, whose entries then move up, the one called `last` last.

    `folder` is made if need be and must hold nothing else but what an earlier, killed call left there, which is removed. A
    block that fails leaves nothing. Raises OSError.
    """
    made = not folder.exists()
    inside = folder / UNFINISHED
    if inside.exists():
        shutil.rmtree(inside)
    inside.mkdir(parents=True)
    try:
        yield inside
        for entry in sorted(inside.iterdir(), key=lambda entry: entry.name == last):
            entry.rename(folder / entry.name)
    finally:
        shutil.rmtree(inside, ignore_errors=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()


def write_text(file: Path, text: str) -> None:
    """Writes a text file whole."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is none, whole, or it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
