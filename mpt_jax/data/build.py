"""Building token caches with seqio. Imported only when there is something to build: this loads TensorFlow."""

import contextlib
import glob
import inspect
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mpt_jax.config import DataConfig
from mpt_jax.data import downloads, fingerprint
from mpt_jax.data.cache import function_spec, lengths_of
from mpt_jax.data.registry import find_task, members, register_tasks
from mpt_jax.data.vocabulary import EOS_ID, Vocabulary
from mpt_jax.data.writer import Columns, install, temporary_folder, write, writing
from mpt_jax.errors import UserError
from mpt_jax.progress import counted

BATCH = 512

logger = logging.getLogger("mpt_jax")


def build_task(data: DataConfig, task_name: str, split: str, vocabulary: Vocabulary, folder: Path) -> None:
    """Runs the seqio task and installs its cache as `folder/<variant>`; examples go to the disk as they come."""
    task = check_split(data, task_name, split)
    logger.info("building the token cache of %s/%s", task_name, split)
    started = time.monotonic()
    depends = _depends(data, task, split)
    lengths = lengths_of(data)
    total, batches = tokenise(task, split, lengths, vocabulary)
    meta: dict[str, Any] = {"task": task_name, "split": split, "lengths": lengths, "vocabulary": vocabulary.fingerprint}
    meta |= {"scoring": _scoring_spec(task), "depends": depends}
    with temporary_folder(folder) as temporary:
        write(temporary, counted(batches, len, f"{task_name}/{split}", total), meta)
        if not meta["examples"]:
            raise UserError(f"Task '{task_name}' has no examples in its split '{split}'; check its data.")
        install(temporary, folder / fingerprint.digest(json.dumps(_identity(depends), sort_keys=True)), depends["environment"])
    logger.info("%s/%s: %s examples in %.0f s", task_name, split, f"{meta['examples']:,}", time.monotonic() - started)


def check_split(data: DataConfig, task_name: str, split: str) -> Any:
    """The seqio task. UserError when there is none, or it has no such split."""
    task = find_task(data, task_name)
    splits = task.source.splits
    if split not in splits:
        raise UserError(
            f"Task '{task_name}' has no split '{split}' (it has {', '.join(splits) or 'none'}); give the task that split, or set "
            "DataConfig.train_split, DataConfig.eval_split or PipelineConfig.test_split to one that it has."
        )
    return task


def resolve_mixture(data: DataConfig, name: str, path: Path) -> list[tuple[str, float]]:
    """Tasks and rates of a mixture or task, written to `path` for the next run."""
    register_tasks(data)
    import seqio

    is_mixture = name in seqio.MixtureRegistry.names()
    tasks = members(name) if is_mixture else [(find_task(data, name).name, 1.0)]
    modules = {module: fingerprint.module_hash(module) for module in sorted(fingerprint.tree_modules(data.task_modules))}
    stored = {"name": name, "tasks": tasks, "depends": {"modules": modules, "files": {}, "environment": {}}}
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
        temporary.write_text(json.dumps(stored))
        temporary.replace(path)
    return tasks


def _scoring_spec(task: Any) -> dict[str, Any] | None:
    unsupported = [*task.score_metric_fns, *task.predict_with_aux_metric_fns, *task._metric_objs_constructor_args]
    if unsupported:
        logger.warning(
            "%s: only metric_fns(targets, predictions) are computed; %d others are left out", task.name, len(unsupported)
        )
    postprocess = task.postprocessor and function_spec(task.postprocessor)
    metrics = [function_spec(metric) for metric in task.predict_metric_fns]
    if (task.postprocessor and not postprocess) or None in metrics:
        return None
    return {"postprocess": postprocess, "metrics": metrics}


def tokenise(task: Any, split: str, lengths: dict[str, int], vocabulary: Vocabulary) -> tuple[int | None, Iterator[Columns]]:
    """The task's examples with the run's vocabulary, as seqio itself yields them (unshuffled, trimmed to `lengths`).

    Returns:
      How many there are, where that is known beforehand; and batches of them, made as they are asked for.
    """
    import seqio

    missing = [name for name in lengths if name not in task.output_features]
    if missing:
        raise UserError(
            f"Task '{task.name}' has no output feature '{missing[0]}'; an encoder-decoder needs 'inputs' and 'targets'."
        )
    after_trim = seqio.preprocessors.append_eos_after_trim
    keeps_eos = any(_function(p) is after_trim for p in task.preprocessors)
    # Nothing is trimmed before it is counted here: trimming is left out of the pipeline and done below, with the same result.
    preprocessors = [seqio.preprocessors.append_eos if _function(p) is after_trim else p for p in task.preprocessors]
    own = vocabulary.seqio()
    features = {
        name: seqio.Feature(own, add_eos=feature.add_eos, required=feature.required, dtype=feature.dtype, rank=feature.rank)
        for name, feature in task.output_features.items()
    }
    bound = task.replace(output_features=features, preprocessors=preprocessors)
    with _downloading(task):
        dataset = bound.get_dataset(lengths, split=split, shuffle=False, seed=_seed(task.source), trim_output_features=False)
    ends_in_eos = {name: keeps_eos and features[name].add_eos for name in lengths}
    batches = dataset.ragged_batch(BATCH).prefetch(2)  # TensorFlow's threads work while this one writes
    size = int(dataset.cardinality())
    return size if size >= 0 else None, (_columns(batch, lengths, ends_in_eos) for batch in batches)


