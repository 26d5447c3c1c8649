"""The task library: what a dataset is, where its rows come from, and how its tasks are registered.

A dataset has up to four formats, each a task of its own; the suffix of the task's name says which:

    <name>_t5                   T5's text, with the name in front, and labels as words
    <name>_prompt_tuning        the same without the name (Lester et al. 2021)
    <name>_attempt              the name, then `field: value` for each field, and labels as digits (ATTEMPT, MPT)
    <name>_attempt_published    the same with a slip of ATTEMPT's code, or counted as in its tables, for comparison with them

The rows are those of `$MPT_JAX_DATA/<name>/` where there is such a folder, else of TFDS (downloaded at first use). Splits:

    train, validation, test     ATTEMPT's protocol (`splits.py`), which MPT and DePT share; `test` is always labelled
    official_train, ...         the dataset's own labelled splits, as Lester et al. and SPoT report on them

A file of a folder is an official split: `test.jsonl` is `official_test`, and `test` where the protocol takes it from there.
The permutation of the protocol counts rows in the order of the source: files in the order of Hugging Face's datasets give
ATTEMPT's rows exactly, TFDS' order gives others, as many.

`register` makes one task; a copy of a task with label words of your own is

    library.register(glue.DATASETS["mnli"], "prompt_tuning", name="mnli_mine", labels=("yes", "maybe", "no"))
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from mpt_jax import metrics
from mpt_jax.config import OFFICIAL
from mpt_jax.data import downloads
from mpt_jax.data.records import count_records
from mpt_jax.errors import UserError
from tasks import features, preprocessors, reading
from tasks.splits import HELD_OUT, Part, Protocol, chosen, counts, halved

logger = logging.getLogger("mpt_jax")

REGISTERED: dict[str, tuple["Dataset", str]] = {}  # what `register` has made: a task's dataset and format

Preprocessor = Callable[[tf.data.Dataset], tf.data.Dataset]


@dataclasses.dataclass(frozen=True)
class Format:
    """How a row becomes text, and how the text is scored. The template and the fields are those of `text_to_text`."""

    inputs: str
    target: str = "label"
    labels: tuple[str, ...] = ()  # written instead of the numbers; the second one is the positive one
    metrics: tuple[str, ...] = ("accuracy",)  # functions of `mpt_jax.metrics`
    postprocess: str = "strip"  # the same
    prepare: Preprocessor | None = None  # makes the fields that the template names
    carry: tuple[str, ...] = ()
    collapse: bool = False
    training_filter: Preprocessor | None = None  # of the rows of `train` and `official_train`
    training_examples: int = 0  # of `official_train` where they are not its rows


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset: its name is that of its folder and the beginning of its tasks' names.

    Attributes:
      tfds: TFDS' name with configuration and version; "" where TFDS does not have it.
      columns: the fields that are needed, by TFDS' names.
      rows: the published number of labelled rows of each official split, 0 where it is not known.
      protocol: how `train`, `validation` and `test` come from the official splits.
      source: where the protocol or the formats are from, as far as they are not the published ones.
      classes: the words of the numbers of the field `label`.
      tfds_splits: TFDS' name of an official split where it has another.
      aliases: other names that fields may have in files (Hugging Face's).
      convert: makes these fields of a record in another shape, where Hugging Face's differs in more than names.
      group: a field that rows with references to one input share; such rows of evaluation splits become one.
    """

    name: str
    tfds: str
    columns: reading.Columns
    formats: Mapping[str, Format]
    rows: Mapping[str, int]
    protocol: Protocol
    source: str = ""
    classes: tuple[str, ...] = ()
    label: str = "label"
    tfds_splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    convert: Callable[[dict[str, Any]], dict[str, Any]] = dict
    group: str = ""

    @property
    def parts(self) -> dict[str, Part]:
        """Every split by name."""
        return {**self.protocol, **{f"{OFFICIAL}{name}": Part(name) for name in self.rows}}


# ---------------------------------------------------------------- registration


def register(dataset: Dataset, format_name: str, name: str = "", labels: tuple[str, ...] = ()) -> str:
    """Registers the task `<dataset>_<format_name>`, or `name`, with the format's label words or `labels`; returns its name."""
    form = dataset.formats[format_name]
    if labels and len(set(labels)) != len(dataset.classes):
        raise ValueError(f"{dataset.name} has the labels {dataset.classes}; give as many different words, not {labels}")
    form = dataclasses.replace(form, labels=labels or form.labels)
    classes = dataset.classes if form.target == dataset.label else ()
    written = form.labels or tuple(str(number) for number in range(len(classes)))
    text = functools.partial(
        preprocessors.text_to_text,
        inputs=form.inputs,
        target=form.target,
        classes=classes,
        labels=form.labels,
        carry=form.carry,
        collapse=form.collapse,
    )
    name = name or f"{dataset.name}_{format_name}"
    REGISTERED[name] = dataset, format_name
    seqio.TaskRegistry.add(
        name,
        source=Source(dataset, form.training_filter, free_text=not classes and form.postprocess != "number"),
        preprocessors=[*([form.prepare] if form.prepare else []), text, *features.TOKENIZE],
        output_features=features.output_features(),
        postprocess_fn=getattr(metrics, form.postprocess),
        metric_fns=[metric_fn(metric, written) for metric in form.metrics],
    )
    return name


