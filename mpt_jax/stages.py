"""The stages of a study, planned from its configuration: pure, nothing is read or trained here.

teachers    one bank: a plain prompt for each source task
source      MPT's shared prompt and every source's u, v, distilled from the teachers
            (these two for each of `source_seeds`)
few_shot    for each k and method: a bank with one prompt for each target and seed
full        the same on all examples
(model tuning: one run for each target and seed, because it trains a whole model; MPT and SPoT: a bank for each source training)
"""

import dataclasses
import hashlib
import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpt_jax.checkpoint.folder import FREE, differences
from mpt_jax.config import (
    Experiment,
    OptimizerConfig,
    PipelineConfig,
    PromptConfig,
    RetrievalConfig,
    StageConfig,
    StreamConfig,
    to_dict,
)
from mpt_jax.errors import UserError
from mpt_jax.prompts.files import FILE_NAME
from mpt_jax.studies.results import METHODS, run_id, zero_shot_id
from mpt_jax.study_checks import check, needs_source, needs_teachers

RUNS = "runs"  # folder of the stages' runs in MODEL_DIR
CURVE_POINTS = 12  # fewer do not show the course of a stage's loss; TrainConfig.log_period gives a long stage more
START_FILE = "start.safetensors"  # the prompts that a SPoT bank starts from, in its run's folder
# The pipeline compares fingerprints of backbone and data with those of its results.
FREE_IN_A_STUDY = FREE | {"backbone.checkpoint", "backbone.vocabulary"}


class Run(NamedTuple):
    """One prompt or tuned model of a stage, trained and scored on one task."""

    task: str
    seed: int


class Transfer(NamedTuple):
    """How SPoT's runs find what they start from.

    Attributes:
        retrieval: with `top` a number of sources, and of its `stages` those that it takes.
        fresh: how the prompts start that it trains.
        sources: the teachers' tasks.
    """

    retrieval: RetrievalConfig
    fresh: PromptConfig
    sources: tuple[str, ...]

    @property
    def tries(self) -> int:
        """How many prompts are trained for each run, of which the best is its result."""
        return self.retrieval.top if self.retrieval.use == "best" else 1


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one call of `run_training` does. Run n is stream n of its bank."""

    kind: str  # of results.STAGES
    method: str  # of results.METHODS
    k: int  # 0 = all examples
    runs: tuple[Run, ...]
    experiment: Experiment
    start: str = ""  # the prompt file of the source training that MPT's and SPoT's runs start from
    transfer: Transfer | None = None  # of SPoT
    zero_shot: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # `PipelineConfig.zero_shot`, of targets

    @property
    def is_source(self) -> bool:
        """Whether it trains on the source tasks, for all of the targets."""
        return self.kind in ("teachers", "source")

    @property
    def title(self) -> str:
        """What the terminal calls it; model tuning's single runs share one title."""
        if self.is_source:
            return {"teachers": "teachers, a prompt for each source task", "source": "MPT source training"}[self.kind]
        return f"targets, {f'k = {self.k}' if self.k else 'all examples'}, {self.method.replace('_', ' ')}"

    @property
    def settings(self) -> str:
        """The field of `PipelineConfig` that has the stage's length and learning rates."""
        if self.is_source:
            return f"PipelineConfig.{self.kind.removesuffix('s')}"
        return f"PipelineConfig.{'few_shot' if self.k else 'full_data'}['{self.method}']"

    @property
    def run_ids(self) -> tuple[str, ...]:
        return tuple(run_id(self.kind, self.method, run.task, self.k, run.seed) for run in self.runs)

    @property
    def scored(self) -> list[tuple[int, str]]:
        """(number of a run, task) of every score: of a run those without training, then its own, which marks the run as done."""
        return [(n, task) for n, run in enumerate(self.runs) for task in (*self.zero_shot.get(run.task, ()), run.task)]

    @property
    def folder(self) -> Path:
        return Path(self.experiment.train.model_dir)

    @property
    def batch_per_run(self) -> int:
        """Examples per step of one run; MPT's source training is one run for all tasks."""
        batch = self.experiment.data.batch_size
        return batch if self.kind == "source" else batch // len(self.runs)

    @property
    def tries(self) -> int:
        """How many prompts are trained for each run, of which the best is its result."""
        return self.transfer.tries if self.transfer else 1

    @property
    def trainings(self) -> list[Experiment]:
        """All that it trains, the runs last. In SPoT's mixtures the first sources stand for those that will be chosen."""
        if self.transfer is None:
            return [self.experiment]
        chosen = [self.transfer.sources[: self.transfer.retrieval.top]] * len(self.runs)
        made = {"embedding": embedding_experiment, "mixture": lambda stage: mixture_experiment(stage, chosen)}
        return [*(made[name](self) for name in self.transfer.retrieval.trainings), widened(self)]

    def cost(self, test_sizes: dict[str, int]) -> float:
        """Examples to train on, and to decode, in units of one trained example; for the estimate of the time left."""
        per_example = 1.5 if self.method == "model_tuning" or self.experiment.loss.teachers else 1.0
        trained = sum(one.train.steps * one.data.batch_size for one in self.trainings) * per_example
        return trained + 0.5 * sum(test_sizes.get(task, 0) for _, task in self.scored)


