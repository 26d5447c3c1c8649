"""Your own tasks: what a `TaskConfig` describes, in gin or in the `task.json` of a folder, and what makes splits of its rows.

    DataConfig.own_tasks = {'reviews': @TaskConfig()}
    TaskConfig.inputs = 'review: {text}'
    TaskConfig.target = 'stars'
    TaskConfig.labels = {'1': 'bad', '5': 'good'}
    TaskConfig.folder = 'data/reviews'

Without a test split, ATTEMPT's rule makes one out of what is labelled: with fewer than 10,000 training rows the validation split
is halved into validation and test; otherwise 1,000 training rows become the validation split and the validation split is the test
split. Which rows: `splits.py`.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import seqio

from mpt_jax import metrics
from mpt_jax.config import NUMBER_METRICS, TASK_SPLITS, TaskConfig
from mpt_jax.data import downloads
from mpt_jax.data.records import Record, count_records
from mpt_jax.errors import UserError
from tasks import features, library, preprocessors, reading, splits

CARD = "task.json"  # in a folder, the TaskConfig of its rows

logger = logging.getLogger("mpt_jax")

_registered: dict[str, TaskConfig] = {}


@dataclasses.dataclass(frozen=True)
class Form:
    """How rows become text, and how the text is scored."""

    preprocessors: tuple[Callable[..., Any], ...]
    columns: reading.Columns
    metric_fns: tuple[Callable[..., Any], ...] = (metrics.accuracy,)
    postprocess_fn: Callable[..., Any] = metrics.strip


def form_of(task: TaskConfig) -> Form:
    """The form that a validated `TaskConfig` describes."""
    words = tuple(task.labels.values())
    text = functools.partial(preprocessors.text_to_text, inputs=task.inputs, target=task.target)
    columns = dict.fromkeys(task.fields(), reading.TEXT)
    columns[task.target] = _one_of(task.labels) if words else reading.TARGET
    of_numbers = set(task.metrics) <= set(NUMBER_METRICS)
    return Form(
        (text,),
        columns,
        tuple(library.metric_fn(name, words) for name in task.metrics),
        metrics.number if of_numbers else metrics.strip,
    )


def _one_of(labels: Mapping[str, str]) -> reading.Kind:
    """A value that has a label, as its word; values that are no text are meant as JSON writes them."""
    return reading.Kind(
        f"one of {', '.join(labels)}", lambda value: labels.get(value if isinstance(value, str) else json.dumps(value))
    )


def add(name: str, source: "OwnSource", form: Form) -> None:
    """Registers a task with seqio."""
    seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[*form.preprocessors, *features.TOKENIZE],
        output_features=features.output_features(),
        postprocess_fn=form.postprocess_fn,
        metric_fns=list(form.metric_fns),
    )


def register(tasks: Mapping[str, TaskConfig]) -> None:
    """Registers `DataConfig.own_tasks`, those of another definition anew.

    Raises:
      UserError: a name is that of another task or mixture; or a definition means nothing.
    """
    for name, task in tasks.items():
        if _registered.get(name) == task:
            continue
        if name in _registered:
            seqio.TaskRegistry.remove(name)
        elif name in {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}:
            raise UserError(f"DataConfig.own_tasks has '{name}', which is the name of another task or mixture; give it another.")
        add(name, OwnSource(_table_of(name, task), form_of(task).columns), form_of(task))
        _registered[name] = task


class OwnSource(features.RowsSource):
    """The splits of a place, given or made by ATTEMPT's rule (see the top of this file)."""

    def __init__(self, place: "Files | Tfds", columns: reading.Columns):
        super().__init__(functools.partial(split_rows, place, columns), (), lambda split: place.files(), place.environment)
        self.place = place
        self.element_spec = reading.Reader(columns).spec

    @property
    def origin(self) -> str:
        return self.place.origin

    @property
    def splits(self) -> tuple[str, ...]:
        place = self.place
        names = place.there() if isinstance(place, Files) else tuple(place.names) or TASK_SPLITS  # without asking TFDS
        return TASK_SPLITS if set(names) == {"train", "validation"} else names


def split_rows(place: "Files | Tfds", columns: reading.Columns, split: str) -> features.Stream:
    """The rows of a split.

    Raises:
      UserError: as `reading.stream`; or the place has no such split, or cannot be read.
    """
    there, part = place.there(), splits.Part(split)
    if "test" not in there and {"train", "validation"} <= set(there):
        small = place.count("train") < splits.SMALL_TRAIN
        part = (splits.halved() if small else splits.held_out())[split]
        told = "the validation split is halved" if small else f"{splits.HELD_OUT:,} training rows are held out for validation"
        logger.info("%s: %s, as there is no test split", place.origin or place.files()[0], told)
    return reading.stream(place.table(part.official), reading.Reader(columns, hint=place.hint), part)