@contextlib.contextmanager
def _downloading(task: Any) -> Iterator[None]:
    """Downloads what a task reads from TFDS, and what TFDS raises is a sentence; other sources speak for themselves."""
    import seqio

    if not isinstance(task.source, seqio.TfdsDataSource):
        yield
        return
    loader = task.source.tfds_dataset
    if loader.tfds_splits is None:  # else each split is of a dataset of its own
        downloads.open_tfds(loader, f"task '{task.name}'")
    try:
        yield
    except Exception as error:
        raise downloads.unreadable(loader.name, error, f"task '{task.name}'") from error


def _columns(batch: dict[str, Any], lengths: dict[str, int], ends_in_eos: dict[str, bool]) -> Columns:
    columns = Columns()
    for name, limit in lengths.items():
        for row in _rows(batch[name]):
            columns.uncut[name].append(len(row))
            if len(row) > limit:
                row = np.append(row[: limit - 1], EOS_ID) if ends_in_eos[name] else row[:limit]
            columns.tokens[name].append(np.asarray(row, np.int32))
    others = {name: _plain(value) for name, value in batch.items() if name not in lengths}
    for i in range(len(columns.tokens["inputs"])):
        fields = {name: value[i] for name, value in others.items()}
        columns.targets.append(fields.get("targets_pretokenized"))
        columns.texts.append(json.dumps(fields, ensure_ascii=False).encode() + b"\n" if fields else b"")
    return columns


def _rows(value: Any) -> Iterator[np.ndarray]:
    """Rows of a batch of token sequences, ragged or dense."""
    if hasattr(value, "row_splits"):
        flat, splits = value.flat_values.numpy(), value.row_splits.numpy()
        return (flat[splits[i] : splits[i + 1]] for i in range(len(splits) - 1))
    return iter(value.numpy())


def _plain(value: Any) -> list[Any]:
    """A batch of any feature as nested lists of str, int, float, bool."""

    def text(item: Any) -> Any:
        if isinstance(item, list):
            return [text(part) for part in item]
        return item.decode("utf-8", "replace") if isinstance(item, bytes) else item

    return text(value.to_list() if hasattr(value, "to_list") else value.numpy().tolist())


def _function(preprocessor: Any) -> Any:
    return preprocessor.func if isinstance(preprocessor, partial) else preprocessor


def _seed(source: Any) -> int | None:
    """A fixed seed for preprocessors that draw; a FunctionDataSource takes one only if its function does."""
    function = getattr(source, "_dataset_fn", None)
    return 0 if function is None or "seed" in inspect.signature(function).parameters else None


def _depends(data: DataConfig, task: Any, split: str) -> dict[str, Any]:
    """What the split was made from: see `fingerprint.fresh`."""
    import seqio

    source = task.source
    provenance = (seqio.task_registry_provenance_tracking._PROVIDER_PROVENANCE_LOOKUP or {}).get(task.name, ("", []))[1]
    modules = _registering_modules(provenance, data.task_modules)
    if modules:
        held = [getattr(source, name, None) for name in ("_dataset_fn", "rows_of", "dependencies", "_read_file_fn")]
        modules = fingerprint.code_closure([*task.preprocessors, *held], modules, data.task_modules)
    else:  # registered before tracking began: everything that could have
        modules = fingerprint.tree_modules(data.task_modules)
    return {
        "modules": {name: fingerprint.module_hash(name) for name in sorted(modules)},
        "files": {path: fingerprint.file_state(path) for path in _data_files(source, split)},
        "environment": {name: os.environ.get(name, "") for name in getattr(source, "environment", ())},
    }


def _registering_modules(provenance: list[str], task_modules: tuple[str, ...]) -> set[str]:
    """The module that called seqio's registry and its callers; not a package that merely imports them."""
    files = {fingerprint.module_file(name): name for name in fingerprint.tree_modules(task_modules)}
    paths = [path for call in provenance if (path := Path(call.rpartition(":")[0])) in files]
    return {files[path] for i, path in enumerate(paths) if i == 0 or path.name != "__init__.py"}


def _data_files(source: Any, split: str) -> list[str]:
    if hasattr(source, "data_files"):
        return sorted(source.data_files(split))
    patterns = getattr(source, "_split_to_filepattern", {}).get(split, [])
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return sorted(path for pattern in patterns for path in glob.glob(str(pattern)))


def _identity(depends: dict[str, Any]) -> dict[str, Any]:
    """`depends` without modification times, which say nothing about the content."""
    return depends | {"files": {path: state[2] for path, state in depends["files"].items()}}
