"""What a run is made of, found from its configuration: streams, data, backbone on its devices, trainable start, teachers."""

import dataclasses
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mpt_jax.checkpoint.backbone import Backbone, load_backbone
from mpt_jax.checkpoint.export_hf import export_hf
from mpt_jax.checkpoint.folder import RunFolder
from mpt_jax.config import Experiment, PromptConfig, StreamConfig, nearest
from mpt_jax.data import fingerprint, sampling
from mpt_jax.data.cache import LabelSet, TokenCache, open_task, require_splits
from mpt_jax.data.vocabulary import Vocabulary, check_vocabulary, load_vocabulary
from mpt_jax.distributed import first_goes_first, least
from mpt_jax.errors import UserError
from mpt_jax.memory import choose_partitions
from mpt_jax.models.t5 import T5, logical_axes
from mpt_jax.optim import GroupScales
from mpt_jax.partitioning import batch_shard, batch_ways, make_mesh, replicated, rows_sharding, to_host, tree_sharding
from mpt_jax.prompts import build_prompt, compose
from mpt_jax.prompts.files import FILE_NAME, best_stream, check_prompts, load_prompts
from mpt_jax.prompts.init import initial_prompt

Tree = Any

logger = logging.getLogger("mpt_jax")


class Streams(NamedTuple):
    """The streams of a run; stream n is `task_id` n."""

    configs: tuple[StreamConfig, ...]
    rates: tuple[float, ...]  # seqio's mixing rates

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(stream.task for stream in self.configs)

    @property
    def groups(self) -> tuple[int, ...]:
        return tuple(stream.group for stream in self.configs)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each group [G]: that of its first stream."""
        return tuple(stream.seed for stream in self._firsts)

    @property
    def inits(self) -> tuple[str, ...]:
        """How the prompt of each group starts [G]; "" = as `PromptConfig.init` says."""
        return tuple(stream.init for stream in self._firsts)

    @property
    def rate_factors(self) -> tuple[float, ...]:
        """The factor on each group's learning rates [G]."""
        return tuple(stream.rate_factor for stream in self._firsts)

    def lengths(self, longest: int) -> tuple[int, ...]:
        """The length of each group's prompt [G], where `longest` is P."""
        return tuple(stream.length or longest for stream in self._firsts)

    @property
    def _firsts(self) -> tuple[StreamConfig, ...]:
        """The first stream of each group."""
        return tuple(self.configs[self.groups.index(group)] for group in range(max(self.groups) + 1))

    def scales(self, longest: int) -> GroupScales:
        """What the optimiser has to know of the groups, where `longest` is P."""
        rates, lengths = self.rate_factors, self.lengths(longest)
        return GroupScales(
            rates if set(rates) != {1.0} else (),
            tuple(length / longest for length in lengths) if set(lengths) != {longest} else (),
        )


def find_streams(experiment: Experiment) -> Streams:
    """`DataConfig.streams`, or one stream for each task of the mixture, in one group or (`PromptConfig.per_task`) one each.

    Raises:
        UserError: unknown task or mixture; groups that are not numbered 0, 1, …
    """
    with first_goes_first("finding the tasks"):
        configs, rates = zip(*sampling.stream_configs(experiment.data), strict=True)
    if experiment.prompt.per_task and not experiment.data.streams:
        configs = tuple(dataclasses.replace(stream, group=n) for n, stream in enumerate(configs))
    if experiment.prompt.method == "none":  # one model
        configs = tuple(dataclasses.replace(stream, group=0) for stream in configs)
    groups = sorted({stream.group for stream in configs})
    if groups != list(range(len(groups))):
        raise UserError(f"DataConfig.streams has the groups {groups}; number them 0 to {len(groups) - 1} without a gap.")
    for field in ("length", "init", "rate_factor"):
        for group in groups:
            values = dict.fromkeys(getattr(stream, field) for stream in configs if stream.group == group)
            if len(values) > 1:
                raise UserError(
                    f"DataConfig.streams gives group {group}, whose streams share a prompt, several values of {field}: "
                    f"{', '.join(map(repr, values))}; give one."
                )
    return Streams(configs, rates)


def open_vocabulary(experiment: Experiment, backbone: Backbone) -> Vocabulary:
    """The backbone's vocabulary. UserError when it has more ids than the model, or so few that it is another model's."""
    vocabulary = load_vocabulary(backbone.vocabulary)
    check_vocabulary(vocabulary, experiment.backbone.architecture)
    return vocabulary


def check_splits(experiment: Experiment, tasks: Sequence[str], vocabulary: Vocabulary, *more: str) -> None:
    """That the tasks have every split that training and validation, and `more`, need. UserError for one that is missing."""
    splits = [experiment.data.train_split, *([experiment.data.eval_split] if experiment.train.eval_period else []), *more]
    with first_goes_first("looking for splits"):
        require_splits(experiment.data, tasks, splits, vocabulary)


