"""What a sweep would do and cost, told before anything is trained (`sweep --dry-run`)."""

import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import jax

from mpt_jax.board import read_results
from mpt_jax.config import Experiment, PartitionConfig
from mpt_jax.costs import Work, work_of
from mpt_jax.data.registry import find_task
from mpt_jax.jobs import plan_jobs, spread_of_lengths, steps_of
from mpt_jax.memory import programs_of
from mpt_jax.partitioning import make_mesh
from mpt_jax.pipeline import duration
from mpt_jax.plan import EFFICIENCY, Time, find_slice
from mpt_jax.stages import Stage, tasks_of
from mpt_jax.studies.wording import counted
from mpt_jax.study_data import check_known_starts
from mpt_jax.sweep import Cell

PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def describe(cells: Sequence[Cell], folder: Path, topology: str) -> str:
    """The points, the jobs that they are packed into, and what these compute; with a topology, how long that takes there.

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
        "jobs      points  prompts          steps   batch       FLOP  " + ("       time  " if where else "") + "what, each",
    ]
    sums, rows = [0.0, 0.0], []
    several = len({cell.study.base.backbone.checkpoint for cell in cells}) > 1
    for job in jobs:
        left = job.only([point.key for point in job.points if point.key not in done])
        if not left.points:
            continue
        stage = left.stage()
        work = functools.reduce(Work.plus, map(training_work, stage.trainings))
        seconds = 0.0
        if where:
            each = Time(work.flops / where.size / where.device.flops, work.weight_bytes / where.device.bandwidth, 0.0)
            seconds = each.likely
        sums = [sums[0] + work.flops, sums[1] + seconds]
        time = f"{duration(seconds):>11}  " if where else ""
        backbone = f" ({stage.experiment.backbone.checkpoint})" if several else ""
        rows.append(
            f"{len(left.points):8}  {spread_of_lengths(left) or 'the model':<15}{steps_of(left):7,} "
            f"{stage.trainings[-1].data.batch_size:7,} {_si(work.flops):>9}  {time}{stage.title}{_start(stage)}{backbone}"
        )
    lines += [f"{len(list(same)):4} x  {row}" for row, same in itertools.groupby(rows)]
    lines += ["", f"In all {_si(sums[0])}FLOP of training; validation and scoring come on top."]
    if where:
        lines.append(
            f"On {where.size} x {where.device.name}, at {EFFICIENCY:.0%} of the peak and without communication: "
            f"{duration(sums[1])} of training, if the jobs run one after another; compilation and loading come on top."
        )
    else:
        lines.append("With --topology=v5e:2x4 (or h100 …) also the time that this takes there; `plan` says whether a job fits.")
    return "\n".join(lines)


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


def training_work(experiment: Experiment) -> Work:
    """Of all steps of a run, from shapes: products of matrices, on all devices together. No data is read."""
    groups = tuple(stream.group for stream in experiment.data.streams)
    programs = programs_of(experiment, groups, make_mesh(PartitionConfig(), jax.devices()[:1]))
    return Work().plus(work_of(programs.train.trace(*programs.train_arguments)), experiment.train.steps)
