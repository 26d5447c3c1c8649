"""Rows from outside (the `infer` command) through a task's own preprocessors. Imported only for that: this loads TensorFlow."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpt_jax.config import DataConfig
from mpt_jax.data.build import tokenise
from mpt_jax.data.cache import lengths_of
from mpt_jax.data.registry import find_task
from mpt_jax.data.vocabulary import Vocabulary
from mpt_jax.errors import UserError

Row = dict[str, Any]
SPLIT = "rows"


def tokenise_rows(
    data: DataConfig, task_name: str, rows: Sequence[Row], vocabulary: Vocabulary
) -> tuple[list[np.ndarray | str], int]:
    """Input tokens of each row, as in the task's token cache, or in words why there are none; and how many were cut.

    Rows need the fields that `inputs` is made of. Others, such as the label, may be missing: they are filled in, and the
    inputs must not depend on what with.

    Raises:
        UserError: no such task, or none of its splits can be opened to see what its fields are.
    """
    task = find_task(data, task_name)
    spec = _fields(task)
    lengths = lengths_of(data)

    def run(members: Sequence[Row], filler: int) -> tuple[list[np.ndarray | str], int]:
        _, batches = tokenise(_on_rows(task, spec, members, filler), SPLIT, lengths, vocabulary)
        parts = list(batches)
        tokens = [row for part in parts for row in part.tokens["inputs"]]
        cut = sum(size > lengths["inputs"] for part in parts for size in part.uncut["inputs"])
        if len(tokens) != len(members):
            if len(members) > 1:
                raise ValueError("rows were dropped or multiplied")  # which ones? seen one by one
            return [tokens[0] if tokens else "the task's preprocessors leave it out"], cut
        return list(tokens), cut

    def all_of(members: Sequence[Row], filler: int) -> tuple[list[np.ndarray | str], int]:
        try:
            return run(members, filler)
        except Exception as error:  # TensorFlow's and the preprocessors' own
            if len(members) == 1:
                return [" ".join(str(error).split())[:160]], 0
        parts = [all_of([row], filler) for row in members]
        return [one for tokens, _ in parts for one in tokens], sum(cut for _, cut in parts)

    outputs, cut = all_of(rows, 0)
    missing = {i: names for i, row in enumerate(rows) if (names := [name for name in spec if name not in row])}
    if missing:
        others, _ = all_of([rows[i] for i in missing], 1)
        for (i, names), other in zip(missing.items(), others, strict=True):
            if not isinstance(outputs[i], str) and not np.array_equal(outputs[i], other):
                outputs[i] = f"without {' or '.join(repr(name) for name in names)}"
    return outputs, cut


def _fields(task: Any) -> dict[str, Any]:
    """Name → tf.TypeSpec of the fields of the task's source."""
    import tensorflow as tf

    def dense(spec: Any) -> Any:
        """A list of any length, as one row has it: of a ragged column, TensorFlow still calls it ragged."""
        return tf.TensorSpec(spec.shape, spec.dtype) if getattr(spec, "ragged_rank", 1) == 0 else spec

    if hasattr(task.source, "element_spec"):  # a source that knows without reading its rows
        return tf.nest.map_structure(dense, dict(task.source.element_spec))
    reasons = []
    for split in task.splits:
        try:
            dataset = task.source.get_dataset(split=split, shuffle=False, **_seed(task.source))
            return tf.nest.map_structure(dense, dict(dataset.element_spec))
        except Exception as error:  # a file that is not there, a download that is not possible
            reasons.append(f"{split}: {error}")
    raise UserError(
        f"Cannot see the fields of task '{task.name}' ({'; '.join(reasons)[:200] or 'no splits'}); make its data available, "
        "or give rows with the finished text in 'inputs'."
    )


def _seed(source: Any) -> dict[str, int]:
    function = getattr(source, "_dataset_fn", None)
    return {"seed": 0} if function is None or "seed" in inspect.signature(function).parameters else {}


def _on_rows(task: Any, spec: dict[str, Any], rows: Sequence[Row], filler: int) -> Any:
    """The task with `rows` for its data."""
    import seqio
    import tensorflow as tf

    def dataset(split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
        columns = [_filled(row, spec, filler) for row in rows]
        return tf.data.Dataset.from_generator(lambda: iter(columns), output_signature=spec)

    return task.replace(source=seqio.FunctionDataSource(dataset, splits=(SPLIT,)))


def _filled(value: Any, spec: Any, filler: int) -> Any:
    """`value` as `spec` wants it; what is missing becomes 0 or "" (filler 0), or 1 or "x" (filler 1)."""
    import tensorflow as tf

    if isinstance(spec, dict):
        given = value if isinstance(value, dict) else {}
        return {name: _filled(given.get(name), inner, filler) for name, inner in spec.items()}
    if value is None:
        fill = "x" if filler else ""
        shape = [size if size is not None else 1 for size in spec.shape]
        value = np.full(shape, fill if spec.dtype == tf.string else filler).tolist()
    if spec.dtype == tf.string and isinstance(value, (int, float)):
        value = str(value)  # a label that is a number, where the task's source makes texts of them
    if isinstance(spec, tf.RaggedTensorSpec):
        return tf.ragged.constant(value, dtype=spec.dtype)
    return tf.constant(value, dtype=spec.dtype)