def make_loader(experiment: Experiment, streams: Streams, vocabulary: Vocabulary, mesh: Mesh) -> sampling.Loader:
    """The training batches: a pure function of (seed, step), with rows that the mesh can share; of them, this process's."""
    caches = open_caches(experiment, streams.tasks, experiment.data.train_split, vocabulary)
    parts = [
        sampling.stream_data(cache, stream.k_shot, stream.seed, rate)
        for cache, stream, rate in zip(caches, streams.configs, streams.rates, strict=True)
    ]
    multiple = batch_ways(mesh) * experiment.train.num_microbatches
    return sampling.make_loader(experiment.data, parts, experiment.prompt_length, multiple, batch_shard(mesh))


def open_caches(experiment: Experiment, tasks: Sequence[str], split: str, vocabulary: Vocabulary) -> list[TokenCache]:
    """One cache for each task; a task that occurs again shares it.

    Process 0 builds what is missing. The others find it in the folder that they share, or build their own.
    """
    with first_goes_first(f"building token caches of {split}"):
        opened = {task: open_task(experiment.data, task, split, vocabulary) for task in dict.fromkeys(tasks)}
    return [opened[task] for task in tasks]


def open_labels(experiment: Experiment, tasks: Sequence[str], vocabulary: Vocabulary) -> list[LabelSet] | None:
    """Each task's labels to rank, those of its training split; None where `DecodeConfig.method` generates.

    They come from the training split so that every split, and a file of rows, is answered from the same labels.

    Raises:
        UserError: a task has no training split, or is no classification.
    """
    if experiment.decode.method != "rank":
        return None
    return [cache.label_set for cache in open_caches(experiment, tasks, experiment.data.train_split, vocabulary)]


def data_digests(caches: Sequence[TokenCache]) -> dict[str, str]:
    """Of each task a digest of its examples' tokens, whatever files and code they came from."""
    parts = [f"{name}{part}.npy" for name in ("inputs", "targets") for part in ("", "_offsets")]
    states = {cache.task: [fingerprint.file_state(str(cache.folder / part)) for part in parts] for cache in caches}
    return {task: fingerprint.digest(*(digest for _, _, digest in files)) for task, files in states.items()}


def open_validation(experiment: Experiment, tasks: Sequence[str], vocabulary: Vocabulary) -> list[TokenCache]:
    """The caches to validate on; [] where `TrainConfig.eval_period` is 0.

    Raises:
        UserError: a task has no such split, or no metric to choose the best state by.
    """
    if not experiment.train.eval_period:
        return []
    caches = open_caches(experiment, tasks, experiment.data.eval_split, vocabulary)
    for cache in caches:
        if not cache.has_metrics:
            raise UserError(
                f"Task '{cache.task}' has no metric to validate by; set TrainConfig.eval_period=0 and take what was trained last."
            )
    return caches


def open_backbone(experiment: Experiment, mesh: Mesh, backbone: Backbone | None = None) -> Backbone:
    """The configured backbone, or the given one, laid out on the mesh.

    The arrays of a backbone that lies there already are used as they are. A given one takes the configuration's numerics
    (dropout, dtype) with the weights that it has; where these are not of `param_dtype`, they are loaded again, unrounded.
    """
    dtype = experiment.backbone.architecture.param_dtype
    if backbone is None or backbone.model.config.param_dtype != dtype:
        backbone = load_backbone(experiment.backbone, jax.random.key(experiment.train.seed), mesh)
    return place_backbone(backbone._replace(model=T5(experiment.backbone.architecture)), mesh)


def initial_trainable(experiment: Experiment, streams: Streams, backbone: Backbone, vocabulary: Vocabulary) -> Tree:
    """Where training starts: a prompt module's parameters, or `{"backbone": parameters}`."""
    if experiment.prompt.method == "none":
        return {"backbone": backbone.params}
    embedding = backbone.params["token_embedder"]["embedding"]
    return initial_prompt(
        experiment.prompt,
        groups=streams.groups,
        seeds=streams.seeds,
        lengths=streams.lengths(experiment.prompt.length),
        inits=[init or experiment.prompt.init for init in streams.inits],
        labels=init_labels(experiment, streams, vocabulary),
        key=jax.random.key(experiment.train.seed),
        embed=lambda ids: to_host(embedding[ids]),  # of several processes each may have only a part of the embedding
        d_model=embedding.shape[-1],
        tokenize=vocabulary.encode,
        vocab_size=vocabulary.vocab_size,
        fingerprint=backbone.fingerprint,
    )


