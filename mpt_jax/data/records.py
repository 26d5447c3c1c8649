"""Rows of text files: JSON objects, one a line, or where the file ends in .tsv, tab-separated values under a line of names."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpt_jax.errors import UserError

Record = tuple[int, dict[str, Any]]
SHOWN = 80  # characters of a line at fault that a message prints


def shorten(text: str) -> str:
    """A text as a message prints it: its beginning only where it is long."""
    return text if len(text) <= SHOWN else text[: SHOWN - 2] + " …"


def read_records(path: Path, key: str = "the file") -> Iterator[Record]:
    """(line number, row) of each line that is not blank. In TSV nothing is quoted and every value is a text.

    `key` names what gave the path, for messages.

    Raises:
      UserError: the file cannot be read; or, with its number, a line that is not UTF-8, is not a JSON object, or has another
        number of fields than the first.
    """
    lines = _lines(path, key)
    return _table(path, lines) if path.suffix == ".tsv" else _objects(path, lines)


def count_records(path: Path) -> int:
    """How many rows the file has, without looking into them. UserError where it cannot be read."""
    lines = sum(1 for _ in _lines(path, "the file"))
    return max(lines - 1, 0) if path.suffix == ".tsv" else lines


def _lines(path: Path, key: str) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if text.strip():
                    yield number, text
    except OSError as error:
        raise UserError(f"Cannot read {key} '{path}' ({error.strerror}); check the path.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason}); save the file as UTF-8.") from None


def _objects(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[Record]:
    for number, line in lines:
        try:
            row = json.loads(line)
            if "\\u" in line:  # may be half of a surrogate pair, which no tokeniser takes
                json.dumps(row, ensure_ascii=False).encode()
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); correct the line.") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: a JSON object is needed, not {shorten(line)}; correct the line.")
        yield number, row


def _table(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[Record]:
    first, header = next(lines, (1, ""))
    names = header.split("\t")
    if len(set(names)) < len(names):
        raise UserError(f"{path}, line {first}: a field name occurs twice ({_names(names)}); rename one of the two.")
    for number, line in lines:
        values = line.split("\t")
        if len(values) != len(names):
            raise UserError(
                f"{path}, line {number}: {len(values)} fields between tabs, but line {first} names {len(names)} "
                f"({_names(names)}); correct the line."
            )
        yield number, dict(zip(names, values, strict=True))


def _names(names: list[str]) -> str:
    """The names of a first line; where it is no such line but a row with whole texts, its beginning."""
    return shorten(", ".join(names))
