"""Predictions for a file: JSONL in, the same rows with `prediction` and `score` out. Rows of different tasks may be mixed.

`score` is the log-probability of the prediction (`predict.Prediction`); with `DecodeConfig.method="rank"`, `scores` has that of
each label: {"yes": -0.1, "no": -2.3}. What a row has under these names is replaced or, of `scores`, removed.

A row is {"task": NAME, ...} with the text in `inputs`, ready for the model, or with the fields that the task's own
preprocessors format (what they need besides, such as a label, may be missing). The latter load seqio, and so does ranking where
the training split, which has the labels, is not cached yet.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpt_jax import distributed, setup
from mpt_jax.config import Experiment
from mpt_jax.data.cache import LabelSet, mixture_tasks
from mpt_jax.data.records import read_records, shorten
from mpt_jax.data.vocabulary import EOS_ID, Vocabulary
from mpt_jax.errors import UserError
from mpt_jax.files import write_text
from mpt_jax.predict import Prediction, predict_texts

Row = dict[str, Any]
WRITTEN = ("prediction", "score", "scores")  # what an earlier call left under these names is replaced, or gone
LINE = "\0line"  # where a row carries its number, which no field of a file is called


def run_infer(experiment: Experiment) -> Path:
    """The `infer` command: decode `InferConfig.input_file` with what MODEL_DIR holds. Returns the path of the output.

    Of several processes all read the file, and the first one writes.

    Raises:
        UserError: a file that is missing or cannot be written; a line that is not a JSON object, or names no task that has a
            prompt or, to rank, none with labels (with its number); nothing in MODEL_DIR.
    """
    experiment.validate()
    rows = read_rows(experiment.infer.input_file)
    output = _output_path(experiment)
    mesh = setup.mesh_of(experiment)
    trained = setup.open_trained(experiment, mesh)
    vocabulary = setup.open_vocabulary(experiment, trained.backbone)
    numbers = _prompt_numbers(experiment, rows, trained)
    named = [(str(row["task"]), number) for row, number in zip(rows, numbers, strict=True) if row.get("task") is not None]
    trained.warn_of_others([task for task, _ in named], [number for _, number in named])
    labels = _labels(experiment, rows, numbers, trained, vocabulary)
    only = trained.tasks[0] if len(trained.tasks) == 1 else ""
    inputs, cut = _tokenise(experiment, rows, vocabulary, only)
    predictions = predict_texts(
        trained.backbone,
        trained.prompt_module,
        trained.trainable,
        inputs,
        numbers,
        vocabulary=vocabulary,
        lengths=experiment.data.lengths,
        decode=experiment.decode,
        labels=labels,
        mesh=mesh,
    )
    if not distributed.is_first():  # all have the same predictions
        return output
    rows = [{name: value for name, value in row.items() if name not in WRITTEN} for row in rows]
    answered = [row | _fields(prediction) for row, prediction in zip(rows, predictions, strict=True)]
    try:
        write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answered))
    except OSError as error:
        raise _unwritable(output, error) from None
    if cut:
        print(f"{cut} of {len(rows)} inputs were cut to {experiment.data.lengths['inputs']} tokens (TASK_FEATURE_LENGTHS).")
    print(f"{len(rows)} predictions in {output}")
    return output


def read_rows(path: str) -> list[Row]:
    """The rows of a JSONL file; empty lines do not count.

    Raises:
        UserError: no file; a line that is not a JSON object, by file and number.
    """
    if not path:
        raise UserError("InferConfig.input_file is not set; give a JSONL file.")
    rows = []
    for number, row in read_records(Path(path).expanduser(), "InferConfig.input_file"):
        if "inputs" in row and not isinstance(row["inputs"], str):
            raise UserError(f"{path}, line {number}: 'inputs' must be a text, not {shorten(json.dumps(row['inputs']))}.")
        rows.append(row | {LINE: number})
    if not rows:
        raise UserError(f"InferConfig.input_file '{path}' has no rows; give at least one.")
    return rows


def _output_path(experiment: Experiment) -> Path:
    """The file to write, found writable before anything is decoded."""
    given = experiment.infer.output_file
    if not given:
        raise UserError("InferConfig.output_file is not set; give the path of the JSONL file to write.")
    path = Path(given).expanduser()
    if path.is_dir():
        raise UserError(f"InferConfig.output_file '{path}' is a folder; give the path of the JSONL file to write.")
    if path.exists() and path.samefile(Path(experiment.infer.input_file).expanduser()):
        raise UserError(f"InferConfig.output_file '{path}' is the input file, which would be written over; give another path.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from None
    return path


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"Cannot write InferConfig.output_file '{path}' ({error.strerror}); give another path.")


def _prompt_numbers(experiment: Experiment, rows: Sequence[Row], trained: setup.Trained) -> list[int]:
    """The prompt of each row; a row without a task is fine where there is only one prompt, or none.

    A single prompt serves other tasks than its own, too, but not names of none.
    """
    path, numbers = experiment.infer.input_file, {}  # of each task
    for row in rows:
        line, task = row[LINE], row.get("task")
        if task is None and len(trained.tasks) > 1:
            names = ", ".join(dict.fromkeys(trained.tasks))
            raise UserError(f"{path}, line {line}: no 'task'; {trained.source} has several prompts, for {names}.")
        if str(task) in numbers:
            continue
        try:
            if len(trained.tasks) == 1 and task is not None and str(task) not in trained.tasks:
                mixture_tasks(experiment.data, str(task))
            [numbers[str(task)]] = trained.prompt_of([str(task)])
        except UserError as error:
            raise UserError(f"{path}, line {line}: {error}") from None
    return [numbers[str(row.get("task"))] for row in rows]


def _labels(
    experiment: Experiment, rows: Sequence[Row], numbers: Sequence[int], trained: setup.Trained, vocabulary: Vocabulary
) -> list[LabelSet] | None:
    """The labels of each row, to rank: those of its task or, where it names none, of its prompt's task. None to generate."""
    if experiment.decode.method != "rank":
        return None
    known: dict[str, LabelSet] = {}
    labels, path = [], experiment.infer.input_file
    for row, number in zip(rows, numbers, strict=True):
        task = row.get("task")
        if task is None and not trained.tasks:
            raise UserError(f"{path}, line {row[LINE]}: no 'task', whose labels DecodeConfig.method='rank' needs; name it.")
        task = trained.tasks[number] if task is None else str(task)
        if task not in known:
            try:
                known |= zip([task], setup.open_labels(experiment, [task], vocabulary) or [], strict=True)
            except UserError as error:
                raise UserError(f"{path}, line {row[LINE]}: {error}") from None
        labels.append(known[task])
    return labels