def plan(cfg: PipelineConfig) -> list[Stage]:
    """All stages in the order in which they are run. Stages that no method needs are left out.

    Raises:
      UserError: names the field of `PipelineConfig` that is wrong.
    """
    check(cfg)
    stages = []
    for seed in cfg.source_seeds:
        if needs_teachers(cfg):
            stages.append(_teachers(cfg, seed))
        if needs_source(cfg):
            stages.append(_source(cfg, seed))
    for k in sorted(cfg.k_shots, key=lambda k: (k == 0, k)):
        seeds = cfg.seeds if k else cfg.full_seeds
        runs = tuple(Run(task, seed) for task in cfg.targets for seed in seeds)
        methods = cfg.few_shot if k else cfg.full_data
        for method in (name for name in METHODS if name in methods):
            parts = _parts(cfg, method, k, runs)
            for number, part in enumerate(parts, start=1):
                suffix = f"-part{number}" if len(parts) > 1 else ""
                if method == "model_tuning":
                    suffix = f"-{part[0].task}-seed{part[0].seed}"
                stages.append(target_stage(cfg, method, k, part, suffix))
    for experiment in (experiment for stage in stages for experiment in stage.trainings):
        experiment.validate()
    return stages


def target_stage(cfg: PipelineConfig, method: str, k: int, runs: tuple[Run, ...], suffix: str = "") -> Stage:
    """A bank of runs on target tasks (or one model-tuning run); `suffix` tells apart the folders of a stage in parts."""
    kind = "few_shot" if k else "full"
    settings = (cfg.few_shot if k else cfg.full_data)[method]
    folder = _folder(cfg, f"{kind}{f'-k{k}' if k else ''}-{method}{suffix}")
    streams = tuple(StreamConfig(run.task, group, k, run.seed) for group, run in enumerate(runs))
    base = dataclasses.replace(cfg.base, loss=dataclasses.replace(cfg.base.loss, teachers=""))
    # Few-shot runs select nothing, as there is no validation set; single few-shot models are trained again rather than resumed.
    periods: dict[str, Any] = {"eval_period": 0} if k else {}
    if k and method == "model_tuning":
        periods["checkpoint_period"] = 0
    experiment = stage_experiment(base, settings, folder, streams, "bank", **periods)
    start = _start_of(cfg, method, k, runs)
    experiment = dataclasses.replace(experiment, prompt=target_prompt(cfg, experiment.prompt, method, folder, start))
    if method == "model_tuning":
        # A frozen backbone may be in bfloat16, but trained weights may not: it would swallow small steps.
        architecture = dataclasses.replace(experiment.backbone.architecture, param_dtype="float32")
        backbone = dataclasses.replace(experiment.backbone, architecture=architecture)
        experiment = dataclasses.replace(experiment, backbone=backbone, optimizer=tuning_optimizer(experiment.optimizer))
    transfer = _transfer(cfg) if method == "spot" else None
    return Stage(kind, method, k, runs, experiment, start, transfer, cfg.zero_shot)


