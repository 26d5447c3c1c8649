"""Tasks from your own files: every folder of JSONL files under the folder that the environment variable MPT_JAX_DATA names.

    $MPT_JAX_DATA/<task>/{train,validation,test}.jsonl      one JSON object a line       → seqio task `files_<task>`

* A well-known name (sst2, mnli, qnli, qqp, rte, cb, boolq, wic, mrpc, ... `preprocessors.KNOWN`) with the field names of TFDS
  gets the format and metrics of the literature; labels become digits.
* Rows with `question`, `context`, `answers` ({"text": [...]} or a list) are extractive questions, under any name.
* Anything else: rows with `inputs` and `targets`, both text, scored by accuracy (with a list `answers` in every row: by exact
  match and F1 against the best of them). Other fields are left out.

Without `test.jsonl`, ATTEMPT's rule makes a test split out of what is labelled: with fewer than 10,000 training rows the
validation file is halved into validation and test; otherwise 1,000 training rows become the validation split and the validation
file is the test split. Which rows: a permutation from a fixed seed (NumPy's, so not the same rows as ATTEMPT's).
"""

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import seqio

from mpt_jax import metrics
from mpt_jax.errors import UserError
from tasks import features, preprocessors

VARIABLE = "MPT_JAX_DATA"
SMALL_TRAIN = 10_000
HELD_OUT = 1_000
SPLIT_SEED = 42

GENERIC = preprocessors.Format(lambda dataset: dataset, ("inputs", "targets"))
GENERIC_WITH_ANSWERS = preprocessors.Format(
    lambda dataset: dataset, ("inputs", "targets", "answers"), (metrics.squad,), metrics.with_answers
)


class FolderSource(features.RowsSource):
    """Rows of `$MPT_JAX_DATA/<task>`; the folder is looked up when it is used, not when the task is registered."""

    def __init__(self, task: str, columns: tuple[str, ...]):
        super().__init__(functools.partial(split_rows, task, columns), (), lambda split: _files(task), (VARIABLE,))
        self.task = task

    @property
    def splits(self) -> tuple[str, ...]:
        names = tuple(name for name in ("train", "validation", "test") if _file(self.task, name).is_file())
        if not names:
            raise UserError(
                f"There is no {_file(self.task, 'train')}; put the task's files there, or correct {VARIABLE} or the name."
            )
        return (*names, "test") if names == ("train", "validation") else names


def register() -> None:
    """Registers the well-known names, and every other folder of `$MPT_JAX_DATA`. Names that are registered already stay."""
    folder = os.environ.get(VARIABLE)
    found = sorted(path.parent.name for path in Path(folder).expanduser().glob("*/train.jsonl")) if folder else []
    for task in dict.fromkeys([*preprocessors.KNOWN, *found]):
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


def split_rows(task: str, columns: tuple[str, ...], split: str) -> list[features.Row]:
    """The rows of a split, given or made by ATTEMPT's rule (see the top of this file).

    Raises:
      UserError: a file is missing, or one of its lines is not JSON or lacks a field.
    """
    if _file(task, "test").is_file() or not _file(task, "validation").is_file():
        return read_rows(_file(task, split), columns)
    train = read_rows(_file(task, "train"), columns)
    if len(train) < SMALL_TRAIN:
        return train if split == "train" else _half(read_rows(_file(task, "validation"), columns), split)
    if split == "test":
        return read_rows(_file(task, "validation"), columns)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(train))
    return [train[i] for i in np.sort(order[:HELD_OUT] if split == "validation" else order[HELD_OUT:])]


def _half(rows: list[features.Row], split: str) -> list[features.Row]:
    order = np.random.default_rng(SPLIT_SEED).permutation(len(rows))
    half = len(rows) // 2
    return [rows[i] for i in np.sort(order[:half] if split == "validation" else order[half:])]


def read_rows(path: Path, columns: tuple[str, ...]) -> list[features.Row]:
    """The fields `columns` of each line of a JSONL file (blank lines are skipped)."""
    rows = []
    for number, row in _objects(path):
        missing = [name for name in columns if name not in row and name != "id"]
        if missing:
            raise UserError(
                f"{path} line {number} has no field '{missing[0]}' (it has {', '.join(row)}); "
                f"this task needs {', '.join(columns)}."
            )
        rows.append({name: _value(row.get(name, str(number)), name, columns, path, number) for name in columns})
    if not rows:
        raise UserError(f"{path} has no rows; write one JSON object a line, with {', '.join(columns)}.")
    return rows


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {path} ({error}); write it as UTF-8 text, one JSON object a line.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number} is not JSON ({error}); write one JSON object a line.") from None
        if not isinstance(row, dict):
            raise UserError(
                f"{path} line {number} is not a JSON object but a {type(row).__name__}; write one JSON object a line."
            )
        yield number, row


def _value(value: Any, name: str, columns: tuple[str, ...], path: Path, number: int) -> Any:
    """A field in the form that TFDS gives it."""
    if name == "answers" and "context" in columns:
        texts = value["text"] if isinstance(value, dict) and "text" in value else value
        if not isinstance(texts, list):
            raise UserError(
                f"{path} line {number}: 'answers' must be a list of texts or have a list 'text', not {json.dumps(value)[:80]}."
            )
        return {"text": [str(text) for text in texts]}
    if name in ("inputs", "targets", "id"):
        if isinstance(value, (dict, list)) or value is None:
            raise UserError(f"{path} line {number}: '{name}' must be text, not {json.dumps(value)[:80]}.")
        return str(value)
    if name == "answers":
        return [str(text) for text in (value if isinstance(value, list) else [value])]
    return value


def _format(task: str, row: dict[str, Any] | None) -> preprocessors.Format:
    if row and {"inputs", "targets"} <= row.keys():
        return GENERIC_WITH_ANSWERS if isinstance(row.get("answers"), list) else GENERIC
    known = preprocessors.known_format(task)
    if known is None and row and {"question", "context", "answers"} <= row.keys():
        return preprocessors.squad_format(task)
    return known or GENERIC


def _first_row(task: str) -> dict[str, Any] | None:
    try:
        return next(_objects(_file(task, "train")))[1]
    except (UserError, StopIteration):
        return None  # told when the task is used


def _file(task: str, split: str) -> Path:
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise UserError(
            f"Task 'files_{task}' reads the folder named by the environment variable {VARIABLE}, which is not set; "
            f"set it to the folder that holds {task}/train.jsonl."
        )
    return Path(folder).expanduser() / task / f"{split}.jsonl"


def _files(task: str) -> list[str]:
    """All files of the task: which splits there are, and in which way they are cut, depends on each of them."""
    return [str(_file(task, split)) for split in ("train", "validation", "test")]


register()