# ---------------------------------------------------------------- where rows lie


@dataclasses.dataclass(frozen=True)
class Files:
    """A folder with a file for each split; it is looked up when it is used, not when the task is registered."""

    folder: Callable[[], Path]
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)  # `TaskConfig.splits`
    environment: tuple[str, ...] = ()
    hint: str = ""  # what to do where a field is missing
    cure: str = ""  # what to correct where there are no files

    @property
    def origin(self) -> str:
        return "" if self.environment else str(self.folder())

    def there(self) -> tuple[str, ...]:
        """The splits that have a file. UserError where there is none, or not one that is named."""
        splits_ = tuple(self.names) or tuple(split for split in TASK_SPLITS if self._file(split).is_file())
        missing = [self._file(split) for split in splits_ or TASK_SPLITS[:1] if not self._file(split).is_file()]
        if missing:
            folder = self.folder()
            gone = [f"folder {path}" for path in (folder.parent, folder) if not path.is_dir()] or [f"{missing[0]} or .tsv"]
            raise UserError(f"There is no {gone[0]}; put the files of the task there, or correct {self.cure}.")
        return splits_

    def table(self, split: str) -> reading.Table:
        return reading.file_table(self._file(split))

    def count(self, split: str) -> int:
        return count_records(self._file(split))

    def files(self) -> list[str]:
        """All files of the task: which splits there are, and in which way they are cut, depends on each of them."""
        folder, names = self.folder(), self.names.values() or TASK_SPLITS
        return [str(path) for path in [*(file for name in names for file in reading.candidates(folder, name)), folder / CARD]]

    def _file(self, split: str) -> Path:
        return reading.file_of(self.folder(), self.names.get(split, split))


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A TFDS dataset, downloaded when one of its splits is read."""

    name: str
    task: str
    names: Mapping[str, str]
    environment = ()
    hint = ""

    @property
    def origin(self) -> str:
        return f"TFDS {self.name}"

    def there(self) -> tuple[str, ...]:
        return tuple(self.names) or tuple(split for split in TASK_SPLITS if split in self._builder().info.splits)

    def table(self, split: str) -> reading.Table:
        builder, name = self._opened(split)
        cure = f"correct TaskConfig.target, labels or splits of '{self.task}'"
        return reading.Table(f"TFDS {self.name}, {name}", "row", cure, lambda: _records(builder, name))

    def count(self, split: str) -> int:
        builder, name = self._opened(split)
        return int(builder.info.splits[name].num_examples)

    def _opened(self, split: str) -> tuple[Any, str]:
        """The dataset and its name for the split. UserError where it has none."""
        builder, name = self._builder(), self.names.get(split, split)
        try:
            builder.info.splits[name]
        except (KeyError, ValueError, AssertionError):  # no such split; a slice that is none
            raise UserError(
                f"TFDS {self.name} has no split '{name}' (it has {', '.join(builder.info.splits)}); name the right one in "
                f"TaskConfig.splits of '{self.task}'."
            ) from None
        return builder, name

    def files(self) -> list[str]:
        return []

    def _builder(self) -> Any:
        return downloads.open_tfds(
            seqio.TfdsDataSource(tfds_name=self.name).tfds_dataset, f"task '{self.task}' (TaskConfig.tfds)"
        )


def _records(builder: Any, split: str) -> Iterator[Record]:
    """Rows of TFDS as those of a file would be."""
    return enumerate(library.tfds_rows(builder.as_dataset(split=split, shuffle_files=False)), 1)


def _table_of(name: str, task: TaskConfig) -> Files | Tfds:
    if task.tfds:
        return Tfds(task.tfds, name, task.splits)
    if task.folder:
        return Files(lambda: Path(task.folder).expanduser(), task.splits, cure=f"TaskConfig.folder of '{name}'")
    return Files(
        functools.partial(_folder_by_name, name),
        task.splits,
        (reading.VARIABLE,),
        cure=f"{reading.VARIABLE}, or set TaskConfig.folder of '{name}'",
    )


def _folder_by_name(name: str) -> Path:
    if reading.data_folder(needed=False) is None:
        raise UserError(
            f"TaskConfig.folder of '{name}' is not set, and the environment variable {reading.VARIABLE}, in whose folder it "
            "would be looked for then, is not set either; set one of them, or TaskConfig.tfds."
        )
    return reading.folder_of(name)
