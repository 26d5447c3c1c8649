"""Training, from a configuration to a prompt file (or a tuned model), in one page.

`run_training` opens what the run is made of, resumes where an earlier call stopped, and takes steps; every so often it logs,
validates and saves, in this order and each only if the loss is finite. Its folder, MODEL_DIR, afterwards holds

    config.json             the resolved configuration
    metrics.jsonl           see `progress.py`; the same numbers for TensorBoard in tensorboard/
    checkpoints/            see `checkpoint/store.py`
    prompts.safetensors     the best prompt of each group by validation score, or the last where there was no validation
    model/                  instead of prompts, with PromptConfig.method="none": the tuned model, a Hugging Face folder
    finished.json           written last
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax import distributed, setup
from mpt_jax.checkpoint.backbone import Backbone
from mpt_jax.checkpoint.folder import RunFolder
from mpt_jax.checkpoint.import_hf import import_hf
from mpt_jax.checkpoint.store import Store
from mpt_jax.config import Experiment
from mpt_jax.data.sampling import Loader
from mpt_jax.errors import UserError
from mpt_jax.evaluate import evaluate
from mpt_jax.monitor import Best, Interrupt, Meter
from mpt_jax.optim import schedule
from mpt_jax.partitioning import check_batch_size, place_batch, to_host
from mpt_jax.progress import Progress, Record, read_history
from mpt_jax.prompts import build_prompt
from mpt_jax.prompts.files import FILE_NAME, load_prompts, save_prompts
from mpt_jax.shapes import PACKED_SHAPES
from mpt_jax.signals import Interrupted
from mpt_jax.train_state import create_state, make_train_step

Tree = Any
LISTED_TASKS = 6  # that the first line names
CUT_SHARE = 0.01  # of the training examples: above it, each run tells how many were cut


class TrainResult(NamedTuple):
    """What a run leaves.

    Attributes:
        params: best (or last) trainable of each group as NumPy arrays: a prompt module's parameters, or {"backbone": …}.
        path: the prompt file, or the folder of the tuned model.
        history: the lines of `metrics.jsonl`.
        scores: best validation score of each group [G], NaN without validation.
        earlier_seconds: what earlier calls have spent on the steps that this one did not take.
    """

    params: Tree
    path: Path
    history: list[Record]
    scores: np.ndarray
    earlier_seconds: float


def run_training(
    experiment: Experiment, backbone: Backbone | None = None, *, label: str = "", check: Callable[[], None] = lambda: None
) -> TrainResult:
    """Train a prompt, a bank of prompts or the whole model; resume, or return at once what a finished run has left.

    Args:
        backbone: one that is loaded already, else `experiment.backbone` is loaded.
        label: put before every line of progress.
        check: is called after each step, and stops the run, as it is then, by what it raises.
    Raises:
        UserError: whatever is wrong with the configuration, the data or the files; a bad step (see `monitor.Meter`).
        Interrupted: after SIGINT or SIGTERM, with a checkpoint of the last step on disk.
    """
    experiment.validate()
    folder = RunFolder(experiment.train.model_dir)
    with distributed.first_goes_first("opening MODEL_DIR"):
        if distributed.is_first():
            folder.begin(experiment)
    distributed.check_shared(folder.path, "MODEL_DIR")
    if (result := _finished(experiment, folder, backbone)) is not None:
        return result
    run = _Run(experiment, folder, backbone, label)
    try:
        with Interrupt(check) as interrupt:
            run.take_steps(interrupt)
            # Without checkpoints, what was trained would be lost. With them, writing a large model can be left and done again.
            if run.store is None:
                return interrupt.whole(run.finish)
            if not distributed.several():
                return interrupt.abandonable(run.finish)
        return run.finish()  # the processes exchange what they write: a signal stops one at once, and that one the others
    finally:
        run.close()


class _Run:
    """An opened run, at the step where it begins or resumes. `state` and `best` move on with the steps."""

    def __init__(self, experiment: Experiment, folder: RunFolder, backbone: Backbone | None, label: str):
        self.began = time.perf_counter()
        self.experiment, self.folder, self.config = experiment, folder, experiment.train
        self.mesh = setup.mesh_of(experiment)
        check_batch_size(experiment.data.batch_size, self.mesh, self.config.num_microbatches)
        self.backbone = setup.open_backbone(experiment, self.mesh, backbone)
        self.vocabulary = setup.open_vocabulary(experiment, self.backbone)
        self.streams = setup.find_streams(experiment)
        setup.check_splits(experiment, self.streams.tasks, self.vocabulary)
        self.loader = setup.make_loader(experiment, self.streams, self.vocabulary, self.mesh)
        self.validation = setup.open_validation(experiment, self.streams.tasks, self.vocabulary)
        self.labels = setup.open_labels(experiment, self.streams.tasks, self.vocabulary) if self.validation else None

        model, groups = self.backbone.model, self.streams.groups
        longest = experiment.prompt.length
        self.prompt_module = build_prompt(experiment.prompt, groups, model.config.d_model, self.streams.lengths(longest))
        self.frozen = setup.frozen_tree(experiment, self.streams, self.backbone, self.mesh)
        start = setup.initial_trainable(experiment, self.streams, self.backbone, self.vocabulary)
        recipe = (experiment.optimizer, self.config.steps, groups)
        self.state = create_state(start, model, *recipe, self.config.seed, self.mesh, self.config.spike_window)
        if self.prompt_module is None:  # the state has a copy of the weights, and trains that
            self.backbone = self.backbone._replace(params={})
            del start
        self.train_step = make_train_step(
            model,
            self.prompt_module,
            experiment.loss,
            *recipe,
            self.mesh,
            self.config.spike_factor,
            self.config.num_microbatches,
            self.streams.scales(longest),
        )
        self.compiled: set[tuple[tuple[int, ...], ...]] = set()  # shapes of batches
        self.best = Best(self.state.trainable, groups) if self.config.eval_period else None
        self.store: Store | None = None
        if self.config.checkpoint_period:
            data = setup.data_digests([stream.cache for stream in self.loader.streams])
            self.store = Store(folder.path, keep=self.config.keep_checkpoints, fingerprint=self.backbone.fingerprint, data=data)

        meta = self._restore()
        self.first = int(self.state.step)
        if self.first > self.config.steps:
            raise _too_few(folder, self.first, self.config.steps)
        self.earlier_seconds: float = meta.get("seconds", 0.0)
        self.meter = Meter(
            self.first,
            self.config,
            self.streams.tasks,
            groups,
            draw=self.loader.draw,
            last_good=lambda: self.store.latest() if self.store is not None else None,
            skipped=lambda record, text: self.progress.skipped(record, text),
        )
        if "meter" in meta:
            self.meter.load(meta["meter"])
        self.validated = meta.get("validated", True) or not self.config.eval_period  # the state as it is now, if that is due
        self.progress = Progress(
            folder.path,
            steps=self.config.steps,
            start=self.first,
            batch_size=experiment.data.batch_size,
            tensorboard=self.config.tensorboard,
            validated=self.validated,
            label=label,
            writes=distributed.is_first(),
        )
        if not label:  # else a study has told already what it trains
            self.progress.say(self._beginning())
        for warning in _warnings(experiment, self.loader):
            self.progress.say(warning)
        if self.first:
            self.progress.say(f"resuming at step {self.first}" + self._stretched(meta.get("steps", self.config.steps)))

    def _beginning(self) -> str:
        tasks = list(dict.fromkeys(self.streams.tasks))
        named = ", ".join(tasks[:LISTED_TASKS]) + (f" and {len(tasks) - LISTED_TASKS} more" if len(tasks) > LISTED_TASKS else "")
        numbers = sum(leaf.size for leaf in jax.tree.leaves(self.state.trainable))
        steps, batch = self.config.steps - self.first, self.experiment.data.batch_size
        return f"{named}: {numbers:,} numbers to train, {steps:,} steps of {batch} examples; compiling the first one"

    def take_steps(self, interrupt: Interrupt) -> None:
        """To the run's end. Interrupted, with the last step saved, once a stop was requested."""
        try:
            self._take_steps(interrupt)
        except Interrupted:
            step = int(self.state.step)
            if step > self.first:
                self._save(step)
            self.progress.say(f"stopped at step {step}" + ("; the same command continues from here" if self.store else ""))
            raise

    def _take_steps(self, interrupt: Interrupt) -> None:
        config, progress = self.config, self.progress
        if not self.validated:
            self._validate(self.first, interrupt)
        for step, batch in enumerate(self.loader.batches(self.first, config.steps), start=self.first + 1):
            stopped = self._stopped()
            if stopped.all():
                progress.say(f"no score has risen in {config.patience} validations: trained to step {step - 1} of {config.steps}")
                break
            if stopped.any():
                batch = without_groups(batch, self.streams.groups, stopped)
            placed = place_batch({name: array for name, array in batch.items() if name in PACKED_SHAPES}, self.mesh)
            self._compile(placed, interrupt)
            with jax.transfer_guard("disallow"):  # the batch is there; nothing else may go to or come from the devices
                self.state, metrics = self.train_step(self.state, self.frozen, placed)
            self.meter.add(metrics)
            interrupt.check()
            last = step == config.steps
            if step == self.first + 1:
                jax.block_until_ready(metrics)
                progress.started(step)
            if last or step % config.log_period == 0:
                progress.train(step, self.meter.record(self.experiment.loss.normalization))
            if config.eval_period and (last or step % config.eval_period == 0):
                self.validated = False
                self._validate(step, interrupt)
                progress.resume_clock()
            if config.checkpoint_period and (last or step % config.checkpoint_period == 0):
                self._save(step)
                progress.resume_clock()
            if not last:
                interrupt.heed()
        self.meter.check(self.state.trainable)

    def close(self) -> None:
        self.progress.close()
        if self.store is not None:
            self.store.close()

    def finish(self) -> TrainResult:
        """Write the best of each group, or what was trained last, and the mark of a finished run."""
        scores, params = np.full(len(self.streams.seeds), math.nan), None
        if self.best is not None:
            scores = np.where(np.isfinite(self.best.score), self.best.score, math.nan)
            params = None if np.isnan(scores).any() else self.best.trainable
        if params is None:
            params = to_host(self.state.trainable)
        with distributed.first_goes_first("writing the result"):
            path = _write_result(self.experiment, self.folder, self.backbone, self.streams, params, scores)
            if distributed.is_first():
                self.folder.finish(self.config.steps, self.backbone.fingerprint, self._seconds())
        return TrainResult(params, path, self.progress.history, scores, self.earlier_seconds)

    def _stopped(self) -> np.ndarray:
        """bool [G]: the groups that are trained no more, because their score has not risen for `TrainConfig.patience`."""
        if self.best is None or not self.config.patience:
            return np.zeros(max(self.streams.groups) + 1, bool)
        return self.best.stale >= self.config.patience

    def _restore(self) -> dict[str, Any]:
        """Go to the newest checkpoint. Returns its meta, {} where there is none."""
        if self.store is None:
            return {}
        restored = self.store.restore(self.state, self.best.tree() if self.best else None)
        if restored is None:
            return {}
        self.state = restored.state
        if self.best is not None:
            self.best.load(restored.best)
        return restored.meta

    def _stretched(self, before: int) -> str:
        """What a new number of steps does to a schedule that depends on it; "" if nothing."""
        now, optimizer = self.config.steps, self.experiment.optimizer
        if optimizer.schedule == "constant" or before == now:
            return ""
        was, will_be = (float(schedule(optimizer, jnp.asarray(self.first), steps)) for steps in (before, now))
        return (
            f"; TRAIN_STEPS was {before} and is {now} now, so the linear schedule takes the learning rate from {was:.0%} to "
            f"{will_be:.0%} of its peak here"
        )

    def _compile(self, batch: dict[str, jax.Array], interrupt: Interrupt) -> None:
        """The step's program for batches of these shapes, where it is the first; the call of the step then finds it."""
        shapes = tuple(array.shape for array in batch.values())
        if shapes not in self.compiled:
            interrupt.abandonable(lambda: self.train_step.lower(self.state, self.frozen, batch).compile())
            self.compiled.add(shapes)

    def _validate(self, step: int, interrupt: Interrupt) -> None:
        """Interrupted at once if a stop is requested; the validation is then done when the run resumes."""
        self.meter.check(self.state.trainable)
        scoring = functools.partial(
            evaluate,
            self.backbone,
            self.prompt_module,
            self.state.trainable,
            self.validation,
            vocabulary=self.vocabulary,
            lengths=self.experiment.data.lengths,
            decode=self.experiment.decode,
            max_examples=self.config.max_eval_examples,
            mesh=self.mesh,
            labels=self.labels,
        )
        metrics = interrupt.in_parts(lambda check: scoring(check=check))
        assert self.best is not None  # eval_period > 0
        self.progress.validation(step, self.best.update(step, metrics, self.streams.tasks, self.state.trainable))
        self.validated = True

    def _save(self, step: int) -> None:
        if self.store is None:
            return
        self.meter.check(self.state.trainable)
        meta = {
            "loader": {"step": step, "seed": self.experiment.data.seed},
            "meter": self.meter.tree(),
            "validated": self.validated,
            "steps": self.config.steps,
            "seconds": round(self._seconds(), 2),
        }
        self.store.save(step, self.state, self.best.tree() if self.best else None, meta)

    def _seconds(self) -> float:
        """Of this call and of those that took the steps before it."""
        return self.earlier_seconds + time.perf_counter() - self.began


