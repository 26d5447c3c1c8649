"""What a sweep trains, planned from its studies' configurations: pure, nothing is read or trained here.

cell    one combination of the axes' values, which is a study (`stages.plan`)
point   one run of a cell's target stages, or one of its source stages as a whole; cells that ask for the same share it
job     points that are trained side by side, as one stage: prompts of one backbone, number of steps and k. Those of prompt tuning
        may differ in length, start and learning rate; those of MPT and SPoT start from one source training
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpt_jax.checkpoint.folder import FREE
from mpt_jax.config import Experiment, PipelineConfig, StreamConfig, to_dict
from mpt_jax.data.fingerprint import digest
from mpt_jax.stages import RUNS, START_FILE, Stage, alone, plan

OF_DISTILLATION = ("distill_weight", "temperature", "distill_logits", "hidden_layers", "distill_encoder", "distill_decoder")
FREE_IN_A_SWEEP = FREE | {"backbone.vocabulary"}  # what a point may change in without being another one
Key = str


class Point(NamedTuple):
    """What is trained and scored once.

    Attributes:
        key: of what it is trained on and how, whatever the name of its cell.
        stage: of this one run or, of sources, of all their tasks.
        cells: numbers of the cells that have it.
        needs: keys of the source stages that it starts from.
    """

    key: Key
    stage: Stage
    cells: tuple[int, ...]
    needs: tuple[Key, ...]


class Job(NamedTuple):
    """Points that are trained together."""

    points: tuple[Point, ...]

    @property
    def needs(self) -> set[Key]:
        return {key for point in self.points for key in point.needs}

    def only(self, keys: Sequence[Key]) -> "Job":
        """The job of some of its points."""
        return Job(tuple(point for point in self.points if point.key in keys))

    def stage(self) -> Stage:
        """How the points are trained, into a folder of their own. Run n is of point n; a source stage is one point."""
        first = self.points[0]
        if first.stage.is_source:
            return first.stage
        return _bank([point.stage for point in self.points], digest(*(point.key for point in self.points)))


def plan_jobs(cells: Sequence[PipelineConfig]) -> list[Job]:
    """The jobs of all cells, sources before what starts from them; the same for the same cells, whatever is done already.

    Args:
        cells: studies with one MODEL_DIR.
    Raises:
        UserError: a study that cannot be planned.
    """
    points = collect(cells)
    banks: dict[str, list[Point]] = {}
    for point in points:
        by_itself = point.stage.is_source or point.stage.method == "model_tuning"
        scoring = json.dumps(_scoring(cells[point.cells[0]]))
        banks.setdefault(point.key if by_itself else digest(_alike(point), scoring), []).append(point)
    jobs = []
    for bank in banks.values():
        limit = cells[bank[0].cells[0]].bank_size
        size = max(1, limit // bank[0].stage.tries) if limit else len(bank)
        jobs += [Job(tuple(bank[begin : begin + size])) for begin in range(0, len(bank), size)]
    return jobs


def collect(cells: Sequence[PipelineConfig]) -> list[Point]:
    """The points of all cells, each once, in the order in which they occur; sources before what starts from them."""
    points: dict[Key, Point] = {}
    for number, cell in enumerate(cells):
        moved: dict[str, str] = {}  # folder that a stage has in its own study → that of its point
        keys: dict[str, Key] = {}  # the latter → key
        for stage in plan(cell):
            here = _moved(stage, moved)
            if here.is_source:
                key = _key(here, cell)
                folder = f"{_runs(cell)}/{here.kind}-{key}"
                moved[str(stage.folder)], keys[folder] = folder, key
                singles = [(key, _into(here, folder))]
            else:
                singles = [(_key(one, cell), one) for one in _singles(here)]
            for key, single in singles:
                needs = tuple(keys[folder] for folder in keys if _starts_from(single, folder))
                known = points.get(key, Point(key, single, (), needs))
                points[key] = known._replace(cells=(*known.cells, number))
    return list(points.values())


def _runs(cell: PipelineConfig) -> str:
    return str(Path(cell.base.train.model_dir).expanduser() / RUNS)


def _moved(stage: Stage, moved: Mapping[str, str]) -> Stage:
    """The stage with the paths of the source stages that it starts from."""

    def path(given: str) -> str:
        for before, after in moved.items():
            if given == before or given.startswith(f"{before}/"):
                return after + given.removeprefix(before)
        return given

    experiment = stage.experiment
    experiment = dataclasses.replace(
        experiment,
        loss=dataclasses.replace(experiment.loss, teachers=path(experiment.loss.teachers)),
        prompt=dataclasses.replace(experiment.prompt, init_file=path(experiment.prompt.init_file)),
    )
    return dataclasses.replace(stage, experiment=experiment, start=path(stage.start))


def _starts_from(stage: Stage, folder: str) -> bool:
    paths = stage.start, stage.experiment.loss.teachers, stage.experiment.prompt.init_file
    return any(path == folder or path.startswith(f"{folder}/") for path in paths)


def _singles(stage: Stage) -> Iterator[Stage]:
    """Each run of a stage on target tasks as a stage of its own."""
    for n, run in enumerate(stage.runs):
        experiment = alone(stage, n)
        if stage.method == "spot":  # chosen from `start`, when its bank is trained
            experiment = dataclasses.replace(experiment, prompt=dataclasses.replace(experiment.prompt, init_file=""))
        yield dataclasses.replace(stage, runs=(run,), experiment=experiment)


def _key(stage: Stage, cell: PipelineConfig) -> Key:
    """Of what a stage trains and how its study scores it."""
    besides = [stage.zero_shot[run.task] for run in stage.runs if run.task in stage.zero_shot]
    return digest(
        json.dumps([stage.kind, stage.method, stage.k, stage.runs, stage.start, *besides, *_retrieval(stage)]),
        json.dumps(_what_matters(stage.experiment), default=str),
        json.dumps(_scoring(cell)),
    )


def _scoring(cell: PipelineConfig) -> list[Any]:
    return [cell.test_split, cell.max_test_examples]


def _what_matters(experiment: Experiment) -> dict[str, Any]:
    """The configuration without what is free to differ, or has no effect in this run: cells that differ in that share a point."""
    config: dict[str, Any] = _fixed(to_dict(experiment))
    prompt, loss = config["prompt"], config["loss"]
    if experiment.prompt.method == "none":
        prompt = {"method": "none"}
    elif experiment.prompt.method != "mpt":
        prompt = {name: value for name, value in prompt.items() if name != "rank" and not name.startswith("factor_")}
    if not experiment.loss.teachers:
        loss = {name: value for name, value in loss.items() if name not in OF_DISTILLATION}
    data = config["data"]
    if experiment.data.sampling != "mpt":
        data = {name: value for name, value in data.items() if name != "with_replacement"}
    return config | {"prompt": prompt, "loss": loss, "data": data}


def _fixed(value: Any, prefix: str = "") -> Any:
    """A configuration without what is free to differ."""
    if not isinstance(value, dict):
        return value
    names = {name: f"{prefix}.{name}" if prefix else name for name in value}
    return {name: _fixed(value[name], path) for name, path in names.items() if path not in FREE_IN_A_SWEEP}


def _alike(point: Point) -> str:
    """Equal for the points that one bank can train: all but what each of its prompts has of its own."""
    stage, experiment = point.stage, point.stage.experiment
    config = _what_matters(experiment)
    config["data"] |= {"mixture": "", "streams": ()}
    optimizer = experiment.optimizer
    mixed = stage.method == "prompt_tuning" and experiment.prompt.init != "file" and not experiment.data.pack_lengths
    if mixed and len(optimizer.rules) == 1 and not (optimizer.factored or optimizer.scale_by_parameter):
        config["prompt"] |= {"length": 0, "init": ""}
        config["optimizer"]["rules"] = [optimizer.rules[0][0]]
    same = [stage.kind, stage.method, stage.k, stage.start, stage.zero_shot, *_retrieval(stage), config]
    return digest(json.dumps(same, default=str))


def _retrieval(stage: Stage) -> list[Any]:
    """How SPoT's start is found."""
    if stage.transfer is None:
        return []
    retrieval, fresh, _ = stage.transfer
    return [to_dict(retrieval), to_dict(fresh) if retrieval.trainings else {}]