def init_labels(experiment: Experiment, streams: Streams, vocabulary: Vocabulary) -> list[tuple[str, ...]]:
    """What each group's prompt starts from, where that is "labels": those of its tasks. UserError as `labels_of`."""
    found: list[tuple[str, ...]] = []
    for group, init in enumerate(streams.inits):
        starts = (init or experiment.prompt.init) == "labels"
        tasks = dict.fromkeys(stream.task for stream in streams.configs if starts and stream.group == group)
        found.append(tuple(dict.fromkeys(label for task in tasks for label in labels_of(experiment, task, vocabulary))))
    return found


def labels_of(experiment: Experiment, task: str, vocabulary: Vocabulary) -> tuple[str, ...]:
    """What a prompt of the task starts from with init="labels": what `PromptConfig` gives for it, else its own class labels.

    Raises:
        UserError: it is given none, and its training split shows none.
    """
    if given := given_labels(experiment, task):
        return given
    (cache,) = open_caches(experiment, [task], experiment.data.train_split, vocabulary)
    if not cache.label_texts:
        raise no_labels(task, cache.why_no_labels)
    return cache.label_texts


def given_labels(experiment: Experiment, task: str) -> tuple[str, ...]:
    """What the configuration gives a prompt of the task to start from; () = nothing, so that it needs labels of its own."""
    return experiment.prompt.init_labels_of.get(task, experiment.prompt.init_labels)


def no_labels(task: str, why: str) -> UserError:
    return UserError(
        f"Task '{task}' has no class labels that a prompt could start from (PromptConfig.init='labels'): {why}; name words for "
        f"it in PromptConfig.init_labels_of['{task}'], or take another init."
    )


def frozen_tree(experiment: Experiment, streams: Streams, backbone: Backbone, mesh: Mesh) -> Tree:
    """What a step reads and never changes: {"backbone": parameters, "teacher": [N,P,D] when distilling}."""
    if experiment.prompt.method == "none":
        return {"backbone": {}}
    frozen: dict[str, Any] = {"backbone": backbone.params}
    if experiment.loss.teachers:
        teacher = load_teachers(experiment.loss.teachers, streams.tasks, backbone)
        frozen["teacher"] = jax.device_put(teacher, replicated(mesh))
    return frozen


def load_teachers(path: str, tasks: Sequence[str], backbone: Backbone) -> np.ndarray:
    """The teacher prompt of each stream, [N,P,D], from a prompt file with one prompt per task.

    Raises:
        UserError: no such file, another backbone or width, a task without a teacher.
    """
    params, meta = load_prompts(path)
    check_prompts(meta, d_model=backbone.model.config.d_model, backbone=backbone.fingerprint)
    if len(lengths := set(meta["lengths"])) > 1:
        raise UserError(f"LossConfig.teachers={path} has prompts of {sorted(lengths)} tokens; give teachers of one length.")
    prompts = np.asarray(compose(meta["method"], params, tuple(meta["groups"])))
    return prompts[match_tasks(tasks, meta, f"LossConfig.teachers={path}")]


def match_tasks(tasks: Sequence[str], meta: dict[str, Any], source: str) -> list[int]:
    """For each task the number of its prompt in a file, `meta` being that of `load_prompts`.

    A file with just these tasks, in this order, gives its prompts one by one. Else each task gets its
    `best_stream`, as PATH#TASK does. A file with a single prompt serves every task;
    whether there is such a task is for the caller to check.

    Raises:
        UserError: a task that the file does not have.
    """
    available = meta["tasks"]
    if list(tasks) == available:
        return list(range(len(tasks)))
    if len(available) == 1:
        return [0] * len(tasks)
    found: dict[str, int] = {}
    for task in dict.fromkeys(tasks):
        number = best_stream(meta, task)
        if number is None:
            names = dict.fromkeys(available)
            raise UserError(f"{source} has no prompt for task '{task}'; it has {', '.join(names)}.{nearest(task, names)}")
        found[task] = number
    return [found[task] for task in tasks]


class Trained(NamedTuple):
    """A finished run (or a prompt file, or a bare model) as `evaluate` and `infer` use it.

    Attributes:
        prompt_module, trainable: of the composed prompts, one group each; None and {} without prompts.
        meta: of the prompt file (see `prompts/files.py`); {} without prompts.
        source: the file or checkpoint, for messages.
    """

    backbone: Backbone
    prompt_module: Any
    trainable: Tree
    meta: dict[str, Any]
    source: str

    @property
    def tasks(self) -> tuple[str, ...]:
        """The task of each prompt; () without prompts."""
        return tuple(self.meta.get("tasks", ()))

    def length_of(self, number: int) -> int:
        """The tokens of a prompt; 0 without prompts."""
        return int(self.meta["lengths"][self.meta["groups"][number]]) if self.meta else 0

    def prompt_of(self, tasks: Sequence[str]) -> list[int]:
        """The number of each task's prompt. UserError for a task without one."""
        return match_tasks(tasks, self.meta, self.source) if self.meta else [0] * len(tasks)

    def warn_of_others(self, tasks: Sequence[str], numbers: Sequence[int]) -> None:
        """Tells of the tasks that are not the one which their prompt was trained on."""
        for task, own in dict.fromkeys((task, self.tasks[n]) for task, n in zip(tasks, numbers, strict=True) if self.tasks):
            if own not in ("", task):
                logger.warning("warning: %s was not trained on '%s', only on '%s'", self.source, task, own)