def without_groups(batch: dict[str, np.ndarray], groups: Sequence[int], left_out: np.ndarray) -> dict[str, np.ndarray]:
    """The batch with no target of the groups in `left_out` (bool [G]), which it then trains as little as if they were absent."""
    examples = left_out[np.asarray(groups)[batch["task_ids"]]]
    if "decoder_segments" in batch:
        examples = np.take_along_axis(examples, np.maximum(batch["decoder_segments"] - 1, 0), axis=1)
    else:
        examples = examples[:, None]
    return batch | {"loss_weights": np.where(examples, 0, batch["loss_weights"])}


def _warnings(experiment: Experiment, loader: Loader) -> Iterator[str]:
    """What a run should not do silently, though it may be meant."""
    steps, warmup = experiment.train.steps, experiment.optimizer.warmup_steps
    if 0 < steps <= warmup:
        yield (
            f"warning: OptimizerConfig.warmup_steps={warmup} is not below TRAIN_STEPS={steps}: the learning rate only rises, to "
            f"{(steps - 1) / warmup:.0%} of its peak"
        )
    caches = {stream.task: stream.cache for stream in loader.streams}.values()
    for name, length in loader.lengths.items():
        share = sum(cache.truncated[name] for cache in caches) / sum(map(len, caches))
        if share > CUT_SHARE:
            yield f"warning: {share:.0%} of the training examples have {name} longer than {length} tokens, which are cut to them"