def register_all(datasets: Mapping[str, Dataset]) -> None:
    """Registers every format of every dataset."""
    for dataset in datasets.values():
        for format_name in dataset.formats:
            register(dataset, format_name)


def metric_fn(name: str, labels: tuple[str, ...] = ()) -> Callable[..., Any]:
    """The metric `name` of `mpt_jax.metrics` for these label words, of which the second one is the positive one."""
    function = getattr(metrics, name)
    if name in ("f1", "multirc"):
        return functools.partial(function, positive=labels[1])
    if name == "f1_macro":  # a class that a small split lacks counts, too (T5's `mean_multiclass_f1`, ATTEMPT)
        return functools.partial(function, classes=list(labels))
    return function


def table_of(*datasets: Dataset) -> dict[str, Dataset]:
    return {dataset.name: dataset for dataset in datasets}


# ---------------------------------------------------------------- formats that many datasets have


def classification(
    name: str, fields: str, words: tuple[str, ...], attempt: str = "", t5_name: str = "", **more: Any
) -> dict[str, Format]:
    """The formats of a dataset with a label.

    Args:
      fields: what T5 writes, in its order: by its `glue`, the alphabet's where the order is not given.
      words: T5's words for the label's numbers.
      attempt: what ATTEMPT writes, "NAME word=field ...": the name in front, then its word for each field of the dataset.
      t5_name: the name in front in T5's format; default `name`.
      more: other attributes of the formats.
    """
    plain = " ".join(f"{field}: {{{field}}}" for field in fields.split())
    front, *pairs = (attempt or " ".join([name, *(f"{field}={field}" for field in fields.split())])).split()
    named = " ".join(f"{word}: {{{field}}}" for word, _, field in (pair.partition("=") for pair in pairs))
    return {
        "t5": Format(f"{t5_name or name} {plain}", labels=words, **more),
        "prompt_tuning": Format(plain, labels=words, **more),
        "attempt": Format(f"{front} {named}", **{**more, "collapse": False}),
    }


def label_columns(fields: str, classes: tuple[str, ...]) -> dict[str, reading.Kind]:
    """Columns of text, and the label."""
    return dict.fromkeys(fields.split(), reading.TEXT) | {"label": reading.label(classes)}


# ---------------------------------------------------------------- rows


