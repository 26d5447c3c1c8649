"""Rows of a task: where their files lie, what each field must be, and those of a split one after the other.

    $MPT_JAX_DATA/<task>/<split>.jsonl      one JSON object a line
                                .tsv        field names in the first line, tabs between fields, no quoting

A field of the wrong kind, null or an empty target is an error that names its line. Rows whose `answers` are all empty or whose
label is -1, as in a test split without labels, are left out, with a warning that counts them; a file without any other rows is
an error.
"""

import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from mpt_jax.data.records import Record, read_records, shorten
from mpt_jax.errors import UserError
from tasks import features, splits

VARIABLE = "MPT_JAX_DATA"
ENDINGS = ("jsonl", "tsv")
NO_LABEL = "-1"

logger = logging.getLogger("mpt_jax")


class Kind(NamedTuple):
    """What a field must be, in words; its conversion, which gives None for a value of another kind; and what that makes."""

    wanted: str
    convert: Callable[[Any], Any]
    spec: Any = tf.TensorSpec((), tf.string)


Columns = Mapping[str, Any]  # field → Kind, or the columns of an object

# Fields that may be missing, and what they are then, by the number of their line.
OPTIONAL: dict[str, Callable[[int], Any]] = {"id": str, "qid": str, "references": lambda number: []}


def data_folder(needed: bool = True) -> Path | None:
    """The folder that MPT_JAX_DATA names; where it is not set, None or, if it is `needed`, a UserError."""
    folder = os.environ.get(VARIABLE)
    if not folder and needed:
        raise UserError(
            f"Tasks from files read the folder named by the environment variable {VARIABLE}, which is not set; "
            "set it to the folder that holds a folder of files for each task."
        )
    return Path(folder).expanduser() if folder else None


def folder_of(task: str) -> Path:
    """The folder of a task's files. UserError when MPT_JAX_DATA is not set."""
    folder = data_folder()
    assert folder is not None
    return folder / task


def candidates(folder: Path, split: str) -> list[Path]:
    """The files that the split may be in."""
    return [folder / f"{split}.{ending}" for ending in ENDINGS]


def file_of(folder: Path, split: str) -> Path:
    """The file of a split, the JSONL one if there is none. UserError when there are both."""
    jsonl, tsv = candidates(folder, split)
    if jsonl.is_file() and tsv.is_file():
        raise UserError(f"There are both {jsonl} and {tsv}; keep the one that is meant.")
    return tsv if tsv.is_file() else jsonl


# ---------------------------------------------------------------- rows


class Table(NamedTuple):
    """A split as it was published: `records` reads it from its beginning; the rest is for messages about a row."""

    name: str
    unit: str
    cure: str
    records: Callable[[], Iterator[Record]]


class Reader(NamedTuple):
    """What to make of the records of a table.

    Attributes:
      columns: the fields that are needed.
      aliases: another name that a field may have.
      convert: makes the fields out of a record of another shape, before all else.
      hint: what to do where a field is missing.
    """

    columns: Columns
    aliases: Mapping[str, str] = {}
    convert: Callable[[dict[str, Any]], dict[str, Any]] = dict
    hint: str = ""

    @property
    def spec(self) -> dict[str, Any]:
        """The fields as tf.TypeSpecs."""
        return _spec(self.columns)


def file_table(path: Path) -> Table:
    return Table(str(path), "line", "correct the line", lambda: read_records(path))


def read_rows(table: Table, reader: Reader) -> Iterator[features.Row]:
    """The fields of each row.

    Raises:
      UserError: a row cannot be read, lacks a field or has a wrong one.
    """
    columns = reader.columns
    for number, given in table.records():
        place = f"{table.name}, {table.unit} {number}"
        record = reader.convert(given)
        record = {reader.aliases[name]: value for name, value in record.items() if name in reader.aliases} | record
        missing = [name for name in columns if name not in record and name not in OPTIONAL]
        if missing:
            raise UserError(
                f"{place}: no field '{missing[0]}' (it has {shorten(', '.join(given))}); "
                f"this task needs {', '.join(columns)}{reader.hint}."
            )
        values = {name: record[name] if name in record else OPTIONAL[name](number) for name in columns}
        yield {name: _value(value, columns[name], name, (place, table.cure)) for name, value in values.items()}