def _write_result(
    experiment: Experiment, folder: RunFolder, backbone: Backbone, streams: setup.Streams, params: Tree, scores: np.ndarray
) -> Path:
    """The prompt file or the tuned model's folder, which process 0 writes."""
    if not distributed.is_first():
        return folder.path / ("model" if experiment.prompt.method == "none" else FILE_NAME)
    if experiment.prompt.method == "none":
        return setup.export_model(folder.path, backbone, params["backbone"])
    meta = {
        "tasks": list(streams.tasks),
        "groups": list(streams.groups),
        "seeds": list(streams.seeds),
        "lengths": list(streams.lengths(experiment.prompt.length)),
        "scores": [float(score) if math.isfinite(score) else None for score in scores],
        "selection_split": experiment.data.eval_split if np.isfinite(scores).any() else None,
        "backbone": backbone.fingerprint,
        "steps": experiment.train.steps,
        "k_shots": [stream.k_shot for stream in streams.configs],
    }
    return save_prompts(folder.path / FILE_NAME, params, meta)


def _finished(experiment: Experiment, folder: RunFolder, backbone: Backbone | None) -> TrainResult | None:
    """What an earlier call has left, if it went as far as this one would; None otherwise, and where its result is gone."""
    mark = folder.finished()
    if mark is None or mark["step"] < experiment.train.steps:
        return None
    if mark["step"] > experiment.train.steps:
        raise _too_few(folder, mark["step"], experiment.train.steps)
    if backbone is not None and backbone.fingerprint != mark["backbone"]:
        raise UserError(
            f"MODEL_DIR {folder.path} holds a run on the backbone {mark['backbone']}, but this run's backbone is "
            f"{backbone.fingerprint}; give the backbone that it began with (INITIAL_CHECKPOINT_PATH) or another MODEL_DIR."
        )
    tuned = experiment.prompt.method == "none"
    path = folder.path / ("model" if tuned else FILE_NAME)
    if not path.exists():  # dropped by a study that has not kept what it was scored, or by hand: it is trained again
        return None
    history, seconds = read_history(folder.path), mark.get("seconds", 0.0)
    if tuned:
        params = {"backbone": import_hf(path, experiment.backbone.architecture)[1]}
        best = [record["score"] for record in history if record["kind"] == "validation" and record["score"] is not None]
        return TrainResult(params, path, history, np.asarray([max(best, default=math.nan)]), seconds)
    prompts, meta = load_prompts(folder.path)
    scores = np.asarray([math.nan if score is None else score for score in meta["scores"]])
    return TrainResult(prompts, path, history, scores, seconds)


def _too_few(folder: RunFolder, taken: int, steps: int) -> UserError:
    return UserError(
        f"The run in MODEL_DIR {folder.path} has taken {taken} steps already, more than TRAIN_STEPS={steps}; "
        "give at least as many, or another MODEL_DIR."
    )