def _transfer(cfg: PipelineConfig) -> Transfer:
    retrieval = dataclasses.replace(cfg.retrieval, top=cfg.retrieval.top or len(cfg.sources))
    if (retrieval.use, retrieval.top) == ("average", 1):  # the mean of one prompt
        retrieval = dataclasses.replace(retrieval, use="best")
    if retrieval.by != "loss":  # which takes no examples so
        retrieval = dataclasses.replace(retrieval, max_examples=RetrievalConfig().max_examples)
    # Resolved here: they are trained from SPoT's stage, whose warm-up is not theirs.
    stages = {name: dataclasses.replace(one, warmup_steps=_warmup(one, cfg.base)) for name, one in retrieval.stages.items()}
    stages = {name: stages[name] for name in retrieval.trainings}
    fresh = dataclasses.replace(cfg.base.prompt, method="plain")
    return Transfer(dataclasses.replace(retrieval, stages=stages), fresh, cfg.sources)


def widened(stage: Stage) -> Experiment:
    """The experiment of SPoT's stage with `stage.tries` prompts for each run, run by run."""
    experiment, tries = stage.experiment, stage.tries
    streams = tuple(
        dataclasses.replace(stream, group=n * tries + t) for n, stream in enumerate(experiment.data.streams) for t in range(tries)
    )
    data = dataclasses.replace(experiment.data, streams=streams, batch_size=experiment.data.batch_size * tries)
    return dataclasses.replace(experiment, data=data)


def embedding_experiment(stage: Stage) -> Experiment:
    """What trains the prompts that stand for the runs of SPoT's stage where similarities are taken."""
    return _for_start(stage, "embedding", stage.experiment.data.streams)


def mixture_experiment(stage: Stage, chosen: Sequence[Sequence[str]]) -> Experiment:
    """What trains a prompt for each run of SPoT's stage, on its chosen sources and its own examples."""
    streams = []
    for n, (stream, sources) in enumerate(zip(stage.experiment.data.streams, chosen, strict=True)):
        streams += [StreamConfig(source, n, 0, stream.seed) for source in sources]
        streams.append(StreamConfig(stream.task, n, stream.k_shot, stream.seed))
    return _for_start(stage, "mixture", tuple(streams))


def _for_start(stage: Stage, kind: str, streams: tuple[StreamConfig, ...]) -> Experiment:
    assert stage.transfer is not None, stage.method
    base = dataclasses.replace(stage.experiment, prompt=stage.transfer.fresh)
    settings = stage.transfer.retrieval.stages[kind]
    return stage_experiment(base, settings, str(stage.folder / kind), streams, "bank", eval_period=0)


def target_prompt(cfg: PipelineConfig, prompt: PromptConfig, method: str, folder: str, start: str) -> PromptConfig:
    """How a method's prompt starts on a target task. Prompt tuning starts as its stage says, in `prompt`."""
    if method == "mpt":
        return dataclasses.replace(prompt, method=_mpt_prompt(cfg), init="file", init_file=start)
    if method == "spot":
        return dataclasses.replace(prompt, method="plain", init="file", init_file=f"{folder}/{START_FILE}#*")
    return dataclasses.replace(prompt, method="plain" if method == "prompt_tuning" else "none")


def tuning_optimizer(optimizer: OptimizerConfig) -> OptimizerConfig:
    """Model tuning's defaults, those of T5X's fine-tuning: Adafactor factored and scaled by parameter, without weight decay."""
    if optimizer.name != "adafactor":
        return optimizer
    return dataclasses.replace(optimizer, factored=True, scale_by_parameter=True, weight_decay=0.0, decay_offset=0)


def alone(stage: Stage, n: int) -> Experiment:
    """Run n of a stage as it would be trained alone, to the same prompt; MPT's source training is one run for all tasks."""
    experiment = stage.experiment
    if stage.kind == "source":
        return experiment
    stream = experiment.data.streams[n]
    single = StreamConfig(stream.task, 0, stream.k_shot, stream.seed)
    data = dataclasses.replace(experiment.data, mixture=stream.task, streams=(single,), batch_size=stage.batch_per_run)
    prompt = experiment.prompt
    prompt = dataclasses.replace(prompt, length=stream.length or prompt.length, init=stream.init or prompt.init)
    rules = tuple((pattern, rate * stream.rate_factor) for pattern, rate in experiment.optimizer.rules)
    optimizer = dataclasses.replace(experiment.optimizer, rules=rules)
    return dataclasses.replace(experiment, data=data, prompt=prompt, optimizer=optimizer)