def stream(table: Table, reader: Reader, part: splits.Part, published: int = 0) -> features.Stream:
    """The rows of `part` that have an answer and a label; others are counted in a warning.

    All rows are read once here, to find mistakes and to count them, and once more, one by one, when they are used.

    Args:
      published: how many rows the table should have; another number is a warning, 0 is not known.

    Raises:
      UserError: as `read_rows`; or there are no rows, or none of them has an answer.
    """
    answered = np.fromiter((_is_answered(row) for row in read_rows(table, reader)), bool)
    total = len(answered)
    if not total:
        raise UserError(f"{table.name} has no rows; give it a row a line, with {', '.join(reader.columns)}.")
    if published and total != published:
        logger.warning("%s has %s rows; the published split has %s", table.name, f"{total:,}", f"{published:,}")
    wanted = np.zeros(total, bool)
    wanted[splits.chosen(part, total)] = True
    if not wanted.any():
        raise UserError(f"{table.name} has one row, which cannot be halved into validation and test; give it a second row.")
    left_out = int((wanted & ~answered).sum())
    wanted &= answered
    lacking = "label -1" if "label" in reader.columns else "empty 'answers'"
    if not wanted.any():
        raise UserError(
            f"{table.name}: all {left_out} rows of the split have {lacking}; give rows an answer, or leave the split out."
        )
    if left_out:
        logger.warning("%s: %d rows with %s are left out", table.name, left_out, lacking)
    return features.Stream(lambda: itertools.compress(read_rows(table, reader), wanted.tolist()), int(wanted.sum()), reader.spec)


def _is_answered(row: features.Row) -> bool:
    return row.get("answers") not in ([], {"text": []}) and row.get("label") != NO_LABEL


def _spec(columns: Columns) -> dict[str, Any]:
    return {name: kind.spec if isinstance(kind, Kind) else _spec(kind) for name, kind in columns.items()}


def _value(value: Any, kind: Any, name: str, place: tuple[str, str]) -> Any:
    """`value` as its kind has it. UserError when it is of another."""
    if isinstance(kind, Kind):
        wanted, converted = kind.wanted, kind.convert(value)
    elif isinstance(value, dict):
        return {inner: _value(value.get(inner), kind[inner], f"{name}.{inner}", place) for inner in kind}
    elif len(kind) == 1:  # `answers` without the `text` of TFDS
        return {inner: _value(value, kind[inner], name, place) for inner in kind}
    else:
        wanted, converted = f"an object with {' and '.join(kind)}", None
    if converted is None:
        shown = shorten(json.dumps(value, ensure_ascii=False))
        raise UserError(f"{place[0]}: '{name}' must be {wanted}, not {shown}; {place[1]}.")
    return converted


def _text(value: Any) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None


def _target(value: Any) -> str | None:
    text = _text(value)
    return text if text and text.strip() else None


def _word(value: Any) -> str | None:
    return None if isinstance(value, float) else _target(value)  # 1.0 would be another word than 1


def _texts(value: Any) -> list[str] | None:
    texts = [_text(item) for item in (value if isinstance(value, list) else [value])]
    return None if None in texts else [text for text in texts if text and text.strip()]


def _number(value: Any) -> float | None:
    try:
        number = float(_text(value) or "nan")
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _position(value: Any) -> int | None:
    return int(value) if str(value).isdecimal() and int(value) < 1000 else None  # the most that a regular expression counts to


TEXT = Kind("text", _text)
TARGET = Kind("text that is not empty", _target)
WORD = Kind("a whole number (such as 0 or 1) or a word", _word)
NUMBER = Kind("a number", _number, tf.TensorSpec((), tf.float32))
FLAG = Kind("true or false", lambda value: value if isinstance(value, bool) else None, tf.TensorSpec((), tf.bool))
POSITION = Kind("the number of a word, 0 to 999", _position, tf.TensorSpec((), tf.int64))
TEXTS = Kind("a text or a list of texts", _texts, tf.RaggedTensorSpec((None,), tf.string, ragged_rank=0))


def number_of(*numbers: int) -> Kind:
    """One of these numbers, which stand for themselves."""
    known = {str(number): number for number in numbers}
    shown = ", ".join(known)
    return Kind(f"one of {shown}", lambda value: known.get(_word(value) or ""), tf.TensorSpec((), tf.int64))


def label(classes: tuple[str, ...]) -> Kind:
    """A label by its number or its word, as the text of its number; -1 where there is none."""
    numbers = {name: str(number) for number, name in enumerate(classes)}
    numbers |= {number: number for number in [*numbers.values(), NO_LABEL]}
    shown = f"0 to {len(classes) - 1} or one of {', '.join(classes)}"
    return Kind(f"a label, {shown}", lambda value: numbers.get(_word(value) or ""))
