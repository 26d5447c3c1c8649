"""Training, from a configuration to a prompt file (or a tuned model), in one page.

`run_training` opens what the run is made of, resumes where an earlier call stopped, and takes steps; every so often it logs,
validates and saves, in this order and each only if the loss is finite. Its folder, MODEL_DIR, afterwards holds

    config.json             the resolved configuration
    metrics.jsonl           see `progress.py`; the same numbers for TensorBoard in tensorboard/
    checkpoints/            see `checkpoint/store.py`
    prompts.safetensors     the best prompt of each group by validation score, or the last where there was no validation
    model/                  instead of a prompt, with PromptConfig.method="none": the tuned model, a Hugging Face folder
    finished.json           written last
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mpt_jax import setup
from mpt_jax.checkpoint.backbone import Backbone
from mpt_jax.checkpoint.folder import RunFolder
from mpt_jax.checkpoint.import_hf import import_hf
from mpt_jax.checkpoint.store import Store
from mpt_jax.config import Experiment
from mpt_jax.errors import UserError
from mpt_jax.evaluate import evaluate
from mpt_jax.monitor import Best, Interrupt, Meter
from mpt_jax.partitioning import check_batch_size, place_batch
from mpt_jax.progress import Progress, Record, read_history
from mpt_jax.prompts import build_prompt
from mpt_jax.prompts.files import FILE_NAME, load_prompts, save_prompts
from mpt_jax.shapes import BATCH_SHAPES
from mpt_jax.train_state import create_state, make_train_step

Tree = Any


class TrainResult(NamedTuple):
    """What a run leaves.

    Attributes:
        params: best (or last) trainable of each group as NumPy arrays: a prompt module's parameters, or {"backbone": …}.
        prompts_path: the prompt file, or the folder of the tuned model.
        history: the lines of `metrics.jsonl`.
        scores: best validation score of each group [G], NaN without validation.
    """

    params: Tree
    prompts_path: Path
    history: list[Record]
    scores: np.ndarray


def run_training(experiment: Experiment, backbone: Backbone | None = None, *, label: str = "") -> TrainResult:
    """Train a prompt, a bank of prompts or the whole model; resume, or return at once what a finished run has left.

    Args:
        backbone: one that is loaded already, else `experiment.backbone` is loaded.
        label: put before every line of progress.
    Raises:
        UserError: whatever is wrong with the configuration, the data or the files; a loss that is not finite.
        KeyboardInterrupt: after SIGINT or SIGTERM, with a checkpoint of the last step on disk.
    """
    experiment.validate()
    config = experiment.train
    folder = RunFolder(config.model_dir)
    folder.begin(experiment)
    if (result := _finished(experiment, folder, backbone)) is not None:
        return result

    mesh = setup.mesh_of(experiment)
    check_batch_size(experiment.data.batch_size, mesh)
    backbone = setup.open_backbone(experiment, mesh, backbone)
    vocabulary = setup.open_vocabulary(experiment, backbone)
    streams = setup.find_streams(experiment, vocabulary)
    loader = setup.make_loader(experiment, streams, vocabulary)
    caches = setup.open_validation(experiment, streams.tasks, vocabulary)

    prompt_module = build_prompt(experiment.prompt, streams.groups, backbone.model.config.d_model)
    frozen = setup.frozen_tree(experiment, streams, backbone, mesh)
    start = setup.initial_trainable(experiment, streams, backbone, vocabulary)
    recipe = (experiment.optimizer, config.steps, streams.groups)
    state = create_state(start, backbone.model, *recipe, config.seed, mesh)
    train_step = make_train_step(backbone.model, prompt_module, experiment.loss, *recipe, mesh)

    best = Best(state.trainable, streams.groups)
    store = (
        Store(folder.path, keep=config.keep_checkpoints, fingerprint=backbone.fingerprint) if config.checkpoint_period else None
    )
    restored = store.restore(state, best.tree()) if store is not None else None
    if restored is not None:
        state = restored.state
        best.load(restored.best)
    first = int(state.step)
    if first > config.steps:
        raise _too_few(folder, first, config.steps)
    meter = Meter(
        first,
        streams.tasks,
        streams.groups,
        task_ids=lambda step: loader.batch(step)["task_ids"],
        last_good=lambda: store.latest() if store is not None else None,
    )
    if restored is not None:
        meter.load(restored.meta["sums"])
    progress = Progress(
        folder.path,
        steps=config.steps,
        start=first,
        batch_size=experiment.data.batch_size,
        tensorboard=config.tensorboard,
        label=label,
    )
    if first:
        progress.say(f"resuming at step {first}")

    def validate(step: int) -> None:
        meter.check(state.trainable)
        metrics = evaluate(
            backbone,
            prompt_module,
            state.trainable,
            caches,
            vocabulary=vocabulary,
            lengths=experiment.data.lengths,
            decode=experiment.decode,
            max_examples=config.max_eval_examples,
            mesh=mesh,
        )
        progress.validation(step, best.update(step, metrics, streams.tasks, state.trainable))

    def save(step: int) -> None:
        if store is not None:
            meter.check(state.trainable)
            position = {"step": step, "seed": experiment.data.seed}
            meta = {"loader": position, "sums": meter.sums()}
            store.save(step, state, best.tree() if config.eval_period else None, meta)

    try:
        with Interrupt() as interrupt:
            for step, batch in enumerate(loader.batches(first, config.steps), start=first + 1):
                placed = place_batch({name: batch[name] for name in BATCH_SHAPES}, mesh)
                with jax.transfer_guard("disallow"):  # the batch is there; nothing else may go to or come from the devices
                    state, metrics = train_step(state, frozen, placed)
                meter.add(metrics)
                last = step == config.steps
                if step == first + 1:  # compiled
                    jax.block_until_ready(metrics)
                    progress.started(step)
                if last or step % config.log_period == 0:
                    progress.train(step, meter.record(experiment.loss.normalization))
                if config.eval_period and (last or step % config.eval_period == 0):
                    validate(step)
                    progress.resume_clock()
                if config.checkpoint_period and (last or step % config.checkpoint_period == 0):
                    save(step)
                    progress.resume_clock()
                if interrupt.requested and not last:
                    save(step)
                    progress.say(f"stopped at step {step}" + ("; the same command continues from here" if store else ""))
                    raise KeyboardInterrupt
        meter.check(state.trainable)
    finally:
        progress.close()
        if store is not None:
            store.close()
    selected = bool(config.eval_period and np.isfinite(best.score).all())
    params = best.trainable if selected else jax.device_get(state.trainable)
    path = _write_result(experiment, folder, backbone, streams, params, best.score)
    folder.finish(config.steps, backbone.fingerprint)
    return TrainResult(params, path, progress.history, _scores(best.score))


def _write_result(
    experiment: Experiment, folder: RunFolder, backbone: Backbone, streams: setup.Streams, params: Tree, scores: np.ndarray
) -> Path:
    """The prompt file or the tuned model's folder."""
    if experiment.prompt.method == "none":
        return setup.export_model(folder.path, backbone, params["backbone"])
    meta = {
        "tasks": list(streams.tasks),
        "groups": list(streams.groups),
        "seeds": list(streams.seeds),
        "scores": [float(score) if math.isfinite(score) else None for score in scores],
        "backbone": backbone.fingerprint,
        "steps": experiment.train.steps,
        "k_shots": [stream.k_shot for stream in streams.configs],
    }
    return save_prompts(folder.path / FILE_NAME, params, meta)


def _finished(experiment: Experiment, folder: RunFolder, backbone: Backbone | None) -> TrainResult | None:
    """What an earlier call has left, if it went as far as this one would; None otherwise."""
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
    history = read_history(folder.path)
    if experiment.prompt.method == "none":
        path = folder.path / "model"
        params = {"backbone": import_hf(path, experiment.backbone.architecture)[1]}
        best = [record["score"] for record in history if record["kind"] == "validation" and record["score"] is not None]
        return TrainResult(params, path, history, np.asarray([max(best, default=math.nan)]))
    prompts, meta = load_prompts(folder.path)
    scores = np.asarray([math.nan if score is None else score for score in meta["scores"]])
    return TrainResult(prompts, folder.path / FILE_NAME, history, scores)


def _too_few(folder: RunFolder, taken: int, steps: int) -> UserError:
    return UserError(
        f"The run in MODEL_DIR {folder.path} has taken {taken} steps already, more than TRAIN_STEPS={steps}; "
        "give at least as many, or another MODEL_DIR."
    )


def _scores(best: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(best), best, math.nan)
