"""Your own tasks: every folder of JSONL or TSV files under the folder that the variable MPT_JAX_DATA names.

    $MPT_JAX_DATA/<task>/{train,validation,test}.jsonl or .tsv    (`reading.py`)  →  seqio task `files_<task>`

* Rows with `inputs` and `targets`, both text, scored by accuracy (with a list `answers` in every row: by exact match and F1
  against the best of them).
* Rows with `question`, `context`, `answers` ({"text": [...]}, a list, or one text) are extractive questions.
* Rows of any other fields, with a file `task.json` beside them that says what to make of them:

    {"inputs": "premise: {premise} hypothesis: {hypothesis}", "target": "label",
     "labels": {"0": "yes", "1": "maybe", "2": "no"}, "metrics": ["accuracy", "f1_macro"]}

  `inputs` is a template with fields in braces; `target` (default "label") is the field for the targets; `labels` (may be left
  out) gives the word for each of its values; `metrics` (default accuracy) are functions of `mpt_jax/metrics.py`.

A folder with the name and the fields of a dataset of the library (sst2, mnli, ...) is read by the library's tasks, `sst2_t5` for
instance: see `library.py`.

Without a test file, ATTEMPT's rule makes a test split out of what is labelled: with fewer than 10,000 training rows the
validation file is halved into validation and test; otherwise 1,000 training rows become the validation split and the validation
file is the test split. Which rows: `splits.py`.
"""

import dataclasses
import functools
import json
import logging
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import seqio

from mpt_jax import metrics
from mpt_jax.config import nearest
from mpt_jax.data.records import read_records
from mpt_jax.errors import UserError
from tasks import features, library, mixtures, mrqa, preprocessors, reading, splits

SPLITS = ("train", "validation", "test")
CARD = "task.json"
CARD_METRICS = ("accuracy", "f1", "f1_macro", "matthews_correlation", "pearson", "spearman", "squad", "bleu", "rouge")
OF_NUMBERS, OF_TEXTS = ("pearson", "spearman"), ("squad", "bleu", "rouge")
NO_FORMAT = f", or a file {CARD} beside it that says what to make of its fields"

logger = logging.getLogger("mpt_jax")


@dataclasses.dataclass(frozen=True)
class Form:
    """How the rows of a folder become text, and how the text is scored."""

    preprocessors: tuple[Callable[..., Any], ...]
    columns: reading.Columns
    metric_fns: tuple[Callable[..., Any], ...] = (metrics.accuracy,)
    postprocess_fn: Callable[..., Any] = metrics.strip


GENERIC = Form((), {"inputs": reading.TEXT, "targets": reading.TARGET})
GENERIC_WITH_ANSWERS = Form((), {**GENERIC.columns, "answers": reading.TEXTS}, (metrics.squad,), metrics.with_answers)


class FolderSource(features.RowsSource):
    """Rows of `$MPT_JAX_DATA/<task>`; the folder is looked up when it is used, not when the task is registered."""

    def __init__(self, task: str, columns: reading.Columns):
        super().__init__(functools.partial(split_rows, task, columns), (), lambda split: _files(task), (reading.VARIABLE,))
        self.task = task

    @property
    def splits(self) -> tuple[str, ...]:
        names = tuple(name for name in SPLITS if reading.file_of(self.task, name).is_file())
        if not names:
            folder = reading.file_of(self.task, "train").parent
            missing = next(
                (f"folder {path}" for path in (folder.parent, folder) if not path.is_dir()), f"{folder}/train.jsonl or .tsv"
            )
            raise UserError(
                f"There is no {missing}; put the files of the task there, or correct {reading.VARIABLE} or the task's name."
            )
        return (*names, "test") if names == ("train", "validation") else names


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
            seqio.TaskRegistry.add(
                f"files_{task}",
                source=FolderSource(task, form.columns),
                preprocessors=[*form.preprocessors, *features.TOKENIZE],
                output_features=features.output_features(),
                postprocess_fn=form.postprocess_fn,
                metric_fns=list(form.metric_fns),
            )


def split_rows(task: str, columns: reading.Columns, split: str) -> list[features.Row]:
    """The rows of a split, given or made by ATTEMPT's rule (see the top of this file).

    Raises:
      UserError: a file is missing or cannot be divided; or one of its lines cannot be read, lacks a field or has a wrong one.
    """
    part = splits.Part(split)
    if not reading.file_of(task, "test").is_file() and reading.file_of(task, "validation").is_file():
        train = reading.read_rows(reading.file_of(task, "train"), columns, hint=NO_FORMAT)
        small = len(train) < splits.SMALL_TRAIN
        part = (splits.halved() if small else splits.held_out())[split]
        told = "the validation file is halved" if small else f"{splits.HELD_OUT:,} training rows are held out for validation"
        logger.info("%s: %s, as there is no test file", reading.file_of(task, "train").parent, told)
    path = reading.file_of(task, part.official)
    rows = reading.read_rows(path, columns, hint=NO_FORMAT)
    return reading.answered([rows[i] for i in splits.chosen(part, len(rows))], path)


