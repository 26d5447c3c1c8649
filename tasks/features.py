"""What every task module shares: output features, tokenisation and sources of rows.

A seqio task names the vocabulary of its features when it is registered, but here the vocabulary belongs to the run (it comes
with the backbone). Tasks are therefore registered with a placeholder, and the cache builder (`mpt_jax/data/build.py`) gives
each feature the run's vocabulary before it asks the task for a dataset (`seqio.Task.replace`). A task that was registered
with a vocabulary of its own is treated the same way: a T5 reads one vocabulary only.

The pattern, complete:

    import seqio
    from mpt_jax import metrics
    from tasks import features, preprocessors

    seqio.TaskRegistry.add(
        "my_task",
        # Any seqio source: TfdsDataSource, TextLineDataSource, FunctionDataSource ... or plain Python rows:
        source=features.rows_source({"train": train_rows, "validation": lambda: read_rows(), "test": test_rows}),
        # Text to text (the rows need `inputs` and `targets` after this), then tokens:
        preprocessors=[preprocessors.my_format, *features.TOKENIZE],
        output_features=features.output_features(),
        # postprocess_fn(text, example=None, is_target=False) and metric_fns(targets, predictions) as in seqio. Functions that
        # live in `mpt_jax.metrics` (or functools.partial of them) score without TensorFlow; any others load seqio to score.
        postprocess_fn=metrics.strip,
        metric_fns=[metrics.accuracy],
    )
    seqio.MixtureRegistry.add("my_mixture", ["my_task", "my_other_task"], default_rate=1)

Rows are dicts of str, int, float, or lists or dicts of those, the same fields in every row of a split. Fields other than `inputs`
and `targets` travel with the example: scoring (`example["answers"]`) and `TokenCache.text` see them.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import seqio
import tensorflow as tf

Row = dict[str, Any]
Rows = Iterable[Row] | Callable[[], Iterable[Row]]

CHUNK = 1_000  # rows of a stream that are handed to TensorFlow at a time

# EOS survives truncation (T5's own fine-tuning cuts it off: `seqio.preprocessors.append_eos`).
TOKENIZE = (seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim)


def output_features() -> dict[str, seqio.Feature]:
    """`inputs` and `targets`, int32 with EOS; the vocabulary is a placeholder (see the top of this file)."""
    placeholder = seqio.PassThroughVocabulary(size=0, eos_id=1)
    return {name: seqio.Feature(vocabulary=placeholder, add_eos=True) for name in ("inputs", "targets")}


class Stream(NamedTuple):
    """Rows that are read while they are used, and need not fit into memory.

    Attributes:
      rows: reads them anew, from the first one on.
      spec: their fields as tf.TypeSpecs; a list is a RaggedTensorSpec of rank 0.
    """

    rows: Callable[[], Iterator[Row]]
    size: int
    spec: Mapping[str, Any]


class RowsSource(seqio.FunctionDataSource):
    """A seqio source of Python rows that says which files and environment variables its rows depend on.

    The cache is rebuilt when one of `data_files(split)` or the value of one of `environment` changes.
    """

    def __init__(
        self,
        rows_of: Callable[[str], Iterable[Row] | Stream],
        splits: Iterable[str],
        data_files: Callable[[str], list[str]] | None = None,
        environment: tuple[str, ...] = (),
    ):
        super().__init__(lambda split, shuffle_files=False, seed=None: rows_dataset(rows_of(split)), splits=tuple(splits))
        self.rows_of = rows_of  # also leads the cache builder to the code that the rows come from
        self.environment = environment
        self._data_files = data_files

    def data_files(self, split: str) -> list[str]:
        return [os.fspath(path) for path in self._data_files(split)] if self._data_files else []


def rows_source(splits: Mapping[str, Rows]) -> RowsSource:
    """A source from `{split: rows}`; the rows may be a function without arguments, called when the split is first read."""

    def rows_of(split: str) -> Iterable[Row]:
        rows = splits[split]
        return rows() if callable(rows) else rows

    source = RowsSource(rows_of, splits)
    source.dependencies = tuple(rows for rows in splits.values() if callable(rows))
    return source


def rows_dataset(rows: Iterable[Row] | Stream) -> tf.data.Dataset:
    """The rows as a dataset, in their order. Lists become 1-D tensors; a split without rows is an error."""
    if isinstance(rows, Stream):
        return _streamed(rows)
    rows = list(rows)
    if not rows:
        raise ValueError("a split without rows; give at least one")
    return tf.data.Dataset.from_tensor_slices(_columns(rows))


def _streamed(stream: Stream) -> tf.data.Dataset:
    def batched(spec: Any) -> Any:
        if isinstance(spec, tf.RaggedTensorSpec):
            return tf.RaggedTensorSpec((None, None), spec.dtype, ragged_rank=1)
        return tf.TensorSpec((None,), spec.dtype)

    def chunks() -> Iterator[Row]:
        rows = stream.rows()
        while chunk := list(itertools.islice(rows, CHUNK)):
            yield _columns(chunk)

    dataset = tf.data.Dataset.from_generator(chunks, output_signature=tf.nest.map_structure(batched, dict(stream.spec)))
    return dataset.unbatch().apply(tf.data.experimental.assert_cardinality(stream.size))


def _columns(rows: list[Row]) -> Row:
    return {name: _column([row[name] for row in rows]) for name in rows[0]}


def _column(values: list[Any]) -> Any:
    """One field of all rows as a tensor, a ragged tensor (lists) or a dict of those (dicts)."""
    if isinstance(values[0], dict):
        return {name: _column([value[name] for value in values]) for name in values[0]}
    if isinstance(values[0], (list, tuple)):
        flat = [item for value in values for item in value]
        return tf.RaggedTensor.from_row_lengths(_flat(flat), [len(value) for value in values])
    return _flat(values)


def _flat(values: list[Any]) -> tf.Tensor:
    if not values or isinstance(values[0], (str, bytes)):
        return tf.constant(values, tf.string)
    number = tf.float32 if any(isinstance(value, float) for value in values) else tf.int64
    return tf.constant(values, tf.bool if isinstance(values[0], bool) else number)