def run_config(stage: Stage, n: int, model_dir: str) -> dict[str, Any]:
    """The configuration of run n as a result records it: as if it had been trained alone, paths relative to MODEL_DIR.

    SPoT's `prompt.init_file` is the source prompts that its start is chosen from.
    """
    config: dict[str, Any] = json.loads(json.dumps(to_dict(alone(stage, n))))
    config["prompt"]["init_file"] = stage.start or config["prompt"]["init_file"]
    if stage.transfer is not None:
        config["retrieval"] = json.loads(json.dumps(to_dict(stage.transfer.retrieval)))
    for part, field in (("prompt", "init_file"), ("loss", "teachers"), ("train", "model_dir")):
        path = config[part][field]
        config[part][field] = path.removeprefix(model_dir).lstrip("/") if path.startswith(model_dir) else path
    return config


def check_scored(stage: Stage, n: int, recorded: Container[str], where: str) -> None:
    """UserError where run n of a stage is done, but was not scored on all of its zero-shot tasks: it was done without them.

    A tuned model's weights are gone by then, and prompts alone, scored late, would have nothing to be compared with.
    """
    run, name = stage.runs[n], stage.run_ids[n]
    for task in stage.zero_shot.get(run.task, ()):
        if zero_shot_id(name, task) not in recorded:
            raise UserError(
                f"{where} holds the result of {name}, which was not scored on '{task}', and a run that is done is not scored "
                f"again; take '{task}' out of PipelineConfig.zero_shot['{run.task}'] to continue, or give another MODEL_DIR."
            )


def check_same(recorded: dict[str, Any], planned: dict[str, Any], where: str, run: str) -> None:
    """UserError naming the first field in which a recorded run's configuration differs from the planned one's."""
    if "retrieval" in planned:  # of which older results say nothing
        recorded = {"retrieval": to_dict(RetrievalConfig())} | recorded
    for name, before, after in differences(recorded, planned, FREE_IN_A_STUDY):
        raise UserError(
            f"{where} holds the result of {run} with {name}={before!r}, but now it is {after!r}; "
            "give the old value to continue, or another MODEL_DIR."
        )


def remaining(cfg: PipelineConfig, stages: Sequence[Stage], done: set[str]) -> list[Stage]:
    """The stages that still have runs to do. Where a study was extended, by seeds or targets, only the new runs are left."""
    left = []
    for stage in stages:
        missing = tuple(run for run, name in zip(stage.runs, stage.run_ids, strict=True) if name not in done)
        if not missing:
            continue
        extended = len(missing) < len(stage.runs) and not stage.is_source
        left.append(target_stage(cfg, stage.method, stage.k, missing, _digest(missing)) if extended else stage)
    return left


def tasks_of(cfg: PipelineConfig) -> tuple[str, ...]:
    """Every task that a study is scored on, each once: sources, targets, and what targets are scored on besides."""
    return tuple(dict.fromkeys((*cfg.sources, *cfg.targets, *(task for tasks in cfg.zero_shot.values() for task in tasks))))


def _teachers(cfg: PipelineConfig, seed: int) -> Stage:
    base = _source_base(cfg, seed, "plain", teachers="")
    streams = tuple(StreamConfig(task, group, 0, base.data.seed) for group, task in enumerate(cfg.sources))
    experiment = stage_experiment(base, cfg.teacher, _source_folder(cfg, "teachers", seed), streams, "bank")
    return Stage("teachers", "prompt_tuning", 0, _source_runs(cfg, base), experiment)


def _source(cfg: PipelineConfig, seed: int) -> Stage:
    base = _source_base(cfg, seed, _mpt_prompt(cfg), teachers=_source_folder(cfg, "teachers", seed) if cfg.distill else "")
    streams = tuple(StreamConfig(task, 0, 0, base.data.seed) for task in cfg.sources)
    experiment = stage_experiment(base, cfg.source, _source_folder(cfg, "source", seed), streams, cfg.source_sampling)
    return Stage("source", "mpt", 0, _source_runs(cfg, base), experiment)


