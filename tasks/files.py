"""Your own tasks, without any configuration: every folder of files in the folder that the variable MPT_JAX_DATA names.

    $MPT_JAX_DATA/<task>/{train,validation,test}.jsonl or .tsv    (`reading.py`)  →  seqio task `files_<task>`

* Rows with `inputs` and `targets`, both text, scored by accuracy (with a list `answers` in every row: by exact match and F1
  against the best of them).
* Rows with `question`, `context`, `answers` ({"text": [...]}, a list, or one text) are extractive questions.
* Rows of any other fields, with a file `task.json` beside them that says what to make of them, a `TaskConfig` without its places:

    {"inputs": "premise: {premise} hypothesis: {hypothesis}", "target": "label",
     "labels": {"0": "yes", "1": "maybe", "2": "no"}, "metrics": ["accuracy", "f1_macro"]}

A folder with the name and the fields of a dataset of the library (sst2, mnli, ...) is read by the library's tasks, `sst2_t5` for
instance: see `library.py`. What is the test split without a test file: see `own.py`.
"""

import functools
import json
import logging
import re
from pathlib import Path
from typing import Any

import seqio

from mpt_jax import metrics
from mpt_jax.config import TaskConfig, nearest
from mpt_jax.data.records import read_records
from mpt_jax.errors import UserError
from tasks import mixtures, mrqa, own, preprocessors, reading

CARD_KEYS = {"inputs": str, "target": str, "labels": dict, "metrics": list}

GENERIC = own.Form((), {"inputs": reading.TEXT, "targets": reading.TARGET})
GENERIC_WITH_ANSWERS = own.Form((), {**GENERIC.columns, "answers": reading.TEXTS}, (metrics.squad,), metrics.with_answers)

logger = logging.getLogger("mpt_jax")


def register() -> None:
    """Registers every folder of `$MPT_JAX_DATA` with a training file. Names that are registered already stay."""
    folder = reading.data_folder(needed=False)
    paths = [path for ending in reading.ENDINGS for path in folder.glob(f"*/train.{ending}")] if folder else []
    for task in sorted({path.parent.name for path in paths}):
        if not re.fullmatch(r"[\w.]+", task):  # seqio's rule
            logger.warning("%s/%s is not read: rename the folder, with letters, digits, _ and . only", folder, task)
            continue
        if f"files_{task}" in seqio.TaskRegistry.names():
            continue
        try:
            form = _form(task, _first_row(task))
        except UserError as error:  # of a card; the other folders' tasks may still be used
            logger.warning("files_%s is not there. %s", task, error)
            continue
        if form is not None:
            own.add(f"files_{task}", own.OwnSource(place_of(task), form.columns), form)


def place_of(task: str) -> own.Files:
    """The files of `$MPT_JAX_DATA/<task>`."""
    return own.Files(
        functools.partial(reading.folder_of, task),
        environment=(reading.VARIABLE,),
        hint=f", or a file {own.CARD} beside it that says what to make of its fields",
        cure=f"{reading.VARIABLE} or the task's name",
    )


# ---------------------------------------------------------------- forms


def _form(task: str, row: dict[str, Any] | None) -> own.Form | None:
    """The form of a folder whose first row is `row`; None where it is one of the library's."""
    card = reading.folder_of(task) / own.CARD
    if card.is_file():
        return own.form_of(_read_card(card))
    if row and {"inputs", "targets"} <= row.keys():
        return GENERIC_WITH_ANSWERS if isinstance(row.get("answers"), list) else GENERIC
    if task in mixtures.DATASETS:
        return None
    if row and {"question", "context", "answers"} <= row.keys():
        text = functools.partial(
            preprocessors.text_to_text, inputs=f"{task} {mrqa.QUESTION}", target="answer", carry=("answers", "id")
        )
        return own.Form((preprocessors.squad_all, text), mrqa.SQUAD_COLUMNS, (metrics.squad,), metrics.with_answers)
    return GENERIC  # which tells what is missing when the task is used


def _read_card(path: Path) -> TaskConfig:
    """What a `task.json` says. UserError when it is wrong."""
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); correct it.") from None
    for name, value in card.items() if isinstance(card, dict) else ():
        if name not in CARD_KEYS:
            raise UserError(
                f"{path} has the key '{name}', which means nothing.{nearest(name, CARD_KEYS)} It may have {', '.join(CARD_KEYS)}."
            )
        if not isinstance(value, CARD_KEYS[name]):
            raise UserError(f"{path}: '{name}' must be a {CARD_KEYS[name].__name__}, not {value!r}; correct it.")
    if not isinstance(card, dict) or "inputs" not in card:
        raise UserError(f"{path} needs the key 'inputs', a template such as \"text: {{text}}\"; add it.")
    labels = {value: str(word) for value, word in card.get("labels", {}).items()}
    task = TaskConfig(**card | {"labels": labels, "metrics": tuple(map(str, card.get("metrics", ["accuracy"])))})
    task.validate(lambda field: f"{path}: '{field}'")
    return task


def _first_row(task: str) -> dict[str, Any] | None:
    """The first row of the training file, None where it cannot be read: that is told when the task is used."""
    try:
        return next((row for _, row in read_records(reading.file_of(reading.folder_of(task), "train"))), None)
    except UserError:
        return None


register()
