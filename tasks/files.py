"""Tasks from your own files: every folder of JSONL or TSV files under the folder that the variable MPT_JAX_DATA names.

    $MPT_JAX_DATA/<task>/{train,validation,test}.jsonl      one JSON object a line       → seqio task `files_<task>`
                                                .tsv        field names in the first line, tabs between fields, no quoting

* A well-known name (sst2, mnli, qnli, qqp, rte, cb, boolq, wic, mrpc, ... `preprocessors.KNOWN`) with the field names of TFDS
  gets the format and metrics of the literature; labels become digits.
* Rows with `question`, `context`, `answers` ({"text": [...]}, a list, or one text) are extractive questions, under any name.
* Anything else: rows with `inputs` and `targets`, both text, scored by accuracy (with a list `answers` in every row: by exact
  match and F1 against the best of them). Other fields are left out.

A field of the wrong kind, null or an empty target is an error that names its line. Rows whose `answers` are all empty are left
out, with a warning that counts them; a file without any other rows is an error.

Without a test file, ATTEMPT's rule makes a test split out of what is labelled: with fewer than 10,000 training rows the
validation file is halved into validation and test; otherwise 1,000 training rows become the validation split and the validation
file is the test split. Which rows: a permutation from a fixed seed (NumPy's, so not the same rows as ATTEMPT's).
"""

import functools
import json
import logging
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import seqio

from mpt_jax import metrics
from mpt_jax.data.records import read_records, shorten
from mpt_jax.errors import UserError
from tasks import features, preprocessors

VARIABLE = "MPT_JAX_DATA"
SMALL_TRAIN = 10_000
HELD_OUT = 1_000
SPLIT_SEED = 42
ENDINGS = ("jsonl", "tsv")

GENERIC = preprocessors.Format(lambda dataset: dataset, {"inputs": "text", "targets": "target"})
GENERIC_WITH_ANSWERS = preprocessors.Format(
    lambda dataset: dataset, GENERIC.columns | {"answers": "texts"}, (metrics.squad,), metrics.with_answers
)

logger = logging.getLogger("mpt_jax")


class FolderSource(features.RowsSource):
    """Rows of `$MPT_JAX_DATA/<task>`; the folder is looked up when it is used, not when the task is registered."""

    def __init__(self, task: str, columns: preprocessors.Columns):
        super().__init__(functools.partial(split_rows, task, columns), (), lambda split: _files(task), (VARIABLE,))
        self.task = task

    @property
    def splits(self) -> tuple[str, ...]:
        names = tuple(name for name in ("train", "validation", "test") if _file(self.task, name).is_file())
        if not names:
            folder = _file(self.task, "train").parent
            missing = next(
                (f"folder {path}" for path in (folder.parent, folder) if not path.is_dir()), f"{folder}/train.jsonl or .tsv"
            )
            raise UserError(f"There is no {missing}; put the files of the task there, or correct {VARIABLE} or the task's name.")
        return (*names, "test") if names == ("train", "validation") else names


def register() -> None:
    """Registers the well-known names, and every other folder of `$MPT_JAX_DATA`. Names that are registered already stay."""
    folder = os.environ.get(VARIABLE)
    paths = [path for ending in ENDINGS for path in Path(folder).expanduser().glob(f"*/train.{ending}")] if folder else []
    found = sorted(path.parent.name for path in paths)
    for task in dict.fromkeys([*preprocessors.KNOWN, *found]):
        if not re.fullmatch(r"[\w.]+", task):  # seqio's rule
            logger.warning("%s/%s is not read: rename the folder, with letters, digits, _ and . only", folder, task)
            continue
        if f"files_{task}" not in seqio.TaskRegistry.names():
            form = _format(task, _first_row(task) if task in found else None)
            seqio.TaskRegistry.add(
                f"files_{task}",
                source=FolderSource(task, form.columns),
                preprocessors=[form.preprocessor, *features.TOKENIZE],
                output_features=features.output_features(),
                postprocess_fn=form.postprocess_fn,
                metric_fns=list(form.metric_fns),
            )


def split_rows(task: str, columns: preprocessors.Columns, split: str) -> list[features.Row]:
    """The rows of a split, given or made by ATTEMPT's rule (see the top of this file).

    Raises:
      UserError: a file is missing or cannot be divided; or one of its lines cannot be read, lacks a field or has a wrong one.
    """
    if _file(task, "test").is_file() or not _file(task, "validation").is_file():
        return read_rows(_file(task, split), columns)
    train = read_rows(_file(task, "train"), columns)
    if len(train) < SMALL_TRAIN:
        return train if split == "train" else _half(_file(task, "validation"), columns, split)
    if split == "test":
        return read_rows(_file(task, "validation"), columns)
    logger.info("%s: %d rows are held out for validation, as there is no test file", _file(task, "train"), HELD_OUT)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(train))
    return [train[i] for i in np.sort(order[:HELD_OUT] if split == "validation" else order[HELD_OUT:])]