# ---------------------------------------------------------------- forms


def _form(task: str, row: dict[str, Any] | None) -> Form | None:
    """The form of a folder whose first row is `row`; None where it is one of the library's."""
    card = reading.candidates(task, "train")[0].with_name(CARD)
    if card.is_file():
        return _card_form(card)
    if row and {"inputs", "targets"} <= row.keys():
        return GENERIC_WITH_ANSWERS if isinstance(row.get("answers"), list) else GENERIC
    if task in mixtures.DATASETS:
        return None
    if row and {"question", "context", "answers"} <= row.keys():
        text = functools.partial(
            preprocessors.text_to_text, inputs=f"{task} {mrqa.QUESTION}", target="answer", carry=("answers", "id")
        )
        return Form((preprocessors.squad_all, text), mrqa.SQUAD_COLUMNS, (metrics.squad,), metrics.with_answers)
    return GENERIC  # which tells what is missing when the task is used


def _card_form(path: Path) -> Form:
    """The form that a `task.json` declares. UserError when it is wrong."""
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); correct it.") from None
    known = {"inputs": str, "target": str, "labels": dict, "metrics": list}
    for name, value in card.items() if isinstance(card, dict) else ():
        if name not in known:
            raise UserError(
                f"{path} has the key '{name}', which means nothing.{nearest(name, known)} It may have {', '.join(known)}."
            )
        if not isinstance(value, known[name]):
            raise UserError(f"{path}: '{name}' must be a {known[name].__name__}, not {value!r}; correct it.")
    if not isinstance(card, dict) or "inputs" not in card:
        raise UserError(f"{path} needs the key 'inputs', a template such as \"text: {{text}}\"; add it.")
    target, labels = card.get("target", "label"), {str(value): str(word) for value, word in card.get("labels", {}).items()}
    fields = _template_fields(path, card["inputs"])
    names = card.get("metrics", ["accuracy"])
    for name in names:
        if name not in CARD_METRICS or not hasattr(metrics, name):
            raise UserError(
                f"{path} names the metric '{name}'.{nearest(name, CARD_METRICS)} There are {', '.join(CARD_METRICS)}."
            )
    if {"f1", "f1_macro"} & set(names) and len(labels) < 2:
        raise UserError(f"{path} names the metric '{names[0]}', which needs 'labels', two words at least; add them.")
    if set(names) & set(OF_NUMBERS) and (labels or not set(names) <= set(OF_NUMBERS)):
        raise UserError(f"{path}: pearson and spearman compare numbers; take no other 'metrics' and no 'labels' beside them.")
    words = tuple(labels.values())
    if len(set(words)) < len(words):
        raise UserError(f"{path}: 'labels' gives two values the same word; give each its own.")
    text = functools.partial(
        preprocessors.text_to_text, inputs=card["inputs"], target=target, classes=tuple(labels), labels=words
    )
    kind = _one_of(tuple(labels)) if labels else reading.TARGET
    postprocess = metrics.number if set(names) <= set(OF_NUMBERS) else metrics.strip
    functions = tuple(library.metric_fn(name, words) for name in names)
    return Form((text,), dict.fromkeys(fields, reading.TEXT) | {target: kind}, functions, postprocess)


def _template_fields(path: Path, template: str) -> list[str]:
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise UserError(
            f"{path}: 'inputs' is not a template ({error}); write fields in braces, braces themselves twice."
        ) from None
    if not fields or "" in fields:
        raise UserError(f"{path}: 'inputs' must name fields in braces, not {template!r}; write {{text}}, for instance.")
    return fields


def _one_of(values: tuple[str, ...]) -> reading.Kind:
    return reading.Kind(f"one of {', '.join(values)}", lambda value: str(value) if str(value) in values else None)


def _first_row(task: str) -> dict[str, Any] | None:
    """The first row of the training file, None where it cannot be read: that is told when the task is used."""
    try:
        return next((row for _, row in read_records(reading.file_of(task, "train"))), None)
    except UserError:
        return None


def _files(task: str) -> list[str]:
    """All files of the task: which splits there are, and in which way they are cut, depends on each of them."""
    paths = [path for split in SPLITS for path in reading.candidates(task, split)]
    return [str(path) for path in [*paths, paths[0].with_name(CARD)]]


register()