class Source(seqio.FunctionDataSource):
    """Rows of a dataset from its local folder or from TFDS; which of them is looked up when a split is read."""

    environment = (reading.VARIABLE,)

    def __init__(self, dataset: Dataset, training_filter: Preprocessor | None = None, free_text: bool = False):
        super().__init__(lambda split, shuffle_files=False, seed=None: self._load(split), splits=())
        self.dataset = dataset
        self.training_filter = training_filter
        self.free_text = free_text  # whether the targets are known to be no label set, without a look at them
        self.dependencies = (training_filter,) if training_filter else ()  # leads the cache builder to its code

    @property
    def origin(self) -> str:
        """Where the rows come from now, for people."""
        if self._is_local():
            return f"${reading.VARIABLE}/{self.dataset.name}"
        return f"TFDS {self.dataset.tfds}" if self.dataset.tfds else f"${reading.VARIABLE}/{self.dataset.name} (not there)"

    @property
    def splits(self) -> tuple[str, ...]:
        if not self._is_local():
            return tuple(self.dataset.parts)
        there = self._there()
        return tuple(split for split, part in self._parts(there).items() if part.official in there)

    @property
    def element_spec(self) -> dict[str, Any]:
        """The fields that preprocessors need, as tf.TypeSpecs: known without reading a row."""
        return self._reader.spec

    def num_input_examples(self, split: str) -> int | None:
        """Rows of a split as published, for seqio's mixing rates; None where that is not known."""
        dataset = self.dataset
        sizes = {f"{OFFICIAL}{name}": size for name, size in dataset.rows.items() if size}
        return (sizes | counts(dataset.protocol, dataset.rows)).get(split)

    def data_files(self, split: str) -> list[str]:
        """Every file that the folder may have: on each of them it depends which splits there are, and how they are cut."""
        if reading.data_folder(needed=False) is None:
            return []
        folder = reading.folder_of(self.dataset.name)
        return [str(path) for official in self.official_names() for path in reading.candidates(folder, official)]

    def official_names(self) -> list[str]:
        """The official splits, and `validation`, which may be halved where others are not there."""
        return list(
            dict.fromkeys([*self.dataset.rows, *(part.official for part in self.dataset.protocol.values()), "validation"])
        )

    def _is_local(self) -> bool:
        folder = reading.data_folder(needed=False)
        return folder is not None and (folder / self.dataset.name).is_dir()

    def _load(self, split: str) -> tf.data.Dataset:
        rows = self._local(split) if self._is_local() else self._tfds(split)
        is_training = split.removeprefix(OFFICIAL) == "train"
        return self.training_filter(rows) if self.training_filter and is_training else rows

    @property
    def _reader(self) -> reading.Reader:
        return reading.Reader(self.dataset.columns, self.dataset.aliases, self.dataset.convert)

    def _file(self, official: str) -> Path:
        return reading.file_of(reading.folder_of(self.dataset.name), official)

    def _there(self) -> set[str]:
        return {official for official in self.official_names() if self._file(official).is_file()}

    def _local(self, split: str) -> tf.data.Dataset:
        dataset, there = self.dataset, self._there()
        parts = self._parts(there)
        if split in dataset.protocol:
            parts = {**parts, **self._enough(parts, there)}
            if parts[split] != dataset.protocol[split]:
                logger.warning(
                    "%s: validation and test are halves of the validation file, not the published splits", dataset.name
                )
        part = parts[split]
        path = self._file(part.official)
        stream = reading.stream(reading.file_table(path), self._reader, part, dataset.rows.get(part.official, 0))
        if dataset.group:
            stream = with_all_references(stream, dataset.group, merge=part.official != "train")
        logger.info("%s/%s: %s rows of %s", dataset.name, split, f"{stream.size:,}", path)
        return features.rows_dataset(stream)

    def _parts(self, there: set[str]) -> dict[str, Part]:
        """All splits from the files that are there: the published ones, or without a file for them halves of `validation`."""
        needed = {part.official for split, part in self.dataset.protocol.items() if split != "train"}
        possible = needed <= there or "validation" not in there
        return self.dataset.parts if possible else {**self.dataset.parts, **halved()}

    def _enough(self, parts: dict[str, Part], there: set[str]) -> Protocol:
        """Halves of `validation` where so few rows are in the training file that none would be left. UserError without that."""
        if parts["train"].keep == "all":
            return {}
        train = self._file("train")
        if count_records(train) > HELD_OUT:
            return {}
        if "validation" not in there:
            raise UserError(
                f"{train} has no more rows than the {HELD_OUT:,} that are held out for validation; give it more rows, or add a "
                "validation file, which is then halved."
            )
        return halved()

    def _tfds(self, split: str) -> tf.data.Dataset:
        dataset, part = self.dataset, self.dataset.parts[split]
        files = f"put its files into a folder {dataset.name} of the folder that {reading.VARIABLE} names"
        if not dataset.tfds:
            raise UserError(f"TFDS does not have '{dataset.name}'; {files}.")
        official = dataset.tfds_splits.get(part.official, part.official)
        source = seqio.TfdsDataSource(tfds_name=dataset.tfds, splits={part.official: official})
        downloads.open_tfds(source.tfds_dataset, f"'{dataset.name}'", f", or {files}")
        try:
            rows = source.get_dataset(part.official, shuffle=False)
            total = source.num_input_examples(part.official)
        except Exception as error:
            raise downloads.unreadable(dataset.tfds, error, f"'{dataset.name}'", f", or {files}") from error
        published = dataset.rows.get(part.official, 0)
        if published and total != published:
            logger.warning("%s/%s has %s rows; the published split has %s", dataset.tfds, official, total, published)
        logger.info("%s/%s: rows of TFDS' %s", dataset.name, split, dataset.tfds)
        rows = labelled(select(rows, chosen(part, total), total))
        if dataset.group and part.official != "train":  # GEM's E2E has a row for each reference, too
            stream = features.Stream(lambda: tfds_rows(rows, dataset.columns), 0, self.element_spec)
            return features.rows_dataset(with_all_references(stream, dataset.group, merge=True))
        return rows


def select(dataset: tf.data.Dataset, numbers: np.ndarray, total: int) -> tf.data.Dataset:
    """The rows with these numbers of a dataset of `total` rows."""
    if len(numbers) == total:
        return dataset
    mask = np.zeros(total, bool)
    mask[numbers] = True
    wanted = tf.constant(mask)
    kept = dataset.enumerate().filter(lambda number, _: wanted[number])
    return kept.map(lambda _, row: row)


def labelled(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Without the rows whose label is -1, as some of SNLI's are."""
    spec = dataset.element_spec
    label = spec.get("label") if isinstance(spec, dict) else None
    return dataset.filter(lambda x: x["label"] >= 0) if label is not None and label.dtype.is_integer else dataset


def tfds_rows(dataset: tf.data.Dataset, names: Iterable[str] = ()) -> Iterator[features.Row]:
    """The rows as those of a file would be; only the fields `names`, if there are any."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(inner) for name, inner in value.items()}
        value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
        if isinstance(value, list):
            return [plain(item) for item in value]
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value

    for row in dataset.as_numpy_iterator():
        yield {name: plain(row[name]) for name in names or row}


def with_all_references(stream: features.Stream, group: str, merge: bool) -> features.Stream:
    """Rows with the references of all rows that share the field `group`; with `merge`, one of them stands for all."""
    rows = list(stream.rows())
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(str(row[group]), []).extend(row["references"] or [row["target"]])
    if merge:
        first = {str(row[group]): row for row in reversed(rows)}
        rows = [{**row, "references": found[key]} for key, row in reversed(first.items())]
    return stream._replace(rows=lambda: iter(rows), size=len(rows))