def _half(path: Path, columns: preprocessors.Columns, split: str) -> list[features.Row]:
    rows = read_rows(path, columns)
    half = max(len(rows) // 2, 1)  # a single row is for validation
    logger.info("%s is halved, as there is no test file: %d rows for validation, %d for test", path, half, len(rows) - half)
    if split == "test" and half == len(rows):
        raise UserError(
            f"{path} has one row, which cannot be halved into validation and test; give it a second row, or add a test file."
        )
    order = np.random.default_rng(SPLIT_SEED).permutation(len(rows))
    return [rows[i] for i in np.sort(order[:half] if split == "validation" else order[half:])]


def read_rows(path: Path, columns: preprocessors.Columns) -> list[features.Row]:
    """The fields `columns` of each line, in the form that TFDS gives them, without the rows that have no answer."""
    rows, unanswered = [], 0
    for number, record in read_records(path):
        missing = [name for name in columns if name not in record and name != "id"]
        if missing:
            raise UserError(
                f"{path}, line {number}: no field '{missing[0]}' (it has {shorten(', '.join(record))}); "
                f"this task needs {', '.join(columns)}."
            )
        place = f"{path}, line {number}"
        row = {name: _value(record.get(name, str(number)), kind, name, place) for name, kind in columns.items()}
        if row.get("answers") in ([], {"text": []}):
            unanswered += 1
        else:
            rows.append(row)
    if not rows and unanswered:
        raise UserError(f"{path} has {unanswered} rows, all with empty 'answers'; give each question an answer at least.")
    if not rows:
        raise UserError(f"{path} has no rows; give it a row a line, with {', '.join(columns)}.")
    if unanswered:
        logger.warning("%s: %d rows with empty 'answers' are left out", path, unanswered)
    return rows


def _value(value: Any, kind: Any, name: str, place: str) -> Any:
    """`value` as its kind has it: one of KINDS, or a dict of them. UserError when it is of another."""
    if isinstance(kind, dict):
        if not isinstance(value, dict) and len(kind) == 1:  # `answers` without the `text` of TFDS
            return {inner: _value(value, kind[inner], name, place) for inner in kind}
        if isinstance(value, dict):
            return {inner: _value(value.get(inner), kind[inner], f"{name}.{inner}", place) for inner in kind}
        wanted, converted = f"an object with {' and '.join(kind)}", None
    else:
        wanted, convert = KINDS[kind]
        converted = convert(value)
    if converted is None:
        raise UserError(
            f"{place}: '{name}' must be {wanted}, not {shorten(json.dumps(value, ensure_ascii=False))}; correct the line."
        )
    return converted


def _text(value: Any) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None


def _target(value: Any) -> str | None:
    text = _text(value)
    return text if text and text.strip() else None


def _label(value: Any) -> str | None:
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


KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {  # name: (in words, conversion; None where a value is of another kind)
    "text": ("text", _text),
    "target": ("text that is not empty", _target),
    "label": ("a whole number (such as 0 or 1) or a word", _label),
    "number": ("a number", _number),
    "position": ("the number of a word, 0 to 999", _position),
    "texts": ("a text or a list of texts", _texts),
}


def _format(task: str, row: dict[str, Any] | None) -> preprocessors.Format:
    if row and {"inputs", "targets"} <= row.keys():
        return GENERIC_WITH_ANSWERS if isinstance(row.get("answers"), list) else GENERIC
    known = preprocessors.known_format(task)
    if known is None and row and {"question", "context", "answers"} <= row.keys():
        return preprocessors.squad_format(task)
    return known or GENERIC


def _first_row(task: str) -> dict[str, Any] | None:
    try:
        return next(read_records(_file(task, "train")))[1]
    except (UserError, StopIteration):
        return None  # told when the task is used


def _candidates(task: str, split: str) -> list[Path]:
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise UserError(
            f"Task 'files_{task}' reads the folder named by the environment variable {VARIABLE}, which is not set; "
            f"set it to the folder that holds {task}/train.jsonl."
        )
    return [Path(folder).expanduser() / task / f"{split}.{ending}" for ending in ENDINGS]


def _file(task: str, split: str) -> Path:
    """The file of a split, the JSONL one if there is none. UserError when there are both."""
    jsonl, tsv = _candidates(task, split)
    if jsonl.is_file() and tsv.is_file():
        raise UserError(f"There are both {jsonl} and {tsv}; keep the one that is meant.")
    return tsv if tsv.is_file() else jsonl


def _files(task: str) -> list[str]:
    """All files of the task: which splits there are, and in which way they are cut, depends on each of them."""
    return [str(path) for split in ("train", "validation", "test") for path in _candidates(task, split)]


register()