def _mpt_prompt(cfg: PipelineConfig) -> str:
    """The prompt method of MPT's stages. Without decomposition the sources share a plain prompt (Wang et al. 2023, ablation)."""
    return "mpt" if cfg.decompose else "plain"


def _source_base(cfg: PipelineConfig, seed: int, method: str, teachers: str) -> Experiment:
    """What the source training of one of `source_seeds` starts from; the seeds count from RANDOM_SEED."""
    return dataclasses.replace(
        cfg.base,
        data=dataclasses.replace(cfg.base.data, seed=cfg.base.data.seed + seed),
        prompt=dataclasses.replace(cfg.base.prompt, method=method),
        loss=dataclasses.replace(cfg.base.loss, teachers=teachers),
    )


def _source_runs(cfg: PipelineConfig, base: Experiment) -> tuple[Run, ...]:
    return tuple(Run(task, base.data.seed) for task in cfg.sources)


def _source_folder(cfg: PipelineConfig, kind: str, seed: int) -> str:
    """Called by the seed that its runs record; that of RANDOM_SEED itself is called by its kind alone."""
    return _folder(cfg, f"{kind}-seed{cfg.base.data.seed + seed}" if seed else kind)


def _parts(cfg: PipelineConfig, method: str, k: int, runs: tuple[Run, ...]) -> list[tuple[Run, ...]]:
    """The banks that the runs are trained in: of one source training each, and of at most `bank_size` runs."""
    by_start: dict[str, list[Run]] = {}
    for run in runs:
        by_start.setdefault(_start_of(cfg, method, k, (run,)), []).append(run)
    tries = _transfer(cfg).tries if method == "spot" else 1
    size = 1 if method == "model_tuning" else max(1, cfg.bank_size // tries) if cfg.bank_size else len(runs)
    return [tuple(bank[begin : begin + size]) for bank in by_start.values() for begin in range(0, len(bank), size)]


def _start_of(cfg: PipelineConfig, method: str, k: int, runs: Sequence[Run]) -> str:
    """The prompt file of the source training that the runs, of one bank, start from; "" for methods without a source."""
    if method not in ("mpt", "spot"):
        return ""
    number = (cfg.seeds if k else cfg.full_seeds).index(runs[0].seed)
    seed = cfg.source_seeds[number % len(cfg.source_seeds)]
    return f"{_source_folder(cfg, 'source' if method == 'mpt' else 'teachers', seed)}/{FILE_NAME}"


def stage_experiment(
    base: Experiment, settings: StageConfig, folder: str, streams: tuple[StreamConfig, ...], sampling: str, **periods: Any
) -> Experiment:
    """`base` with a stage's length, speed, start, streams and folder; a short stage tells its loss more often than `base`."""
    batch = settings.batch_size * (len(streams) if sampling == "bank" else 1)
    data = dataclasses.replace(base.data, mixture=streams[0].task, streams=streams, sampling=sampling, batch_size=batch)
    period = max(1, min(base.train.log_period, settings.steps // CURVE_POINTS))
    train = dataclasses.replace(base.train, steps=settings.steps, model_dir=folder, log_period=period, **periods)
    warmup = _warmup(settings, base)
    optimizer = dataclasses.replace(base.optimizer, name=settings.optimizer, rules=settings.rules, warmup_steps=warmup)
    prompt = dataclasses.replace(base.prompt, init=settings.init or base.prompt.init)
    return dataclasses.replace(base, data=data, train=train, prompt=prompt, optimizer=optimizer)


def _warmup(settings: StageConfig, base: Experiment) -> int:
    return base.optimizer.warmup_steps if settings.warmup_steps < 0 else settings.warmup_steps


def _folder(cfg: PipelineConfig, name: str) -> str:
    return str(Path(cfg.base.train.model_dir).expanduser() / RUNS / name)


def _digest(runs: Sequence[Run]) -> str:
    return "-" + hashlib.sha256(json.dumps(runs).encode()).hexdigest()[:8]
