"""Building token caches with seqio. Imported only when there is something to build: this loads TensorFlow."""

import contextlib
import glob
import importlib
import inspect
import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mpt_jax.config import DataConfig, nearest
from mpt_jax.data import fingerprint
from mpt_jax.data.cache import function_spec, lengths_of
from mpt_jax.data.vocabulary import EOS_ID, Vocabulary
from mpt_jax.errors import UserError
from mpt_jax.quiet import silent_stderr

MAX_CLASSES = 32  # a task with at most so many different targets, each recurring, is a classification
BATCH = 512

logger = logging.getLogger("mpt_jax")


def build_task(data: DataConfig, task_name: str, split: str, vocabulary: Vocabulary, folder: Path) -> None:
    """Runs the seqio task and installs its cache as `folder/<variant>`."""
    task = find_task(data.task_modules, task_name)
    splits = task.source.splits
    if split not in splits:
        raise UserError(
            f"Task '{task_name}' has no split '{split}' (it has {', '.join(splits) or 'none'}); give the task that split, or set "
            "DataConfig.train_split, DataConfig.eval_split or PipelineConfig.test_split to one that it has."
        )
    logger.info("building the token cache of %s/%s", task_name, split)
    started = time.monotonic()
    depends = _depends(data, task, split)
    lengths = lengths_of(data)
    columns = _tokenise(task, split, lengths, vocabulary)
    meta: dict[str, Any] = {"task": task_name, "split": split, "lengths": lengths, "vocabulary": vocabulary.fingerprint}
    meta |= {"examples": len(columns.texts), "truncated": columns.truncated, "scoring": _scoring_spec(task), "depends": depends}
    if not columns.texts:
        raise UserError(f"Task '{task_name}' has no examples in its split '{split}'; check its data.")
    install(folder, fingerprint.digest(json.dumps(_identity(depends), sort_keys=True)), columns, meta)
    logger.info("%s/%s: %s examples in %.0f s", task_name, split, f"{len(columns.texts):,}", time.monotonic() - started)


def resolve_mixture(data: DataConfig, name: str, path: Path) -> list[tuple[str, float]]:
    """Tasks and rates of a mixture or task, written to `path` for the next run."""
    import_task_modules(data.task_modules)
    import seqio

    if name in seqio.MixtureRegistry.names():
        mixture = seqio.MixtureRegistry.get(name)
        ordered = [task for task in mixture.rate_per_task_name if task in seqio.TaskRegistry.names()]
        ordered += [task.name for task in mixture.tasks if task.name not in ordered]  # of mixtures inside the mixture
        tasks = [(task, float(mixture.get_rate(seqio.TaskRegistry.get(task)))) for task in ordered]
    else:
        tasks = [(find_task(data.task_modules, name).name, 1.0)]
    modules = {module: fingerprint.module_hash(module) for module in sorted(fingerprint.tree_modules(data.task_modules))}
    stored = {"name": name, "tasks": tasks, "depends": {"modules": modules, "files": {}, "environment": {}}}
    with _writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
        temporary.write_text(json.dumps(stored))
        temporary.replace(path)
    return tasks


def import_task_modules(modules: tuple[str, ...]) -> None:
    """Imports the modules that register tasks, keeping TensorFlow away from accelerators."""
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