def _fields(prediction: Prediction) -> Row:
    """What is written of a prediction; six digits are what float32 holds."""

    def rounded(score: float) -> float:
        return float(f"{score:.6g}")

    scores = {label: rounded(score) for label, score in prediction.scores.items()}
    return {"prediction": prediction.text, "score": rounded(prediction.score)} | ({"scores": scores} if scores else {})


def _tokenise(experiment: Experiment, rows: list[Row], vocabulary: Vocabulary, only: str) -> tuple[list[np.ndarray], int]:
    """Token ids with EOS of every row, and how many were cut. Takes the line numbers off the rows.

    `only` is the task of rows that name none, "" where there are several.
    """
    path, limit = experiment.infer.input_file, experiment.data.lengths["inputs"]
    lines = [row.pop(LINE) for row in rows]
    inputs: dict[int, np.ndarray] = {}
    by_task: dict[str, list[int]] = {}
    cut = 0
    for i, row in enumerate(rows):
        if "inputs" in row:
            ids = vocabulary.encode(row["inputs"])
            cut += len(ids) >= limit
            inputs[i] = np.asarray([*ids[: limit - 1], EOS_ID], np.int32)
        elif "task" in row or only:
            by_task.setdefault(str(row.get("task", only)), []).append(i)
        else:
            raise UserError(f"{path}, line {lines[i]}: neither 'inputs' nor 'task'; give the text, or the task and its fields.")
    for task, members in by_task.items():
        from mpt_jax.data.rows import tokenise_rows  # loads TensorFlow

        fields = [{name: value for name, value in rows[i].items() if name != "task"} for i in members]
        outputs, more = tokenise_rows(experiment.data, task, fields, vocabulary)
        cut += more
        for i, output in zip(members, outputs, strict=True):
            if isinstance(output, str):
                raise UserError(
                    f"{path}, line {lines[i]}: task '{task}' cannot format this row ({output}); give the fields that its "
                    "training data have, or the finished text in 'inputs'."
                )
            inputs[i] = output
    return [inputs[i] for i in range(len(rows))], cut