def _bank(stages: Sequence[Stage], name: str) -> Stage:
    """Runs that are alike as one bank; see `_alike`."""
    first = stages[0].experiment
    prompts = [stage.experiment.prompt for stage in stages]
    longest = max(prompt.length for prompt in prompts)
    rates = [stage.experiment.optimizer.rules[0][1] for stage in stages]
    same_rate = len({stage.experiment.optimizer.rules for stage in stages}) == 1
    streams = tuple(
        StreamConfig(
            stage.runs[0].task,
            group,
            stage.k,
            stage.runs[0].seed,
            length=prompt.length if prompt.length != longest else 0,
            init=prompt.init if prompt.init != prompts[0].init else "",
            rate_factor=1.0 if same_rate else rate,
        )
        for group, (stage, prompt, rate) in enumerate(zip(stages, prompts, rates, strict=True))
    )
    rules = first.optimizer.rules if same_rate else ((first.optimizer.rules[0][0], 1.0),)
    batch = sum(stage.experiment.data.batch_size for stage in stages)
    experiment = dataclasses.replace(
        first,
        data=dataclasses.replace(first.data, mixture=streams[0].task, streams=streams, batch_size=batch),
        prompt=dataclasses.replace(prompts[0], length=longest),
        optimizer=dataclasses.replace(first.optimizer, rules=rules),
    )
    stage = dataclasses.replace(stages[0], runs=tuple(stage.runs[0] for stage in stages), experiment=experiment)
    root = stages[0].folder.parent
    return _into(stage, f"{root}/{stage.kind}-{stage.method}-{name}")


def _into(stage: Stage, folder: str) -> Stage:
    """The stage with another folder."""
    experiment = stage.experiment
    experiment = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, model_dir=folder))
    if stage.method == "spot":
        prompt = dataclasses.replace(experiment.prompt, init_file=f"{folder}/{START_FILE}#*")
        experiment = dataclasses.replace(experiment, prompt=prompt)
    return dataclasses.replace(stage, experiment=experiment)


def spread_of_lengths(job: Job) -> str:
    """'20 tokens' or '1 to 150 tokens'; "" where a model is tuned."""
    lengths = [point.stage.experiment.prompt_length for point in job.points]
    least, most = min(lengths), max(lengths)
    span = f"{most}" if least == most else f"{least} to {most}"
    return "" if not most else f"{span} token{'s' if most > 1 else ''}"


def steps_of(job: Job) -> int:
    """Training steps of the job's stage."""
    return job.points[0].stage.experiment.train.steps