class Columns:
    """What is written: token rows, JSON text rows, and how many rows were cut."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[np.ndarray]] = {"inputs": [], "targets": []}
        self.texts: list[bytes] = []
        self.targets: list[str | None] = []
        self.truncated = {"inputs": 0, "targets": 0}


def _tokenise(task: Any, split: str, lengths: dict[str, int], vocabulary: Vocabulary) -> Columns:
    """The task's dataset with the run's vocabulary, as seqio itself yields it (unshuffled, trimmed to `lengths`)."""
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
    columns = Columns()
    for batch in dataset.ragged_batch(BATCH):
        _append(columns, batch, lengths, {name: keeps_eos and features[name].add_eos for name in lengths})
    return columns


@contextlib.contextmanager
def _downloading(task: Any) -> Iterator[None]:
    """What TFDS raises without a network or disk space, in a sentence; other sources speak for themselves."""
    import seqio

    try:
        yield
    except Exception as error:
        if not isinstance(task.source, seqio.TfdsDataSource):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"Task '{task.name}' could not get the TFDS dataset '{task.source.tfds_dataset.name}' ({reason}); "
            "check the network, or set TFDS_DATA_DIR to a folder that has it."
        ) from error


def _append(columns: Columns, batch: dict[str, Any], lengths: dict[str, int], keeps_eos: dict[str, bool]) -> None:
    for name, limit in lengths.items():
        for row in _rows(batch[name]):
            if len(row) > limit:
                columns.truncated[name] += 1
                row = np.append(row[: limit - 1], EOS_ID) if keeps_eos[name] else row[:limit]
            columns.tokens[name].append(np.asarray(row, np.int32))
    others = {name: _plain(value) for name, value in batch.items() if name not in lengths}
    for i in range(len(columns.tokens["inputs"]) - len(columns.texts)):
        fields = {name: value[i] for name, value in others.items()}
        columns.targets.append(fields.get("targets_pretokenized"))
        columns.texts.append(json.dumps(fields, ensure_ascii=False).encode() + b"\n" if fields else b"")


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


def install(folder: Path, variant: str, columns: Columns, meta: dict[str, Any]) -> None:
    """Writes everything into a temporary folder and renames it; of two builders the first one's work stays."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_dead_builds(folder)
        temporary = folder / f".build-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
        temporary.mkdir()
        try:
            write(temporary, columns, meta)
            final = folder / variant
            if final.exists() and not _whole(final):
                shutil.rmtree(final)
            _remove_stale(folder, meta["depends"]["environment"])
            try:
                temporary.rename(final)
            except OSError:
                if not _whole(final):  # not another builder's: a real failure
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write(folder: Path, columns: Columns, meta: dict[str, Any]) -> None:
    for name, rows in columns.tokens.items():
        np.save(folder / f"{name}.npy", np.concatenate(rows))
        np.save(folder / f"{name}_offsets.npy", np.cumsum([0, *map(len, rows)], dtype=np.int64))
    np.save(folder / "text_offsets.npy", np.cumsum([0, *map(len, columns.texts)], dtype=np.int64))
    (folder / "text.jsonl").write_bytes(b"".join(columns.texts) or b"\n")
    texts = [target for target in columns.targets if target is not None]
    names = sorted(set(texts))
    classes = len(texts) == len(columns.targets) and len(names) <= MAX_CLASSES and 4 * len(names) <= len(texts)
    meta["labels"] = names if classes else None
    if classes:
        number = {name: k for k, name in enumerate(names)}
        np.save(folder / "labels.npy", np.array([number[text] for text in texts], np.int16))
    meta["sizes"] = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1, sort_keys=True))


def _whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / "meta.json").read_text())["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _remove_stale(folder: Path, environment: dict[str, str]) -> None:
    """Removes variants whose code or data is no longer there (one made under another environment may be wanted again)."""
    for path in folder.glob("[!.]*/meta.json"):
        with contextlib.suppress(ValueError, KeyError):
            depends = json.loads(path.read_text())["depends"]
            if depends["environment"] == environment and not fingerprint.fresh(depends):
                shutil.rmtree(path.parent, ignore_errors=True)


def _remove_dead_builds(folder: Path) -> None:
    """Removes what killed builders of this machine left behind."""
    host = socket.gethostname()
    for path in folder.glob(f".build-{host}-*"):
        pid = path.name.removeprefix(f".build-{host}-").partition("-")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (ValueError, PermissionError):
            continue


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Cannot write the token cache in '{folder}' ({error.strerror}); set DataConfig.cache_dir to a writable folder."
        ) from None
