"""What a sweep would do and cost, told before anything is trained (`sweep --dry-run`)."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from mpt_jax.board import read_results
from mpt_jax.config import Experiment, StreamConfig
from mpt_jax.costs import Work, work_of
from mpt_jax.data.registry import find_task
from mpt_jax.errors import UserError
from mpt_jax.hardware import GIB, Slice, find_slice
from mpt_jax.jobs import plan_jobs, spread_of_lengths, steps_of
from mpt_jax.memory import DoesNotFit, Programs, device_bytes, estimate_training, mesh_over, programs_of
from mpt_jax.partitioning import make_mesh
from mpt_jax.pipeline import duration
from mpt_jax.plan import roofline
from mpt_jax.stages import Stage, tasks_of
from mpt_jax.studies.wording import counted
from mpt_jax.study_data import check_known_starts
from mpt_jax.sweep import Cell

ELSEWHERE = "With --topology=v5e:2x4 (or h100 …) also how long this takes there, and whether it fits."
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


class Cost(NamedTuple):
    """Of a training on some devices."""

    flops: float  # of all steps and devices together
    seconds: float
    memory: float  # bytes of a device, estimated
    fits: bool


def cost_of(experiment: Experiment, where: Slice | None = None) -> Cost:
    """From shapes alone: no data is read, nothing is compiled. Without devices FLOP are all that can be told.

    What no mesh has the memory for costs what it would on the one that needs least of it. Beside model tuning lie the weights of
    the study's backbone.

    Raises:
        UserError: the devices are no multiple of the mesh, or cannot share the batch.
    """
    groups = tuple(stream.group for stream in experiment.data.streams)
    (device, *_) = jax.devices("cpu")
    if where is None:
        return Cost(_work(programs_of(experiment, groups, make_mesh(devices=[device])), experiment).flops, 0.0, 0.0, True)
    devices = [device] * where.size
    try:
        mesh, found = mesh_over(experiment, groups, devices, where.device.memory), True
    except DoesNotFit as error:  # told with all other jobs
        mesh, found = error.mesh, False
    programs = programs_of(experiment, groups, mesh)
    work = _work(programs, experiment)
    needed = estimate_training(programs, experiment).total
    if programs.prompt_module is None:
        needed += device_bytes(programs.train_arguments[0].trainable)
    return Cost(work.flops, roofline(work, where, mesh.shape).likely, needed, found and needed <= where.device.memory)


def _work(programs: Programs, experiment: Experiment) -> Work:
    """Of all steps."""
    return Work().plus(work_of(programs.train.trace(*programs.train_arguments)), experiment.train.steps)


def _shapes(experiment: Experiment) -> str:
    """Equal for trainings that cost the same: without the names of their tasks and files."""
    streams = tuple(StreamConfig("", stream.group) for stream in experiment.data.streams)
    return repr(
        dataclasses.replace(
            experiment,
            data=dataclasses.replace(experiment.data, mixture="", streams=streams),
            prompt=dataclasses.replace(experiment.prompt, init_file=""),
            loss=dataclasses.replace(experiment.loss, teachers=str(bool(experiment.loss.teachers))),
            train=dataclasses.replace(experiment.train, model_dir=""),
        )
    )


def describe(cells: Sequence[Cell], folder: Path, topology: str) -> str:
    """The points, the jobs that they are packed into, and what these compute; with a topology, its time and memory, too.

    Raises:
        UserError: a study that cannot be planned; an unknown task or topology; a task without labels or words to start from.
    """
    jobs = plan_jobs([cell.study for cell in cells])
    for study in {repr((cell.study.base.data, tasks_of(cell.study))): cell.study for cell in cells}.values():
        for task in tasks_of(study):
            find_task(study.base.data, task)
    for cell in cells:
        check_known_starts(cell.study)
    where = find_slice(topology) if topology else None
    done = {point.key for job in jobs for point in job.points if read_results(folder, point.key) is not None}
    total = sum(len(job.points) for job in jobs)
    shared = sum(len(point.cells) for job in jobs for point in job.points)
    lines = [
        f"{counted(len(cells), 'cell')}, {counted(shared, 'point')}"
        + (f", {total} of them different" if shared > total else "")
        + f", in {counted(len(jobs), 'job')}"
        + (f"; {counted(len(done), 'point')} done already" if done else ""),
        *(f"  {cell.name}" for cell in cells),
        "",
        f"jobs      points  prompts          steps   batch       FLOP  {'       time     GiB  ' if where else ''}what, each",
    ]
    rows, costs = [], []
    known: dict[str, Cost] = {}  # a T5 XXL takes seconds to trace, and many jobs are alike
    several = len({cell.study.base.backbone.checkpoint for cell in cells}) > 1
    for job in jobs:
        left = job.only([point.key for point in job.points if point.key not in done])
        if not left.points:
            continue
        stage = left.stage()
        trainings = [(_shapes(experiment), experiment) for experiment in stage.trainings]
        try:
            new = {shapes: experiment for shapes, experiment in trainings if shapes not in known}
            known |= {shapes: cost_of(experiment, where) for shapes, experiment in new.items()}
        except UserError as error:
            raise UserError(f"A job of the sweep ({stage.title}, {counted(len(left.points), 'point')}): {error}") from None
        each = [known[shapes] for shapes, _ in trainings]
        flops, seconds, memory, fits = zip(*each, strict=True)
        cost = Cost(sum(flops), sum(seconds), max(memory), all(fits))
        costs.append(cost)
        there = f"{duration(cost.seconds):>11} {cost.memory / GIB:7.2f}  " if where else ""
        backbone = f" ({stage.experiment.backbone.checkpoint})" if several else ""
        rows.append(
            f"{len(left.points):8}  {spread_of_lengths(left) or 'the model':<15}{steps_of(left):7,} "
            f"{stage.trainings[-1].data.batch_size:7,} {_si(cost.flops):>9}  {there}{stage.title}{_start(stage)}{backbone}"
        )
    lines += [f"{len(list(same)):4} x  {row}" for row, same in itertools.groupby(rows)]
    lines += ["", f"In all {_si(sum(cost.flops for cost in costs))}FLOP of training; validation and scoring come on top."]
    if costs:
        lines += _there(costs, where) if where else [ELSEWHERE]
    return "\n".join(lines)


def _there(costs: Sequence[Cost], where: Slice) -> list[str]:
    """The time of all jobs on these devices, and whether they fit."""
    seconds, limit = sum(cost.seconds for cost in costs), where.device.memory
    time = (
        f"On {where.size} x {where.device.name}, at {where.device.efficiency:.0%} of the peak and without communication: "
        f"{duration(seconds)} of training, if the jobs run one after another; compilation and loading come on top."
    )
    fit = f"GiB are what a device needs while training, estimated, and it has {limit / GIB:.2f}: "
    too_large = sum(not cost.fits for cost in costs)
    verdict = (
        f"{too_large} of {counted(len(costs), 'job')} would NOT fit. A smaller PipelineConfig.bank_size trains fewer prompts "
        "of targets side by side, TrainConfig.num_microbatches computes a batch in parts, T5Config.remat='full' keeps less, and "
        "PartitionConfig.num_partitions cuts the model."
    )
    return [time, fit + (verdict if too_large else "all jobs fit.")]


def _start(stage: Stage) -> str:
    """', from the best of 3 sources', where a run's start is found in the teachers."""
    if stage.transfer is None:
        return ""
    retrieval = stage.transfer.retrieval
    return f", from the {retrieval.use} of {counted(retrieval.top, 'source')}"


def _si(number: float) -> str:
    """'6.7 T', '44.5 E'."""
    power = min(max(int(math.log10(max(number, 1)) // 3), 0), len(PREFIXES) - 1)
    return f"{number / 1000**power:.1f} {PREFIXES[power]}"
