"""What task modules have registered with seqio. Imported only when that is asked for: this loads TensorFlow."""

import contextlib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from mpt_jax.config import DataConfig, nearest
from mpt_jax.errors import UserError
from mpt_jax.quiet import silent_stderr

FILES = "files_"  # how the names of tasks from $MPT_JAX_DATA begin


class Entry(NamedTuple):
    """A task or mixture of seqio's registry, as far as it is known without reading data.

    Attributes:
      source: what the task's source says of itself in an attribute `origin`, else "TFDS NAME", "$VARIABLE" (a folder that an
        environment variable names), "files" or "generated"; "mixture" for one.
      splits: () where a file or a download would be needed to tell; of a mixture always.
      metrics: names of the metric functions; () of a mixture.
      members: task → rate, of a mixture.
    """

    name: str
    source: str
    splits: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    members: Mapping[str, float] = MappingProxyType({})


def catalogue(data: DataConfig) -> list[Entry]:
    """Every task and then every mixture that is registered for `data`, sorted by name. UserError as `register_tasks`."""
    register_tasks(data)
    import seqio

    tasks = [_task_entry(seqio.TaskRegistry.get(name)) for name in sorted(seqio.TaskRegistry.names())]
    mixtures = [Entry(name, "mixture", members=dict(members(name))) for name in sorted(seqio.MixtureRegistry.names())]
    return tasks + mixtures


def members(name: str) -> list[tuple[str, float]]:
    """Tasks and rates of a registered mixture, those of mixtures inside it after its own."""
    import seqio

    mixture = seqio.MixtureRegistry.get(name)
    ordered = [task for task in mixture.rate_per_task_name if task in seqio.TaskRegistry.names()]
    ordered += [task.name for task in mixture.tasks if task.name not in ordered]
    return [(task, float(mixture.get_rate(seqio.TaskRegistry.get(task)))) for task in ordered]


def _task_entry(task: Any) -> Entry:
    return Entry(task.name, _source_of(task.source), _splits_of(task.source), tuple(map(_name_of, task.metric_fns)))


def _source_of(source: Any) -> str:
    import seqio

    if isinstance(source, seqio.TfdsDataSource):
        return f"TFDS {source.tfds_dataset.name}"
    variables = "".join(f"${name}" for name in getattr(source, "environment", ())[:1])
    kind = "generated" if isinstance(source, seqio.FunctionDataSource) else "files"
    return str(getattr(source, "origin", "") or variables or kind)


def _splits_of(source: Any) -> tuple[str, ...]:
    import seqio

    if isinstance(source, seqio.TfdsDataSource):  # which asks TFDS, and so perhaps the network, where it was given none
        return tuple(source.tfds_dataset._split_map or ())
    try:
        return tuple(source.splits)
    except UserError:  # the source's own: its files are not there
        return ()


def _name_of(metric: Any) -> str:
    inner = metric.func if isinstance(metric, functools.partial) else metric
    return str(getattr(inner, "__name__", inner))


def register_tasks(data: DataConfig) -> None:
    """Imports `DataConfig.task_modules`, which register tasks, and lets one of them register `DataConfig.own_tasks`.

    TensorFlow is kept away from accelerators.

    Raises:
      UserError: a module is not there; or there are own tasks, and no module has the function `register_own`.
    """
    _import(data.task_modules)
    import seqio

    seqio.set_tfds_data_dir_override(os.path.expanduser(data.tfds_data_dir) or None)
    if not data.own_tasks:
        return
    makers = [maker for module in data.task_modules if (maker := getattr(sys.modules[module], "register_own", None))]
    if not makers:
        raise UserError(
            f"DataConfig.own_tasks has {', '.join(map(repr, data.own_tasks))}, but no module of DataConfig.task_modules "
            f"({', '.join(data.task_modules)}) makes tasks of them; add 'tasks' to it."
        )
    makers[0](data.own_tasks)


def _import(modules: tuple[str, ...]) -> None:
    with silent_stderr():
        import seqio
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # devices are already in use, by a program that wants them
            tf.config.set_visible_devices([], "GPU")
    tracking = seqio.task_registry_provenance_tracking
    # seqio's tracking fails on code that is in no file (python -c); then every task module counts for every cache.
    in_files = all(inspect.getmodule(frame.frame) is not None for frame in inspect.stack(0))
    if in_files and not tracking.registration_provenance_tracking_is_on():
        tracking.turn_on_tracking()  # tells which file registers which task
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise
            raise UserError(
                f"DataConfig.task_modules names '{module}', which cannot be imported ({error}); run from its folder."
            ) from None


def find_task(data: DataConfig, name: str) -> Any:
    """The registered task, or a UserError with the nearest name."""
    register_tasks(data)
    import seqio

    if name in seqio.TaskRegistry.names():
        return seqio.TaskRegistry.get(name)
    names = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
    hint = _hint_to_files(name, names) if name.startswith(FILES) else nearest(name, names)
    raise UserError(
        f"No seqio task or mixture '{name}' is registered by {', '.join(data.task_modules) or 'this program'}.{hint} "
        "Correct DataConfig.mixture (MIXTURE_OR_TASK_NAME) or, in a study, PipelineConfig.sources, PipelineConfig.targets or "
        "PipelineConfig.zero_shot; "
        "add the module that registers it to DataConfig.task_modules; or describe it in DataConfig.own_tasks."
    )


def writes_free_text(data: DataConfig, name: str) -> bool:
    """Whether a task's source says in an attribute `free_text` that the targets are no label set; without one, nobody knows."""
    return bool(getattr(find_task(data, name).source, "free_text", False))


def has_metrics(data: DataConfig, name: str) -> bool:
    """Whether a task can be scored; those for pretraining cannot."""
    return bool(find_task(data, name).predict_metric_fns)


def _hint_to_files(name: str, names: Sequence[str]) -> str:
    """Where the data of a task from files was looked for, and the nearest task that has some."""
    value = os.environ.get("MPT_JAX_DATA")
    if not value:
        return " The environment variable MPT_JAX_DATA, which names the folder of such tasks, is not set."
    folder, task = Path(value).expanduser(), name.removeprefix(FILES)
    if not folder.is_dir():
        return f" The folder {folder}, which MPT_JAX_DATA names, does not exist."
    if formats := [one for one in names if one.startswith(f"{task}_")]:
        return f" A folder of this name is read by {' and '.join(formats)}."
    held = [one.removeprefix(FILES) for one in names if one.startswith(FILES)]
    held = [one for one in held if list(folder.glob(f"{one}/train.*"))]
    close = nearest(task, held).replace("'", f"'{FILES}", 1)  # compared without the prefix, which makes all alike
    there = f" There are {', '.join(FILES + one for one in held)}." if held else f" {folder} holds no task of one's own."
    return f" There is no {folder / task / 'train.jsonl'} and no train.tsv.{close or there}"


def scoring_functions(data: DataConfig, name: str) -> tuple[Any, list[Any], Any]:
    """(postprocess_fn, metric_fns, conversion of a text example to what seqio gives them) of a task with its own functions."""
    task = find_task(data, name)
    return task.postprocess_fn, list(task.predict_metric_fns), _as_numpy


def _as_numpy(example: dict[str, Any]) -> dict[str, Any]:
    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return np.array([convert(part) for part in value], dtype=object if value and isinstance(value[0], str) else None)
        return value.encode() if isinstance(value, str) else value

    return {name: convert(value) for name, value in example.items()}
