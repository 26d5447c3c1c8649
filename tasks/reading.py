"""Rows of a task from local files: where they lie, and what each field must be.

    $MPT_JAX_DATA/<task>/<split>.jsonl      one JSON object a line
                                .tsv        field names in the first line, tabs between fields, no quoting

A field of the wrong kind, null or an empty target is an error that names its line. Rows whose `answers` are all empty or whose
label is -1, as in a test split without labels, are left out, with a warning that counts them; a file without any other rows is
an error.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mpt_jax.data.records import read_records, shorten
from mpt_jax.errors import UserError
from tasks import features

VARIABLE = "MPT_JAX_DATA"
ENDINGS = ("jsonl", "tsv")
NO_LABEL = "-1"

logger = logging.getLogger("mpt_jax")


class Kind(NamedTuple):
    """What a field must be, in words, and its conversion, which gives None for a value of another kind."""

    wanted: str
    convert: Callable[[Any], Any]


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


def candidates(task: str, split: str) -> list[Path]:
    """The files that the split may be in. UserError when MPT_JAX_DATA is not set."""
    folder = data_folder()
    assert folder is not None
    return [folder / task / f"{split}.{ending}" for ending in ENDINGS]


def file_of(task: str, split: str) -> Path:
    """The file of a split, the JSONL one if there is none. UserError when there are both."""
    jsonl, tsv = candidates(task, split)
    if jsonl.is_file() and tsv.is_file():
        raise UserError(f"There are both {jsonl} and {tsv}; keep the one that is meant.")
    return tsv if tsv.is_file() else jsonl


def read_rows(path: Path, columns: Columns, aliases: Mapping[str, str] | None = None, hint: str = "") -> list[features.Row]:
    """The fields `columns` of each line.

    Args:
      aliases: another name that a field may have in the file.
      hint: what to do where a field is missing.

    Raises:
      UserError: a line cannot be read, lacks a field or has a wrong one; or there is none.
    """
    aliases = aliases or {}
    rows = []
    for number, record in read_records(path):
        place = f"{path}, line {number}"
        given, record = record, {aliases[name]: value for name, value in record.items() if name in aliases} | record
        missing = [name for name in columns if name not in record and name not in OPTIONAL]
        if missing:
            raise UserError(
                f"{place}: no field '{missing[0]}' (it has {shorten(', '.join(given))}); "
                f"this task needs {', '.join(columns)}{hint}."
            )
        values = {name: record[name] if name in record else OPTIONAL[name](number) for name in columns}
        rows.append({name: _value(value, columns[name], name, place) for name, value in values.items()})
    if not rows:
        raise UserError(f"{path} has no rows; give it a row a line, with {', '.join(columns)}.")
    return rows


def answered(rows: list[features.Row], path: Path) -> list[features.Row]:
    """The rows with an answer and a label; others are counted in a warning. UserError where none is left."""
    kept = [row for row in rows if row.get("answers") not in ([], {"text": []}) and row.get("label") != NO_LABEL]
    left_out = len(rows) - len(kept)
    lacking = "label -1" if rows and "label" in rows[0] else "empty 'answers'"
    if not kept and left_out:
        raise UserError(f"{path}: all {left_out} rows of the split have {lacking}; give rows an answer, or leave the file out.")
    if not kept:
        raise UserError(f"{path} has one row, which cannot be halved into validation and test; give it a second row.")
    if left_out:
        logger.warning("%s: %d rows with %s are left out", path, left_out, lacking)
    return kept


def _value(value: Any, kind: Any, name: str, place: str) -> Any:
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
        raise UserError(f"{place}: '{name}' must be {wanted}, not {shown}; correct the line.")
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
NUMBER = Kind("a number", _number)
POSITION = Kind("the number of a word, 0 to 999", _position)
TEXTS = Kind("a text or a list of texts", _texts)


def label(classes: tuple[str, ...]) -> Kind:
    """A label by its number or its word, as the text of its number; -1 where there is none."""
    numbers = {name: str(number) for number, name in enumerate(classes)}
    numbers |= {number: number for number in [*numbers.values(), NO_LABEL]}
    shown = f"0 to {len(classes) - 1} or one of {', '.join(classes)}"
    return Kind(f"a label, {shown}", lambda value: numbers.get(_word(value) or ""))