def open_trained(experiment: Experiment, mesh: Mesh) -> Trained:
    """What MODEL_DIR holds: `prompts.safetensors`, or with method "none" the tuned `model/`.

    An unfinished or absent run falls back on `PromptConfig.init_file` and, with method "none", on the backbone itself.

    Raises:
        UserError: neither; a prompt that does not fit the backbone.
    """
    config = experiment.backbone
    if experiment.prompt.method == "none":
        folder = _finished_folder(experiment)
        if (folder / "model" / "config.json").exists():
            config = dataclasses.replace(config, checkpoint=str(folder / "model"))
        elif RunFolder(experiment.train.model_dir).finished() is not None:  # not the untuned backbone in its stead
            raise UserError(
                f"The run in MODEL_DIR {folder} has no model any more; a study keeps the weights of model tuning only with "
                "PipelineConfig.keep_models=True, so train it again."
            )
        return Trained(load_backbone(config, mesh=mesh), None, {}, {}, config.checkpoint)
    path = find_prompts(experiment)
    params, meta = load_prompts(path)
    backbone = load_backbone(config, mesh=mesh)
    width = backbone.model.config.d_model
    check_prompts(meta, d_model=width, backbone=backbone.fingerprint, max_length=experiment.prompt.max_length)
    prompts = compose(meta["method"], params, tuple(meta["groups"]))
    plain = PromptConfig(method="plain", length=prompts.shape[1], max_length=prompts.shape[1])
    lengths = [meta["lengths"][group] for group in meta["groups"]]
    module = build_prompt(plain, tuple(range(len(prompts))), width, lengths)
    return Trained(backbone, module, {"prompt": jax.device_put(prompts, replicated(mesh))}, meta, path)


def find_prompts(experiment: Experiment) -> str:
    """The prompt file of MODEL_DIR or, where it holds no run, `PromptConfig.init_file`.

    Raises:
        UserError: neither; a run that has not finished.
    """
    path = _finished_folder(experiment) / FILE_NAME
    if path.exists():
        return str(path)
    if experiment.prompt.init != "file":
        raise UserError(
            f"MODEL_DIR {path.parent} has no {FILE_NAME}; train into it first, give the config.gin of one of a study's runs "
            "(MODEL_DIR/runs/…), or give a prompt with PromptConfig.init='file' and PromptConfig.init_file."
        )
    return experiment.prompt.init_file


def _finished_folder(experiment: Experiment) -> Path:
    """MODEL_DIR, in which no run is under way."""
    run = RunFolder(experiment.train.model_dir)
    if run.has_progress() and run.finished() is None:
        raise UserError(f"The run in MODEL_DIR {run.path} has not finished; let `train` continue it to its end first.")
    return run.path


def place_backbone(backbone: Backbone, mesh: Mesh) -> Backbone:
    """The same backbone with its parameters laid out on the mesh by their logical axes, and its activations with their rows."""
    config = backbone.model.config
    sharding = tree_sharding(backbone.params, logical_axes(config), mesh)
    return backbone._replace(model=T5(config, rows_sharding(mesh)), params=jax.device_put(backbone.params, sharding))


def export_model(folder: Path, backbone: Backbone, params: Tree) -> Path:
    """Write a tuned model as the Hugging Face folder `<folder>/model`, usable as INITIAL_CHECKPOINT_PATH."""
    path = folder / "model"
    temporary = folder / ".model.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    config = backbone.model.config
    export_hf(jax.device_get(params), config, temporary, dtype=config.param_dtype, vocabulary=backbone.vocabulary)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)
    return path


def mesh_of(experiment: Experiment) -> Mesh:
    """The mesh that the configuration asks for, over all devices of this job.

    Raises:
        UserError: the devices cannot be arranged so; with `num_partitions` 0, no arrangement has the memory.
    """
    partition = experiment.partition
    if partition.num_partitions == 0:
        memory = least((jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf))  # a CPU tells none
        chosen = choose_partitions(experiment, find_streams(experiment).groups, jax.devices(), memory)
        partition = dataclasses.replace(partition, num_partitions=chosen)
    mesh = make_mesh(partition)
    batch_shard(mesh)  # refuses what processes cannot share before a backbone is read
    return mesh
