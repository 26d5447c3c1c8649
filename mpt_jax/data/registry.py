"""What task modules have registered with seqio. Imported only when that is asked for: this loads TensorFlow."""

import contextlib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mpt_jax.config import nearest
from mpt_jax.errors import UserError


class Entry(NamedTuple):
    """A task or mixture of seqio's registry, as far as it is known without reading data.

    Attributes:
      source: "TFDS glue/mnli:2.0.0", "MPT_JAX_DATA/mnli" (a folder of files), "files", "generated", or "mixture".
      splits: names; () where they cannot be told without a file or a download, and of a mixture.
      metrics: names of the metric functions; of a mixture, the names of its tasks.
    """

    name: str
    source: str
    splits: tuple[str, ...]
    metrics: tuple[str, ...]


def catalogue(modules: tuple[str, ...]) -> list[Entry]:
    """Every task and then every mixture that `modules` register, sorted by name. UserError for a module that is not there."""
    import_task_modules(modules)
    import seqio

    tasks = [_task_entry(seqio.TaskRegistry.get(name)) for name in sorted(seqio.TaskRegistry.names())]
    mixtures = [seqio.MixtureRegistry.get(name) for name in sorted(seqio.MixtureRegistry.names())]
    return tasks + [Entry(mix.name, "mixture", (), tuple(sorted(task.name for task in mix.tasks))) for mix in mixtures]


def entry(modules: tuple[str, ...], name: str) -> Entry:
    """The task's line of the catalogue, or a UserError with the nearest name."""
    return _task_entry(find_task(modules, name))


def _task_entry(task: Any) -> Entry:
    metrics = [*task.metric_fns, *task.metric_objs]
    return Entry(task.name, _source_of(task.source), _splits_of(task.source), tuple(map(_name_of, metrics)))


def _source_of(source: Any) -> str:
    import seqio

    if isinstance(source, seqio.TfdsDataSource):
        return f"TFDS {source.tfds_dataset.name}"
    environment = getattr(source, "environment", ())
    if environment:
        return "/".join(["$" + environment[0], *([source.task] if hasattr(source, "task") else [])])
    return "generated" if isinstance(source, seqio.FunctionDataSource) else "files"


def _splits_of(source: Any) -> tuple[str, ...]:
    """A TFDS source without named splits would ask TFDS, which may download."""
    import seqio

    if isinstance(source, seqio.TfdsDataSource):
        return tuple(source.tfds_dataset._split_map or ())
    try:
        return tuple(source.splits)
    except UserError:
        return ()


def _name_of(function: Any) -> str:
    inner = function.func if isinstance(function, functools.partial) else function
    return str(getattr(inner, "__name__", type(inner).__name__))


def import_task_modules(modules: tuple[str, ...]) -> None:
    """Imports the modules that register tasks, keeping TensorFlow away from accelerators."""
    with _silent_stderr():
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


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drops what native code writes to standard error: TensorFlow's start-up lines heed no log level. Exceptions pass."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def find_task(modules: tuple[str, ...], name: str) -> Any:
    """The registered task, or a UserError with the nearest name."""
    import_task_modules(modules)
    import seqio

    if name in seqio.TaskRegistry.names():
        return seqio.TaskRegistry.get(name)
    names = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
    hint = nearest(name, names)
    if name.startswith("files_") and not os.environ.get("MPT_JAX_DATA"):
        hint = " The environment variable MPT_JAX_DATA, which names the folder of such tasks, is not set."
    raise UserError(
        f"No seqio task or mixture '{name}' is registered by {', '.join(modules) or 'this program'}.{hint} "
        "Correct DataConfig.mixture (MIXTURE_OR_TASK_NAME) or, in a study, PipelineConfig.sources or PipelineConfig.targets; "
        "or add the module that registers it to DataConfig.task_modules."
    )


def scoring_functions(modules: tuple[str, ...], name: str) -> tuple[Any, list[Any], Any]:
    """(postprocess_fn, metric_fns, conversion of a text example to what seqio gives them) of a task with its own functions."""
    task = find_task(modules, name)
    return task.postprocess_fn, list(task.predict_metric_fns), _as_numpy


def _as_numpy(example: dict[str, Any]) -> dict[str, Any]:
    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return np.array([convert(part) for part in value], dtype=object if value and isinstance(value[0], str) else None)
        return value.encode() if isinstance(value, str) else value

    return {name: convert(value) for name, value in example.items()}
